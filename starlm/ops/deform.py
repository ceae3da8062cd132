"""The public operator, and the one place where backends, autograd and torch.compile meet."""

from importlib import import_module
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from starlm.errors import InputError
from starlm.ops.backends import HAS_TRITON
from starlm.ops.plain import is_plain
from starlm.ops.reference import deform_reference

Backend = Literal["auto", "reference", "cpu", "triton"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def deform(
    values: Float[Tensor, "B S H C"],
    shift: Float[Tensor, "B T H C"],
    *,
    origin: Int[Tensor, "B T H"] | None = None,
    first: Int[Tensor, "B T"] | None = None,
    past: int | Int[Tensor, " B"] = 0,
    backend: Backend = "auto",
) -> Float[Tensor, "B T H C"]:
    """Read, for every query, head and channel, the value `shift` rows before `origin`.

    For the query at row t (absolute row `last = past + t`), origin o and shift s::

        k = floor(s), f = s - k
        a = clip(o - k, first, last)    b = clip(o - k - 1, first, last)
        out = v[a] + f * (v[b] - v[a])  d out / d s = v[b] - v[a]

    so integer shifts read one row exactly, and no query ever reads past its own row. Arithmetic is fp32
    (fp64 if an input is); the gradient of `values` is a scatter-add. Cost: O(B T H C), whatever the shifts.

    Args:
        values: rows that can be read; S >= past + T. fp16, bf16, fp32 or fp64.
        shift: how far back of its origin each channel reads, in tokens. Any real number: +inf reads
            `first`, -inf the query's own row, NaN gives NaN.
        origin: the row that shift 0 reads; default the query's own. Negative means "no such row":
            output 0, no gradient.
        first: first row that a query may read (start of its document, or after left padding); default 0.
            Where it lies beyond the query's own row, the query reads its own row only; below 0 it is 0.
        past: rows before the first query: one number, or one per batch row.
        backend: `reference` is plain PyTorch, `cpu` and `triton` the fused kernels for CPU and GPU; `auto`
            takes the fused kernels where the device has them, and not within `starlm.ops.plain`.

    Returns:
        What was read, in the dtype of `values`.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or a backend that the device does not have.

    Example:
        >>> values = torch.arange(4.0).view(1, 4, 1, 1)
        >>> deform(values, torch.full((1, 4, 1, 1), 0.5)).flatten().tolist()
        [0.0, 0.5, 1.5, 2.5]
    """
    rows_before = _check(values, shift, origin, first, past, backend)
    if backend == "auto":
        backend = _fastest(values.device)
    if backend == "reference":
        return deform_reference(values, shift, origin, first, 0 if rows_before is None else rows_before)
    return _deform(values, shift, origin, first, rows_before, backend)


def _fastest(device: torch.device) -> Backend:
    if is_plain():
        return "reference"
    if device.type == "cuda" and HAS_TRITON:
        return "triton"
    return "cpu" if device.type == "cpu" else "reference"


@torch.library.custom_op("starlm::deform", mutates_args=())
def _deform(
    values: Tensor,
    shift: Tensor,
    origin: Tensor | None,
    first: Tensor | None,
    past: Tensor | None,
    backend: str,
) -> Tensor:
    return _kernels(backend).forward(values, shift, origin, first, past)


@torch.library.custom_op("starlm::deform_backward", mutates_args=())
def _deform_backward(
    grad: Tensor,
    values: Tensor,
    shift: Tensor,
    origin: Tensor | None,
    first: Tensor | None,
    past: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _kernels(backend).backward(grad, values, shift, origin, first, past)


def _kernels(backend: str) -> Any:
    """The module of the fused kernels; numba and triton take half a second to import."""
    return import_module(f"starlm.ops.{backend}")


@_deform.register_fake
def _(values, shift, origin, first, past, backend):
    return values.new_empty(shift.shape)


@_deform_backward.register_fake
def _(grad, values, shift, origin, first, past, backend):
    return values.new_empty(values.shape), shift.new_empty(shift.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    return *_deform_backward(grad, *ctx.saved_tensors, ctx.backend), None, None, None, None


_deform.register_autograd(_differentiate, setup_context=_save)


def check_rows(what: str, name: str, rows: Tensor | None, wanted: tuple[int, ...]) -> None:
    """Refuse row numbers that kernels, which do not look, would take for others.

    Raises:
        InputError: `rows` are no integers, or not of the shape that `what` needs.
    """
    if rows is not None and (rows.shape != wanted or rows.is_floating_point() or rows.dtype == torch.bool):
        raise InputError(
            f"{what} needs {name} as integers of shape {wanted}; got {rows.dtype} of {tuple(rows.shape)}."
        )


def check_devices(what: str, **tensors: Tensor | None) -> None:
    """Refuse tensors on several devices: which of them computes, and with what, would be chance.

    Raises:
        InputError: they are not all on one device.
    """
    places = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    for _, device in places:
        if device != places[0][1]:
            found = ", ".join(f"{name} on {place}" for name, place in places)
            raise InputError(f"{what} needs all tensors on one device; got {found}.")


def _check(values, shift, origin, first, past, backend) -> Tensor | None:
    """`past` as a tensor, or None for 0.

    Raises:
        InputError: see `deform`.
    """
    if not isinstance(values, Tensor) or not isinstance(shift, Tensor):
        kinds = f"{type(values).__name__} and {type(shift).__name__}"
        raise InputError(f"deform needs values and shift as tensors; got {kinds}.")
    shapes = f"values {tuple(values.shape)}, shift {tuple(shift.shape)}"
    if values.ndim != 4 or shift.ndim != 4:
        raise InputError(f"deform needs values [B, S, H, C] and shift [B, T, H, C]; got {shapes}.")
    batch, rows, heads, channels = values.shape
    length = shift.shape[1]
    if shift.shape != (batch, length, heads, channels):
        raise InputError(f"deform needs the same B, H and C in values and shift; got {shapes}.")
    if values.dtype not in FLOATS or shift.dtype not in FLOATS:
        raise InputError(f"deform needs floating point; got values {values.dtype}, shift {shift.dtype}.")
    for name, index, wanted in (
        ("origin", origin, (batch, length, heads)),
        ("first", first, (batch, length)),
        ("past", None if isinstance(past, int) else past, (batch,)),
    ):
        check_rows("deform", name, index, wanted)
    past_rows = None if isinstance(past, int) else past
    check_devices("deform", values=values, shift=shift, origin=origin, first=first, past=past_rows)
    if backend not in get_args(Backend):
        raise InputError(f"deform has the backends {', '.join(get_args(Backend))}; got {backend!r}.")
    if backend == "triton" and not HAS_TRITON:
        raise InputError("backend='triton' needs the package triton. Run: pip install 'starlm[gpu]'")
    if backend == "cpu" and values.device.type != "cpu":
        raise InputError(f"backend='cpu' needs CPU tensors; got {values.device}. Use backend='auto'.")
    if isinstance(past, int):
        if not 0 <= past <= rows - length:
            raise InputError(
                f"deform needs 0 <= past <= S - T, so that every query has its own row; got past={past} "
                f"({shapes})."
            )
        return torch.full((batch,), past, device=values.device) if past else None
    if length > rows:
        raise InputError(f"deform needs S >= T, so that every query has its own row; got {shapes}.")
    return past
