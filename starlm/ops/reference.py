"""The operator `deform` in plain PyTorch: its definition, and the oracle of every faster path."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Beyond any row number, exact in fp32, and far from the ends of int64: stands in for infinite shifts.
FAR = 2.0**40


def deform_reference(
    values: Float[Tensor, "B S H C"],
    shift: Float[Tensor, "B T H C"],
    origin: Int[Tensor, "B T H"] | None = None,
    first: Int[Tensor, "B T"] | None = None,
    past: Int[Tensor, " B"] | int = 0,
) -> Float[Tensor, "B T H C"]:
    """Each channel's value `shift` rows before its origin; see `starlm.ops.deform` for the contract."""
    batch, length = shift.shape[:2]
    exact = torch.promote_types(torch.promote_types(values.dtype, shift.dtype), torch.float32)
    past = torch.as_tensor(past, device=values.device).view(-1, 1)
    last = (past + torch.arange(length, device=values.device)).expand(batch, length)[:, :, None, None]
    start = torch.zeros_like(last) if first is None else first[:, :, None, None].long()
    origin = last if origin is None else origin[..., None].long()

    # Floor and fraction come before the position: rows stay integers at every length.
    whole = torch.floor(shift.detach().to(exact))
    fraction = torch.where(whole.isinf() | (origin < 0), 0.0, shift.to(exact) - whole)
    back = whole.nan_to_num(0.0, FAR, -FAR).clamp(-FAR, FAR).long()
    near = torch.minimum(torch.maximum(origin - back, start), last).flatten(2)
    far = torch.minimum(torch.maximum(origin - back - 1, start), last).flatten(2)

    rows = values.to(exact).flatten(2)
    near, far = (rows.gather(1, row).view(shift.shape) for row in (near, far))
    read = near + fraction * (far - near)
    return torch.where(origin < 0, 0.0, read).to(values.dtype)
