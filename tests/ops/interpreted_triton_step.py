"""The decode step's kernel on CPU tensors, by Triton's interpreter: test_triton_step.py runs it apart.

    TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_triton_step.py

Against `cpu_step` in fp32, which test_cpu_step.py compares with `mix`. The interpreter takes some 20 ms for
each slot and head, so there are few of them.
"""

import mmap

import numpy as np
import pytest
import torch
from test_cpu_step import buffers, sequence, step, table

from starlm.ops import triton as kernels
from starlm.ops import triton_step
from starlm.ops.backends import GPU_DTYPES

assert kernels.INTERPRETED, "set TRITON_INTERPRET=1"

# Of numpy, with which the interpreter calculates: inf - inf, and exp of what fp32 does not hold.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) enc:RuntimeWarning")

KINDS = [(1, 1, 1), (3, 0, 0), (0, 2, 0), (0, 0, 2), (1, 0, 1), (2, 1, 0), (0, 1, 1)]
# The interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def problem(lengths, kinds, channels, *, dtype=torch.float32, scale=1.0):
    """Each slot's buffers, and the new token of all: values, shift, gate, origin, first."""
    random = torch.Generator().manual_seed(sum(lengths) + channels)
    texts = [[x.to(dtype) for x in sequence(length, sum(kinds), channels, random)] for length in lengths]
    kept = [buffers(values, kinds, dtype) for values, _, _ in texts]
    values, shift, gate = (
        torch.cat(parts) for parts in zip(*([x[:, -1:] for x in t] for t in texts), strict=True)
    )
    origin = [torch.randint(-1, length, (1, 1, kinds[1]), generator=random) for length in lengths]
    starts = [int(torch.randint(-2, length + 2, (), generator=random)) for length in lengths]
    return kept, values, shift * scale, gate, torch.cat(origin), starts


def triton(values, shift, gate, origin, streams, **layout):
    """`triton_step.step` of tensors by head."""
    heads, flat = values.shape[2], [None if x is None else x.flatten(2) for x in (values, shift, gate)]
    rows = None if origin is None or not origin.shape[2] else origin[:, 0]
    got = triton_step.step(*flat, rows, torch.from_numpy(streams), heads=heads, **layout)
    return got.view_as(values)


def compare(
    lengths, kinds, channels, *, gated=True, max_shift=None, dtype=torch.float32, change=None, scale=1.0
):
    kept, values, shift, gate, origin, starts = problem(lengths, kinds, channels, dtype=dtype, scale=scale)
    if change is not None:
        change(values, shift, gate, origin)
    gate = gate if gated else None
    layout = {"near": kinds[0], "boxes": kinds[2], "max_shift": max_shift}
    exact = [[x.clone() if x.dtype == torch.float64 else x.float() for x in one] for one in kept]
    floats = [None if x is None else x.float() for x in (values, shift, gate)]
    wanted = step(*floats, origin, table(exact, starts), **layout)
    got = triton(values, shift, gate, origin, table(kept, starts), **layout)
    assert got.dtype == dtype
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "equal_nan": True}
    torch.testing.assert_close(got.float(), wanted, **near)
    # The new row stands where it belongs, and nothing else was touched.
    for one, other in zip(kept, exact, strict=True):
        for rows, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(rows, theirs.to(rows.dtype), **near)
    again = triton(values, shift, gate, origin, table(kept, starts), **layout)
    assert torch.equal(again.nan_to_num(7.0), got.nan_to_num(7.0)), "a second time, another result"
    return got


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("channels", [1, 4, 33])
def test_kinds_of_heads(kinds, channels):
    compare([1, 17, 3], kinds, channels)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_dtypes(dtype, gated):
    compare([1, 30], (1, 1, 1), 5, dtype=dtype, gated=gated)


@pytest.mark.parametrize("max_shift", [0, 3, 1000])
def test_a_bound_of_shifts(max_shift):
    compare([2, 25], (1, 1, 1), 3, max_shift=max_shift, scale=4.0)


def test_shifts_of_every_size():
    """Beyond all rows, ahead of the query, without end, and not a number."""
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 90.0, 0.0, -3.0])

    def change(values, shift, gate, origin):
        shift[..., :8] = odd
        values[1] = 0.0

    got = compare([9, 4], (1, 1, 1), 8, change=change)
    # NaN stays in its channel.
    assert got.isnan().sum(-1).flatten().tolist() == [1] * 6


def test_heads_without_an_anchor_read_nothing():
    def change(values, shift, gate, origin):
        origin.fill_(-1)

    assert not compare([9, 4], (0, 2, 0), 3, change=change).any()


def test_strided_inputs():
    """Parts of one projection, without a copy."""
    kept, values, shift, gate, origin, starts = problem([5, 8], (1, 1, 1), 3)
    layout = {"near": 1, "boxes": 1, "max_shift": None}
    streams = table(kept, starts)
    wanted = triton(values, shift, gate, origin, streams, **layout)
    base = torch.cat([x.flatten(2) for x in (values, shift, gate)], dim=2)
    parts = [x.unflatten(2, (3, 3)) for x in base.split(9, dim=2)]
    assert torch.equal(triton(*parts, origin, streams, **layout), wanted)
    base = torch.stack([values, shift, gate], -1)
    assert torch.equal(triton(*base.unbind(-1), origin, streams, **layout), wanted)


def test_addresses_are_64_bit():
    """A row more than 2^31 elements behind the first, in memory that is reserved and never touched."""
    # MAP_NORESERVE of Linux, which Python names from 3.13 on.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    channels, past = 2**13, 2**18 + 5
    with mmap.mmap(-1, 2 * channels * (past + 1), flags=flags) as memory:
        rows = torch.frombuffer(memory, dtype=torch.bfloat16).view(1, past + 1, 1, channels)
        rows[0, past - 3] = torch.arange(channels) % 100
        near = np.array([[rows.data_ptr()], [past], [0]])
        streams = np.stack([near, np.zeros_like(near), np.zeros_like(near)])
        values, shift = (
            torch.ones(1, 1, 1, channels).bfloat16(),
            torch.full((1, 1, 1, channels), 3.0).bfloat16(),
        )
        got = triton(values, shift, None, None, streams, near=1, boxes=0, max_shift=3)
        assert torch.equal(got[0, 0], rows[0, past - 3].to(got.dtype) + 0.0)
        assert rows[0, past].float().sub(1).abs().max() < 1e-2
        del rows


def test_the_comparison_rejects_sabotage(monkeypatch):
    """Each of these wrong kernels must be noticed."""
    locate = triton_step._locate.fn

    def one_row_off(shift, origin, start, last):
        _, far, fraction = locate(shift, origin, start, last)
        return far, far, fraction

    def unclipped(shift, origin, start, last):
        return locate(shift, origin, last * 0, last)

    def stale(buffer, row, past, width, own, inside):
        return kernels.tl.load(
            buffer + kernels.tl.minimum(row, past - 1).to(kernels.tl.int64) * width, mask=inside
        )

    for name, wrong in (("_locate", one_row_off), ("_locate", unclipped), ("_row", stale)):
        with monkeypatch.context() as patch:
            patch.setattr(triton_step, name, wrong)
            with pytest.raises(AssertionError):
                compare([20, 30, 9], (1, 1, 1), 9)
    compare([20, 30, 9], (1, 1, 1), 9)
