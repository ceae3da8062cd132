"""The decode state: everything that a model remembers of the tokens it has read."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from starlm.errors import InputError
from starlm.nn.attention import Attention
from starlm.nn.deformer import Deformer
from starlm.nn.heads import lookups
from starlm.nn.origins import by_order
from starlm.nn.state import LayerState, Streams
from starlm.ops.deform import check_rows

# Of layers whose rows a step can write by itself.
Mixer = Deformer | Attention


@dataclass(frozen=True, eq=False)
class Places:
    """Where the buffers of a slot stand, until one is full or emptied, or layers append to them on their own.

    A copy of a slot, which has other buffers, has none.
    """

    table: Int[np.ndarray, "L S 3 3"]
    """Of each layer, stream and kind of heads: address, rows less tokens, row 0 as it is counted there."""
    full: int
    """Tokens at which a buffer is full."""
    layout: tuple
    """What the rows are like: `row_layout`."""

    def __reduce__(self):
        return type(None), ()


@lru_cache(maxsize=8)
def _side_by_side(places: tuple[Places, ...]) -> Int[np.ndarray, "L S 3 3 B"]:
    """The tables of slots, which stay the same for many steps."""
    return np.stack([one.table for one in places], axis=-1)


class StepInputs(NamedTuple):
    """What a step of one token of each slot is given, beside the model."""

    tokens: Int[Tensor, "B 1"]
    table: Int[np.ndarray, "L S 3 3 B"]
    """See `DecodeState.step_table`."""
    origin: Int[np.ndarray, "B A"]
    """For each anchored head the row that shift 0 reads, or -1."""


def row_layout(mixers: Iterable[Mixer], like: Tensor) -> tuple:
    """What rows of these layers, in the dtype and on the device of `like`, must agree in."""
    return like.dtype, like.device, *(mixer.row_layout for mixer in mixers)


def layout_of(layers: Iterable[nn.Module]) -> tuple:
    """What a decode state depends on: n of the n-grams, and of each layer what its rows are like."""
    layers = list(layers)
    orders = lookups(n for layer in layers for n in getattr(layer, "orders", ()))
    return orders, *((type(layer).__name__, getattr(layer, "row_layout", ())) for layer in layers)


def positioned(model: Any) -> int | None:
    """The number of one of the layers of attention, if any: those of a step agree on positions."""
    return next((n for n, block in enumerate(model.blocks) if isinstance(block.mixer, Attention)), None)


class Slot:
    """What is remembered of one sequence: rows per layer, and the index of its n-grams."""

    def __init__(
        self, layout: tuple, *, rollback: int, rows_device: torch.device | None, indexed: bool = True
    ) -> None:
        """Args: see `DecodeState.of`.

        layout: `layout_of` the layers.
        indexed: make the index of n-grams, where there are any.
        """
        self.length, self.layout = 0, layout
        # Whether a call of the model works on it.
        self.busy = False
        # (row, first) for each row from which on tokens read another `first` than those before: crop falls
        # back to the one before. The tokens before any of them read from row 0.
        self.starts: list[tuple[int, int]] = []
        orders, *layers = layout
        self.layers = [Streams(rollback) for _ in layers]
        self.rollback, self.rows_device = rollback, rows_device
        self.places: Places | None = None
        self.index = None
        if orders and indexed:
            from starlm.ops.ngrams import NgramIndex  # numba takes half a second to import

            self.index = NgramIndex(orders)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "busy": False}

    @property
    def first(self) -> int:
        """The first row that the next tokens may read: that of the last one."""
        return self.starts[-1][1] if self.starts else 0

    @property
    def oldest(self) -> int:
        """The fewest tokens above 0 that a crop can leave."""
        return max((layer.oldest for layer in self.layers), default=0)

    @property
    def bounded(self) -> bool:
        """Whether some rows are kept for a while only, so that a crop cannot go back far."""
        return any(rows.keep is not None for layer in self.layers for rows in layer.rows.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held."""
        rows = sum(layer.num_bytes for layer in self.layers)
        return rows + (self.index.num_bytes if self.index else 0)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens, which it is known to be able to."""
        self.length = length
        if self.index:
            self.index.crop(length)
        while self.starts and self.starts[-1][0] >= length:
            self.starts.pop()
        if not length:
            self.places = None
            for layer in self.layers:
                layer.clear()

    def make_places(self, mixers: Sequence[Mixer], like: Tensor, layout: tuple) -> Places | None:
        """Room for one more token, whose rows each of `mixers` writes; see `DecodeState.step_table`."""
        places = self.places
        if places is not None and self.length < places.full and places.layout == layout:
            return places
        self.places = None
        table = np.zeros((len(mixers), max(len(mixer.streams) for mixer in mixers), 3, 3), np.int64)
        row_0 = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
        for mixer, streams, of_layer in zip(mixers, self.layers, table, strict=True):
            layer = LayerState([streams], [self.length])
            for stream, place in zip(mixer.streams, of_layer, strict=False):
                found = mixer.make_room(stream, like, row_0, layer)
                if found is None:
                    return None
                place[:] = found[..., 0]
        table[..., 1] -= self.length
        self.places = Places(table, min(layer.take() for layer in self.layers), layout)
        return self.places

    def copy(self, length: int) -> "Slot":
        """An independent copy of the first `length` tokens, which a crop could leave."""
        if self.busy:
            raise _busy()
        other = Slot(self.layout, rollback=self.rollback, rows_device=self.rows_device, indexed=False)
        other.layers = [layer.copy(length) for layer in self.layers]
        other.starts, other.length = list(self.starts), self.length
        other.index = self.index.copy() if self.index else None
        other.crop(length)
        return other


def _busy() -> InputError:
    return InputError(
        "A call of the model works on this decode state. Let threads take turns, or give each a copy that "
        "was made before (state.fork())."
    )


class _Working:
    # Not a generator's context: that takes five microseconds of every token.
    def __init__(self, slots: list[Slot]) -> None:
        self._slots = slots

    def __enter__(self) -> None:
        for number, slot in enumerate(self._slots):
            if slot.busy:
                for mine in self._slots[:number]:
                    mine.busy = False
                raise _busy()
            slot.busy = True

    def __exit__(self, *error: object) -> None:
        for slot in self._slots:
            slot.busy = False


@dataclass(frozen=True, eq=False)
class Extension:
    """What layers are given while a decode state takes the next tokens."""

    layers: list[LayerState]
    """For each layer its part of the state."""
    first: Int[Tensor, "B T"] | None
    """The first row that each token may read; None for row 0."""
    origins: dict[int, Int[Tensor, "B T"]]
    """For each n the rows that anchored heads measure from."""


class DecodeState:
    """State of independent sequences (slots) in a model; made by `StarLM.new_state`, or `of` layers.

    `model(tokens, state=state)` appends tokens to every slot and moves the state on; the logits are those of
    one full forward. Slots may have different lengths. `pick` and `join` share slots, so any choice of slots
    runs in one call; `crop` moves a pointer; `fork` and `reorder` copy. A slot is for one thread at a time.

    Example:
        >>> from starlm import StarLM, StarLMConfig
        >>> model = StarLM(StarLMConfig(depth=1, vocab_size=50))
        >>> state = model.new_state()
        >>> logits = model(torch.tensor([[1, 2, 3]]), state=state)
        >>> state.lengths
        [3]
        >>> state.crop(1); state.lengths
        [1]
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        """Args: slots: of one model, each once; they are shared, not copied."""
        self.slots = list(slots)
        if not self.slots or len({id(slot) for slot in self.slots}) < len(self.slots):
            raise InputError(
                f"A decode state needs at least one slot, and each only once; got {len(self.slots)}. To "
                f"repeat a slot, copy it: state.reorder([0, 0])."
            )

    @classmethod
    def of(
        cls,
        layers: Iterable[nn.Module],
        batch: int = 1,
        *,
        rollback: int = 64,
        rows_device: str | torch.device | None = None,
    ) -> "DecodeState":
        """An empty state of `batch` sequences for these layers of any model, in the order in which they run.

        Args:
            layers: Deformers, and others that take a `state` as they do.
            rollback: tokens that `crop` can give back where `max_shift` or a window bounds the memory.
                Without a bound any crop is possible.
            rows_device: where anchored heads keep their rows, which grow with the context; default the
                model's device. "cpu" keeps them in host memory: their reads take place there, and per token
                and head only the new row, the shifts and what was read travel.

        Raises:
            InputError: rollback below 0.

        Example:
            >>> from starlm import Deformer
            >>> layers = [Deformer(32, heads=4, kinds=("now", "bigram")) for _ in range(2)]
            >>> state, tokens, x = DecodeState.of(layers), torch.tensor([[3, 4]]), torch.randn(1, 2, 32)
            >>> with torch.no_grad(), state.extend(tokens) as rows:
            ...     for layer, kept in zip(layers, rows.layers):
            ...         x = x + layer(x, origins=rows.origins, first=rows.first, state=kept)
            >>> state.lengths
            [2]
        """
        if rollback < 0:
            raise InputError(f"rollback must be 0 or more; got {rollback}.")
        place = None if rows_device is None else torch.device(rows_device)
        layout = layout_of(layers)
        return cls(Slot(layout, rollback=rollback, rows_device=place) for _ in range(batch))

    @classmethod
    def join(cls, states: Iterable["DecodeState"]) -> "DecodeState":
        """One state of all their slots, shared: tokens appended to it are appended to them."""
        return cls(slot for state in states for slot in state.slots)

    def pick(self, slots: Sequence[int]) -> "DecodeState":
        """One state of the slots named, in that order, shared as by `join`."""
        return DecodeState(self.slots[slot] for slot in slots)

    @property
    def batch(self) -> int:
        """Number of slots."""
        return len(self.slots)

    @property
    def lengths(self) -> list[int]:
        """Tokens in each slot."""
        return [slot.length for slot in self.slots]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the slots hold, room to grow included."""
        return sum(slot.num_bytes for slot in self.slots)

    def _layers(self, first: Tensor | None) -> list[LayerState]:
        lengths, place = self.lengths, self.slots[0].rows_device
        starts = [slot.first for slot in self.slots] if first is None else None
        for slot in self.slots:
            slot.places = None
        columns = zip(*(slot.layers for slot in self.slots), strict=True)
        return [LayerState(streams, lengths, place, starts) for streams in columns]

    @contextmanager
    def extend(
        self, tokens: Int[Tensor, "B T"], first: Int[Tensor, "B T"] | None = None
    ) -> Iterator[Extension]:
        """A context to run every layer once on the next tokens in; at its end they are part of the state.

        If a layer fails or is left out, the state stays as it was. The slots are this thread's meanwhile.
        Gradients reach what this call appends, not what was there before; without them (`torch.no_grad`) no
        row is copied.

        Args:
            tokens: ids of the next T tokens of every slot.
            first: the first row that each may read, absolute; default that of the token before. The state
                remembers it for the tokens that follow.

        Raises:
            InputError: tokens or `first` that do not fit the slots; slots of several models; another thread
                works on one of them; a layer that has not run, or on other tokens.
        """
        self.check_tokens(tokens, first)
        self.check_layout(self.slots[0].layout)
        length = tokens.shape[1]
        with self.working():
            reach = self.first(length, tokens.device) if first is None else first
            rows = Extension(self._layers(first), reach, self._origins(tokens, reach))
            yield rows
            for number, layer in enumerate(rows.layers):
                if layer.taken != length:
                    raise InputError(
                        f"Layer {number} has read {layer.taken or 0} of {length} new tokens. Run every layer "
                        f"on all of them, each with its own of `layers` as state."
                    )
            self.advance(length, first)

    def check_tokens(self, tokens: Tensor, first: Tensor | None) -> None:
        """Refuse what are no token ids, and tokens and `first` of another shape than the slots'."""
        whole = not tokens.is_floating_point() and tokens.dtype != torch.bool
        if tokens.dim() != 2 or tokens.shape[0] != self.batch or not whole:
            raise InputError(
                f"The decode state has {self.batch} slots, so it takes token ids [{self.batch}, T], whole "
                f"numbers; got {tokens.dtype} of shape {list(tokens.shape)}. Make one for as many: "
                f"model.new_state(batch)."
            )
        check_rows("A decode state", "first", first, tuple(tokens.shape))

    def _origins(self, tokens: Tensor, first: Tensor | None) -> dict[int, Int[Tensor, "B T"]]:
        orders = self.slots[0].layout[0]
        if not orders:
            return {}
        starts = None if first is None else first.long().cpu().numpy()
        return by_order(torch.from_numpy(self.anchors(tokens, starts)).to(tokens.device), orders)

    def step_table(
        self, mixers: Sequence[Mixer], like: Tensor, layout: tuple, starts: Int[np.ndarray, " B"]
    ) -> Int[np.ndarray, "L S 3 3 B"] | None:
        """Room for one more token in every slot: what `Deformer.make_room` says, of all layers at once.

        Zeros for streams that a layer has fewer than another. None if a slot holds rows of another dtype,
        device or shape.

        Args:
            mixers: of the model's layers.
            like: in the dtype and on the device of the rows.
            layout: `row_layout` of the mixers and `like`.
            starts: for each slot the first row that its token may read.
        """
        found = [slot.make_places(mixers, like, layout) for slot in self.slots]
        there = tuple(places for places in found if places is not None)
        if len(there) < len(found):
            return None
        table = _side_by_side(there).copy()
        table[..., 1, :] += np.array(self.lengths)
        table[..., 2, :] += starts
        return table

    def anchors(
        self, tokens: Int[Tensor, "B T"], first: Int[np.ndarray, "B T"] | None
    ) -> Int[np.ndarray, "B T N"]:
        """Index the next tokens; `starlm.ops.anchors` of the whole sequence, at these tokens.

        Args:
            tokens: on any device; the host waits for them.
            first: the first row that each may read, int64; None for row 0.
        """
        from starlm.ops.ngrams import append  # numba takes half a second to import

        indices = []
        for slot in self.slots:
            assert slot.index is not None
            # After a call that failed halfway it may be ahead.
            slot.index.crop(slot.length)
            indices.append(slot.index)
        return append(indices, tokens.cpu(), first)

    def first(self, length: int, device: torch.device) -> Int[Tensor, "B T"] | None:
        """The first row that the next `length` tokens may read: that of the last token; None for row 0."""
        rows = [slot.first for slot in self.slots]
        if not any(rows):
            return None
        return torch.tensor(rows, device=device)[:, None].expand(-1, length)

    def advance(self, length: int, first: Int[Tensor, "B T"] | None = None) -> None:
        """Count `length` more tokens in every slot; the layers have appended their rows already."""
        if first is not None:
            for slot, rows in zip(self.slots, first.tolist(), strict=True):
                for row, wanted in enumerate(rows, slot.length):
                    if wanted != slot.first:
                        slot.starts.append((row, wanted))
        for slot in self.slots:
            slot.length += length

    def check_layout(self, layout: tuple) -> None:
        """Refuse the states of another model: what its rows are would be chance.

        Args:
            layout: `layout_of` the layers of the model that asks.

        Raises:
            InputError: a slot has another one.
        """
        for slot in self.slots:
            if slot.layout != layout:
                pairs = zip_longest(slot.layout, layout)
                there, here = next((there, here) for there, here in pairs if there != here)
                raise InputError(
                    f"The decode state is that of another model, or a layer has changed since: {there} there "
                    f"and {here} here. Use model.new_state(batch)."
                )

    def working(self) -> "_Working":
        """A context, within which the slots are this thread's: compiled code that works on them sees no lock.

        Raises:
            InputError: on entering, if another thread works on one of them.
        """
        return _Working(self.slots)

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Forget all but the first `lengths` tokens of each slot (one number for all, or one each).

        Raises:
            InputError: more tokens than there are, or, with `max_shift`, more than `rollback` given back.
        """
        wanted = self._lengths(lengths)
        with self.working():
            for slot, keep in zip(self.slots, wanted, strict=True):
                slot.crop(keep)

    def reorder(self, slots: Sequence[int]) -> "DecodeState":
        """A copy whose slot i is this state's slot slots[i]; slots may repeat (beam search, n samples)."""
        return DecodeState(self.slots[slot].copy(self.slots[slot].length) for slot in slots)

    def fork(self, copies: int = 1, *, lengths: int | Sequence[int] | None = None) -> "DecodeState":
        """An independent copy; each slot `copies` times in a row.

        Args:
            lengths: copy only so many tokens, as if the copy were cropped.

        Raises:
            InputError: as for `crop`.
        """
        wanted = self.lengths if lengths is None else self._lengths(lengths)
        pairs = zip(self.slots, wanted, strict=True)
        return DecodeState(slot.copy(keep) for slot, keep in pairs for _ in range(copies))

    def _lengths(self, lengths: Any) -> list[int]:
        """One length per slot, all of them possible for a crop."""
        given = list(lengths) if isinstance(lengths, Iterable) else [lengths] * self.batch
        if len(given) != self.batch or not all(isinstance(keep, Integral) for keep in given):
            raise InputError(
                f"A decode state of {self.batch} slots needs as many whole lengths, or one for all; got "
                f"{given}."
            )
        wanted = [int(keep) for keep in given]
        for number, (slot, keep) in enumerate(zip(self.slots, wanted, strict=True)):
            if not 0 <= keep <= slot.length:
                raise InputError(f"Cannot crop slot {number} to {keep} tokens: it has {slot.length}.")
            if 0 < keep < (oldest := slot.oldest):
                raise InputError(
                    f"Cannot crop slot {number} to {keep} tokens: its bounded rows only reach back to "
                    f"{oldest}. Fork the state before generating, or ask for more rollback "
                    f"(now {slot.rollback} tokens)."
                )
        return wanted
