"""A step of decoding through all layers as one call: a list of instructions that threads work on by tickets.

Layers write themselves down once (`Code`); a step then is one `run`. Called one by one from Python, its
products and the small things between them take up to three times as long as the weights take to be read.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from starlm.ops.constants import EPS
from starlm.ops.cpu_attention import attend
from starlm.ops.cpu_base import array, index, pointer, store, together, widen
from starlm.ops.cpu_math import ONE, f32, jit
from starlm.ops.cpu_product import ADD, CAP, STORE, product, rms_scales
from starlm.ops.cpu_step import append_row, read_row
from starlm.ops.cpu_tickets import await_done, begin, finish, new_counts, now, take

PRODUCT, READ, ATTEND = 0, 1, 2
_ZERO = np.int64(0)
# Bytes of weights that a ticket of a product reads: an eighth of the product within these limits, since long
# pieces are read faster, but there must be some for every thread; some microseconds of work or some tens.
FEWEST_BYTES, MOST_BYTES = 1 << 16, 1 << 18
_INTEGERS = (
    "kind", "waits", "tickets", "begin", "end", "after", "source", "width", "out", "then",  # of all
    "weight", "bias", "columns", "of_ticket", "normalise",  # of products
    "layer", "stream", "channels",  # of reads and of attention
    "shift", "gate", "sigmoid", "near", "anchored",  # of reads
    "key", "value", "window",  # of attention
)  # fmt: skip
INSTRUCTION = np.dtype(
    [*((name, np.int64) for name in _INTEGERS), ("furthest", np.float64), ("cap", np.float64)]
)


@jit
def _rows(floats, batch, offset, width):
    """[B, width] of the numbers of all sequences, which stand at the address `floats`."""
    return carray(pointer(floats + 4 * offset * batch), (batch, width), np.float32)


@jit
def _multiply(it, floats, scales, like, left, right):
    weight = carray(pointer(it.weight), (it.columns, it.width), like.dtype)
    bias = carray(pointer(it.bias), (it.columns if it.bias else 0,), like.dtype)
    x = _rows(floats, scales.size, it.source, it.width)
    out = _rows(floats, scales.size, it.out, it.columns)
    product(weight, bias, x, scales, it.then, f32(it.cap), out, left, right)


@jit
def _read(it, floats, batch, like, streams, origin, b):
    values = _rows(floats, batch, it.source, it.width)[b]
    shift = _rows(floats, batch, it.shift, it.width)[b]
    gate = _rows(floats, batch, max(it.gate, 0), it.width)[b]
    out, read = _rows(floats, batch, it.out, it.width)[b], np.empty(it.width, np.float32)
    row = np.empty(it.width, like.dtype)
    spans = np.int64(0), it.near, it.anchored, it.width
    places = streams[it.layer, it.stream]
    append_row(values, spans, places, b, _ZERO, it.channels, row)
    settings = it.channels, f32(it.furthest), it.sigmoid != 0
    read_row(shift, gate, origin[b], spans, places, b, _ZERO, _ZERO, *settings, row, read)
    for c in range(it.width):
        x = read[c] * gate[c] if it.gate >= 0 and not it.sigmoid else read[c]
        out[c] = out[c] + x if it.then == ADD else x


@jit
def _attend(it, floats, batch, like, streams, turns, part):
    b, left = part % batch, part // batch * it.channels
    head = slice(left, left + it.channels)
    query = _rows(floats, batch, it.source, it.width)[b, head]
    key = _rows(floats, batch, it.key, it.width)[b, head]
    value = _rows(floats, batch, it.value, it.width)[b, head]
    out, places = _rows(floats, batch, it.out, it.width)[b, head], streams[it.layer, it.stream]
    attend(query, key, value, turns[b], places, it.window, b, left, it.width, like, out)


@jit
def _normalise(x, out):
    """out = RMSNorm of x, which it may be."""
    scales = np.empty(x.shape[0], np.float32)
    rms_scales(x, f32(EPS), scales)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            store(out[b], c, x[b, c] * scales[b])


@jit
def _enter(table, ids, x):
    """x = RMSNorm of rows of the table."""
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            x[b, c] = widen(table[ids[b], c])
    _normalise(x, x)


@jit
def _work(counts, code, floats, batch, like, ids, streams, origin, turns, leads):
    """Whether this thread has waited for half of the time: one alone would have been as fast.

    Args:
        like: the table of embeddings, of which the step begins with the rows `ids`, if there are any.
    """
    if leads and ids.size:
        _enter(like, ids, _rows(floats, batch, 0, like.shape[1]))
    if not begin(counts, leads):
        return False
    total, number, scaled, waited, begun = code[code.size - 1].end, 0, -1, 0, now()
    scales = np.empty(batch, np.float32)
    while True:
        ticket = take(counts)
        if ticket >= total:
            break
        while code[number].end <= ticket:
            number += 1
        it = code[number]
        waited += await_done(counts, it.after)
        part = ticket - it.begin
        if it.kind == PRODUCT:
            if scaled != number:
                scaled = number
                if it.normalise:
                    rms_scales(_rows(floats, batch, it.source, it.width), f32(EPS), scales)
                else:
                    for b in range(batch):
                        scales[b] = ONE
            left = part * it.of_ticket
            _multiply(it, floats, scales, like, left, min(left + it.of_ticket, it.columns))
        elif it.kind == READ:
            _read(it, floats, batch, like, streams, origin, part)
        else:
            _attend(it, floats, batch, like, streams, turns, part)
        finish(counts)
    if leads:
        waited += await_done(counts, total)
    return 2 * waited > now() - begun


class Row(NamedTuple):
    """Room for `width` numbers of each sequence, behind `offset` others."""

    offset: int
    width: int


class Code:
    """The instructions of a step, in the order in which their tickets are given out.

    An instruction that needs what another has made, or writes what another needs, waits for all before it.
    Weights must stay where they are as long as the code is used.
    """

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        """Args:
        dtype: of weights and of the rows of a decode state, one of `starlm.ops.backends.CPU_DTYPES`.
        width: of the residual stream `x`.
        """
        self._dtype = dtype
        self._code = self._head = np.zeros(0, INSTRUCTION)
        self._of_batch: dict[tuple[int, bool], np.ndarray] = {}
        self._rows: dict[tuple[str, int], Row] = {}
        self._used: set[Row] = set()
        self._written: set[Row] = set()
        self._width = 0
        self.x = self.row("x", width)
        self.logits: Row | None = None

    def row(self, name: str, width: int) -> Row:
        """Room of this name and width, the same for all who ask; undefined until it is written."""
        if (name, width) not in self._rows:
            self._rows[name, width] = Row(self._width, width)
            self._width += width
        return self._rows[name, width]

    def product(
        self,
        source: Row,
        weight: Float[Tensor, "N K"],
        out: Row,
        *,
        bias: Float[Tensor, " N"] | None = None,
        normalise: bool = False,
        then: int = STORE,
    ) -> None:
        """out = weight source + bias, or what else `then` says; with `normalise` of the source's RMSNorm."""
        assert weight.shape == (out.width, source.width)
        places = weight.data_ptr(), 0 if bias is None else bias.data_ptr()
        product = _product(source, out, *places, weight.element_size(), normalise, then)
        self._add([source], out, product)

    def read(
        self,
        values: Row,
        shift: Row,
        gate: Row | None,
        out: Row,
        *,
        layer: int,
        stream: int,
        heads: int,
        near: int,
        boxes: int,
        max_shift: int | None,
        sigmoid: bool = True,
        then: int = STORE,
    ) -> None:
        """out = what `starlm.ops.cpu_step.step` computes, or out += that; of one stream of a layer.

        Args:
            sigmoid: of the gate; without it the result is multiplied by the gate as it is.
        """
        channels = values.width // heads
        read = _instruction(
            kind=READ,
            # Of each sequence.
            tickets=1,
            source=values.offset,
            width=values.width,
            out=out.offset,
            then=then,
            shift=shift.offset,
            gate=-1 if gate is None else gate.offset,
            sigmoid=sigmoid and gate is not None,
            layer=layer,
            stream=stream,
            channels=channels,
            near=near * channels,
            anchored=(heads - boxes) * channels,
            furthest=np.inf if max_shift is None else max_shift,
        )
        self._add([values, shift, *([] if gate is None else [gate])], out, read)

    def attend(
        self, query: Row, key: Row, value: Row, out: Row, *, layer: int, heads: int, window: int | None
    ) -> None:
        """out = attention of a layer's heads to its rows and the new one (`starlm.nn.attention`)."""
        channels = query.width // heads
        attention = _instruction(
            kind=ATTEND,
            # Of each sequence.
            tickets=heads,
            source=query.offset,
            width=query.width,
            out=out.offset,
            layer=layer,
            channels=channels,
            key=key.offset,
            value=value.offset,
            window=window or 0,
        )
        self._add([query, key, value], out, attention)

    def head(self, weight: Float[Tensor, "V D"], softcap: float) -> None:
        """What a step ends with where logits are asked for: softcap tanh(weight RMSNorm(x) / softcap).

        Args:
            softcap: 0 is none.
        """
        self.logits = self.row("logits", len(weight))
        self._head = _head(self.x, self.logits, weight, softcap, normalise=True)
        self._head["waits"] = True
        self._of_batch.clear()

    def _add(self, sources: list[Row], out: Row, instruction: np.ndarray) -> None:
        assert out not in sources, "columns are written while others are made"
        if out in self._used or not self._written.isdisjoint(sources):
            instruction["waits"] = True
            self._used.clear()
            self._written.clear()
        self._used.update(sources, [out])
        self._written.add(out)
        self._code = np.concatenate([self._code, instruction])
        self._of_batch.clear()

    @property
    def sizes(self) -> list[int]:
        """The numbers of sequences that there are tickets for."""
        return list(dict.fromkeys(batch for batch, _ in self._of_batch))

    def run(
        self,
        table: Float[Tensor, "V D"],
        ids: Int[Tensor, " B"],
        streams: Int[np.ndarray, "L S 3 3 B"],
        origin: Int[np.ndarray, "B A"],
        turns: Float[np.ndarray, "B 2 _"],
        *,
        head: bool = False,
    ) -> Float[Tensor, "B _"]:
        """x begins as the RMSNorm of rows of the table; all instructions; the RMSNorm of x, or logits.

        Args:
            table: in the code's dtype, as is the result, but for logits, which are fp32.
            ids: of rows of the table.
            streams: of each layer and stream what `starlm.ops.cpu_step.step` wants to know.
            origin: for each anchored head the row that shift 0 reads, or -1.
            turns: cosines and sines by which attention turns pairs of channels; none for no positions.
            head: whether logits are asked for, of a code that has a head.
        """
        batch = len(ids)
        code = self._of_batch.get((batch, head))
        if code is None:
            instructions = np.concatenate([self._code, self._head]) if head else self._code
            code = self._of_batch[batch, head] = _with_tickets(instructions, batch)
        floats = np.empty(batch * self._width, np.float32)
        rows = index(ids)
        # Kernels read whatever stands at an address.
        if rows.min() < 0 or rows.max() >= len(table):
            raise IndexError(f"Token ids must be 0 to {len(table) - 1}; got {rows.tolist()}.")
        _run(code, floats, batch, array(table), rows, streams, origin, turns)
        if head:
            assert self.logits is not None
            begin, end = self.logits.offset * batch, (self.logits.offset + self.logits.width) * batch
            return torch.from_numpy(floats[begin:end]).view(batch, -1)
        out = torch.empty(batch, self.x.width, dtype=self._dtype, device="cpu")
        _normalise(floats[: batch * self.x.width].reshape(batch, -1), array(out))
        return out


def logits(x: Float[Tensor, "B K"], weight: Float[Tensor, "N K"], softcap: float) -> Float[Tensor, "B N"]:
    """softcap tanh(x weight^T / softcap) of a few rows, in fp32; a softcap of 0 is none.

    Args:
        x, weight: both of one of `starlm.ops.backends.CPU_DTYPES`, weights contiguous.
    """
    batch, (fan_out, fan_in) = len(x), weight.shape
    code = _head(Row(0, fan_in), Row(fan_in, fan_out), weight, softcap, normalise=False)
    floats = torch.empty(batch * (fan_in + fan_out), dtype=torch.float32, device="cpu")
    inputs, results = floats.split([batch * fan_in, batch * fan_out])
    inputs.view_as(x).copy_(x)
    _run(_with_tickets(code, batch), floats.numpy(), batch, array(weight), *_NOTHING)
    return results.view(batch, fan_out)


def _head(source: Row, out: Row, weight: Tensor, softcap: float, *, normalise: bool) -> np.ndarray:
    then = CAP if softcap else STORE
    head = _product(source, out, weight.data_ptr(), 0, weight.element_size(), normalise, then)
    head["cap"] = softcap
    return head


def _product(
    source: Row, out: Row, weight: int, bias: int, size: int, normalise: bool, then: int
) -> np.ndarray:
    """weight, bias: addresses; size: bytes of a weight."""
    of_row = source.width * size
    of_ticket = max(1, min(max(FEWEST_BYTES, out.width * of_row // 8), MOST_BYTES) // of_row)
    return _instruction(
        kind=PRODUCT,
        tickets=-(-out.width // of_ticket),
        source=source.offset,
        width=source.width,
        out=out.offset,
        then=then,
        weight=weight,
        bias=bias,
        columns=out.width,
        of_ticket=of_ticket,
        normalise=normalise,
    )


def _instruction(**fields: float) -> np.ndarray:
    instruction = np.zeros(1, INSTRUCTION)
    for name, value in fields.items():
        instruction[name] = value
    return instruction


def _with_tickets(code: np.ndarray, batch: int) -> np.ndarray:
    """The instructions, with the tickets that they have for so many sequences."""
    code = code.copy()
    code["tickets"][code["kind"] != PRODUCT] *= batch
    code["end"] = np.cumsum(code["tickets"])
    code["begin"] = code["end"] - code["tickets"]
    code["after"] = np.maximum.accumulate(np.where(code["waits"], code["begin"], 0))
    return code


def _run(code: np.ndarray, floats: np.ndarray, batch: int, *inputs: np.ndarray) -> None:
    counts = new_counts()
    together(lambda leads: _work(counts, code, floats.ctypes.data, batch, *inputs, leads))


# Ids, streams, origins and turns of a product alone.
_NOTHING = (
    np.zeros(0, np.int64),
    np.zeros((0, 0, 3, 3, 1), np.int64),
    np.zeros((1, 0), np.int64),
    np.zeros((1, 2, 0), np.float32),
)
