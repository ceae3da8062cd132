"""Rows that a layer keeps while decoding: append, then read everything that is still reachable."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Rows up to which a bounded buffer is made in full at once.
SMALL = 1024


class Rows:
    """Append-only rows [B, S, H, C], one position per batch row (slot); bounded, if asked, to the last ones.

    Absolute row r of slot b lies at r - base[b]. Memory grows by doubling, with `keep` up to about twice that
    many rows: when the buffer is full then, the last `keep` rows move to its front.
    """

    def __init__(self, keep: int | None = None) -> None:
        """Args: keep: how many of the last rows must stay readable; None keeps all."""
        self.keep = keep
        self.base: list[int] = []
        self.data: Tensor | None = None

    def append(
        self, rows: Float[Tensor, "B T H C"], lengths: Sequence[int]
    ) -> tuple[Float[Tensor, "B S H C"], list[int]]:
        """Write `rows` behind the first `lengths[b]` absolute rows of each slot.

        Returns:
            All rows from base[b] on (what lies beyond a slot's end is undefined), and each slot's base:
            the absolute row that stands at 0.
        """
        length = rows.shape[1]
        self._reserve(rows, lengths)
        assert self.data is not None
        starts = [n - base for n, base in zip(lengths, self.base, strict=True)]
        if len(set(starts)) == 1:
            self.data[:, starts[0] : starts[0] + length] = rows
        else:
            for slot, start in enumerate(starts):
                self.data[slot, start : start + length] = rows[slot]
        return self.data[:, : max(starts) + length], list(self.base)

    def row(self, slot: int, number: int) -> Float[Tensor, "H C"]:
        """Absolute row `number` of a slot."""
        assert self.data is not None
        return self.data[slot, number - self.base[slot]]

    def _reserve(self, rows: Tensor, lengths: Sequence[int]) -> None:
        """Make room for the new rows; drop, if bounded, those that `keep` no longer asks for."""
        batch, length, *shape = rows.shape
        self.base = self.base or [0] * batch
        capacity = 0 if self.data is None else self.data.shape[1]
        needed = max(n - base for n, base in zip(lengths, self.base, strict=True)) + length
        if self.data is not None and needed <= capacity:
            return
        old, old_base = self.data, list(self.base)
        capacity = max(2 * capacity, needed, 64 if self.keep is None else SMALL)
        if self.keep is not None and capacity >= (full := self.keep + max(self.keep, length, 64)):
            self.base = [max(base, n - self.keep) for base, n in zip(old_base, lengths, strict=True)]
            capacity = full
            # A buffer that one long call had stretched shrinks again here.
            reuse = old is not None and old.shape[1] == capacity
            if reuse and old is not None:
                for slot, (n, base, was) in enumerate(zip(lengths, self.base, old_base, strict=True)):
                    old[slot, : n - base] = old[slot, base - was : n - was].clone()
                return
        self.data = rows.new_zeros(batch, capacity, *shape)
        if old is not None:
            for slot, (n, base, was) in enumerate(zip(lengths, self.base, old_base, strict=True)):
                self.data[slot, : n - base] = old[slot, base - was : n - was]

    def select(self, slots: Sequence[int]) -> "Rows":
        """A copy with the slots named, in that order; a slot may be named several times."""
        chosen = Rows(self.keep)
        if self.data is not None:
            chosen.base = [self.base[slot] for slot in slots]
            chosen.data = self.data[torch.tensor(slots, device=self.data.device)]
        return chosen

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held."""
        return 0 if self.data is None else self.data.nbytes
