"""Fused GPU kernels of RMSNorm, relu² and the loss of logits: Triton, one pass over memory or two, not many.

Arithmetic is fp32, whatever the tensors are. As those of `starlm.ops.triton` they run on CPU tensors in
Triton's interpreter, for tests.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of one program of RMSNorm and relu², and of one step over a row of logits.
BLOCK, COLUMNS = 1024, 4096


@triton.jit
def _rms(x, out, rows, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < WIDTH)
    v = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 1) / WIDTH + eps)
    tl.store(out + row * WIDTH + column, v * scale[:, None], mask=inside)


@triton.jit
def _rms_backward(grad, x, out, rows, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < WIDTH)
    v = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 1) / WIDTH + eps)
    along = tl.sum(g * v, 1) / WIDTH * scale * scale
    tl.store(out + row * WIDTH + column, (g - v * along[:, None]) * scale[:, None], mask=inside)


@triton.jit
def _relu2(x, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    # Not a maximum: NaN must stay NaN.
    v = tl.where(v < 0, 0.0, v)
    tl.store(out + place, v * v, mask=inside)


@triton.jit
def _relu2_backward(grad, x, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.where(v < 0, 0.0, v)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, 2.0 * v * g, mask=inside)


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    x = x.to(tl.float32)
    if CAPPED:
        # tanh, which Triton has in a library only, and its interpreter not at all.
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x


@triton.jit
def _softmax_loss(
    logits,
    targets,
    losses,
    softcap,
    CAPPED: tl.constexpr,
    GRAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * WIDTH
    target = tl.load(targets + row)
    # Before the reductions, behind whose barriers other threads write the gradient to this place. A target
    # beyond the vocabulary is not read; that it was asked for shows as NaN.
    place = tl.minimum(tl.maximum(target, 0), WIDTH - 1)
    wanted = _capped(tl.load(logits + place), softcap, CAPPED)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < WIDTH
        x = _capped(tl.load(logits + column, mask=inside, other=0.0), softcap, CAPPED)
        x = tl.where(inside, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        # Of logits of -inf alone, so far, the difference would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = higher
    loss = tl.where(target < WIDTH, tl.log(total) + (top - wanted), float("nan"))
    tl.store(losses + row, tl.where(target < 0, 0.0, loss))
    if GRAD:
        for begin in range(0, WIDTH, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < WIDTH
            x = _capped(tl.load(logits + column, mask=inside, other=0.0), softcap, CAPPED)
            # Not the threads that load an element need be those that store it.
            tl.debug_barrier()
            grad = tl.exp(x - top) / total - tl.where(column == target, 1.0, 0.0)
            if CAPPED:
                grad *= 1.0 - (x / softcap) * (x / softcap)
            tl.store(logits + column, tl.where(target < 0, 0.0, grad), mask=inside)


def rms(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`starlm.ops.elementwise.rms` for GPU tensors in fp32, bfloat16 or fp16, in `dtype`."""
    return _rows(_rms, torch.empty(x.shape, dtype=dtype, device=x.device), x, eps=eps)


def rms_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """Its gradient, in the dtype of x."""
    return _rows(_rms_backward, torch.empty(x.shape, dtype=x.dtype, device=x.device), grad, x, eps=eps)


def relu2(x: Tensor) -> Tensor:
    """`starlm.ops.elementwise.relu2` for GPU tensors in fp32, bfloat16 or fp16."""
    return _flat(_relu2, x)


def relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Its gradient."""
    return _flat(_relu2_backward, grad, x)


def softmax_loss(logits: Tensor, targets: Tensor, softcap: float, wants_grad: bool) -> Tensor:
    """Losses [N] of logits [N, V], in fp32; with `wants_grad` the logits become the gradient of the sum.

    Args:
        logits: contiguous, in fp32, bfloat16 or fp16, which the gradient is rounded to.
        targets: int64; negative ones are ignored: loss and gradient 0. From V on the loss is NaN.
    """
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(triton.next_power_of_2(width), COLUMNS)
    options = {"CAPPED": softcap != 0, "GRAD": wants_grad, "WIDTH": width, "BLOCK": block}
    options["num_warps"] = max(block // 512, 1)
    _launch(_softmax_loss, rows, (logits, targets.contiguous(), losses, softcap), options)
    return losses


def _rows(kernel: Any, out: Tensor, *inputs: Tensor, eps: float) -> Tensor:
    width = out.shape[-1]
    columns = triton.next_power_of_2(width)
    together = max(BLOCK // columns, 1)
    rows = out.numel() // max(width, 1)
    options = {"WIDTH": width, "ROWS": together, "COLUMNS": columns}
    options["num_warps"] = min(max(together * columns // 256, 4), 16)
    inputs = tuple(x.contiguous() for x in inputs)
    _launch(kernel, -(-rows // together), (*inputs, out, rows, eps), options)
    return out


def _flat(kernel: Any, *inputs: Tensor) -> Tensor:
    inputs = tuple(x.contiguous() for x in inputs)
    out = torch.empty_like(inputs[-1])
    _launch(kernel, -(-out.numel() // BLOCK), (*inputs, out, out.numel()), {"BLOCK": BLOCK})
    return out


def _launch(kernel: Any, programs: int, arguments: tuple, options: dict[str, Any]) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **options, enable_fp_fusion=True)
