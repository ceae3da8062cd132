"""A table of peers over sizes: each size measured round by round, printed as it comes, kept for JSON."""

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import torch

from starlm.bench.config import GridOptions
from starlm.bench.timing import (
    BURST_SECONDS,
    WARM_CALLS,
    Timing,
    burst,
    interleave,
    peak_memory,
    recorded,
    timed,
)
from starlm.device import describe, pick_device

Make = Callable[[int], Callable[[], Any]]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One column of the table."""

    make: Make
    """From a size to a call; the call is made untimed first."""
    cost: Callable[[int], float] | None = None
    """What a call costs at a size, up to a factor, if so much that it may have to be left out."""
    foreign: bool = False
    """Of another package: whatever it raises leaves a cell out; else only what does not fit into memory."""
    left_out: str = ""
    """Why it has no column here."""
    record: bool = False
    """On a GPU, record a call as a CUDA graph and time that; if it cannot be recorded, time it as it is."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a table says."""

    axis: str
    """What the sizes are."""
    unit: str
    value: Callable[[float, int], float]
    """From the seconds of a call and its size to the figure in the table."""
    baseline: str
    """The peer that the others are compared with: so many times its seconds."""
    memory: bool = False
    """Whether the memory that a call takes is of interest, too."""
    together: bool = False
    """Whether it is the sizes that are compared, so that all of them go by in the same rounds."""


def run(
    verb: str, grid: Grid, peers: Mapping[str, Peer], options: GridOptions, machine: dict[str, str]
) -> dict[str, Any]:
    """Measure and print the table, and draw it if `options.plot` says where; everything for JSON.

    Args:
        verb: as in `starlm bench layer`.
        peers: in the order of the columns.
        machine: hardware and versions.

    Raises:
        InputError: a device that this machine does not have.
    """
    device = pick_device(options.device)
    began, before, machine = time.perf_counter(), load(), machine | describe(device)
    left_out = {name: peer.left_out for name, peer in peers.items() if peer.left_out}
    peers = {name: peer for name, peer in peers.items() if not peer.left_out}
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    print(
        f"{options.describe()}, {torch.get_num_threads()} threads, {options.repeats} rounds, load {before}\n"
        f"{grid.unit}: median (interquartile range over median); x: seconds over those of {grid.baseline}"
    )
    if device.type != "cpu":
        print(
            f"Each time is that of {BURST_SECONDS * 1e3:g} ms of calls in a row, or of one longer call, the "
            "GPU idle before and after, over the calls: where the host is slower, the host is what is timed."
        )
        if any(peer.record for peer in peers.values()):
            print(
                "Calls are recorded as CUDA graphs and replayed, as steps of training are: that is the GPU's "
                "time. What cannot be recorded is named below and timed as the host launches it."
            )
    print()
    print(_row(grid.axis, *peers), flush=True)
    timings: dict[tuple[str, int], Timing] = {}
    skipped: dict[tuple[str, int], str] = {}
    unrecorded: dict[tuple[str, int], str] = {}
    peaks: dict[tuple[str, int], int | None] = {}
    sizes = sorted(options.sizes)
    known: dict[tuple[str, int], float] = {}
    times: dict[tuple[str, int], int] = {}
    for group in [sizes] if grid.together else [[size] for size in sizes]:
        calls: dict[tuple[str, int], _Call] = {}
        for size, (name, peer) in product(group, peers.items()):
            seconds = 0.0 if peer.cost is None else _predict(name, size, peer.cost, known)
            if seconds > options.limit_seconds:
                skipped[name, size] = (
                    f"about {seconds:.2g} s a call, over the limit of {options.limit_seconds:g} s"
                )
                continue
            key = name, size
            calls[key] = _Call(peer, size)
            peaks[key], seconds = calls[key].prepare(device, grid.memory, compiled=size != sizes[0])
            if seconds is not None:
                known[key] = seconds
            times[key] = burst(seconds or 0.0, device)
        found = interleave(calls, options.repeats, device=device, times=times)
        unrecorded |= {key: call.unrecorded for key, call in calls.items() if call.unrecorded}
        failed = {key: call.failure for key, call in calls.items() if call.failure}
        # What graphs hold would stand beside the next size.
        calls.clear()
        skipped |= failed
        for key, figures in product(failed, (found, peaks, known)):
            figures.pop(key, None)
        timings |= found
        known |= {key: timing.median for key, timing in found.items()}
        for size in group:
            print(_row(f"{size:,}", *(_figure(name, size, grid, timings) for name in peers)), flush=True)
    print("".join(f"\n{name} at {size:,}: skipped, {why}" for (name, size), why in skipped.items()))
    for (name, size), why in unrecorded.items():
        print(f"{name} at {size:,}: not recorded, {why}")
    print("".join(f"{name}: left out, {why}\n" for name, why in left_out.items()), end="")
    if any(peaks.values()):
        title = "MiB that a call takes at its highest moment, above those before"
        print(f"\n{title}\n\n{_row(grid.axis, *peers)}")
        for size in sizes:
            cells = ("skipped" if (n, size) in skipped else _mebibytes(peaks.get((n, size))) for n in peers)
            print(_row(f"{size:,}", *cells))
    if options.plot is not None:
        from starlm.bench.plot import Line, draw

        points = {
            name: [
                (size, grid.value(timings[name, size].median, size))
                for size in sizes
                if (name, size) in timings
            ]
            for name in peers
        }
        lines = [Line(label=name, points=found) for name, found in points.items() if found]
        draw(options.plot, {f"starlm bench {verb}": lines}, xlabel=grid.axis, ylabel=grid.unit)
        print(f"\n{options.plot}")
    return {
        "command": command(verb, options),
        "machine": machine,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "load": {"before": before, "after": load()},
        "options": {name: value for name, value in vars(options).items() if name != "plot"},
        "axis": grid.axis,
        "unit": grid.unit,
        "baseline": grid.baseline,
        "cells": [
            {
                "peer": name,
                "size": size,
                "value": grid.value(timing.median, size),
                "over_baseline": _ratio(name, size, grid, timings),
                "spread": timing.spread,
                "peak_bytes": peaks.get((name, size)),
                "seconds": timing.seconds,
                "calls": times[name, size],
            }
            for (name, size), timing in timings.items()
        ],
        "skipped": [{"peer": name, "size": size, "why": why} for (name, size), why in skipped.items()],
        "not_recorded": [
            {"peer": name, "size": size, "why": why} for (name, size), why in unrecorded.items()
        ],
        "left_out": left_out,
        "took_seconds": time.perf_counter() - began,
    }


class _Call:
    """A peer's call at one size. Once it has failed it does nothing, and `failure` says why."""

    def __init__(self, peer: Peer, size: int) -> None:
        self.failure = self.unrecorded = ""
        self._errors = Exception if peer.foreign else torch.OutOfMemoryError
        self._record = peer.record
        self._call: Callable[[], Any] = lambda: None
        self._guard(lambda: setattr(self, "_call", peer.make(size)))

    def __call__(self) -> None:
        self._guard(self._call)

    def prepare(
        self, device: torch.device, memory: bool, *, compiled: bool
    ) -> tuple[int | None, float | None]:
        """Have all ready for timing: the peak of its memory, if that is asked for, and about its seconds.

        Args:
            compiled: it has been called at another size, so its memory is not that of a compiler.
        """
        if device.type == "cpu":
            if not memory:
                return None, timed(self)
            if not compiled:
                self()
            return peak_memory(self), None
        for _ in range(WARM_CALLS):
            self()
        peak = peak_memory(self, device=device) if memory else None
        if self._record and not self.failure:
            self._replay(device)
        # What records its calls itself (`starlm.train.step`) has done so then.
        self()
        return peak, timed(self, device=device)

    def _replay(self, device: torch.device) -> None:
        """Record the call; from here on it is replayed."""
        try:
            self._call = recorded(self._call, device)
        except (RuntimeError, self._errors) as error:
            # Leaving the recording fails too, and says less.
            cause = error.__context__
            self.unrecorded = _said(cause if isinstance(cause, RuntimeError) else error)
        if self.unrecorded:
            _free()

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except self._errors as error:
            self.failure = _said(error)
        if self.failure:
            self._call = lambda: None
            _free()


def _said(error: BaseException) -> str:
    """In one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def _free() -> None:
    """Give back what a call held that failed. Not in the handler: the error's frames hold tensors."""
    gc.collect()
    torch.cuda.empty_cache()


def _predict(
    name: str, size: int, cost: Callable[[int], float], known: Mapping[tuple[str, int], float]
) -> float:
    """Seconds of a call, from the next smaller size; 0 without one."""
    seconds = {s: found for (peer, s), found in known.items() if peer == name}
    return seconds[max(seconds)] * cost(size) / cost(max(seconds)) if seconds else 0.0


def _ratio(name: str, size: int, grid: Grid, timings: Mapping[tuple[str, int], Timing]) -> float | None:
    baseline = timings.get((grid.baseline, size))
    return timings[name, size].median / baseline.median if baseline else None


def _figure(name: str, size: int, grid: Grid, timings: Mapping[tuple[str, int], Timing]) -> str:
    timing = timings.get((name, size))
    if timing is None:
        return "skipped"
    ratio = _ratio(name, size, grid, timings)
    times = "" if ratio is None or name == grid.baseline else f" {ratio:.2f}x"
    value = grid.value(timing.median, size)
    shown = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return f"{shown} ({timing.spread:.0%}){times}"


def _mebibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.0f}"


def _row(*cells: str) -> str:
    return f"{cells[0]:>9}" + "".join(f"{cell:>24}" for cell in cells[1:])


def command(verb: str, options: Any) -> str:
    """The command line that measures the same."""
    words = [f"starlm bench {verb}"]
    for field in fields(options):
        value = getattr(options, field.name)
        if value == field.default or field.name == "plot":
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            several = isinstance(value, Sequence) and not isinstance(value, str)
            words += [f"--{name}", *map(str, value if several else [value])]
    return " ".join(words)


def load() -> str:
    """Load averages; what else ran on the machine."""
    return " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
