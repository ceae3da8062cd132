"""A Deformer layer between its projections, for one new token of each of many sequences: one call per layer.

Decoding spends little arithmetic here, but composed it is some thirty small calls per layer and token. The
definition is that of `starlm.ops.mix`; the rows that are read stand in the buffers of the decode state.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from starlm.ops.cpu_base import array, pointer, spread, store, widen
from starlm.ops.cpu_math import ONE, ZERO, f32, jit, sigmoid
from starlm.ops.cpu_mix import ANCHORED, BOX, BOX_SCALE, EPS, mean_of, place, reach

DTYPES = (torch.float32, torch.bfloat16)


@jit
def _normalise(values, channels, row):
    """RMSNorm of each head, rounded to what the buffers hold."""
    for begin in range(0, values.size, channels):
        total = ZERO
        for c in range(begin, begin + channels):
            x = f32(widen(values[c]))
            total += x * x
        scale = ONE / np.sqrt(total / f32(channels) + EPS)
        for c in range(begin, begin + channels):
            store(row, c, f32(widen(values[c])) * scale)


@jit
def _append_sums(row, buffer, past):
    for c in range(row.size):
        buffer[past, c] = buffer[past - 1, c] + widen(row[c])


@jit
def read_row(values, z, gate, origin, spans, streams, b, channels, furthest, gated, like, out):
    """One sequence, all [D] but origin [A]; rows are as `like`, places as `_step` has them."""
    width = values.size
    row, rows = np.empty(width, like.dtype), np.empty((2, width), np.int32)
    scratch = np.empty((3, width), np.float32)
    shift, fraction, read = scratch[0], scratch[1], scratch[2]
    _normalise(values, channels, row)
    for kind in range(3):
        left, right = spans[kind], spans[kind + 1]
        if left == right:
            continue
        here, far = slice(left, right), rows[:, left:right]
        address, past, first = streams[kind, 0, b], streams[kind, 1, b], streams[kind, 2, b]
        reach(z[here], kind, furthest, shift[here])
        if kind == BOX:
            sums = carray(pointer(address), (past + 1, right - left), np.float64)
            _append_sums(row[here], sums, past)
            start = max(min(first, past - 1), 0)
            place(shift[here], BOX, origin, start, past - 1, 0, channels, far, fraction[here])
            for c in range(right - left):
                x, _ = mean_of(sums, past, shift[left + c], far, fraction[here], c)
                read[left + c] = x * np.sqrt(min(shift[left + c], f32(BOX_SCALE)))
            continue
        buffer = carray(pointer(address), (past + 1, right - left), like.dtype)
        for c in range(right - left):
            buffer[past, c] = row[left + c]
        start = max(min(first, past), 0)
        # Who has no anchor reads its own row, times 0.
        place(shift[here], kind, origin, start, past, past, channels, far, fraction[here])
        for c in range(right - left):
            v = widen(buffer[np.uint32(far[0, c]), c])
            read[left + c] = v + fraction[left + c] * (widen(buffer[np.uint32(far[1, c]), c]) - v)
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
def _step(values, z, gate, origin, spans, streams, channels, furthest, gated, out, begin, end):
    """Sequences begin .. end; `streams` [3, 3, B] has address, past and first of the kinds' buffers."""
    for b in range(begin, end):
        row = values[b]
        read_row(row, z[b], gate[b], origin[b], spans, streams, b, channels, furthest, gated, row, out[b])


def step(
    values: Float[Tensor, "B 1 D"],
    shift: Float[Tensor, "B 1 D"],
    gate: Float[Tensor, "B 1 D"] | None,
    origins: Sequence[Int[Tensor, "B 1"]],
    streams: Int[np.ndarray, "3 3 B"],
    *,
    heads: int,
    near: int,
    boxes: int,
    max_shift: int | None,
) -> Float[Tensor, "B 1 D"]:
    """Append a row to the buffers of each sequence, and `starlm.ops.mix` at that row, heads side by side.

    Args:
        values, shift, gate: of the new token, all of one of DTYPES.
        origins: for each anchored head the row of its buffer, or -1.
        streams: of `now`, anchored and box heads: for each sequence the address of its buffer [S, heads of
            the kind, C], the rows that it has, with room for one more, and the first that may be read.
            Buffers are in the dtype of `values`, those of box heads float64: prefix sums, at least one.
        near, boxes: `now` and box heads; anchored ones stand between them.
        max_shift: clips shifts of `now` heads and windows of box heads.
    """
    batch, channels = len(values), values.shape[-1] // heads
    out = torch.empty(values.shape, dtype=values.dtype)
    floats = [array(x)[:, 0] for x in (values, shift, values if gate is None else gate)]
    anchored = np.empty((batch, len(origins)), np.int64)
    for head, rows in enumerate(origins):
        anchored[:, head] = rows.numpy()[:, 0]
    spans = np.array([0, near, heads - boxes, heads]) * channels
    furthest = f32(np.inf if max_shift is None else max_shift)
    settings = spans, streams, channels, furthest, gate is not None
    target = array(out)[:, 0]
    spread(lambda begin, end: _step(*floats, anchored, *settings, target, begin, end), batch, values.numel())
    return out
