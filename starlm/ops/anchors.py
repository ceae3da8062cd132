"""Where the last n tokens were last seen: the origins of anchored heads.

    origin(t) = 1 + max{ j < t : the n tokens that end at j are those that end at t },  -1 if there is none

Exact, linear in T. On a CPU one hash index per sequence (`starlm.ops.ngrams`), which also serves decoding;
elsewhere one stable sort per n, without a host synchronisation.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from starlm.errors import InputError
from starlm.ops.deform import check_rows
from starlm.ops.plain import is_plain


def anchors(
    tokens: Int[Tensor, "B T"], orders: Sequence[int], *, first: Int[Tensor, "B T"] | None = None
) -> Int[Tensor, "B T N"]:
    """The row behind the last earlier occurrence of the n-gram that ends at each token.

    Both occurrences lie at or after `first`, so a packed document sees what it would see alone.

    Args:
        tokens: token ids; those below 0 are tokens like others.
        orders: N values of n, each at least 1.
        first: first row that each token may read; default 0, and below 0 it is 0.

    Returns:
        int64; -1 where there is no earlier occurrence.

    Raises:
        InputError: no orders, or one below 1; tokens that are no whole numbers, or of another rank; `first`
            that does not fit them.

    Example:
        >>> anchors(torch.tensor([[5, 6, 5, 6]]), [1, 2])[0].T.tolist()
        [[-1, -1, 1, 2], [-1, -1, -1, 2]]
    """
    if not orders or min(orders) < 1:
        raise InputError(f"anchors needs orders of 1 or more; got {list(orders)}.")
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex():
        raise InputError(
            f"anchors needs token ids [B, T], whole numbers; got {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}."
        )
    check_rows("anchors", "first", first, tuple(tokens.shape))
    compute = anchors_reference if is_plain() else _anchors
    return compute(tokens, list(orders), first)


def longest(origins: Mapping[int, Int[Tensor, "B T"]]) -> Int[Tensor, "B T"]:
    """Of the anchors for several n, that of the largest n which has one: the row behind the longest match.

    Args:
        origins: for each n, `anchors` of the same tokens.

    Example:
        >>> found = anchors(torch.tensor([[5, 6, 7, 6, 5, 6]]), [1, 2])
        >>> longest(dict(zip([1, 2], found.unbind(-1)))).tolist()
        [[-1, -1, -1, 2, 1, 2]]
    """
    found, *longer = (origins[n] for n in sorted(origins))
    for rows in longer:
        found = torch.where(rows >= 0, rows, found)
    return found


@torch.library.custom_op("starlm::anchors", mutates_args=())
def _anchors(tokens: Tensor, orders: list[int], first: Tensor | None) -> Tensor:
    if tokens.device.type != "cpu":
        return anchors_reference(tokens, orders, first)
    from starlm.ops import ngrams  # numba takes half a second to import

    return ngrams.batch(tokens, orders, first)


@_anchors.register_fake
def _(tokens, orders, first):
    return tokens.new_empty((*tokens.shape, len(orders)), dtype=torch.int64)


def anchors_reference(tokens: Tensor, orders: Sequence[int], first: Tensor | None = None) -> Tensor:
    """`anchors` in plain PyTorch, by sorting."""
    batch, length = tokens.shape
    row = torch.arange(length, device=tokens.device).expand(batch, length)
    first = torch.zeros_like(row) if first is None else first.clamp(min=0)
    tokens = tokens.long()
    if tokens.numel():
        # Whatever stands for padding, from 0 on no two names and tokens make the same key.
        tokens = tokens - tokens.min()
    size = tokens.max() + 1 if tokens.numel() else 1
    name, found = torch.zeros_like(tokens), {}
    for n in range(1, max(orders) + 1):
        # An n-gram is its last token, and the name of the (n-1)-gram before it: no hash, no collision.
        before = torch.nn.functional.pad(name[:, :-1], (1, 0), value=length) if n > 1 else name
        key, order = (before * size + tokens).sort(dim=1, stable=True)
        same = torch.nn.functional.pad(key[:, 1:] == key[:, :-1], (1, 0), value=False)
        earlier = torch.where(same, order.roll(1, 1), -1)
        last = torch.empty_like(order).scatter_(1, order, earlier)
        name = torch.empty_like(order).scatter_(1, order, (~same).cumsum(1) - 1)
        begin = n - 1 + first
        found[n] = torch.where((last >= begin) & (row >= begin), last + 1, -1)
    return torch.stack([found[n] for n in orders], dim=-1)
