"""One layer beside its peers: forward and backward over the length of a row, at a constant number of tokens.

    starlm bench layer
    starlm bench layer --dtype bfloat16 --lengths 1024 8192 --peers gated attention

The baseline is what no layer can do without: the four D x D matrix products of preset `gated` alone, with
their gradients. Mamba-2 is the layer of Hugging Face transformers, if that is installed, as it runs here.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from starlm.bench.config import LayerOptions
from starlm.bench.grid import Grid, Peer, run
from starlm.nn.attention import Attention
from starlm.nn.conv import ShortConv
from starlm.nn.deformer import Deformer
from starlm.ops import anchors

PRODUCTS = "4 matrix products"


def main(options: LayerOptions, machine: dict[str, str]) -> dict[str, Any]:
    """Print the table; everything that was measured, for JSON."""
    torch.manual_seed(0)
    dim, heads = options.dim, max(8, options.dim // 64)
    layers: dict[str, tuple[str, Callable[[], nn.Module]]] = {
        "gated": ("gated", lambda: Deformer(dim, heads, preset="gated")),
        "star": ("star", lambda: Deformer(dim, heads, preset="star")),
        "attention": ("attention", lambda: Attention(dim, heads)),
        "conv": ("short convolution", lambda: ShortConv(dim)),
        "mamba2": ("Mamba-2", lambda: _mamba(dim)),
    }
    peers = {PRODUCTS: Peer(make=lambda length: _products(options, length))}
    for key in options.peers:
        if key == "mamba2" and not importlib.util.find_spec("transformers"):
            continue
        name, make = layers[key]
        peers[name] = Peer(
            make=lambda length, make=make: _layer(make(), options, length),
            # Per token, of which there are always as many, 8 D² of products and 4 D T of attention.
            cost=(lambda length: 2 * dim + length) if key == "attention" else None,
        )
    grid = Grid(
        axis="T",
        unit="µs per token, forward+backward",
        value=lambda seconds, _: seconds / options.batch_tokens * 1e6,
        baseline=PRODUCTS,
        memory=True,
    )
    return run("layer", grid, peers, options, machine)


def _problem(options: LayerOptions, length: int) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output."""
    shape = (options.batch_tokens // length, length, options.dim)
    dtype = getattr(torch, options.dtype)
    return torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)


def _products(options: LayerOptions, length: int) -> Callable[[], Any]:
    x, grad = _problem(options, length)
    weights = [torch.randn(options.dim, options.dim, dtype=x.dtype, requires_grad=True) for _ in range(4)]

    def call() -> Any:
        products = [nn.functional.linear(x, weight) for weight in weights]
        return torch.autograd.grad(products, [x, *weights], [grad] * 4)

    return call


def _layer(layer: nn.Module, options: LayerOptions, length: int) -> Callable[[], Any]:
    x, grad = _problem(options, length)
    layer.to(x.dtype)
    for parameter in layer.parameters():
        # Some weights start at zero, which would leave gradients out.
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=options.dim**-0.5)
    parameters = list(layer.parameters())
    tokens = torch.randint(4096, x.shape[:2])

    def call() -> Any:
        found = {}
        if isinstance(layer, Deformer) and layer.orders:
            rows = anchors(tokens, layer.orders)
            found["origins"] = dict(zip(layer.orders, rows.unbind(-1), strict=True))
        return torch.autograd.grad(layer(x, **found), [x, *parameters], grad)

    return call


def _mamba(dim: int) -> nn.Module:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    # It warns that its CUDA kernels are not there; the table's title says what runs.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = Mamba2Config(hidden_size=dim, num_heads=dim * 2 // 64, head_dim=64, n_groups=1, state_size=128)
    return Mamba2Mixer(config, layer_idx=0)
