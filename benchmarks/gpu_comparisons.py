"""How Triton kernels are compared with the definition: problems, results of both, how far they may differ."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from starlm.nn.deformer import Deformer
from starlm.ops import backends, deform
from starlm.ops.plain import plain
from starlm.ops.reference import deform_reference

NAMES = ("output", "gradient of values", "gradient of shift")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Units in the last place of a result: one rounding, and one for the interpreter, which cuts bfloat16 off.
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
# Of the largest element: atomic additions come in any order.
ORDER = {torch.float32: 1e-5, torch.float64: 1e-12}
# Mean of softplus(x), x standard normal.
SOFTPLUS_MEAN = 0.8059


class NotRun(Exception):
    """Why a check cannot be run on this machine."""


def assert_close(name: str, got: Tensor, wanted: Tensor, dtype: torch.dtype, order: float = 0.0) -> None:
    """Elementwise: NaN where NaN is wanted, else off by one unit in the last place and `order` at most."""
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    got, wanted = got.detach().double(), wanted.detach().double()
    assert torch.equal(got.isnan(), wanted.isnan()), f"{name}: NaN in other places"
    size = wanted.abs().nan_to_num(0.0)
    allowed = EPS[dtype] * size.clamp(min=torch.finfo(dtype).tiny) + order * size.amax()
    excess = ((got - wanted).abs().nan_to_num(0.0) - allowed).amax()
    assert excess <= 0, f"{name}: more than allowed off, by {excess.item():.3g}, in {dtype}"


def problem(device: str, length: int, dtype: torch.dtype, heads: int = 3, channels: int = 33) -> Any:
    """Values, shifts of every kind, and all that `deform` takes besides."""
    batch, past = 2, 5
    shape = batch, length, heads, channels
    values = torch.randn(batch, past + length, heads, channels, device=device).to(dtype)
    kinds = (
        torch.zeros(shape),
        torch.randint(0, 2 * length, shape).float(),
        torch.nn.functional.softplus(torch.randn(shape)),
        torch.rand(shape) * 1.5 * length,
        10.0 ** (torch.rand(shape) * 38),
        torch.full(shape, torch.inf),
        torch.full(shape, -torch.inf),
        torch.randn(shape) * 20,
    )
    shift = torch.stack(kinds).gather(0, torch.randint(len(kinds), (1, *shape)))[0].to(device, dtype)
    own = torch.arange(length) + past
    options = {
        "origin": ((torch.rand(batch, length, heads) * (own + 2)[:, None]).long() - 1).to(device),
        # Some begin behind the query's own row.
        "first": (torch.rand(batch, length) * (own + 20)).long().to(device),
        "past": torch.tensor([past, past - 2], device=device),
    }
    return values, shift, options


def shifted(shape: tuple[int, ...], mean: float, device: str) -> tuple[Tensor, Tensor]:
    """Values, and shifts of this mean, in bf16."""
    values, shift = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    return values, torch.nn.functional.softplus(shift).mul_(mean / SOFTPLUS_MEAN)


def results(function: Callable[..., Tensor], values: Tensor, shift: Tensor, grad: Tensor, **options: Any):
    """Output and both gradients."""
    values, shift = (x.detach().requires_grad_() for x in (values, shift))
    out = function(values, shift, **options)
    return out.detach(), *torch.autograd.grad(out, (values, shift), grad)


def triton(values: Tensor, shift: Tensor, **options: Any) -> Tensor:
    """The operator under test."""
    return deform(values, shift, backend="triton", **options)


def compare(values: Tensor, shift: Tensor, grad: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    """The kernels' results, after comparison with the definition in the arithmetic's own precision."""
    dtype = values.dtype
    exact = torch.promote_types(dtype, torch.float32)
    grad = torch.randn(shift.shape, device=shift.device).to(dtype) if grad is None else grad
    got = results(triton, values, shift, grad, **options)
    wanted = results(deform_reference, values.to(exact), shift.to(exact), grad.to(exact), **options)
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert a.dtype == dtype, f"{name}: {a.dtype}, wanted {dtype}"
        assert_close(f"{name}, T = {shift.shape[1]}", a, b, dtype, ORDER[exact] if name == NAMES[1] else 0.0)
    return got


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms within."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


KINDS = ("now", "token", "bigram", "box")
PARTS = ("output", "gradient of values", "gradient of shift", "gradient of gate")
# Of the largest element: shifts of hundreds of tokens are rounded to 3e-5 of one.
SHIFTS = 1e-4


@contextmanager
def gpu_kernels(device: str) -> Iterator[None]:
    """The layer's GPU kernels within; on a CPU, where the interpreter runs them, by force."""
    with patch.object(backends, "on_gpu", lambda _: True) if device == "cpu" else nullcontext():
        yield


def layer_problem(device: str, length: int, dtype: torch.dtype, channels: int, **options: Any):
    """A layer with heads of all kinds, the three tensors that it reads with, and all that goes with them."""
    layer = Deformer(len(KINDS) * channels, len(KINDS), preset="star", kinds=KINDS, **options).to(device)
    for weight in (layer.out.weight, layer.shift.weight):
        torch.nn.init.normal_(weight, std=layer.dim**-0.5)
    # Slices of one tensor, as one product for all three projections would give them.
    tensors = torch.randn(2, length, 3, layer.dim, device=device)
    tensors[:, :, 1] = tensors[:, :, 1] * 4 + 3
    own = torch.arange(length)
    first = (torch.rand(2, length) * (own + 5)).long() * (torch.rand(2, length) < 0.5)
    origins = {n: ((torch.rand(2, length) * (own + 2)).long() - 1).to(device) for n in (1, 2)}
    return layer, tensors.to(dtype).unbind(2), first.to(device), origins


def layer_results(layer: Deformer, tensors: Any, grad: Tensor, first: Tensor | None, origins: Any) -> Any:
    """What the layer reads, between its projections, and gradients."""
    values, shift, gate = (x.detach().requires_grad_() for x in tensors)
    out = layer._read("value", values, shift, gate, first, origins, None)
    return out.detach(), *torch.autograd.grad(out, (values, shift, gate), grad)


def compare_layer(
    device: str, length: int, dtype: torch.dtype, channels: int, *, alone: bool = False, **options: Any
) -> Any:
    """The fused layer's results, against its definition in fp64; `alone` by deterministic algorithms."""
    layer, tensors, first, origins = layer_problem(device, length, dtype, channels, **options)
    grad = torch.randn(2, length, layer.dim, device=device).to(dtype)
    got = compare_read(layer, tensors, grad, first, origins, alone=alone)
    return layer, tensors, grad, first, origins, got


def compare_read(
    layer: Deformer, tensors: Any, grad: Tensor, first: Tensor | None, origins: Any, *, alone: bool = False
) -> Any:
    """What the fused layer makes of these tensors, after comparison with its definition in fp64."""
    dtype = grad.dtype
    # The definition has no deterministic algorithms on a GPU.
    with gpu_kernels(grad.device.type), deterministic() if alone else nullcontext():
        got = layer_results(layer, tensors, grad, first, origins)
    with plain():
        wanted = layer_results(layer, [x.double() for x in tensors], grad.double(), first, origins)
    distances = layer._distances(tensors[1].double())
    if "anchored" in distances:
        distances["anchored"] = torch.full_like(distances["anchored"], 0.5)
    reach = torch.cat(list(distances.values()), dim=2).flatten(2)
    # At a row the derivative jumps, and rounding decides on which side we are.
    smooth = (reach - reach.round()).abs() > 4e-6 * reach.clamp(min=1.0)
    for name, a, b in zip(PARTS, got, wanted, strict=True):
        assert a.dtype == dtype, f"{name}: {a.dtype}, wanted {dtype}"
        keep = smooth if name == PARTS[2] else torch.ones_like(smooth)
        assert_close(f"{name}, T = {grad.shape[1]}", a * keep, b * keep, dtype, SHIFTS)
    return got
