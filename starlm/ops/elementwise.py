"""RMSNorm and relu² in one pass over memory each way, for training and decoding.

PyTorch composes both of several passes, each of which writes a tensor that leaves the cache; on a GPU under
autocast each product behind RMSNorm rounds its result anew. Under torch.compile the compositions are what
they should be.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from starlm.ops.backends import autocast_dtype, fuses, has_kernels, load_kernels
from starlm.ops.constants import EPS


def _fused(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and fuses(x)


def rms(x: Float[Tensor, "... D"], *, step: bool = False, cast: bool = False) -> Float[Tensor, "... D"]:
    """`x` scaled to root mean square 1 over its last dimension, in its own dtype (arXiv 1910.07467).

    Args:
        step: x are tokens of a decode state, which no tracer follows: the kernel itself may be called.
        cast: only products read the result: under autocast it comes in the dtype they take.
    """
    dtype = (cast and autocast_dtype(x)) or x.dtype
    if _fused(x) and has_kernels(x.device, dtype):
        if step and not (torch.is_grad_enabled() and x.requires_grad):
            return load_kernels("elementwise", x.device).rms(x, EPS, dtype)
        return _rms(x, dtype)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=EPS).to(dtype)


def relu2(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """relu(x)², in its own dtype (arXiv 2109.08668)."""
    if _fused(x):
        return _relu2(x)
    return torch.relu(x).square()


@torch.library.custom_op("starlm::rms", mutates_args=())
def _rms(x: Tensor, dtype: torch.dtype) -> Tensor:
    return load_kernels("elementwise", x.device).rms(x, EPS, dtype)


@torch.library.custom_op("starlm::rms_backward", mutates_args=())
def _rms_backward(grad: Tensor, x: Tensor) -> Tensor:
    return load_kernels("elementwise", x.device).rms_backward(grad, x, EPS)


@torch.library.custom_op("starlm::relu2", mutates_args=())
def _relu2(x: Tensor) -> Tensor:
    return load_kernels("elementwise", x.device).relu2(x)


@torch.library.custom_op("starlm::relu2_backward", mutates_args=())
def _relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    return load_kernels("elementwise", x.device).relu2_backward(grad, x)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


_rms.register_fake(lambda x, dtype: x.new_empty(x.shape, dtype=dtype))
_relu2.register_fake(lambda x: x.new_empty(x.shape))
for _op in (_rms_backward, _relu2_backward):
    _op.register_fake(lambda grad, x: x.new_empty(x.shape))
_rms.register_autograd(lambda ctx, grad: (_rms_backward(grad, *ctx.saved_tensors), None), setup_context=_save)
_relu2.register_autograd(lambda ctx, grad: _relu2_backward(grad, *ctx.saved_tensors), setup_context=_save)
