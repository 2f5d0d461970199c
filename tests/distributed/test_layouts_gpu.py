"""The invariances on two GPUs in bf16; run with -m gpu."""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.distributed import layouts, resident
from tests.distributed.tiny import attach, load, pad_rows

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]

# bf16 holds 8 bits, and layouts pad to other lengths, so that other kernels round in other places. Padding on the left
# moves the positions, and with them the rounding of every rotary angle.
LOSS_RTOL = 1e-3
FROM_FP32 = 1e-1  # of the norm of all adapter gradients together
FROM_EACH_OTHER = {"left": 1e-1, "else": 2e-2}
RESIDENT = [f"resident_{layout}" for layout in resident.LAYOUTS]
LAYOUTS = [*layouts.LAYOUTS, *layouts.SEQUENCE_PARALLEL, "sp_resident", *layouts.TILED, *RESIDENT, *resident.FLAT]


@pytest.fixture(scope="module")
def reference(two_gpus):
    """One process, one padded batch; base and products in fp32, on CPU."""
    model = attach(load(two_gpus.folder / "model")).train()
    return layouts.reference_step(model, pad_rows(layouts.documents()))


def distance(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, all parameters together."""
    assert set(gradients) == set(expected)
    difference = sum(float((gradients[name] - value).square().sum()) for name, value in expected.items())
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_equals_one_process_in_fp32(two_gpus, reference, layout, rank):
    result = two_gpus.result(layout, rank)
    log = result["log"][0]
    off = {key: abs(log[f"loss/{key}"] / reference[key] - 1) for key in ("task", "neg_elbo")}
    off["gradient"] = distance(result["gradients"], reference["gradients"])
    print(f"{layout}: " + ", ".join(f"{key} {value:.1e}" for key, value in off.items()))
    assert off["task"] < LOSS_RTOL and off["neg_elbo"] < LOSS_RTOL and off["gradient"] < FROM_FP32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_with_each_other(two_gpus, layout):
    first = two_gpus.result("z3_sft_full")["gradients"]
    off = distance(two_gpus.result(layout)["gradients"], first)
    print(f"{layout}: {off:.1e}")
    form = layouts.LAYOUTS.get(resident.layout_of(layout), ("else",))[-1]
    assert off < FROM_EACH_OTHER.get(form, FROM_EACH_OTHER["else"])
