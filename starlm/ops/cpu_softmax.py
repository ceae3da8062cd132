"""Fused CPU kernel of the loss: softcap, log-sum-exp and gradient of a chunk of logits, in place."""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from starlm.errors import InputError
from starlm.ops.cpu import _spread

# Sums may be taken in any order, products and sums fused; NaN and infinity keep their meaning.
_jit: Any = numba.njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"}
)
# All constants are fp32: an integer beside an fp32 number would make numba compute in fp64.
_f32, _i32 = np.float32, np.int32
_ONE, _TWO, _HALF = _f32(1), _f32(2), _f32(0.5)
# Where exp would leave fp32, and where tanh has long been 1.
_LOWEST, _HIGHEST = _f32(-87), _f32(40)
_LOG2E = _f32(1 / math.log(2))
# ln 2 in two parts, of which the first times any exponent of fp32 is exact.
_LN2_HIGH = _f32(355 / 512)
_LN2_LOW = _f32(math.log(2) - 355 / 512)


@_jit
def _exp_parts(x):
    """2^n and y with exp(x) = 2^n + 2^n y, in a form that the compiler vectorises; libm's exp is no such."""
    x = min(max(x, _LOWEST), _HIGHEST)
    whole = np.floor(x * _LOG2E + _HALF)
    r = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    # Taylor to the 7th power: |r| <= ln(2) / 2, so the next term is below 2^-27.
    y = _f32(1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0):
        y = y * r + _f32(factor)
    return _i32((_i32(whole) + _i32(127)) << _i32(23)).view(np.float32), y * r


@_jit
def _capped(x, cap, scale):
    """cap * tanh(x / cap) by way of exp(2x / cap) - 1, which keeps its digits near 0; scale = 2 / cap."""
    power, y = _exp_parts(x * scale)
    less = power * y + (power - _ONE)
    return cap * (less / (less + _TWO))


@_jit
def _softmax(logits, targets, highest, cap, losses, wants_grad, row0, row1):
    scratch = np.empty(logits.shape[1], np.float32)
    inverse = _ONE / cap if cap > 0 else _f32(0)
    scale = _TWO * inverse
    for row in range(row0, row1):
        x, target, top = logits[row], targets[row], highest[row]
        if target < 0:
            losses[row] = 0
            x[:] = 0
            continue
        if cap > 0:
            top = _capped(top, cap, scale)
            for c in range(x.size):
                x[c] = _capped(x[c], cap, scale)
        total = _f32(0)
        for c in range(x.size):
            power, y = _exp_parts(x[c] - top)
            e = power + power * y
            scratch[c] = e
            total += e
        losses[row] = top + np.log(total) - x[target]
        if wants_grad:
            share, own = _ONE / total, x[target] * inverse
            for c in range(x.size):
                t = x[c] * inverse
                x[c] = scratch[c] * share * (_ONE - t * t)
            x[target] -= _ONE - own * own


def softmax_loss(logits: Tensor, targets: Tensor, softcap: float, wants_grad: bool) -> Tensor:
    """Losses [N] of fp32 `logits` [N, V], which become the gradient of the losses' sum (or scratch).

    Raises:
        InputError: a target beyond the vocabulary, where the kernel would write into memory of others.
    """
    if targets.numel() and (largest := int(targets.max())) >= logits.shape[1]:
        raise InputError(
            f"cross_entropy needs targets below the vocabulary's {logits.shape[1]}; got {largest}."
        )
    losses = torch.empty(len(logits), dtype=torch.float32)
    # Only to keep exp from overflowing: any number near the maximum would do.
    highest = logits.amax(-1)
    arrays = [logits.numpy(), targets.numpy(), highest.numpy(), np.float32(softcap), losses.numpy()]
    _spread(lambda begin, end: _softmax(*arrays, wants_grad, begin, end), len(logits), logits.numel())
    return losses
