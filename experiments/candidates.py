"""Layers that were tried in place of star's, to look for content without an attention matrix.

Written as compositions, for training only: no decode state, no fused kernels. What they gave is in
docs/evidence.md.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from starlm.nn.deformer import Deformer
from starlm.nn.linear import init_matrix, linear
from starlm.ops import deform
from starlm.ops.box import box, prefix_sums
from starlm.ops.constants import BOX_SCALE
from starlm.ops.elementwise import rms

Origins = Mapping[int, Int[Tensor, "B T"]]


class Star(Deformer):
    """A star layer whose box heads weigh what they sum up, or whose heads look whether what they read fits.

    keys: a box head's mean is weighted by the exponential of a number that each token says of itself, one per
    box head ("head") or one per channel ("channel"). fit: a head's output is scaled by 2 sigmoid(a s + b),
    with s the product of gate and read, both normalised, and learned a and b per head, from 0. back: an
    anchored head without an anchor measures from its own row ("now"), or from the anchor of the next shorter
    n-gram that has one, and last from its own row ("chain").
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int,
        keys: Literal["", "head", "channel"] = "",
        fit: bool = False,
        back: Literal["", "now", "chain"] = "",
    ) -> None:
        super().__init__(dim, heads, preset="star", window=window)
        self.back = back
        self.weigh = None
        if keys:
            boxes = self._counts["boxes"]
            self.weigh = linear(dim, boxes if keys == "head" else boxes * dim // heads)
            nn.init.zeros_(self.weigh.weight)
        self.fit = nn.Parameter(torch.zeros(2, heads, 1)) if fit else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        first: Int[Tensor, "B T"] | None = None,
        origins: Origins | None = None,
        state: None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Deformer.forward`."""
        values = rms(self.value(x).unflatten(-1, (self.heads, -1)))
        distances = self._distances(self.shift(x))
        read = [deform(values[:, :, self.spans["now"]], distances["now"], first=first)]
        read.append(
            deform(
                values[:, :, self.spans["anchored"]],
                distances["anchored"],
                origin=self._anchors(origins or {}),
                first=first,
            )
        )
        v = values[:, :, self.spans["box"]].float()
        if self.weigh is None:
            mean, width = box(prefix_sums(v), distances["box"], first=first)
        else:
            weight = self.weigh(x).float().clamp(-8, 8).exp().unflatten(-1, (v.shape[2], -1)).expand_as(v)
            whole, _ = box(prefix_sums(weight), distances["box"], first=first)
            mean, width = box(prefix_sums(weight * v), distances["box"], first=first)
            mean = mean / whole
        read.append((mean * width.detach().clamp(max=BOX_SCALE).sqrt()).to(values.dtype))
        y, gate = torch.cat(read, dim=2), self.gate(x).unflatten(-1, (self.heads, -1))
        if self.fit is not None:
            score = (rms(gate.float()) * rms(y.float())).sum(-1, keepdim=True) * y.shape[-1] ** -0.5
            y = y * (2 * torch.sigmoid(self.fit[0] * score + self.fit[1]))
        return self.out((y * torch.sigmoid(gate)).flatten(-2).to(x.dtype))

    def _anchors(self, origins: Origins) -> Int[Tensor, "B T A"]:
        found = [origins[n] for n in self.orders]
        if self.back:
            own = torch.arange(found[0].shape[1], device=found[0].device)[None]
            shorter = dict.fromkeys(self.orders, own)
            if self.back == "chain":
                last = own
                for n in sorted(set(self.orders)):
                    shorter[n] = last
                    last = torch.where(origins[n] < 0, last, origins[n])
            found = [
                torch.where(origins[n] < 0, shorter[n], o) for n, o in zip(self.orders, found, strict=True)
            ]
        return torch.stack(found, dim=-1)


class Taps(nn.Module):
    """Each head reads keys and values at K learned distances, and behind anchors, and weighs them by content.

    Softmax over these places only: linear in T, a constant number of reads per token. Queries and keys are
    normalised as in `Attention`; a bias per head and place stands for positions.
    """

    def __init__(self, dim: int, heads: int, *, near: int, reach: int, orders: tuple[int, ...] = ()) -> None:
        """Args:
        near: K, half of them at 0, 1, 2 ..., the others log-spaced from there to `reach`.
        orders: n of the n-grams behind whose last occurrence there is one more place.
        """
        super().__init__()
        self.heads, self.near, self.orders = heads, near, orders
        self.query, self.key, self.value = linear(dim, dim), linear(dim, dim), linear(dim, dim)
        self.out = linear(dim, dim)
        for layer in (self.query, self.key, self.value):
            init_matrix(layer)
        nn.init.zeros_(self.out.weight)
        half = near // 2
        far = torch.logspace(0, 1, near - half + 1, base=reach / half) * half
        start = torch.cat([torch.arange(half).float(), far[1:]])
        self.distance = nn.Parameter(start.repeat(heads))
        self.bias = nn.Parameter(torch.zeros(heads * (near + len(orders))))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        first: Int[Tensor, "B T"] | None = None,
        origins: Origins | None = None,
        state: None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Deformer.forward`."""
        heads, places = self.heads, self.near + len(self.orders)
        q, k, v = (w(x).unflatten(-1, (heads, -1)) for w in (self.query, self.key, self.value))
        q, k = rms(q), rms(k)
        rows = torch.cat([k, v], dim=-1)
        batch, length, _, channels = rows.shape
        rows = rows[:, :, :, None].expand(-1, -1, -1, places, -1).flatten(2, 3)
        own = torch.arange(length, device=x.device)[None, :, None].expand(batch, -1, self.near)
        origin = torch.cat([own, *((origins or {})[n][..., None] for n in self.orders)], dim=-1)
        distance = self.distance.view(heads, self.near)
        distance = torch.cat([distance, distance.new_zeros(heads, len(self.orders))], dim=1)
        start = torch.zeros_like(own[..., :1]) if first is None else first[..., None]
        beyond = origin[:, :, None] - distance < start[:, :, None]
        beyond[..., 0] = False
        beyond |= (origin < 0)[:, :, None]
        shift = distance.flatten()[None, None, :, None].expand(batch, length, -1, channels)
        origin = origin[:, :, None].expand(-1, -1, heads, -1).flatten(2)
        read = deform(rows, shift, origin=origin, first=first).unflatten(2, (heads, places))
        keys, values = read.chunk(2, dim=-1)
        score = (q[:, :, :, None].float() * keys.float()).sum(-1) * q.shape[-1] ** -0.5
        score = score + self.bias.view(heads, places)
        weight = score.masked_fill(beyond, float("-inf")).softmax(-1)
        y = (weight[..., None] * values.float()).sum(3)
        return self.out(y.flatten(-2).to(x.dtype))
