"""Bits per byte: a loss that does not depend on the tokenizer."""

import math
from collections.abc import Callable

import torch

from starlm.data.loader import SequentialLoader, check_tokens
from starlm.data.shards import Split
from starlm.data.tokenizer import Tokenizer
from starlm.device import takes_bfloat16
from starlm.model.model import StarLM


@torch.inference_mode()
def evaluate(
    model: StarLM,
    split: Split,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    rows: int = 8,
    precision: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Loss of a split's documents in their stored order, each token that is learned predicted once.

    Args:
        max_tokens: evaluate only this many tokens (of conversations about so many), spread over the split;
            None takes all.
        rows: rows of `context` tokens per forward pass.
        precision: auto, float32 or bfloat16.
        progress: called with tokens done and tokens in all.

    Returns:
        loss: nats per token, special tokens included.
        bits_per_byte: of the tokens that stand for text: nats / (ln 2 * UTF-8 bytes); special tokens, which
            have no bytes, count neither here nor there.
        tokens, bytes: how many were predicted.
        split_tokens: how many there would be of the whole split.

    Raises:
        InputError: another precision, or damaged data: tokens that the tokenizer does not have.
    """
    device = model.head.weight.device
    sizes = torch.from_numpy(tokenizer.byte_lengths()).to(device)
    loader = SequentialLoader(split, model.config.context, max_tokens, rows=rows)
    nats = text_nats = 0.0
    tokens = size = 0
    bfloat16 = takes_bfloat16(precision, device)
    training = model.training
    model.eval()
    try:
        for batch in loader:
            check_tokens(batch, split, len(sizes))
            inputs, targets, first = (
                torch.from_numpy(array).to(device) for array in (batch.inputs, batch.targets, batch.first)
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = model.loss(inputs, targets, first=first, reduction="none").double()
            real = targets >= 0
            lengths = torch.where(real, sizes[targets.clamp(min=0)], 0)
            nats += loss[real].sum().item()
            text_nats += loss[lengths > 0].sum().item()
            tokens += int(real.sum())
            size += int(lengths.sum())
            if progress:
                progress(tokens, loader.num_targets)
    finally:
        model.train(training)
    return {
        "loss": nats / max(tokens, 1),
        "bits_per_byte": text_nats / (math.log(2) * max(size, 1)),
        "tokens": tokens,
        "bytes": size,
        "split_tokens": loader.split_targets,
    }
