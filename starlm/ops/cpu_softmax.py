"""Fused CPU kernel of the loss: softcap, log-sum-exp and gradient of a chunk of logits, in place."""

import numpy as np
import torch
from torch import Tensor

from starlm.errors import InputError
from starlm.ops.cpu_base import spread
from starlm.ops.cpu_math import ONE, TWO, ZERO, exp, jit, tanh_of_half


@jit
def _softmax(logits, targets, highest, cap, losses, wants_grad, row0, row1):
    scratch = np.empty(logits.shape[1], np.float32)
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
            for c in range(x.size):
                x[c] = cap * tanh_of_half(scale * x[c])
        total = ZERO
        for c in range(x.size):
            e = exp(x[c] - top)
            scratch[c] = e
            total += e
        losses[row] = top + np.log(total) - x[target]
        if wants_grad:
            share, own = ONE / total, x[target] * inverse
            for c in range(x.size):
                t = x[c] * inverse
                x[c] = scratch[c] * share * (ONE - t * t)
            x[target] -= ONE - own * own


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
    spread(lambda begin, end: _softmax(*arrays, wants_grad, begin, end), len(logits), logits.numel())
    return losses
