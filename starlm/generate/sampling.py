"""How the next token is chosen from logits."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from starlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What may be chosen, and how boldly. In this order: penalty, temperature, top-k, top-p, min-p."""

    temperature: float = 0.8
    """0 always takes the likeliest token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability; 1 is off (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Only tokens at least this share of the likeliest one's probability; 0 is off (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that occurred, multiplies negative; 1 is off (arXiv 1909.05858)."""
    seed: int | None = None
    """Same seed, same text; None draws a new one each time."""

    def __post_init__(self) -> None:
        def require(ok: bool, rule: str, name: str) -> None:
            if not ok:
                raise InputError(f"{name} must be {rule}; got {getattr(self, name)!r}.")

        require(0 <= self.temperature < float("inf"), "0 or more", "temperature")
        require(self.top_k >= 0, "0 (off) or more", "top_k")
        require(0 < self.top_p <= 1, "above 0 and at most 1", "top_p")
        require(0 <= self.min_p <= 1, "between 0 and 1", "min_p")
        require(0 < self.repetition_penalty < float("inf"), "above 0", "repetition_penalty")
        require(self.seed is None or -(2**63) <= self.seed < 2**64, "an integer of 64 bits", "seed")

    def generator(self) -> torch.Generator:
        """A random generator started from `seed`."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def probabilities(
    logits: Float[Tensor, " V"], sampling: Sampling, history: Int[Tensor, " N"] | None = None
) -> Float[Tensor, " V"]:
    """The distribution that the next token is drawn from.

    Args:
        logits: of one position.
        history: tokens so far, for the repetition penalty.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.repetition_penalty != 1 and history is not None and history.numel():
        seen = history.unique()
        penalty = sampling.repetition_penalty
        logits = logits.index_copy(0, seen, _penalised(logits[seen], penalty))
    if sampling.temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    # Largest logit at 0 first, and in fp64: a tiny temperature must neither overflow nor become 0.
    logits = ((logits - logits.max()).double() / sampling.temperature).to(logits.dtype)
    if 0 < sampling.top_k < logits.numel():
        # By rank rather than by value, so that ties cannot let more than k through.
        kept = logits.topk(sampling.top_k).indices
        logits = torch.full_like(logits, -torch.inf).index_copy(0, kept, logits[kept])
    chances = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = chances.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        chances = chances.index_fill(0, order[before >= sampling.top_p], 0.0)
    if sampling.min_p > 0:
        chances = chances.masked_fill(chances < sampling.min_p * chances.max(), 0.0)
    return chances / chances.sum()


def _penalised(logits: Tensor, penalty: float) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def choose(
    logits: Float[Tensor, " V"],
    sampling: Sampling,
    generator: torch.Generator,
    history: Int[Tensor, " N"] | None = None,
) -> int:
    """The next token's id, drawn from `probabilities`."""
    chances = probabilities(logits, sampling, history)
    return int(torch.multinomial(chances.cpu(), 1, generator=generator))
