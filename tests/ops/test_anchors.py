"""Anchors against a search by hand: both forms, the growing index, documents, padding, collisions."""

import copy
import inspect

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from starlm.errors import InputError
from starlm.ops import anchors, longest, ngrams, plain
from starlm.ops.anchors import anchors_reference
from starlm.ops.ngrams import NgramIndex, append

FORMS = {"cpu": anchors, "sort": lambda x, orders, first=None: anchors_reference(x, orders, first)}


def search(tokens, n, first):
    """DESIGN's formula by comparison with every earlier row."""
    found = []
    for t in range(len(tokens)):
        low = first[t] + n - 1
        matches = [
            j for j in range(low, t) if t >= low and tokens[j - n + 1 : j + 1] == tokens[t - n + 1 : t + 1]
        ]
        found.append(matches[-1] + 1 if matches else -1)
    return found


def searched(tokens, orders, first=None):
    rows = torch.zeros_like(tokens) if first is None else first
    found = [[search(x.tolist(), n, f.tolist()) for n in orders] for x, f in zip(tokens, rows, strict=True)]
    return torch.tensor(found, dtype=torch.int64).view(len(tokens), len(orders), -1).transpose(1, 2)


def documents(batch, length):
    """A `first` whose documents begin anywhere."""
    starts = torch.rand(batch, length) < 0.15
    return torch.where(starts, torch.arange(length), 0).cummax(1).values


@pytest.mark.parametrize("form", FORMS)
@given(
    batch=st.integers(1, 3),
    length=st.integers(0, 60),
    vocab=st.sampled_from([1, 2, 3, 50, 2**31 - 1]),
    orders=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    packed=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_definition(form, batch, length, vocab, orders, packed, seed):
    torch.manual_seed(seed)
    tokens = torch.randint(vocab, (batch, length))
    first = documents(batch, length) if packed else None
    assert torch.equal(FORMS[form](tokens, orders, first=first), searched(tokens, orders, first))


@pytest.mark.parametrize("form", FORMS)
def test_a_first_row_below_0_is_row_0(form):
    tokens = torch.tensor([[7, 1, 2, 7, 7, 3, 1, 2]])
    for low in (-1, -5, torch.iinfo(torch.int64).min):
        got = FORMS[form](tokens, [1, 2, 3], first=torch.full((1, 8), low))
        assert torch.equal(got, FORMS[form](tokens, [1, 2, 3]))


@pytest.mark.parametrize("tokens", [torch.rand(1, 5), torch.tensor([1, 1])])
def test_only_token_ids_have_anchors(tokens):
    with pytest.raises(InputError, match=r"anchors needs token ids \[B, T\], whole numbers; got"):
        inspect.unwrap(anchors)(tokens, [1])


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form):
    tokens = torch.tensor([[7, 8, 9, 7, 8, 8, 8]])
    found = FORMS[form](tokens, [1, 2, 3])[0].T.tolist()
    assert found == [[-1, -1, -1, 1, 2, 5, 6], [-1, -1, -1, -1, 2, -1, 6], [-1] * 7]


@pytest.mark.parametrize("form", FORMS)
def test_later_tokens_change_nothing(form):
    tokens = torch.randint(3, (2, 50))
    other = tokens.clone()
    other[:, 30:] = torch.randint(3, (2, 20))
    a, b = (FORMS[form](x, [1, 2, 3]) for x in (tokens, other))
    assert torch.equal(a[:, :30], b[:, :30])


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_document_is_as_if_alone(form):
    alone = torch.randint(3, (1, 20))
    packed = torch.cat([torch.randint(3, (1, 13)), alone], dim=1)
    first = torch.tensor([[0] * 13 + [13] * 20])
    found, wanted = FORMS[form](packed, [1, 3], first=first)[:, 13:], FORMS[form](alone, [1, 3])
    assert torch.equal(found, torch.where(wanted < 0, -1, wanted + 13))


def test_both_forms_agree_on_a_long_text():
    tokens, first = torch.randint(200, (2, 20_000)), documents(2, 20_000)
    for rows in (None, first):
        found = anchors(tokens, [1, 2, 3, 4], first=rows)
        assert torch.equal(found, anchors_reference(tokens, [1, 2, 3, 4], rows))


@given(
    steps=st.lists(st.tuples(st.integers(0, 12), st.floats(0, 1)), min_size=1, max_size=12),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_the_index_equals_the_batch_after_any_crops(steps, seed):
    rng = np.random.default_rng(seed)
    index, sequence = NgramIndex((1, 2, 5)), []
    for size, crop in steps:
        keep = round(crop * len(sequence))
        index.crop(keep)
        del sequence[keep:]
        new = rng.integers(0, 3, size).tolist()
        found = append([index], torch.tensor([new], dtype=torch.int64))[0]
        sequence += new
        whole = anchors(torch.tensor([sequence], dtype=torch.int64), [1, 2, 5])[0]
        assert torch.equal(torch.from_numpy(found.copy()), whole[len(sequence) - size :])


def test_the_index_grows_and_keeps_what_it_knew():
    tokens = torch.randint(50, (1, 3000))
    index = NgramIndex((2,))
    found = [append([index], piece) for piece in tokens.split(7, dim=1)]
    assert torch.equal(torch.from_numpy(np.concatenate(found, axis=1)), anchors(tokens, [2]))


def test_several_sequences_in_one_call():
    """As in the batch form, however long they are, through growth and crops."""
    rng = np.random.default_rng(0)
    indices = [NgramIndex((1, 2, 5)) for _ in range(3)]
    known = [np.empty((2, 0), np.int64) for _ in indices]  # Tokens, and the first row of each.
    for turn in range(300):
        if turn % 50 == 20:
            for i, index in enumerate(indices):
                index.crop(int(rng.integers(index.length)))
                known[i] = known[i][:, : index.length]
        chosen, count = np.flatnonzero(rng.integers(0, 2, 3)), rng.integers(1, 4)
        if not len(chosen):
            continue
        tokens = rng.integers(0, 4, (len(chosen), count))
        first = rng.integers(-1, 200, (len(chosen), count))
        got = append([indices[i] for i in chosen], torch.from_numpy(tokens), first)
        for row, i in enumerate(chosen):
            known[i] = np.concatenate([known[i], [tokens[row], first[row]]], axis=1)
            whole, starts = torch.from_numpy(known[i])[:, None]
            assert got[row].tolist() == anchors(whole, [1, 2, 5], first=starts)[0, -count:].tolist()


def row(*tokens):
    return torch.tensor([tokens])


def test_without_memory_to_grow_it_stays_as_it_was(monkeypatch):
    index, tokens = NgramIndex((1, 2)), [i % 7 for i in range(64)]
    append([index], row(*tokens[:60]))

    def full(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(ngrams.np, "full", full)
        with pytest.raises(MemoryError):
            append([index], row(*range(100)))
    for token in [*tokens[60:], 1, 2, 3]:
        found = append([index], row(token))
    assert found.tolist() == [[[60, 60]]]


@pytest.mark.parametrize("copied", [NgramIndex.copy, copy.deepcopy])
def test_a_copy_is_independent(copied):
    index = NgramIndex((1,))
    append([index], row(1, 2, 3))
    other = copied(index)
    for _ in range(3):
        append([other], row(4))
    assert append([index], row(1)) == [[[1]]]
    assert append([other], row(3)) == [[[3]]]
    other.crop(0)
    assert append([index], row(2)) == [[[2]]]


def test_collisions_change_nothing(monkeypatch):
    """With all n-grams in a few buckets the answer is the same: look-ups compare the tokens themselves."""
    tokens = torch.randint(40, (1, 300))
    wanted = searched(tokens, [1, 2])
    sizes = []
    monkeypatch.setattr(ngrams, "_table_size", lambda length: sizes.append(length) or 2)
    assert torch.equal(anchors(tokens, [1, 2]), wanted)
    assert torch.equal(torch.from_numpy(append([NgramIndex((1, 2))], tokens)), wanted)
    assert sizes


def test_the_index_states_its_memory():
    index = NgramIndex((1, 2, 3))
    append([index], torch.arange(1 << 16)[None])
    # A token, and for each n a link and two to four places in a table.
    assert 4 + 3 * 12 <= index.num_bytes / (1 << 16) <= 4 + 3 * 20


def test_library_registration():
    tokens = torch.randint(3, (2, 9))
    for first in (None, documents(2, 9)):
        torch.library.opcheck(torch.ops.starlm.anchors.default, (tokens, [1, 2], first))


def test_sorting_never_waits_for_the_device():
    """The form for GPUs asks for no number on the host."""

    class NoScalars(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    tokens = torch.randint(3, (2, 9))
    with NoScalars():
        for first in (None, documents(2, 9)):
            anchors_reference(tokens, [1, 3], first)
        with pytest.raises(AssertionError):
            tokens.max().item()


@pytest.mark.parametrize("orders", [[], [0], [2, -1]])
def test_impossible_orders(orders):
    with pytest.raises(InputError, match="orders of 1 or more"):
        anchors(torch.zeros(1, 3, dtype=torch.int64), orders)


@given(length=st.integers(1, 60), vocab=st.integers(1, 3), packed=st.booleans(), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_longest_is_the_last_of_the_longest_matches(length, vocab, packed, seed):
    torch.manual_seed(seed)
    tokens = torch.randint(vocab, (1, length))
    first = documents(1, length) if packed else torch.zeros(1, length, dtype=torch.long)
    orders = range(1, 5)
    got = longest(dict(zip(orders, anchors(tokens, list(orders), first=first).unbind(-1), strict=True)))
    for t in range(length):
        text = tokens[0, first[0, t] : t + 1].tolist()
        wanted = -1
        for n in orders:
            for end in range(n, len(text)):
                if text[end - n : end] == text[len(text) - n :]:
                    wanted = end + int(first[0, t])
        assert got[0, t] == wanted


@pytest.mark.parametrize(
    "first", [torch.zeros(1, 2).long(), torch.zeros(2, 7).long(), torch.full((2, 6), 2.9)]
)
def test_first_rows_that_do_not_fit_are_refused(first):
    with pytest.raises(InputError, match=r"anchors needs first as integers of shape \(2, 6\)"):
        inspect.unwrap(anchors)(torch.zeros(2, 6).long(), [1], first=first)


@pytest.mark.parametrize("shift", [-1, -25, -(2**31)])
def test_negative_ids_are_ids(shift):
    tokens = torch.randint(0, 4, (3, 200))
    wanted = anchors(tokens, [1, 2, 3])
    assert (anchors(tokens + shift, [1, 2, 3]) == wanted).all()
    with plain():
        assert (anchors(tokens + shift, [1, 2, 3]) == wanted).all()
