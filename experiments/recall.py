"""Recall at lengths that were never trained: induction and copying, trained at 256, tested to 65,536.

    python -m experiments.recall star --task induction
    python -m experiments.recall star --task copy

induction: random tokens; one token that occurs nowhere else is followed by its answer once, and comes again
as the last one. copy: random tokens, a separator, and the same tokens again. Answers of tests are read
through the decode state, in chunks, so memory stays small at every length.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from experiments.variants import VARIANTS
from starlm.files import write_whole
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.train.config import OptimConfig
from starlm.train.optim import Optimizers

RESULTS = Path(__file__).parent / "results" / "recall"
VOCAB, TRAINED, CHUNK = 512, 256, 4096
LENGTHS = (256, 1024, 4096, 16384, 65536)
Rows = tuple[torch.Tensor, torch.Tensor]


def induction(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """Tokens [rows, length], and labels: the answer at the last position, -1 elsewhere."""
    tokens = rng.integers(2, VOCAB, (rows, length))
    at = rng.integers(0, length - 2, rows)
    tokens[np.arange(rows), at] = 1
    tokens[:, -1] = 1
    labels = np.full((rows, length), -1)
    labels[:, -1] = tokens[np.arange(rows), at + 1]
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def copy(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """The same, with a label at every position of the second half: the next token of the first."""
    half = length // 2
    first = rng.integers(2, VOCAB, (rows, half))
    tokens = np.concatenate([first, np.ones((rows, 1), int), first[:, : length - half - 1]], axis=1)
    labels = np.full((rows, length), -1)
    labels[:, half:] = first[:, : length - half]
    return torch.from_numpy(tokens), torch.from_numpy(labels)


TASKS = {"induction": induction, "copy": copy}


@torch.inference_mode()
def accuracy(model: StarLM, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of labelled positions whose likeliest token is the label."""
    state, right, total = model.new_state(len(tokens), rollback=0), 0, 0
    for piece, wanted in zip(tokens.split(CHUNK, 1), labels.split(CHUNK, 1), strict=True):
        got = model(piece, state=state).argmax(-1)
        asked = wanted >= 0
        right += int((got == wanted)[asked].sum())
        total += int(asked.sum())
    return right / total


def main() -> None:
    """Train at 256, then test at every length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    path = RESULTS / f"{args.task}-{args.variant}-w{args.width}-seed{args.seed}.json"
    if path.is_file():
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng, task = np.random.default_rng(args.seed), TASKS[args.task]
    options = {**VARIANTS[args.variant], "depth": 2, "dim": args.width}
    model = StarLM(StarLMConfig(vocab_size=VOCAB, context=TRAINED, **options))
    optimizers = Optimizers(model, OptimConfig())
    seen, steps, began = 0.0, 0, time.perf_counter()
    for step in range(args.steps):
        tokens, labels = task(rng, 32, TRAINED)
        asked = labels >= 0
        logits = model.logits(model.hidden(tokens)[asked][None])[0]
        nn.functional.cross_entropy(logits, labels[asked]).backward()
        optimizers.step(step, args.steps)
        steps = step + 1
        if steps % 50 == 0:
            seen = accuracy(model, *task(np.random.default_rng(1), 200, TRAINED))
            if seen == 1.0:
                break
    by_length = {}
    for length in LENGTHS:
        rows = max(4, min(100, 2**19 // length))
        by_length[length] = accuracy(model, *task(np.random.default_rng(2), rows, length))
        print(f"{path.stem}: {steps} updates, length {length}: {by_length[length]:.4f}", flush=True)
    result = {
        "task": args.task,
        "variant": args.variant,
        "width": args.width,
        "seed": args.seed,
        "updates": steps,
        "seconds": round(time.perf_counter() - began, 1),
        "accuracy": by_length,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
