"""One layer of the residual stream."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor, nn

from starlm.nn.attention import Attention
from starlm.nn.conv import ShortConv
from starlm.nn.deformer import Deformer
from starlm.nn.mlp import MLP
from starlm.nn.state import LayerState, Reserved
from starlm.ops.elementwise import rms

if TYPE_CHECKING:
    from starlm.ops.cpu_program import Code


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
        state: LayerState | Reserved | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after this layer."""
        step = state is not None
        x = x + self.mixer(rms(x, step=step, cast=True), first=first, origins=origins, state=state)
        return x if self.mlp is None else x + self.mlp(rms(x, step=step, cast=True))

    def write_step(self, code: "Code", layer: int) -> None:
        """Add to the code of a step what `forward` does to code.x; `layer` is its number in the model."""
        assert not isinstance(self.mixer, ShortConv)
        self.mixer.write_step(code, layer)
        if self.mlp is not None:
            self.mlp.write_step(code)


def through(
    blocks: Iterable[nn.Module],
    x: Float[Tensor, "B T D"],
    layers: Sequence[LayerState | Reserved | None],
    *,
    first: Int[Tensor, "B T"] | None = None,
    origins: Mapping[int, Int[Tensor, "B T"]] | None = None,
    seen: list[Tensor] | None = None,
) -> Float[Tensor, "B T D"]:
    """The residual stream from embeddings x through all blocks, normalised before and after.

    Args:
        layers: of a decode state, one for each block, or None.
        first, origins: as for `Deformer.forward`.
        seen: gets what each block reads, and the result.
    """
    step = any(layer is not None for layer in layers)
    x = rms(x, step=step)
    for block, layer in zip(blocks, layers, strict=True):
        if seen is not None:
            seen.append(x)
        x = block(x, first=first, origins=origins, state=layer)
    x = rms(x, step=step, cast=True)
    if seen is not None:
        seen.append(x)
    return x
