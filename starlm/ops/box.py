"""Means over windows that end at the query: `deform` applied to prefix sums."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from starlm.ops.deform import deform


def prefix_sums(
    values: Float[Tensor, "B T H C"], start: Float[Tensor, "B 1 H C"] | None = None
) -> Float[Tensor, "B T1 H C"]:
    """Sums of all rows before each row and behind the last, T + 1 of them, in fp64.

    In fp64 a sum over a million rows still has ten digits behind the point, and a difference of two of them
    is as good as the values were; fp32 would have none left.

    Args:
        start: the sum of what came before; default 0.
    """
    if start is None:
        start = values.new_zeros(values.shape[0], 1, *values.shape[2:], dtype=torch.float64)
    return torch.cat([start, values.double()], dim=1).cumsum(1)


def box(
    sums: Float[Tensor, "B S1 H C"],
    width: Float[Tensor, "B T H C"],
    *,
    first: Int[Tensor, "B T"] | None = None,
    past: int | Int[Tensor, " B"] = 0,
) -> tuple[Float[Tensor, "B T H C"], Float[Tensor, "B T H C"]]:
    """Mean of the last `width` rows up to the query's own, the row at the far edge in part.

    With E = `sums`, so that E[r] is the sum of the rows before r, and the query at row t::

        out = (E[t + 1] - E(t + 1 - w)) / w,  w = min(width, t + 1 - first),  E(.) interpolated
        d out / d w = (v[row at the edge] - out) / w,  0 where the window is the whole document

    Args:
        sums: `prefix_sums` of the rows that can be read.
        width: tokens, 1 or more.
        first, past: as for `deform`.

    Returns:
        The means, in fp64, and w.
    """
    length = width.shape[1]
    own = torch.arange(1, length + 1, device=width.device)
    if isinstance(past, int):
        end, rows = (own + past)[None, :, None, None], sums[:, past + 1 : past + length + 1]
    else:
        end = (own + past[:, None])[:, :, None, None]
        rows = sums.gather(1, end.expand(-1, -1, *sums.shape[2:]))
    available = end
    if first is not None:
        # Beyond the query's own row, `first` means that row.
        first = torch.minimum(first.clamp(min=0), end[:, :, 0, 0] - 1)
        available = end - first[:, :, None, None]
    width = torch.minimum(width, available.to(width.dtype))
    return (rows - deform(sums, width, first=first, past=past + 1)) / width, width
