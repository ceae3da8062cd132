"""RMSNorm and relu² in one pass over memory each way, on a CPU.

PyTorch composes both of several passes there, each of which writes a tensor that leaves the cache. Under
torch.compile and elsewhere the compositions are what they should be.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from starlm.ops.plain import is_plain

EPS = 1e-6
# Elements below which an operator of ours costs more to call than it saves, if there is no gradient to come.
SMALL = 1 << 15


def fuses(x: Tensor) -> bool:
    """Whether fused kernels exist and pay: CPU, fp32 or bf16, and a gradient to come or much to do."""
    if not _has_kernels(x):
        return False
    # A compiled or exported graph must not depend on the size.
    large = not torch.compiler.is_compiling() and x.numel() >= SMALL
    return large or (torch.is_grad_enabled() and x.requires_grad)


def _has_kernels(x: Tensor) -> bool:
    return not is_plain() and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def rms(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """`x` scaled to root mean square 1 over its last dimension, in its own dtype (arXiv 1910.07467)."""
    if fuses(x) and not torch.compiler.is_compiling():
        return _rms(x)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=EPS)


def rms_unseen(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """`rms` for a step of decoding: if it can be, the kernel alone, which no autograd and no tracer sees.

    What PyTorch composes RMSNorm of, and the way to an operator of ours, take longer there than the work.
    """
    if not _has_kernels(x) or (torch.is_grad_enabled() and x.requires_grad):
        return rms(x)
    from starlm.ops import cpu_elementwise

    return cpu_elementwise.rms(x, EPS)


def relu2(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """relu(x)², in its own dtype (arXiv 2109.08668)."""
    if fuses(x) and not torch.compiler.is_compiling():
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
    from starlm.ops import cpu_elementwise

    return cpu_elementwise.relu2(x)


@torch.library.custom_op("starlm::relu2_backward", mutates_args=())
def _relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    from starlm.ops import cpu_elementwise

    return cpu_elementwise.relu2_backward(grad, x)


def _register(op, backward) -> None:
    op.register_fake(lambda x: x.new_empty(x.shape))
    backward.register_fake(lambda grad, x: x.new_empty(x.shape))
    op.register_autograd(
        lambda ctx, grad: backward(grad, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )


_register(_rms, _rms_backward)
_register(_relu2, _relu2_backward)
