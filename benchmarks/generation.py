"""What generation does besides steps, by our kernels and by PyTorch: reading prompts, choosing tokens.

    python -m benchmarks.generation --out benchmarks/results/generation.json

Both ways run in one process, by turns, on a CPU.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

# As the command has it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch

from starlm.generate.sampling import Sampler, Sampling, choose
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.nn import block
from starlm.nn.deformer import Deformer
from starlm.ops import elementwise, plain
from starlm.report.environment import environment

WAYS = ("kernels", "PyTorch")
OPTIONS = {
    "greedy": {"temperature": 0},
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    "all": {"repetition_penalty": 1.1, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
}


@contextmanager
def composed() -> Iterator[None]:
    """Layers read a prompt as they are written, in PyTorch, but for `deform`."""
    nothing, rms = lambda *args: None, elementwise.rms
    by_pytorch = lambda x, *, step=False, cast=False: rms(x, cast=cast)  # noqa: E731
    with patch.object(Deformer, "_step", nothing), patch.object(block, "rms", by_pytorch):
        yield


def paired(ways: tuple[Callable[[], object], ...], rounds: int, calls: int) -> list[list[float]]:
    """Quartiles of ms a call, of each way."""
    times: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, found in zip(ways, times, strict=True):
            begin = time.perf_counter()
            for _ in range(calls):
                way()
            if number:
                found.append((time.perf_counter() - begin) / calls * 1e3)
    return [statistics.quantiles(found, n=4) for found in times]


@torch.inference_mode()
def prompts(lengths: list[int], rounds: int) -> Iterator[tuple[str, list[list[float]]]]:
    """A prompt of the main model, and its first logits."""
    torch.manual_seed(0)
    model = StarLM(StarLMConfig(depth=6, dim=256, vocab_size=4096)).eval()
    for length in lengths:
        tokens = torch.randint(4096, (1, length))

        def read(tokens: torch.Tensor = tokens) -> None:
            model(tokens, state=model.new_state(), last_only=True)

        def read_composed(read: Callable[[], None] = read) -> None:
            with composed():
                read()

        yield f"prompt of {length}", paired((read, read_composed), rounds, 3)


def choosing(batches: list[int], vocab: int, rounds: int) -> Iterator[tuple[str, list[list[float]]]]:
    """A token for each stream, of normal logits with a standard deviation of 2.5."""
    torch.manual_seed(0)
    for batch in batches:
        logits = torch.randn(batch, vocab) * 2.5
        for name, options in OPTIONS.items():
            samplers = [Sampler(Sampling(seed=i, **options), vocab, [1, 2, 3]) for i in range(batch)]

            def ours(logits=logits, samplers=samplers) -> None:
                choose(logits, samplers)

            def theirs(ours: Callable[[], None] = ours) -> None:
                with plain():
                    ours()

            yield f"{batch} of {vocab}, {name}", paired((ours, theirs), rounds, 20)


def main() -> None:
    """Print the table; write the JSON file if `--out` says where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cells = []
    print(f"{options.threads} threads; ms, medians (quartiles)")
    for cases in (
        prompts(options.lengths, options.rounds),
        choosing(options.streams, options.vocab, options.rounds),
    ):
        for name, quartiles in cases:
            cells.append({"case": name, "ms": dict(zip(WAYS, quartiles, strict=True))})
            ratio = quartiles[1][1] / quartiles[0][1]
            row = [f"{w} {q[1]:.3f} ({q[0]:.3f} to {q[2]:.3f})" for w, q in zip(WAYS, quartiles, strict=True)]
            print(f"{name:>24}:  {'  '.join(row)}  {ratio:.1f}x", flush=True)
    if options.out:
        command = " ".join(["python -m benchmarks.generation", *sys.argv[1:]])
        settings = {"threads": options.threads, "rounds": options.rounds}
        result = {"command": command, "machine": environment(), **settings, "cells": cells}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
