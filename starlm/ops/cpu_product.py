"""Products of a few rows with a matrix of weights, as a step of decoding has them.

BLAS libraries are made for many rows; with one to eight of them they take up to five times as long on some
processors (docs/performance.md).
"""

import numpy as np

from starlm.ops.cpu_base import widen
from starlm.ops.cpu_math import ONE, TWO, ZERO, f32, jit, tanh_of_half

# What becomes of a result: it is stored, added to what is there, or stored as relu(result)^2 or
# cap tanh(result / cap).
STORE, ADD, RELU2, CAP = 0, 1, 2, 3


# One row of weights after the other: memory is read from front to back, which is what it is fastest at.


@jit
def _by_one(w, x0):
    a = ZERO
    for k in range(w.size):
        a += f32(widen(w[k])) * x0[k]
    return a


@jit
def _by_two(w, x0, x1):
    a = b = ZERO
    for k in range(w.size):
        v = f32(widen(w[k]))
        a += v * x0[k]
        b += v * x1[k]
    return a, b


@jit
def _by_four(w, x0, x1, x2, x3):
    a = b = c = d = ZERO
    for k in range(w.size):
        v = f32(widen(w[k]))
        a += v * x0[k]
        b += v * x1[k]
        c += v * x2[k]
        d += v * x3[k]
    return a, b, c, d


@jit
def _finish(sums, bias, scale, then, cap, out):
    """out = what `then` says of scale sums + bias, for one row; a loop of its own each, to be vectorised."""
    for n in range(sums.size):
        sums[n] *= scale
    if bias.size:
        for n in range(sums.size):
            sums[n] += f32(widen(bias[n]))
    if then == ADD:
        for n in range(sums.size):
            out[n] += sums[n]
    elif then == CAP:
        for n in range(sums.size):
            out[n] = cap * tanh_of_half(TWO * sums[n] / cap)
    elif then == RELU2:
        for n in range(sums.size):
            # Not max: NaN must stay NaN.
            x = ZERO if sums[n] < ZERO else sums[n]
            out[n] = x * x
    else:
        for n in range(sums.size):
            out[n] = sums[n]


@jit
def product(weight, bias, x, scales, then, cap, out, begin, end):
    """Columns begin .. end of (scales x) weight^T + bias, put into `out` as `then` says.

    Args:
        weight: [N, K], fp32 or bfloat16's bits.
        bias: [N] in the dtype of `weight`, or [0] for none.
        x: [B, K], fp32.
        scales: [B], fp32, of the rows of x.
        out: [B, N], fp32.
    """
    batch, row, some = x.shape[0], 0, bias[begin:end]
    sums = np.empty((4, end - begin), np.float32)
    while row < batch:
        left = min(batch - row, 4)
        if left == 1:
            for n in range(begin, end):
                sums[0, n - begin] = _by_one(weight[n], x[row])
        elif left == 2:
            for n in range(begin, end):
                sums[0, n - begin], sums[1, n - begin] = _by_two(weight[n], x[row], x[row + 1])
        else:
            # Of three rows the last one stands in for the fourth.
            for n in range(begin, end):
                a, b, c, d = _by_four(weight[n], x[row], x[row + 1], x[row + 2], x[row + left - 1])
                sums[0, n - begin], sums[1, n - begin] = a, b
                sums[2, n - begin], sums[3, n - begin] = c, d
        for r in range(left):
            _finish(sums[r], some, scales[row + r], then, cap, out[row + r, begin:end])
        row += left


@jit
def rms_scales(x, eps, scales):
    """For each row the number by which RMSNorm multiplies it."""
    for b in range(x.shape[0]):
        total, row = ZERO, x[b]
        for c in range(row.size):
            total += row[c] * row[c]
        scales[b] = ONE / np.sqrt(total / f32(row.size) + eps)
