"""Kinds of heads, as names. No torch here: the model's config reads it too.

now                    reads a predicted distance behind the query
token, bigram, trigram reads around the row behind the last occurrence of the last 1, 2, 3 tokens; any
                       n from 4 on is written 4-gram, 5-gram, ...
box                    reads the mean over a predicted window that ends at the query
"""

import re
from collections.abc import Sequence
from typing import Literal

from starlm.errors import InputError

Preset = Literal["product", "value", "gated", "star"]
PRESETS: tuple[Preset, ...] = ("product", "value", "gated", "star")
# Kinds of the heads of preset `star`, repeated over the heads of a layer.
STAR = ("now", "token", "box", "bigram", "now", "token", "box", "trigram")
_ORDERS = {"token": 1, "bigram": 2, "trigram": 3}


def order_of(kind: str) -> int | None:
    """n of an anchored kind; None for `now` and `box`.

    Raises:
        InputError: no such kind.
    """
    if kind in ("now", "box"):
        return None
    match = re.fullmatch(r"([4-9]|[1-9]\d)-gram", kind)
    if kind in _ORDERS or match:
        return _ORDERS[kind] if match is None else int(match[1])
    raise InputError(f"A head is one of now, token, bigram, trigram, 4-gram ..., box; got {kind!r}.")


def kinds_of_heads(preset: Preset, kinds: Sequence[str], heads: int) -> tuple[str, ...]:
    """One kind per head, in the order in which a layer keeps them: now, then anchored, then box.

    Args:
        kinds: pattern, repeated over the heads; empty for the preset's own.

    Raises:
        InputError: no such kind.
    """
    pattern = tuple(kinds) or (STAR if preset == "star" else ("now",))
    chosen = [pattern[head % len(pattern)] for head in range(heads)]
    return tuple(sorted(chosen, key=lambda kind: (kind == "box", order_of(kind) or 0)))
