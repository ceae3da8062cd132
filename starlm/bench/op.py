"""The operator beside its peers: time per token over the length of a row, at a constant number of tokens.

    starlm bench op
    starlm bench op --preset acceptance --json

Peers, in one process and interleaved: the reference in plain PyTorch, torch.compile of it, the fused cpu
kernels, and causal scaled_dot_product_attention of the same width. The memory limit is the time that adding
two such tensors takes, which moves as many bytes as the forward pass must. Nothing is timed before the cpu
kernels and the compiled reference have given the reference's result on the very inputs.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from starlm.bench.config import OpOptions
from starlm.bench.grid import command, load
from starlm.bench.timing import Timing, interleave
from starlm.errors import StarLMError
from starlm.ops import deform
from starlm.ops.reference import deform_reference

Pass = Literal["forward", "both"]
PASSES: tuple[Pass, ...] = ("forward", "both")
NAMES = {"forward": "forward", "both": "forward+backward"}
REFERENCE, COMPILED, CPU, ATTENTION, MEMORY = "reference", "compiled", "cpu", "attention", "memory limit"
COLORS = {REFERENCE: "#9333ea", COMPILED: "#ea580c", CPU: "#2563eb", ATTENTION: "#dc2626", MEMORY: "#777777"}
STYLES = ("-", "--", ":", "-.")
# Mean of softplus(x), x standard normal: the shifts of a layer that has just been initialised.
SOFTPLUS_MEAN = 0.8059
# The length that longer ones, and claims, are compared at.
BASE = 2048
# Relative to the largest element: the kernels add up the gradient of values in another order.
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of the table."""

    length: int
    shift: float | None
    """Mean, in tokens; None where the peer has no shift."""
    peer: str
    kind: Pass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one length and one mean shift."""

    values: Tensor
    shift: Tensor
    grad: Tensor

    @classmethod
    def make(cls, batch: int, length: int, heads: int, channels: int, mean: float) -> "Problem":
        """Standard normal values, and softplus of standard normal, scaled to the mean, as shifts."""
        shape = (batch, length, heads, channels)
        random = torch.Generator().manual_seed(0)
        values, shift, grad = (torch.randn(shape, generator=random) for _ in range(3))
        shift = torch.nn.functional.softplus(shift).mul_(mean / SOFTPLUS_MEAN)
        return cls(values=values.requires_grad_(), shift=shift.requires_grad_(), grad=grad)

    def forward(self, function: Callable[..., Tensor]) -> Tensor:
        """The result alone."""
        with torch.no_grad():
            return function(self.values, self.shift)

    def both(self, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """The result and both gradients."""
        out = function(self.values, self.shift)
        return out.detach(), *torch.autograd.grad(out, (self.values, self.shift), self.grad)


def main(options: OpOptions, machine: dict[str, str]) -> dict[str, Any]:
    """Print the table, and draw it if `options.plot` says where.

    Args:
        machine: hardware and versions, to print and to keep with the figures.

    Returns:
        Everything that was measured, for JSON.

    Raises:
        StarLMError: the cpu kernels or the compiled reference compute something else than the reference.
    """
    began, before = time.perf_counter(), load()
    heads = options.dim // options.channels
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    print(
        f"{options.batch_tokens:,} tokens a call, D = {options.dim} ({heads} x {options.channels}), float32, "
        f"{torch.get_num_threads()} threads, {options.repeats} rounds, load {before}\n"
        "ns per token: median (interquartile range over median); x: times as fast as the reference; "
        "memory: share of the memory limit\n"
    )
    timings: dict[Cell, Timing] = {}
    skipped: dict[Cell, str] = {}
    print(_row("T", "shift", "", "forward", "x", "memory", "forward+backward", "x"))
    for length in sorted(options.lengths):
        found, missed = _measure(length, options, timings)
        timings |= found
        skipped |= missed
        print("\n".join(_rows(length, options, timings, skipped)), flush=True)
    summary = {"cpu_over_reference": _faster(options, timings), "cpu_time_per_token": _growth(options)}
    print("\n" + "\n".join(_say(summary)))
    if options.plot is not None:
        _draw(options.plot, {cell: _ns(timing, options) for cell, timing in timings.items()})
        print(f"\n{options.plot}")
    return {
        "command": command("op", options),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "load": {"before": before, "after": load()},
        "options": {name: value for name, value in vars(options).items() if name != "plot"},
        "heads": heads,
        "dtype": "float32",
        "cells": [
            {
                **asdict(cell),
                "ns_per_token": _ns(timing, options),
                "spread": timing.spread,
                "seconds": timing.seconds,
            }
            for cell, timing in timings.items()
        ],
        "skipped": [{**asdict(cell), "why": why} for cell, why in skipped.items()],
        **summary,
        "took_seconds": time.perf_counter() - began,
    }


def _measure(
    length: int, options: OpOptions, earlier: dict[Cell, Timing]
) -> tuple[dict[Cell, Timing], dict[Cell, str]]:
    """Timings of all cells of one length, and why some are missing."""
    batch, heads = options.batch_tokens // length, options.dim // options.channels
    problems = {s: Problem.make(batch, length, heads, options.channels, s) for s in options.shifts}
    functions = {REFERENCE: deform_reference, COMPILED: _compile(), CPU: _cpu}
    calls: dict[Cell, Callable[[], Any]] = {}
    skipped: dict[Cell, str] = {}
    for shift, problem in problems.items():
        wanted = problem.both(deform_reference)
        for peer, function in functions.items():
            why = _gate(peer, problem, function, wanted)
            for kind in PASSES:
                cell = Cell(length=length, shift=shift, peer=peer, kind=kind)
                if why:
                    skipped[cell] = why
                else:
                    calls[cell] = partial(getattr(problem, kind), function)

    problem = problems[options.shifts[0]]
    attention = Attention(problem)
    for kind in PASSES:
        cell = Cell(length=length, shift=None, peer=ATTENTION, kind=kind)
        seconds = _predict(cell, earlier)
        if seconds > options.limit_seconds:
            skipped[cell] = f"about {seconds:.2g} s a call, over the limit of {options.limit_seconds:g} s"
        else:
            calls[cell] = getattr(attention, kind)
            calls[cell]()
    memory = Cell(length=length, shift=None, peer=MEMORY, kind="forward")
    calls[memory] = partial(problem.forward, torch.add)
    calls[memory]()
    return interleave(calls, options.repeats), skipped


class Attention:
    """Causal attention of the same width; its queries, keys and values are one tensor each."""

    def __init__(self, problem: Problem) -> None:
        self.query, self.key, self.value = (
            x.detach().transpose(1, 2).contiguous().requires_grad_()
            for x in (problem.values, problem.grad, problem.values)
        )
        self.grad = problem.grad.transpose(1, 2).contiguous()

    def forward(self) -> Tensor:
        """The result alone."""
        with torch.no_grad():
            return self._attend()

    def both(self) -> tuple[Tensor, ...]:
        """All three gradients."""
        return torch.autograd.grad(self._attend(), (self.query, self.key, self.value), self.grad)

    def _attend(self) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            self.query, self.key, self.value, is_causal=True
        )


def _cpu(values: Tensor, shift: Tensor) -> Tensor:
    return deform(values, shift, backend="cpu")


def _compile() -> Callable[..., Tensor]:
    # Each length has its own code, as a model of that context would.
    torch.compiler.reset()
    return torch.compile(deform_reference, fullgraph=True, dynamic=False)


def _gate(peer: str, problem: Problem, function: Callable[..., Tensor], wanted: Iterable[Tensor]) -> str:
    """Why `function` cannot be timed here; nothing if it can. Calls both passes, so that they are warm.

    Raises:
        StarLMError: it computes something else than the reference.
    """
    try:
        got = (problem.forward(function), *problem.both(function)[1:])
    except Exception as error:
        # torch.compile needs a C++ compiler; the other peers are worth timing without it.
        if peer != COMPILED:
            raise
        return f"torch.compile does not run here ({type(error).__name__})"
    for name, a, b in zip(("output", "gradient of values", "gradient of shift"), got, wanted, strict=True):
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
        # Not `error > TOLERANCE`: NaN must not pass.
        if not error <= TOLERANCE:
            raise StarLMError(
                f"The {name} of {peer} is off by {error:.3g} of the largest element at B, T, H, C = "
                f"{tuple(problem.shift.shape)}, where {TOLERANCE:g} is allowed. Timings of a wrong operator "
                f"mean nothing. Run `starlm doctor` and report what it says."
            )
    return ""


def _predict(cell: Cell, earlier: dict[Cell, Timing]) -> float:
    """Seconds that attention will take, from the greatest shorter length: its cost per token grows as T."""
    known = {c.length: t for c, t in earlier.items() if (c.peer, c.kind) == (cell.peer, cell.kind)}
    return known[max(known)].median * cell.length / max(known) if known else 0.0


def _ns(timing: Timing, options: OpOptions) -> float:
    return timing.median / options.batch_tokens * 1e9


def _rows(
    length: int, options: OpOptions, timings: dict[Cell, Timing], skipped: dict[Cell, str]
) -> Iterable[str]:
    """The lines of the table for one length."""

    def figures(shift: float | None, peer: str) -> list[str]:
        row = []
        for kind in PASSES:
            cell = Cell(length=length, shift=shift, peer=peer, kind=kind)
            if cell in skipped:
                row += ["skipped", *[""] * (2 if kind == "forward" else 1)]
                continue
            if cell not in timings:
                continue
            timing = timings[cell]
            reference = timings.get(Cell(length=length, shift=shift, peer=REFERENCE, kind=kind))
            ratio = f"{reference.median / timing.median:.1f}" if reference else ""
            row += [f"{_ns(timing, options):,.1f} ({timing.spread:.0%})", ratio]
            if kind == "forward":
                limit = timings[Cell(length=length, shift=None, peer=MEMORY, kind="forward")]
                row.append(f"{limit.median / timing.median:.0%}")
        return row

    for shift in options.shifts:
        for peer in (REFERENCE, COMPILED, CPU):
            yield _row(str(length), f"{shift:g}", peer, *figures(shift, peer))
    for peer in (ATTENTION, MEMORY):
        yield _row(str(length), "", peer, *figures(None, peer))
    for cell, why in skipped.items():
        if cell.length == length:
            yield f"{length:>7} {'':6}  {cell.peer}, {NAMES[cell.kind]}: skipped, {why}"
    yield ""


def _row(length: str, shift: str, peer: str, *figures: str) -> str:
    forward, x, memory, both, x_both = (*figures, *[""] * 5)[:5]
    return f"{length:>7} {shift:>6}  {peer:<13}{forward:>17}{x:>7}{memory:>8}{both:>19}{x_both:>7}".rstrip()


def _faster(options: OpOptions, timings: dict[Cell, Timing]) -> list[dict[str, Any]]:
    """How many times as fast as the reference the cpu kernels are."""
    rows = []
    for kind in PASSES:
        for shift in options.shifts:
            for length in sorted(options.lengths):
                reference, cpu = (
                    timings[Cell(length=length, shift=shift, peer=peer, kind=kind)].median
                    for peer in (REFERENCE, CPU)
                )
                rows.append({"pass": NAMES[kind], "shift": shift, "length": length, "ratio": reference / cpu})
    return rows


def _growth(options: OpOptions) -> list[dict[str, Any]]:
    """Time per token of the cpu kernels at the longest T over that at T = `BASE`.

    Measured once more, the two lengths by turns: lines of the table that lie minutes apart do not compare.
    """
    lengths = (BASE, max(options.lengths))
    if BASE not in options.lengths or lengths[0] == lengths[1]:
        return []
    heads, rows = options.dim // options.channels, []
    for shift in options.shifts:
        calls: dict[tuple[int, Pass], Callable[[], Any]] = {}
        for length in lengths:
            problem = Problem.make(options.batch_tokens // length, length, heads, options.channels, shift)
            for kind in PASSES:
                calls[length, kind] = partial(getattr(problem, kind), _cpu)
                calls[length, kind]()
        timings = interleave(calls, 3 * options.repeats)
        for kind in PASSES:
            base, longest = (timings[length, kind] for length in lengths)
            rows.append(
                {
                    "pass": NAMES[kind],
                    "shift": shift,
                    "length": lengths[1],
                    "over": BASE,
                    "ratio": longest.median / base.median,
                    "spread": max(base.spread, longest.spread),
                }
            )
    return rows


def _say(summary: dict[str, Any]) -> Iterable[str]:
    """The summary in words."""
    for row in summary["cpu_over_reference"]:
        if row["length"] == BASE:
            yield (
                f"cpu, {row['pass']}, T = {BASE}, shifts of mean {row['shift']:g}: "
                f"{row['ratio']:.1f} times as fast as the reference"
            )
    for row in summary["cpu_time_per_token"]:
        yield (
            f"cpu, {row['pass']}, shifts of mean {row['shift']:g}: time per token at T = {row['length']} is "
            f"{row['ratio']:.2f} times that at T = {row['over']} (spread {row['spread']:.0%})"
        )


def _draw(path: Path, ns_per_token: Mapping[Cell, float]) -> None:
    from starlm.bench.plot import Line, draw

    shifts = list(dict.fromkeys(cell.shift for cell in ns_per_token if cell.shift is not None))
    panels: dict[str, list[Line]] = {NAMES[kind]: [] for kind in PASSES}
    for peer, color in COLORS.items():
        for shift in (*shifts, None):
            for kind in PASSES:
                points = [
                    (cell.length, ns)
                    for cell, ns in ns_per_token.items()
                    if (cell.peer, cell.shift, cell.kind) == (peer, shift, kind)
                ]
                label = peer if shift is None else f"{peer}, mean shift {shift:g}"
                style = ":" if shift is None else STYLES[shifts.index(shift) % len(STYLES)]
                if points:
                    panels[NAMES[kind]].append(Line(label=label, points=points, color=color, style=style))
    draw(path, panels, xlabel="T", ylabel="ns per token")
