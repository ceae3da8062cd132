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


# Weights come from memory one row after the other, which is what it is fastest at, and meet one row of
# numbers or two. They meet the others from the cache, four rows at a time: eight sums are what sixteen
# registers hold beside their factors.


@jit
def _by_one(w, x):
    a = ZERO
    for k in range(x.size):
        a += f32(widen(w[k])) * x[k]
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
def _four_by_two(w, x, y):
    a = b = c = d = e = f = g = h = ZERO
    for k in range(x.size):
        p, q = f32(widen(w[0][k])), f32(widen(w[1][k]))
        r, s = f32(widen(w[2][k])), f32(widen(w[3][k]))
        u, v = x[k], y[k]
        a += p * u
        b += q * u
        c += r * u
        d += s * u
        e += p * v
        f += q * v
        g += r * v
        h += s * v
    return (a, b, c, d), (e, f, g, h)


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
    batch, some = x.shape[0], bias[begin:end]
    # In the last four rows of weights the last one stands in for those past the end: sums that nobody reads.
    sums = np.empty((batch, end - begin + 3), np.float32)
    if batch % 2:
        for n in range(begin, end):
            sums[batch - 1, n - begin] = _by_one(weight[n], x[batch - 1])
    elif batch:
        for n in range(begin, end):
            s, t = _by_two(weight[n], x[batch - 2], x[batch - 1])
            sums[batch - 2, n - begin], sums[batch - 1, n - begin] = s, t
    if batch > 2:
        last = end - 1
        for n in range(begin, end, 4):
            w = weight[n], weight[min(n + 1, last)], weight[min(n + 2, last)], weight[min(n + 3, last)]
            for row in range(0, batch - 2, 2):
                s, t = _four_by_two(w, x[row], x[row + 1])
                for i in range(4):
                    sums[row, n - begin + i], sums[row + 1, n - begin + i] = s[i], t[i]
    for row in range(batch):
        _finish(sums[row][: end - begin], some, scales[row], then, cap, out[row, begin:end])


@jit
def rms_scales(x, eps, scales):
    """For each row the number by which RMSNorm multiplies it."""
    for b in range(x.shape[0]):
        total, row = ZERO, x[b]
        for c in range(row.size):
            total += row[c] * row[c]
        scales[b] = ONE / np.sqrt(total / f32(row.size) + eps)
