"""What one training run is, as numbers. No torch here, so that `--help` and `--dry-run` stay instant."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from starlm.errors import InputError
from starlm.model.config import StarLMConfig
from starlm.settings import settle_types

Precision = Literal["float32", "bfloat16"]
# The settings of which one is the horizon.
HORIZONS = ("steps", "tokens", "epochs", "tokens_per_param")

# The best rate of the matrices in runs of up to so many steps, and how it falls beyond: docs/evidence.md.
_SHORT_LR, _SHORT_STEPS, _POWER = 0.02, 300, 0.32
# Far beyond any use, while products of two of them still fit into float32.
_LARGEST = 1e9
_LONGEST = 1e15


def _is_size(x: float | None) -> bool:
    return x is None or 0 <= x <= _LARGEST


def seen_from_here(named: Path, *, run: Path, out: Path) -> Path:
    """A path that a run names: seen from where the run was made, if it exists there, else as it stands.

    Args:
        run: the run folder, from here.
        out: what the run calls that folder, which tells where it was made.
    """
    name, place = out.parts, run.absolute().parts
    if not name or place[-len(name) :] != name:
        return named
    there = Path(*place[: -len(name)]) / named
    if not there.exists() or (named.exists() and named.samefile(there)):
        return named
    return there.resolve()


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Learning rates and schedule: Muon for matrices, AdamW for embedding, head and shifts' biases."""

    matrix_lr: float | None = None
    """Muon's rate for the matrices; if left out, 0.02 for up to 300 steps, less for more: 0.01 for 2,600."""
    shift_lr: float = 0.1
    """The shift projections' rate, as a factor of the matrices'."""
    embedding_lr: float = 0.2
    """AdamW's rate for the embedding at width 768; scaled by (D / 768)^-0.5."""
    head_lr: float = 0.004
    """AdamW's rate for the head at width 768; scaled by (D / 768)^-0.5."""
    weight_decay: float = 0.0
    """Decoupled decay of the matrices."""
    momentum: float = 0.95
    """Muon's momentum, reached from 0.85 over the first 300 steps."""
    beta1: float = 0.8
    """AdamW's first beta."""
    beta2: float = 0.95
    """AdamW's second beta."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 is off."""
    warmup: float = 0.0
    """Share of the horizon over which the rates rise from 0."""
    warmdown: float = 0.4
    """Share of the horizon over which the rates fall to `final`."""
    final: float = 0.0
    """Rate at the end, as a share of the full rate."""

    def __post_init__(self) -> None:
        settle_types(self, "optim.")
        for names, ok, rule in (
            (
                ("matrix_lr", "shift_lr", "embedding_lr", "head_lr", "weight_decay", "clip"),
                _is_size,
                f"between 0 and {_LARGEST:g}",
            ),
            (("momentum", "beta1", "beta2"), lambda x: 0 <= x < 1, "0 or more and below 1"),
            (("warmup", "warmdown", "final"), lambda x: 0 <= x <= 1, "between 0 and 1"),
        ):
            for name in names:
                if not ok(getattr(self, name)):
                    raise InputError(f"optim.{name} must be {rule}; got {getattr(self, name)!r}.")

    def matrix_rate(self, num_steps: int) -> float:
        """Muon's rate for the matrices in a run of `num_steps`.

        A longer run wants a lower rate. The power is that of Bjorck et al. (arXiv 2409.19913) for AdamW,
        which agrees with the best of the rates that docs/evidence.md compares at 300, 1500 and 6000 steps.
        """
        if self.matrix_lr is not None:
            return self.matrix_lr
        return _SHORT_LR * min(1.0, (_SHORT_STEPS / num_steps) ** _POWER)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Give the horizon as one of steps, tokens, epochs, tokens_per_param."""

    data: Path = Path("data")
    """Folder that `starlm data prepare` wrote."""
    out: Path = Path("runs/base")
    """Run folder. If it holds a run already, that run goes on where it was."""
    init_from: Path | None = None
    """Run or checkpoint folder whose weights the run begins with, instead of random ones. The model must be
    its own, but for `context`: the command line takes it, in Python starlm.model.folder.read_model_config
    reads it. The data need its tokenizer: `starlm data prepare --tokenizer`."""
    model: StarLMConfig = field(default_factory=StarLMConfig)
    """The model."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizers and schedule."""
    batch_tokens: int = 4096
    """Tokens per optimizer step; a multiple of the context."""
    micro_rows: int = 0
    """Rows per forward pass (the rest by gradient accumulation); 0 takes the whole batch at once."""
    steps: int | None = None
    """Horizon in optimizer steps."""
    tokens: int | None = None
    """Horizon in tokens."""
    epochs: float | None = None
    """Horizon in epochs of the data."""
    tokens_per_param: float | None = None
    """Horizon in tokens per parameter (embedding left out); without any horizon 20."""
    eval_every: int = 250
    """Steps between validations; 0 only validates at the end."""
    eval_tokens: int = 65536
    """Validation tokens, spread over all that there are; 0 takes all."""
    sample_every: int = 0
    """Steps between printed samples; 0 only samples at the end."""
    sample_prompts: tuple[str, ...] = ("def ", "class ", "    if ")
    """Prompts of the samples."""
    save_every: int = 250
    """Steps between checkpoints; 0 only saves at the end."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""
    precision: Literal["auto", Precision] = "auto"
    """Arithmetic of the matrix products; auto takes bfloat16 where it is clearly faster, and stays so."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graph: bool = True
    """On a GPU, record a training step once and replay it: small models are several times as fast so."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    workers: int = 1
    """Threads that prepare batches; the order of the data does not depend on it."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""

    def __post_init__(self) -> None:
        settle_types(self)

        def require(ok: bool, rule: str, name: str) -> None:
            if not ok:
                raise InputError(f"{name} must be {rule}; got {getattr(self, name)!r}.")

        for name in ("data", "out", "init_from"):
            ok = not any("\ud800" <= letter <= "\udfff" for letter in str(getattr(self, name)))
            require(ok, "a name in UTF-8, which run.toml can hold", name)
        horizons = {name: getattr(self, name) for name in HORIZONS}
        if sum(value is not None for value in horizons.values()) > 1:
            given = ", ".join(f"{name}={value}" for name, value in horizons.items())
            raise InputError(f"Give the horizon once: got {given}. Keep one of them.")
        for name, value in horizons.items():
            require(
                value is None or 0 < value < _LONGEST, f"above 0 and below {_LONGEST:g}, or left out", name
            )
        require(
            self.batch_tokens >= self.model.context and self.batch_tokens % self.model.context == 0,
            f"a multiple of model.context ({self.model.context})",
            "batch_tokens",
        )
        require(
            self.micro_rows >= 0 and (self.micro_rows == 0 or self.rows % self.micro_rows == 0),
            f"0 or a divisor of the rows per batch ({self.rows})",
            "micro_rows",
        )
        for name in ("eval_every", "eval_tokens", "sample_every", "save_every"):
            require(getattr(self, name) >= 0, "0 or more", name)
        require(self.keep >= 1, "at least 1", "keep")
        require(self.workers >= 1, "at least 1", "workers")
        require(0 <= self.seed < 2**63, "between 0 and 2^63", "seed")

    @property
    def rows(self) -> int:
        """Rows of `context` tokens per optimizer step."""
        return self.batch_tokens // self.model.context

    def in_tokens(self) -> "TrainConfig":
        """With a horizon in epochs turned into one in tokens.

        Raises:
            InputError: there is one, and no usable data.
        """
        if self.epochs is None:
            return self
        return replace(self, epochs=None, tokens=max(1, round(self.epochs * self.epoch_tokens())))

    def epoch_tokens(self) -> int:
        """Tokens of an epoch of the data.

        Raises:
            InputError: there are no usable data.
        """
        from starlm.data.loader import PackedLoader
        from starlm.data.shards import TokenData

        split = TokenData.open(self.data).splits["train"]
        return PackedLoader(split, rows=1, length=self.model.context, seed=0).epoch_tokens

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; of a horizon in epochs the data are read."""
        if self.steps is not None:
            return self.steps
        tokens = self.in_tokens().tokens
        if tokens is None:
            parts = self.model.num_parameters
            ratio = 20.0 if self.tokens_per_param is None else self.tokens_per_param
            tokens = ratio * (parts["total"] - parts["embedding"])
        return max(1, round(tokens / self.batch_tokens))


def findable(config: TrainConfig) -> TrainConfig:
    """As a run writes it: paths are absolute where `out` does not tell from where they were seen."""
    parts = config.out.parts
    if parts and not config.out.is_absolute() and ".." not in parts:
        return config
    began = None if config.init_from is None else config.init_from.absolute()
    return replace(config, data=config.data.absolute(), init_from=began)
