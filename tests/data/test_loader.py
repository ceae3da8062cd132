import threading
from itertools import islice
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlm.data.loader import PackedLoader, SequentialLoader
from starlm.data.shards import Split
from starlm.errors import InputError

BOS = 0


def corpus(*lengths):
    """Documents of these lengths whose tokens are all different, but for <|bos|>."""
    documents, number = [], 1
    for length in lengths:
        documents.append([BOS, *range(number, number + length - 1)])
        number += length - 1
    return Split.from_documents(documents)


MIXED = corpus(7, 1, 30, 2, 2, 15, 1, 4)
CORPORA = {"mixed": MIXED, "one": corpus(5), "empty ones": corpus(1, 1, 1), "whole rows": corpus(4, 6, 2, 4)}


def documents_of(split):
    """The tokens of each document, in stored order."""
    documents = [np.empty(size, np.int64) for size in split.document_lengths()]
    for number, document in enumerate(documents):
        split.read(number, 0, len(document), document)
    return documents


def epoch_streams(split, seed, epoch, length):
    """The stream and the order of the rows of an epoch, by the definition."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    documents = documents_of(split)
    stream = np.concatenate([documents[number] for number in generator.permutation(split.num_documents)])
    return stream, generator.permutation(ceil(split.num_tokens / length))


def rows_of(split, count, *, length, seed):
    """Rows 0 ... count-1 of the run, by the definition: count x (length + 1) tokens."""
    rows = []
    per_epoch = ceil(split.num_tokens / length)
    for number in range(count):
        stream, order = epoch_streams(split, seed, number // per_epoch, length)
        begin = order[number % per_epoch] * length
        rows.append(stream[(begin + np.arange(length + 1)) % len(stream)])
    return np.array(rows)


def first_of(tokens):
    """What `first` must be: every <|bos|> begins a document."""
    first = np.zeros_like(tokens)
    for row, result in zip(tokens, first, strict=True):
        begin = 0
        for column, token in enumerate(row):
            begin = column if token == BOS else begin
            result[column] = begin
    return first


def assert_equal(batch, tokens):
    assert batch.inputs.dtype == batch.targets.dtype == batch.first.dtype == np.int64
    np.testing.assert_array_equal(batch.inputs, tokens[:, :-1])
    np.testing.assert_array_equal(batch.targets, tokens[:, 1:])
    np.testing.assert_array_equal(batch.first, first_of(tokens[:, :-1]))


@pytest.mark.parametrize("length", [1, 4, 7, 100])
@pytest.mark.parametrize("name", CORPORA)
def test_rows_are_those_of_the_definition(name, length):
    split, rows = CORPORA[name], 3
    loader = PackedLoader(split, rows=rows, length=length, seed=3)
    steps = 3 * ceil(split.num_tokens / length) // rows + 2
    expected = rows_of(split, steps * rows, length=length, seed=3)
    for step in range(steps):
        assert_equal(loader.batch_at(step), expected[step * rows : (step + 1) * rows])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 15), st.integers(0, 2**64 - 1))
def test_every_token_is_an_input_once_per_epoch(lengths, length, seed):
    split = corpus(*lengths)
    per_epoch = ceil(split.num_tokens / length)
    loader = PackedLoader(split, rows=1, length=length, seed=seed, workers=0)
    for epoch in range(2):
        rows = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        batches = [loader.batch_at(number) for number in rows]
        seen = np.concatenate([batch.inputs[0] for batch in batches])
        stream, order = epoch_streams(split, seed, epoch, length)
        # The only row that repeats tokens is the one that goes round, and it does at its end.
        surplus = per_epoch * length - split.num_tokens
        wrapping = batches[list(order).index(per_epoch - 1)].inputs[0]
        again = np.resize(stream, surplus)
        np.testing.assert_array_equal(wrapping[length - surplus :], again)
        np.testing.assert_array_equal(np.sort(seen), np.sort(np.concatenate([stream, again])))


def test_a_document_beginning_within_a_row_hides_what_is_before_it():
    split = corpus(3, 5)
    batch = PackedLoader(split, rows=2, length=8, seed=0).batch_at(0)
    for inputs, first in zip(batch.inputs, batch.first, strict=True):
        begin = list(inputs).index(BOS, 1)
        np.testing.assert_array_equal(first, [0] * begin + [begin] * (8 - begin))


def test_a_wrap_begins_a_document():
    split = corpus(5)
    batch = PackedLoader(split, rows=2, length=4, seed=0).batch_at(0)
    rows = {tuple(row): list(first) for row, first in zip(batch.inputs, batch.first, strict=True)}
    assert rows == {(BOS, 1, 2, 3): [0, 0, 0, 0], (4, BOS, 1, 2): [0, 1, 1, 1]}


def test_a_batch_has_rows_from_all_over_a_long_document():
    split = corpus(100_000)
    batch = PackedLoader(split, rows=32, length=100, seed=0).batch_at(0)
    begins = np.sort(batch.inputs[:, 0])
    assert begins[0] < 20_000
    assert begins[-1] > 80_000
    assert (np.diff(batch.inputs[:, 0]) != 100).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    split = corpus(*[3] * 50)
    orders = set()
    for seed in range(3):
        loader = PackedLoader(split, rows=50, length=3, seed=seed)
        orders |= {loader.batch_at(step).inputs.tobytes() for step in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_order_is_the_same_after_a_restart_and_for_any_number_of_workers(workers):
    plain = PackedLoader(MIXED, rows=2, length=5, seed=1, workers=0)
    expected = [plain.batch_at(step).inputs for step in range(40)]
    loader = PackedLoader(MIXED, rows=2, length=5, seed=1, workers=workers)
    for start in (0, 1, 7, 29):
        batches = loader.batches(start)
        for inputs, batch in zip(expected[start:], batches, strict=False):
            np.testing.assert_array_equal(batch.inputs, inputs)
        batches.close()
    np.testing.assert_array_equal(loader.batch_at(5).inputs, expected[5])


@pytest.mark.parametrize(("rows", "world"), [(6, 1), (3, 2), (2, 3), (1, 6)])
def test_ranks_together_see_what_one_process_sees(rows, world):
    whole = PackedLoader(MIXED, rows=6, length=4, seed=2, workers=0)
    ranks = [
        PackedLoader(MIXED, rows=rows, length=4, seed=2, rank=rank, world=world, workers=0)
        for rank in range(world)
    ]
    for step in range(9):
        parts = [rank.batch_at(step) for rank in ranks]
        one = whole.batch_at(step)
        for name in ("inputs", "targets", "first"):
            together = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(together, getattr(one, name))


def test_shards_do_not_change_the_order():
    documents = [[BOS, *range(10 * n, 10 * n + n)] for n in range(1, 9)]
    whole = Split.from_documents(documents)
    tokens, starts = [], []
    for part in (documents[:1], documents[1:6], documents[6:]):
        tokens.append(np.array([token for document in part for token in document], np.uint16))
        starts.append(np.cumsum([0, *(len(document) for document in part[:-1])]))
    cut = Split("train", tokens=tokens, starts=starts, bos=BOS, num_bytes=0, fingerprint="")
    for step in range(10):
        one, other = (PackedLoader(split, rows=2, length=6, seed=0).batch_at(step) for split in (whole, cut))
        np.testing.assert_array_equal(one.inputs, other.inputs)
        np.testing.assert_array_equal(one.first, other.first)


def test_closing_ends_the_threads():
    loader = PackedLoader(MIXED, rows=2, length=5, seed=0, workers=3)
    batches = loader.batches()
    next(batches)
    assert any(thread.name.startswith("starlm-loader") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("starlm-loader") for thread in threading.enumerate())


def test_an_error_in_a_worker_arrives(monkeypatch):
    loader = PackedLoader(MIXED, rows=2, length=5, seed=0, workers=2)

    def broken(*args):
        raise OSError("the disk went away")

    monkeypatch.setattr(MIXED, "read", broken)
    with pytest.raises(OSError, match="the disk went away"):
        next(loader.batches())


def test_a_seed_may_take_all_64_bits():
    loader = PackedLoader(MIXED, rows=2, length=5, seed=2**64 - 1)
    assert loader.batch_at(10**12).inputs.shape == (2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows must be 1 or more; got 0"),
        ({"length": 0}, "length must be 1 or more; got 0"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"seed": 2**64}, r"seed must be below 2\^64"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"world": 0}, "world must be 1 or more"),
        ({"rank": 2, "world": 2}, "rank must be below world; got rank 2 of 2"),
        ({"rank": -1}, "rank must be 0 or more"),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        PackedLoader(MIXED, **{"rows": 2, "length": 5, "seed": 0} | change)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("length", [1, 4, 7, 100])
@pytest.mark.parametrize("name", CORPORA)
def test_evaluation_predicts_each_token_once_in_stored_order(name, length, rows):
    split = CORPORA[name]
    stored = np.concatenate(documents_of(split))
    stored_rows = ceil(split.num_tokens / length)
    for max_tokens in (None, 1, split.num_tokens // 2 or 1, split.num_tokens, 10**6):
        total = min(split.num_tokens, max_tokens or split.num_tokens)
        batches = list(SequentialLoader(split, length, max_tokens, rows=rows))
        assert [len(batch.inputs) for batch in batches[:-1]] == [rows] * (len(batches) - 1)
        inputs, targets, first = (
            np.concatenate([getattr(batch, name) for batch in batches])
            for name in ("inputs", "targets", "first")
        )
        assert len(inputs) == ceil(total / length)
        # Of a part, rows from all over the split.
        places = [row * stored_rows // len(inputs) * length for row in range(len(inputs))]
        taken = (np.array(places)[:, None] + np.arange(length)).ravel()[:total]
        np.testing.assert_array_equal(inputs.ravel()[:total], stored[taken])
        np.testing.assert_array_equal(targets.ravel()[:total], np.append(stored, BOS)[taken + 1])
        # Padding stands for itself alone.
        assert (targets.ravel()[total:] == -1).all()
        np.testing.assert_array_equal(first, first_of(inputs))


def test_a_part_of_the_split_has_its_share_of_each_source():
    split = corpus(*[10] * 40)
    batches = list(SequentialLoader(split, 5, 100, rows=7))
    seen = np.concatenate([batch.inputs for batch in batches])
    assert seen.shape == (20, 5)
    half = split.num_tokens // 2 * 9 // 10
    assert [(row.max() <= half) for row in seen] == [True] * 10 + [False] * 10


@pytest.mark.parametrize(("name", "values"), [("length", (0,)), ("max_tokens", (4, 0)), ("rows", (4, 1))])
def test_impossible_values_for_evaluation_are_refused(name, values):
    options = {"rows": 0} if name == "rows" else {}
    with pytest.raises(InputError, match=f"{name} must be 1 or more; got 0"):
        list(islice(SequentialLoader(MIXED, *values, **options), 1))


def spoken(*turns):
    """Conversations of so many tokens, <|bos|> included, with so many that are learned at their ends."""
    documents, learned, number = [], [], 1
    for length, answer in turns:
        documents.append([BOS, *range(number, number + length - 1)])
        learned.append([False] * (length - answer) + [True] * answer)
        number += length - 1
    return Split.from_documents(documents, learned=learned)


def test_conversations_lie_whole_in_the_rows_that_they_fill_best():
    split = spoken((5, 2), (3, 1), (4, 4 - 1), (9, 5), (10, 1))
    (batch,) = SequentialLoader(split, 8, rows=9)
    # The longest first, with a token that is no input. Of the fifth nothing is learned in 9 tokens.
    np.testing.assert_array_equal(
        batch.inputs, [[BOS, *range(10, 17)], [BOS, 1, 2, 3, 4, BOS, 5, 6], [BOS, 7, 8, 9, *[BOS] * 4]]
    )
    np.testing.assert_array_equal(
        batch.targets,
        [[-1, -1, -1, 13, 14, 15, 16, 17], [-1, -1, 3, 4, -1, -1, 6, -1], [7, 8, 9, *[-1] * 5]],
    )
    np.testing.assert_array_equal(batch.first, [[0] * 8, [*[0] * 5, *[5] * 3], [0, 0, 0, 0, 4, 5, 6, 7]])


TURNS = st.tuples(st.integers(2, 20), st.integers(0, 19)).map(
    lambda turn: (turn[0], min(turn[1], turn[0] - 1))
)


@given(st.lists(TURNS, min_size=1, max_size=30), st.integers(2, 16), st.integers(0, 9))
def test_every_token_that_is_learned_is_a_target_once_per_epoch(turns, length, seed):
    split = spoken(*turns)
    expected, begin = [], 1
    for size, answer in turns:
        ids = [BOS, *range(begin, begin + size - 1)]
        expected += [(ids[at], at) for at in range(size - answer, min(size, length + 1))]
        begin += size - 1
    if not expected:
        with pytest.raises(InputError, match="In none of the train conversations"):
            PackedLoader(split, rows=1, length=length, seed=seed)
        return
    loader = PackedLoader(split, rows=1, length=length, seed=seed, workers=0)
    rows = loader.epoch_tokens // length
    in_order = list(SequentialLoader(split, length, rows=4))
    for batches in (
        [loader.batch_at(step) for step in range(rows)],
        [loader.batch_at(step) for step in range(rows, 2 * rows)],
        in_order,
    ):
        found = []
        for batch in batches:
            for row, (targets, first) in enumerate(zip(batch.targets, batch.first, strict=True)):
                assert (targets >= 0).any()
                for column in np.flatnonzero(targets >= 0):
                    # It lies as far behind the beginning of its conversation, which is in the row, as there.
                    place = int(column - first[column]) + 1
                    assert batch.inputs[row, first[column]] == BOS
                    found.append((int(targets[column]), place))
        assert sorted(found) == sorted(expected)


def test_conversations_have_an_order_for_each_epoch_and_the_same_after_a_restart():
    split = spoken(*[(5, 2)] * 40)
    loader = PackedLoader(split, rows=4, length=5, seed=0, workers=0)
    orders = {
        tuple(np.concatenate([loader.batch_at(e * 10 + s).inputs for s in range(10)])[:, 1]) for e in range(3)
    }
    assert len(orders) == 3
    batches = PackedLoader(split, rows=4, length=5, seed=0, workers=2).batches(7)
    np.testing.assert_array_equal(next(batches).inputs, loader.batch_at(7).inputs)
    batches.close()


def test_a_part_of_the_conversations_is_from_all_over():
    split = spoken(*[(n, 2) for n in range(3, 43)])
    whole, part = SequentialLoader(split, 42), SequentialLoader(split, 42, 20, rows=2)
    assert (whole.num_targets, whole.split_targets, part.split_targets) == (80, 80, 80)
    rows = [row for batch in part for row in batch.inputs]
    assert 16 <= part.num_targets == sum((batch.targets >= 0).sum() for batch in part) <= 24
    # Rows are filled the longest first; their longest conversations here are from both ends.
    longest = [
        max(len(run) for run in "".join(" " if n == BOS else "x" for n in row).split()) for row in rows
    ]
    assert max(longest) > 35
    assert min(longest) < 30


def test_however_little_is_asked_for_there_is_something():
    split = spoken(*[(9, 2)] * 50)
    part = SequentialLoader(split, 20, 1)
    assert part.num_targets == sum((batch.targets >= 0).sum() for batch in part) == 4
