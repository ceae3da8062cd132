"""Training steps of whole models, side by side, as `starlm train` takes them; tokens per second.

starlm bench train
starlm bench train --dtype bfloat16 --compile
starlm bench train --dtype bfloat16 --batch-tokens 65536 --lengths 65536 --peers transformer star
starlm bench train --dim 256 --batch-tokens 4096 --lengths 512 2048 --peers transformer star star-W256
starlm bench train --lengths 1024 8192 32768 --repeats 1 --limit-seconds 600
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starlm.bench.config import TrainBenchOptions
from starlm.bench.grid import Grid, Peer, run
from starlm.data.loader import Batch
from starlm.device import pick_device
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.train.config import OptimConfig
from starlm.train.optim import Optimizers
from starlm.train.step import TrainingStep

TRANSFORMER = "transformer"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": (TRANSFORMER, {"layers": "A"}),
    "star": ("star", {"preset": "star"}),
    "star-W256": ("star, DDW over 256", {"preset": "star", "layers": "DDW", "attention_window": 256}),
    "gated": ("gated", {"preset": "gated"}),
    "conv": ("short convolution", {"layers": "C"}),
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
        for name, settings in map(MODELS.__getitem__, options.peers)
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
    with pick_device(options.device):
        model = StarLM(config)
    # Without documents: only so does PyTorch take its fast kernels for attention.
    loss = torch.compile(_plain(model)) if options.compile else _plain(model)
    step = TrainingStep(
        model,
        Optimizers(model, OptimConfig(), precision=options.dtype),
        loss,
        precision=options.dtype,
        clip=OptimConfig().clip,
    )
    shape = options.rows(length), length + 1
    tokens = np.random.default_rng(0).integers(options.vocab_size, size=shape)
    batch = Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:], first=np.zeros_like(tokens[:, 1:]))
    return lambda: step(batch)


def _plain(model: StarLM) -> Callable[..., Tensor]:
    return lambda inputs, targets, first: model.loss(inputs, targets)
