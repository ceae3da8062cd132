"""The kernels of `starlm.ops.triton_mix`, which says what they are for.

Reads and scatters have some channels for each lane, as in `starlm.ops.triton`, which says why and how
gradients are added; what needs whole heads or neighbouring rows works on tiles.
"""

import triton
import triton.language as tl

from starlm.ops import constants
from starlm.ops.triton import (
    _add,
    _bounds,
    _collect,
    _collected,
    _flush,
    _keep,
    _locate,
    _offset,
    _origin,
    _store,
)

NOW, ANCHORED, BOX = map(tl.constexpr, (constants.NOW, constants.ANCHORED, constants.BOX))
EPS, BOX_SCALE = tl.constexpr(constants.EPS), tl.constexpr(float(constants.BOX_SCALE))


@triton.jit
def _exp(x):
    # Without care for denormals, two instructions instead of five.
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _inverse(x):
    """1 / x of a positive x: two instructions, where division takes nine; off by 4e-7 of it at most."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _sigmoid(x):
    return _inverse(1.0 + _exp(-x))


@triton.jit
def _softplus(x):
    # The logarithm of 1 + u by a polynomial, a quarter of the instructions of `tl.log`. The result is off by
    # 1e-6 of it for |x| < 20, mostly from the argument of exp2.
    u = _exp(-tl.abs(x))
    p = tl.full(u.shape, 0.0052534578, tl.float32)
    p = p * u + -0.0295885074
    p = p * u + 0.078361668
    p = p * u + -0.136747697
    p = p * u + 0.191114311
    p = p * u + -0.248443699
    p = p * u + 0.333192713
    p = p * u + -0.499995015
    p = p * u + 0.999999971
    return tl.maximum(x, 0.0) + u * p


@triton.jit
def _most(x, most):
    """The minimum; of NaN, NaN."""
    return tl.minimum(x, most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _place(z, origin, start, last, furthest, KIND: tl.constexpr):
    """What the shift projection says, in tokens; rows (near, far) that it reads, and weight of the far one.

    The rows of a box head are places between rows: its sums are those before each.
    """
    if KIND == ANCHORED:
        reach = z
        near, far, fraction = _locate(reach, origin, start, last)
    elif KIND == NOW:
        reach = _most(_softplus(z), furthest)
        near, far, fraction = _locate(reach, last, start, last)
    else:
        reach = _most(_exp(0.5 * z), furthest)
        reach = tl.maximum(reach, 1.0, propagate_nan=tl.PropagateNan.ALL)
        # A window is clipped to what there is.
        reach = _most(reach, (last + 1 - start).to(tl.float32))
        near, far, fraction = _locate(reach, last + 1, start, last + 1)
    return reach, near, far, fraction


@triton.jit
def _row(source, scale, row, source_row, KIND: tl.constexpr, WIDE: tl.constexpr):
    """A row of rms(values), or, for a box head, the sum of those before it."""
    if KIND == BOX:
        x = tl.load(source + _offset(row - 1, source_row, WIDE), mask=row > 0, other=0.0)
    else:
        x = tl.load(source + _offset(row, source_row, WIDE)).to(tl.float32) * tl.load(scale + row)
    return x


@triton.jit
def _read(
    source, scale, reach, near, far, fraction, last, source_row, KIND: tl.constexpr, WIDE: tl.constexpr
):
    """What is read, and its derivative with respect to `reach`."""
    v = _row(source, scale, near, source_row, KIND, WIDE)
    # Where both are one row, a fused multiply-add would leave what rounding v had cut off.
    edge = tl.where(far == near, 0.0, _row(source, scale, far, source_row, KIND, WIDE) - v)
    read = v + fraction * edge
    if KIND == BOX:
        size = tl.sqrt(tl.minimum(reach, BOX_SCALE))
        own = tl.load(source + _offset(last, source_row, WIDE))
        share = _inverse(reach)
        mean = (own - read).to(tl.float32) * share
        # Without gradient through the size.
        edge = -(edge.to(tl.float32) + mean) * share * size
        read = mean * size
    return read, edge


@triton.jit(do_not_specialize=["scale_batch", "length"])
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
    shift_batch,
    shift_row,
    gate_batch,
    gate_row,
    out_batch,
    out_row,
    scale_batch,
    length,
    width,
    furthest,
    CHANNELS: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    TIME: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    # In this order, in one dimension, and with what lies beyond the end repeated: see `starlm.ops.triton`.
    program, place = tl.program_id(0), tl.arange(0, TIME * LANES)[:, None]
    lanes = width // EACH
    blocks, spans = (lanes + LANES - 1) // LANES, (length + TIME - 1) // TIME
    lane = (program % blocks) * LANES + place % LANES
    time = (program // blocks % spans) * TIME + place // LANES
    batch = (program // blocks // spans).to(tl.int64)
    inside = lane < lanes
    time, lane = tl.minimum(time, length - 1), tl.minimum(lane, lanes - 1)
    column = lane * EACH + tl.arange(0, EACH)[None, :]
    source += batch * source_batch + column
    shift += batch * shift_batch
    out += batch * out_batch
    if KIND != BOX:
        scale += batch * scale_batch + (lane * EACH // CHANNELS).to(tl.int64) * length

    start, last = _bounds(first, None, batch, time, length, length)
    o = _origin(origin, batch, time, lane * EACH, last, length, width, CHANNELS)
    z = tl.load(shift + (_offset(time, shift_row, WIDE) + column)).to(tl.float32)
    reach, near, far, fraction = _place(z, o, start, last, furthest, KIND)
    read, _ = _read(source, scale, reach, near, far, fraction, last, source_row, KIND, WIDE)
    if gate is not None:
        g = tl.load(gate + batch * gate_batch + (_offset(time, gate_row, WIDE) + column))
        read *= _sigmoid(g.to(tl.float32))
    if KIND == ANCHORED:
        read = tl.where(o < 0, 0.0, read)
    _store(out + (_offset(time, out_row, WIDE) + column), read, inside)


@triton.jit(do_not_specialize=["scale_batch", "length", "span"])
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
    shift_batch,
    shift_row,
    gate_batch,
    gate_row,
    out_batch,
    out_row,
    scale_batch,
    span,
    length,
    width,
    furthest,
    CHANNELS: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    ATOMIC: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    """Gradients of shift and gate; those of rms(values), or of the prefix sums, are added to `dread`."""
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
    dshift += batch * out_batch
    source += batch * source_batch + column
    target = dread + batch * length * width + column
    if KIND != BOX:
        scale += batch * scale_batch + (lane * EACH // CHANNELS).to(tl.int64) * length
    if gate is not None:
        gate += batch * gate_batch
        dgate += batch * out_batch
    exact = dread.dtype.element_ty
    # As in `starlm.ops.triton`.
    kept = tl.full([LANES, EACH], -1, tl.int32)
    total = tl.full([LANES, EACH], 0.0, exact)
    row0, row1, row2, row3, edge = total, total, total, total, total
    edge_row, _ = _bounds(first, None, batch, begin, length, length)
    end = tl.minimum(begin + span, length)
    # Each query's inputs are loaded while the one before it is computed.
    z = tl.load(shift + (_offset(begin, shift_row, WIDE) + column))
    dy = tl.load(grad + (_offset(begin, grad_row, WIDE) + column))
    for step in range(end - begin):
        time = begin + step
        z, d = z.to(tl.float32), dy.to(tl.float32)
        start, last = _bounds(first, None, batch, time, length, length)
        o = _origin(origin, batch, time, lane * EACH, last, length, width, CHANNELS)
        reach, near, far, fraction = _place(z, o, start, last, furthest, KIND)
        read, slope = _read(source, scale, reach, near, far, fraction, last, source_row, KIND, WIDE)
        then = tl.minimum(time + 1, end - 1)
        next_z = tl.load(shift + (_offset(then, shift_row, WIDE) + column))
        dy = tl.load(grad + (_offset(then, grad_row, WIDE) + column))

        row = _offset(time, out_row, WIDE) + column
        if gate is not None:
            s = _sigmoid(tl.load(gate + (_offset(time, gate_row, WIDE) + column)).to(tl.float32))
            d *= s
            dg = d * read * (1.0 - s)
            if KIND == ANCHORED:
                dg = tl.where(o < 0, 0.0, dg)
            _store(dgate + row, dg, inside)
        dz = d * slope
        if KIND == ANCHORED:
            dz = tl.where(o < 0, 0.0, dz)
        if KIND == NOW:
            dz = tl.where(reach >= furthest, 0.0, dz * _sigmoid(z))
        if KIND == BOX:
            most = tl.minimum((last + 1 - start).to(tl.float32), furthest)
            dz = tl.where((reach <= 1.0) | (reach >= most), 0.0, dz * 0.5 * reach)
        _store(dshift + row, dz, inside)

        if KIND == ANCHORED:
            exists = inside & (o >= 0)
            kept, total = _keep(target, width, near, far, d, fraction, exists, kept, total, WIDE, ATOMIC)
        else:
            if first is not None:
                moved = start != edge_row
                _flush(target, width, edge_row - (KIND == BOX), edge, inside, moved, WIDE, ATOMIC)
                edge, edge_row = tl.where(moved, 0.0, edge), start
            d = d.to(exact)
            if KIND == BOX:
                # Of the sum up to the query, and with the other sign of those at the far edge. A sum's
                # gradient stands at the last row that is part of it; the sum of no rows has none.
                d = d * (tl.sqrt(tl.minimum(reach, BOX_SCALE)) * _inverse(reach))
                row0 += d
                d = -d
                near, far = near - 1, far - 1
            row0, row1, row2, row3, edge = _collect(
                target,
                width,
                near,
                far,
                d,
                fraction,
                time,
                inside,
                row0,
                row1,
                row2,
                row3,
                edge,
                WIDE,
                ATOMIC,
            )
        z = next_z
    if KIND == ANCHORED:
        _add(target + _offset(kept, width, WIDE), total, kept >= 0, ATOMIC)
    else:
        _collected(target, width, end, inside, row1, row2, row3, edge, edge_row - (KIND == BOX), WIDE, ATOMIC)


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
    # Of one head side by side: lanes whose rows differ find them in one cache line.
    tl.store(scale + (batch * heads + head) * length + time, s, mask=time < length)


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
    # Before the barrier: it is not to wait for the others.
    x = tl.load(values + batch * values_batch + time * values_row + column, mask=inside, other=0.0)
    if CLEAR:
        # Not the threads that load an element need be those that store it.
        tl.debug_barrier()
        tl.store(place, tl.zeros_like(d), mask=inside)
    if SUMS:
        # A row is part of every sum behind it.
        d = _up_to(d, totals, batch, head, block, length, heads, column, CHANNELS, ROWS).to(tl.float32)
    v, s = _normalise(x, CHANNELS)
    along = tl.sum(v * d, axis=1, keep_dims=True) / CHANNELS
    _store(dvalues + batch * out_batch + time * out_row + column, s * (d - v * along), inside)
