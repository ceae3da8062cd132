"""Text to tokens to batches: corpora, tokenizer, shards, loader. Imports numpy, not torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlm.data.documents import Document
    from starlm.data.loader import PackedLoader
    from starlm.data.shards import TokenData
    from starlm.data.tokenizer import Tokenizer

# The function `prepare` is not here: it would share its name with the file that holds it, and which of
# the two `starlm.data.prepare` means would depend on what was imported before.
__all__ = ["Document", "PackedLoader", "TokenData", "Tokenizer"]

_HOMES = {"Document": "documents", "PackedLoader": "loader", "TokenData": "shards", "Tokenizer": "tokenizer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
