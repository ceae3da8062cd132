"""The position-wise part of a block."""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from starlm.nn.linear import init_matrix, linear
from starlm.ops.elementwise import relu2

if TYPE_CHECKING:
    from starlm.ops.cpu_program import Code


class MLP(nn.Module):
    """relu² MLP, D -> ratio * D -> D (Primer, arXiv 2109.08668)."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.up = linear(dim, ratio * dim)
        self.down = linear(ratio * dim, dim)

    def reset_parameters(self) -> None:
        """Start the weights: `down` at zero, so that the block starts as the identity."""
        init_matrix(self.up)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """down(relu(up(x))²)"""
        return self.down(relu2(self.up(x)))

    def write_step(self, code: "Code") -> None:
        """Add to the code of a step: x += what `forward` makes of rms(x)."""
        from starlm.ops.cpu_product import ADD, RELU2  # numba takes half a second to import

        hidden = code.row("mlp", len(self.up.weight))
        code.product(code.x, self.up.weight, hidden, bias=self.up.bias, normalise=True, then=RELU2)
        code.product(hidden, self.down.weight, code.x, bias=self.down.bias, then=ADD)
