"""Fused CPU kernels of `deform`: numba, forward and backward, all cores, no atomics.

Tensors are viewed as [B, T, H, C] numpy arrays; bfloat16 travels as its uint16 bits and is widened one
element at a time. The forward splits the queries over threads; the backward splits batch and heads, so
that every element of the gradient has one owner that adds to it in order of t: the result does not
depend on the number of threads and is always deterministic.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

# Below this many elements a thread hand-over costs more than the work.
SERIAL_ELEMENTS = 1 << 15
# Stands in for infinite shifts: beyond any row number below 2^30, exact in fp32, and `origin - FAR - 1`
# stays inside int32.
FAR = 2.0**30

_jit: Any = numba.njit(nogil=True, cache=True, error_model="numpy")
_i32 = np.int32


def _widen(x):  # pragma: no cover - replaced by the overloads below when compiled
    raise AssertionError


def _store(out, index, x):  # pragma: no cover - replaced by the overloads below when compiled
    raise AssertionError


@overload(_widen, inline="always")
def _widen_overload(x):
    if x == numba.types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@overload(_store, inline="always")
def _store_overload(out, index, x):
    if out.dtype == numba.types.uint16:

        def store_bf16(out, index, x):
            if x == x:
                bits = np.float32(x).view(np.uint32)
                # Round to nearest, ties to even, on the upper 16 bits.
                even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
                out[index] = np.uint16(np.uint32(bits + even) >> np.uint32(16))
            else:
                out[index] = np.uint16(0x7FC0)

        return store_bf16

    def store_plain(out, index, x):
        out[index] = x

    return store_plain


@_jit
def _locate(shift, origin, start, last, near, far, fraction):
    """Rows to read and weight of the further one, for the shifts of one head.

    Apart from the reads, so that this loop vectorises and the reads are all that is left of the other.
    """
    for c in range(shift.size):
        x = shift[c]
        whole = np.floor(x)
        reach = min(max(whole, -FAR), FAR)
        # Beyond FAR both rows are the same one, so the fraction is moot; NaN must stay NaN.
        fraction[c] = x - whole if reach == whole else (x if x != x else 0)
        row = _i32(origin) - _i32(reach if x == x else 0)
        near[c] = min(max(_i32(row), start), last)
        far[c] = min(max(_i32(row - _i32(1)), start), last)


@_jit
def _forward(values, shift, origin, first, past, out, row0, row1):
    """Fill queries row0 .. row1 of the B * T in `out`."""
    _, length, heads, channels = shift.shape
    near, far = np.empty(channels, np.int32), np.empty(channels, np.int32)
    fraction = np.empty(channels, shift.dtype)
    for row in range(row0, row1):
        b, t = row // length, row % length
        last = _i32(t if past is None else past[b] + t)
        start = _i32(0 if first is None else first[b, t])
        for h in range(heads):
            o = last if origin is None else _i32(origin[b, t, h])
            source, target = values[b, :, h], out[b, t, h]
            if o < 0:
                for c in range(channels):
                    _store(target, c, np.float32(0))
                continue
            _locate(shift[b, t, h], o, start, last, near, far, fraction)
            for c in range(channels):
                v = _widen(source[np.uint32(near[c]), c])
                _store(target, c, v + fraction[c] * (_widen(source[np.uint32(far[c]), c]) - v))


@_jit
def _backward(grad, values, shift, origin, first, past, dvalues, dshift, groups, part0, part1):
    """Add to `dvalues` and fill `dshift` for parts part0 .. part1 of the B * groups (batch, heads) pairs."""
    _, length, heads, channels = shift.shape
    near, far = np.empty(channels, np.int32), np.empty(channels, np.int32)
    fraction = np.empty(channels, shift.dtype)
    for part in range(part0, part1):
        b, group = part // groups, part % groups
        for t in range(length):
            last = _i32(t if past is None else past[b] + t)
            start = _i32(0 if first is None else first[b, t])
            for h in range(heads * group // groups, heads * (group + 1) // groups):
                o = last if origin is None else _i32(origin[b, t, h])
                g, ds = grad[b, t, h], dshift[b, t, h]
                source, dsource = values[b, :, h], dvalues[b, :, h]
                if o < 0:
                    for c in range(channels):
                        ds[c] = 0
                    continue
                _locate(shift[b, t, h], o, start, last, near, far, fraction)
                for c in range(channels):
                    i, j = np.uint32(near[c]), np.uint32(far[c])
                    dy = _widen(g[c])
                    ds[c] = dy * (_widen(source[j, c]) - _widen(source[i, c]))
                    dsource[i, c] += dy * (1 - fraction[c])
                    dsource[j, c] += dy * fraction[c]


def forward(
    values: Tensor, shift: Tensor, origin: Tensor | None, first: Tensor | None, past: Tensor | None
) -> Tensor:
    """`deform` for CPU tensors; see `starlm.ops.deform`."""
    exact, bits = _dtypes(values, shift)
    out = torch.empty(shift.shape, dtype=bits)
    arrays = [
        _array(values, bits),
        _array(shift, exact),
        *map(_index, (origin, first, past)),
        _array(out, bits),
    ]
    batch, length = shift.shape[:2]
    _spread(lambda begin, end: _forward(*arrays, begin, end), batch * length, shift.numel())
    return out.to(values.dtype)


def backward(
    grad: Tensor,
    values: Tensor,
    shift: Tensor,
    origin: Tensor | None,
    first: Tensor | None,
    past: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `forward` with respect to values and shift, each in its input's dtype."""
    exact, bits = _dtypes(values, shift)
    dvalues = torch.zeros(values.shape, dtype=exact)
    dshift = torch.empty(shift.shape, dtype=exact)
    arrays = [_array(grad, bits), _array(values, bits), _array(shift, exact)]
    arrays += [*map(_index, (origin, first, past)), _array(dvalues, exact), _array(dshift, exact)]
    batch, _, heads, _ = shift.shape
    # Whole batch rows where there are enough of them: neighbouring heads share cache lines and pages.
    groups = max(1, min(heads, -(-torch.get_num_threads() // max(batch, 1))))
    _spread(lambda begin, end: _backward(*arrays, groups, begin, end), batch * groups, shift.numel())
    return dvalues.to(values.dtype), dshift.to(shift.dtype)


def _dtypes(values: Tensor, shift: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the arithmetic, and the one in which the kernels read values."""
    exact = torch.promote_types(torch.promote_types(values.dtype, shift.dtype), torch.float32)
    bfloat = values.dtype == torch.bfloat16 and exact == torch.float32
    return exact, torch.bfloat16 if bfloat else exact


def _array(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    tensor = tensor.detach().to(dtype).contiguous()
    return (tensor.view(torch.uint16) if dtype == torch.bfloat16 else tensor).numpy()


def _index(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.to(torch.int64).contiguous().numpy()


def _spread(work: Callable[[int, int], None], count: int, elements: int) -> None:
    """Run work(begin, end) over 0 .. count, in equal shares on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), count) if elements >= SERIAL_ELEMENTS else 1
    if threads <= 1:
        work(0, count)
        return
    ends = [count * i // threads for i in range(threads + 1)]
    shares = [_pool().submit(work, *share) for share in pairwise(ends[1:])]
    try:
        work(ends[0], ends[1])
    finally:
        wait(shares)
    for share in shares:
        share.result()


_POOL: ThreadPoolExecutor | None = None


def _pool() -> ThreadPoolExecutor:
    global _POOL
    if _POOL is None:
        _POOL = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="starlm-deform")
    return _POOL


def _forget_pool() -> None:
    """Threads do not survive a fork; the child makes its own."""
    global _POOL
    _POOL = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
