"""Plain tensor operations suffice: one training run on the reference path alone, and on the fused kernels.

    python -m experiments.reference --steps 100

Both start from the same weights and see the same batches; the losses differ by rounding only, which training
amplifies slowly.
"""

import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from experiments import corpora
from experiments.program import parser, start, within
from experiments.store import save, taken
from starlm.data.loader import PackedLoader
from starlm.data.shards import TokenData
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.ops import plain
from starlm.train.config import OptimConfig
from starlm.train.optim import Optimizers

RESULTS = Path(__file__).parent / "results" / "reference"


def losses(config: StarLMConfig, steps: int, data: TokenData, *, fused: bool) -> tuple[list[float], float]:
    """Training losses, and the seconds that the steps took."""
    with nullcontext() if fused else plain():
        return _losses(config, steps, data)


def _losses(config: StarLMConfig, steps: int, data: TokenData) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model, found, began = StarLM(config), [], time.perf_counter()
    optimizers = Optimizers(model, OptimConfig())
    batches = PackedLoader(data.splits["train"], rows=8, length=config.context, seed=0).batches(0)
    for step in range(steps):
        batch = next(batches)
        inputs, targets, first = map(torch.from_numpy, (batch.inputs, batch.targets, batch.first))
        loss = model.loss(inputs, targets, first=first)
        loss.backward()
        optimizers.step(step, steps)
        found.append(loss.item())
    batches.close()
    return found, time.perf_counter() - began


def main() -> None:
    """Train twice and compare."""
    options, whole = parser(__doc__), within(int, 1)
    options.add_argument("--steps", type=whole, default=100)
    options.add_argument("--width", type=whole, default=128)
    options.add_argument("--depth", type=whole, default=4)
    options.add_argument("--length", type=whole, default=256)
    options.add_argument("--threads", type=whole, default=1)
    args = options.parse_args()
    path = RESULTS / f"star-w{args.width}-l{args.depth}-t{args.length}-s{args.steps}.json"
    if taken(path, {name: value for name, value in vars(args).items() if name != "threads"}):
        return
    torch.set_num_threads(args.threads)
    data = TokenData.open(corpora.folder("embedded"))
    config = StarLMConfig(
        vocab_size=data.vocab_size, depth=args.depth, dim=args.width, context=args.length, preset="star"
    )
    reference, slow = losses(config, args.steps, data, fused=False)
    fused, fast = losses(config, args.steps, data, fused=True)
    apart = [abs(a - b) for a, b in zip(reference, fused, strict=True)]
    result = {
        **vars(args),
        "reference": {"first": reference[0], "last": reference[-1], "seconds": round(slow, 1)},
        "fused": {"first": fused[0], "last": fused[-1], "seconds": round(fast, 1)},
        "largest_difference": {"first_10_steps": max(apart[:10]), "all": max(apart)},
    }
    print(json.dumps(result, indent=1))
    save(path, result)


if __name__ == "__main__":
    start(main)
