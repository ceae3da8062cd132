"""starlm serve: an OpenAI-compatible API and a web chat."""

from typing import Any

from starlm.cli.console import Console
from starlm.cli.options import Verb
from starlm.errors import InputError
from starlm.serve.config import ServeOptions


def run(options: ServeOptions, console: Console) -> dict[str, Any]:
    """Serve until the process is told to stop."""
    try:
        from starlm.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("starlm"):
            raise
        raise InputError(
            f"The server needs the package {error.name}, which is not installed: pip install 'starlm[serve]'"
        ) from None
    serve(options, console.say)
    return {"models": list(options.models)}


VERBS = {"serve": Verb(options=ServeOptions, run=run)}
