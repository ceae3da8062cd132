"""Causal attention: the baseline, and the A in a pattern of layers."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from starlm.nn.linear import init_matrix, linear
from starlm.nn.norm import rms
from starlm.nn.state import LayerState, local


class Attention(nn.Module):
    """Softmax attention with rotary positions (arXiv 2104.09864) and normalised queries and keys."""

    def __init__(self, dim: int, heads: int, *, rope_base: float = 10000.0) -> None:
        """Args: dim: width D. heads: H; D = H * C, C even. rope_base: base of the rotary frequencies."""
        super().__init__()
        self.heads, self.rope_base = heads, rope_base
        self.query, self.key, self.value = linear(dim, dim), linear(dim, dim), linear(dim, dim)
        self.out = linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the weights: the output projection at zero."""
        for layer in (self.query, self.key, self.value):
            init_matrix(layer)
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        first: Int[Tensor, "B T"] | None = None,
        origins: Mapping[int, Int[Tensor, "B T"]] | None = None,
        state: LayerState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend to rows first .. own row; arguments as for `Deformer.forward`, `origins` without effect."""
        batch, length, _ = x.shape
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)) for w in (self.query, self.key, self.value))
        past = torch.tensor(
            [0] * batch if state is None else state.lengths, dtype=torch.long, device=x.device
        )
        position = past[:, None] + torch.arange(length, device=x.device)
        # Positions count from the document's start, so a packed document sees what it would see alone.
        rotary = position if first is None else (position - first).clamp(min=0)
        q, k = (_rotate(rms(heads), rotary, self.rope_base) for heads in (q, k))
        mask = None
        if state is not None:
            k, base = state.append("key", k, keep=None)
            v, _ = state.append("value", v, keep=None)
            _, start = local(first, state.lengths, base, x)
            # One token, or the first call: nothing to mask within equally long slots.
            if first is not None or not isinstance(start, int) or (start and length > 1):
                mask = _mask(position, first, k.shape[1])
        elif first is not None:
            mask = _mask(position, first, length)
        causal = mask is None and length > 1
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(-2))


def _mask(position: Tensor, first: Tensor | None, num_rows: int) -> Tensor:
    """True where query t may read row s: first <= s <= t, or s == t; [B, 1, T, S]."""
    rows = torch.arange(num_rows, device=position.device)
    own = position[:, :, None]
    allowed = rows <= own
    if first is not None:
        allowed = (allowed & (rows >= first[:, :, None])) | (rows == own)
    return allowed[:, None]


def _rotate(x: Float[Tensor, "B T H C"], position: Int[Tensor, "B T"], base: float) -> Tensor:
    """Rotate each pair of channels (c, c + C/2) by position * base^(-2c/C), angles in fp32."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (position.float()[..., None] * frequency)[:, :, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
