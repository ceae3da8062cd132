"""Fused CPU kernels of RMSNorm, relu² and the loss of a chunk of logits."""

import numpy as np
import torch
from torch import Tensor

from starlm.errors import InputError
from starlm.ops.cpu_base import array, spread, store, widen
from starlm.ops.cpu_math import ONE, TWO, ZERO, exp, f32, jit, tanh_of_half

# Of these that count as one where it is decided whether a second thread pays.
LIGHT = 8


@jit
def _rms(x, eps, out, row0, row1):
    width = x.shape[1]
    for row in range(row0, row1):
        total = ZERO
        for c in range(width):
            total += f32(widen(x[row, c])) * f32(widen(x[row, c]))
        scale = ONE / np.sqrt(total / f32(width) + eps)
        target = out[row]
        for c in range(width):
            store(target, c, f32(widen(x[row, c])) * scale)


@jit
def _rms_backward(grad, x, eps, out, row0, row1):
    width = x.shape[1]
    for row in range(row0, row1):
        total, along = ZERO, ZERO
        for c in range(width):
            total += f32(widen(x[row, c])) * f32(widen(x[row, c]))
            along += f32(widen(x[row, c])) * f32(widen(grad[row, c]))
        scale = ONE / np.sqrt(total / f32(width) + eps)
        along *= scale * scale / f32(width)
        target = out[row]
        for c in range(width):
            store(target, c, scale * (f32(widen(grad[row, c])) - f32(widen(x[row, c])) * along))


# As slices: an index that might be negative is looked at every time, and the loop not vectorised.


@jit
def _relu2(x, out, begin, end):
    x, out = x[begin:end], out[begin:end]
    for i in range(x.size):
        v = f32(widen(x[i]))
        # Not max: NaN must stay NaN.
        v = ZERO if v < ZERO else v
        store(out, i, v * v)


@jit
def _relu2_backward(grad, x, out, begin, end):
    grad, x, out = grad[begin:end], x[begin:end], out[begin:end]
    for i in range(x.size):
        v = f32(widen(x[i]))
        v = ZERO if v < ZERO else v
        store(out, i, TWO * v * f32(widen(grad[i])))


@jit
def _softmax_loss(logits, targets, highest, cap, losses, wants_grad, row0, row1):
    width = logits.shape[1]
    # A row's softcap and exponentials, unrounded: the gradient needs both.
    capped, chances = np.empty(width, np.float32), np.empty(width, np.float32)
    inverse = ONE / cap if cap > 0 else ZERO
    scale = TWO * inverse
    for row in range(row0, row1):
        x, target, top = logits[row], targets[row], highest[row]
        if target < 0:
            losses[row] = 0
            x[:] = 0
            continue
        if cap > 0:
            top = cap * tanh_of_half(scale * top)
            for c in range(width):
                capped[c] = cap * tanh_of_half(scale * f32(widen(x[c])))
        else:
            for c in range(width):
                capped[c] = f32(widen(x[c]))
        total = ZERO
        for c in range(width):
            e = exp(capped[c] - top)
            chances[c] = e
            total += e
        losses[row] = top + np.log(total) - capped[target]
        if wants_grad:
            share = ONE / total
            for c in range(width):
                t = capped[c] * inverse
                store(x, c, chances[c] * share * (ONE - t * t))
            t = capped[target] * inverse
            store(x, target, (chances[target] * share - ONE) * (ONE - t * t))


def rms(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`starlm.ops.elementwise.rms` for CPU tensors in fp32 or bfloat16, in another of them or the same."""
    return _rows(_rms, x, eps=eps, dtype=dtype)


def rms_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """Its gradient, in the dtype of x."""
    return _rows(_rms_backward, grad, x, eps=eps, dtype=x.dtype)


def relu2(x: Tensor) -> Tensor:
    """`starlm.ops.elementwise.relu2` for CPU tensors in fp32 or bfloat16."""
    return _flat(_relu2, x)


def relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Its gradient."""
    return _flat(_relu2_backward, grad.to(x.dtype), x)


def softmax_loss(logits: Tensor, targets: Tensor, softcap: float, wants_grad: bool) -> Tensor:
    """Losses [N] of logits [N, V], in fp32; with `wants_grad` the logits become the gradient of the sum.

    Args:
        logits: contiguous, in fp32 or bfloat16, which the gradient is rounded to.
        targets: int64; negative ones are ignored: loss and gradient 0.

    Raises:
        InputError: a target beyond the vocabulary, where the kernel would write into memory of others.
    """
    if targets.numel() and (largest := int(targets.max())) >= logits.shape[1]:
        raise InputError(
            f"cross_entropy needs targets below the vocabulary's {logits.shape[1]}; got {largest}."
        )
    losses = torch.empty(len(logits), dtype=torch.float32, device="cpu")
    # Only to keep exp from overflowing: any number near the maximum would do.
    highest = logits.amax(-1).float()
    arrays = [array(logits), array(targets), array(highest), f32(softcap), array(losses)]
    spread(lambda *ends: _softmax_loss(*arrays, wants_grad, *ends), len(logits), logits.numel())
    return losses


def _rows(kernel, *inputs: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty(inputs[0].shape, dtype=dtype, device="cpu")
    width = max(out.shape[-1], 1)
    arrays = [array(x).reshape(-1, width) for x in (*inputs, out)]
    spread(
        lambda *ends: kernel(*arrays[:-1], f32(eps), arrays[-1], *ends), len(arrays[0]), out.numel() // LIGHT
    )
    return out


def _flat(kernel, *inputs: Tensor) -> Tensor:
    out = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device="cpu")
    arrays = [array(x).reshape(-1) for x in (*inputs, out)]
    spread(lambda *ends: kernel(*arrays, *ends), out.numel(), out.numel() // LIGHT)
    return out
