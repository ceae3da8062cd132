"""Fused CPU kernels of a Deformer layer between its projections: forward and backward, one pass each.

One unit of work is a few heads of one kind of one batch row. Their values, normalised, are a slab
[T + 1, W] that stays in the cache while the queries go by; so do the prefix sums of box heads, and the
gradients of both. The slab's last row is zero: who has no anchor reads that.
"""

import numpy as np
import torch
from torch import Tensor

from starlm.ops.constants import ANCHORED, BOX, BOX_SCALE, EPS, NOW
from starlm.ops.cpu import locate, rows_of
from starlm.ops.cpu_base import index, spread, store, widen
from starlm.ops.cpu_math import HALF, ONE, ZERO, exp, f32, i32, jit, sigmoid, softplus

# Elements of a slab, if a unit has more than one head: long loops are fast ones, but only in the cache.
SLAB = 1 << 16


@jit
def _normalise(values, left, channels, slab, scale):
    """Fill slab with rows at root mean square 1 per head, and scale [T, W // C] with what did it."""
    slab[-1] = 0
    for t in range(scale.shape[0]):
        for h in range(scale.shape[1]):
            begin = h * channels
            row = values[t, left + begin : left + begin + channels]
            out = slab[t, begin : begin + channels]
            total = ZERO
            for c in range(channels):
                x = f32(widen(row[c]))
                out[c] = x
                total += x * x
            scale[t, h] = ONE / np.sqrt(total / f32(channels) + f32(EPS))
            for c in range(channels):
                out[c] *= scale[t, h]


@jit
def _prefix_sums(slab, sums):
    sums[0] = 0
    for t in range(slab.shape[0] - 1):
        for c in range(slab.shape[1]):
            sums[t + 1, c] = sums[t, c] + slab[t, c]


@jit
def reach(z, kind, furthest, shift):
    """What the shift projection says, in tokens: a distance, an offset as it is, or a window's length."""
    if kind == NOW:
        for c in range(z.size):
            x = softplus(f32(widen(z[c])))
            shift[c] = furthest if x > furthest else x
    elif kind == ANCHORED:
        for c in range(z.size):
            shift[c] = widen(z[c])
    else:
        for c in range(z.size):
            x = exp(HALF * f32(widen(z[c])))
            x = furthest if x > furthest else x
            shift[c] = ONE if x < ONE else x


@jit
def place(shift, kind, origin, start, t, length, channels, near, far, fraction):
    """`locate` of every head; of anchored ones by the origins given, [W // C]."""
    if kind == NOW:
        locate(shift, t, start, i32(t), near, far, fraction)
    elif kind == BOX:
        # A window is clipped to what there is; its sums are those before each row, so the query's is t + 1.
        most = f32(t + 1 - start)
        for c in range(shift.size):
            shift[c] = most if shift[c] > most else shift[c]
        locate(shift, t + 1, start, i32(t + 1), near, far, fraction)
    else:
        for h in range(shift.size // channels):
            begin, end = h * channels, (h + 1) * channels
            if origin[h] < 0:
                for c in range(begin, end):
                    near[c] = far[c] = length
                    fraction[c] = ZERO
            else:
                some = near[begin:end], far[begin:end], fraction[begin:end]
                locate(shift[begin:end], origin[h], start, i32(t), *some)


@jit
def mean_of(sums, end, width, near, far, fraction, c):
    """Mean of channel c over the last `width` rows before `end`; and the row at the far edge, negative."""
    first, second = sums[np.uint32(near[c]), c], sums[np.uint32(far[c]), c]
    edge = second - first
    return (sums[end, c] - (first + fraction[c] * edge)) / width, edge


@jit
def _unit(units, part, channels):
    """Batch row, kind, index of the first head among its kind, first and last channel of a unit of work."""
    kind, head0, head1, number = units[part % len(units)]
    return part // len(units), kind, number, head0 * channels, head1 * channels


@jit
def _forward(values, z, gate, origin, first, units, channels, furthest, gated, out, part0, part1):
    length = values.shape[1]
    for part in range(part0, part1):
        b, kind, anchors, left, right = _unit(units, part, channels)
        width = right - left
        slab, scale = (
            np.empty((length + 1, width), np.float32),
            np.empty((length, width // channels), np.float32),
        )
        sums = np.empty((length + 1 if kind == BOX else 1, width), np.float64)
        near, far = np.empty(width, np.int32), np.empty(width, np.int32)
        scratch = np.empty((3, width), np.float32)
        shift, fraction, read = scratch[0], scratch[1], scratch[2]
        _normalise(values[b], left, channels, slab, scale)
        if kind == BOX:
            _prefix_sums(slab, sums)
        for t in range(length):
            start = max(min(first[b, t], t), 0)
            reach(z[b, t, left:right], kind, furthest, shift)
            place(shift, kind, origin[b, t, anchors:], start, t, length, channels, near, far, fraction)
            if kind == BOX:
                for c in range(width):
                    mean, _ = mean_of(sums, t + 1, shift[c], near, far, fraction, c)
                    read[c] = mean * np.sqrt(min(shift[c], f32(BOX_SCALE)))
            else:
                for c in range(width):
                    i, j = np.uint32(near[c]), np.uint32(far[c])
                    v = slab[i, c]
                    read[c] = v + fraction[c] * (slab[j, c] - v)
            target = out[b, t, left:right]
            if gated:
                g = gate[b, t, left:right]
                for c in range(width):
                    store(target, c, read[c] * sigmoid(f32(widen(g[c]))))
            else:
                for c in range(width):
                    store(target, c, read[c])


@jit
def _backward(
    grad, values, z, gate, origin, first, units, channels, furthest, gated, dvalues, dz, dgate, part0, part1
):
    length = values.shape[1]
    for part in range(part0, part1):
        b, kind, anchors, left, right = _unit(units, part, channels)
        width = right - left
        slab, scale = (
            np.empty((length + 1, width), np.float32),
            np.empty((length, width // channels), np.float32),
        )
        dslab = np.zeros((length + 1, width), np.float32)
        sums = np.empty((length + 1 if kind == BOX else 1, width), np.float64)
        dsums = np.zeros(sums.shape, np.float64)
        near, far = np.empty(width, np.int32), np.empty(width, np.int32)
        scratch = np.empty((5, width), np.float32)
        shift, fraction, read, d, slope = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
        _normalise(values[b], left, channels, slab, scale)
        if kind == BOX:
            _prefix_sums(slab, sums)
        for t in range(length):
            start = max(min(first[b, t], t), 0)
            dy, zt, dzt = grad[b, t, left:right], z[b, t, left:right], dz[b, t, left:right]
            g, dg = gate[b, t, left:right], dgate[b, t, left:right]
            # The gradient of what is read; that of the gate follows below.
            if gated:
                for c in range(width):
                    slope[c] = sigmoid(f32(widen(g[c])))
                    d[c] = f32(widen(dy[c])) * slope[c]
            else:
                for c in range(width):
                    d[c] = widen(dy[c])
            reach(zt, kind, furthest, shift)
            place(shift, kind, origin[b, t, anchors:], start, t, length, channels, near, far, fraction)
            if kind == BOX:
                most = min(f32(t + 1 - start), furthest)
                for c in range(width):
                    mean, edge = mean_of(sums, t + 1, shift[c], near, far, fraction, c)
                    size = np.sqrt(min(shift[c], f32(BOX_SCALE)))
                    read[c] = mean * size
                    i, j = np.uint32(near[c]), np.uint32(far[c])
                    share = np.float64(d[c] * size) / shift[c]
                    further = share * fraction[c]
                    dsums[t + 1, c] += share
                    dsums[i, c] -= share - further
                    dsums[j, c] -= further
                    # d width / d z = width / 2, and 0 where the width is clipped.
                    clipped = shift[c] <= ONE or shift[c] >= most
                    shift[c] *= ZERO if clipped else f32(share * (-edge - mean)) * HALF
            else:
                for c in range(width):
                    i, j = np.uint32(near[c]), np.uint32(far[c])
                    v = slab[i, c]
                    edge = slab[j, c] - v
                    read[c] = v + fraction[c] * edge
                    further = d[c] * fraction[c]
                    dslab[i, c] += d[c] - further
                    dslab[j, c] += further
                    d[c] *= edge
                if kind == NOW:
                    for c in range(width):
                        free = sigmoid(f32(widen(zt[c])))
                        shift[c] = d[c] * free if shift[c] < furthest else ZERO
                else:
                    for c in range(width):
                        shift[c] = d[c]
            for c in range(width):
                store(dzt, c, shift[c])
            if gated:
                for c in range(width):
                    store(dg, c, f32(widen(dy[c])) * read[c] * slope[c] * (ONE - slope[c]))
        if kind == BOX:
            # Row t is part of every sum behind it.
            for t in range(length - 1, -1, -1):
                for c in range(width):
                    dslab[t, c] = dsums[t + 1, c]
                    dsums[t, c] += dsums[t + 1, c]
        for t in range(length):
            for h in range(width // channels):
                begin = h * channels
                v, dv = slab[t, begin : begin + channels], dslab[t, begin : begin + channels]
                target = dvalues[b, t, left + begin : left + begin + channels]
                total = ZERO
                for c in range(channels):
                    total += v[c] * dv[c]
                total /= f32(channels)
                for c in range(channels):
                    store(target, c, scale[t, h] * (dv[c] - v[c] * total))


def forward(
    values: Tensor,
    shift: Tensor,
    gate: Tensor | None,
    origin: Tensor,
    first: Tensor | None,
    near: int,
    boxes: int,
    furthest: float,
) -> tuple[Tensor, Tensor]:
    """`starlm.ops.mix` for CPU tensors in fp32 or bfloat16; nothing is kept."""
    out = torch.empty(values.shape, dtype=values.dtype, device="cpu")
    units = _units(values, near, boxes)
    arrays = [*_arrays(values, shift, gate, origin, first, units, furthest), rows_of(out, torch.float32)]
    spread(lambda *ends: _forward(*arrays, *ends), len(values) * len(units), values.numel())
    return out, torch.empty(0, dtype=torch.float32, device="cpu")


def backward(
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
    """Gradients of `forward` with respect to values, shift and gate (empty without one)."""
    dvalues, dshift = (torch.empty(values.shape, dtype=values.dtype, device="cpu") for _ in range(2))
    dgate = torch.empty(0 if gate is None else values.shape, dtype=values.dtype, device="cpu")
    units = _units(values, near, boxes)
    arrays = [rows_of(grad.to(values.dtype), torch.float32)]
    arrays += _arrays(values, shift, gate, origin, first, units, furthest)
    arrays += [rows_of(x, torch.float32) for x in (dvalues, dshift, dshift if gate is None else dgate)]
    spread(lambda *ends: _backward(*arrays, *ends), len(values) * len(units), values.numel())
    return dvalues, dshift, dgate


def _units(values: Tensor, near: int, boxes: int) -> np.ndarray:
    """Rows of kind, first head, head behind the last, index of the first among its kind."""
    _, length, heads, channels = values.shape
    together = max(1, SLAB // max(1, length * channels))
    units = []
    for kind, begin, end in (
        (NOW, 0, near),
        (ANCHORED, near, heads - boxes),
        (BOX, heads - boxes, heads),
    ):
        for head in range(begin, end, together):
            units.append((kind, head, min(head + together, end), head - begin))
    return np.array(units, np.int64)


def _arrays(values, shift, gate, origin, first, units, furthest) -> list:
    first = torch.zeros(values.shape[:2], dtype=torch.int64, device="cpu") if first is None else first
    floats = [rows_of(x, torch.float32) for x in (values, shift, values if gate is None else gate)]
    channels = values.shape[3]
    return [*floats, index(origin), index(first), units, channels, np.float32(furthest), gate is not None]
