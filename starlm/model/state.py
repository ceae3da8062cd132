"""The decode state: everything that a model remembers of the tokens it has read."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from starlm.errors import InputError
from starlm.nn.state import LayerState


class DecodeState:
    """State of `batch` independent sequences (slots) in a model of `num_layers` layers.

    `model(tokens, state=state)` appends tokens and moves the state on; the logits are those of one full
    forward. Slots may have different lengths. `crop` moves a pointer; `fork` and `reorder` copy.

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

    def __init__(
        self, num_layers: int, batch: int = 1, *, rollback: int = 64, orders: Sequence[int] = ()
    ) -> None:
        """Args:
        num_layers: layers of the model.
        batch: number of slots.
        rollback: tokens that `crop` can give back where `max_shift` bounds the memory. Without a bound
            any crop is possible.
        orders: n of the n-grams that heads are anchored to.
        """
        self.rollback = rollback
        self.lengths = [0] * batch
        # (row, first) per slot, for each row from which on tokens read another `first` than those before:
        # crop falls back to the one before. The tokens before any of them read from row 0.
        self.starts: list[list[tuple[int, int]]] = [[] for _ in range(batch)]
        self.layers = [LayerState(self.lengths, rollback) for _ in range(num_layers)]
        self.orders = tuple(orders)
        self.indices = _indices(self.orders, batch)

    @property
    def batch(self) -> int:
        """Number of slots."""
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the state holds."""
        rows = sum(rows.num_bytes for layer in self.layers for rows in layer.streams.values())
        return rows + sum(index.num_bytes for index in self.indices)

    def anchors(self, tokens: Int[Tensor, "B T"], first: Int[Tensor, "B T"] | None) -> Int[Tensor, "B T N"]:
        """Index the next tokens; `starlm.ops.anchors` of the whole sequence, at these tokens."""
        ids = tokens.cpu().numpy()
        starts = [None] * self.batch if first is None else list(first.long().cpu().numpy())
        found = []
        for slot, (index, start) in enumerate(zip(self.indices, starts, strict=True)):
            # After a call that failed halfway the index may be ahead.
            index.crop(self.lengths[slot])
            found.append(index.append(ids[slot], start))
        return torch.from_numpy(np.stack(found)).to(tokens.device)

    def first(self, length: int, device: torch.device) -> Int[Tensor, "B T"] | None:
        """The first row that the next `length` tokens may read: that of the last token; None for row 0."""
        rows = [starts[-1][1] if starts else 0 for starts in self.starts]
        if not any(rows):
            return None
        return torch.tensor(rows, device=device)[:, None].expand(-1, length)

    def advance(self, length: int, first: Int[Tensor, "B T"] | None = None) -> None:
        """Count `length` more tokens in every slot; the layers have appended their rows already."""
        if first is not None:
            for starts, begin, rows in zip(self.starts, self.lengths, first.tolist(), strict=True):
                for row, wanted in enumerate(rows, begin):
                    if wanted != (starts[-1][1] if starts else 0):
                        starts.append((row, wanted))
        for slot in range(self.batch):
            self.lengths[slot] += length

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Forget all but the first `lengths` tokens of each slot (one number for all, or one each).

        Raises:
            InputError: more tokens than there are, or, with `max_shift`, more than `rollback` given back.
        """
        wanted = [lengths] * self.batch if isinstance(lengths, int) else list(lengths)
        for slot, (keep, have) in enumerate(zip(wanted, self.lengths, strict=True)):
            if not 0 <= keep <= have:
                raise InputError(f"Cannot crop slot {slot} to {keep} tokens: it has {have}.")
            for layer in self.layers:
                layer.check_crop(slot, keep)
        for slot, keep in enumerate(wanted):
            self.lengths[slot] = keep
            if self.indices:
                self.indices[slot].crop(keep)
            starts = self.starts[slot]
            while starts and starts[-1][0] >= keep:
                starts.pop()
            if not keep:
                for layer in self.layers:
                    layer.clear(slot)

    def reorder(self, slots: Sequence[int]) -> "DecodeState":
        """A copy whose slot i is this state's slot slots[i]; slots may repeat (beam search, n samples)."""
        chosen = DecodeState(len(self.layers), len(slots), rollback=self.rollback, orders=self.orders)
        chosen.indices = [self.indices[slot].copy() for slot in slots] if self.indices else []
        chosen.lengths[:] = [self.lengths[slot] for slot in slots]
        chosen.starts = [list(self.starts[slot]) for slot in slots]
        chosen.layers = [layer.select(slots, chosen.lengths) for layer in self.layers]
        return chosen

    def fork(self, copies: int = 1) -> "DecodeState":
        """An independent copy; each slot `copies` times in a row."""
        return self.reorder([slot for slot in range(self.batch) for _ in range(copies)])


def _indices(orders: tuple[int, ...], batch: int) -> list:
    if not orders:
        return []
    from starlm.ops.ngrams import NgramIndex  # numba takes half a second to import

    return [NgramIndex(orders) for _ in range(batch)]
