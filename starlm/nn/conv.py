"""A gated short convolution, as LFM2 mixes tokens (arXiv 2511.23404): a peer; C in a pattern of layers."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from starlm.nn.linear import init_matrix, linear
from starlm.nn.state import LayerState, local

TAPS = 3


class ShortConv(nn.Module):
    """y = Wo (Wc x * conv(Wb x * Wv x)), with a causal depthwise convolution of 3 taps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.before, self.after, self.value = linear(dim, dim), linear(dim, dim), linear(dim, dim)
        self.taps = nn.Parameter(torch.empty(TAPS, dim))
        self.out = linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the weights: taps at variance 1 in sum, the output projection at zero."""
        for layer in (self.before, self.after, self.value):
            init_matrix(layer)
        nn.init.normal_(self.taps, std=TAPS**-0.5)
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        first: Int[Tensor, "B T"] | None = None,
        origins: Mapping[int, Int[Tensor, "B T"]] | None = None,
        state: LayerState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the last 3 tokens; arguments as for `Deformer.forward`, `origins` without effect."""
        batch, length, _ = x.shape
        rows = self.before(x) * self.value(x)
        if state is None:
            past = torch.zeros(batch, dtype=torch.long, device=x.device)
        else:
            kept, base = state.append("conv", rows[:, :, None], keep=TAPS - 1)
            rows = kept[:, :, 0]
            first, start = local(first, state.lengths, base, x)
            past = torch.as_tensor(start, device=x.device).expand(batch)
        own = past[:, None] + torch.arange(length, device=x.device)
        start = torch.zeros_like(own) if first is None else torch.minimum(first, own)
        taps = self.taps.to(rows.dtype)
        y = 0
        for back in range(TAPS):
            if state is None:
                row = nn.functional.pad(rows, (0, 0, back, 0))[:, :length]
            else:
                row = rows.gather(1, (own - back).clamp(min=0)[..., None].expand_as(x))
            y = y + row * ((own - back >= start)[..., None] * taps[back])
        return self.out(self.after(x) * y)
