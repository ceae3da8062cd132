"""What a Deformer layer does between its projections, fused: on CPUs and on GPUs.

Written as a composition (`Deformer` in `starlm.nn.deformer`), the step between the projections normalises,
slices, reads, sums up, concatenates and multiplies, each of them one or more passes over tensors that do not
fit the cache, and as many again in the backward pass. The result here is the same.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from starlm.errors import InputError
from starlm.ops import backends
from starlm.ops.backends import has_kernels, load_kernels
from starlm.ops.deform import check_devices, check_rows


def mix(
    values: Float[Tensor, "B T H C"],
    shift: Float[Tensor, "B T H C"],
    gate: Float[Tensor, "B T H C"] | None,
    origin: Int[Tensor, "B T A"] | None,
    *,
    first: Int[Tensor, "B T"] | None = None,
    near: int,
    boxes: int = 0,
    max_shift: int | None = None,
) -> Float[Tensor, "B T H C"]:
    """What the heads read of rms(values), times sigmoid(gate).

    Heads come in this order: `near` of kind now, A anchored ones, `boxes` box heads. With v = rms(values) per
    head, and z the head's part of `shift`::

        now       deform(v, min(softplus(z), max_shift), first=first)
        anchored  deform(v, z, origin=its origin, first=first)
        box       m * sqrt(min(w, 16)),  m, w = box(prefix_sums(v), width, first=first),
                  width = max(min(exp(z / 2), max_shift), 1)

    without gradient through the square root.

    Returns:
        In the dtype of `values`; arithmetic in fp32, prefix sums in fp64.

    Raises:
        InputError: dtypes that the kernels do not have; shapes that do not fit, which kernels do not look at.
    """
    batch, length, heads, _ = values.shape
    if shift.shape != values.shape or (gate is not None and gate.shape != values.shape):
        raise InputError(f"mix needs shift and gate of the shape of values, {tuple(values.shape)}.")
    check_rows("mix", "first", first, (batch, length))
    check_rows("mix", "origin", origin, (batch, length, heads - near - boxes))
    check_devices("mix", values=values, shift=shift, gate=gate, origin=origin, first=first)
    # One dtype for all: a shift in fp32 must not be rounded to bf16.
    dtype = torch.promote_types(values.dtype, shift.dtype)
    if not has_kernels(values.device, dtype):
        raise InputError(
            f"mix computes in float32 or bfloat16, on a GPU in float16 too; got values {values.dtype}, shift "
            f"{shift.dtype}, on {values.device}. Compose it from deform and box."
        )
    gate = None if gate is None else gate.to(dtype)
    if origin is None:
        origin = torch.empty(*values.shape[:2], 0, dtype=torch.int64, device=values.device)
    furthest = math.inf if max_shift is None else float(max_shift)
    y, _ = _mix(values.to(dtype), shift.to(dtype), gate, origin, first, near, boxes, furthest)
    return y.to(values.dtype)


@torch.library.custom_op("starlm::mix", mutates_args=())
def _mix(
    values: Tensor,
    shift: Tensor,
    gate: Tensor | None,
    origin: Tensor,
    first: Tensor | None,
    near: int,
    boxes: int,
    furthest: float,
) -> tuple[Tensor, Tensor]:
    """The result, and what the kernels keep of it for their backward pass."""
    kernels = load_kernels("mix", values.device)
    return kernels.forward(values, shift, gate, origin, first, near, boxes, furthest)


@torch.library.custom_op("starlm::mix_backward", mutates_args=())
def _mix_backward(
    grad: Tensor,
    kept: Tensor,
    values: Tensor,
    shift: Tensor,
    gate: Tensor | None,
    origin: Tensor,
    first: Tensor | None,
    near: int,
    boxes: int,
    furthest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = load_kernels("mix", values.device)
    return kernels.backward(grad, kept, values, shift, gate, origin, first, near, boxes, furthest)


@_mix.register_fake
def _(values, shift, gate, origin, first, near, boxes, furthest):
    batch, length, heads, _ = values.shape
    kept = (batch, heads - boxes, length) if backends.on_gpu(values.device) else (0,)
    return values.new_empty(values.shape), values.new_empty(kept, dtype=torch.float32)


@_mix_backward.register_fake
def _(grad, kept, values, shift, gate, origin, first, near, boxes, furthest):
    return (
        values.new_empty(values.shape),
        shift.new_empty(shift.shape),
        shift.new_empty(0) if gate is None else gate.new_empty(gate.shape),
    )


def _save(ctx, inputs, output):
    # Of what is kept there is no gradient, and none is to be made of zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs[:5])
    ctx.settings = inputs[5:]


def _differentiate(ctx, grad, _):
    # Looked at once: under gradient checkpointing a second look is an error.
    saved = ctx.saved_tensors
    dvalues, dshift, dgate = _mix_backward(grad, *saved, *ctx.settings)
    return dvalues, dshift, None if saved[3] is None else dgate, *[None] * 5


_mix.register_autograd(_differentiate, setup_context=_save)
