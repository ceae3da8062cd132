"""Causal attention: the baseline; in a pattern of layers A, or W with a sliding window."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from starlm.nn.linear import init_matrix, linear
from starlm.nn.state import LayerState, Reserved
from starlm.ops.elementwise import rms

if TYPE_CHECKING:
    from starlm.ops.cpu_program import Code, Row


class Attention(nn.Module):
    """Softmax attention with rotary positions (arXiv 2104.09864) and normalised queries and keys."""

    streams = ("rows",)

    def __init__(
        self, dim: int, heads: int, *, rope_base: float = 10000.0, window: int | None = None
    ) -> None:
        """Args:
        dim: width D.
        heads: H; D = H * C, C even.
        rope_base: base of the rotary frequencies; 0 leaves positions out.
        window: rows that a query sees, its own among them; None is all. Then cost is linear in T, and
            decoding keeps this many rows.
        """
        super().__init__()
        self.dim, self.heads, self.rope_base, self.window = dim, heads, rope_base, window
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
        state: LayerState | Reserved | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend to rows first .. own row; arguments as for `Deformer.forward`, `origins` without effect."""
        batch, length, _ = x.shape
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)) for w in (self.query, self.key, self.value))
        if isinstance(state, Reserved):
            from starlm.ops import triton_attention  # triton takes half a second to import

            y = triton_attention.attend(q, k, v, state.turns, state.streams[0], window=self.window)
            return self.out(y.flatten(-2))
        if state is None:
            past = torch.zeros(batch, dtype=torch.long, device=x.device)
        else:
            past = torch.tensor(state.lengths, dtype=torch.long, device=x.device)
        position = past[:, None] + torch.arange(length, device=x.device)
        # Positions count from the document's start, so a packed document sees what it would see alone.
        rotary = position if first is None else (position - first).clamp(min=0)
        q, k = rms(q), rms(k)
        if self.rope_base:
            q, k = (_rotate(heads, rotary, self.rope_base) for heads in (q, k))
        if state is not None:
            # Slot by slot: no padding, no mask for a single token, no rounding that depends on neighbours.
            keys, values = (state.append(name, rows, self._keep) for name, rows in (("key", k), ("value", v)))
            parts = [
                _attend(
                    q[slot : slot + 1],
                    k,
                    v,
                    None if first is None else first[slot : slot + 1] - base,
                    self.window,
                )
                for slot, ((k, base), (v, _)) in enumerate(zip(keys, values, strict=True))
            ]
            y = torch.cat(parts)
        elif self.window is not None and self.window < length:
            y = _windowed(q, k, v, first, self.window)
        else:
            y = _attend(q, k, v, first, None)
        return self.out(y.flatten(-2))

    @property
    def _keep(self) -> int | None:
        """How far back the rows of a decode state are read."""
        return None if self.window is None else self.window - 1

    @property
    def row_layout(self) -> tuple:
        """As `Deformer.row_layout`."""
        return self.dim, self.heads, self.rope_base, self.window

    def make_room(
        self, stream: str, like: Tensor, first: Int[Tensor, "B 1"] | None, state: LayerState
    ) -> Int[np.ndarray, "3 3 B"] | None:
        """As `Deformer.make_room`: of keys, values, and nothing.

        Args:
            stream: the only one of `streams`.
        """
        row = like.new_empty(0, self.heads, self.dim // self.heads)
        found = [state.make_room(name, self._keep, row, first) for name in ("key", "value")]
        keys, values = found
        if keys is None or values is None:
            return None
        return np.stack([keys, values, np.zeros_like(keys)])

    def turns(self, place: Int[Tensor, "3 B"]) -> Float[Tensor, "B 2 _"]:
        """Cosines and sines of what rotary positions turn pairs of channels by; [B, 2, 0] without them.

        Args:
            place: of the keys of each slot, as `make_room` says.
        """
        half = self.dim // self.heads // 2 if self.rope_base else 0
        # Both rows are counted from the same one.
        _, past, first = place
        angle = _angles((past - first).clamp(min=0), half, self.rope_base)
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    def write_step(self, code: "Code", layer: int) -> None:
        """Add to the code of a step: x += what `forward` makes of rms(x), as number `layer` of a model."""
        from starlm.ops.cpu_product import ADD  # numba takes half a second to import

        width = self.dim

        def project(name: str) -> "Row":
            weights, out = getattr(self, name), code.row(name, width)
            code.product(code.x, weights.weight, out, bias=weights.bias, normalise=True)
            return out

        query, key, value = map(project, ("query", "key", "value"))
        read = code.row("read", width)
        code.attend(query, key, value, read, layer=layer, heads=self.heads, window=self.window)
        code.product(read, self.out.weight, code.x, bias=self.out.bias, then=ADD)


def _attend(
    q: Float[Tensor, "B T H C"],
    k: Float[Tensor, "B S H C"],
    v: Float[Tensor, "B S H C"],
    first: Int[Tensor, "B T"] | None,
    window: int | None,
) -> Float[Tensor, "B T H C"]:
    """Attention of the last T of S rows to rows first .. own row, of those only the last `window`."""
    length, num_rows = q.shape[1], k.shape[1]
    if window is not None and num_rows > window + length - 1:
        cut = num_rows - (window + length - 1)
        k, v, num_rows = k[:, cut:], v[:, cut:], num_rows - cut
        first = None if first is None else first - cut
    past, mask = num_rows - length, None
    # One token, or none before: there is nothing to mask but the future.
    if first is not None or (length > 1 and (past or (window is not None and window < length))):
        position = (past + torch.arange(length, device=q.device))[None]
        mask = _mask(position, first, num_rows, window)
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    # A bool even where torch.export has a symbol for the length.
    causal = bool(mask is None and length > 1)
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return y.transpose(1, 2)


def _mask(position: Tensor, first: Tensor | None, num_rows: int, window: int | None) -> Tensor:
    """True where query t may read row s: first <= s <= t and t - window < s, or s == t; [B, 1, T, S]."""
    rows = torch.arange(num_rows, device=position.device)
    own = position[:, :, None]
    allowed = rows <= own
    if window is not None:
        allowed = allowed & (rows > own - window)
    if first is not None:
        allowed = (allowed & (rows >= first[:, :, None])) | (rows == own)
    return allowed[:, None]


def _windowed(
    q: Float[Tensor, "B T H C"],
    k: Float[Tensor, "B T H C"],
    v: Float[Tensor, "B T H C"],
    first: Int[Tensor, "B T"] | None,
    window: int,
) -> Float[Tensor, "B T H C"]:
    """Attention to the last `window` rows, in blocks that long which see themselves and the one before."""
    batch, length = q.shape[:2]
    blocks = -(-length // window)
    padding = blocks * window - length
    q, k, v = (nn.functional.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
    q, k, v = (x.unflatten(1, (blocks, window)) for x in (q, k, v))
    # [B, blocks, 2 * window, H, C]: the block before the first is empty, and masked.
    k, v = (torch.cat([nn.functional.pad(x[:, :-1], (0, 0) * 3 + (1, 0)), x], dim=2) for x in (k, v))
    query = torch.arange(blocks * window, device=q.device).view(blocks, window, 1)
    row = query[:, :1] - window + torch.arange(2 * window, device=q.device)
    allowed = (row <= query) & (row > query - window) & (row >= 0)
    allowed = allowed.expand(batch, -1, -1, -1)
    if first is not None:
        start = nn.functional.pad(first, (0, padding)).view(batch, blocks, window, 1)
        allowed = (allowed & (row >= start)) | (row == query)
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed.flatten(0, 1)[:, None])
    return y.transpose(1, 2).unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]


def _angles(position: Int[Tensor, "..."], half: int, base: float) -> Float[Tensor, "... {half}"]:
    """By which each of `half` pairs of channels is turned: pair c by position * base^(-c / half), in fp32."""
    frequency = base ** (-torch.arange(half, device=position.device, dtype=torch.float32) / half)
    return position.float()[..., None] * frequency


def _rotate(x: Float[Tensor, "B T H C"], position: Int[Tensor, "B T"], base: float) -> Tensor:
    """Turn pairs of channels (c, c + C/2)."""
    angle = _angles(position, x.shape[-1] // 2, base)[:, :, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
