"""Where anchored heads measure from, by their n, as `Deformer.forward` takes it."""

from collections.abc import Iterable, Sequence

from jaxtyping import Int
from torch import Tensor

from starlm.nn.heads import LONGEST, MATCH, lookups
from starlm.ops.anchors import anchors, longest


def origins_of(
    tokens: Int[Tensor, "B T"], orders: Iterable[int], *, first: Int[Tensor, "B T"] | None = None
) -> dict[int, Int[Tensor, "B T"]]:
    """For anchored heads of these n, 0 for the longest match, the rows that shift 0 reads.

    Args:
        tokens: token ids.
        orders: of one layer or of several: `layer.orders`.
        first: first row that each token may read.

    Raises:
        InputError: as `starlm.anchors`.
    """
    looked_up = lookups(orders)
    return by_order(anchors(tokens, looked_up, first=first), looked_up) if looked_up else {}


def by_order(found: Int[Tensor, "B T N"], orders: Sequence[int]) -> dict[int, Int[Tensor, "B T"]]:
    """The anchors for each of these n, and the longest match where they suffice for it."""
    origins = dict(zip(orders, found.unbind(-1), strict=True))
    if MATCH in orders:
        origins[LONGEST] = longest(origins)
    return origins
