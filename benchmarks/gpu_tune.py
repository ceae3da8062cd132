"""The GPU kernels of `deform` and of the fused layer with several settings: which is fastest on this GPU?

A setting is what the constants at the top of `starlm.ops.triton` and `starlm.ops.triton_mix` say. Each is
first compared with the definition, on two batch rows of the problem; what is wrong is named and not timed.
Calls are recorded in CUDA graphs, so the host's time does not count.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import gpu_comparisons
from benchmarks.gpu_fla import Shape
from starlm.bench.timing import recorded
from starlm.nn.deformer import Deformer
from starlm.ops import triton, triton_mix

FORWARD, BACKWARD = "forward", "backward"
# What only one of the two kernels looks at; then what both do.
ONLY = {FORWARD: ("TIME", "LANES", "WARPS", "EACH"), BACKWARD: ("SPAN", "SCATTER_EACH")}
CONSTANTS = *ONLY[FORWARD], *ONLY[BACKWARD], "PIECE", "STREAMS", "TILE"
READ = ((32, 32, 4, 2), (16, 32, 4, 2), (64, 32, 4, 2), (8, 128, 4, 2), (16, 64, 4, 2), (64, 32, 8, 2))
READ += ((16, 32, 2, 2), (32, 32, 4, 1), (16, 32, 4, 4), (32, 16, 4, 4), (64, 16, 4, 4))
SCATTER = (16, 2), (8, 2), (32, 2), (64, 2), (16, 1), (16, 4), (32, 4)
DEFORM = [dict(zip(ONLY[FORWARD], x, strict=True)) for x in READ]
DEFORM += [dict(zip(ONLY[BACKWARD], x, strict=True)) for x in SCATTER]
PIECES = [{"PIECE": 1 << x} for x in (21, 22, 23)] + [{"STREAMS": x} for x in (1, 2, 3, 4)]
LAYER = [*DEFORM, *PIECES, *({"TILE": 1 << x} for x in (10, 11, 12, 13))]
KINDS = {"gated": ("now",), "star": ("now", "now", "token", "box")}
LAYER_SHAPE: Shape = (8, 2048, 32, 64)
# Tensors that must be moved at least: for the layer see `starlm.ops.triton_mix`.
TENSORS = {triton: {FORWARD: 3, BACKWARD: 5}, triton_mix: {FORWARD: 5, BACKWARD: 8}}
# Of one graph, so that its start counts once for several.
CALLS = 4
WRONG = "WRONG"


@dataclass(frozen=True)
class Problem:
    """What kernels are timed on; `compare` raises AssertionError where they are wrong on a part of it."""

    name: str
    module: ModuleType
    inputs: tuple[Any, ...]
    """Of the module's `forward`, values first; its `backward` has the gradient before them."""
    compare: Callable[[], Any]
    settings: list[dict[str, int]]
    """To be tried after the one that the module has."""
    keeps: bool = False
    """Whether `forward` gives more than its result, which `backward` takes behind the gradient."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setting: how long the kernels take that the change concerns, or why they were not timed."""

    problem: str
    shape: Shape
    changed: dict[str, int] = field(default_factory=dict)
    setting: dict[str, int] = field(default_factory=dict)
    """All constants of the module, of which so many are not as it has them; none for a copy."""
    milliseconds: dict[str, float] = field(default_factory=dict)
    share_of_copy: dict[str, float] = field(default_factory=dict)
    """Of the bandwidth of a plain copy of one such tensor."""
    why: str = ""

    def __str__(self) -> str:
        words = " ".join(f"{name}={value}" for name, value in self.changed.items()) or "as it is"
        times = (
            f"{kind} {ms:.4f} ms {self.share_of_copy[kind]:4.0%}" for kind, ms in self.milliseconds.items()
        )
        return f"{self.problem:<28}{words:<34}{self.why or '   '.join(times)}"


def problems(device: str, shape: Shape, shifts: Iterable[float], layer: Shape) -> Iterator[Problem]:
    """`deform` at these mean shifts, then the fused layer; each is made when its turn comes."""
    for mean in shifts:
        values, shift = gpu_comparisons.shifted(shape, mean, device)
        compare = partial(gpu_comparisons.compare, *(x[:2, :-1, :2] for x in (values, shift)))
        inputs = values, shift, None, None, None
        yield Problem(f"deform, mean shift {mean:g}", triton, inputs, compare, DEFORM)
    for kind in KINDS:
        yield _layer_problem(device, layer, kind)


def _layer_problem(device: str, shape: Shape, kind: Any) -> Problem:
    batch, length, heads, channels = shape
    layer = Deformer(heads * channels, heads, preset=kind, kinds=KINDS[kind])
    tensors = torch.randn(4, batch, length, layer.dim, device=device, dtype=torch.bfloat16)
    # As an anchor every 16 tokens has it: queries between two read around the same row.
    rows = (torch.arange(length, device=device) // 16 * 16 - 1).expand(batch, length)
    near, anchored, boxes = (layer.kinds.count(x) for x in ("now", "token", "box"))
    by_head = tensors[:3].unflatten(-1, (heads, channels)).unbind()
    origin = rows[:, :, None].expand(batch, length, anchored).contiguous()
    inputs = *by_head, origin, None, near, boxes, float("inf")
    few = tensors[:, :2, :-1]
    compare = partial(gpu_comparisons.compare_read, layer, few[:3], few[3], None, {1: rows[:2, :-1]})
    return Problem(f"layer, {kind} ({near}+{anchored}+{boxes})", triton_mix, inputs, compare, LAYER, True)


def measure(device: str, problems: Iterable[Problem], seconds: float) -> Iterator[Tried]:
    """Every setting of every problem, after a copy; after so many seconds none is begun."""
    end, copy = time.monotonic() + seconds, 0.0
    for problem in problems:
        values, module = problem.inputs[0], problem.module
        as_it_is = {name: getattr(module, name) for name in CONSTANTS if hasattr(module, name)}
        for setting in ({}, *problem.settings):
            changed = {name: value for name, value in setting.items() if value != as_it_is[name]}
            if setting and not changed:
                continue
            names = {"changed": changed, "setting": as_it_is | setting}
            one = Tried(problem=problem.name, shape=tuple(values.shape), **names)
            if time.monotonic() >= end:
                yield replace(one, why="no time left")
                continue
            if not changed:
                copy = milliseconds(partial(torch.empty_like(values).copy_, values), device)
                times = {"milliseconds": {FORWARD: copy}, "share_of_copy": {FORWARD: 1.0}}
                yield Tried(problem="copy of one tensor", shape=one.shape, **times)
            try:
                with patch.multiple(module, **one.setting):
                    problem.compare()
                    times = _times(problem, changed, device)
            except Exception as error:
                # Wrong results, or whatever Triton raises for what this GPU has no room for.
                line, *_ = str(error).split("\n")
                name = WRONG if isinstance(error, AssertionError) else type(error).__name__
                yield replace(one, why=f"{name}: {line}")
            else:
                share = {kind: TENSORS[module][kind] / 2 * copy / ms for kind, ms in times.items()}
                yield replace(one, milliseconds=times, share_of_copy=share)


def _times(problem: Problem, changed: dict[str, int], device: str) -> dict[str, float]:
    grad, found = torch.randn_like(problem.inputs[0]), {}
    kept = problem.module.forward(*problem.inputs)[1:] if problem.keeps else ()
    if not changed or not changed.keys() <= set(ONLY[BACKWARD]):
        found[FORWARD] = milliseconds(partial(problem.module.forward, *problem.inputs), device)
    if not changed or not changed.keys() <= set(ONLY[FORWARD]):
        found[BACKWARD] = milliseconds(partial(problem.module.backward, grad, *kept, *problem.inputs), device)
    return found


def fastest(tried: Iterable[Tried]) -> list[Tried]:
    """The fastest setting of each problem, for each kernel."""
    best: dict[tuple[str, str], Tried] = {}
    for one in tried:
        for kind, ms in one.milliseconds.items() if one.setting else ():
            key = one.problem, kind
            if key not in best or ms < best[key].milliseconds[kind]:
                best[key] = replace(one, milliseconds={kind: ms})
    return list(best.values())


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Median of what the GPU takes for a call."""
    from triton.testing import do_bench

    def calls() -> None:
        for _ in range(CALLS):
            call()

    return do_bench(recorded(calls, torch.device(device)), warmup=10, rep=50, return_mode="median") / CALLS
