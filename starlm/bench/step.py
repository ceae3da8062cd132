"""Training steps of whole models, side by side: loss, gradients, optimizers; tokens per second.

starlm bench train
starlm bench train --dtype bfloat16 --compile
starlm bench train --lengths 1024 8192 32768 --repeats 1 --limit-seconds 600
"""

from collections.abc import Callable
from typing import Any

import torch

from starlm.bench.config import TrainBenchOptions
from starlm.bench.grid import Grid, Peer, run
from starlm.device import pick_device
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.train.config import OptimConfig
from starlm.train.optim import Optimizers

TRANSFORMER = "transformer"
MODELS: dict[str, dict[str, Any]] = {
    TRANSFORMER: {"layers": "A"},
    "star": {"preset": "star"},
    "gated": {"preset": "gated"},
    "short convolution": {"layers": "C"},
}


def main(options: TrainBenchOptions, machine: dict[str, str]) -> dict[str, Any]:
    """Print the table; everything that was measured, for JSON."""
    grid = Grid(
        axis="T",
        unit="tokens per second",
        value=lambda seconds, length: options.rows(length) * length / seconds,
        baseline=TRANSFORMER,
        memory=True,
    )
    peers = {
        name: Peer(
            make=lambda length, settings=settings: _step(settings, options, length),
            # Per token 24 D² of products in a block, and 4 D T of attention.
            cost=(lambda length: options.rows(length) * length * (6 * options.dim + length))
            if name == TRANSFORMER
            else None,
        )
        for name, settings in MODELS.items()
    }
    if not options.compile:
        return run("train", grid, peers, options, machine)
    # One method, compiled for every model at every length.
    with torch._dynamo.config.patch(recompile_limit=len(peers) * len(options.lengths)):
        return run("train", grid, peers, options, machine)


def _step(settings: dict[str, Any], options: TrainBenchOptions, length: int) -> Callable[[], Any]:
    torch.manual_seed(0)
    config = StarLMConfig(
        vocab_size=options.vocab_size, depth=options.depth, dim=options.dim, context=length, **settings
    )
    device = pick_device(options.device)
    model = StarLM(config).to(device)
    optimizers = Optimizers(model, OptimConfig())
    tokens = torch.randint(options.vocab_size, (options.rows(length), length + 1)).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    loss_of = torch.compile(model.loss, fullgraph=True, dynamic=False) if options.compile else model.loss

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = loss_of(inputs, targets)
        loss.backward()
        optimizers.step(0, 1)

    return step
