"""A gated short convolution, as LFM2 mixes tokens (arXiv 2511.23404): a peer; C in a pattern of layers."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from starlm.nn.linear import init_matrix, linear
from starlm.nn.state import LayerState

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
        length = x.shape[1]
        rows, back = self.before(x) * self.value(x), TAPS - 1
        if state is None:
            rows = nn.functional.pad(rows, (0, 0, back, 0))
        else:
            rows = state.recent("conv", rows[:, :, None], back)[:, :, 0]
        taps, reach = self.taps.to(rows.dtype), None
        if first is not None:
            past = torch.zeros(1, dtype=torch.long, device=x.device)
            if state is not None:
                past = torch.tensor(state.lengths, device=x.device)
            own = past[:, None] + torch.arange(length, device=x.device)
            reach = (own - first).clamp(min=0)[..., None]
        y = 0
        for step in range(TAPS):
            row = rows[:, back - step : back - step + length] * taps[step]
            y = y + (row if reach is None else row * (reach >= step))
        return self.out(self.after(x) * y)
