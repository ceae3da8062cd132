"""Reads of many slots at once equal `deform` and `box` of each slot's rows alone, bit for bit."""

import pytest
import torch

from starlm.nn.state import LayerState, Streams
from starlm.ops import cpu, deform
from starlm.ops.box import box, prefix_sums

H, C, ROLLBACK = 3, 5, 2
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
LENGTHS = [0, 1, 40, 300, 2000]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def filled(method, texts, keep, **options):
    """A layer's slots that hold all but the last row of each text, read by calls of other lengths."""
    slots = [Streams(ROLLBACK) for _ in texts]
    for slot, text in zip(slots, texts, strict=True):
        for begin in range(0, text.shape[1] - 1, 170):
            piece = text[:, begin : min(begin + 170, text.shape[1] - 1)]
            state = LayerState([slot], [begin])
            getattr(state, method)("stream", piece, torch.ones(piece.shape), keep=keep, **options)
    return LayerState(slots, [text.shape[1] - 1 for text in texts])


def inputs(dtype):
    texts = [torch.randn(1, length + 1, H, C).to(dtype) for length in LENGTHS]
    last = torch.cat([text[:, -1:] for text in texts])
    first = torch.tensor([[0], [1], [7], [290], [0]])
    return texts, last, first


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep", [None, 6, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_read_of_many_slots_is_deform_of_each(dtype, keep, packed):
    texts, last, first = inputs(dtype)
    shift = torch.randn(len(texts), 1, H, C) * (40 if keep is None else keep)
    shift = shift.clamp(max=1e9 if keep is None else keep).to(torch.promote_types(dtype, torch.float32))
    first = first if packed else None
    got = filled("read", texts, keep).read("stream", last, shift, keep=keep, first=first)
    assert got.dtype == dtype
    for slot, text in enumerate(texts):
        one = slice(slot, slot + 1)
        start = first[one] if packed else None
        wanted = deform(text, shift[one], first=start, past=text.shape[1] - 1)
        assert torch.equal(got[one], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_around_origins(dtype):
    texts, last, _ = inputs(dtype)
    shift = (torch.randn(len(texts), 1, H, C) * 3).to(torch.promote_types(dtype, torch.float32))
    origin = torch.stack([torch.randint(-1, text.shape[1], (1, H)) for text in texts])
    origin[2] = -1
    state = filled("read", texts, None)
    state.rows_device = torch.device("cpu")
    got = state.read("stream", last, shift, origin=origin)
    for slot, text in enumerate(texts):
        one = slice(slot, slot + 1)
        assert torch.equal(got[one], deform(text, shift[one], origin=origin[one], past=text.shape[1] - 1))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep", [None, 0, 6, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_box_of_many_slots_is_box_of_each(dtype, keep, packed):
    texts, last, first = inputs(dtype)
    width = (torch.randn(len(texts), 1, H, C).exp() * 30).clamp(
        min=1, max=1e9 if keep is None else max(keep, 1)
    )
    first = first if packed else None
    got = filled("box", texts, keep).box("stream", last, width, keep=keep, first=first)
    for slot, text in enumerate(texts):
        one = slice(slot, slot + 1)
        start = first[one] if packed else None
        wanted = box(prefix_sums(text), width[one], first=start, past=text.shape[1] - 1)
        # In the same order of additions the sums are the same to the bit.
        assert torch.equal(got[0][one], wanted[0])
        assert torch.equal(got[1][one], wanted[1])


@pytest.mark.parametrize("method", ["read", "box"])
def test_a_first_row_below_0_is_row_0(method):
    texts, last, first = inputs(torch.float32)
    reach = torch.full_like(last, 1e6)
    low, zero = (
        getattr(filled(method, texts, None), method)("stream", last, reach, first=torch.full_like(first, row))
        for row in (-7, 0)
    )
    for got, wanted in zip(low, zero, strict=True):
        assert torch.equal(got, wanted)


def test_one_call_of_the_kernel_serves_all_slots(monkeypatch):
    texts, last, _ = inputs(torch.float32)
    state, calls, step = filled("read", texts, None), [], cpu.step
    monkeypatch.setattr(cpu, "step", lambda *args: calls.append(1) or step(*args))
    state.read("stream", last, torch.ones(last.shape))
    assert len(calls) == 1


def test_what_the_kernel_cannot_hold_is_read_slot_by_slot():
    """float16, a slot begun in another dtype, and a gradient."""
    texts, last, _ = inputs(torch.float16)
    shift = torch.rand(last.shape) * 9
    state = filled("read", texts, None)
    wanted = torch.cat([deform(t, shift[i : i + 1], past=t.shape[1] - 1) for i, t in enumerate(texts)])
    assert torch.equal(state.read("stream", last, shift), wanted)
    # Slots 1 and on hold float16 rows; slot 0 is empty, and begins in float32.
    mixed = filled("read", texts, None).read("stream", last.float(), shift)
    torch.testing.assert_close(mixed, wanted.float(), rtol=1e-3, atol=1e-3)
    with torch.enable_grad():
        shift.requires_grad_()
        state = filled("read", [text.double() for text in texts], None)
        state.read("stream", last.double(), shift).sum().backward()
    assert shift.grad.abs().sum() > 0


def test_recent_rows():
    state = LayerState([Streams(ROLLBACK), Streams(ROLLBACK)], [0, 0])
    rows = torch.randn(2, 5, 1, C)
    got = state.recent("stream", rows, 2)
    assert torch.equal(got, torch.nn.functional.pad(rows, (0, 0, 0, 0, 2, 0)))
    state = LayerState(state.slots, [5, 3])
    new = torch.randn(2, 1, 1, C)
    wanted = torch.stack([torch.cat([rows[0, 3:5], new[0]]), torch.cat([rows[1, 1:3], new[1]])])
    assert torch.equal(state.recent("stream", new, 2), wanted)
