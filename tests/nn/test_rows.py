"""Rows against plain lists."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from starlm.nn import rows as module
from starlm.nn.rows import Rows


def new_rows(length):
    return torch.randn(length, 2, 3)


@given(
    reach=st.sampled_from([None, 0, 1, 7, 70]),
    calls=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 1, 2, 30, 64, 65, 200]), st.integers(0, 9), st.sampled_from([False, True])
        ),
        min_size=1,
        max_size=12,
    ),
    small=st.sampled_from([2, 1024]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_any_calls(reach, calls, small, seed):
    """Appends of any length, cut back or copied in between; the last rows stay readable."""
    torch.manual_seed(seed)
    rows, written = Rows(None if reach is None else reach + 9), torch.empty(0, 2, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL", small)
        for length, cut, copied in calls:
            new, n = new_rows(length), len(written)
            read = rows.append(new, n)
            assert rows.base <= (0 if reach is None else max(0, n - reach))
            written = torch.cat([written, new])
            assert torch.equal(read, written[rows.base :])
            # What the rows no longer reach cannot be given back.
            lowest = rows.base + (reach or 0) if rows.base else 0
            written = written[: max(n + length - cut, lowest)]
            if copied:
                other = rows.copy(len(written))
                rows.data.fill_(torch.nan)
                rows = other


@pytest.mark.parametrize("keep", [0, 5, 100])
def test_bounded_memory_is_constant(keep):
    sizes = set()
    rows, length = Rows(keep), 0
    for count in [1] * 500 + [17] * 50:
        rows.append(new_rows(count), length)
        length += count
        if length > 100:
            sizes.add(rows.num_bytes)
    assert len(sizes) == 1
    rows.append(new_rows(5000), length)
    length += 5000
    for _ in range(200):
        rows.append(new_rows(1), length)
        length += 1
    assert {rows.num_bytes} == sizes, "a long call stretched the rows for good"


def test_unbounded_memory_doubles():
    rows, sizes = Rows(), []
    for length in range(1000):
        rows.append(new_rows(1), length)
        sizes.append(rows.num_bytes)
    assert len(set(sizes)) <= 5
    assert sizes[-1] <= 2 * 1000 * 6 * 4 + 64 * 6 * 4


def test_a_large_bound_costs_nothing_before_it_is_used():
    rows = Rows(keep=10**9)
    rows.append(new_rows(3), 0)
    assert rows.num_bytes < 100_000


def test_a_copy_is_as_small_as_what_it_holds():
    rows = Rows()
    rows.append(new_rows(10_000), 0)
    short = rows.copy(100)
    assert torch.equal(short.append(new_rows(0), 100), rows.data[:100])
    assert short.num_bytes <= (100 + module.SPARE) * 6 * 4
    assert Rows(4).copy(0).num_bytes == 0


def test_rows_begun_under_inference_mode_go_on_without():
    rows = Rows()
    with torch.inference_mode():
        rows.append(new_rows(3), 0)
    with torch.no_grad():
        rows.append(new_rows(3), 3)
    assert not rows.data.is_inference()


@pytest.mark.parametrize("keep", [None, 50])
def test_who_is_out_of_memory_may_try_again(keep, monkeypatch):
    old, new = new_rows(1000), new_rows(3000)
    rows, empty = Rows(keep), module._empty
    rows.append(old, 0)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(module, "_empty", fail)
    with pytest.raises(MemoryError):
        rows.append(new, 1000)
    monkeypatch.setattr(module, "_empty", empty)
    for length, more in ((1000, new[:1]), (1001, new[1:])):
        found, base = rows.append(more, length), rows.base
        both = torch.cat([old, new])[: length + len(more)]
        assert torch.equal(found[-60:], both[base:][-60:])
        assert len(found) == len(both) - base
