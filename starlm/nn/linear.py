"""Dense layers without bias, and how their weights start."""

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks


def linear(fan_in: int, fan_out: int, **place: Any) -> nn.Linear:
    """A bias-free dense layer fan_in -> fan_out; `init_matrix` or `nn.init.zeros_` starts it.

    Args:
        place: device and dtype.
    """
    return nn.Linear(fan_in, fan_out, bias=False, **place)


def is_bare(layer: nn.Module) -> bool:
    """Whether a layer is its weight and nothing more: a dense layer without a bias, adapter or hook.

    What asks may take the weight itself, in place of calling the layer.
    """
    hooks = (
        layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    )  # fmt: skip
    hooked = any(hooks) or has_global_hooks() or "forward" in layer.__dict__
    return type(layer) is nn.Linear and layer.bias is None and not hooked


def init_matrix(layer: nn.Linear) -> None:
    """Start at std 1/sqrt(fan_in) * min(1, sqrt(fan_out/fan_in)) (spectral scaling, arXiv 2310.17813)."""
    fan_out, fan_in = layer.weight.shape
    nn.init.normal_(layer.weight, std=fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5))
