"""Time of a decode step on a CPU, in one piece and layer by layer, by numbers of streams.

    python -m benchmarks.decode_step --busy 1 --out benchmarks/results/decode-step.json

Both run the same weights on the same states, in one process, by turns of some tokens, of which the first is
not counted: the turn before has emptied the caches. With `--busy` other programs compute meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

# As the command has it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch

from starlm.model import model as model_module
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.report.environment import environment

MODELS = {
    "4 layers, width 256": {"depth": 4, "dim": 256, "vocab_size": 4096},
    "6 layers, width 256, DDW": {"depth": 6, "dim": 256, "vocab_size": 4096, "layers": "DDW"},
    "8 layers, width 512": {"depth": 8, "dim": 512, "vocab_size": 4096},
    "12 layers, width 768": {"depth": 12, "dim": 768, "vocab_size": 16384},
}
TURN = 6
PIECE, LAYERS, LIMIT = "one piece", "layer by layer", "weights read once"


@contextmanager
def layer_by_layer():
    """The ordinary way, as for models that cannot take the short one."""
    nothing = lambda *args, **named: None  # noqa: E731
    with patch.multiple(model_module, step=nothing, logits_of_step=nothing):
        yield


def turn(call: Callable[[], object]) -> float:
    """Seconds of a step, in the mean of a turn."""
    call()
    begin = time.perf_counter()
    for _ in range(TURN):
        call()
    return (time.perf_counter() - begin) / TURN


@torch.inference_mode()
def measured(settings: dict, batch: int, context: int, rounds: int) -> dict[str, list[float]]:
    """ms of each round."""
    torch.manual_seed(0)
    model = StarLM(StarLMConfig(**settings)).eval()
    weights = torch.cat([p.flatten() for name, p in model.named_parameters() if "embedding" not in name])
    tokens = torch.randint(settings["vocab_size"], (batch, context))
    state, new = model.new_state(batch), tokens[:, :1].contiguous()
    model(tokens, state=state)

    def by_layers() -> None:
        with layer_by_layer():
            model(new, state=state)

    ways = {PIECE: lambda: model(new, state=state), LAYERS: by_layers, LIMIT: weights.sum}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, call in ways.items():
            seconds = turn(call)
            if number:
                times[name].append(seconds * 1e3)
    return times


def main() -> None:
    """Print the table; write the JSON file if `--out` says where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--context", type=int, default=500)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--busy", type=int, default=0, help="other programs that compute meanwhile")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(options.busy)]
    cells = []
    print(f"{options.threads} threads, {options.busy} busy programs beside; ms a step, medians (quartiles)")
    try:
        for name in options.models:
            for batch in options.streams:
                times = measured(MODELS[name], batch, options.context, options.rounds)
                quartiles = {way: statistics.quantiles(ms, n=4) for way, ms in times.items()}
                cells.append({"model": name, "streams": batch, "ms": quartiles})
                row = [f"{way} {q[1]:.2f} ({q[0]:.2f} to {q[2]:.2f})" for way, q in quartiles.items()]
                ratio = quartiles[LAYERS][1] / quartiles[PIECE][1]
                print(f"{name:>24} {batch:>3}:  {'  '.join(row)}  {ratio:.2f}x", flush=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    if options.out:
        command = " ".join(["python -m benchmarks.decode_step", *sys.argv[1:]])
        settings = {"threads": options.threads, "busy": options.busy, "rounds": options.rounds}
        result = {"command": command, "machine": environment(), **settings, "cells": cells}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
