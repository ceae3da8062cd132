"""Recall and order at lengths that were never trained: trained at 256, tested to 65,536.

    python -m experiments.synthetic star --task induction
    python -m experiments.synthetic gated --task lag-16 --lengths 256 1024

induction: random tokens; one token that occurs nowhere else is followed by its answer once, and comes again
as the last one. copy: random tokens, a separator, and the same tokens again. Answers of tests are read
through the decode state, in chunks, so memory stays small at every length.

lag-N: the token N positions back. token-lag-N: as far back as the token itself says, 1 to N. absolute: in
which of 8 equal parts of the trained length a position lies.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from experiments.program import parser, start, unusual, within
from experiments.store import save, taken
from experiments.variants import DECODING, builder, settings
from starlm.data.loader import Batch
from starlm.device import pick_device
from starlm.errors import InputError
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.train.config import OptimConfig
from starlm.train.optim import Optimizers
from starlm.train.step import TrainingStep

RESULTS = Path(__file__).parent / "results" / "synthetic"
VOCAB, TRAINED, CHUNK, DEPTH = 512, 256, 4096, 2
LENGTHS = [256, 1024, 4096, 16384, 65536]
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


def lag(rng: np.random.Generator, rows: int, length: int, *, reach: int, of_token: bool) -> Rows:
    """The label is the token `reach` back, or, where the token is to say how far, 1 + token mod reach."""
    tokens = rng.integers(0, VOCAB, (rows, length))
    at = np.arange(length)[None] - (1 + tokens % reach if of_token else reach)
    labels = np.where(at >= 0, np.take_along_axis(tokens, np.maximum(at, 0), axis=1), -1)
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def absolute(rng: np.random.Generator, rows: int, length: int) -> Rows:
    """The label is the eighth of the trained length that the position lies in."""
    tokens = rng.integers(0, VOCAB, (rows, length))
    labels = np.broadcast_to(np.minimum(np.arange(length) * 8 // TRAINED, 7), tokens.shape)
    return torch.from_numpy(tokens), torch.from_numpy(labels.copy())


REACHES = (1, 4, 16, 64)
TASKS = {
    "induction": induction,
    "copy": copy,
    "absolute": absolute,
    **{f"lag-{n}": partial(lag, reach=n, of_token=False) for n in REACHES},
    **{f"token-lag-{n}": partial(lag, reach=n, of_token=True) for n in REACHES},
}


@torch.inference_mode()
def accuracy(model: StarLM, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of labelled positions whose likeliest token is the label."""
    state, right, total = model.new_state(len(tokens), rollback=0), 0, 0
    device = model.head.weight.device
    for piece, wanted in zip(tokens.split(CHUNK, 1), labels.split(CHUNK, 1), strict=True):
        got = model(piece.to(device), state=state).argmax(-1).cpu()
        asked = wanted >= 0
        right += int((got == wanted)[asked].sum())
        total += int(asked.sum())
    return right / total


def main() -> None:
    """Train at 256, then test at every length."""
    options, whole = parser(__doc__), within(int, 1)
    options.add_argument("variant", choices=DECODING, metavar="variant", help=", ".join(DECODING))
    options.add_argument("--task", choices=list(TASKS), required=True)
    options.add_argument("--width", type=whole, default=64)
    options.add_argument("--depth", type=whole, default=DEPTH)
    options.add_argument("--steps", type=whole, default=2000)
    options.add_argument("--heads", type=within(int, 0), default=0, help="0: as the width has it")
    options.add_argument("--rate", type=float, default=0.02, help="Muon's learning rate")
    options.add_argument("--shift-rate", type=float, default=OptimConfig().shift_lr, help="over the others'")
    options.add_argument("--lengths", type=within(int, 4), nargs="+", default=LENGTHS)
    options.add_argument("--seed", type=within(int, 0), default=0)
    options.add_argument("--threads", type=whole, default=1)
    options.add_argument("--device", default="cpu", help="cpu, cuda, or cuda:N")
    args = options.parse_args()
    task = TASKS[args.task]
    for length in args.lengths:
        if not (task(np.random.default_rng(0), 1, length)[1] >= 0).any():
            raise InputError(f"{args.task} asks nothing in {length} tokens. Give longer --lengths.")
    shape = {**settings(args.variant), "depth": args.depth, "dim": args.width, "heads": args.heads}
    config = StarLMConfig(vocab_size=VOCAB, context=TRAINED, **shape)
    asked = {
        "task": args.task,
        "variant": args.variant,
        "width": args.width,
        "depth": args.depth,
        "heads": config.num_heads,
        "matrix_lr": args.rate,
        "shift_lr": args.shift_rate,
        "seed": args.seed,
        "steps": args.steps,
        "lengths": args.lengths,
    }
    size = f"w{args.width}" + unusual(args, l=("depth", DEPTH), h=("heads", 0))
    rate = f"lr{args.rate}" + unusual(args, shift=("shift_rate", OptimConfig().shift_lr))
    name = f"{args.task}-{args.variant}-{size}-{rate}-seed{args.seed}"
    path = RESULTS / f"{name}.json"
    if taken(path, asked):
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = builder(args.variant)(config)
    model.to(pick_device(args.device))
    optimizers = Optimizers(model, OptimConfig(matrix_lr=args.rate, shift_lr=args.shift_rate))
    train = TrainingStep(model, optimizers, lambda tokens, labels, first: model.loss(tokens, labels))
    seen, steps, began = 0.0, 0, time.perf_counter()
    for step in range(args.steps):
        tokens, labels = (x.numpy() for x in task(rng, 32, TRAINED))
        optimizers.schedule(step, args.steps)
        train(Batch(inputs=tokens, targets=labels, first=labels))
        steps = step + 1
        if steps % 50 == 0:
            seen = accuracy(model, *task(np.random.default_rng(1), 200, TRAINED))
            if seen == 1.0:
                break
    by_length = {}
    for length in args.lengths:
        rows = max(4, min(100, 2**19 // length))
        by_length[length] = accuracy(model, *task(np.random.default_rng(2), rows, length))
        print(f"{path.stem}: {steps} updates, length {length}: {by_length[length]:.4f}", flush=True)
    result = {
        **asked,
        "updates": steps,
        "seconds": round(time.perf_counter() - began, 1),
        "accuracy": by_length,
    }
    save(path, result)


if __name__ == "__main__":
    start(main)
