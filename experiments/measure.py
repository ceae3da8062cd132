"""Where a model's loss lies: by position in the context, and on recall tokens against the rest."""

from itertools import pairwise

import torch

from starlm.data.loader import SequentialLoader
from starlm.data.shards import Split
from starlm.model.model import StarLM
from starlm.ops import anchors

POSITIONS = (32, 128, 256)


@torch.inference_mode()
def by_position_and_recall(model: StarLM, split: Split, max_tokens: int) -> dict:
    """Mean loss in nats per token.

    Returns:
        by_position: from each of 0, 32, 128, 256 on to the next, position counted from the row's beginning.
        recall: of tokens that complete a bigram seen earlier in their document and row (Zoology, arXiv
            2312.04927); other: of the rest; and the share of recall tokens. tokens_measured: of how many.
    """
    length = model.config.context
    bounds = [0, *(p for p in POSITIONS if p < length), length]
    device = model.head.weight.device
    sums = torch.zeros(len(bounds) - 1, 2, dtype=torch.float64, device=device)
    kinds = torch.zeros(2, 2, dtype=torch.float64, device=device)
    for batch in SequentialLoader(split, length, max_tokens, rows=8):
        arrays = (batch.inputs, batch.targets, batch.first)
        inputs, targets, first = (torch.from_numpy(array).to(device) for array in arrays)
        loss = model.loss(inputs, targets, first=first, reduction="none").double()
        real = targets >= 0
        for number, (begin, end) in enumerate(pairwise(bounds)):
            part = real[:, begin:end]
            sums[number] += torch.stack([loss[:, begin:end][part].sum(), part.sum()])
        # The bigram (input, target) ends at the target's row; it is a recall token if it has an anchor there.
        whole = torch.cat([inputs, targets[:, -1:].clamp(min=0)], dim=1)
        starts = torch.cat([first, first[:, -1:]], dim=1)
        seen = anchors(whole, [2], first=starts)[:, 1:, 0] >= 0
        for number, chosen in enumerate((real & seen, real & ~seen)):
            kinds[number] += torch.stack([loss[chosen].sum(), chosen.sum()])
    means, (recall, other) = sums[:, 0] / sums[:, 1].clamp(min=1), kinds
    return {
        "by_position": {str(begin): round(m.item(), 4) for begin, m in zip(bounds, means, strict=False)},
        "recall": round((recall[0] / recall[1]).item(), 4),
        "other": round((other[0] / other[1]).item(), 4),
        "tokens_measured": int(kinds[:, 1].sum()),
        "recall_share": round((recall[1] / (recall[1] + other[1])).item(), 4),
    }
