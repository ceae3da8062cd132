"""Multi-query associative recall, exactly as in Zoology (arXiv 2312.04927, figure 2).

    python -m experiments.mqar star --size 64 4 --width 64 --rates 0.0022 0.01

Vocabulary 8192, 100,000 training and 3,000 test examples, 2 layers without MLP, AdamW with weight decay 0.1,
no warm-up, cosine to 0, at most 64 epochs, stop above 99 %.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiments.program import parser, start, unusual, within
from experiments.store import save, taken
from experiments.variants import NAMES, builder, settings
from starlm.data.loader import Batch
from starlm.device import pick_device
from starlm.errors import InputError
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.train.step import TrainingStep

RESULTS = Path(__file__).parent / "results" / "mqar"
VOCAB, TRAIN_ROWS, TEST_ROWS, POWER = 8192, 100_000, 3_000, 0.99
EPOCHS, DEPTH = 64, 2
BATCH = {256: 256, 512: 128, 1024: 64}


def examples(count: int, length: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels (-1: none), int64 [count, length].

    k1 v1 k2 v2 ... then each key once more: key j stands at 2 * pairs + 2 * slot, its label, the value, at
    its own position; slots are drawn without replacement with p(i) proportional to i^-0.99; filler is 0.
    """
    rng = np.random.default_rng(seed)
    slots = (length - 2 * pairs) // 2
    # Gumbel's trick draws without replacement by weight: the largest `pairs` of log p + noise, in order.
    log_p = -POWER * np.log(np.arange(1, slots + 1))
    inputs = np.zeros((count, length), np.int64)
    labels = np.full((count, length), -1, np.int64)
    for begin in range(0, count, 2000):
        rows = slice(begin, min(begin + 2000, count))
        n = rows.stop - rows.start
        keys = np.argsort(rng.random((n, VOCAB // 2 - 1)), axis=1)[:, :pairs] + 1
        values = np.argsort(rng.random((n, VOCAB // 2)), axis=1)[:, :pairs] + VOCAB // 2
        inputs[rows, 0 : 2 * pairs : 2] = keys
        inputs[rows, 1 : 2 * pairs : 2] = values
        noise = log_p + rng.gumbel(size=(n, slots))
        chosen = np.argsort(-noise, axis=1)[:, :pairs]
        at = 2 * pairs + 2 * chosen
        np.put_along_axis(inputs[rows], at, keys, axis=1)
        np.put_along_axis(labels[rows], at, values, axis=1)
    return inputs, labels


class Cosine:
    """The recipe's optimizer: AdamW, its rate falling to 0."""

    def __init__(self, model: StarLM, rate: float, horizon: int) -> None:
        device = model.head.weight.device
        self.rate, self.horizon, self.lr = rate, horizon, torch.tensor(rate, device=device)
        # A rate in a tensor, since a step is recorded on a GPU.
        kind = {"capturable": True} if device.type == "cuda" else {"foreach": False}
        self.adam = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.1, **kind)

    def schedule(self, step: int) -> None:
        """Set the rate."""
        self.lr.fill_(self.rate * 0.5 * (1 + math.cos(math.pi * step / self.horizon)))

    def update(self) -> None:
        """Update all weights, and clear their gradients."""
        self.adam.step()
        self.adam.zero_grad()


def answers(model: StarLM, inputs: Tensor, labels: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Logits at the labelled positions only, and the labels there: the head would be most of the work."""
    at = (labels >= 0).byte().topk(pairs, dim=1).indices
    hidden = model.hidden(inputs)
    asked = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
    return model.logits(asked).flatten(0, 1), labels.gather(1, at).flatten()


@torch.inference_mode()
def accuracy(model: StarLM, inputs: Tensor, labels: Tensor, pairs: int) -> float:
    """Share of queries answered with the right value."""
    right = total = 0
    device = model.head.weight.device
    for begin in range(0, len(inputs), 250):
        part = (x[begin : begin + 250].to(device) for x in (inputs, labels))
        logits, wanted = answers(model, *part, pairs)
        right += int((logits.argmax(-1) == wanted).sum())
        total += len(wanted)
    return right / total


def run(args: argparse.Namespace, rate: float) -> None:
    """One model, one learning rate; skipped if its result is there."""
    length, pairs = args.size
    batch = args.batch or BATCH.get(length, 512)
    asked = {
        "variant": args.variant,
        "length": length,
        "pairs": pairs,
        "width": args.width,
        "depth": args.depth,
        "rate": rate,
        "seed": args.seed,
        "batch": batch,
        "rows": args.rows,
        "epochs_allowed": args.epochs,
    }
    other = unusual(args, l=("depth", DEPTH), n=("rows", TRAIN_ROWS), e=("epochs", EPOCHS))
    path = RESULTS / f"{args.variant}-L{length}-k{pairs}-w{args.width}-lr{rate}{other}-seed{args.seed}.json"
    if taken(path, asked):
        return
    if not 1 <= pairs <= VOCAB // 2 - 1 or (length - 2 * pairs) // 2 < pairs:
        raise InputError(f"{pairs} pairs and as many questions do not fit into {length} tokens.")
    if batch > args.rows:
        raise InputError(f"A batch of {batch} examples is more than there are: {args.rows}. Give a --batch.")
    inputs, labels = map(torch.from_numpy, examples(args.rows, length, pairs, seed=args.seed + 1))
    test = tuple(map(torch.from_numpy, examples(TEST_ROWS, length, pairs, seed=args.seed + 10_000)))
    torch.manual_seed(args.seed)
    shape = {"mlp_ratio": 0, "depth": args.depth, "dim": args.width, "softcap": 0.0}
    config = StarLMConfig(vocab_size=VOCAB, context=length, **{**settings(args.variant), **shape})
    model = builder(args.variant)(config)
    # The recipe's optimizer; weights start as its models do, since zero heads are part of another recipe.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    model.to(pick_device(args.device))
    per_epoch = args.rows // batch
    horizon = args.epochs * per_epoch
    optimizer = Cosine(model, rate, horizon)

    def loss(inputs: Tensor, labels: Tensor, first: Tensor) -> Tensor:
        return nn.functional.cross_entropy(*answers(model, inputs, labels, pairs))

    train = TrainingStep(model, optimizer, loss)
    order, step, curve, began = np.random.default_rng(args.seed), 0, [], time.perf_counter()
    while step < horizon and (not curve or curve[-1][1] < 0.99):
        rows = torch.from_numpy(order.permutation(args.rows))
        # A recorded step takes one size: the last examples of an epoch wait for the next.
        for piece in rows[: per_epoch * batch].split(batch):
            optimizer.schedule(step)
            wanted = labels[piece].numpy()
            now, _ = train(Batch(inputs=inputs[piece].numpy(), targets=wanted, first=wanted))
            step += 1
            # Once an epoch, and more often in the first one: what is learned at once should show.
            if step % per_epoch == 0 or (step < per_epoch and step % 50 == 0):
                curve.append((step, round(accuracy(model, *test, pairs), 4)))
                print(f"{path.stem}: step {step} loss {now:.3f} accuracy {curve[-1][1]:.4f}", flush=True)
                if curve[-1][1] >= 0.99:
                    break
    result = {
        **asked,
        "updates": step,
        "accuracy": curve[-1][1],
        "chance": 1 / pairs,
        "seconds": round(time.perf_counter() - began, 1),
        "curve": curve,
    }
    save(path, result)


def main() -> None:
    """Every learning rate that was asked for."""
    options, whole = parser(__doc__), within(int, 1)
    options.add_argument("variant", choices=NAMES, metavar="variant", help=", ".join(NAMES))
    options.add_argument("--size", type=whole, nargs=2, default=(64, 4), metavar=("LENGTH", "PAIRS"))
    options.add_argument("--width", type=whole, default=64)
    options.add_argument("--depth", type=whole, default=DEPTH)
    options.add_argument("--rates", type=float, nargs="+", default=[1e-4, 4.6e-4, 2.2e-3, 1e-2])
    options.add_argument("--epochs", type=whole, default=EPOCHS)
    options.add_argument(
        "--rows", type=whole, default=TRAIN_ROWS, help="training examples, to try things out"
    )
    options.add_argument(
        "--batch", type=within(int, 0), default=0, help="examples per update; 0 as published"
    )
    options.add_argument("--seed", type=within(int, 0), default=0)
    options.add_argument("--threads", type=whole, default=1)
    options.add_argument("--device", default="cpu", help="cpu, cuda, or cuda:N")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    for rate in args.rates:
        run(args, rate)


if __name__ == "__main__":
    start(main)
