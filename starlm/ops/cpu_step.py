"""A Deformer layer between its projections, for new tokens of each of many sequences: two calls per layer.

Decoding spends little arithmetic here, but composed it is some thirty small calls per layer and sequence. The
definition is that of `starlm.ops.mix`; the rows that are read stand in the buffers of the decode state.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from starlm.ops.constants import ANCHORED, BOX, BOX_SCALE, EPS
from starlm.ops.cpu_base import array, index, pointer, spread, store, widen
from starlm.ops.cpu_math import ONE, ZERO, f32, jit, sigmoid
from starlm.ops.cpu_mix import mean_of, place, reach


@jit
def _normalise(values, channels, row):
    """RMSNorm of each head, rounded to what the buffers hold."""
    for begin in range(0, values.size, channels):
        total = ZERO
        for c in range(begin, begin + channels):
            x = f32(widen(values[c]))
            total += x * x
        scale = ONE / np.sqrt(total / f32(channels) + f32(EPS))
        for c in range(begin, begin + channels):
            store(row, c, f32(widen(values[c])) * scale)


@jit
def append_row(values, spans, streams, b, t, channels, row):
    """Token t of those that are new to sequence b, normalised, to its buffers, which are as `row`.

    `values` and `row` are [D], `spans` where the kinds' channels begin and end, and `streams` [3, 3, B] has
    address, past and first of the kinds' buffers.
    """
    _normalise(values, channels, row)
    for kind in range(3):
        left, right = spans[kind], spans[kind + 1]
        if left == right:
            continue
        address, past = streams[kind, 0, b], streams[kind, 1, b] + t
        if kind == BOX:
            sums = carray(pointer(address), (past + 1, right - left), np.float64)
            for c in range(right - left):
                sums[past, c] = sums[past - 1, c] + widen(row[left + c])
        else:
            buffer = carray(pointer(address), (past + 1, right - left), row.dtype)
            for c in range(right - left):
                buffer[past, c] = row[left + c]


@jit
def read_row(z, gate, origin, spans, streams, b, t, later, channels, furthest, gated, like, out):
    """What that token reads, whose first row is `later` behind that of token 0; all [D] but origin [A].

    Buffers are in the dtype of `like`, an array of one dimension, as `row` is in `append_row`: so both
    callers have the same types, and in fp32 one compiled kernel.
    """
    width = z.size
    rows, scratch = np.empty((2, width), np.int32), np.empty((3, width), np.float32)
    shift, fraction, read = scratch[0], scratch[1], scratch[2]
    for kind in range(3):
        left, right = spans[kind], spans[kind + 1]
        if left == right:
            continue
        here, near, far = slice(left, right), rows[0, left:right], rows[1, left:right]
        address, past, first = streams[kind, 0, b], streams[kind, 1, b] + t, streams[kind, 2, b] + later
        reach(z[here], kind, furthest, shift[here])
        if kind == BOX:
            sums = carray(pointer(address), (past + 1, right - left), np.float64)
            start = max(min(first, past - 1), 0)
            place(shift[here], BOX, origin, start, past - 1, 0, channels, near, far, fraction[here])
            for c in range(right - left):
                x, _ = mean_of(sums, past, shift[left + c], near, far, fraction[here], c)
                read[left + c] = x * np.sqrt(min(shift[left + c], f32(BOX_SCALE)))
            continue
        buffer = carray(pointer(address), (past + 1, right - left), like.dtype)
        start = max(min(first, past), 0)
        # Who has no anchor reads its own row, times 0.
        place(shift[here], kind, origin, start, past, past, channels, near, far, fraction[here])
        for c in range(right - left):
            v = widen(buffer[np.uint32(near[c]), c])
            read[left + c] = v + fraction[left + c] * (widen(buffer[np.uint32(far[c]), c]) - v)
        if kind == ANCHORED:
            for c in range(right - left):
                if origin[c // channels] < 0:
                    read[left + c] = ZERO
    if gated:
        for c in range(width):
            read[c] *= sigmoid(f32(widen(gate[c])))
    for c in range(width):
        store(out, c, read[c])


@jit
def _append(values, spans, streams, channels, begin, end):
    """All tokens of sequences begin .. end."""
    row = np.empty(values.shape[2], values.dtype)
    for b in range(begin, end):
        for t in range(values.shape[1]):
            append_row(values[b, t], spans, streams, b, t, channels, row)


@jit
def _read(z, gate, origin, later, spans, streams, channels, furthest, gated, out, begin, end):
    """Tokens begin .. end of all sequences."""
    for number in range(begin, end):
        b, t = number // z.shape[1], number % z.shape[1]
        settings = spans, streams, b, t, later[b, t], channels, furthest, gated
        read_row(z[b, t], gate[b, t], origin[b, t], *settings, z[b, t], out[b, t])


def step(
    values: Float[Tensor, "B T D"],
    shift: Float[Tensor, "B T D"],
    gate: Float[Tensor, "B T D"] | None,
    origins: Sequence[Int[Tensor, "B T"]],
    streams: Int[np.ndarray, "3 3 B"],
    *,
    first: Int[Tensor, "B T"] | None = None,
    heads: int,
    near: int,
    boxes: int,
    max_shift: int | None,
) -> Float[Tensor, "B T D"]:
    """Append rows to the buffers of each sequence, and `starlm.ops.mix` at those rows, heads side by side.

    Args:
        values, shift, gate: of the new tokens, all of one of `starlm.ops.backends.CPU_DTYPES`.
        origins: for each anchored head the rows of its buffer, or -1.
        streams: of `now`, anchored and box heads: for each sequence the address of its buffer [S, heads of
            the kind, C], the rows that it has, with room for T more, and the first that the first of the new
            tokens may read. Buffers are in the dtype of `values`, those of box heads float64: prefix sums,
            at least one.
        first: as that of the new tokens rises; None if it does not.
        near, boxes: `now` and box heads; anchored ones stand between them.
        max_shift: clips shifts of `now` heads and windows of box heads.
    """
    batch, length, width = values.shape
    channels, out = width // heads, torch.empty(values.shape, dtype=values.dtype, device="cpu")
    v, z, g = (array(x) for x in (values, shift, values if gate is None else gate))
    anchored = np.empty((batch, length, len(origins)), np.int64)
    for head, rows in enumerate(origins):
        anchored[..., head] = rows.numpy()
    later = np.zeros((batch, length), np.int64) if first is None else index(first - first[:, :1])
    spans = 0, near * channels, (heads - boxes) * channels, width
    furthest = f32(np.inf if max_shift is None else max_shift)
    spread(lambda *some: _append(v, spans, streams, channels, *some), batch, values.numel())
    settings = anchored, later, spans, streams, channels, furthest, gate is not None, array(out)
    spread(lambda *some: _read(z, g, *settings, *some), batch * length, values.numel())
    return out
