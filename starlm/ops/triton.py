"""Fused GPU kernels of `deform`: Triton, forward and backward.

Tensors are viewed as [B, S, D], D = H * C, with channels side by side in memory, and neighbouring lanes own
neighbouring channels: of one row a warp reads one or two cache lines, and channels whose shifts differ find
the other rows in the L1 and L2 caches, where the neighbouring queries have put them.

In the backward each lane walks `TIME` queries in order and keeps the gradient of the near row in a register.
Where shifts change slowly, the far row of the next query is that very row; where they reach beyond `first`,
all rows are. So a query costs one addition to memory there, not two, or none. The additions are atomic. With
`torch.use_deterministic_algorithms` one lane walks the whole sequence instead and adds alone, always in the
same order: no atomics, and less in parallel.

With TRITON_INTERPRET=1 in the environment Triton runs the same code on CPU tensors, slowly, for tests.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from starlm.errors import InputError

# Stands in for infinite shifts: exact in fp32, and `origin - FAR - 1` stays inside int32. So S must be less.
FAR = tl.constexpr(2**30)
# Queries and channels of one program: a channel for each lane of 4 warps, and queries enough for their loads
# to hide each other's latency without running short of registers.
TIME, LANES, WARPS = 16, 128, 4
INTERPRETED = knobs.runtime.interpret


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
def _origin(origin, batch, time, column, last, length, width, channels):
    """The row that shift 0 reads; -1 for none."""
    row = last + column * 0
    if origin is not None:
        head = (batch * length + time) * (width // channels) + column // channels
        row = tl.minimum(tl.maximum(tl.load(origin + head), -1), FAR - 1).to(tl.int32)
    return row


@triton.jit
def _locate(shift, origin, start, last):
    """Rows to read (near, far) and weight of the far one."""
    whole = tl.floor(shift)
    reach = tl.minimum(tl.maximum(whole, -FAR), FAR)
    known = shift == shift
    # Beyond FAR both rows are the same one, so the fraction is moot; NaN must stay NaN.
    fraction = tl.where(reach == whole, shift - whole, tl.where(known, 0.0, shift))
    row = origin - tl.where(known, reach, 0.0).to(tl.int32)
    near = tl.minimum(tl.maximum(row, start), last)
    far = tl.minimum(tl.maximum(row - 1, start), last)
    return near, far, fraction


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
    channels,
    EXACT: tl.constexpr,
    TIME: tl.constexpr,
    LANES: tl.constexpr,
):
    # Channels run fastest, then time: programs that run together read neighbouring rows. So do lanes, which
    # is why both stand in one dimension: of two Triton 3.6 would give neighbouring lanes neighbouring rows.
    program, place = tl.program_id(0), tl.arange(0, TIME * LANES)
    blocks, spans = (width + LANES - 1) // LANES, (length + TIME - 1) // TIME
    column = (program % blocks) * LANES + place % LANES
    time = (program // blocks % spans) * TIME + place // LANES
    batch = (program // blocks // spans).to(tl.int64)
    inside = column < width
    # What lies beyond the end repeats the last query and channel, so that no load needs a mask. It also hides
    # from the compiler that channels are contiguous: it would give each lane 8 of them, for the loads of
    # `shift`, and the gather would touch up to 8 times as many cache lines at once.
    time, column = tl.minimum(time, length - 1), tl.minimum(column, width - 1)
    start, last = _bounds(first, past, batch, time, rows, length)
    o = _origin(origin, batch, time, column, last, length, width, channels)
    s = tl.load(shift + batch * shift_batch + time.to(tl.int64) * shift_row + column).to(EXACT)
    near, far, fraction = _locate(s, o, start, last)
    source = values + batch * values_batch + column
    v = tl.load(source + near.to(tl.int64) * values_row).to(EXACT)
    w = tl.load(source + far.to(tl.int64) * values_row).to(EXACT)
    read = tl.where(o < 0, 0.0, v + fraction * (w - v))
    _store(out + (batch * length + time) * width + column, read, inside)


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
    channels,
    EXACT: tl.constexpr,
    ATOMIC: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0)
    blocks, spans = (width + LANES - 1) // LANES, (length + span - 1) // span
    column = (program % blocks) * LANES + tl.arange(0, LANES)
    begin = (program // blocks % spans) * span
    batch = (program // blocks // spans).to(tl.int64)
    inside = column < width
    column = tl.minimum(column, width - 1)

    grad += batch * grad_batch
    shift += batch * shift_batch
    dshift += batch * length * width
    source = values + batch * values_batch + column
    target = dvalues + batch * rows * width + column
    # The row whose gradient is at hand, not in memory yet; -1 for none.
    kept = tl.full([LANES], -1, tl.int32)
    total = tl.full([LANES], 0.0, EXACT)
    for step in range(tl.minimum(span, length - begin)):
        time = begin + step
        row = time.to(tl.int64)
        start, last = _bounds(first, past, batch, time, rows, length)
        o = _origin(origin, batch, time, column, last, length, width, channels)
        exists = inside & (o >= 0)
        s = tl.load(shift + row * shift_row + column).to(EXACT)
        dy = tl.load(grad + row * grad_row + column).to(EXACT)
        near, far, fraction = _locate(s, o, start, last)
        v = tl.load(source + near.to(tl.int64) * values_row).to(EXACT)
        w = tl.load(source + far.to(tl.int64) * values_row).to(EXACT)
        _store(dshift + row * width + column, tl.where(o < 0, 0.0, dy * (w - v)), inside)

        further = dy * fraction
        # Where both rows are one, it gets both shares as the near one.
        nearer = dy - further + tl.where(far == near, further, 0.0)
        apart = exists & (far != near)
        total += tl.where(apart & (far == kept), further, 0.0)
        _add(target + far.to(tl.int64) * width, further, apart & (far != kept), ATOMIC)
        moves = exists & (near != kept)
        _add(target + kept.to(tl.int64) * width, total, moves & (kept >= 0), ATOMIC)
        total = tl.where(moves, 0.0, total) + tl.where(exists, nearer, 0.0)
        kept = tl.where(moves, near, kept)
    _add(target + kept.to(tl.int64) * width, total, kept >= 0, ATOMIC)


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
    _launch(_forward, arguments, values, shift, TIME, TIME=TIME)
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
    span = max(shift.shape[1], 1) if deterministic else TIME
    dvalues = torch.zeros(values.shape, dtype=_exact(values, shift), device=values.device)
    dshift = torch.empty(shift.shape, dtype=shift.dtype, device=shift.device)
    inputs = _lanes(grad), _lanes(values), _lanes(shift)
    arguments = *inputs, *_indices(origin, first, past), dvalues, dshift, *_strides(*inputs), span
    _launch(_backward, arguments, values, shift, span, ATOMIC=not deterministic)
    return dvalues.to(values.dtype), dshift


def _launch(
    kernel: Any, arguments: tuple, values: Tensor, shift: Tensor, queries: int, **options: Any
) -> None:
    """Run a kernel on all channels and queries, so many queries to a program."""
    batch, length, heads, channels = shift.shape
    if not shift.numel():
        return
    width = heads * channels
    # One dimension: the others end at 65535.
    grid = (batch * -(-length // queries) * -(-width // LANES),)
    sizes = values.shape[1], length, width, channels
    exact = tl.float64 if _exact(values, shift) == torch.float64 else tl.float32
    # Without fused multiply-adds every result but a sum is the reference's to the last bit.
    options |= {"EXACT": exact, "LANES": LANES, "num_warps": WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(values):
        kernel[grid](*arguments, *sizes, **options)


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
