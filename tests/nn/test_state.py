"""What slots hold and read equals `deform` and `box` of all their rows; a step of many is one call."""

import copy

import pytest
import torch

from starlm.nn.deformer import Deformer
from starlm.nn.state import LayerState, Streams
from starlm.ops import cpu_step, deform, plain
from starlm.ops.backends import CPU_DTYPES
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


def layer_and_slots(dtype, max_shift, lengths=LENGTHS):
    """A layer of all kinds of heads, and its slots, which have read texts of these lengths."""
    torch.manual_seed(0)
    layer = Deformer(24, 4, preset="star", kinds=["now", "token", "bigram", "box"], max_shift=max_shift)
    layer, slots = layer.to(dtype), [Streams(ROLLBACK) for _ in lengths]
    torch.nn.init.normal_(layer.out.weight, std=0.2)
    for slot, length in zip(slots, lengths, strict=True):
        for begin in range(0, length, 170):
            size = min(170, length - begin)
            origins = {n: torch.randint(-1, begin + 1, (1, size)) for n in (1, 2)}
            layer(torch.randn(1, size, 24).to(dtype), origins=origins, state=LayerState([slot], [begin]))
    return layer, LayerState(slots, list(lengths))


def step(layer, state, dtype, first):
    """One more token in every slot, whose row is then taken back."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(len(state.slots), 1, 24, generator=random).to(dtype)
    origins = {n: torch.tensor([[min(7 * n, length)] for length in state.lengths]) for n in (1, 2)}
    origins[2][-1] = -1
    return layer(x, first=first, origins=origins, state=state)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("max_shift", [None, 0, 6, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_in_one_call_is_what_the_definition_says(dtype, max_shift, packed, monkeypatch):
    layer, state = layer_and_slots(dtype, max_shift)
    calls, kernel = [], cpu_step.step
    monkeypatch.setattr(cpu_step, "step", lambda *args, **named: calls.append(1) or kernel(*args, **named))
    first = inputs(dtype)[2] if packed else None
    got = step(layer, state, dtype, first)
    assert len(calls) == (dtype in CPU_DTYPES)
    with plain():
        wanted = step(layer, state, dtype, first)
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert wanted.abs().mean() > 0.05


def test_what_the_kernel_cannot_hold_is_read_slot_by_slot(monkeypatch):
    """float16, a slot begun in another dtype, and a gradient."""
    layer, state = layer_and_slots(torch.float32, None, [0, 3])
    wanted = step(layer, state, torch.float32, None)
    monkeypatch.setattr(cpu_step, "step", None)
    layer, half = layer_and_slots(torch.float16, None, [0, 3])
    torch.testing.assert_close(step(layer, half, torch.float16, None).float(), wanted, rtol=2e-2, atol=2e-2)
    # Slot 1 holds float16 rows; slot 0 is empty, and begins in float32.
    mixed = step(layer.float(), half, torch.float32, None)
    torch.testing.assert_close(mixed, wanted, rtol=2e-2, atol=2e-2)
    with torch.enable_grad():
        step(layer, state, torch.float32, None).sum().backward()
    assert layer.shift.weight.grad.abs().sum() > 0


def test_copies_of_a_state_are_independent():
    """By `copy.deepcopy`, as those who use transformers copy the cache of a prompt."""
    layer, state = layer_and_slots(torch.float32, 6)
    other = copy.deepcopy(state)
    wanted = step(layer, state, torch.float32, None)
    for rows in state.slots[3].rows.values():
        rows.data[rows.size - 1] = 7
    assert torch.equal(step(layer, other, torch.float32, None), wanted)
    assert all((rows.data[rows.size - 1] == 7).all() for rows in state.slots[3].rows.values())


def test_a_state_that_is_not_the_layers_is_refused():
    """Never written beyond: rows of another width, or fewer slots than sequences."""
    _, state = layer_and_slots(torch.float32, None, [5, 3])
    wider = Deformer(48, 4, preset="star", kinds=["now", "token", "bigram", "box"])
    origins = {n: torch.zeros(2, 1, dtype=torch.int64) for n in (1, 2)}
    with pytest.raises((RuntimeError, ValueError)):
        wider(torch.randn(2, 1, 48), origins=origins, state=state)
    layer, state = layer_and_slots(torch.float32, None, [5])
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(2, 1, 24), origins=origins, state=state)


def test_room_for_a_row():
    """A bounded stream has let rows go, a new one begins, sums stand one row ahead."""
    slots = [Streams(ROLLBACK), Streams(ROLLBACK)]
    state = LayerState(slots, [0, 0])
    like, first = torch.empty(0, H, C), torch.tensor([[5990], [1]])
    for length in range(6000):
        slots[0].get("stream", 6).append(torch.ones(1, H, C), length)
    state.lengths = [6000, 0]
    addresses, pasts, starts = state.make_room("stream", 6, like, first)
    base = slots[0].rows["stream"].base
    assert 0 < base < 5990
    assert [row.rows["stream"].data.data_ptr() for row in slots] == addresses.tolist()
    assert pasts.tolist() == [6000 - base, 0]
    assert starts.tolist() == [5990 - base, 1]
    sums = LayerState([Streams(ROLLBACK)], [0])
    addresses, pasts, _ = sums.make_room("sums", 0, like.double(), None, sums=True)
    assert pasts.tolist() == [1]
    assert not sums.slots[0].rows["sums"].row(0).any()
    assert state.make_room("stream", 6, like.double(), None) is None


def test_recent_rows():
    state = LayerState([Streams(ROLLBACK), Streams(ROLLBACK)], [0, 0])
    rows = torch.randn(2, 5, 1, C)
    got = state.recent("stream", rows, 2)
    assert torch.equal(got, torch.nn.functional.pad(rows, (0, 0, 0, 0, 2, 0)))
    state = LayerState(state.slots, [5, 3])
    new = torch.randn(2, 1, 1, C)
    wanted = torch.stack([torch.cat([rows[0, 3:5], new[0]]), torch.cat([rows[1, 1:3], new[1]])])
    assert torch.equal(state.recent("stream", new, 2), wanted)
