"""StarLM: language models on the Deformer, a token mixer that predicts how far back to read, and reads there.

    import starlm

    model = starlm.load("runs/demo")
    print(model.generate("def "))

Importing `starlm` is instant: torch is loaded when one of these names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from starlm.errors import InputError, StarLMError
from starlm.version import __version__

if TYPE_CHECKING:
    from starlm.generate.text import load
    from starlm.model.config import StarLMConfig
    from starlm.model.model import StarLM
    from starlm.model.state import DecodeState
    from starlm.nn.deformer import Deformer
    from starlm.ops import anchors, deform

__all__ = [
    "DecodeState",
    "Deformer",
    "InputError",
    "StarLM",
    "StarLMConfig",
    "StarLMError",
    "__version__",
    "anchors",
    "deform",
    "load",
]

_HOMES = {
    "DecodeState": "starlm.model.state",
    "Deformer": "starlm.nn.deformer",
    "StarLM": "starlm.model.model",
    "StarLMConfig": "starlm.model.config",
    "anchors": "starlm.ops",
    "deform": "starlm.ops",
    "load": "starlm.generate.text",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'starlm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
