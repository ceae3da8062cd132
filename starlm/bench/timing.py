"""Timing of calls side by side: in one process, round by round, so that a disturbance hits all alike.

And the memory that a call takes.
"""

import ctypes
import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from starlm.model.graph import capture

PROCESS = Path("/proc/self")
CPU = torch.device("cpu")
# A GPU works behind the host's back: so long a burst of calls is timed as one, and at most so many calls.
BURST_SECONDS, BURST_CALLS = 0.02, 1000
# Kernels are compiled, and libraries make their workspaces, in the first calls on a GPU.
WARM_CALLS = 2
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds of each call."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def timed(call: Callable[[], Any], *, device: torch.device = CPU, times: int = 1) -> float:
    """Seconds of a call: the mean of `times` in a row, the device idle before and after them."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return (time.perf_counter() - began) / times


def burst(seconds: float, device: torch.device) -> int:
    """How many calls that take so many seconds each are timed as one: on a CPU each by itself."""
    if device.type == "cpu":
        return 1
    return min(max(math.ceil(BURST_SECONDS / max(seconds, 1e-9)), 1), BURST_CALLS)


def recorded(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`call` as one CUDA graph: what the GPU does in it, without the time that Python takes to launch it.

    Its results, the same tensors each time, hold their memory until the graph is gone.

    Raises:
        RuntimeError: it cannot be recorded; most likely it waits for the GPU.
    """
    with torch.cuda.device(device):
        mode = torch.cuda.get_sync_debug_mode()
        # A recording that fails leaves PyTorch's random numbers unusable, so the likely reason is looked for.
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return capture(torch.enable_grad()(call), device)


def interleave(
    calls: Mapping[Key, Callable[[], Any]],
    rounds: int,
    *,
    device: torch.device = CPU,
    times: Mapping[Key, int] | None = None,
) -> dict[Key, Timing]:
    """Times of all calls, each timed once in every round; each round begins one call further on.

    Warming up is the caller's business.

    Args:
        times: how many calls in a row are timed as one; default 1 of each.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    keys = list(calls)
    for number in range(rounds):
        start = number % max(len(keys), 1)
        for key in keys[start:] + keys[:start]:
            seconds[key].append(timed(calls[key], device=device, times=times[key] if times else 1))
    return {key: Timing(tuple(values)) for key, values in seconds.items()}


def peak_memory(call: Callable[[], Any], *, device: torch.device = CPU) -> int | None:
    """Bytes held at the highest moment of a call, above those before: by the process, or by tensors of a GPU.

    None where the system does not tell: for a process only Linux does, and not in every sandbox.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        # Tensors are counted when the host asks for them, so there is nothing to wait for.
        return torch.cuda.max_memory_allocated(device) - before
    before = _begin_peak()
    call()
    return None if before is None else max(_held("VmHWM") - before, 0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _begin_peak() -> int | None:
    """Have the kernel count the peak from here on; the bytes that are held now."""
    gc.collect()
    try:
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            # What the allocator keeps for later would hide as much of the call's own.
            libc.malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
        return _held("VmRSS")
    except (OSError, TypeError):
        return None


def _held(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert found is not None
    return int(found[1]) * 1024
