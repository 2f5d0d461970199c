"""Model FLOP/s utilisation of adapter training on a frozen base.

A frozen weight needs its forward product and the gradient to its input, not to itself: 4 operations a parameter and
token where full training needs 6. Attention's own products and recomputation are not in the MFU; `hfu` adds the
recomputed forward (2 operations more).
"""

from __future__ import annotations

import torch

# Dense bf16 peaks of one device, TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "B200": 2250, "L40S": 362, "L40": 181}


def peak_tflops(stated: float | None) -> float | None:
    """The stated peak, or the known one of this process's GPU, else None (no MFU is logged)."""
    if stated is not None:
        return stated
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((float(peak) for key, peak in PEAK_TFLOPS.items() if key in name), None)


def utilisation(
    tokens_per_s: float, matmul_parameters: int, peak: float, recomputed: bool, trained: bool = False
) -> tuple[float, float]:
    """(mfu, hfu) of one device, as shares of `peak` TFLOP/s.

    Args:
        tokens_per_s: per device.
        matmul_parameters: parameters of the base that multiply a token (all but the input embedding).
        recomputed: whether the forward runs again in the backward pass.
        trained: whether the base itself is, so that its weights have gradients too.
    """
    per_operation = tokens_per_s * matmul_parameters / (peak * 1e12)
    needed = 6 if trained else 4
    return needed * per_operation, (needed + 2 * recomputed) * per_operation
