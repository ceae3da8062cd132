"""starlm bench: timings side by side with peers."""

from contextlib import redirect_stdout
from typing import Any

from starlm.bench.config import OpOptions
from starlm.cli.console import Console
from starlm.cli.options import Verb


def _op(options: OpOptions, console: Console) -> dict[str, Any]:
    from starlm.bench.op import main
    from starlm.report.environment import environment

    with redirect_stdout(console.human):
        return main(options, dict(environment()))


VERBS = {
    "bench op": Verb(
        options=OpOptions,
        run=_op,
        presets={
            "quick": {"batch_tokens": 4096, "lengths": [512, 2048], "repeats": 3},
            # The sizes that the operator's speed is promised for: B = 4, T = 2048, D = 768.
            "acceptance": {"batch_tokens": 8192, "lengths": [2048], "dim": 768, "repeats": 15},
        },
    )
}
