"""Fused GPU kernels of a Deformer layer between its projections: Triton, forward and backward.

Memory is the limit, so this is what moves, in bytes per channel and token in bfloat16 (fp32: twice that, but
for the sums)::

    now, anchored   forward    values twice, shift, gate, out                                10
                    backward   values twice, shift, gate, grad and three gradients           16
                               and fp32 that is added to, read and cleared, in the L2 cache
    box             both       as much, and fp64 prefix sums written and read, in L2
                    backward   fp64 instead of the fp32

RMSNorm costs one pass over `values` that leaves a number per head and row, its scale, which is kept for the
backward pass; who reads a row multiplies by it.
Prefix sums are scans of blocks, in fp64: sums of blocks, a scan over these, and rows within their block.

So the backward, and box heads, go by pieces of batch rows and heads that fit into L2, where they can.
Nothing waits for the GPU, and no size depends on data: CUDA graphs can record all of it.
"""

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from starlm.ops import triton_mix_kernels as kernels
from starlm.ops.constants import ANCHORED, BOX, NOW
from starlm.ops.triton import _check, _each, _indices, _lanes, _scatter_each, _wide

# Of a program that reads, and of one that scatters, as in `starlm.ops.triton`.
TIME, LANES, WARPS, EACH = 16, 32, 4, 4
SPAN, SCATTER_EACH = 16, 2
# Elements of a tile of one head's rows.
TILE = 4096
# Blocks and columns of one step of the scan over blocks.
BLOCKS, COLUMNS = 128, 32
# Elements of fp32 that are added to at once: they are to stay in the L2 cache, and to keep a GPU busy.
PIECE = 1 << 22
# Pieces at once: while the last programs of one run, others take the room that they leave on the GPU.
STREAMS = 4


def forward(
    values: Tensor,
    shift: Tensor,
    gate: Tensor | None,
    origin: Tensor,
    first: Tensor | None,
    near: int,
    boxes: int,
    furthest: float,
) -> tuple[Tensor, Tensor]:
    """`starlm.ops.mix` for GPU tensors in fp32, bfloat16 or fp16; and scales [B, H, T] of rows of `now` and
    anchored heads.

    Raises:
        InputError: tensors that Triton cannot reach here, or too many rows.
    """
    _check(values)
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    tensors = [_lanes(x) for x in (values, shift, out)] + ([] if gate is None else [_lanes(gate)])
    scale = _scales(tensors[0], values.shape, boxes)
    # All at once, but for box heads: who reads their sums is to find them in the cache.
    pieces = list(pieces_of(values, near, boxes, {BOX: PIECE}))
    with _turns(len(pieces), values.device) as turns:
        for piece, turn in zip(pieces, turns, strict=True):
            with turn:
                v, s, y, *g = (piece.cut(x) for x in tensors)
                source, scales, inputs = *piece.source(v, scale), (s, *(g or [None]))
                rows, strides = piece.rows_of(origin, first), _strides(source, *inputs, y)
                arguments = source, scales, *inputs, *rows, y, *strides, scale.stride(0)
                options = {"furthest": furthest, "WIDE": _wide(source, s, y, *g), "TIME": TIME}
                piece.by_lanes(kernels._forward, TIME, LANES, WARPS, EACH, *arguments, **options)
    return out, scale


def backward(
    grad: Tensor,
    scale: Tensor,
    values: Tensor,
    shift: Tensor,
    gate: Tensor | None,
    origin: Tensor,
    first: Tensor | None,
    near: int,
    boxes: int,
    furthest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to values, shift and gate (empty without one), by its scales."""
    _check(values)
    deterministic = torch.are_deterministic_algorithms_enabled()
    shapes = values.shape, values.shape, 0 if gate is None else values.shape
    dvalues, dshift, dgate = (torch.empty(x, dtype=values.dtype, device=values.device) for x in shapes)
    tensors = [_lanes(x) for x in (grad, values, shift, dvalues, dshift)]
    tensors += [] if gate is None else [_lanes(gate), _lanes(dgate)]
    # One lane that walks a whole sequence needs all other sequences beside it.
    most = {} if deterministic else dict.fromkeys((NOW, ANCHORED, BOX), PIECE)
    pieces = list(pieces_of(values, near, boxes, most))
    # One for each stream, which each piece leaves at zero for the next.
    size = max((piece.room for piece in pieces), default=0)
    rooms = [torch.zeros(size, dtype=torch.float32, device=values.device) for _ in pieces[:STREAMS]]
    with _turns(len(pieces), values.device) as turns:
        for number, (piece, turn) in enumerate(zip(pieces, turns, strict=True)):
            with turn:
                dy, v, s, dv, ds, *gates = (piece.cut(x) for x in tensors)
                g, dg = gates or (None, None)
                source, scales = piece.source(v, scale)
                dread = piece.accumulator(rooms[number % STREAMS])
                inputs = dy, source, scales, s, g
                span = piece.length if deterministic else SPAN
                strides = *_strides(dy, source, s, g, ds), scale.stride(0), span
                arguments = *inputs, *piece.rows_of(origin, first), dread, ds, dg, *strides
                wide = _wide(dy, source, s, dread, ds, *gates)
                options = {"furthest": furthest, "WIDE": wide, "ATOMIC": not deterministic}
                each = _scatter_each(SCATTER_EACH, wide, deterministic)
                # A program is one warp: see `_collect`.
                piece.by_lanes(kernels._backward, span, 32, 1, each, *arguments, **options)
                sums = piece.kind == BOX
                totals = piece.totals(dread, REVERSE=True) if sums else None
                arguments = dread, totals, v, dv, *_strides(v, dv)
                piece.by_tiles(kernels._finish, *arguments, SUMS=sums, CLEAR=number + STREAMS < len(pieces))
    return dvalues, dshift, dgate


@dataclass(frozen=True)
class Piece:
    """Batch rows and heads of one kind that are computed at once."""

    kind: int
    rows: slice
    heads: slice
    """Of all heads; `number` of them are of this kind and before them."""
    number: int
    length: int
    channels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, T and H of the piece."""
        return self.rows.stop - self.rows.start, self.length, self.heads.stop - self.heads.start

    @property
    def width(self) -> int:
        return self.shape[2] * self.channels

    @property
    def room(self) -> int:
        """Elements of fp32 that the gradients of what is read take: those of sums are in fp64."""
        return math.prod(self.shape) * self.channels * (2 if self.kind == BOX else 1)

    def cut(self, x: Tensor) -> Tensor:
        """The piece's part of a [B, T, D], a view."""
        return x[self.rows, :, self.heads.start * self.channels : self.heads.stop * self.channels]

    def rows_of(self, origin: Tensor, first: Tensor | None) -> list[Tensor | None]:
        """The piece's part of the indices, contiguous; origins for anchored heads only."""
        anchors = slice(self.number, self.number + self.shape[2])
        return _indices(
            origin[self.rows, :, anchors] if self.kind == ANCHORED else None,
            None if first is None else first[self.rows],
        )

    def accumulator(self, room: Tensor) -> Tensor:
        """A [B, T, W] in a room that is long enough."""
        dtype = torch.float64 if self.kind == BOX else torch.float32
        return room[: self.room].view(dtype).view(*self.shape[:2], self.width)

    def source(self, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the kernels read from: values, with the scales of their rows; or prefix sums."""
        return (self.sums(values), None) if self.kind == BOX else (values, scale[self.rows, self.heads])

    def sums(self, values: Tensor) -> Tensor:
        """Prefix sums of rms(values), in fp64."""
        sums = torch.empty(values.shape, dtype=torch.float64, device=values.device)
        totals = self.totals(values, REVERSE=False)
        self.by_tiles(kernels._sums, values, totals, sums, *_strides(values))
        return sums

    def totals(self, source: Tensor, **options: Any) -> Tensor:
        """Sums of all rows up to the end of each block of rows, in fp64."""
        batch, blocks = self.shape[0], -(-self.length // self.tile[0])
        totals = torch.empty(batch, blocks, self.width, dtype=torch.float64, device=source.device)
        self.by_tiles(kernels._totals, source, totals, *_strides(source), **options)
        programs = batch * -(-self.width // COLUMNS)
        _launch(kernels._scan, programs, 8, totals, blocks, self.width, BLOCKS=BLOCKS, COLUMNS=COLUMNS)
        return totals

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile, which is a head wide."""
        columns = triton.next_power_of_2(self.channels)
        return max(1, TILE // columns), columns

    def by_tiles(self, kernel: Any, *arguments: Any, **options: Any) -> None:
        """Run a kernel on all rows of all heads."""
        batch, _, heads = self.shape
        rows, columns = self.tile
        options |= {"CHANNELS": self.channels, "ROWS": rows, "COLUMNS": columns}
        programs = batch * heads * -(-self.length // rows)
        _launch(kernel, programs, 4, *arguments, self.length, heads, **options)

    def by_lanes(
        self,
        kernel: Any,
        queries: int,
        lanes: int,
        warps: int,
        each: int,
        *arguments: Any,
        furthest: float,
        **options: Any,
    ) -> None:
        """Run a kernel on all channels and queries, so many queries, lanes and warps to a program."""
        each = _each(self.channels, each)
        options |= {"CHANNELS": self.channels, "KIND": self.kind, "LANES": lanes, "EACH": each}
        programs = self.shape[0] * -(-self.length // queries) * -(-self.width // (lanes * each))
        _launch(kernel, programs, warps, *arguments, self.length, self.width, furthest, **options)


def _scales(values: Tensor, shape: torch.Size, boxes: int) -> Tensor:
    """What brings rows of all but box heads to root mean square 1, [B, H, T]; of values [B, T, D].

    Args: shape: [B, T, H, C].
    """
    batch, length, heads, channels = shape
    scale = torch.empty(batch, heads - boxes, length, dtype=torch.float32, device=values.device)
    if scale.numel():
        all_of_them = Piece(NOW, slice(0, batch), slice(0, heads - boxes), 0, length, channels)
        v = all_of_them.cut(values)
        all_of_them.by_tiles(kernels._scales, v, scale, *_strides(v))
    return scale


def pieces_of(values: Tensor, near: int, boxes: int, most: Mapping[int, int]) -> Iterator[Piece]:
    """All heads, kind by kind, with no more `room` to a piece than `most` of its kind, if it has one."""
    batch, length, heads, channels = values.shape
    if not values.numel():
        return
    ends = {NOW: (0, near), ANCHORED: (near, heads - boxes), BOX: (heads - boxes, heads)}
    for kind, (begin, end) in ends.items():
        if begin == end:
            continue
        one = Piece(kind, slice(0, 1), slice(0, 1), 0, length, channels).room
        fit = max(1, most[kind] // one) if kind in most else batch * heads
        some, rows = min(fit, end - begin), max(1, fit // (end - begin))
        for head in range(begin, end, some):
            for row in range(0, batch, rows):
                parts = slice(row, min(row + rows, batch)), slice(head, min(head + some, end))
                yield Piece(kind, *parts, head - begin, length, channels)


@contextmanager
def _turns(number: int, device: torch.device) -> Iterator[list[AbstractContextManager[Any]]]:
    """For each piece the stream to compute it on; all of them begin and end in the current one."""
    if device.type == "cpu" or min(number, STREAMS) < 2:
        yield [nullcontext()] * number
        return
    here, streams = torch.cuda.current_stream(device), _THREAD.streams(device)
    for stream in streams:
        stream.wait_stream(here)
    try:
        yield [torch.cuda.stream(streams[turn % STREAMS]) for turn in range(number)]
    finally:
        for stream in streams:
            here.wait_stream(stream)


class _Thread(threading.local):
    """Streams of this thread: what another one records in a graph must not get between."""

    def __init__(self) -> None:
        self.made: dict[torch.device, list[torch.cuda.Stream]] = {}

    def streams(self, device: torch.device) -> list[torch.cuda.Stream]:
        found = self.made.setdefault(device, [])
        while len(found) < STREAMS:
            found.append(torch.cuda.Stream(device))
        return found[:STREAMS]


_THREAD = _Thread()


def _launch(kernel: Any, programs: int, warps: int, *arguments: Any, **options: Any) -> None:
    # One dimension: the others end at 65535.
    with torch.cuda.device_of(next(x for x in arguments if isinstance(x, Tensor))):
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=True, **options)


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Elements from one batch row, and from one row, to the next."""
    return tuple(stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2]))
