"""What layers remember while decoding: named streams of rows, for each sequence (slot) its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from starlm.nn.rows import Rows
from starlm.ops import deform
from starlm.ops.box import box, prefix_sums


class Streams:
    """The streams of rows that one layer keeps of one sequence."""

    def __init__(self, rollback: int) -> None:
        """Args: rollback: how many tokens a bounded stream can give back."""
        self.rollback = rollback
        self.rows: dict[str, Rows] = {}

    def get(self, name: str, keep: int | None) -> Rows:
        """The stream of this name; a new one is read at most `keep` rows back, None for all."""
        rows = self.rows.get(name)
        if rows is None:
            rows = self.rows[name] = Rows(None if keep is None else keep + self.rollback)
        return rows

    def take(self) -> int:
        """Count all memory as rows, so that tokens may be written unasked; the length at which it is full."""
        lengths = []
        for rows in self.rows.values():
            assert rows.data is not None
            rows.size = len(rows.data)
            lengths.append(rows.base + rows.size)
        # Sums are kept one row ahead.
        return min(lengths) - 1

    @property
    def oldest(self) -> int:
        """The fewest tokens above 0 that a crop can leave: what bounded streams still have the rows for."""
        reach = ((rows.base, rows.keep) for rows in self.rows.values())
        return max(
            (base + keep - self.rollback for base, keep in reach if base and keep is not None), default=0
        )

    def clear(self) -> None:
        """Forget all rows; the memory stays."""
        for rows in self.rows.values():
            rows.base = rows.size = 0

    def copy(self, length: int) -> "Streams":
        """An independent copy of what `length` tokens need."""
        other = Streams(self.rollback)
        # Sums are kept one row ahead.
        other.rows = {name: rows.copy(length + 1) for name, rows in self.rows.items()}
        return other

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held; may be asked while another thread appends."""
        return sum(rows.num_bytes for rows in list(self.rows.values()))


class LayerState:
    """The slots of one layer during one call of the model: each of B sequences has its own streams.

    All but `make_room` append the rows of T new tokens to a stream of every slot. `first` holds absolute
    rows, as for `Deformer.forward`.
    """

    def __init__(
        self,
        slots: Sequence[Streams],
        lengths: Sequence[int],
        rows_device: torch.device | None = None,
        starts: Sequence[int] | None = None,
    ) -> None:
        """Args:
        slots: of this layer, one per sequence.
        lengths: tokens that each slot has before the call.
        rows_device: where rows that are read by an origin are kept; None for the model's device.
        starts: `first` of every slot, where it is known without asking the model's device.
        """
        self.slots, self.lengths, self.rows_device, self.starts = slots, lengths, rows_device, starts
        # New tokens whose rows were written; None before any were.
        self.taken: int | None = None

    def append(
        self, stream: str, rows: Float[Tensor, "B T H C"], keep: int | None
    ) -> list[tuple[Float[Tensor, "1 S H C"], int]]:
        """For each slot all its rows, the new ones last, and the absolute row that stands first among them.

        Args:
            keep: how far back this stream is read at most; None for all of it.
        """
        kept, self.taken = [], rows.shape[1]
        for slot, length, new in zip(self.slots, self.lengths, rows, strict=True):
            held = slot.get(stream, keep)
            kept.append((held.append(new, length)[None], held.base))
        return kept

    def read(
        self,
        stream: str,
        values: Float[Tensor, "B T H C"],
        shift: Float[Tensor, "B T H C"],
        *,
        keep: int | None = None,
        origin: Int[Tensor, "B T H"] | None = None,
        first: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T H C"]:
        """`deform` of the stream's rows; see `append` for `keep`."""
        if origin is not None and self.rows_device is not None and self.rows_device != values.device:
            place = self.rows_device
            start = None if first is None else first.to(place)
            there = self._read(stream, values.to(place), shift.to(place), keep, origin.to(place), start)
            return there.to(values.device)
        return self._read(stream, values, shift, keep, origin, first)

    def _read(
        self,
        stream: str,
        values: Tensor,
        shift: Tensor,
        keep: int | None,
        origin: Tensor | None,
        first: Tensor | None,
    ) -> Tensor:
        read = []
        for slot, (rows, base) in enumerate(self.append(stream, values, keep)):
            one = slice(slot, slot + 1)
            start = _local(first, one, base)
            anchor = None if origin is None else origin[one] - base if base else origin[one]
            past = self.lengths[slot] - base
            read.append(deform(rows, shift[one], origin=anchor, first=start, past=past))
        return _joined(read)

    def box(
        self,
        stream: str,
        values: Float[Tensor, "B T H C"],
        width: Float[Tensor, "B T H C"],
        *,
        keep: int | None = None,
        first: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T H C"], Float[Tensor, "B T H C"]]:
        """`starlm.ops.box.box` of the values, whose sums the stream holds, one row ahead."""
        means, widths, self.taken = [], [], values.shape[1]
        for slot, (streams, length) in enumerate(zip(self.slots, self.lengths, strict=True)):
            one, rows = slice(slot, slot + 1), streams.get(stream, _sums(keep))
            sums = prefix_sums(values[one], rows.row(length)[None, None] if length else None)
            kept = rows.append(sums[0], length)[None]
            start = _local(first, one, rows.base)
            mean, clipped = box(kept, width[one], first=start, past=length - rows.base)
            means.append(mean)
            widths.append(clipped)
        return _joined(means), _joined(widths)

    def recent(self, stream: str, rows: Float[Tensor, "B T H C"], back: int) -> Float[Tensor, "B T2 H C"]:
        """The last `back` rows before the new ones, zeros where there were none, and the new ones."""
        found = []
        for kept, _ in self.append(stream, rows, keep=back):
            part = kept[:, -(back + rows.shape[1]) :]
            missing = back + rows.shape[1] - part.shape[1]
            found.append(torch.nn.functional.pad(part, (0, 0, 0, 0, missing, 0)))
        return _joined(found)

    def make_room(
        self,
        stream: str,
        keep: int | None,
        like: Tensor,
        first: Tensor | None,
        *,
        count: int = 1,
        sums: bool = False,
    ) -> Int[np.ndarray, "3 B"] | None:
        """Room for more rows in each slot's buffer: its address, its rows so far, the first row to read.

        The rows are for the caller to write. None if a slot holds rows of another dtype, device or shape.

        Args:
            like: rows [..., H, C] in the dtype and on the device of the new ones.
            first: [B, T], absolute, of which that of the first new token counts.
            count: T.
            sums: the stream is one of `box`.
        """
        addresses, pasts, bases, self.taken = [], [], [], count
        for streams, length in zip(self.slots, self.lengths, strict=True):
            rows = streams.get(stream, _sums(keep) if sums else keep)
            if sums and not length:
                rows.append(like.new_zeros(1, *like.shape[-2:]), 0)
            pasts.append(rows.reserve(count, length + sums, like))
            if (address := rows.address_for(like)) is None:
                return None
            addresses.append(address)
            bases.append(rows.base)
        starts = self.starts
        if starts is None:
            starts = [0] * len(bases) if first is None else first[:, 0].cpu().numpy()
        return np.array([addresses, pasts, starts - np.array(bases)])


class NoState:
    """What reads as a `LayerState` does where there are no earlier tokens, and keeps nothing."""

    def read(
        self,
        stream: str,
        values: Float[Tensor, "B T H C"],
        shift: Float[Tensor, "B T H C"],
        *,
        keep: int | None = None,
        origin: Int[Tensor, "B T H"] | None = None,
        first: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T H C"]:
        """As `LayerState.read`."""
        return deform(values, shift, origin=origin, first=first)

    def box(
        self,
        stream: str,
        values: Float[Tensor, "B T H C"],
        width: Float[Tensor, "B T H C"],
        *,
        keep: int | None = None,
        first: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T H C"], Float[Tensor, "B T H C"]]:
        """As `LayerState.box`."""
        return box(prefix_sums(values), width, first=first)


@dataclass(frozen=True, eq=False)
class Reserved:
    """What a layer is given in place of a `LayerState` where its rows have been made room for before."""

    streams: Int[Tensor, "S 3 3 B"]
    """Of each of the layer's streams what its `make_room` says, on the model's device."""
    origin: Int[Tensor, "B A"] | None
    """The row that shift 0 of each anchored head reads; -1 for none."""
    turns: Float[Tensor, "B 2 _"] | None
    """`Attention.turns` of the new tokens; None in a model without attention."""


def _sums(keep: int | None) -> int | None:
    """`keep` of a stream of sums: the one that goes on must stay."""
    return None if keep is None else max(keep, 1)


def _local(first: Tensor | None, one: slice, base: int) -> Tensor | None:
    """`first` of one slot, counted from `base`."""
    if first is None:
        return None
    return (first[one] - base).clamp(min=0) if base else first[one]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
