"""Kinds of heads, as names. No torch here: the model's config reads it too.

now                    reads a predicted distance behind the query
token, bigram, trigram reads around the row behind the last occurrence of the last 1, 2, 3 tokens; any
                       n from 4 on is written 4-gram, 5-gram, ...
longest                the same for the largest n, up to 8, that has occurred before
box                    reads the mean over a predicted window that ends at the query
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from starlm.errors import InputError

Preset = Literal["product", "value", "gated", "star"]
PRESETS: tuple[Preset, ...] = ("product", "value", "gated", "star")
# Kinds of the heads of preset `star`, repeated over the heads of a layer.
STAR = ("now", "token", "box", "bigram", "now", "token", "box", "trigram")
# What stands for n in heads at the longest match, and the longest n that they look for.
LONGEST, MATCH = 0, 8
_ORDERS = {"longest": LONGEST, "token": 1, "bigram": 2, "trigram": 3}


def order_of(kind: str) -> int | None:
    """n of an anchored kind, 0 for `longest`; None for `now` and `box`.

    Raises:
        InputError: no such kind.
    """
    if kind in ("now", "box"):
        return None
    match = re.fullmatch(r"([4-9]|[1-9]\d)-gram", kind)
    if kind in _ORDERS or match:
        return _ORDERS[kind] if match is None else int(match[1])
    raise InputError(f"A head is one of now, token, bigram, trigram, 4-gram ..., longest, box; got {kind!r}.")


def kinds_of_heads(preset: Preset, kinds: Sequence[str], heads: int) -> tuple[str, ...]:
    """One kind per head, in the order in which a layer keeps them: now, then anchored, then box.

    Args:
        kinds: pattern, repeated over the heads; empty for the preset's own.

    Raises:
        InputError: no such kind, or more than there are heads.
    """
    if isinstance(kinds, str) or len(kinds) > heads:
        raise InputError(
            f"kinds must be a sequence of at most one kind per head, which are {heads}; got {kinds!r}. Give "
            f"more heads, or fewer kinds."
        )
    pattern = tuple(kinds) or (STAR if preset == "star" else ("now",))
    chosen = [pattern[head % len(pattern)] for head in range(heads)]
    return tuple(sorted(chosen, key=lambda kind: (kind == "box", kind != "now", order_of(kind) or 0)))


def orders_of(kinds: Iterable[str]) -> list[int]:
    """n of each anchored head among heads of these kinds."""
    return [n for kind in kinds if (n := order_of(kind)) is not None]


def lookups(orders: Iterable[int]) -> tuple[int, ...]:
    """Every n whose n-grams have to be looked up for anchored heads of these n, rising."""
    wanted = set(orders)
    if LONGEST in wanted:
        wanted = wanted - {LONGEST} | set(range(1, MATCH + 1))
    return tuple(sorted(wanted))
