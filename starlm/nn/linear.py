"""Dense layers: without bias, side by side, and how their weights start."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from starlm.ops.plain import is_plain


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A bias-free dense layer fan_in -> fan_out; `init_matrix` or `nn.init.zeros_` starts it."""
    return nn.Linear(fan_in, fan_out, bias=False)


def init_matrix(layer: nn.Linear) -> None:
    """Start at std 1/sqrt(fan_in) * min(1, sqrt(fan_out/fan_in)) (spectral scaling, arXiv 2310.17813)."""
    fan_out, fan_in = layer.weight.shape
    nn.init.normal_(layer.weight, std=fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5))


def project(x: Float[Tensor, "*rows D"], *layers: nn.Module) -> tuple[Float[Tensor, "*rows _"], ...]:
    """What each of the layers makes of x.

    The gradients of x that come through them are added up inside the products; autograd would write each to
    memory, and add them in passes of their own.
    """
    if torch.is_grad_enabled() and x.requires_grad and all(_is_dense(layer, x) for layer in layers):
        parameters = [p if p is None else p.to(x.dtype) for n in layers for p in (n.weight, n.bias)]
        return _Projections.apply(x, *parameters)
    return tuple(layer(x) for layer in layers)


def _is_dense(layer: Any, x: Tensor) -> bool:
    """Whether the layer is a dense one and nothing else, not even for somebody who hooks into it."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or "forward" in vars(layer):
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks) or is_plain() or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return x.dtype == torch.get_autocast_dtype(kind)
    return x.dtype == layer.weight.dtype


class _Projections(torch.autograd.Function):
    """x [..., D] and, for each layer, its weight and its bias or None, all in one dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        return tuple(nn.functional.linear(x, weight, bias) for weight, bias in pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(inputs[0], *inputs[1::2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows, found, dx = x.flatten(0, -2), [], None
        for number, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            wants_weight, wants_bias = ctx.needs_input_grad[2 * number + 1 : 2 * number + 3]
            grad = grad.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                dx = grad @ weight if dx is None else torch.addmm(dx, grad, weight)
            found += [grad.T @ rows if wants_weight else None, grad.sum(0) if wants_bias else None]
        return None if dx is None else dx.view_as(x), *found
