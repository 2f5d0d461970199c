"""The GPU table (`gpus.json`), the constants (`calibration.json`), and what they make of a cluster.

Rates that were measured replace the data sheet's; every other constant says in `calibration.json` whether it was
measured, fitted to measured steps, read in a source, or assumed.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any

GIB = 2**30


class PlanError(Exception):
    """A plan that cannot be made; the message is one line for the user."""


@dataclass(frozen=True)
class Constant:
    """One entry of calibration.json."""

    value: float
    unit: str
    kind: str
    source: str


@dataclass(frozen=True)
class Gpu:
    """One row of gpus.json. Rates of one GPU: FLOP/s, bytes/s (links: one direction)."""

    name: str
    memory_gib: float
    matmul_flops: float
    fp32_flops: float
    copy_bytes: float
    in_node_bytes: float
    pcie_bytes: float
    network_bytes: float
    peak_flops: float
    attention: dict[str, dict[str, float]]
    is_measured: bool

    def attention_flops(self, implementation: str, length: int) -> float:
        """FLOP/s of attention, forward and backward, at a sequence length; between measured lengths by its logarithm.

        Eager attention is made of plain kernels, which are counted as such.
        """
        shares = self.attention["flash" if implementation == "flash_attention_2" else "sdpa"]
        points = sorted((math.log2(int(key)), share) for key, share in shares.items())
        at = math.log2(max(length, 2))
        # Below the shortest length that was measured attention loses about a quarter with each halving.
        if at < points[0][0]:
            return points[0][1] * 0.75 ** (points[0][0] - at) * self.peak_flops
        for (x0, y0), (x1, y1) in pairwise(points):
            if at <= x1:
                return (y0 + (y1 - y0) * (at - x0) / (x1 - x0)) * self.peak_flops
        return points[-1][1] * self.peak_flops


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@cache
def constants() -> dict[str, Constant]:
    """calibration.json."""
    return {name: Constant(**entry) for name, entry in _load("calibration.json").items()}


def constant(name: str) -> float:
    return constants()[name].value


@cache
def gpu_names() -> tuple[str, ...]:
    return tuple(_load("gpus.json")["gpus"])


def find_gpu(name: str, network_gbit: float | None = None) -> Gpu:
    """The GPU of that name; the memory size may be left out where there is one only (h200).

    Args:
        network_gbit: Gbit/s between nodes for each GPU, instead of the table's.

    Raises:
        PlanError: unknown or ambiguous; names the nearest.
    """
    folded = name.strip().lower()
    matches = [known for known in gpu_names() if known == folded]
    matches = matches or [known for known in gpu_names() if known.startswith(f"{folded}-")]
    if not matches:
        nearest = difflib.get_close_matches(folded, gpu_names(), n=1, cutoff=0.0)[0]
        raise PlanError(f"--gpu: unknown GPU {name!r}; did you mean {nearest}? Known: {', '.join(gpu_names())}")
    if len(matches) > 1:
        raise PlanError(f"--gpu: {name!r} is one of {', '.join(matches)}")
    gpu = _gpu(matches[0], _load("gpus.json")["gpus"][matches[0]])
    if network_gbit is not None:
        gpu = replace(gpu, network_bytes=network_gbit / 8 * 1e9 * constant("network_share"))
    return gpu


def detect_gpu(network_gbit: float | None = None) -> tuple[Gpu, int]:
    """This machine's GPU, with the memory that it has, and how many there are.

    Raises:
        PlanError: there is none, or it is not in the table.
    """
    import torch

    if not torch.cuda.is_available():
        raise PlanError("--detect: there is no CUDA device here; name one with --gpu")
    device = torch.cuda.get_device_properties(0)
    entries = _load("gpus.json")["gpus"]
    # The longest name that occurs, so that an H100 PCIe is not taken for another H100.
    found = [(len(part), name) for name, row in entries.items() for part in row["cuda_names"] if part in device.name]
    if not found:
        raise PlanError(f"--detect: {device.name!r} is not in fvae_dist/planning/gpus.json; name one with --gpu")
    gpu = find_gpu(max(found)[1], network_gbit)
    return replace(gpu, memory_gib=device.total_memory / GIB), torch.cuda.device_count()


def _gpu(name: str, row: dict[str, Any]) -> Gpu:
    peak = row["bf16_tflops"] * 1e12
    matmul = row.get("bf16_tflops_measured", row["bf16_tflops"] * constant("matmul_share")) * 1e12
    copy = row.get("hbm_gb_s_measured", row["hbm_gb_s"] * constant("copy_share")) * 1e9
    pcie = row["pcie_gb_s"] * 1e9 * constant("pcie_share")
    nvlink = row["nvlink_gb_s"]
    return Gpu(
        name=name,
        memory_gib=row["memory_gib"],
        matmul_flops=matmul,
        fp32_flops=row["fp32_tflops"] * 1e12 * constant("fp32_share"),
        copy_bytes=copy * constant("elementwise_in_model"),
        in_node_bytes=nvlink * 1e9 * constant("nvlink_share") if nvlink else pcie,
        pcie_bytes=pcie,
        network_bytes=row["network_gbit"] / 8 * 1e9 * constant("network_share"),
        peak_flops=peak,
        attention=row["attention"],
        is_measured="bf16_tflops_measured" in row,
    )


@cache
def _load(name: str) -> dict[str, Any]:
    return json.loads(resources.files("fvae_dist.planning").joinpath(name).read_text(encoding="utf-8"))
