"""The planner beside training runs on H200s (docs/planner.md has the table and the commands that measured them)."""

from dataclasses import replace

import pytest

from fvae_dist.benchmarking.trial import ROOT, Setting, write_inputs
from fvae_dist.benchmarking.variants import FUSED, LORA, AdapterSize
from fvae_dist.plan_measure import GOAL_MEMORY, GOAL_TIME, plan_run
from fvae_dist.planning.hardware import Cluster, find_gpu
from fvae_dist.training.modeling import load_config
from fvae_dist.training.planned import subject_of
from fvae_dist.training.recipe_file import load_recipe

SDPA, FLASH = "sdpa", "flash_attention_2"
NOT_FLAT = ("training.flat_adapters=false",)
RESIDENT = ("training.deepspeed=ds_configs/zero3.json", "training.resident_weights=true")
OLD = ("training.head=trl",)  # measured before another head was there
OFFLOAD = ("training.activation_offload=true", "training.tiled_mlp=true")


@pytest.mark.parametrize(
    ("gpus", "shape", "length", "variant", "recompute", "attention", "shared", "changes", "measured_gib", "measured_s"),
    [
        (1, "8b", 16_384, LORA, "none", SDPA, 1, OLD, 81.96, 1.444),
        (1, "8b", 29_696, LORA, "none", SDPA, 1, OLD, 136.09, 3.264),
        (1, "8b", 32_768, FUSED, "none", SDPA, 1, OLD, 120.46, 3.705),
        (1, "8b", 37_888, FUSED, "none", SDPA, 1, OLD, 136.73, 4.600),
        (1, "8b", 262_144, FUSED, "selective", SDPA, 1, (*OLD, *OFFLOAD), 106.13, 142.949),
        (2, "8b", 131_072, FUSED, "selective", SDPA, 2, OLD, 56.29, 20.168),
        (2, "8b", 131_072, LORA, "selective", SDPA, 2, OLD, 57.43, 20.495),
        (2, "8b", 524_288, FUSED, "selective", SDPA, 2, (*OLD, *OFFLOAD), 105.54, 288.398),
        # What the host's constants were fitted to, and the same with zero3.json.
        (1, "1b", 4096, FUSED, "none", FLASH, 1, (), 8.2, 0.118),
        (1, "1b", 4096, FUSED, "none", FLASH, 1, NOT_FLAT, 8.2, 0.219),
        (1, "1b", 4096, FUSED, "none", FLASH, 1, RESIDENT, 8.3, 0.098),
        (1, "8b", 8192, FUSED, "full", FLASH, 1, RESIDENT, 20.1, 0.992),
        (1, "1b", 32_768, FUSED, "full", FLASH, 1, OLD, 8.70, 1.738),
        (1, "8b", 8192, FUSED, "full", FLASH, 1, OLD, 19.90, 1.028),
        (1, "8b", 32_768, FUSED, "full", FLASH, 1, OLD, 31.34, 6.762),
        (2, "1b", 32_768, FUSED, "full", FLASH, 1, OLD, 8.70, 1.684),
        (2, "8b", 8192, FUSED, "full", FLASH, 1, OLD, 19.70, 1.063),
    ],
)
def test_measured_runs(
    tmp_path, gpus, shape, length, variant, recompute, attention, shared, changes, measured_gib, measured_s
):
    """Those with SDPA had Liger's layers and zero3.json; those with flash-attn neither, on one GPU zero2.json."""
    adapter = AdapterSize().settings(variant, ["q_proj", "v_proj"])
    setting = Setting(shape, length, recompute == "full", adapter, SDPA, sequence_parallel=shared)
    folder = ROOT / "ds_configs" / ("zero3.json" if attention == SDPA or gpus > 1 else "zero2.json")
    stated = [f"training.deepspeed={folder}", f"training.recompute={recompute}"]
    path = write_inputs(replace(setting, steps=1, length=64), gpus, tmp_path)  # nobody reads the data
    recipe = load_recipe(path, [*stated, f"training.sequence_parallel={shared}", f"data.max_length={length}", *changes])
    subject = subject_of(recipe, load_config(recipe.model), attention, liger=attention == SDPA)
    planned = plan_run(recipe, subject, Cluster(replace(find_gpu("h200"), memory_gib=139.8), 1, gpus))
    assert planned.memory.total_gib == pytest.approx(measured_gib, rel=GOAL_MEMORY / 2)
    assert planned.step.seconds == pytest.approx(measured_s, rel=GOAL_TIME)
