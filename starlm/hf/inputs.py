"""What transformers says by masks and positions, as the first row that each token may read."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from starlm.errors import InputError


def first_rows(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    batch: int,
    length: int,
    past: int = 0,
    begun: Sequence[int] = (),
) -> Int[Tensor, "B T"] | None:
    """The first row that each token may read; None for row 0, or behind a cache for what it remembers.

    Args:
        attention_mask: [B, past + T], 0 for padding before or after a sequence. What stands behind padding on
            the left begins there.
        position_ids: [B or 1, T]. Where they do not go up by 1, a document begins, as in packing without
            padding.
        batch: B.
        length: T, tokens of this call.
        past: tokens in the cache.
        begun: for each sequence, the first row in the cache that its last token reads.

    Raises:
        InputError: a mask of another shape, with holes, or without text that the cache has read; or a
            document that begins in the middle of a continuation.
    """
    first = None
    if attention_mask is not None:
        first = _behind_padding(attention_mask, batch, length, past, begun)
    if position_ids is not None:
        begins = _begins(position_ids, batch, length, past)
        row = past + torch.arange(length, device=begins.device)
        if first is not None:
            # Positions in the padding say nothing, nor does the first one behind it.
            begins = begins & (row > first)
        if past and begins[:, 1:].any():
            raise InputError(
                "position_ids begin a document within a continuation of a cache. Give the cache each "
                "document in a call of its own, or all of them in the first."
            )
        starts = torch.where(begins, row, 0).cummax(dim=1).values
        first = starts if first is None else torch.maximum(starts, first)
    if first is None or torch.compiler.is_compiling():
        return first
    # What began before this call is remembered, and that row 0 may be read needs no saying.
    return first if (first >= max(past, 1)).any() else None


def _behind_padding(
    mask: Tensor, batch: int, length: int, past: int, begun: Sequence[int]
) -> Int[Tensor, "B T"]:
    """Zeros on the left of each row of the mask, for all its tokens."""
    if mask.dim() != 2 or tuple(mask.shape) != (batch, past + length):
        raise InputError(
            f"attention_mask must have one entry per token, those in the cache among them: shape "
            f"{(batch, past + length)}; got {tuple(mask.shape)}. Attention masks of other forms have no "
            f"meaning for a Deformer."
        )
    real = mask.to(torch.bool)
    if not torch.compiler.is_compiling():
        rises = (real[:, 1:] & ~real[:, :-1]).sum(dim=1) + real[:, 0]
        if (rises > 1).any():
            raise InputError(
                "attention_mask has a hole: a 0 between two 1s. StarLM's tokens read the rows before them by "
                "distance, so nothing in the middle can be left out. Pad on the left or on the right, and "
                "without a mask of your own, choose a pad token that does not occur in the text."
            )
    padding = (real.cumsum(dim=1) == 0).sum(dim=1)
    if past and any(row < end < past for row, end in zip(begun, padding.tolist(), strict=True)):
        raise InputError(
            "attention_mask leaves out tokens that the cache has read as text. Give the mask when they are "
            "read."
        )
    return padding[:, None].expand(-1, length)


def _begins(positions: Tensor, batch: int, length: int, past: int) -> Tensor:
    """Whether a document begins at a token: bool [B, T]. At row 0 one does anyway, and it is not said."""
    if positions.dim() != 2 or positions.shape[1] != length or positions.shape[0] not in (1, batch):
        raise InputError(
            f"position_ids must have the shape {(batch, length)} of the tokens; got {tuple(positions.shape)}."
        )
    positions = positions.expand(batch, -1)
    head = (positions[:, :1] == 0) & (past > 0)
    return torch.cat([head, positions[:, 1:] != positions[:, :-1] + 1], dim=1)
