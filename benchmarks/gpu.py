"""The operator on this machine's GPU: is it right, and how fast is it?

    python -m benchmarks.gpu check     every promise of `deform`, at real sizes; exit code 1 if one is broken
    python -m benchmarks.gpu bench     the table, and benchmarks/results/gpu-<device>.json
    python -m benchmarks.gpu warm      compile what `bench` times of flash-linear-attention, on all cores
    python -m benchmarks.gpu tune      our kernels with several settings, and tune-gpu-<device>.json beside it

All exit with code 2 where PyTorch sees no GPU. Shapes and method of the timings are those with which
flash-linear-attention compares its operators (median of `triton.testing.do_bench`, bf16), but that calls are
recorded as CUDA graphs where they can be, as training records its steps: the host's time does not count. Its
Gated DeltaNet, GLA and short convolution are timed too where the package `fla` is installed. Its kernels are
tuned when first called, minutes for an operator; after `warm` of the same shapes in the same order, seconds.
A part of the table has a file of its own:

    python -m benchmarks.gpu warm --shapes 1 0 2 3 --peers delta conv
    python -m benchmarks.gpu bench --shapes 1 0 2 3 --peers delta conv
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_fla, gpu_tune
from benchmarks.gpu_checks import CHECKS
from benchmarks.gpu_comparisons import NotRun, compare, shifted
from benchmarks.gpu_fla import Call, Shape
from starlm.bench.timing import recorded
from starlm.errors import InputError, StarLMError
from starlm.ops import deform

SHAPES = [
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (8, 1024, 8, 64),
]
# Mean shifts, in tokens: as a layer is initialised, and far.
SHIFTS = (0.8, 50.0)
DETERMINISTIC = f"deform, mean shift {SHIFTS[0]:g}, deterministic"
FORWARD, BOTH = "forward", "forward+backward"
# Tensors that must be moved at least: values, shift and out; then values, shift, grad and both gradients.
TENSORS = {FORWARD: 3, BOTH: 8}
# What the columns are called on the command line.
PEERS = ("deform", "attention", *gpu_fla.PEERS)
RESULTS = Path(__file__).parent / "results"
TUNE_SECONDS = 80.0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of the table."""

    shape: Shape
    peer: str
    kind: str
    milliseconds: float
    low: float
    """Lower quartile; `high` is the upper one."""
    high: float
    recorded: bool
    """As a CUDA graph; else the host's time counts where it is longer."""
    share_of_copy: float | None = None
    """Of the bandwidth of a plain copy of one such tensor; None for what need not move these tensors only."""


def main(arguments: list[str] | None = None) -> int:
    """The exit code of one command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("check", "bench", "warm", "tune"))
    every = range(len(SHAPES))
    listed = ", ".join(f"{number} is {'/'.join(map(str, shape))}" for number, shape in enumerate(SHAPES))
    parser.add_argument(
        "--shapes", type=int, nargs="+", choices=every, default=every, help=f"in this order; {listed}"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="beside a plain copy")
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="processes that compile (warm)"
    )
    parser.add_argument(
        "--limit-seconds", type=float, default=math.inf, help="begin to compile nothing after so long (warm)"
    )
    parser.add_argument(
        "--seconds", type=float, default=TUNE_SECONDS, help="begin no setting after so long (tune)"
    )
    options = parser.parse_args(arguments)
    what, shapes = options.what, [SHAPES[number] for number in options.shapes]
    try:
        if not torch.cuda.is_available():
            raise InputError(
                f"benchmarks.gpu {what} needs a GPU; PyTorch {torch.__version__} sees none here. The same "
                "kernels run on a CPU in Triton's interpreter: python -m pytest tests/ops/test_triton.py"
            )
        if find_spec("triton") is None:
            raise InputError("The package triton is missing. Run: pip install 'starlm[gpu]'")
        if what == "check":
            return check("cuda")
        if what == "bench":
            return bench("cuda", shapes, options.peers)
        if what == "tune":
            return tune("cuda", options.seconds)
        if not _has_fla():
            raise InputError("The package fla is missing. Run: pip install flash-linear-attention")
        names = [name for name in options.peers if name in gpu_fla.PEERS]
        gpu_fla.warm(shapes, names, options.jobs, options.limit_seconds)
        return 0
    except StarLMError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def check(device: str, length: int = 8192, checks: dict[str, Callable[[str, int], None]] = CHECKS) -> int:
    """Run all checks and say what each found; 1 if one failed, else 0."""
    failed = 0
    for name, run in checks.items():
        try:
            run(device, length)
            said = "ok"
        except NotRun as why:
            said = f"not run: {why}"
        except AssertionError as error:
            failed += 1
            said = f"FAILED: {error}"
        print(f"{name:<52} {said}", flush=True)
    print(f"{failed} of {len(checks)} failed" if failed else "No check failed.")
    return 1 if failed else 0


def bench(device: str, shapes: Sequence[Shape] = SHAPES, peers: Sequence[str] = PEERS) -> int:
    """Time these shapes and peers, print the table and write the results."""
    machine = _machine()
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    fla = any(name in gpu_fla.PEERS for name in peers) and _has_fla()
    if fla:
        print(f"kernels of fla are tuned with {gpu_fla.TUNING} ms for each variant")
    print()
    cells: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    words = part(shapes, peers)
    path = RESULTS / f"{'-'.join(['gpu', slug(machine['GPU']), *map(slug, words)])}.json"
    result = {
        "command": " ".join(["python -m benchmarks.gpu bench", *words]),
        "machine": machine,
        "dtype": "bfloat16",
        "tuning_of_fla_ms": gpu_fla.TUNING if fla else None,
        "cells": cells,
        "not_measured": skipped,
    }
    with gpu_fla.tuned_briefly() if fla else nullcontext():
        for shape in shapes:
            found = list(_measure(shape, device, skipped, peers))
            cells += map(asdict, found)
            print("\n".join(table(shape, found)), flush=True)
            # Whoever runs out of time has the shapes so far.
            path.write_text(json.dumps(result, indent=1) + "\n")
    for entry in skipped:
        print("not measured: " + ", ".join(str(value) for value in entry.values()))
    print(path)
    return 0


def tune(
    device: str, seconds: float = TUNE_SECONDS, problems: Iterable[gpu_tune.Problem] | None = None
) -> int:
    """Time the kernels with several settings and write what was found; 1 if one of them is wrong, else 0."""
    machine = _machine()
    print("\n".join(f"{name}: {value}" for name, value in machine.items()) + "\n")
    if problems is None:
        problems = gpu_tune.problems(device, SHAPES[1], SHIFTS, gpu_tune.LAYER_SHAPE)
    words = [] if seconds == TUNE_SECONDS else ["--seconds", f"{seconds:g}"]
    path = RESULTS / f"tune-gpu-{slug(machine['GPU'])}.json"
    tried: list[gpu_tune.Tried] = []
    for one in gpu_tune.measure(device, problems, seconds):
        tried.append(one)
        print(one, flush=True)
        result = {
            "command": " ".join(["python -m benchmarks.gpu tune", *words]),
            "machine": machine,
            "dtype": "bfloat16",
            "settings": [asdict(x) for x in tried],
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(["", "Fastest:", *map(str, gpu_tune.fastest(tried)), str(path)]))
    return 1 if any(one.why.startswith(gpu_tune.WRONG) for one in tried) else 0


def part(shapes: Sequence[Shape], peers: Sequence[str]) -> list[str]:
    """The words of the command line that ask for no more than these; none for all."""
    found = []
    if list(shapes) != SHAPES:
        found += ["--shapes", *(str(SHAPES.index(shape)) for shape in shapes)]
    if list(peers) != list(PEERS):
        found += ["--peers", *peers]
    return found


def _has_fla() -> bool:
    return find_spec("fla") is not None


def table(shape: tuple[int, ...], cells: Iterable[Cell]) -> Iterator[str]:
    """The lines of one shape."""
    yield f"{'B/T/H/C ' + '/'.join(map(str, shape)):<44}{'ms':>10}{'quartiles':>20}{'of copy':>9}"
    for cell in cells:
        share = "" if cell.share_of_copy is None else f"{cell.share_of_copy:.0%}"
        spread = f"{cell.low:.3f} - {cell.high:.3f}"
        how = "" if cell.recorded else "  not recorded"
        row = f"  {cell.peer + ', ' + cell.kind:<42}{cell.milliseconds:>10.3f}{spread:>20}{share:>9}{how}"
        yield row.rstrip()
    yield ""


def slug(device: str) -> str:
    """The device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _machine() -> dict[str, str]:
    """What the results must be read with."""
    from importlib.metadata import version

    from starlm.report.environment import environment

    packages = ("triton", "flash-linear-attention")
    found = {name: version(name) for name in packages if name == "triton" or _has_fla()}
    return (
        dict(environment()) | found | {"GPU": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
    )


def _measure(
    shape: Shape, device: str, skipped: list[dict[str, Any]], names: Sequence[str]
) -> Iterator[Cell]:
    random = partial(torch.randn, shape, device=device, dtype=torch.bfloat16)
    source, target = random(), random()
    copy = _time(lambda: target.copy_(source), shape=shape, peer="copy of one tensor", kind=FORWARD)
    yield replace(copy, share_of_copy=1.0)
    peers: dict[str, Callable[[], Call]] = {}
    for name in names:
        if name == "deform":
            peers |= _deformers(shape, device)
        elif name == "attention":
            peers["FlashAttention, causal (PyTorch)"] = partial(_attention, shape, device)
        else:
            peer, make = gpu_fla.PEERS[name]
            peers[peer] = partial(make, shape, device)
    for peer, make in peers.items():
        try:
            torch.use_deterministic_algorithms(peer == DETERMINISTIC)
            function, inputs = make()
            inputs = [x.requires_grad_() for x in inputs]
            grad = torch.randn_like(function(*inputs))

            def both(function=function, inputs=inputs, grad=grad):
                return torch.autograd.grad(function(*inputs), inputs, grad)

            for kind, call in ((FORWARD, partial(_without_gradient, function, inputs)), (BOTH, both)):
                cell = _time(call, shape=shape, peer=peer, kind=kind)
                if peer.startswith("deform"):
                    share = TENSORS[kind] / 2 * copy.milliseconds / cell.milliseconds
                    cell = replace(cell, share_of_copy=share)
                yield cell
        except Exception as error:
            # A peer that does not take this shape or this GPU, whatever it raises; ours must.
            if peer.startswith("deform"):
                raise
            line, *_ = str(error).split("\n")
            why = f"{type(error).__name__}: {line}"
            skipped.append({"shape": shape, "peer": peer, "why": why})
        finally:
            torch.use_deterministic_algorithms(False)


def _time(call: Callable[[], Any], **names: Any) -> Cell:
    from triton.testing import do_bench

    # Kernels of fla are tuned in the first call, which waits for the GPU.
    call()
    graph = None
    with suppress(RuntimeError):
        graph = recorded(call, torch.device("cuda"))
    median, low, high = do_bench(graph or call, quantiles=[0.5, 0.25, 0.75])
    return Cell(milliseconds=median, low=low, high=high, recorded=graph is not None, **names)


def _without_gradient(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return function(*inputs)


def _deformers(shape: Shape, device: str) -> dict[str, Callable[[], Call]]:
    """`deform` at each mean shift, and with its deterministic backward; none is timed before it is right."""

    def make(mean: float) -> Call:
        values, shift = shifted(shape, mean, device)
        try:
            compare(values[:1, :, :1], shift[:1, :, :1])
        except AssertionError as error:
            raise StarLMError(f"Timings of a wrong operator mean nothing: {error}.") from error
        return partial(deform, backend="triton"), [values, shift]

    peers = {f"deform, mean shift {mean:g}": partial(make, mean) for mean in SHIFTS}
    return peers | {DETERMINISTIC: partial(make, SHIFTS[0])}


def _attention(shape: Shape, device: str) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    batch, length, heads, channels = shape
    sizes = batch, heads, length, channels
    return call, [torch.randn(sizes, device=device, dtype=torch.bfloat16) for _ in range(3)]


if __name__ == "__main__":
    sys.exit(main())
