"""How the next token is chosen from logits."""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from starlm.errors import InputError, StarLMError
from starlm.ops.plain import is_plain

# Logits are fp32.
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What may be chosen, and how boldly. Order: penalties, bias, temperature, top-k, top-p, min-p."""

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
    presence_penalty: float = 0.0
    """Taken from the logit of each token that was chosen before (as in OpenAI's API); 0 is off."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that it was chosen before; 0 is off."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; -inf forbids one."""
    seed: int | None = None
    """Same seed, same text; None draws a new one each time."""

    def __post_init__(self) -> None:
        def require(ok: bool, rule: str, name: str) -> None:
            if not ok:
                raise InputError(f"{name} must be {rule}; got {getattr(self, name)!r}.")

        require(0 <= self.temperature < float("inf"), "0 or more", "temperature")
        require(0 <= self.top_k < 2**63, "0 (off) or more, an integer of 64 bits", "top_k")
        require(0 < self.top_p <= 1, "above 0 and at most 1", "top_p")
        require(0 <= self.min_p <= 1, "between 0 and 1", "min_p")
        require(0 < self.repetition_penalty < float("inf"), "above 0", "repetition_penalty")
        for name in ("presence_penalty", "frequency_penalty"):
            require(abs(getattr(self, name)) <= _LARGEST, "a number of 32 bits", name)
        require(
            all(
                token >= 0 and (bias == -math.inf or abs(bias) <= _LARGEST)
                for token, bias in self.logit_bias.items()
            ),
            "numbers of 32 bits (or -inf) by token id",
            "logit_bias",
        )
        require(self.seed is None or -(2**63) <= self.seed < 2**64, "an integer of 64 bits", "seed")

    def generator(self, index: int = 0) -> random.Random:
        """A random generator started from `seed` and the index of a sample."""
        if self.seed is None:
            return random.Random()
        # Far apart, and different for different seeds.
        return random.Random((self.seed + index * 0x9E3779B97F4A7C15) % 2**64)


class Sampler:
    """How the tokens of one sample are chosen: its options, its random stream, and what has occurred."""

    def __init__(
        self,
        sampling: Sampling,
        vocab_size: int,
        prompt: Sequence[int] = (),
        *,
        index: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Args:
            vocab_size: V.
            prompt: tokens so far, for the repetition penalty.
            index: of this sample among those of one prompt; each has its own random stream.
            device: of the logits.

        Raises:
            InputError: `logit_bias` names a token that is not in the vocabulary.
        """
        self.sampling, self._random = sampling, sampling.generator(index)
        # Where in 0 .. 1 of the distribution the next token is drawn.
        self.point = self._random.random()
        # Tokens that may be chosen, bool [V]; None for all.
        self.allowed: Tensor | None = None
        self._occurred = self._counts = self._bias = None
        if sampling.repetition_penalty != 1:
            self._occurred = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._occurred[torch.tensor(prompt, dtype=torch.long, device=device)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        if sampling.logit_bias:
            if max(sampling.logit_bias) >= vocab_size:
                raise InputError(
                    f"logit_bias names token {max(sampling.logit_bias)}; the vocabulary has {vocab_size} "
                    f"tokens."
                )
            self._bias = torch.zeros(vocab_size, dtype=torch.float32, device=device)
            for token, bias in sampling.logit_bias.items():
                self._bias[token] = bias

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` changes anything."""
        parts = (self._occurred, self._counts, self._bias, self.allowed)
        return any(part is not None for part in parts)

    def options(self, vocab_size: int) -> tuple[float, ...]:
        """One row of `starlm.ops.cpu_choose.OPTIONS`, for logits [vocab_size]."""
        parts = self._occurred, self._counts, self._bias, self.allowed
        assert all(part is None or len(part) >= vocab_size for part in parts)
        o = self.sampling
        penalties = o.repetition_penalty, o.presence_penalty, o.frequency_penalty
        places = (0 if part is None else part.data_ptr() for part in parts)
        return o.temperature, o.top_p, o.min_p, *penalties, self.point, o.top_k, *places

    def draw_on(self) -> None:
        """Go on to the next place of the random stream."""
        self.point = self._random.random()

    def add(self, token: int) -> None:
        """Count a token that was chosen."""
        if self._occurred is not None:
            self._occurred[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def adjust(self, logits: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
        """Logits with penalties and biases, and -inf for what is not allowed."""
        options = self.sampling
        if self._occurred is not None:
            penalty = options.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._occurred, penalised, logits)
        if self._counts is not None:
            logits = logits - self._counts * options.frequency_penalty
            logits = logits - (self._counts > 0) * options.presence_penalty
        if self._bias is not None:
            logits = logits + self._bias
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed.to(logits.device), -torch.inf)
        return logits


def choose(logits: Float[Tensor, "B V"], samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each sample, drawn from its `probabilities` by its own random stream.

    Raises:
        StarLMError: a sample's logits are NaN, or nothing is left to choose.
    """
    if logits.device.type == "cpu" and logits.dtype != torch.float64 and not is_plain():
        from starlm.ops import cpu_choose  # numba takes half a second to import

        options = np.array([s.options(logits.shape[1]) for s in samplers], cpu_choose.OPTIONS)
        tokens = cpu_choose.choose(logits.float(), options)
    else:
        tokens = _choose(logits, samplers)
    if min(tokens) < 0:
        raise StarLMError(
            "The model's logits are not finite, or logit_bias forbids every token. Check the checkpoint, or "
            "ask for less."
        )
    for sampler in samplers:
        if sampler.sampling.temperature > 0:
            sampler.draw_on()
    return tokens


def _choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """`choose` by PyTorch; -1 where there is nothing to choose."""
    logits = _adjusted(logits, samplers)
    likeliest, chosen = logits.max(dim=-1)
    tokens = chosen.where(likeliest.isfinite(), -1).tolist()
    drawn = [row for row, sampler in enumerate(samplers) if sampler.sampling.temperature > 0]
    if drawn and min(tokens) >= 0:
        chances = _distribution(logits[drawn], [samplers[row].sampling for row in drawn])
        # In fp64, so that the tail of a large vocabulary keeps its share.
        ends = chances.double().cumsum(-1)
        points = torch.tensor([[samplers[row].point] for row in drawn], dtype=torch.float64).to(ends.device)
        found = torch.searchsorted(ends, points * ends[:, -1:], right=True)[:, 0]
        for row, token in zip(drawn, found.tolist(), strict=True):
            tokens[row] = token
    return tokens


def probabilities(logits: Float[Tensor, "B V"], samplers: Sequence[Sampler]) -> Float[Tensor, "B V"]:
    """The distribution that each sample's next token is drawn from, in fp32 at the least."""
    return _distribution(_adjusted(logits, samplers), [sampler.sampling for sampler in samplers])


def _adjusted(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = [row for row, sampler in enumerate(samplers) if sampler.adjusts]
    if rows:
        logits = logits.clone()
        for row in rows:
            logits[row] = samplers[row].adjust(logits[row])
    return logits


def _distribution(logits: Tensor, options: Sequence[Sampling]) -> Tensor:
    def column(values: Iterable[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=logits.device)[:, None]

    temperature, min_p = column(o.temperature for o in options), column(o.min_p for o in options)
    # Largest logit at 0 first, and in fp64: a tiny temperature must neither overflow nor become 0.
    largest = logits.max(dim=-1, keepdim=True)
    scaled = (logits - largest.values).double() / temperature.where(temperature > 0, 1.0)
    scaled = scaled.to(logits.dtype)
    chances = scaled.softmax(-1)
    cut = [row for row, o in enumerate(options) if o.top_k or o.top_p < 1]
    if cut:
        chances[cut] = _cut(scaled[cut], [options[row] for row in cut], column)
    if min_p.any():
        least = min_p * chances.max(dim=-1, keepdim=True).values.double()
        chances = chances.masked_fill(chances.double() < least, 0.0)
    cold = temperature == 0
    if cold.any():
        chances = torch.where(cold, torch.zeros_like(chances).scatter(1, largest.indices, 1.0), chances)
    return chances / chances.sum(-1, keepdim=True)


def _cut(logits: Tensor, options: Sequence[Sampling], column: Callable[..., Tensor]) -> Tensor:
    """Chances of what top-k and then top-p leave."""
    vocab = logits.shape[1]
    most = [min(o.top_k or vocab, vocab) for o in options]
    # A sort of a whole vocabulary takes longer than the few likeliest do.
    if max(most) < vocab:
        ordered, order = logits.topk(max(most))
    else:
        ordered, order = logits.sort(descending=True, stable=True)
    # By rank rather than by value, so that ties cannot let more than k through.
    rank = torch.arange(ordered.shape[1], device=logits.device)
    ordered = ordered.masked_fill(rank >= column(most, torch.long), -torch.inf).softmax(-1)
    before = ordered.cumsum(-1) - ordered
    top_p = column(o.top_p for o in options)
    ordered = ordered.masked_fill((before.double() >= top_p) & (top_p < 1), 0.0)
    return torch.zeros_like(logits).scatter(1, order, ordered)
