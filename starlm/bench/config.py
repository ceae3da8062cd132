"""What the benchmarks measure. No torch, so that `--help` stays instant."""

from dataclasses import dataclass
from pathlib import Path

from starlm.errors import InputError

PLOTS = (".svg", ".png", ".pdf")


@dataclass(frozen=True, kw_only=True)
class OpOptions:
    """Sizes of the operator's benchmark."""

    batch_tokens: int = 131072
    """Tokens per call, at every length."""
    lengths: tuple[int, ...] = (512, 2048, 8192, 32768, 131072)
    """Tokens per row; each must divide batch_tokens."""
    dim: int = 64
    """Width D: heads times channels."""
    channels: int = 64
    """Channels of a head; must divide dim."""
    shifts: tuple[float, ...] = (0.8, 50.0)
    """Mean shifts, in tokens."""
    repeats: int = 5
    """Timed calls of each; the median and the spread are given."""
    limit_seconds: float = 3.0
    """Leave attention out where a call would take longer than this; the table says so."""
    plot: Path | None = None
    """Also draw the timings into this file (.svg, .png or .pdf)."""

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
        require(
            self.channels >= 1 and self.dim % self.channels == 0, f"a divisor of dim ({self.dim})", "channels"
        )
        require(bool(self.shifts) and all(0 < s < 1e6 for s in self.shifts), "above 0, below 1e6", "shifts")
        require(self.repeats >= 1, "at least 1", "repeats")
        require(self.limit_seconds >= 0, "0 or more", "limit_seconds")
        if self.plot is not None:
            require(self.plot.suffix in PLOTS, f"a file that ends in {', '.join(PLOTS)}", "plot")
            require(self.plot.parent.is_dir(), "in a folder that exists", "plot")
