"""starlm bench: timings side by side with peers."""

from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlm.cli.console import Console
from starlm.cli.options import Verb
from starlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class OpOptions:
    """Sizes of the operator's benchmark."""

    batch_tokens: int = 8192
    """Tokens per call, at every length."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    """Tokens per row; each must divide batch_tokens."""
    dim: int = 256
    """Width D: heads times channels."""
    repeats: int = 5
    """Timed calls of each; the median and the spread are given."""
    plot: Path | None = None
    """Also draw the timings into this file (.svg or .png)."""

    def __post_init__(self) -> None:
        def require(ok: bool, rule: str, name: str) -> None:
            if not ok:
                raise InputError(f"{name} must be {rule}; got {getattr(self, name)!r}.")

        require(self.batch_tokens >= 1, "at least 1", "batch_tokens")
        require(
            bool(self.lengths) and all(n >= 1 and self.batch_tokens % n == 0 for n in self.lengths),
            f"divisors of batch_tokens ({self.batch_tokens})",
            "lengths",
        )
        require(self.dim >= 1, "at least 1", "dim")
        require(self.repeats >= 1, "at least 1", "repeats")


def _op(options: OpOptions, console: Console) -> dict[str, Any]:
    from starlm.bench.op import main

    with redirect_stdout(console.human):
        return main(options)


VERBS = {
    "bench op": Verb(
        options=OpOptions,
        run=_op,
        presets={"quick": {"batch_tokens": 2048, "lengths": [512, 2048], "repeats": 3}},
    )
}
