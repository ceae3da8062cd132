"""Fused GPU kernels of `deform`: Triton, forward and backward.

Tensors are viewed as [B, S, D], D = H * C, with channels side by side in memory. A lane owns `EACH`
neighbouring channels, and neighbouring lanes own neighbouring ones: shifts are read and results written
several at once, what depends on the query only is shared, and of one row a warp reads one or two cache
lines. Channels whose shifts differ find the other rows in the L1 and L2 caches, where the neighbouring
queries have put them.

In the backward each lane walks `SPAN` queries in order, and what it adds to memory is what costs. So
gradients of the last four rows are summed up in registers, as are those of the first row that may be read,
which stands for all before it: near shifts cost one addition to memory per row, shifts beyond `first` two
per program. With an origin of its own a query may be anywhere; then the near row's gradient is kept in a
register until another row is the near one. The additions are atomic. With
`torch.use_deterministic_algorithms` one lane walks the whole sequence instead and adds alone, always in the
same order: no atomics, and less in parallel.

With TRITON_INTERPRET=1 in the environment Triton runs the same code on CPU tensors, slowly, for tests.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from starlm.errors import InputError

# Stands in for infinite shifts: exact in fp32, and `origin - FAR - 1` stays inside int32. So S must be less.
FAR = tl.constexpr(2**30)
# Of a program that reads: queries, lanes side by side, warps, and channels of each lane, where a head has a
# multiple of these. Many queries and few lanes find more of the rows in the L1 cache.
TIME, LANES, WARPS, EACH = 32, 16, 4, 4
# Of a program that scatters: queries and channels of each lane.
SPAN, SCATTER_EACH = 16, 2
INTERPRETED = knobs.runtime.interpret
# NVIDIA GPUs convert NaN in fp32 to 0; numpy, and they in fp64, to the least integer.
NAN_IS_ZERO = tl.constexpr(not INTERPRETED)


@triton.jit
def _bounds(first, past, batch, time, rows, length):
    """First and last row that a query may read, inside the tensor whatever `first` and `past` say."""
    last = time
    if past is not None:
        last += tl.minimum(tl.maximum(tl.load(past + batch), 0), rows - 1).to(tl.int32)
        last = tl.minimum(last, rows - 1)
    start = last * 0
    if first is not None:
        start = tl.minimum(tl.maximum(tl.load(first + batch * length + time), 0), last).to(tl.int32)
    return start, last


@triton.jit
def _origin(origin, batch, time, column, last, length, width, CHANNELS: tl.constexpr):
    """The row that shift 0 reads; -1 for none."""
    row = last
    if origin is not None:
        head = (batch * length + time) * (width // CHANNELS) + column // CHANNELS
        row = tl.minimum(tl.maximum(tl.load(origin + head), -1), FAR - 1).to(tl.int32)
    return row


@triton.jit
def _locate(shift, origin, start, last):
    """Rows to read (near, far) and weight of the far one."""
    # NaN stays NaN. Beyond FAR both rows are the same one, so the fraction is moot.
    if shift.dtype == tl.float64:
        # Which has no instruction for it.
        shift = tl.where(shift > FAR, 1.0 * FAR, tl.where(shift < -FAR, -1.0 * FAR, shift))
    else:
        shift = tl.clamp(shift, -1.0 * FAR, 1.0 * FAR, propagate_nan=tl.PropagateNan.ALL)
    whole = tl.floor(shift)
    fraction = shift - whole
    if not NAN_IS_ZERO or shift.dtype == tl.float64:
        whole = tl.where(whole == whole, whole, 0.0)
    row = origin - whole.to(tl.int32)
    near = tl.minimum(tl.maximum(row, start), last)
    far = tl.minimum(tl.maximum(row - 1, start), last)
    return near, far, fraction


@triton.jit
def _offset(row, stride, WIDE: tl.constexpr):
    """Of a row within its batch row; in 32 bits where all of them fit."""
    if WIDE:
        row = row.to(tl.int64)
    return row * stride


@triton.jit
def _add(pointers, amount, mask, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(pointers, amount, mask=mask, sem="relaxed")
    else:
        tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + amount, mask=mask)


@triton.jit
def _store(pointers, x, mask):
    # From fp64 to bfloat16 in two steps: not every GPU, nor Triton's interpreter, has one for it.
    if pointers.dtype.scalar.element_ty.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    tl.store(pointers, x, mask=mask)


@triton.jit
def _flush(target, stride, row, amount, inside, wanted, WIDE: tl.constexpr, ATOMIC: tl.constexpr):
    """Add what lanes have summed up of one row, with one wide instruction each, where it is not nothing."""
    some = tl.max((amount != 0).to(tl.int32), axis=1, keep_dims=True)
    mask = inside & (tl.where(wanted & (row >= 0), some, 0) > 0)
    _add(target + _offset(row, stride, WIDE), amount, mask, ATOMIC)


@triton.jit
def _collect(
    target,
    stride,
    near,
    far,
    d,
    fraction,
    top,
    inside,
    row0,
    row1,
    row2,
    row3,
    edge,
    WIDE: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Gradients of the window's rows, `top` first, and of the edge, for the next query, after this one's."""
    apart = far != near
    further = d * fraction
    nearer = d - further
    # Where both rows are one, it gets both shares as the near one.
    nearer = tl.where(apart, nearer, nearer + further)
    further = tl.where(apart, further, 0.0)
    row0 = tl.where(near == top, row0 + nearer, row0)
    row1 = tl.where(near == top, row1 + further, row1)
    row1 = tl.where(near == top - 1, row1 + nearer, row1)
    row2 = tl.where(near == top - 1, row2 + further, row2)
    row2 = tl.where(near == top - 2, row2 + nearer, row2)
    row3 = tl.where(near == top - 2, row3 + further, row3)
    row3 = tl.where(near == top - 3, row3 + nearer, row3)
    # Of one warp this is asked fast; and it saves much where no shift is far.
    if tl.min(tl.min(near, axis=1), axis=0) < top - 2:
        before = inside & (near < top - 3)
        beyond = inside & (near < top - 2) & (far >= 0)
        # Before the window both rows are one at the edge only.
        edge = tl.where(before & (far == near), edge + nearer, edge)
        _add(target + _offset(near, stride, WIDE), nearer, before & apart, ATOMIC)
        _add(target + _offset(far, stride, WIDE), further, beyond & apart, ATOMIC)
    _flush(target, stride, top - 3, row3, inside, True, WIDE, ATOMIC)
    return tl.zeros_like(row0), row0, row1, row2, edge


@triton.jit
def _collected(
    target,
    stride,
    top,
    inside,
    row1,
    row2,
    row3,
    edge,
    edge_row,
    WIDE: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Add to memory what `_collect` has left, `top` being the row behind the last query's own."""
    _flush(target, stride, top - 1, row1, inside, True, WIDE, ATOMIC)
    _flush(target, stride, top - 2, row2, inside, True, WIDE, ATOMIC)
    _flush(target, stride, top - 3, row3, inside, True, WIDE, ATOMIC)
    _flush(target, stride, edge_row, edge, inside, True, WIDE, ATOMIC)


@triton.jit
def _keep(
    target,
    stride,
    near,
    far,
    d,
    fraction,
    exists,
    kept,
    total,
    WIDE: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """The near row and its gradient; that of the row kept so far goes to memory, if it is another."""
    apart = exists & (far != near)
    further = d * fraction
    # Where both rows are one, it gets both shares as the near one.
    nearer = d - further + tl.where(far == near, further, 0.0)
    total += tl.where(apart & (far == kept), further, 0.0)
    _add(target + _offset(far, stride, WIDE), further, apart & (far != kept), ATOMIC)
    moves = exists & (near != kept)
    _add(target + _offset(kept, stride, WIDE), total, moves & (kept >= 0), ATOMIC)
    total = tl.where(moves, 0.0, total) + tl.where(exists, nearer, 0.0)
    return tl.where(moves, near, kept), total


@triton.jit(do_not_specialize=["rows", "length"])
def _forward(
    values,
    shift,
    origin,
    first,
    past,
    out,
    values_batch,
    values_row,
    shift_batch,
    shift_row,
    rows,
    length,
    width,
    CHANNELS: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
    TIME: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    # Channels run fastest, then time: programs that run together read neighbouring rows. So do lanes, which
    # is why both stand in one dimension: of two Triton 3.6 would give neighbouring lanes neighbouring rows.
    program, place = tl.program_id(0), tl.arange(0, TIME * LANES)[:, None]
    lanes = width // EACH
    blocks, spans = (lanes + LANES - 1) // LANES, (length + TIME - 1) // TIME
    lane = (program % blocks) * LANES + place % LANES
    time = (program // blocks % spans) * TIME + place // LANES
    batch = (program // blocks // spans).to(tl.int64)
    inside = lane < lanes
    # What lies beyond the end repeats the last query and lane, so that no load needs a mask. It also hides
    # from the compiler that lanes are contiguous: it would give each of them 8 channels, for the loads of
    # `shift`, and the gather would touch up to 8 times as many cache lines at once.
    time, lane = tl.minimum(time, length - 1), tl.minimum(lane, lanes - 1)
    column = lane * EACH + tl.arange(0, EACH)[None, :]
    start, last = _bounds(first, past, batch, time, rows, length)
    o = _origin(origin, batch, time, lane * EACH, last, length, width, CHANNELS)
    shift += batch * shift_batch
    values += batch * values_batch
    out += batch * length * width
    s = tl.load(shift + (_offset(time, shift_row, WIDE) + column)).to(EXACT)
    near, far, fraction = _locate(s, o, start, last)
    v = tl.load(values + (_offset(near, values_row, WIDE) + column)).to(EXACT)
    w = tl.load(values + (_offset(far, values_row, WIDE) + column)).to(EXACT)
    read = v + fraction * (w - v)
    if origin is not None:
        read = tl.where(o < 0, 0.0, read)
    _store(out + (_offset(time, width, WIDE) + column), read, inside)


@triton.jit(do_not_specialize=["rows", "length", "span"])
def _backward(
    grad,
    values,
    shift,
    origin,
    first,
    past,
    dvalues,
    dshift,
    grad_batch,
    grad_row,
    values_batch,
    values_row,
    shift_batch,
    shift_row,
    span,
    rows,
    length,
    width,
    CHANNELS: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
    ATOMIC: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    program = tl.program_id(0)
    lanes = width // EACH
    blocks, spans = (lanes + LANES - 1) // LANES, (length + span - 1) // span
    lane = (program % blocks) * LANES + tl.arange(0, LANES)[:, None]
    begin = (program // blocks % spans) * span
    batch = (program // blocks // spans).to(tl.int64)
    inside = lane < lanes
    lane = tl.minimum(lane, lanes - 1)
    column = lane * EACH + tl.arange(0, EACH)[None, :]

    grad += batch * grad_batch
    shift += batch * shift_batch
    dshift += batch * length * width
    values += batch * values_batch
    target = dvalues + batch * rows * width + column
    # With an origin: the row whose gradient is at hand, not in memory yet; -1 for none.
    kept = tl.full([LANES, EACH], -1, tl.int32)
    total = tl.full([LANES, EACH], 0.0, EXACT)
    # Without: gradients of the window's rows, the query's own first, and of the first row that may be read.
    row0, row1, row2, row3, edge = total, total, total, total, total
    edge_row, _ = _bounds(first, past, batch, begin, rows, length)
    top = begin
    if past is not None:
        top += tl.minimum(tl.maximum(tl.load(past + batch), 0), rows - 1).to(tl.int32)
    end = tl.minimum(begin + span, length)
    # Each query's inputs are loaded while the one before it is computed.
    s = tl.load(shift + (_offset(begin, shift_row, WIDE) + column))
    dy = tl.load(grad + (_offset(begin, grad_row, WIDE) + column))
    for step in range(end - begin):
        time = begin + step
        s, dy = s.to(EXACT), dy.to(EXACT)
        start, last = _bounds(first, past, batch, time, rows, length)
        o = _origin(origin, batch, time, lane * EACH, last, length, width, CHANNELS)
        near, far, fraction = _locate(s, o, start, last)
        v = tl.load(values + (_offset(near, values_row, WIDE) + column)).to(EXACT)
        w = tl.load(values + (_offset(far, values_row, WIDE) + column)).to(EXACT)
        then = tl.minimum(time + 1, end - 1)
        next_s = tl.load(shift + (_offset(then, shift_row, WIDE) + column))
        next_dy = tl.load(grad + (_offset(then, grad_row, WIDE) + column))
        ds = dy * (w - v)
        if origin is not None:
            ds = tl.where(o < 0, 0.0, ds)
        _store(dshift + (_offset(time, width, WIDE) + column), ds, inside)

        if origin is not None:
            exists = inside & (o >= 0)
            kept, total = _keep(target, width, near, far, dy, fraction, exists, kept, total, WIDE, ATOMIC)
        else:
            if first is not None:
                moved = start != edge_row
                _flush(target, width, edge_row, edge, inside, moved, WIDE, ATOMIC)
                edge, edge_row = tl.where(moved, 0.0, edge), start
            row0, row1, row2, row3, edge = _collect(
                target,
                width,
                near,
                far,
                dy,
                fraction,
                top,
                inside,
                row0,
                row1,
                row2,
                row3,
                edge,
                WIDE,
                ATOMIC,
            )
        top += 1
        s, dy = next_s, next_dy
    if origin is not None:
        _add(target + _offset(kept, width, WIDE), total, kept >= 0, ATOMIC)
    else:
        _collected(target, width, top, inside, row1, row2, row3, edge, edge_row, WIDE, ATOMIC)


def forward(
    values: Tensor, shift: Tensor, origin: Tensor | None, first: Tensor | None, past: Tensor | None
) -> Tensor:
    """`deform` for GPU tensors; see `starlm.ops.deform`.

    Raises:
        InputError: tensors that Triton cannot reach here, or too many rows.
    """
    _check(values)
    out = torch.empty(shift.shape, dtype=values.dtype, device=values.device)
    inputs = _lanes(values), _lanes(shift)
    arguments = *inputs, *_indices(origin, first, past), out, *_strides(*inputs)
    wide = _wide(*inputs, _lanes(out))
    options = {"TIME": TIME, "WIDE": wide, "EACH": EACH, "LANES": LANES}
    _launch(_forward, arguments, values, shift, TIME, WARPS, **options)
    return out


def backward(
    grad: Tensor,
    values: Tensor,
    shift: Tensor,
    origin: Tensor | None,
    first: Tensor | None,
    past: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `forward` with respect to values and shift, each in its input's dtype."""
    _check(values)
    deterministic = torch.are_deterministic_algorithms_enabled()
    span = max(shift.shape[1], 1) if deterministic else SPAN
    dvalues = torch.zeros(values.shape, dtype=_exact(values, shift), device=values.device)
    dshift = torch.empty(shift.shape, dtype=shift.dtype, device=shift.device)
    inputs = _lanes(grad), _lanes(values), _lanes(shift)
    arguments = *inputs, *_indices(origin, first, past), dvalues, dshift, *_strides(*inputs), span
    wide = _wide(*inputs, _lanes(dvalues), _lanes(dshift))
    # A program is one warp: see `_collect`.
    options = {"ATOMIC": not deterministic, "WIDE": wide, "LANES": 32}
    options |= {"EACH": _scatter_each(SCATTER_EACH, wide, deterministic)}
    _launch(_backward, arguments, values, shift, span, 1, **options)
    return dvalues.to(values.dtype), dshift


def _launch(
    kernel: Any,
    arguments: tuple,
    values: Tensor,
    shift: Tensor,
    queries: int,
    warps: int,
    *,
    LANES: int,
    EACH: int,
    **options: Any,
) -> None:
    """Run a kernel on all channels and queries, so many queries and warps to a program."""
    batch, length, heads, channels = shift.shape
    if not shift.numel():
        return
    width, each = heads * channels, _each(channels, EACH)
    # One dimension: the others end at 65535.
    grid = (batch * -(-length // queries) * -(-width // (LANES * each)),)
    sizes = values.shape[1], length, width
    exact = tl.float64 if _exact(values, shift) == torch.float64 else tl.float32
    options |= {"CHANNELS": channels, "EXACT": exact, "LANES": LANES, "EACH": each}
    # Without fused multiply-adds every result but a sum is the reference's to the last bit.
    options |= {"num_warps": warps, "enable_fp_fusion": False}
    with torch.cuda.device_of(values):
        kernel[grid](*arguments, *sizes, **options)


def _each(channels: int, most: int) -> int:
    """Channels of one lane, which must not be of two heads."""
    return math.gcd(channels, most)


def _scatter_each(each: int, wide: bool, deterministic: bool) -> int:
    """Channels of one lane that scatters.

    Triton may spread several over the lanes in one way for loads and in another for stores, which must not be
    without atomics; and with wide places version 3.6 fails to compile them.
    """
    return 1 if wide or deterministic else each


def _wide(*tensors: Tensor) -> bool:
    """Whether places within a batch row of one of these [B, S, D] need more than 32 bits."""
    return any((x.shape[1] - 1) * x.stride(1) + x.shape[2] > 2**31 for x in tensors)


def _check(values: Tensor) -> None:
    if values.device.type == "cpu" and not INTERPRETED:
        raise InputError(
            "backend='triton' needs GPU tensors; got cpu. Use backend='auto', or set TRITON_INTERPRET=1 in "
            "the environment before Python starts, to run its kernels on a CPU, slowly, for tests."
        )
    if values.shape[1] >= FAR.value:
        raise InputError(
            f"backend='triton' reads fewer than {FAR.value} rows; got values {tuple(values.shape)}. "
            "Use backend='reference'."
        )


def _exact(values: Tensor, shift: Tensor) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.promote_types(torch.promote_types(values.dtype, shift.dtype), torch.float32)


def _lanes(tensor: Tensor) -> Tensor:
    """The tensor as [B, S, D] with channels side by side; a copy only where they are not."""
    tensor = tensor.flatten(2)
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Elements from one batch row, and from one row, to the next."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


def _indices(*indices: Tensor | None) -> list[Tensor | None]:
    return [None if index is None else index.contiguous() for index in indices]
