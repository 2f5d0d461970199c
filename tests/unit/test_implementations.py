"""Which attention and which layers are chosen, and that the choice does what its reason says."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fvae_dist import FVAETrainerMixin
from fvae_dist.training import implementations
from fvae_dist.training.implementations import (
    choose_attention,
    choose_head,
    choose_liger,
    lone_documents_through_sdpa,
    planned_attention,
    planned_liger,
    row_multiple,
    rows_of,
)
from fvae_dist.training.recipe import ModelSection, RecipeError
from tests.distributed.layouts import training_rows
from tests.distributed.tiny import attach, llama_config, rows, write_tokenizer
from tests.recipes import make_recipe

LLAMA = SimpleNamespace(model_type="llama")


def section(**settings) -> ModelSection:
    return ModelSection(name_or_path="x", **settings)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, ...): this machine has such a GPU, with or without flash-attn and cuDNN's attention."""

    def gpu(capability=(9, 0), flash=True, cudnn=91000, enabled=True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: enabled)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(implementations, "is_flash_attn_2_available", lambda: flash)

    return gpu


# ---------------------------------------------------------------------------------------------------------- attention


def test_auto_attention_gives_its_reason():
    for rows_ in ("single", "padded", "packed"):
        chosen, reason = choose_attention(section(), True, rows_)
        assert chosen == "sdpa" and "no CUDA device here" in reason
    assert choose_attention(section(attention="eager"), use_cpu=True) == ("eager", "asked for")


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_rows_without_padding_take_cudnns_kernel_where_torch_prefers_it(gpu, capability):
    gpu(capability)
    chosen, reason = choose_attention(section(), False, "single")
    assert chosen == "sdpa" and "cuDNN" in reason
    for rows_ in ("packed", "padded"):
        assert choose_attention(section(), False, rows_) == (
            "flash_attention_2",
            f"auto: {rows_} rows; flash-attn is installed and the device can",
        )


@pytest.mark.parametrize(
    "machine", [{"capability": (8, 0)}, {"capability": (8, 9)}, {"cudnn": 90100}, {"cudnn": None}, {"enabled": False}]
)
def test_without_cudnns_kernel_flash_attention_is_taken_for_all_rows(gpu, machine):
    gpu(**machine)
    assert choose_attention(section(), False, "single")[0] == "flash_attention_2"


@pytest.mark.parametrize("rows_", ["packed", "padded"])
def test_sdpa_says_that_a_mask_is_slow(gpu, rows_):
    gpu(flash=False)
    chosen, reason = choose_attention(section(), False, rows_)
    assert chosen == "sdpa" and f"slower kernels, because {rows_} rows need a mask" in reason
    assert "pip install flash-attn" in reason


def test_flash_attention_asked_for_on_cpu_is_refused_with_the_install_line():
    with pytest.raises(RecipeError, match=r"^model\.attention: flash_attention_2 .*pip install flash-attn"):
        choose_attention(section(attention="flash_attention_2"), use_cpu=True)


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "obstacle"),
    [
        (False, (9, 0), "bfloat16", "pip install flash-attn --no-build-isolation"),
        (True, (7, 5), "bfloat16", "compute capability"),
        (True, (9, 0), "float32", "needs model.dtype"),
        (True, (9, 0), "bfloat16", None),
    ],
)
def test_flash_attention_on_a_gpu(gpu, installed, capability, dtype, obstacle):
    gpu(capability, flash=installed)
    asked = section(attention="flash_attention_2", dtype=dtype)
    chosen, reason = choose_attention(section(dtype=dtype), use_cpu=False)
    if obstacle is None:
        assert choose_attention(asked, use_cpu=False) == ("flash_attention_2", "asked for")
        assert chosen == "flash_attention_2"
    else:
        assert chosen == "sdpa" and obstacle in reason
        with pytest.raises(RecipeError, match=obstacle):
            choose_attention(asked, use_cpu=False)


def test_rows_and_what_is_planned_for_them(tmp_path):
    def recipe(packing=False, micro_batch=1, **model):
        training = {"per_device_train_batch_size": micro_batch}
        return make_recipe(
            tmp_path, tmp_path, model={"dtype": "bfloat16", **model}, data={"packing": packing}, training=training
        )

    assert [rows_of(recipe()), rows_of(recipe(micro_batch=2)), rows_of(recipe(True))] == ["single", "padded", "packed"]
    assert planned_attention(recipe()) == "sdpa"
    assert planned_attention(recipe(True)) == planned_attention(recipe(micro_batch=2)) == "flash_attention_2"
    assert planned_attention(recipe(True, dtype="float32")) == "sdpa"
    assert planned_attention(recipe(attention="eager")) == "eager"


def test_rows_are_filled_up_for_cudnns_attention(gpu, tmp_path, monkeypatch):
    def make(positions):
        return LlamaForCausalLM._from_config(
            llama_config(max_position_embeddings=positions), attn_implementation="sdpa"
        )

    def multiple(use_cpu=False, attention="sdpa", length=100, positions=4096, **training):
        packing = training.pop("packing", False)
        data = {"packing": packing, "max_length": length}
        recipe = make_recipe(tmp_path, tmp_path, model={"dtype": "bfloat16"}, data=data, training=training)
        return row_multiple(recipe, attach(make(positions)), attention, use_cpu)

    gpu()
    assert multiple() == multiple(per_device_train_batch_size=4) == multiple(positions=128) == 32
    assert multiple(positions=127) is None and multiple(use_cpu=True) is None
    assert multiple(attention="flash_attention_2") is None and multiple(packing=True) is None
    assert multiple(sequence_parallel=2) is None
    with monkeypatch.context() as patch:
        patch.setattr(implementations, "is_causal", lambda model: False)
        assert multiple() is None
    gpu(capability=(8, 0))
    assert multiple() is None


class SFT(FVAETrainerMixin, SFTTrainer):
    pass


def train_one_step(folder, model, data, **arguments):
    """One step over `data` as one micro-batch; returns the trainer."""
    write_tokenizer(folder)
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "per_device_train_batch_size": len(data),
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    trainer = SFT(
        model=model,
        args=SFTConfig(**(values | arguments)),
        train_dataset=Dataset.from_list(data),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0, padding_free="seq_lengths" in data[0]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["single", "padded", "packed"])
def test_sdpa_gets_a_mask_only_where_rows_need_one(tmp_path, monkeypatch, kind):
    """cuDNN's and flash kernels take is_causal, no mask."""
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args, attn_mask=None, is_causal=False, **kwargs):
        calls.append((attn_mask is None, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    model = attach(LlamaForCausalLM._from_config(llama_config(), attn_implementation="sdpa"))
    data = {"single": rows(1), "padded": rows(2), "packed": training_rows("packed")[:1]}[kind]
    train_one_step(tmp_path, model, data)
    assert calls and set(calls) == ({(True, True)} if kind == "single" else {(False, False)})


@pytest.mark.parametrize(
    ("borders", "extra", "machine", "rows_", "taken"),
    [
        ([0, 6], {}, {}, "packed", "sdpa"),
        ([0, 2, 6], {}, {}, "packed", "flash"),  # two documents
        (None, {}, {}, "packed", "flash"),
        ([0, 6], {"sliding_window": 4}, {}, "packed", "flash"),
        ([0, 6], {"dtype": torch.float32}, {}, "packed", "flash"),
        ([0, 6], {}, {"capability": (8, 0)}, "packed", "flash"),  # SDPA would not be cuDNN's
        ([0, 6], {}, {}, "padded", "flash"),
    ],
    ids=str,
)
def test_packed_rows_of_one_document_take_sdpa(gpu, monkeypatch, borders, extra, machine, rows_, taken):
    gpu(**machine)
    flash = lambda *_, **__: ("flash", None)  # noqa: E731
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    generator = torch.Generator().manual_seed(0)
    dtype = extra.pop("dtype", torch.bfloat16)
    q, k, v = (torch.randn(1, heads, 6, 8, generator=generator).to(dtype) for heads in (4, 2, 2))
    if borders is not None:
        extra["cu_seq_lens_q"] = torch.tensor(borders, dtype=torch.int32)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True)
    with lone_documents_through_sdpa("flash_attention_2", section(dtype="bfloat16"), False, rows_):
        out, _ = ALL_ATTENTION_FUNCTIONS["flash_attention_2"](module, q, k, v, None, dropout=0.0, scaling=0.3, **extra)
    assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"] is flash
    if taken == "flash":
        assert out == "flash"
        return
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert torch.equal(out, expected)


# -------------------------------------------------------------------------------------------------------------- Liger


def liger(tmp_path, asked, use_cpu=False, config=LLAMA):
    recipe = make_recipe(tmp_path, tmp_path, training={"use_liger_kernel": asked})
    return choose_liger(recipe, config, use_cpu)


def test_liger_is_off_on_cpu_and_for_those_who_say_so(tmp_path):
    assert liger(tmp_path, "auto", use_cpu=True) == (False, "auto: Liger's kernels need a GPU")
    assert liger(tmp_path, False) == (False, "asked for")
    with pytest.raises(RecipeError, match=r"^training\.use_liger_kernel: Liger's kernels need a GPU"):
        liger(tmp_path, True, use_cpu=True)


def test_liger_that_is_not_installed_is_off_and_refused_to_those_who_ask(tmp_path, monkeypatch):
    monkeypatch.setattr(implementations, "is_liger_kernel_available", lambda: False)
    chosen, reason = liger(tmp_path, "auto")
    assert not chosen and "pip install liger-kernel" in reason
    with pytest.raises(RecipeError, match=r"^training\.use_liger_kernel: Liger is not installed"):
        liger(tmp_path, True)
    assert not planned_liger(make_recipe(tmp_path, tmp_path), LLAMA)


def test_liger_is_on_for_architectures_that_it_knows(tmp_path):
    pytest.importorskip("liger_kernel")
    assert liger(tmp_path, "auto") == (True, "auto: installed, and it knows llama")
    assert liger(tmp_path, True) == (True, "asked for")
    assert planned_liger(make_recipe(tmp_path, tmp_path, training={"use_liger_kernel": "auto"}), LLAMA)
    unknown = SimpleNamespace(model_type="gpt2")
    assert liger(tmp_path, "auto", config=unknown) == (False, "auto: Liger has no layers for gpt2")
    with pytest.raises(RecipeError, match="Liger has no layers for gpt2"):
        liger(tmp_path, True, config=unknown)


def test_the_head_is_fused_where_it_can_be(tmp_path, caplog):
    def head(asked, use_cpu=False):
        return choose_head(make_recipe(tmp_path, tmp_path, training={"head": asked}), model, use_cpu)

    model = attach(LlamaForCausalLM(llama_config()))
    assert head("auto") and head("fused") and not head("trl")
    with caplog.at_level("INFO"):
        assert not head("auto", use_cpu=True)
    assert "head: TRL's (auto: it needs a GPU)" in caplog.text
    model.get_output_embeddings().weight.requires_grad_(True)
    assert not head("auto")
    with pytest.raises(RecipeError, match=r"^training\.head: fused: the head is trained"):
        head("fused")


def test_a_fused_head_on_a_cpu_is_refused_before_anything_is_loaded(tmp_path):
    recipe = make_recipe(tmp_path, tmp_path, training={"head": "fused"})
    with pytest.raises(RecipeError, match=r"^training\.head: fused: it needs a GPU"):
        choose_liger(recipe, LLAMA, use_cpu=True)


def test_liger_leaves_the_head_to_trl(tmp_path, monkeypatch):
    """One head, that makes no whole logits: TRL's. Liger's layers are Triton; here they are only put in place."""
    patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    placed = []
    monkeypatch.setattr(patch, "_patch_rms_norm_module", lambda module: placed.append(type(module).__name__))
    monkeypatch.setattr(patch, "_patch_swiglu_module", lambda module, _: placed.append(type(module).__name__))
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # what Liger replaces for good
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    replaced = []

    def put_in_place(model, **settings):
        replaced.append(settings)
        patch.apply_liger_kernel_to_llama(model=model, rope=False, **settings)

    monkeypatch.setattr("liger_kernel.transformers._apply_liger_kernel_to_instance", put_in_place)
    trainer = train_one_step(tmp_path, attach(LlamaForCausalLM(llama_config())), rows(2), use_liger_kernel=True)
    assert replaced == [{"fused_linear_cross_entropy": False}]
    assert sorted(set(placed)) == ["LlamaMLP", "LlamaRMSNorm"] and len(placed) == 2 + 5
    assert "fused_forward" in trainer.model.get_base_model().forward.__func__.__code__.co_name
    assert "mean_token_accuracy" in trainer.state.log_history[0]  # TRL's head makes it
