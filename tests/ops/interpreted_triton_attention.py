"""Attention's kernel of a decode step on CPU tensors, by Triton's interpreter.

test_triton_attention.py runs it apart.

    TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_triton_attention.py

Against the layer with a state, in fp64. The interpreter takes some 20 ms for each slot and head.
"""

import copy
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from starlm.model import graph, step
from starlm.nn.attention import Attention
from starlm.nn.state import LayerState, Reserved, Streams
from starlm.ops import plain, triton_attention
from starlm.ops import triton as kernels
from starlm.ops.backends import GPU_DTYPES

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "model"), str(HERE.parent / "nn")]

from models import make_model, make_tokens  # noqa: E402
from relations import assert_close, randomise  # noqa: E402

assert kernels.INTERPRETED, "set TRITON_INTERPRET=1"

# The interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def held(layer, lengths, starts, dtype):
    """The layer's rows of texts so long, each slot's on its own; rounded to the dtype."""
    slots = [Streams(rollback=3) for _ in lengths]
    for streams, length, start in zip(slots, lengths, starts, strict=True):
        x, first = torch.randn(1, length, layer.query.in_features), torch.full((1, length), start)
        if length:
            layer(x, first=first, state=LayerState([streams], [0]))
        for rows in streams.rows.values():
            rows.data = rows.data.to(dtype)
    return slots


def in_fp64(layer, slots):
    slots = copy.deepcopy(slots)
    for rows in (rows for streams in slots for rows in streams.rows.values()):
        rows.data = rows.data.double()
    return copy.deepcopy(layer).double(), slots


def compare(lengths, channels=6, *, heads=2, starts=None, dtype=torch.float32, **options):
    """The next token of slots that hold so much; gives the slots."""
    torch.manual_seed(sum(lengths) + channels)
    starts = [0] * len(lengths) if starts is None else starts
    layer = randomise(Attention(heads * channels, heads, **options))
    slots, layer = held(layer, lengths, starts, dtype), layer.to(dtype)
    x, first = torch.randn(len(lengths), 1, heads * channels).to(dtype), torch.tensor(starts)[:, None]
    exact, theirs = in_fp64(layer, slots)
    wanted = exact(x.double(), first=first, state=LayerState(theirs, lengths))
    places = layer.make_room("rows", x, first, LayerState(slots, lengths))
    streams = torch.from_numpy(places)[None]
    state = Reserved(streams, None, layer.turns(streams[0, 0]))
    got = layer(x, state=state)
    assert got.dtype == dtype
    assert_close(got.double(), wanted, TOLERANCE[dtype])
    assert torch.equal(layer(x, state=state), got), "a second time, another result"
    for ours, others in zip(slots, theirs, strict=True):
        assert ours.rows.keys() == others.rows.keys()
        for name, rows in ours.rows.items():
            kept, new = (held.data[: held.size].double() for held in (rows, others.rows[name]))
            assert torch.equal(kept[:-1], new[:-1]), "a row was touched that is not the new one"
            assert_close(kept[-1], new[-1], TOLERANCE[dtype])
    return slots


@pytest.mark.parametrize("channels", [2, 6, 32, 66])
@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 7}, {"rope_base": 0.0}], ids=str)
def test_slots_at_different_positions(channels, options):
    compare([0, 1, 6, 7, 40], channels, **options)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 9])
def test_dtypes(dtype, window):
    compare([3, 30], dtype=dtype, window=window)


@pytest.mark.parametrize("window", [None, 4, 100])
def test_documents_and_padding(window):
    """From `first` on positions count, and rows are read; the own one always."""
    compare([20] * 6, starts=[0, 3, 18, 20, 25, -4], window=window)


@pytest.mark.parametrize("channels", [1, 33])
def test_heads_of_any_width_without_positions(channels):
    compare([5, 12], channels, heads=3, rope_base=0.0)


@pytest.mark.parametrize("window", [None, 300, 517])
def test_several_blocks_of_rows(window, monkeypatch):
    compare([triton_attention.MOST_ROWS, 2 * triton_attention.MOST_ROWS + 3], window=window)
    monkeypatch.setattr(triton_attention, "TILE", 4)
    compare([12, 13], 4, window=window)


def test_rows_that_have_moved_to_the_front():
    """Rows are counted from where the buffer begins, positions from the document's start."""
    slots = compare([1030, 1040, 1050], starts=[0, 40, 1047], window=6)
    assert all(rows.base for streams in slots for rows in streams.rows.values())


def test_strided_inputs():
    """Parts of one projection."""
    layer, base = randomise(Attention(12, 2)), torch.randn(2, 1, 36)
    slots = held(layer, [4, 9], [0, 0], torch.float32)
    places = torch.from_numpy(layer.make_room("rows", base[..., :12], None, LayerState(slots, [4, 9])))
    parts = [x.unflatten(2, (2, 6)) for x in base.split(12, dim=2)]
    turns = layer.turns(places[0])
    wanted = triton_attention.attend(*(x.contiguous() for x in parts), turns, places, window=None)
    assert torch.equal(triton_attention.attend(*parts, turns, places, window=None), wanted)
    lying = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in parts]
    assert torch.equal(triton_attention.attend(*lying, turns, places, window=None), wanted)


def test_addresses_are_64_bit():
    """A row more than 2^31 elements behind the first, in memory that is reserved and never touched."""
    # MAP_NORESERVE of Linux, which Python names from 3.13 on.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    channels, past = 2**13, 2**18 + 5
    size = 2 * channels * (past + 1)
    with mmap.mmap(-1, size, flags=flags) as keys, mmap.mmap(-1, size, flags=flags) as values:
        k, v = (torch.frombuffer(m, dtype=torch.bfloat16).view(past + 1, channels) for m in (keys, values))
        v[past - 2] = torch.arange(channels) % 100
        places = torch.tensor([[[x.data_ptr()], [past], [0]] for x in (k, v)] + [[[0]] * 3])
        new = torch.zeros(1, 1, 1, channels).bfloat16()
        # Keys of zero: a mean.
        got = triton_attention.attend(new, new, new + 2, None, places, window=4)
        assert_close(got[0, 0, 0].float(), ((torch.arange(channels) % 100) + 2) / 4, 1e-2)
        assert torch.equal(v[past], new[0, 0, 0] + 2)
        del k, v


def test_the_comparison_rejects_sabotage(monkeypatch):
    """Each of these wrong kernels must be noticed."""
    turned = triton_attention._turned.fn

    def straight(x, turns, lane, inside, CHANNELS):
        return turned(x, None, lane, inside, CHANNELS)

    def unscaled(x, turns, lane, inside, CHANNELS):
        return 1.01 * turned(x, turns, lane, inside, CHANNELS)

    for wrong in (straight, unscaled):
        with monkeypatch.context() as patch:
            patch.setattr(triton_attention, "_turned", wrong)
            with pytest.raises(AssertionError):
                compare([20, 9])
    for change in ({"window": 8}, {"window": None}):
        right = triton_attention.attend
        with monkeypatch.context() as patch:
            patch.setattr(
                triton_attention,
                "attend",
                lambda *args, right=right, change=change, **_: right(*args, **change),
            )
            with pytest.raises(AssertionError):
                compare([20, 9], window=7)
    compare([20, 9], window=7)


@pytest.mark.parametrize("kind", ["star window", "attention"])
def test_models(kind, monkeypatch):
    """All kernels of a step, in all that would be recorded as a graph."""
    monkeypatch.setitem(step.STEPPERS, "cpu", graph.Graphs)
    model, tokens = make_model(kind, dtype=torch.float32, dim=8, heads=4, preset="gated"), make_tokens(2, 12)
    state = model.new_state(2)
    model(tokens[1:, :5], state=state.pick([1]))
    taken, attended = [], triton_attention.attend
    monkeypatch.setattr(
        triton_attention, "attend", lambda *args, **named: taken.append(1) or attended(*args, **named)
    )
    rows = np.array(state.lengths)
    got = [model(tokens[[0, 1], rows + t][:, None], state=state) for t in range(7)]
    with plain():
        wanted = model(tokens)
    assert step.sizes_of(model) == [2]
    assert len(taken) == 7 * sum(type(block.mixer) is Attention for block in model.blocks)
    assert_close(torch.cat(got, dim=1), torch.stack([wanted[0, :7], wanted[1, 5:]]), 1e-4)
