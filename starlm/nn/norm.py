"""RMSNorm without parameters."""

import torch
from jaxtyping import Float
from torch import Tensor


def rms(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """`x` scaled to root mean square 1 over its last dimension, in its own dtype (arXiv 1910.07467)."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
