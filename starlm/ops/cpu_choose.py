"""The next token of each of many rows of logits in one call: what `generate.sampling` says in PyTorch.

There each option is a pass or more over [B, V] and top-p a sort of it, which for eight sequences took longer
than the step that had made the logits. Here a row is read a few times and nothing is sorted.
"""

import numpy as np
from jaxtyping import Float
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from starlm.ops.cpu_base import array, pointer
from starlm.ops.cpu_math import ZERO, exp, f32, i32, jit

OPTIONS = np.dtype(
    [
        *((name, np.float64) for name in ("temperature", "top_p", "min_p")),
        *((name, np.float64) for name in ("repetition", "presence", "frequency")),
        # Where in 0 .. 1 the token is drawn.
        ("point", np.float64),
        ("top_k", np.int64),
        # Addresses of [V], or 0: bool, fp32, fp32, bool.
        *((name, np.int64) for name in ("occurred", "counts", "bias", "allowed")),
    ]
)
"""Of one row: see `starlm.generate.sampling.Sampling`, whose values that are off are off here."""
# Bits of an fp32 number but for its sign; -inf as `_ordered` has it.
_SIZE, _MINUS_INFINITY = i32(0x7FFFFFFF), i32(-0x7F800001)
# Below this exp leaves fp32.
_LOWEST = f32(-87)
# Bits of weights, which are at most 1: the highest, and the lowest of those that say the power of two.
# (Plain numbers would be types of their own to the compiler, and functions compiled for each of them.)
_HIGHEST, _POWER, _LOWEST_BIT = np.int64(29), np.int64(23), np.int64(0)
# Numbers that are added up before a sum is looked at.
_BLOCK = 256


@jit
def _adjust(logits, it, out):
    """out = logits with penalties and bias, and -inf for what is not allowed."""
    size = logits.size
    for i in range(size):
        out[i] = logits[i]
    if it.occurred:
        occurred, penalty = carray(pointer(it.occurred), (size,), np.uint8), f32(it.repetition)
        for i in range(size):
            x = out[i]
            out[i] = (x / penalty if x > ZERO else x * penalty) if occurred[i] else x
    if it.counts:
        counts = carray(pointer(it.counts), (size,), np.float32)
        presence, frequency = f32(it.presence), f32(it.frequency)
        for i in range(size):
            out[i] = out[i] - counts[i] * frequency - (presence if counts[i] > ZERO else ZERO)
    if it.bias:
        bias = carray(pointer(it.bias), (size,), np.float32)
        for i in range(size):
            out[i] += bias[i]
    if it.allowed:
        allowed = carray(pointer(it.allowed), (size,), np.uint8)
        for i in range(size):
            out[i] = out[i] if allowed[i] else f32(-np.inf)


@jit
def _ordered(bits):
    """Bits of an fp32 number as an integer of the same order, and back."""
    return i32(bits ^ ((bits >> i32(31)) & _SIZE))


@jit
def _largest(logits):
    """The largest; NaN if anything is."""
    nans, largest = 0, _MINUS_INFINITY
    for i in range(logits.size):
        nans += logits[i] != logits[i]
    # As integers: those the compiler compares many at a time.
    for i in range(logits.size):
        x = _ordered(f32(logits[i]).view(np.int32))
        largest = x if x > largest else largest
    return f32(np.nan) if nans else i32(_ordered(largest)).view(np.float32)


@jit
def _weigh(logits, largest, temperature, out):
    """out = chances, the likeliest one's as 1; their sum."""
    # So that not even 0 times it is NaN; beyond these nothing changes.
    sharpness, total = f32(1 / min(max(temperature, 1e-30), 1e30)), 0.0
    for i in range(logits.size):
        x = (logits[i] - largest) * sharpness
        w = exp(x) if x >= _LOWEST else ZERO
        out[i] = w
        total += np.float64(w)
    return total


@jit
def _amount(weights, size, least, by_number):
    """Of the first `size` those that are `least` or more: how many, or their sum."""
    number, total = 0, 0.0
    if by_number:
        for i in range(size):
            number += weights[i] >= least
        return np.float64(number)
    for i in range(size):
        total += np.float64(weights[i] if weights[i] >= least else ZERO)
    return total


@jit
def _sharpen(weights, size, limit, by_number, least, left, right):
    """Bits of the largest weight with which, and those above it, the limit is reached; from bit `left` on."""
    for bit in range(left, right - 1, -1):
        more = i32(least | i32(1 << bit))
        if _amount(weights, size, i32(more).view(np.float32), by_number) >= limit:
            least = more
    return least


@jit
def _cut(weights, limit, by_number, scratch):
    """Only the likeliest, as long as those before are less than the limit, others 0; the sum of them.

    Args:
        limit: of their number, or of their sum.
    """
    # First its power of two, which few others reach.
    bits = _sharpen(weights, weights.size, limit, by_number, i32(0), _HIGHEST, _POWER)
    least, size = i32(bits).view(np.float32), np.int64(0)
    for i in range(weights.size):
        scratch[size] = weights[i]
        size += weights[i] >= least
    bits = _sharpen(scratch, size, limit, by_number, bits, _POWER - 1, _LOWEST_BIT)
    least = i32(bits).view(np.float32)
    before = _amount(scratch, size, i32(bits + i32(1)).view(np.float32), by_number)
    return _keep(weights, least, before, limit, by_number)


@jit
def _keep(weights, least, before, limit, by_number):
    """What is likelier than `least`, and as long as `before` is below the limit what is equal; the sum."""
    kept = 0.0
    for i in range(weights.size):
        w = weights[i]
        if w == least and before < limit:
            # Of equals the first ones.
            before += 1.0 if by_number else np.float64(w)
        elif w <= least:
            w = ZERO
        weights[i] = w
        kept += np.float64(w)
    return kept


@jit
def _first(logits, wanted):
    here = 0
    while logits[here] != wanted:
        here += 1
    return here


@jit
def _at(weights, goal):
    """The first at which the sum up to and with it is above the goal."""
    total = 0.0
    for begin in range(0, weights.size, _BLOCK):
        end, more = min(begin + _BLOCK, weights.size), 0.0
        for i in range(begin, end):
            more += np.float64(weights[i])
        if total + more <= goal:
            total += more
            continue
        for i in range(begin, end):
            total += np.float64(weights[i])
            if total > goal:
                return i
    # Rounding has made the goal more than all.
    last = weights.size - 1
    while weights[last] == ZERO:
        last -= 1
    return last


@jit
def _choose(logits, options, tokens):
    vocab = logits.shape[1]
    adjusted, weights = np.empty(vocab, np.float32), np.empty(vocab, np.float32)
    for b in range(tokens.size):
        it, row = options[b], logits[b]
        if it.occurred or it.counts or it.bias or it.allowed:
            _adjust(row, it, adjusted)
            row = adjusted
        largest = _largest(row)
        if not np.isfinite(largest):
            tokens[b] = -1
            continue
        if it.temperature == 0:
            tokens[b] = _first(row, largest)
            continue
        total = _weigh(row, largest, it.temperature, weights)
        # Not True and False, of which the compiler would make two kernels.
        by_number, by_share = 0 < it.top_k < vocab, it.top_p < 1
        if by_number:
            total = _cut(weights, np.float64(it.top_k), by_number, adjusted)
        if by_share:
            total = _cut(weights, it.top_p * total, not by_share, adjusted)
        if it.min_p > 0:
            total = _keep(weights, f32(it.min_p), 0.0, np.inf, by_number)
        tokens[b] = _at(weights, it.point * total)


def choose(logits: Float[Tensor, "B V"], options: np.ndarray) -> list[int]:
    """A token for each row, or -1 where a logit is NaN, the largest infinite, or nothing is allowed.

    Args:
        logits: in fp32.
        options: OPTIONS [B].
    """
    tokens = np.empty(len(options), np.int64)
    _choose(array(logits), options, tokens)
    return tokens.tolist()
