"""StarLM's Deformer layer: every head and channel predicts how far back to read, and reads there."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from starlm.errors import InputError
from starlm.nn.linear import init_matrix, linear
from starlm.nn.norm import rms
from starlm.nn.state import LayerState, local
from starlm.ops import deform

Preset = Literal["product", "value", "gated"]


class Deformer(nn.Module):
    """Mixes tokens by predicted shifts, in time linear in T and constant per token when decoding.

    From the normalised residual stream x, with `rms` per head::

        product   q = rms(Wq x), k = rms(Wk x);  y = deform(q, softplus(Wsq x)) * deform(k, softplus(Wsk x))
        value     y = Wo deform(rms(Wv x), softplus(Ws x))
        gated     y = Wo (deform(rms(Wv x), softplus(Ws x)) * sigmoid(Wg x))

    Example:
        >>> layer = Deformer(dim=64, heads=4)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        preset: Preset = "gated",
        max_shift: int | None = None,
        shift_init: float | None = None,
    ) -> None:
        """Args:
            dim: width D of the residual stream.
            heads: H; D = H * C.
            preset: the formula, see above.
            max_shift: shifts are clipped to this many tokens, so decoding keeps a bounded number of rows.
            shift_init: adds a bias to the shift projections that makes every channel start at this shift,
                in tokens. Without it shifts start at softplus(N(0, 1)): 0.8 on average.

        Raises:
            InputError: heads does not divide dim, or an unknown preset.
        """
        super().__init__()
        if dim % heads:
            raise InputError(f"Deformer needs heads to divide dim; got heads={heads}, dim={dim}.")
        if preset not in ("product", "value", "gated"):
            raise InputError(f"Deformer has the presets product, value and gated; got {preset!r}.")
        self.dim, self.heads, self.preset = dim, heads, preset
        self.max_shift, self.shift_init = max_shift, shift_init
        if preset == "product":
            self.query, self.key = linear(dim, dim), linear(dim, dim)
            self.query_shift, self.key_shift = self._shift_projection(), self._shift_projection()
        else:
            self.value, self.shift = linear(dim, dim), self._shift_projection()
            if preset == "gated":
                self.gate = linear(dim, dim)
            self.out = linear(dim, dim)
        self.reset_parameters()

    def _shift_projection(self) -> nn.Linear:
        return nn.Linear(self.dim, self.dim, bias=self.shift_init is not None)

    def reset_parameters(self) -> None:
        """Start the weights: the output projection at zero, a shift's bias at `shift_init` tokens."""
        for name, layer in self.named_children():
            assert isinstance(layer, nn.Linear)
            if name == "out":
                nn.init.zeros_(layer.weight)
            else:
                init_matrix(layer)
            if self.shift_init is not None and layer.bias is not None:
                # softplus^-1, in the form that does not overflow.
                nn.init.constant_(layer.bias, self.shift_init + math.log(-math.expm1(-self.shift_init)))

    def shift_parameters(self) -> list[nn.Parameter]:
        """The shift projections: a parameter group of their own."""
        return [p for name, p in self.named_parameters() if "shift" in name]

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        first: Int[Tensor, "B T"] | None = None,
        state: LayerState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the tokens of x.

        Args:
            x: normalised residual stream.
            first: first row that each token may read (absolute, when there is a state); default 0.
            state: rows of earlier tokens; x continues them, and its rows are appended.
        """
        if self.preset == "product":
            q = self._read("query", self.query(x), self.query_shift(x), first, state)
            return q * self._read("key", self.key(x), self.key_shift(x), first, state)
        y = self._read("value", self.value(x), self.shift(x), first, state)
        if self.preset == "gated":
            y = y * torch.sigmoid(self.gate(x))
        return self.out(y)

    def _read(
        self,
        stream: str,
        values: Float[Tensor, "B T D"],
        shift: Float[Tensor, "B T D"],
        first: Int[Tensor, "B T"] | None,
        state: LayerState | None,
    ) -> Float[Tensor, "B T D"]:
        """deform(rms(values), softplus(shift)), continuing the rows of `stream` that the state holds."""
        heads = (self.heads, self.dim // self.heads)
        values = rms(values.unflatten(-1, heads))
        # fp32 at the least: a distance of 300 tokens has no fraction left in bf16.
        shift = shift.to(torch.promote_types(shift.dtype, torch.float32))
        reach = nn.functional.softplus(shift).unflatten(-1, heads)
        if self.max_shift is not None:
            reach = reach.clamp(max=self.max_shift)
        if state is None:
            return deform(values, reach, first=first).flatten(-2)
        rows, base = state.append(stream, values, keep=self.max_shift)
        first, past = local(first, state.lengths, base, values)
        return deform(rows, reach, first=first, past=past).flatten(-2)
