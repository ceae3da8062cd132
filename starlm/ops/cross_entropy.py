"""Cross-entropy of a linear head, without ever holding all logits.

    logits = softcap * tanh(hidden @ weight.T / softcap)
    loss   = logsumexp(logits) - logits[target]

For a vocabulary of 4096 the logits of a batch, their softcap, their probabilities and three gradients are
the largest tensors of a training step by far. Here tokens go by in chunks: the logits of one chunk become
its gradient at once, while they are in the cache, and from it the chunk's part of the gradients of hidden
states and weights follows. Of these two the backward pass is a product with one number, so there is no second
derivative: to ask for one is an error.

Logits are rounded to the dtype of the hidden states, as any product is, and so is their gradient; what lies
between the two is fp32 at the least.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from starlm.errors import InputError
from starlm.ops.backends import autocast_dtype, has_kernels, load_kernels
from starlm.ops.deform import check_devices, check_rows
from starlm.ops.plain import is_plain

# Logits of one chunk: on a CPU they should stay in the cache, elsewhere one kernel should be worth starting.
CHUNK = {"cpu": 1 << 20}
CHUNK_ELSEWHERE = 1 << 26
# Below this many tokens the products with the weights are slow.
MIN_TOKENS = 256


def cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    *,
    softcap: float = 0.0,
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Tensor, "..."]:
    """Cross-entropy in nats of `targets` under the logits of a head without bias.

    Equivalent to::

        logits = torch.nn.functional.linear(hidden, weight).float()
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)

    Memory: one chunk of logits, and, where there is a gradient to come, its two results. With
    reduction="none" and a gradient to come, all logits, as in the formula above; only there is a second
    derivative.

    Args:
        hidden: the last hidden states; autocast acts on them and on `weight` as on any product.
        targets: token ids; negative ones are ignored.
        softcap: bound of the logits; 0 leaves them as they are.
        reduction: "mean" over the targets that are not ignored (NaN if there are none), or "none".

    Returns:
        One number, or with reduction="none" one per token, 0 where the target is ignored; fp32 at the least.

    Raises:
        InputError: targets that are not one whole number per token, or another reduction.
    """
    _check(hidden, targets, reduction)
    check_devices("cross_entropy", hidden=hidden, weight=weight, targets=targets)
    targets = targets.long()
    if (dtype := autocast_dtype(hidden)) is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if is_plain() or (reduction == "none" and wants_grad):
        return cross_entropy_of(_capped(_exact(hidden @ weight.T), softcap), targets, reduction=reduction)
    total, losses, _, _ = _loss(hidden, weight, targets, softcap, wants_grad)
    if reduction == "none":
        return losses
    count = (targets >= 0).sum()
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def cross_entropy_of(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], *, reduction: Literal["mean", "none"] = "mean"
) -> Float[Tensor, "..."]:
    """`cross_entropy` where there are logits, of whatever head."""
    _check(logits, targets, reduction)
    ids = targets.long().clamp(min=-1)
    return torch.nn.functional.cross_entropy(logits, ids, ignore_index=-1, reduction=reduction)


def _check(rows: Tensor, targets: Tensor, reduction: str) -> None:
    if reduction not in ("mean", "none"):
        raise InputError(f'cross_entropy has the reductions "mean" and "none"; got {reduction!r}.')
    check_rows("cross_entropy", "targets", targets, (len(rows),))


@torch.library.custom_op("starlm::cross_entropy", mutates_args=())
def _loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses' sum, the losses, and the gradients of the sum (empty if not wanted)."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
    dhidden = torch.empty_like(hidden) if wants_grad else hidden.new_empty(0)
    # The sum over chunks in fp32 at the least, whatever the weights are.
    dweight = torch.zeros_like(weight, dtype=exact) if wants_grad else losses.new_empty(0)
    for chunk in _chunks(hidden, weight):
        losses[chunk], logits = _losses(hidden[chunk] @ weight.T, targets[chunk], softcap, wants_grad)
        if wants_grad:
            dlogits = logits.to(hidden.dtype)
            torch.mm(dlogits, weight, out=dhidden[chunk])
            if weight.dtype == exact:
                dweight.addmm_(dlogits.T, hidden[chunk])
            else:
                dweight += dlogits.T @ hidden[chunk]
    return losses.sum(), losses, dhidden, dweight.to(weight.dtype)


@_loss.register_fake
def _(hidden, weight, targets, softcap, wants_grad):
    losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    kept = (torch.empty_like(x) if wants_grad else x.new_empty(0) for x in (hidden, weight))
    return losses.sum(), losses, *kept


@torch.library.custom_op("starlm::cross_entropy_backward", mutates_args=())
def _loss_backward(
    grad: Tensor, dhidden: Tensor, dweight: Tensor, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients, times `grad`. That they depend on `hidden` and `weight`, autograd learns here."""
    # Never in place: a graph may be walked twice.
    return (dhidden * grad).to(dhidden.dtype), (dweight * grad).to(dweight.dtype)


@_loss_backward.register_fake
def _(grad, dhidden, dweight, hidden, weight):
    return torch.empty_like(dhidden), torch.empty_like(dweight)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], *inputs[:2])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad, *unused):
    if grad is None:
        return (None,) * 5
    return *_loss_backward(grad, *ctx.saved_tensors), None, None, None


_loss.register_autograd(_differentiate, setup_context=_save)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices of the tokens, of about equal size."""
    room = CHUNK.get(hidden.device.type, CHUNK_ELSEWHERE)
    parts = max(1, -(-len(hidden) // max(MIN_TOKENS, room // max(len(weight), 1))))
    ends = [len(hidden) * part // parts for part in range(parts + 1)]
    return (slice(begin, end) for begin, end in pairwise(ends))


def _losses(logits: Tensor, targets: Tensor, softcap: float, wants_grad: bool) -> tuple[Tensor, Tensor]:
    """Losses [N] of logits [N, V], which may be written over, and, if wanted, the gradient of their sum."""
    if has_kernels(logits.device, logits.dtype):
        kernels = load_kernels("elementwise", logits.device)
        return kernels.softmax_loss(logits, targets, softcap, wants_grad), logits
    return _softmax_loss(_exact(logits), targets, softcap)


def _softmax_loss(logits: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Losses [N] of logits [N, V], and the gradient of their sum, in plain PyTorch."""
    capped, valid = _capped(logits, softcap), targets >= 0
    index = targets.clamp(min=0)[:, None]
    chances = capped.log_softmax(-1)
    losses = torch.where(valid, -chances.gather(1, index)[:, 0], 0)
    grad = chances.exp().scatter_add_(1, index, chances.new_full((1, 1), -1.0).expand(len(index), 1))
    if softcap:
        grad *= 1 - (capped / softcap).square()
    return losses, torch.where(valid[:, None], grad, 0)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
