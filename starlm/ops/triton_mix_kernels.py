"""The kernels of `starlm.ops.triton_mix`, which says what they are for.

Reads and scatters have a channel for each lane, as in `starlm.ops.triton`, which says why and how gradients
are added; what needs whole heads or neighbouring rows works on tiles.
"""

import triton
import triton.language as tl

from starlm.ops.triton import _add, _bounds, _locate, _origin, _store

# Kinds of heads, as the kernels know them.
NOW, ANCHORED, BOX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# RMSNorm's epsilon, and how far a box head's mean is scaled up: see `starlm.ops.mix`.
EPS, BOX_SCALE = tl.constexpr(1e-6), tl.constexpr(16.0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _place(z, origin, start, last, furthest, KIND: tl.constexpr):
    """What the shift projection says, in tokens; rows (near, far) that it reads, and weight of the far one.

    The rows of a box head are places between rows: its sums are those before each.
    """
    # No minimum and maximum of what may be NaN: it must stay NaN.
    if KIND == ANCHORED:
        reach = z
        near, far, fraction = _locate(reach, origin, start, last)
    elif KIND == NOW:
        reach = tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))
        reach = tl.where(reach > furthest, furthest, reach)
        near, far, fraction = _locate(reach, last, start, last)
    else:
        reach = tl.exp(0.5 * z)
        reach = tl.where(reach > furthest, furthest, reach)
        reach = tl.where(reach < 1.0, 1.0, reach)
        # A window is clipped to what there is.
        most = (last + 1 - start).to(tl.float32)
        reach = tl.where(reach > most, most, reach)
        near, far, fraction = _locate(reach, last + 1, start, last + 1)
    return reach, near, far, fraction


@triton.jit
def _row(source, scale, row, source_row, scale_row, KIND: tl.constexpr):
    """A row of rms(values), or, for a box head, the sum of those before it."""
    row = row.to(tl.int64)
    if KIND == BOX:
        x = tl.load(source + (row - 1) * source_row, mask=row > 0, other=0.0)
    else:
        x = tl.load(source + row * source_row).to(tl.float32) * tl.load(scale + row * scale_row)
    return x


@triton.jit
def _read(source, scale, reach, near, far, fraction, last, source_row, scale_row, KIND: tl.constexpr):
    """What is read, and its derivative with respect to `reach`."""
    v = _row(source, scale, near, source_row, scale_row, KIND)
    # Where both are one row, a fused multiply-add would leave what rounding v had cut off.
    edge = tl.where(far == near, 0.0, _row(source, scale, far, source_row, scale_row, KIND) - v)
    read = v + fraction * edge
    if KIND == BOX:
        size = tl.sqrt(tl.minimum(reach, BOX_SCALE))
        own = tl.load(source + last.to(tl.int64) * source_row)
        mean = (own - read).to(tl.float32) / reach
        # Without gradient through the size.
        edge = -(edge.to(tl.float32) + mean) / reach * size
        read = mean * size
    return read, edge


@triton.jit(do_not_specialize=["length"])
def _forward(
    source,
    scale,
    shift,
    gate,
    origin,
    first,
    out,
    source_batch,
    source_row,
    scale_batch,
    scale_row,
    shift_batch,
    shift_row,
    gate_batch,
    gate_row,
    out_batch,
    out_row,
    length,
    width,
    furthest,
    CHANNELS: tl.constexpr,
    KIND: tl.constexpr,
    TIME: tl.constexpr,
    LANES: tl.constexpr,
):
    # In this order, in one dimension, and with what lies beyond the end repeated: see `starlm.ops.triton`.
    program, place = tl.program_id(0), tl.arange(0, TIME * LANES)
    blocks, spans = (width + LANES - 1) // LANES, (length + TIME - 1) // TIME
    column = (program % blocks) * LANES + place % LANES
    time = (program // blocks % spans) * TIME + place // LANES
    batch = (program // blocks // spans).to(tl.int64)
    inside = column < width
    time, column = tl.minimum(time, length - 1), tl.minimum(column, width - 1)
    row = time.to(tl.int64)
    source += batch * source_batch + column
    if KIND != BOX:
        scale += batch * scale_batch + column // CHANNELS

    start, last = _bounds(first, None, batch, time, length, length)
    o = _origin(origin, batch, time, column, last, length, width, CHANNELS)
    z = tl.load(shift + batch * shift_batch + row * shift_row + column).to(tl.float32)
    reach, near, far, fraction = _place(z, o, start, last, furthest, KIND)
    read, _ = _read(source, scale, reach, near, far, fraction, last, source_row, scale_row, KIND)
    if gate is not None:
        read *= _sigmoid(tl.load(gate + batch * gate_batch + row * gate_row + column).to(tl.float32))
    if KIND == ANCHORED:
        read = tl.where(o < 0, 0.0, read)
    _store(out + batch * out_batch + row * out_row + column, read, inside)


@triton.jit(do_not_specialize=["length", "span"])
def _backward(
    grad,
    source,
    scale,
    shift,
    gate,
    origin,
    first,
    dread,
    dshift,
    dgate,
    grad_batch,
    grad_row,
    source_batch,
    source_row,
    scale_batch,
    scale_row,
    shift_batch,
    shift_row,
    gate_batch,
    gate_row,
    out_batch,
    out_row,
    span,
    length,
    width,
    furthest,
    CHANNELS: tl.constexpr,
    KIND: tl.constexpr,
    ATOMIC: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gradients of shift and gate; those of rms(values), or of the prefix sums, are added to `dread`."""
    program = tl.program_id(0)
    blocks, spans = (width + LANES - 1) // LANES, (length + span - 1) // span
    column = (program % blocks) * LANES + tl.arange(0, LANES)
    begin = (program // blocks % spans) * span
    batch = (program // blocks // spans).to(tl.int64)
    inside = column < width
    column = tl.minimum(column, width - 1)

    grad += batch * grad_batch + column
    shift += batch * shift_batch + column
    dshift += batch * out_batch + column
    source += batch * source_batch + column
    target = dread + batch * length * width + column
    if KIND != BOX:
        scale += batch * scale_batch + column // CHANNELS
    if gate is not None:
        gate += batch * gate_batch + column
        dgate += batch * out_batch + column
    exact = dread.dtype.element_ty
    # The row whose gradient is at hand, not in memory yet; -1 for none.
    kept = tl.full([LANES], -1, tl.int32)
    total = tl.full([LANES], 0.0, exact)
    for step in range(tl.minimum(span, length - begin)):
        time = begin + step
        row = time.to(tl.int64)
        start, last = _bounds(first, None, batch, time, length, length)
        o = _origin(origin, batch, time, column, last, length, width, CHANNELS)
        z = tl.load(shift + row * shift_row).to(tl.float32)
        dy = tl.load(grad + row * grad_row).to(tl.float32)
        reach, near, far, fraction = _place(z, o, start, last, furthest, KIND)
        read, slope = _read(source, scale, reach, near, far, fraction, last, source_row, scale_row, KIND)
        exists = inside & (o >= 0)

        d = dy
        if gate is not None:
            s = _sigmoid(tl.load(gate + row * gate_row).to(tl.float32))
            d = dy * s
            dg = tl.where(o < 0, 0.0, d * read * (1.0 - s))
            _store(dgate + row * out_row, dg, inside)
        dz = tl.where(o < 0, 0.0, d * slope)
        if KIND == NOW:
            dz = tl.where(reach >= furthest, 0.0, dz * _sigmoid(z))
        if KIND == BOX:
            most = tl.minimum((last + 1 - start).to(tl.float32), furthest)
            dz = tl.where((reach <= 1.0) | (reach >= most), 0.0, dz * 0.5 * reach)
        _store(dshift + row * out_row, dz, inside)

        if KIND == BOX:
            # Of the sum up to the query, and with the other sign of those at the far edge. A sum's gradient
            # stands at the last row that is part of it; the sum of no rows has none.
            share = (d * tl.sqrt(tl.minimum(reach, BOX_SCALE)) / reach).to(exact)
            _add(target + row * width, share, inside, ATOMIC)
            d = -share
            near, far = near - 1, far - 1
        further = d * fraction
        # Where both rows are one, it gets both shares as the near one.
        nearer = d - further + tl.where(far == near, further, 0.0)
        apart = exists & (far != near)
        total += tl.where(apart & (far == kept), further, 0.0)
        _add(target + far.to(tl.int64) * width, further, apart & (far != kept) & (far >= 0), ATOMIC)
        moves = exists & (near != kept)
        _add(target + kept.to(tl.int64) * width, total, moves & (kept >= 0), ATOMIC)
        total = tl.where(moves, 0.0, total) + tl.where(exists, nearer, 0.0)
        kept = tl.where(moves, near, kept)
    _add(target + kept.to(tl.int64) * width, total, kept >= 0, ATOMIC)


@triton.jit
def _tile(length, heads, CHANNELS, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REVERSE):
    """Batch row, head, number of the block, and rows and columns of one head, with a mask."""
    program = tl.program_id(0)
    blocks = (length + ROWS - 1) // ROWS
    head, block = program % heads, program // heads % blocks
    batch = (program // heads // blocks).to(tl.int64)
    time, channel = block * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (time < length) & (channel < CHANNELS)
    if REVERSE:
        time = length - 1 - time
    return batch, head, block, time.to(tl.int64), head * CHANNELS + channel, inside


@triton.jit
def _normalise(x, CHANNELS):
    """Rows at root mean square 1, and what did it."""
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / CHANNELS + EPS)
    return x * scale, scale


@triton.jit(do_not_specialize=["length"])
def _scales(
    values,
    scale,
    values_batch,
    values_row,
    length,
    heads,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    batch, head, _, time, column, inside = _tile(length, heads, CHANNELS, ROWS, COLUMNS, False)
    x = tl.load(values + batch * values_batch + time * values_row + column, mask=inside, other=0.0)
    _, s = _normalise(x, CHANNELS)
    tl.store(scale + (batch * length + time) * heads + head, s, mask=time < length)


@triton.jit(do_not_specialize=["length"])
def _totals(
    source,
    totals,
    source_batch,
    source_row,
    length,
    heads,
    CHANNELS: tl.constexpr,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of blocks: of rms(values); or, counted from the end, of a gradient."""
    batch, head, block, time, column, inside = _tile(length, heads, CHANNELS, ROWS, COLUMNS, REVERSE)
    x = tl.load(source + batch * source_batch + time * source_row + column, mask=inside, other=0.0)
    if not REVERSE:
        x, _ = _normalise(x, CHANNELS)
    total = tl.sum(x.to(tl.float64), axis=0, keep_dims=True)
    blocks = (length + ROWS - 1) // ROWS
    place = (batch * blocks + block) * heads * CHANNELS + column
    tl.store(totals + place, total, mask=column < (head + 1) * CHANNELS)


@triton.jit(do_not_specialize=["blocks"])
def _scan(totals, blocks, width, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of all blocks up to each, in place."""
    program = tl.program_id(0)
    spans = (width + COLUMNS - 1) // COLUMNS
    column = (program % spans) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    totals += (program // spans).to(tl.int64) * blocks * width + column
    before = tl.zeros([1, COLUMNS], tl.float64)
    for begin in range(0, blocks, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)[:, None]
        inside = (block < blocks) & (column < width)
        place = totals + block.to(tl.int64) * width
        x = tl.load(place, mask=inside, other=0.0)
        tl.debug_barrier()
        tl.store(place, before + tl.cumsum(x, axis=0), mask=inside)
        before += tl.sum(x, axis=0, keep_dims=True)


@triton.jit
def _up_to(x, totals, batch, head, block, length, heads, column, CHANNELS, ROWS: tl.constexpr):
    """Sums of all rows up to each row of a tile, by the sums of blocks."""
    blocks, width = (length + ROWS - 1) // ROWS, heads * CHANNELS
    place = totals + (batch * blocks + block - 1) * width + column
    # Before the first block there is nothing.
    end = tl.where(block > 0, (head + 1) * CHANNELS, 0)
    before = tl.load(place, mask=column < end, other=0.0)
    return before + tl.cumsum(x.to(tl.float64), axis=0)


@triton.jit(do_not_specialize=["length"])
def _sums(
    values,
    totals,
    sums,
    values_batch,
    values_row,
    length,
    heads,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Prefix sums of rms(values), each with its own row."""
    batch, head, block, time, column, inside = _tile(length, heads, CHANNELS, ROWS, COLUMNS, False)
    x = tl.load(values + batch * values_batch + time * values_row + column, mask=inside, other=0.0)
    x, _ = _normalise(x, CHANNELS)
    x = _up_to(x, totals, batch, head, block, length, heads, column, CHANNELS, ROWS)
    tl.store(sums + (batch * length + time) * (heads * CHANNELS) + column, x, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _finish(
    dread,
    totals,
    values,
    dvalues,
    values_batch,
    values_row,
    out_batch,
    out_row,
    length,
    heads,
    CHANNELS: tl.constexpr,
    SUMS: tl.constexpr,
    CLEAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From gradients of rms(values), or of its prefix sums, to those of values."""
    batch, head, block, time, column, inside = _tile(length, heads, CHANNELS, ROWS, COLUMNS, SUMS)
    place = dread + (batch * length + time) * (heads * CHANNELS) + column
    d = tl.load(place, mask=inside, other=0.0)
    if CLEAR:
        # Not the threads that load an element need be those that store it.
        tl.debug_barrier()
        tl.store(place, tl.zeros_like(d), mask=inside)
    if SUMS:
        # A row is part of every sum behind it.
        d = _up_to(d, totals, batch, head, block, length, heads, column, CHANNELS, ROWS).to(tl.float32)
    x = tl.load(values + batch * values_batch + time * values_row + column, mask=inside, other=0.0)
    v, s = _normalise(x, CHANNELS)
    along = tl.sum(v * d, axis=1, keep_dims=True) / CHANNELS
    _store(dvalues + batch * out_batch + time * out_row + column, s * (d - v * along), inside)
