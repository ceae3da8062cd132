"""What a StarLM is, as numbers. No torch here, so that `--help` and `--dry-run` stay instant."""

from dataclasses import dataclass

from starlm.errors import InputError
from starlm.nn.heads import Preset, kinds_of_heads, lookups, order_of, orders_of
from starlm.settings import settle_types


@dataclass(frozen=True, kw_only=True)
class StarLMConfig:
    """Shape of one model. `depth` alone gives a sensible one; every number can be set by hand."""

    vocab_size: int = 4096
    """Tokens in the vocabulary; `starlm train` takes that of its data unless told."""
    depth: int = 4
    """Layers; the dial from which the width follows."""
    dim: int = 0
    """Width D of the residual stream; 0 means 64 * depth."""
    heads: int = 0
    """Heads per layer; 0 means one per 32 channels up to width 512, one per 64 beyond, and 8 at the least, so
    that star has each of its kinds."""
    layers: str = "D"
    """Pattern of layers, repeated to `depth` (e.g. DDDA): D a Deformer, A attention, W attention over a
    sliding window, C a gated short convolution."""
    preset: Preset = "star"
    """Form of the Deformer layers."""
    kinds: tuple[str, ...] = ()
    """Kinds of the Deformer heads, repeated over the heads: now, token, bigram, trigram, 4-gram ...,
    longest, box. Empty for the preset's own: mixed for star, now for the others."""
    mlp_ratio: int = 4
    """Hidden width of the relu² MLP over D; 0 leaves the MLP out."""
    context: int = 512
    """Tokens per training row. Generation may go further."""
    max_shift: int | None = None
    """Furthest reach of `now` and `box` heads in tokens, which bounds their memory; None is unbounded."""
    shift_init: float | None = None
    """Shift in tokens that all channels of `now` heads start from; None spreads them: 0.8 on average."""
    softcap: float = 15.0
    """Logits are softcap * tanh(logits / softcap); 0 leaves them as they are."""
    attention_window: int = 256
    """Rows that a query sees in W layers."""
    rope_base: float = 10000.0
    """Base of the rotary position frequencies in attention layers; 0 leaves positions out."""

    def __post_init__(self) -> None:
        settle_types(self, "model.")

        def require(ok: bool, rule: str, name: str) -> None:
            if not ok:
                raise InputError(f"model.{name} must be {rule}; got {getattr(self, name)!r}.")

        require(1 <= self.vocab_size <= 2**31, "between 1 and 2^31", "vocab_size")
        require(1 <= self.depth <= 1000, "between 1 and 1000", "depth")
        require(0 <= self.dim <= 2**20, "0 (for 64 * depth) or a width up to 2^20", "dim")
        require(self.heads >= 0, "0 (automatic) or more", "heads")
        require(
            bool(self.layers) and not set(self.layers) - set("DAWC"),
            "a pattern of the letters D (Deformer), A (attention), W (windowed attention), C (convolution)",
            "layers",
        )
        require(self.mlp_ratio >= 0, "0 (no MLP) or more", "mlp_ratio")
        require(self.context >= 1, "at least 1", "context")
        require(self.max_shift is None or self.max_shift >= 0, "0 or more, or left out", "max_shift")
        require(
            self.shift_init is None or 0 < self.shift_init < 1e6,
            "positive (tokens), or left out",
            "shift_init",
        )
        require(0 <= self.softcap < float("inf"), "0 (off), or positive and finite", "softcap")
        require(
            self.rope_base == 0 or 1 < self.rope_base < float("inf"),
            "0 (no positions), or above 1 and finite",
            "rope_base",
        )
        require(self.attention_window >= 1, "at least 1", "attention_window")
        try:
            [order_of(kind) for kind in self.kinds]
        except InputError as error:
            raise InputError(f"model.kinds must be kinds of heads; got {self.kinds!r}. {error}") from None
        if self.width % self.num_heads:
            raise InputError(
                f"model.heads must divide the width; got {self.num_heads} heads for width "
                f"{self.width}. Choose heads from the divisors of {self.width}."
            )
        if set("AW") & set(self.layer_kinds) and self.head_dim % 2:
            raise InputError(
                f"Attention layers need an even number of channels per head for rotary positions; got "
                f"{self.head_dim} (width {self.width} over {self.num_heads} heads). Change model.heads."
            )

    @property
    def width(self) -> int:
        """Width D of the residual stream."""
        return self.dim or 64 * self.depth

    @property
    def num_heads(self) -> int:
        """Heads H per layer."""
        return self.heads or max(8, self.width // (32 if self.width <= 512 else 64))

    @property
    def head_dim(self) -> int:
        """Channels C per head."""
        return self.width // self.num_heads

    @property
    def head_kinds(self) -> tuple[str, ...]:
        """One kind per head of a Deformer layer."""
        return kinds_of_heads(self.preset, self.kinds, self.num_heads)

    @property
    def orders(self) -> tuple[int, ...]:
        """Every n for which n-grams are looked up, rising."""
        return lookups(orders_of(self.head_kinds)) if "D" in self.layer_kinds else ()

    @property
    def layer_kinds(self) -> str:
        """One letter per layer: the pattern, repeated to `depth`."""
        return (self.layers * self.depth)[: self.depth]

    @property
    def num_parameters(self) -> dict[str, int]:
        """Parameters by part: embedding, head, mixers, mlps, total."""
        d = self.width
        deformer = (3 if self.preset == "value" else 4) * d * d + (2 if self.preset == "product" else 1) * d
        sizes = {"D": deformer, "A": 4 * d * d, "W": 4 * d * d, "C": 4 * d * d + 3 * d}
        mixers = sum(sizes[kind] for kind in self.layer_kinds)
        parts = {
            "embedding": self.vocab_size * d,
            "head": self.vocab_size * d,
            "mixers": mixers,
            "mlps": 2 * self.mlp_ratio * d * d * self.depth,
        }
        return {**parts, "total": sum(parts.values())}

    def flops_per_token(self, length: int | None = None) -> int:
        """Floating-point operations to train on one token: 6 per weight behind the embedding; attention.

        Args:
            length: tokens per row, for the attention layers; default `context`.
        """
        parts = self.num_parameters
        weights = parts["total"] - parts["embedding"]
        length = length or self.context
        # Rows that a query sees on average: half of those in a window, until it is full.
        window = min(self.attention_window, length)
        seen = {"A": length / 2, "W": window - window * window / (2 * length)}
        attended = sum(seen.get(kind, 0) for kind in self.layer_kinds)
        return 6 * weights + round(12 * self.width * attended)
