"""What one layer remembers while decoding."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from starlm.errors import InputError
from starlm.nn.rows import Rows


class LayerState:
    """Named streams of rows of one layer, all of them `lengths[b]` rows long in slot b."""

    def __init__(self, lengths: list[int], rollback: int) -> None:
        """Args:
        lengths: tokens per slot, shared with the decode state that moves it on.
        rollback: how many tokens a bounded stream can give back.
        """
        self.lengths, self.rollback = lengths, rollback
        self.streams: dict[str, Rows] = {}

    def append(self, stream: str, rows: Tensor, keep: int | None) -> tuple[Tensor, list[int]]:
        """Append rows [B, T, H, C] to a stream; see `Rows.append`.

        Args:
            keep: how far back this stream is read at most; None for all of it.
        """
        if stream not in self.streams:
            self.streams[stream] = Rows(None if keep is None else keep + self.rollback)
        return self.streams[stream].append(rows, self.lengths)

    def row_at_end(self, stream: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The row at `lengths[b]` of a stream that is kept one row ahead: [B, 1, H, C]; zeros in empty slots.

        Args:
            like: rows [B, T, H, C] of the same size, on the right device.
        """
        row = like.new_zeros(like.shape[0], 1, *like.shape[2:], dtype=dtype)
        if stream in self.streams:
            for slot, length in enumerate(self.lengths):
                if length:
                    row[slot, 0] = self.streams[stream].row(slot, length)
        return row

    def check_crop(self, slot: int, length: int) -> None:
        """Raise InputError if a bounded stream no longer has the rows that `length` tokens would need."""
        for rows in self.streams.values():
            if rows.keep is None or not rows.base[slot] or not length:
                continue
            oldest = rows.base[slot] + rows.keep - self.rollback
            if length < oldest:
                raise InputError(
                    f"Cannot crop slot {slot} to {length} tokens: its bounded rows only reach back to "
                    f"{oldest}. Fork the state before generating, or ask for more rollback "
                    f"(now {self.rollback} tokens)."
                )

    def clear(self, slot: int) -> None:
        """Forget one slot's rows."""
        for rows in self.streams.values():
            if rows.base:
                rows.base[slot] = 0

    def select(self, slots: Sequence[int], lengths: list[int]) -> "LayerState":
        """A copy with the slots named; `lengths` is the new decode state's."""
        chosen = LayerState(lengths, self.rollback)
        chosen.streams = {name: rows.select(slots) for name, rows in self.streams.items()}
        return chosen


def local(
    first: Int[Tensor, "B T"] | None, lengths: list[int], base: list[int], like: Tensor
) -> tuple[Int[Tensor, "B T"] | None, Int[Tensor, " B"] | int]:
    """`first` and `past` counted from each slot's base instead of from its first token.

    Args:
        like: a tensor on the right device.
    """
    starts = [n - b for n, b in zip(lengths, base, strict=True)]
    past = starts[0] if len(set(starts)) == 1 else torch.tensor(starts, device=like.device)
    if first is not None and any(base):
        first = (first - torch.tensor(base, device=like.device)[:, None]).clamp(min=0)
    return first, past
