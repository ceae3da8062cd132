"""Fused CPU kernels of `deform`: numba, forward and backward, all cores, no atomics.

Tensors are viewed as [B, T, H * C] numpy arrays. The forward splits the queries over threads; the backward
splits batch and heads, so that every element of the gradient has one owner that adds to it in order of t:
the result does not depend on the number of threads and is always deterministic.
"""

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from starlm.errors import InputError
from starlm.ops.cpu_base import array, index, jit, spread, store, widen

# Stands in for infinite shifts: beyond any row number below 2^30, exact in fp32, and `origin - FAR - 1`
# stays inside int32.
FAR = np.float32(2.0**30)
_FURTHEST = 2**30 - 1
# Elements of at most a cache line, and how many rows ahead `_warm` touches.
LINE, AHEAD = 16, 4

_i32 = np.int32


@jit
def locate(shift, origin, start, last, near, far, fraction):
    """Rows to read and weight of the far one, for the shifts of one head.

    Apart from the reads, so that this loop vectorises and the reads are all that is left of the other.
    `origin` and `start` are int64 that somebody else has made: whatever they say, the rows are rows.
    """
    place, start = _i32(min(origin, _FURTHEST)), _i32(min(max(start, 0), last))
    for c in range(shift.size):
        x = widen(shift[c])
        whole = np.floor(x)
        reach = min(max(whole, -FAR), FAR)
        # Beyond FAR both rows are the same one, so the fraction is moot; NaN must stay NaN.
        fraction[c] = x - whole if reach == whole else (x if x != x else 0)
        row = place - _i32(reach if x == x else 0)
        near[c] = min(max(_i32(row), start), last)
        far[c] = min(max(_i32(row - _i32(1)), start), last)


@jit
def _warm(source, row):
    """Touch each cache line of a row a few rows before it is read.

    Far shifts read a row's lines in no order, which no hardware prefetcher follows; in order, and once, they
    come at the speed of memory. The result is only there so that the compiler does not leave the reads out.
    """
    seen = source[row, 0]
    for c in range(0, source.shape[1], LINE):
        seen = max(seen, source[row, c])
    return seen


def _blend(source, near, far, fraction, left, out):
    """Fill `out` with what the rows near and far hold, channel by channel; `fraction` is used up."""
    raise AssertionError("only compiled code calls this")


@overload(_blend)
def _blend_overload(source, near, far, fraction, left, out):
    def blend(source, near, far, fraction, left, out):
        for c in range(out.size):
            i, j, column = np.uint32(near[c]), np.uint32(far[c]), np.uint32(left + c)
            v = widen(source[i, column])
            out[c] = v + fraction[c] * (widen(source[j, column]) - v)

    def blend_bf16(source, near, far, fraction, left, out):
        for c in range(out.size):
            i, j, column = np.uint32(near[c]), np.uint32(far[c]), np.uint32(left + c)
            v = widen(source[i, column])
            fraction[c] = v + fraction[c] * (widen(source[j, column]) - v)
        # Rounding pays a loop of its own, which vectorises; without rounding that would be slower.
        for c in range(out.size):
            store(out, c, fraction[c])

    return blend_bf16 if out.dtype == numba.types.uint16 else blend


@jit
def _forward(values, shift, heads, origin, first, past, out, near, far, fraction, query0, query1):
    """Fill queries query0 .. query1 of the B * T in `out`; `near`, `far` and `fraction` are scratch."""
    _, length, width = shift.shape
    channels = width // heads
    seen = values[0, 0, 0]
    for query in range(query0, query1):
        b, t = query // length, query % length
        last = _i32(past[b] + t)
        start = first[b, t]
        source = values[b]
        seen = max(seen, _warm(source, min(last + AHEAD, source.shape[0] - 1)))
        for h in range(heads):
            o = np.int64(last) if origin is None else origin[b, t, h]
            left, right = h * channels, (h + 1) * channels
            target = out[b, t, left:right]
            if o < 0:
                for c in range(channels):
                    store(target, c, np.float32(0))
                continue
            locate(shift[b, t, left:right], o, start, last, near, far, fraction)
            _blend(source, near, far, fraction, left, target)
    return seen


@jit
def _backward(
    grad, values, shift, heads, origin, first, past, dvalues, dshift, near, far, fraction, groups, begin, end
):
    """Add to `dvalues` and fill `dshift` for parts begin .. end of the B * groups (batch, heads) pairs."""
    _, length, width = shift.shape
    channels = width // heads
    seen = values[0, 0, 0]
    for part in range(begin, end):
        b, group = part // groups, part % groups
        source, dsource = values[b], dvalues[b]
        for t in range(length):
            last = _i32(past[b] + t)
            start = first[b, t]
            seen = max(seen, _warm(source, min(last + AHEAD, source.shape[0] - 1)))
            for h in range(heads * group // groups, heads * (group + 1) // groups):
                o = np.int64(last) if origin is None else origin[b, t, h]
                left, right = h * channels, (h + 1) * channels
                g, ds = grad[b, t, left:right], dshift[b, t, left:right]
                if o < 0:
                    for c in range(channels):
                        store(ds, c, np.float32(0))
                    continue
                locate(shift[b, t, left:right], o, start, last, near, far, fraction)
                for c in range(channels):
                    i, j, column = np.uint32(near[c]), np.uint32(far[c]), np.uint32(left + c)
                    dy = widen(g[c])
                    store(ds, c, dy * (widen(source[j, column]) - widen(source[i, column])))
                    further = dy * fraction[c]
                    dsource[i, column] += dy - further
                    dsource[j, column] += further
    return seen


def forward(
    values: Tensor, shift: Tensor, origin: Tensor | None, first: Tensor | None, past: Tensor | None
) -> Tensor:
    """`deform` for CPU tensors; see `starlm.ops.deform`.

    Raises:
        InputError: too many rows, or `past` beyond them: the kernels would read memory of others.
    """
    _check(values, shift, past)
    exact = _exact(values, shift)
    out = torch.empty(shift.shape, dtype=_kept(values, exact), device="cpu")
    heads = _heads(shift, origin, 1)
    arrays = [rows_of(values, exact), rows_of(shift, exact), heads]
    arrays += [*_indices(shift, origin, first, past), rows_of(out, exact)]

    def work(begin: int, end: int) -> None:
        _forward(*arrays, *_scratch(shift, heads, exact), begin, end)

    batch, length = shift.shape[:2]
    spread(work, batch * length, shift.numel())
    return out.to(values.dtype)


def _check(values: Tensor, shift: Tensor, past: Tensor | None) -> None:
    rows, length = values.shape[1], shift.shape[1]
    if rows > _FURTHEST:
        raise InputError(
            f"backend='cpu' reads up to {_FURTHEST} rows; got values {tuple(values.shape)}. "
            "Use backend='reference'."
        )
    if past is not None and past.numel() and not 0 <= past.min() <= past.max() <= rows - length:
        raise InputError(
            f"deform needs 0 <= past <= S - T = {rows - length}, so that every query has its own row; got "
            f"past between {past.min()} and {past.max()}."
        )


def backward(
    grad: Tensor,
    values: Tensor,
    shift: Tensor,
    origin: Tensor | None,
    first: Tensor | None,
    past: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `forward` with respect to values and shift, each in its input's dtype."""
    exact = _exact(values, shift)
    dvalues = torch.zeros(values.shape, dtype=exact, device="cpu")
    dshift = torch.empty(shift.shape, dtype=_kept(shift, exact), device="cpu")
    batch, _, heads, _ = shift.shape
    # Whole batch rows where there are enough of them: neighbouring heads share cache lines and pages.
    groups = max(1, min(heads, -(-torch.get_num_threads() // max(batch, 1))))
    heads = _heads(shift, origin, groups)
    arrays = [rows_of(grad.to(values.dtype), exact), rows_of(values, exact), rows_of(shift, exact), heads]
    arrays += [*_indices(shift, origin, first, past), rows_of(dvalues, exact), rows_of(dshift, exact)]

    def work(begin: int, end: int) -> None:
        _backward(*arrays, *_scratch(shift, heads, exact), groups, begin, end)

    spread(work, batch * groups, shift.numel())
    return dvalues.to(values.dtype), dshift.to(shift.dtype)


def _heads(shift: Tensor, origin: Tensor | None, groups: int) -> int:
    """Heads for the kernels. Only origins tell heads apart; without them, few wide ones have long loops."""
    heads, channels = shift.shape[2:]
    return groups if origin is None and heads * channels % groups == 0 else max(heads, 1)


def _exact(values: Tensor, shift: Tensor) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.promote_types(torch.promote_types(values.dtype, shift.dtype), torch.float32)


def _kept(tensor: Tensor, exact: torch.dtype) -> torch.dtype:
    """The dtype in which the kernels hold a tensor: bfloat16 stays what it is in fp32 arithmetic."""
    return torch.bfloat16 if tensor.dtype == torch.bfloat16 and exact == torch.float32 else exact


def rows_of(tensor: Tensor, exact: torch.dtype) -> np.ndarray:
    """The tensor as [B, S, H * C]; bfloat16 as its bits."""
    return array(tensor.detach().to(_kept(tensor, exact)).flatten(2))


def _scratch(shift: Tensor, heads: int, exact: torch.dtype) -> tuple[np.ndarray, ...]:
    """Room for the rows to read, near and far, and the weights of one head."""
    channels = shift.shape[2] * shift.shape[3] // heads
    weight = np.float64 if exact == torch.float64 else np.float32
    return tuple(np.empty(channels, dtype) for dtype in (np.int32, np.int32, weight))


def _indices(
    shift: Tensor, origin: Tensor | None, first: Tensor | None, past: Tensor | None
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """`origin`, `first` and `past` as int64 arrays; the latter two filled in, so that kernels are fewer."""
    batch, length = shift.shape[:2]
    return (
        None if origin is None else index(origin),
        np.zeros((batch, length), np.int64) if first is None else index(first),
        np.zeros(batch, np.int64) if past is None else index(past),
    )
