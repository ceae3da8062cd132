"""What the benchmarks measure. No torch, so that `--help` stays instant."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from starlm.errors import InputError

PLOTS = (".svg", ".png", ".pdf")


@dataclass(frozen=True, kw_only=True)
class GridOptions(ABC):
    """What tables of peers over sizes have in common."""

    repeats: int = 5
    """Timed calls of each; the median and the spread are given."""
    limit_seconds: float = 60.0
    """Leave attention out where a call would take longer than this; the table says so."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU if PyTorch can use one."""
    plot: Path | None = None
    """Also draw the timings into this file (.svg, .png or .pdf)."""

    def __post_init__(self) -> None:
        self._require(self.repeats >= 1, "at least 1", "repeats")
        self._require(self.limit_seconds >= 0, "0 or more", "limit_seconds")
        check_plot(self.plot)

    def _require(self, ok: bool, rule: str, name: str) -> None:
        if not ok:
            raise InputError(f"{name} must be {rule}; got {getattr(self, name)!r}.")

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the table's rows."""

    @abstractmethod
    def describe(self) -> str:
        """The sizes that all rows share."""


@dataclass(frozen=True, kw_only=True)
class LayerOptions(GridOptions):
    """Sizes of the layers' benchmark."""

    batch_tokens: int = 32768
    """Tokens per call, at every length."""
    lengths: tuple[int, ...] = (256, 1024, 8192, 32768)
    """Tokens per row; each must divide batch_tokens."""
    dim: int = 768
    """Width D."""
    peers: tuple[
        Literal["gated", "star", "attention", "conv", "mamba2", "deltanet", "gla", "shortconv"], ...
    ] = ()
    """Layers to time beside the bare matrix products. Default: on a CPU all but the last three, which are
    those of flash-linear-attention and run on GPUs; on a GPU all but mamba2, whose plain PyTorch is no match
    there. On a CPU mamba2 takes most of the time."""
    cuda_graph: bool = True
    """On a GPU, record a call once and time its replays: its kernels without the time to launch them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = f"divisors of batch_tokens ({self.batch_tokens})"
        fits = all(n >= 1 and self.batch_tokens % n == 0 for n in self.lengths)
        self._require(bool(self.lengths) and fits, rule, "lengths")
        self._require(self.dim >= 16 and self.dim % 16 == 0, "a multiple of 16", "dim")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens per row."""
        return self.lengths

    def describe(self) -> str:
        """The sizes that all rows share."""
        return f"{self.batch_tokens:,} tokens a call, D = {self.dim}, {self.dtype}"


@dataclass(frozen=True, kw_only=True)
class TrainBenchOptions(GridOptions):
    """Sizes of the benchmark of training steps."""

    repeats: int = 3
    """Timed steps of each; the median and the spread are given."""
    batch_tokens: int = 8192
    """Tokens per step; one row where a row is longer."""
    lengths: tuple[int, ...] = (1024, 8192)
    """Tokens per row."""
    dim: int = 768
    """Width D."""
    depth: int = 6
    """Layers."""
    vocab_size: int = 4096
    """Tokens in the vocabulary."""
    peers: tuple[Literal["transformer", "star", "star-W256", "gated", "conv"], ...] = (
        "transformer",
        "star",
        "gated",
        "conv",
    )
    """Models to time; at each length all are in memory at the same time. In star-W256 every third layer is
    attention over the last 256 tokens."""
    compile: bool = False
    """Compile loss and gradients of every model with torch.compile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(bool(self.lengths) and min(self.lengths) >= 1, "1 or more", "lengths")
        self._require(self.dim >= 16 and self.dim % 16 == 0, "a multiple of 16", "dim")
        self._require(self.depth >= 1, "at least 1", "depth")
        self._require(self.batch_tokens >= 1, "at least 1", "batch_tokens")
        self._require(bool(self.peers), "at least one name", "peers")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens per row."""
        return self.lengths

    def rows(self, length: int) -> int:
        """Rows of a step."""
        return max(1, self.batch_tokens // length)

    def describe(self) -> str:
        """The sizes that all rows share."""
        steps = {length: self.rows(length) for length in self.lengths}
        if all(rows * length == self.batch_tokens for length, rows in steps.items()):
            tokens = f"{self.batch_tokens:,}"
        else:
            tokens = ", ".join(f"{rows:,} x {length:,}" for length, rows in steps.items())
        return (
            f"{tokens} tokens a step, {self.depth} layers, D = {self.dim}, V = "
            f"{self.vocab_size}, {self.dtype}{', compiled' if self.compile else ''}"
        )


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(GridOptions):
    """Sizes of the benchmark of generation."""

    repeats: int = 5
    """Rounds; in each, every model decodes `tokens` tokens."""
    contexts: tuple[int, ...] = (1000, 10_000, 100_000)
    """Tokens that have been read before."""
    tokens: int = 16
    """Tokens decoded in a round."""
    batch: int = 1
    """Streams that are decoded together."""
    dim: int = 256
    """Width D."""
    depth: int = 6
    """Layers."""
    vocab_size: int = 4096
    """Tokens in the vocabulary."""
    max_shift: int = 512
    """Reach of the bounded model, whose memory is constant."""
    peers: tuple[Literal["star", "gated", "bounded", "attention"], ...] = (
        "star",
        "gated",
        "bounded",
        "attention",
    )
    """Models to time; all hold all contexts at the same time: a million tokens of star are 8 GB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(bool(self.contexts) and min(self.contexts) >= 1, "1 or more", "contexts")
        self._require(self.dim >= 16 and self.dim % 16 == 0, "a multiple of 16", "dim")
        self._require(self.depth >= 1, "at least 1", "depth")
        self._require(self.tokens >= 1, "at least 1", "tokens")
        self._require(self.batch >= 1, "at least 1", "batch")
        self._require(self.max_shift >= 0, "0 or more", "max_shift")
        self._require(bool(self.peers), "at least one name", "peers")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of context."""
        return self.contexts

    def describe(self) -> str:
        """The sizes that all rows share."""
        streams = "one stream" if self.batch == 1 else f"{self.batch} streams"
        return f"{self.depth} layers, D = {self.dim}, V = {self.vocab_size}, {self.dtype}, {streams}"


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions:
    """How a server is loaded."""

    model: Path = Path("runs/demo")
    """Run folder (its last checkpoint is taken) or checkpoint folder."""
    clients: tuple[int, ...] = (1, 8, 64)
    """Clients that ask at the same time."""
    requests: int = 4
    """Requests of each client, one after the other."""
    prompt_tokens: tuple[int, ...] = (128,)
    """Tokens of a prompt; several lengths are loaded one after the other."""
    tokens: int = 64
    """Tokens of an answer; fewer if the model ends it."""
    slots: int = 32
    """Sequences that the server generates at the same time; further clients wait."""

    def __post_init__(self) -> None:
        def require(ok: bool, rule: str, name: str) -> None:
            if not ok:
                raise InputError(f"{name} must be {rule}; got {getattr(self, name)!r}.")

        for name in ("clients", "prompt_tokens"):
            values = getattr(self, name)
            require(bool(values) and min(values) >= 1, "1 or more", name)
        for name in ("requests", "tokens", "slots"):
            require(getattr(self, name) >= 1, "at least 1", name)

    def describe(self) -> str:
        """The sizes that all rows share."""
        return f"{self.requests} requests per client, answers of {self.tokens} tokens, {self.slots} slots"


def check_plot(plot: Path | None) -> None:
    """Raise InputError if a chart cannot be written there."""
    if plot is None:
        return
    if plot.suffix not in PLOTS:
        raise InputError(f"plot must be a file that ends in {', '.join(PLOTS)}; got {plot}.")
    if not plot.parent.is_dir():
        raise InputError(f"plot must be in a folder that exists; got {plot}.")


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
        check_plot(self.plot)
