"""Measuring: variants take turns, round by round; a variant that fails leaves the others to go on."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fvae_dist.benchmarking.floor import Ceilings

OUT_OF_MEMORY = "out of memory"


@dataclass
class Measured:
    """What one variant took: milliseconds of a call, round by round, and the largest peak of memory.

    Attributes:
        peak_bytes: allocated at the highest point of any round, all of this process; None on a CPU.
        extra_bytes: of these, what was not allocated when the round began.
        host_peak_bytes: largest resident set of a rank; of training runs only.
        device_ms: what a GPU works for a call, without waiting for the host; see `device_milliseconds`.
        error: why there is nothing, else empty.
    """

    ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    extra_bytes: int | None = None
    host_peak_bytes: int | None = None
    device_ms: float | None = None
    error: str = ""


def measure_in_turn(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warm_up: int,
    repeats: int = 1,
    prepare: Callable[[str], object] = lambda name: None,
) -> dict[str, Measured]:
    """Run every variant once a round, so that a drift of the clock rate meets all of them alike.

    Args:
        calls: variant -> what is timed.
        rounds: measured ones, after `warm_up` others.
        repeats: calls in a row that one measurement takes; its time is divided by them.
        prepare: called with the variant before each measurement, outside of it.
    """
    results = {name: Measured() for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            result = results[name]
            if result.error:
                continue
            prepare(name)
            result.error = _attempt(call, device, repeats, result, number >= warm_up)
            if result.error:
                result.ms.clear()
                free_memory(device)
    return results


def device_milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float | None:
    """Of all kernels and copies of one call together, by torch's profiler; None on a CPU, and where the profiler sees
    nothing. Where the host is what a call waits for, this is what it costs a GPU inside a model."""
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    synchronise(device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            call()
        synchronise(device)
    of_device = [event for event in found.key_averages() if event.device_type == DeviceType.CUDA]
    return sum(event.self_device_time_total for event in of_device) / 1e3 / repeats if of_device else None


def _attempt(call: Callable[[], object], device: torch.device, repeats: int, result: Measured, counts: bool) -> str:
    """One measurement; returns what went wrong, or nothing. The exception, and what it holds, ends here."""
    try:
        _measure(call, device, repeats, result, counts)
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except Exception as error:  # a kernel that does not compile raises what its compiler likes
        return describe(error)
    return ""


def _measure(call: Callable[[], object], device: torch.device, repeats: int, result: Measured, counts: bool) -> None:
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    elapsed = time.perf_counter() - started
    if not counts:
        return
    result.ms.append(1e3 * elapsed / repeats)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        result.peak_bytes = max(peak, result.peak_bytes or 0)
        result.extra_bytes = max(peak - before, result.extra_bytes or 0)


def describe(error: BaseException) -> str:
    """The error's first line, short enough for a table."""
    first = " ".join(str(error).split("\n", 1)[0].split())
    return f"{type(error).__name__}: {first}"[:160]


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronise(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def drop_gradients(parameters: Iterable[torch.Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copy bandwidth and matmul rate of this device now: the fastest of several large ones each."""
    on_gpu = device.type == "cuda"
    source = torch.ones((2**30 if on_gpu else 2**26) // 4, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    size = 8192 if on_gpu else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    copy_ms = _fastest_ms(lambda: copy.copy_(source), device)
    product_ms = _fastest_ms(lambda: torch.mm(a, b, out=product), device)
    return Ceilings(
        bytes_per_s=2 * source.numel() * source.itemsize / (copy_ms / 1e3),
        operations_per_s=2 * size**3 / (product_ms / 1e3),
    )


def _fastest_ms(call: Callable[[], object], device: torch.device) -> float:
    result = measure_in_turn({"": call}, device, rounds=10, warm_up=3, repeats=3)[""]
    if result.error:
        raise RuntimeError(f"the ceilings cannot be measured: {result.error}")
    return min(result.ms)
