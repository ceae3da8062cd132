"""One layer of the residual stream."""

from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor, nn

from starlm.nn.attention import Attention
from starlm.nn.conv import ShortConv
from starlm.nn.deformer import Deformer
from starlm.nn.mlp import MLP
from starlm.nn.norm import rms, rms_unseen
from starlm.nn.state import LayerState


class Block(nn.Module):
    """x += mixer(rms x); x += mlp(rms x), the latter if there is an MLP."""

    def __init__(self, mixer: Deformer | Attention | ShortConv, mlp: MLP | None) -> None:
        super().__init__()
        self.mixer, self.mlp = mixer, mlp

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        first: Int[Tensor, "B T"] | None = None,
        origins: Mapping[int, Int[Tensor, "B T"]] | None = None,
        state: LayerState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after this layer."""
        norm = rms if state is None else rms_unseen
        x = x + self.mixer(norm(x), first=first, origins=origins, state=state)
        return x if self.mlp is None else x + self.mlp(norm(x))
