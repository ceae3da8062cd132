"""`starlm.ops.cpu_attention` for GPUs: attention between its projections, for one new token of each slot.

One launch per layer, one program per slot and head, which goes over blocks of rows. The new row it has in
registers: in memory other threads may not have stored it yet.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from starlm.ops import constants

EPS = tl.constexpr(constants.EPS)
# Channels of rows that a program has at a time, and rows, if heads are narrow.
TILE, MOST_ROWS = 8192, 256
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _turned(x, turns, lane, inside, CHANNELS: tl.constexpr):
    """RMSNorm of a head; pairs (c, c + C/2) are turned."""
    own = tl.load(x + lane, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(own * own, 0) / CHANNELS + EPS)
    own *= scale
    if turns is not None:
        half: tl.constexpr = CHANNELS // 2
        is_low = lane < half
        pair = tl.where(is_low, lane, lane - half)
        other = (
            tl.load(x + tl.where(is_low, lane + half, pair), mask=inside, other=0.0).to(tl.float32) * scale
        )
        cos = tl.load(turns + pair, mask=inside, other=0.0)
        sin = tl.load(turns + half + pair, mask=inside, other=0.0)
        own = own * cos + tl.where(is_low, other, -other) * sin
    return own


@triton.jit(do_not_specialize=["batch", "heads", "window"])
def _attend(
    query,
    key,
    value,
    turns,
    places,
    out,
    query_row,
    key_row,
    value_row,
    batch,
    heads,
    window,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    head, slot = program % heads, (program // heads).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside, left, width = lane < CHANNELS, head * CHANNELS, heads * CHANNELS
    dtype = value.dtype.element_ty
    if turns is not None:
        turns += slot * (CHANNELS // 2 * 2)
    # What the buffers hold, which is rounded, is what is read.
    k = _turned(key + slot * key_row + left, turns, lane, inside, CHANNELS).to(dtype)
    v = tl.load(value + slot * value_row + left + lane, mask=inside, other=0.0)
    q = _turned(query + slot * query_row + left, turns, lane, inside, CHANNELS) * CHANNELS**-0.5

    place = places + slot
    past, first = tl.load(place + batch), tl.load(place + 2 * batch)
    # Of PyTorch's memory: without the hint each channel would be loaded by itself.
    keys = tl.multiple_of(tl.load(place).to(tl.pointer_type(dtype)), 16) + left
    values = tl.multiple_of(tl.load(place + 3 * batch).to(tl.pointer_type(dtype)), 16) + left
    tl.store(keys + past * width + lane, k, mask=inside)
    tl.store(values + past * width + lane, v, mask=inside)

    begin = tl.maximum(first, tl.where(window > 0, past + 1 - window, 0))
    begin = tl.maximum(begin, 0)
    highest = tl.sum(q * k.to(tl.float32), 0)
    total, read = tl.full((), 1.0, tl.float32), v.to(tl.float32)
    for start in range(begin, past, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        is_row = row < past
        there, offset = is_row[:, None] & inside[None], row[:, None] * width + lane[None]
        k_there = tl.load(keys + offset, mask=there, other=0.0).to(tl.float32)
        v_there = tl.load(values + offset, mask=there, other=0.0).to(tl.float32)
        score = tl.where(is_row, tl.sum(q[None] * k_there, 1), -float("inf"))
        most = tl.maximum(highest, tl.max(score, 0))
        weight, kept = tl.exp(score - most), tl.exp(highest - most)
        total = total * kept + tl.sum(weight, 0)
        read = read * kept + tl.sum(weight[:, None] * v_there, 0)
        highest = most
    tl.store(out + slot * width + left + lane, (read / total).to(dtype), mask=inside)


def attend(
    query: Float[Tensor, "B 1 H C"],
    key: Float[Tensor, "B 1 H C"],
    value: Float[Tensor, "B 1 H C"],
    turns: Float[Tensor, "B 2 _"] | None,
    places: Int[Tensor, "3 3 B"],
    *,
    window: int | None,
) -> Float[Tensor, "B 1 H C"]:
    """Append a row to the buffers of each slot, and attend to it and those before.

    Called again with the same arguments it writes the same again.

    Args:
        query, key, value: of the new token, as projected, all of one of `starlm.ops.backends.GPU_DTYPES`, on
            one GPU.
        turns: cosines and sines by which pairs of channels are turned, fp32; none for no positions.
        places: `Attention.make_room`, int64, with addresses on that GPU, multiples of 16.
        window: rows that are seen, the new one among them; None is all.
    """
    batch, _, heads, channels = value.shape
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    flat = [x.flatten(2) for x in (query, key, value)]
    flat = [x if x.stride(2) == 1 else x.contiguous() for x in flat]
    turns = turns.contiguous() if turns is not None and turns.shape[2] else None
    indices, rows = places.contiguous(), [x.stride(0) for x in flat]
    kernel: Any = _attend
    with torch.cuda.device_of(value):
        kernel[(batch * heads,)](
            *flat, turns, indices, out, *rows, batch, heads, window or 0, **sizes(channels), **OPTIONS
        )
    return out


def sizes(channels: int) -> dict[str, int]:
    """Of what a program handles at a time, for heads of so many channels."""
    lanes = 1 << (channels - 1).bit_length()
    return {"CHANNELS": channels, "LANES": lanes, "ROWS": min(max(TILE // lanes, 1), MOST_ROWS)}
