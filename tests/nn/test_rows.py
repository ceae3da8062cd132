"""Rows against plain lists."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from starlm.nn import rows as module
from starlm.nn.rows import Rows


def new_rows(batch, length):
    return torch.randn(batch, length, 2, 3)


@given(
    reach=st.sampled_from([None, 0, 1, 7, 70]),
    calls=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 1, 2, 30, 64, 65, 200]),
            st.lists(st.integers(0, 9), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=12,
    ),
    small=st.sampled_from([2, 1024]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_calls(reach, calls, small, seed):
    """Appends of any length, slots cut back in between by other lengths; the last rows stay readable."""
    torch.manual_seed(seed)
    rows = Rows(None if reach is None else reach + 9)
    written = [torch.empty(0, 2, 3) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL", small)
        for length, cuts in calls:
            new = new_rows(3, length)
            lengths = [len(slot) for slot in written]
            read, base = rows.append(new, lengths)
            for slot, (n, begin) in enumerate(zip(lengths, base, strict=True)):
                assert begin <= (0 if reach is None else max(0, n - reach))
                written[slot] = torch.cat([written[slot], new[slot]])
                assert torch.equal(read[slot, : n + length - begin], written[slot][begin:])
                # What the rows no longer reach cannot be given back.
                lowest = base[slot] + reach if reach and base[slot] else base[slot]
                written[slot] = written[slot][: max(n + length - cuts[slot], lowest)]


@pytest.mark.parametrize("keep", [0, 5, 100])
def test_bounded_memory_is_constant(keep):
    sizes = set()
    rows, length = Rows(keep), 0
    for count in [1] * 500 + [17] * 50:
        rows.append(new_rows(2, count), [length, length])
        length += count
        if length > 100:
            sizes.add(rows.num_bytes)
    assert len(sizes) == 1
    rows.append(new_rows(2, 5000), [length, length])
    length += 5000
    for _ in range(200):
        rows.append(new_rows(2, 1), [length, length])
        length += 1
    assert {rows.num_bytes} == sizes, "a long call stretched the rows for good"


def test_unbounded_memory_doubles():
    rows, sizes = Rows(), []
    for length in range(1000):
        rows.append(new_rows(1, 1), [length])
        sizes.append(rows.num_bytes)
    assert len(set(sizes)) <= 5
    assert sizes[-1] <= 2 * 1000 * 6 * 4 + 64 * 6 * 4


def test_a_large_bound_costs_nothing_before_it_is_used():
    rows = Rows(keep=10**9)
    rows.append(new_rows(1, 3), [0])
    assert rows.num_bytes < 100_000


def test_select_copies():
    rows = Rows(4)
    rows.append(new_rows(2, 100), [0, 0])
    rows.append(new_rows(2, 30), [100, 100])
    chosen = rows.select([1, 1, 0])
    assert chosen.base == [rows.base[1], rows.base[1], rows.base[0]]
    assert torch.equal(chosen.data, rows.data[[1, 1, 0]])
    before = rows.data.clone()
    chosen.append(new_rows(3, 9), [130] * 3)
    chosen.data.zero_()
    assert torch.equal(rows.data, before)
    assert Rows(4).select([0]).num_bytes == 0
