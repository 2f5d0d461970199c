"""Records what the reference code computes, numbers only, into tests/parity/data.

    FVAE_REFERENCE=PATH python -m tests.parity.record

PATH is a clone of idiap/FVAE-LoRA, commit 1dfd8af. The first five cases of data/index.json came with the project and
are left alone.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file

from tests.parity import trajectory
from tests.parity.cases import DATA, NEW_RECORDINGS, RECORDED, random_tensors, settings_of
from tests.parity.reference import REFERENCE, run_reference


def record(folder: Path) -> None:
    """Run the reference once for all cases and write the files."""
    jobs = {}
    for number, (name, case) in enumerate(NEW_RECORDINGS.items()):
        given = {f"in/{key}": tensor for key, tensor in random_tensors(case, seed=100 + number).items()}
        jobs[name] = ({"kind": "one_layer", "settings": settings_of(case), "lora_alpha": case["lora_alpha"]}, given)
    start = trajectory.make_tensors()
    jobs |= {name: (trajectory.reference_job(name), start) for name in trajectory.LEARNING_RATES}
    results = run_reference(folder, jobs)

    for name in NEW_RECORDINGS:
        save_file({**jobs[name][1], **results[name]}, DATA / f"{name}.safetensors")
    (DATA / "index.json").write_text(json.dumps({**RECORDED, **NEW_RECORDINGS}, indent=1) + "\n")
    path = {f"{name}/{key}": t for name in trajectory.LEARNING_RATES for key, t in results[name].items()}
    (DATA / "trajectory").mkdir(exist_ok=True)
    save_file({**{f"in/{key}": t for key, t in start.items()}, **path}, DATA / "trajectory" / "run.safetensors")


if __name__ == "__main__":
    if not REFERENCE:
        sys.exit("FVAE_REFERENCE must be the path of a clone of idiap/FVAE-LoRA")
    with TemporaryDirectory() as temporary:
        record(Path(temporary))
