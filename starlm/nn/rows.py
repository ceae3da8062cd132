"""Rows that a layer keeps of one sequence while decoding: append, then read all that is still reachable."""

import torch
from jaxtyping import Float
from torch import Tensor

# Rows up to which a bounded buffer is made in full at once, and rows that a copy can take before it grows.
SMALL, SPARE = 1024, 64


class Rows:
    """Append-only rows [S, H, C] of one sequence; bounded, if asked, to the last ones.

    Absolute row r lies at data[r - base]. Memory grows by doubling, with `keep` up to about twice that many
    rows: when the buffer is full then, the last `keep` rows move to its front.
    """

    def __init__(self, keep: int | None = None) -> None:
        """Args: keep: how many of the last rows must stay readable; None keeps all."""
        self.keep, self.base, self.size = keep, 0, 0
        self.data: Tensor | None = None

    def append(self, rows: Float[Tensor, "T H C"], length: int) -> Float[Tensor, "S H C"]:
        """Write `rows` behind the first `length` absolute rows; all rows from `base` on.

        Gradients reach what is appended by this call, and not what was there before.
        """
        start = self.reserve(len(rows), length, rows)
        assert self.data is not None
        self.data[start : self.size] = rows.detach()
        return torch.cat([self.data[:start], rows]) if torch.is_grad_enabled() else self.data[: self.size]

    def reserve(self, count: int, length: int, like: Tensor) -> int:
        """Make room for `count` rows behind absolute row `length`; where in `data` the first belongs.

        What stands there is undefined until it is written. Rows that `keep` no longer asks for may go.

        Args:
            like: rows [..., H, C] of the same dtype and device.
        """
        if self.data is None or length - self.base + count > self.data.shape[0]:
            self._grow(count, length, like)
        start = length - self.base
        self.size = start + count
        return start

    def address_for(self, like: Tensor) -> int | None:
        """Where `data` begins in memory; None unless its rows are as those of `like`."""
        data = self.data
        if data is None or data.dtype != like.dtype or data.device != like.device:
            return None
        return data.data_ptr() if data.shape[1:] == like.shape[-2:] else None

    def _grow(self, count: int, length: int, like: Tensor) -> None:
        old, base = self.data, self.base
        capacity = 0 if old is None else old.shape[0]
        smallest = SPARE if self.keep is None else SMALL
        capacity = max(2 * capacity, length - base + count, smallest)
        if self.keep is not None and capacity >= (full := self.keep + max(self.keep, count, SPARE)):
            base = max(base, length - self.keep)
            # A buffer that one long call had stretched shrinks again here.
            capacity = full
        if old is None:
            self.data = _empty(capacity, like)
        else:
            kept = old[base - self.base : length - self.base]
            # All that may run out of memory comes first: who tries again must find the rows as they were.
            new, kept = (old, kept.clone()) if capacity == old.shape[0] else (_empty(capacity, like), kept)
            new[: len(kept)] = kept
            self.data = new
        self.base = base

    def row(self, number: int) -> Float[Tensor, "H C"]:
        """Absolute row `number`."""
        assert self.data is not None
        return self.data[number - self.base]

    def copy(self, length: int) -> "Rows":
        """An independent copy of the rows before absolute row `length`."""
        other = Rows(self.keep)
        if self.data is not None:
            other.base, other.size = self.base, max(0, min(self.size, length - self.base))
            other.data = _empty(min(self.data.shape[0], other.size + SPARE), self.data)
            other.data[: other.size] = self.data[: other.size]
        return other

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held, the room to grow included."""
        data = self.data
        return 0 if data is None else data.untyped_storage().nbytes()


def _empty(capacity: int, like: Tensor) -> Tensor:
    # An ordinary tensor even under inference_mode: the state may go on under another mode.
    with torch.inference_mode(False):
        return torch.empty(capacity, *like.shape[-2:], dtype=like.dtype, device=like.device)
