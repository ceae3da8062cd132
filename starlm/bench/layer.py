"""One layer beside its peers: forward and backward over the length of a row, at a constant number of tokens.

    starlm bench layer
    starlm bench layer --dtype bfloat16 --lengths 1024 8192 --peers gated attention

On a GPU a call is recorded as a CUDA graph and replayed, as a step of training is: launched one by one from
Python, its kernels would be timed at the host's speed (`--no-cuda-graph`).

The baseline is what no layer can do without: the four D x D matrix products of preset `gated` alone, with
their gradients. Mamba-2 is the layer of Hugging Face transformers, if that is installed, as it runs here: on
a GPU in plain PyTorch too, so it takes part there only when asked for. Gated DeltaNet, GLA and the short
convolution without projections are the layers of flash-linear-attention, the package `fla`, for GPUs.
"""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from starlm.bench.config import LayerOptions
from starlm.bench.grid import Grid, Peer, run
from starlm.device import pick_device
from starlm.nn.attention import Attention
from starlm.nn.conv import ShortConv
from starlm.nn.deformer import Deformer
from starlm.ops import anchors

PRODUCTS = "4 matrix products"
OWN = ("gated", "star", "attention", "conv")
FLA = ("deltanet", "gla", "shortconv")


def main(options: LayerOptions, machine: dict[str, str]) -> dict[str, Any]:
    """Print the table; everything that was measured, for JSON."""
    torch.manual_seed(0)
    device = pick_device(options.device)
    dim, heads = options.dim, max(8, options.dim // 64)
    layers: dict[str, tuple[str, Callable[[], nn.Module]]] = {
        "gated": ("gated", lambda: Deformer(dim, heads, preset="gated")),
        "star": ("star", lambda: Deformer(dim, heads, preset="star")),
        "attention": ("attention", lambda: Attention(dim, heads)),
        "conv": ("short convolution", lambda: ShortConv(dim)),
        "mamba2": ("Mamba-2", lambda: _mamba(dim)),
        "deltanet": ("Gated DeltaNet (fla)", lambda: _deltanet(dim)),
        "gla": ("GLA (fla)", lambda: _gla(dim)),
        "shortconv": ("convolution of 4 (fla)", lambda: _convolution(dim)),
    }
    record = options.cuda_graph
    peers = {PRODUCTS: Peer(make=lambda length: _products(options, length), record=record)}
    wanted = options.peers or (*OWN, *("mamba2",) * (device.type == "cpu"), *FLA * (device.type == "cuda"))
    for key in wanted:
        name, make = layers[key]
        peers[name] = Peer(
            make=lambda length, make=make: _layer(make(), options, length),
            foreign=key not in OWN,
            left_out=_left_out(key, device),
            record=record,
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


def _left_out(key: str, device: torch.device) -> str:
    """Why a layer cannot take part; empty if it can."""
    if key == "mamba2" and not find_spec("transformers"):
        return "the package transformers is missing: pip install 'starlm[hf]'"
    if key in FLA and device.type != "cuda":
        return "its kernels are for GPUs"
    if key in FLA and not find_spec("fla"):
        return "the package fla is missing: pip install flash-linear-attention"
    return ""


def _problem(options: LayerOptions, length: int) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output."""
    shape = (options.batch_tokens // length, length, options.dim)
    device, dtype = pick_device(options.device), getattr(torch, options.dtype)
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return x.requires_grad_(), grad


def _products(options: LayerOptions, length: int) -> Callable[[], Any]:
    x, grad = _problem(options, length)
    shape, place = (options.dim, options.dim), {"device": x.device, "dtype": x.dtype}
    weights = [torch.randn(shape, **place, requires_grad=True) for _ in range(4)]

    def call() -> Any:
        products = [nn.functional.linear(x, weight) for weight in weights]
        return torch.autograd.grad(products, [x, *weights], [grad] * 4)

    return call


def _layer(layer: nn.Module, options: LayerOptions, length: int) -> Callable[[], Any]:
    x, grad = _problem(options, length)
    layer.to(x.device, x.dtype)
    for parameter in layer.parameters():
        # Some weights start at zero, which would leave gradients out.
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=options.dim**-0.5)
    parameters = list(layer.parameters())
    tokens = torch.randint(4096, x.shape[:2], device=x.device)

    def call() -> Any:
        found = {}
        if isinstance(layer, Deformer) and layer.orders:
            rows = anchors(tokens, layer.orders)
            found["origins"] = dict(zip(layer.orders, rows.unbind(-1), strict=True))
        out = layer(x, **found)
        # Those of fla have their cache beside it.
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, [x, *parameters], grad)

    return call


def _mamba(dim: int) -> nn.Module:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    # It warns that its CUDA kernels are not there; the table's title says what runs.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = Mamba2Config(hidden_size=dim, num_heads=dim * 2 // 64, head_dim=64, n_groups=1, state_size=128)
    return Mamba2Mixer(config, layer_idx=0)


def _deltanet(dim: int) -> nn.Module:
    from fla.layers import GatedDeltaNet  # pyright: ignore[reportMissingImports]

    # Keys have 3/4 of the width, as its authors have it, so that it is as large as attention and its gate.
    head_dim = next(size for size in (256, 128, 64, 16, 4) if dim * 3 // 4 % size == 0)
    return GatedDeltaNet(
        hidden_size=dim, head_dim=head_dim, num_heads=dim * 3 // 4 // head_dim, mode="chunk", layer_idx=0
    )


def _gla(dim: int) -> nn.Module:
    from fla.layers import GatedLinearAttention  # pyright: ignore[reportMissingImports]

    return GatedLinearAttention(hidden_size=dim, num_heads=4, mode="chunk", layer_idx=0)


def _convolution(dim: int) -> nn.Module:
    from fla.modules import ShortConvolution  # pyright: ignore[reportMissingImports]

    return ShortConvolution(dim, 4)
