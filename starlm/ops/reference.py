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
    exact = torch.promote_types(torch.promote_types(values.dtype, shift.dtype), torch.float32)
    near, far, fraction = rows_read(shift.to(exact), origin, first, past)
    rows = values.to(exact).flatten(2)
    v_near, v_far = (rows.gather(1, row.clamp(min=0).flatten(2)).view(shift.shape) for row in (near, far))
    read = v_near + fraction * (v_far - v_near)
    return torch.where(near < 0, 0.0, read).to(values.dtype)


def rows_read(
    shift: Float[Tensor, "B T H C"],
    origin: Int[Tensor, "B T H"] | None = None,
    first: Int[Tensor, "B T"] | None = None,
    past: Int[Tensor, " B"] | int = 0,
) -> tuple[Int[Tensor, "B T H C"], Int[Tensor, "B T H C"], Float[Tensor, "B T H C"]]:
    """Where `deform` reads: rows a and b and fraction f of out = v[a] + f * (v[b] - v[a]).

    Returns:
        a and b, int64, -1 for both where the origin is negative; f with the gradient of `shift`.
    """
    batch, length = shift.shape[:2]
    past = torch.as_tensor(past, device=shift.device).view(-1, 1)
    last = (past + torch.arange(length, device=shift.device)).expand(batch, length)[:, :, None, None]
    start = torch.zeros_like(last) if first is None else first[:, :, None, None].long().clamp(min=0)
    origin = last if origin is None else origin[..., None].long()

    # Floor and fraction come before the position: rows stay integers at every length.
    whole = torch.floor(shift.detach())
    fraction = torch.where(whole.isinf() | (origin < 0), 0.0, shift - whole)
    back = whole.nan_to_num(0.0, FAR, -FAR).clamp(-FAR, FAR).long()
    near, far = (
        torch.minimum(torch.maximum(origin - back - step, start), last).masked_fill(origin < 0, -1)
        for step in (0, 1)
    )
    return near, far, fraction
