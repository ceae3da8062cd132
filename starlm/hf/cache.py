"""The decode state as transformers' cache."""

import torch
from transformers.cache_utils import Cache

from starlm.model.state import DecodeState


class StarLMCache(Cache):
    """A `DecodeState` under the names that `generate` calls. `generate` makes one where none is given.

    To go on from one call to the next, keep it::

        cache = StarLMCache(model.new_state(batch=1))
        model.generate(**inputs, cache=cache)
    """

    def __init__(self, state: DecodeState) -> None:
        """Args: state: from `new_state` of the model that will fill it."""
        super().__init__(layers=[])
        self.state = state

    def __repr__(self) -> str:
        return (
            f"StarLMCache({self.batch_size} x {self.get_seq_length()} tokens, {self.state.num_bytes} bytes)"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the cache holds, padding among them."""
        return max(self.state.lengths, default=0)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of an attention mask for `query_length` more tokens, and 0, where they begin."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens; transformers counts them below 0.

        Raises:
            ValueError: a count above 0, or more tokens than the state can give back.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or minus the number of tokens to remove; got {tokens_to_remove}.")
        if tokens_to_remove:
            self.state.crop([length + tokens_to_remove for length in self.state.lengths])

    def reset(self) -> None:
        """Forget all tokens."""
        self.state.crop(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i be what row beam_idx[i] was."""
        self.state = self.state.reorder(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        self.state = self.state.reorder(torch.arange(self.batch_size)[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.state = self.state.fork(repeats)

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.state.lengths)

    @property
    def is_compileable(self) -> bool:
        """False: rows are appended to buffers that grow."""
        return False

    @property
    def is_croppable(self) -> bool:
        """True; how far, `rollback` says."""
        return True

    @property
    def is_initialized(self) -> bool:
        """Whether it holds tokens."""
        return self.get_seq_length() > 0

    # One entry stands for all layers: they always hold the same tokens.

    @property
    def is_linear(self) -> list[bool]:
        """[False]: what is fed again would be counted twice."""
        return [False]

    @property
    def is_sliding(self) -> list[bool]:
        """[False]"""
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        """[False]"""
        return [False]
