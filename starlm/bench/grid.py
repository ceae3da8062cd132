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
from starlm.bench.timing import BURST_SECONDS, WARM_CALLS, Timing, burst, interleave, peak_memory, timed
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
    print()
    print(_row(grid.axis, *peers), flush=True)
    timings: dict[tuple[str, int], Timing] = {}
    skipped: dict[tuple[str, int], str] = {}
    peaks: dict[tuple[str, int], int | None] = {}
    sizes = sorted(options.sizes)
    known: dict[tuple[str, int], float] = {}
    times: dict[tuple[str, int], int] = {}
    for group in [sizes] if grid.together else [[size] for size in sizes]:
        calls = {}
        for size, (name, peer) in product(group, peers.items()):
            seconds = 0.0 if peer.cost is None else _predict(name, size, peer.cost, known)
            if seconds > options.limit_seconds:
                skipped[name, size] = (
                    f"about {seconds:.2g} s a call, over the limit of {options.limit_seconds:g} s"
                )
                continue
            call = calls[name, size] = _Call(peer, size)
            if device.type != "cpu":
                for _ in range(WARM_CALLS):
                    call()
            elif grid.memory and size == sizes[0]:
                # Compiling takes memory, too.
                call()
            if grid.memory:
                peaks[name, size] = peak_memory(call, device=device)
            if device.type != "cpu":
                # What records its calls (`starlm.train.step`) has done so then.
                call()
            if device.type != "cpu" or not grid.memory:
                known[name, size] = timed(call, device=device)
            times[name, size] = burst(known.get((name, size), 0.0), device)
        found = interleave(calls, options.repeats, device=device, times=times)
        for key in [key for key, call in calls.items() if call.failure]:
            skipped[key] = calls[key].failure
            for figures in (found, peaks, known):
                figures.pop(key, None)
        timings |= found
        known |= {key: timing.median for key, timing in found.items()}
        for size in group:
            print(_row(f"{size:,}", *(_figure(name, size, grid, timings) for name in peers)), flush=True)
    print("".join(f"\n{name} at {size:,}: skipped, {why}" for (name, size), why in skipped.items()))
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
        "left_out": left_out,
        "took_seconds": time.perf_counter() - began,
    }


class _Call:
    """A peer's call at one size. Once it has failed it does nothing, and `failure` says why."""

    def __init__(self, peer: Peer, size: int) -> None:
        self.failure = ""
        self._errors = Exception if peer.foreign else torch.OutOfMemoryError
        self._call: Callable[[], Any] = lambda: None
        self._guard(lambda: setattr(self, "_call", peer.make(size)))

    def __call__(self) -> None:
        self._guard(self._call)

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except self._errors as error:
            self.failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
        if self.failure:
            # Behind the handler: the error's frames hold tensors.
            self._call = lambda: None
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
    return f"{grid.value(timing.median, size):,.4g} ({timing.spread:.0%}){times}"


def _mebibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.0f}"


def _row(*cells: str) -> str:
    return f"{cells[0]:>9}" + "".join(f"{cell:>24}" for cell in cells[1:])


def command(verb: str, options: Any) -> str:
    """The command line that measures the same."""
    words = [f"starlm bench {verb}"]
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default and field.name != "plot":
            words += [
                f"--{field.name.replace('_', '-')}",
                *map(str, value if isinstance(value, Sequence) and not isinstance(value, str) else [value]),
            ]
    return " ".join(words)


def load() -> str:
    """Load averages; what else ran on the machine."""
    return " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
