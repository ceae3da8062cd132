"""`starlm.ops.cpu_step` for GPUs: a Deformer layer between its projections, for one new token of each slot.

One launch per layer, one program per slot and head, one lane per channel. A channel reads only its own rows,
so each lane writes its value of the new one and waits for no other: what it reads of that is in a register.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from starlm.ops import constants
from starlm.ops.triton import _locate

NOW, ANCHORED, BOX = map(tl.constexpr, (constants.NOW, constants.ANCHORED, constants.BOX))
EPS, BOX_SCALE = tl.constexpr(constants.EPS), tl.constexpr(float(constants.BOX_SCALE))


@triton.jit
def _clip(x, most):
    # Not minimum: NaN must stay NaN.
    return tl.where(x > most, most, x)


@triton.jit
def _softplus(x):
    return tl.where(x < 0, 0.0, x) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _row(buffer, row, past, width, own, inside):
    """Row `row` of each channel; row `past` is the new one."""
    kept = tl.load(buffer + row.to(tl.int64) * width, mask=inside & (row < past), other=0.0)
    return tl.where(row < past, kept.to(own.dtype), own)


@triton.jit
def _read(buffer, new, origin, reach, past, first, width, inside):
    """Append to rows of `now` or anchored heads, and read them."""
    tl.store(buffer + past.to(tl.int64) * width, new, mask=inside)
    own = new.to(tl.float32)
    start = tl.maximum(tl.minimum(first, past), 0).to(tl.int32)
    near, far, fraction = _locate(reach, origin, start, past)
    v = _row(buffer, near, past, width, own, inside)
    w = _row(buffer, far, past, width, own, inside)
    return tl.where(origin < 0, 0.0, v + fraction * (w - v))


@triton.jit
def _mean(sums, new, window, past, first, width, inside):
    """Append to the sums of box heads, and read the scaled mean of a window."""
    end = sums + past.to(tl.int64) * width
    total = tl.load(end - width, mask=inside, other=0.0) + new.to(tl.float32).to(tl.float64)
    tl.store(end, total, mask=inside)
    start = tl.maximum(tl.minimum(first, past - 1), 0).to(tl.int32)
    window = _clip(window, (past - start).to(tl.float32))
    near, far, fraction = _locate(window, past, start, past)
    v = _row(sums, near, past, width, total, inside)
    w = _row(sums, far, past, width, total, inside)
    mean = (total - (v + fraction.to(tl.float64) * (w - v))) / window.to(tl.float64)
    return mean.to(tl.float32) * tl.sqrt(_clip(window, BOX_SCALE))


@triton.jit(do_not_specialize=["batch", "heads", "near", "boxes"])
def _step(
    values,
    shift,
    gate,
    origin,
    streams,
    out,
    values_row,
    shift_row,
    gate_row,
    batch,
    heads,
    near,
    boxes,
    furthest,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0)
    head, slot = program % heads, (program // heads).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside, column = lane < CHANNELS, head * CHANNELS + lane
    dtype = values.dtype.element_ty
    x = tl.load(values + slot * values_row + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / CHANNELS + EPS)
    # What the buffers hold, which is rounded, is what is read.
    new = (x * scale).to(dtype)
    z = tl.load(shift + slot * shift_row + column, mask=inside, other=0.0).to(tl.float32)

    anchored = heads - near - boxes
    is_near, is_box = head < near, head >= near + anchored
    kind = tl.where(is_near, NOW, tl.where(is_box, BOX, ANCHORED))
    place = streams + kind * 3 * batch + slot
    address, past, first = tl.load(place), tl.load(place + batch).to(tl.int32), tl.load(place + 2 * batch)
    if is_box:
        sums = address.to(tl.pointer_type(tl.float64)) + (head - near - anchored) * CHANNELS + lane
        window = _clip(tl.exp(0.5 * z), furthest)
        window = tl.where(window < 1.0, 1.0, window)
        read = _mean(sums, new, window, past, first, boxes * CHANNELS, inside)
    else:
        rows = past.to(tl.int64)
        if origin is not None:
            # The address of a `now` head would be that of no anchor.
            o = tl.load(origin + slot * anchored + head - near, mask=head >= near, other=0)
            rows = tl.where(is_near, rows, tl.minimum(tl.maximum(o, -1), rows))
        buffer = address.to(tl.pointer_type(dtype)) + tl.where(is_near, head, head - near) * CHANNELS + lane
        reach = tl.where(is_near, _clip(_softplus(z), furthest), z)
        width = tl.where(is_near, near, anchored) * CHANNELS
        read = _read(buffer, new, rows.to(tl.int32), reach, past, first, width, inside)
    if gate is not None:
        g = tl.load(gate + slot * gate_row + column, mask=inside, other=0.0).to(tl.float32)
        read = read / (1.0 + tl.exp(-g))
    tl.store(out + slot * heads * CHANNELS + column, read.to(dtype), mask=inside)


def step(
    values: Float[Tensor, "B 1 D"],
    shift: Float[Tensor, "B 1 D"],
    gate: Float[Tensor, "B 1 D"] | None,
    origin: Int[Tensor, "B A"] | None,
    streams: Int[Tensor, "3 3 B"],
    *,
    heads: int,
    near: int,
    boxes: int,
    max_shift: int | None,
) -> Float[Tensor, "B 1 D"]:
    """Append a row to the buffers of each slot, and `starlm.ops.mix` at that row, heads side by side.

    Called again with the same arguments it writes the same again.

    Args:
        values, shift, gate: of the new token, all of one of `starlm.ops.backends.GPU_DTYPES`, on one GPU.
        origin: for each anchored head the row of its buffer, or -1, int64.
        streams: as for `starlm.ops.cpu_step.step`, int64, with addresses on that GPU.
        heads, near, boxes, max_shift: as there.
    """
    batch, channels = len(values), values.shape[-1] // heads
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    floats = [None if x is None else x if x.stride(2) == 1 else x.contiguous() for x in (values, shift, gate)]
    rows = [0 if x is None else x.stride(0) for x in floats]
    lanes = 1 << (channels - 1).bit_length()
    indices = None if origin is None else origin.contiguous(), streams.contiguous()
    furthest = math.inf if max_shift is None else float(max_shift)
    options = {"num_warps": min(max(lanes // 32, 1), 8), "enable_fp_fusion": False}
    options |= {"CHANNELS": channels, "LANES": lanes}
    kernel: Any = _step
    with torch.cuda.device_of(values):
        kernel[(batch * heads,)](
            *floats, *indices, out, *rows, batch, heads, near, boxes, furthest, **options
        )
    return out
