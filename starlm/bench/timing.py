"""Timing of calls side by side: in one process, round by round, so that a disturbance hits all alike.

And the memory that a call takes.
"""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

PROCESS = Path("/proc/self")
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


def interleave(calls: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, Timing]:
    """Times of all calls, each called once in every round; each round begins one call further on.

    Warming up is the caller's business.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    keys = list(calls)
    for number in range(rounds):
        start = number % max(len(keys), 1)
        for key in keys[start:] + keys[:start]:
            began = time.perf_counter()
            calls[key]()
            seconds[key].append(time.perf_counter() - began)
    return {key: Timing(tuple(values)) for key, values in seconds.items()}


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Bytes that the process held at the highest moment of a call, above those before.

    None where the system does not tell: only Linux does, and not in every sandbox.
    """
    before = _begin_peak()
    call()
    return None if before is None else max(_held("VmHWM") - before, 0)


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
