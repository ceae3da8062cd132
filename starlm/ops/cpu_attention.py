"""Softmax attention of one head of one new token to the rows that a decode state has of its sequence."""

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from starlm.ops.constants import EPS
from starlm.ops.cpu_base import pointer, store, widen
from starlm.ops.cpu_math import ONE, ZERO, exp, f32, jit


@jit
def _turned(x, turn, scale, out):
    """RMSNorm of a head, scaled; pairs (c, c + C/2) are turned, with cosines and sines from `turn`."""
    total = ZERO
    for c in range(x.size):
        total += x[c] * x[c]
    scale = scale / np.sqrt(total / f32(x.size) + f32(EPS))
    half = turn.shape[1]
    for c in range(half):
        a, b = x[c] * scale, x[c + half] * scale
        out[c], out[c + half] = a * turn[0, c] + b * turn[1, c], b * turn[0, c] - a * turn[1, c]
    if not half:
        for c in range(x.size):
            out[c] = x[c] * scale


@jit
def attend(query, key, value, turn, places, window, b, left, width, like, out):
    """Append a row for head channels left .. left + C, and attend to it and those before.

    Args:
        query, key, value: [C], fp32, as projected.
        turn: [2, C / 2] or [2, 0] for no positions.
        places: [3, 3, B]: of keys, and of values, the address of the buffer [S, width] in the dtype of
            `like`, its rows, and the first that may be read.
        window: rows that are seen, the new one among them; 0 is all.
        out: [C].
    """
    channels, past = query.size, places[0, 1, b]
    keys = carray(pointer(places[0, 0, b]), (past + 1, width), like.dtype)
    values = carray(pointer(places[1, 0, b]), (past + 1, width), like.dtype)
    row = np.empty(channels, np.float32)
    _turned(key, turn, ONE, row)
    for c in range(channels):
        store(keys[past], left + c, row[c])
        store(values[past], left + c, value[c])
    _turned(query, turn, ONE / np.sqrt(f32(channels)), row)
    begin = max(places[0, 2, b], 0)
    if window:
        begin = max(begin, past + 1 - window)
    begin = min(begin, past)
    weights, highest = np.empty(past + 1 - begin, np.float32), f32(-np.inf)
    for s in range(weights.size):
        total, there = ZERO, keys[begin + s, left : left + channels]
        for c in range(channels):
            total += row[c] * f32(widen(there[c]))
        weights[s] = total
        highest = max(highest, total)
    total = ZERO
    for s in range(weights.size):
        weights[s] = exp(weights[s] - highest)
        total += weights[s]
    for c in range(channels):
        row[c] = ZERO
    for s in range(weights.size):
        weight, there = weights[s], values[begin + s, left : left + channels]
        for c in range(channels):
            row[c] += weight * f32(widen(there[c]))
    for c in range(channels):
        out[c] = row[c] / total
