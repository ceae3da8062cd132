"""flash-linear-attention's operators beside ours, and the compilation of their kernels by many processes.

When a kernel of `fla` is first called it is tuned: up to 48 variants are compiled, a second or more each, one
after the other, and timed. An operator has some ten kernels, so its first call takes minutes, nearly all of
it compilation on one core. `warm` shares the variants out among processes, which put them into Triton's cache
on disk without running them. What measures then finds them there, and only has to time them, alone on the
GPU. What it finds fastest it keeps there too, so that `warm` once more compiles just that, for numbers of
heads that fla does not tune for again.
"""

import multiprocessing
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]
Call = tuple[Callable[..., Tensor], list[Tensor]]
# Which kernels there are does not depend on the length, and memory is for many processes here.
WARM_LENGTH = 512
# Milliseconds to warm up and to time a variant. Triton's own are 25 and 100.
TUNING = {"warmup": 5, "rep": 25}


def delta(shape: Shape, device: str) -> Call:
    """Gated DeltaNet in chunks."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    random = partial(torch.randn, device=device, dtype=torch.bfloat16)
    gate = torch.nn.functional.logsigmoid(random(shape[:3]))
    inputs = [*(random(shape) for _ in range(3)), gate, random(shape[:3]).sigmoid()]
    return lambda *x: chunk_gated_delta_rule(*x, use_qk_l2norm_in_kernel=True)[0], inputs


def gla(shape: Shape, device: str) -> Call:
    """Gated linear attention in chunks."""
    from fla.ops.gla import chunk_gla  # pyright: ignore[reportMissingImports]

    random = partial(torch.randn, shape, device=device, dtype=torch.bfloat16)
    gate = torch.nn.functional.logsigmoid(random()).clamp_min(-5)
    return lambda *x: chunk_gla(*x)[0], [*(random() for _ in range(3)), gate]


def convolution(shape: Shape, device: str) -> Call:
    """A depthwise convolution of 4 taps."""
    from fla.modules import ShortConvolution  # pyright: ignore[reportMissingImports]

    batch, length, heads, channels = shape
    layer = ShortConvolution(heads * channels, 4).to(device, torch.bfloat16)
    x = torch.randn(batch, length, heads * channels, device=device, dtype=torch.bfloat16)
    return lambda x: layer(x)[0], [x]


def _norm(shape: Shape, device: str) -> Call:
    """The norm of queries and keys in `delta`, whose kernel depends on the length after all."""
    from fla.modules.norm.l2norm import l2norm  # pyright: ignore[reportMissingImports]

    return l2norm, [torch.randn(shape, device=device, dtype=torch.bfloat16)]


# In the order of the table: names on the command line, and in it.
PEERS: dict[str, tuple[str, Callable[[Shape, str], Call]]] = {
    "delta": ("Gated DeltaNet (fla)", delta),
    "gla": ("GLA (fla)", gla),
    "conv": ("short convolution of 4 (fla)", convolution),
}


@contextmanager
def tuned_briefly() -> Iterator[None]:
    """Within, Triton takes less time for each variant of a kernel."""
    from triton.runtime import driver
    from triton.testing import do_bench

    active: Any = driver.active
    active.get_benchmarker = lambda: partial(do_bench, **TUNING)
    try:
        yield
    finally:
        del active.get_benchmarker


def warm(shapes: Sequence[Shape], names: Sequence[str], jobs: int, limit_seconds: float) -> None:
    """Compile what `bench` will time, in so many processes; what is not done by then is left to it."""
    end = time.time() + limit_seconds
    part = partial(_compile_part, jobs, list(shapes), list(names), end)
    began = time.perf_counter()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(part, range(jobs)))
    compiled, failed, late = (sum(counts) for counts in zip(*found, strict=True))
    print(
        f"{compiled} variants compiled or found in {time.perf_counter() - began:.0f} s by {jobs} processes; "
        f"{failed} cannot be, {late} were not begun within {limit_seconds:g} s"
    )


def _compile_part(
    parts: int, shapes: Sequence[Shape], names: Sequence[str], end: float, part: int
) -> tuple[int, int, int]:
    """Compile every so many-th variant: how many were, how many cannot be, how many were too late."""
    torch.set_num_threads(1)
    compiler = Compiler(part, parts, end)
    with compiler.instead_of_running():
        for shape, name in product(shapes, names):
            short = (shape[0], min(shape[1], WARM_LENGTH), *shape[2:])
            calls = {"delta": [(delta, short), (_norm, shape)], "gla": [(gla, short)]}
            for make, size in calls.get(name, [(convolution, shape)]):
                try:
                    function, inputs = make(size, "cuda")
                    inputs = [x.requires_grad_() for x in inputs]
                    out = function(*inputs)
                    torch.autograd.grad(out, inputs, torch.empty_like(out))
                except Exception as error:
                    # `bench` says so, too.
                    if part == 0:
                        print(f"{name} at {size}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
    return compiler.compiled, compiler.failed, compiler.late


class _NotTuned(Exception):
    """There are no timings of a kernel's variants on disk."""


def _not_tuned() -> None:
    raise _NotTuned


class Compiler:
    """Takes the place of Triton's tuner: compiles its part of a kernel's variants, and runs none."""

    def __init__(self, part: int, parts: int, end: float) -> None:
        """Args: end: the time of day (`time.time`) after which nothing more is begun."""
        self.part, self.parts, self.end = part, parts, end
        self.compiled = self.failed = self.late = 0
        self._begun: set[Any] = set()

    @contextmanager
    def instead_of_running(self) -> Iterator[None]:
        """Within, no tuned kernel is run."""
        from triton.runtime.autotuner import Autotuner

        run = Autotuner.run
        Autotuner.run = lambda tuner, *args, **kwargs: self.compile(tuner, args, kwargs)
        try:
            yield
        finally:
            Autotuner.run = run

    def compile(self, tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """This part's share of a call's variants: of those that are to be tuned, or of the one found."""
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        given = {n: x for n, x in (tuner.nargs | kwargs).items() if n in tuner.arg_names}
        # As Triton has it: so it finds what it has stored.
        key = (
            *(given[n] for n in tuner.keys if n in given),
            *(str(x.dtype) for x in given.values() if hasattr(x, "dtype")),
        )
        variants = tuner.prune_configs(kwargs) if len(tuner.configs) > 1 else tuner.configs
        if len(variants) > 1:
            with suppress(_NotTuned):
                tuner.check_disk_cache(key, variants, _not_tuned)
            if key in tuner.cache:
                variants = [tuner.cache[key]]
            elif (id(tuner), key) in self._begun:
                return
            self._begun.add((id(tuner), key))
        name = zlib.crc32(tuner.base_fn.__name__.encode())
        for number, variant in enumerate(variants, name):
            if number % self.parts != self.part:
                continue
            if time.time() > self.end:
                self.late += 1
                continue
            try:
                tuner.fn.run(*args, **kwargs | {"warmup": True}, **variant.all_kwargs())
                self.compiled += 1
            except Exception:
                self.failed += 1
