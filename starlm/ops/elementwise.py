"""RMSNorm and relu² in one pass over memory each way, for training.

PyTorch composes both of several passes on a CPU, and relu² also on a GPU; each writes a tensor that leaves
the cache. Under torch.compile and elsewhere the compositions are what they should be.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from starlm.ops.deform import HAS_TRITON
from starlm.ops.plain import is_plain

EPS = 1e-6
# What relu² has kernels for; RMSNorm has those of a CPU only.
KERNELS = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16) if HAS_TRITON else (),
}


def fuses(x: Tensor) -> bool:
    """Whether fused kernels exist and pay: on a CPU, in fp32 or bf16, with a gradient to come."""
    return x.device.type == "cpu" and _fuses(x)


def _fuses(x: Tensor) -> bool:
    """The same for relu², on any device."""
    has_kernels = not is_plain() and x.dtype in KERNELS.get(x.device.type, ())
    return has_kernels and torch.is_grad_enabled() and x.requires_grad


def rms(x: Float[Tensor, "... D"], *, step: bool = False) -> Float[Tensor, "... D"]:
    """`x` scaled to root mean square 1 over its last dimension, in its own dtype (arXiv 1910.07467).

    Args:
        step: x are single tokens of a decode state, which no tracer follows: the kernel itself may be called.
    """
    if not torch.compiler.is_compiling():
        if fuses(x):
            return _rms(x)
        if step and x.dtype == torch.float32 and x.device.type == "cpu" and not is_plain():
            # Behind large products, which empty the caches, PyTorch's several small calls take longer.
            from starlm.ops import cpu_elementwise

            return cpu_elementwise.rms(x, EPS)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=EPS)


def relu2(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """relu(x)², in its own dtype (arXiv 2109.08668)."""
    if not torch.compiler.is_compiling() and _fuses(x):
        return _relu2(x)
    return torch.relu(x).square()


@torch.library.custom_op("starlm::rms", mutates_args=())
def _rms(x: Tensor) -> Tensor:
    from starlm.ops import cpu_elementwise  # numba takes half a second to import

    return cpu_elementwise.rms(x, EPS)


@torch.library.custom_op("starlm::rms_backward", mutates_args=())
def _rms_backward(grad: Tensor, x: Tensor) -> Tensor:
    from starlm.ops import cpu_elementwise

    return cpu_elementwise.rms_backward(grad, x, EPS)


@torch.library.custom_op("starlm::relu2", mutates_args=())
def _relu2(x: Tensor) -> Tensor:
    return _kernels(x).relu2(x)


@torch.library.custom_op("starlm::relu2_backward", mutates_args=())
def _relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _kernels(x).relu2_backward(grad, x)


def _kernels(x: Tensor) -> Any:
    """The module of relu²'s kernels for the device of `x`."""
    if x.device.type == "cpu":
        from starlm.ops import cpu_elementwise as kernels
    else:
        from starlm.ops import triton_elementwise as kernels
    return kernels


def _register(op, backward) -> None:
    op.register_fake(lambda x: x.new_empty(x.shape))
    backward.register_fake(lambda grad, x: x.new_empty(x.shape))
    op.register_autograd(
        lambda ctx, grad: backward(grad, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )


_register(_rms, _rms_backward)
_register(_relu2, _relu2_backward)
