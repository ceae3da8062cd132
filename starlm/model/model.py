"""The language model: embedding, blocks, head."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from starlm.errors import InputError
from starlm.model.config import StarLMConfig
from starlm.model.state import DecodeState, layout_of
from starlm.model.step import logits_of_step, step
from starlm.nn.attention import Attention
from starlm.nn.block import Block, through
from starlm.nn.conv import ShortConv
from starlm.nn.deformer import Deformer
from starlm.nn.linear import is_bare
from starlm.nn.mlp import MLP
from starlm.nn.origins import origins_of
from starlm.ops.cross_entropy import cross_entropy, cross_entropy_of
from starlm.ops.deform import check_rows


class Backbone(nn.Module):
    """Embedding and blocks: what `StarLM` and the models of transformers have in common."""

    config: Any
    orders: Sequence[int]
    embedding: nn.Embedding
    blocks: nn.ModuleList

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        embedded: Float[Tensor, "B T D"] | None = None,
        first: Int[Tensor, "B T"] | None = None,
        state: DecodeState | None = None,
        seen: list[Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after the last block, normalised; arguments as for `forward`.

        Args:
            embedded: read in place of the embeddings of `tokens`, which then serve the anchors alone.
            seen: gets what each block reads, and the result.

        Raises:
            InputError: tokens of another rank, `first` that does not fit them, or a state of another batch or
                model.
        """
        self._check(tokens, first, state)
        if state is not None and embedded is None and seen is None:
            stepped = step(self, tokens, first, state, logits=False)
            if stepped is not None:
                return stepped
        x = _rows_of(self.embedding, tokens) if embedded is None else embedded
        if state is None:
            origins = origins_of(tokens, self.orders, first=first)
            nothing = [None] * len(self.blocks)
            return through(self.blocks, x, nothing, first=first, origins=origins, seen=seen)
        state.check_layout(self.layout())
        with state.extend(tokens, first) as rows:
            return through(self.blocks, x, rows.layers, first=rows.first, origins=rows.origins, seen=seen)

    def new_state(
        self, batch: int = 1, *, rollback: int = 64, rows_device: str | torch.device | None = None
    ) -> DecodeState:
        """An empty decode state of `batch` sequences (slots); arguments as for `DecodeState.of`."""
        return DecodeState.of(self.mixers, batch, rollback=rollback, rows_device=rows_device)

    @property
    def mixers(self) -> list[nn.Module]:
        """Of each layer what mixes tokens."""
        return [cast(nn.Module, block.mixer) for block in self.blocks]

    def layout(self) -> tuple:
        """What a decode state depends on: see `layout_of`."""
        return layout_of(self.mixers)

    def _check(self, tokens: Tensor, first: Tensor | None, state: DecodeState | None) -> None:
        """Refuse what kernels, which do not look, would take for something else."""
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise InputError(
                f"Token ids must be integers [B, T]; got {tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        if state is None:
            check_rows("StarLM", "first", first, tuple(tokens.shape))
        else:
            state.check_tokens(tokens, first)


class Headed(Backbone):
    """A backbone and a head."""

    head: nn.Linear

    def logits(self, hidden: Float[Tensor, "B T D"], *, step: bool = False) -> Float[Tensor, "B T V"]:
        """softcap * tanh(head(hidden) / softcap), in fp32 at the least.

        Args:
            step: of tokens of a decode state, which no tracer follows: a kernel itself may be called.
        """
        if step and (capped := logits_of_step(self, hidden)) is not None:
            return capped
        logits = self.head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits


class StarLM(Headed):
    """Token embedding -> RMSNorm -> blocks -> RMSNorm -> untied head -> softcap.

    Example:
        >>> model = StarLM(StarLMConfig(depth=2, vocab_size=100))
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 100])
    """

    def __init__(self, config: StarLMConfig) -> None:
        super().__init__()
        self.config, self.orders = config, config.orders
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(_block(config, kind) for kind in config.layer_kinds)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start all weights: embedding at std 1, head and output projections at zero."""
        nn.init.normal_(self.embedding.weight)
        nn.init.zeros_(self.head.weight)
        for module in self.modules():
            if isinstance(module, Deformer | Attention | ShortConv | MLP):
                module.reset_parameters()

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        first: Int[Tensor, "B T"] | None = None,
        state: DecodeState | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "B _ V"]:
        """Logits of the token after each of `tokens`, in fp32.

        Args:
            tokens: token ids, or, with a state, the ids that continue it.
            first: first row each token may read: where its document begins, or the row after left padding.
                Absolute rows, also with a state; the state remembers it for the tokens that follow.
            state: from `new_state`; gets the tokens appended.
            last_only: logits of the last token only, [B, 1, V].
        """
        self._check(tokens, first, state)
        if state is not None and _keeps(self, "hidden", "logits"):
            stepped = step(self, tokens, first, state, logits=True)
            if stepped is not None:
                return stepped
        x = self.hidden(tokens, first=first, state=state)
        return self.logits(x[:, -1:] if last_only else x, step=state is not None)

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        *,
        first: Int[Tensor, "B T"] | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """Cross-entropy in nats of `targets` (-1 is ignored): the mean, or with reduction="none" [B, T].

        Raises:
            InputError: targets of another shape than tokens.
        """
        if targets.shape != tokens.shape:
            raise InputError(
                f"Each token needs one target, that which follows it; got tokens {tuple(tokens.shape)} and "
                f"targets {tuple(targets.shape)}. Give text[:, :-1] and text[:, 1:]."
            )
        hidden, wanted = self.hidden(tokens, first=first), targets.flatten()
        if _keeps(self, "logits") and is_bare(self.head):
            cap = self.config.softcap
            weight, rows = self.head.weight, hidden.flatten(0, 1)
            loss = cross_entropy(rows, weight, wanted, softcap=cap, reduction=reduction)
        else:
            loss = cross_entropy_of(self.logits(hidden).flatten(0, 1), wanted, reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss

    def state_bytes(self, num_tokens: int) -> int:
        """Bytes that a decode state of one sequence must hold after `num_tokens` tokens.

        Rows of anchored heads and attention grow always, those of `now` and `box` heads (sums, in fp64) up to
        max_shift, if it is set; and the index of n-grams grows.
        """
        config, size = self.config, self.head.weight.element_size()
        bounded = num_tokens if config.max_shift is None else min(num_tokens, config.max_shift + 1)
        of_kind = {"now": size * bounded, "box": 8 * bounded}
        heads = sum(of_kind.get(kind, size * num_tokens) for kind in config.head_kinds)
        window = min(num_tokens, config.attention_window)
        of_layer = {
            "D": heads * config.head_dim * (2 if config.preset == "product" else 1),
            "A": 2 * num_tokens * config.width * size,
            "W": 2 * window * config.width * size,
            "C": 2 * config.width * size,
        }
        rows = sum(of_layer[kind] for kind in config.layer_kinds)
        # Of the index a token, and for each n a link and two places in a table.
        index = 4 + 12 * len(self.orders) if self.orders else 0
        return rows + index * num_tokens


def _keeps(model: Backbone, *names: str) -> bool:
    """Whether the model's class has left these methods as they are: a step in one piece takes their place."""
    return all(getattr(type(model), name) is getattr(Headed, name) for name in names)


def _block(config: StarLMConfig, kind: str) -> Block:
    if kind in "AW":
        window = config.attention_window if kind == "W" else None
        mixer = Attention(config.width, config.num_heads, rope_base=config.rope_base, window=window)
    elif kind == "C":
        mixer = ShortConv(config.width)
    else:
        mixer = Deformer(
            config.width,
            config.num_heads,
            preset=config.preset,
            kinds=config.kinds,
            max_shift=config.max_shift,
            shift_init=config.shift_init,
            window=max(2, config.context // 2),
        )
    return Block(mixer, MLP(config.width, config.mlp_ratio) if config.mlp_ratio else None)


def _rows_of(embedding: nn.Embedding, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    try:
        return embedding(tokens)
    except IndexError:
        (low, high), known = tokens.aminmax(), len(embedding.weight) - 1
        if low >= 0 and high <= known:
            raise
        raise IndexError(f"Token ids must be 0 to {known}; got {low} to {high}.") from None
