"""Batches from documents: texts without a gap, conversations whole; a function of (seed, step) alone."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np

from starlm.data.shards import Split
from starlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of T tokens, each with the token that follows it."""

    inputs: np.ndarray
    """int64 [B, T]"""
    targets: np.ndarray
    """int64 [B, T]: the token after each input; -1 where there is none to predict."""
    first: np.ndarray
    """int64 [B, T]: column where the document of inputs[b, t] begins in this row; 0 if it began before."""


def check_tokens(batch: Batch, split: Split, vocab_size: int) -> None:
    """Refuse a batch of a split with tokens beyond the vocabulary: only damaged data have them.

    Raises:
        InputError: there is one.
    """
    highest = int(max(batch.inputs.max(), batch.targets.max()))
    if highest >= vocab_size:
        raise InputError(
            f"The data in {split.folder} are damaged: they have the token {highest} of a vocabulary of "
            f"{vocab_size}. starlm data stats --data {split.folder} --verify says which file it is. Prepare "
            f"them again, as they were, and run the same command again."
        )


class _Stream:
    """Rows of texts: the documents of a split, one after the other in some order, as a ring of tokens."""

    def __init__(self, split: Split, order: np.ndarray, length: int) -> None:
        """Args: order: document numbers, int64 [documents]. length: T, tokens of a row."""
        self._split, self._order, self._length = split, order, length
        self._bounds = np.append(0, np.cumsum(split.document_lengths()[order]))
        self.size = self.num_targets = split.num_tokens
        self.num_rows = -(-self.size // length)

    def part(self, max_tokens: int) -> tuple[list[int], int]:
        """Rows from all over with `max_tokens` targets, or all; and how many targets."""
        targets = min(self.size, max_tokens)
        return _spread(-(-targets // self._length), self.num_rows), targets

    def read(self, row: int, tokens: np.ndarray, starts: np.ndarray, learned: np.ndarray) -> None:
        """Fill `tokens` [T + 1] with a row and what follows it, set the `starts` [T + 1] where a document
        begins, and clear `learned` [T + 1] where a token is not.

        Behind the last document comes the first one again.
        """
        begin = row * self._length
        number = int(np.searchsorted(self._bounds, begin, side="right")) - 1
        offset = begin - int(self._bounds[number])
        done = 0
        while done < len(tokens):
            length = int(self._bounds[number + 1] - self._bounds[number])
            stop = min(done + length - offset, len(tokens))
            starts[done] = offset == 0
            self._split.read(int(self._order[number]), offset, offset + stop - done, tokens[done:stop])
            done, number, offset = stop, (number + 1) % len(self._order), 0


class _Whole:
    """Rows of conversations, each of which begins in its row: an answer whose question lies in another row
    would teach to make things up. Of a longer one than a row, with the token that follows, the beginning is
    taken; one in which nothing of that is learned is left out.

    Each goes into the row that it fills best, the longest first; what stays empty is <|bos|>.
    """

    def __init__(self, split: Split, length: int) -> None:
        """Args: length: T, tokens of a row.

        Raises:
            InputError: nothing is learned of any conversation.
        """
        self._split = split
        self._lengths = np.minimum(split.document_lengths(), length + 1)
        learned = split.learned_within(length + 1)
        self._rows: list[list[int]] = []
        # Rows by what is free in them, and the numbers by which there are some.
        free: list[list[int]] = [[] for _ in range(length + 1)]
        sizes: list[int] = []
        for number in np.argsort(-self._lengths, kind="stable").tolist():
            if not learned[number]:
                continue
            needs = min(int(self._lengths[number]), length)
            if (place := bisect_left(sizes, needs)) < len(sizes):
                space = sizes[place]
                row = free[space].pop()
                if not free[space]:
                    del sizes[place]
            else:
                space, row = length, len(self._rows)
                self._rows.append([])
            self._rows[row].append(number)
            left = space - needs
            if not free[left]:
                insort(sizes, left)
            free[left].append(row)
        if not self._rows:
            raise InputError(
                f"In none of the {split.name} conversations of {split.folder} does the assistant say "
                f"anything within the model's context of {length} tokens. Take a model with a longer one, or "
                f"other conversations."
            )
        self.num_rows = len(self._rows)
        self.size = self.num_rows * length
        self._targets = np.array([learned[row].sum() for row in self._rows])
        self.num_targets = int(self._targets.sum())

    def part(self, max_tokens: int) -> tuple[list[int], int]:
        """As of `_Stream`, but with about so many targets: rows are taken whole."""
        rows = round(min(1, max_tokens / self.num_targets) * self.num_rows)
        numbers = _spread(max(rows, 1), self.num_rows)
        return numbers, int(self._targets[numbers].sum())

    def read(self, row: int, tokens: np.ndarray, starts: np.ndarray, learned: np.ndarray) -> None:
        """As of `_Stream`; of what is empty each token is a document of its own."""
        tokens[:], learned[:] = self._split.bos, False
        done = 0
        for number in self._rows[row]:
            stop = done + int(self._lengths[number])
            self._split.read(number, 0, stop - done, tokens[done:stop])
            self._split.read_learned(number, 0, stop - done, learned[done:stop])
            starts[done], done = True, stop
        starts[done:] = True


_Layout = _Stream | _Whole


def _spread(count: int, total: int) -> list[int]:
    return [number * total // count for number in range(count)]


def _stored(split: Split, length: int) -> _Layout:
    """The split's documents as they are stored."""
    if split.conversations:
        return _Whole(split, length)
    return _Stream(split, np.arange(split.num_documents), length)


def _batch(places: Sequence[tuple[_Layout, int]], length: int) -> Batch:
    """A batch of rows, each named by its layout and its number there. Args: length: T."""
    tokens = np.empty((len(places), length + 1), dtype=np.int64)
    starts, learned = np.zeros(tokens.shape, dtype=bool), np.ones(tokens.shape, dtype=bool)
    for row, (layout, number) in enumerate(places):
        layout.read(number, tokens[row], starts[row], learned[row])
    return Batch(
        inputs=tokens[:, :-1].copy(),
        targets=np.where(learned[:, 1:], tokens[:, 1:], -1),
        first=_first(starts[:, :-1]),
    )


class PackedLoader:
    """Endless batches of a split, in an order that depends on the seed alone.

    Each epoch e has a generator of its own, np.random.Generator(np.random.Philox(key=[seed, e])). Its first
    permutation puts the N tokens' documents one after the other: stream. Row i of the epoch is
    stream[i*T : i*T + T + 1], its first T tokens the inputs, its last T the targets; the last of the
    R = ceil(N / T) rows goes on at the beginning of the stream, so no token is left out. The second
    permutation is the order in which rows are visited: row n of the run is row permutation[n mod R] of
    epoch n div R. So the rows of a batch come from all over the corpus, not from one long document.

    Of conversations, rows are the same in each epoch: whole ones, each in the row that it fills best, up to T
    tokens of each. Targets are the tokens that are learned; where nothing is learned of a conversation, it is
    left out, so each row has some.

    Step n has the rows from n * rows * world on, `rows` for each rank in turn, so the ranks together see
    what one process with rows * world would.

        loader = PackedLoader(split, rows=8, length=512, seed=0)
        for batch in loader.batches(): ...
    """

    def __init__(
        self,
        split: Split,
        *,
        rows: int,
        length: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
    ) -> None:
        """Args:
            rows: rows of a batch of this rank.
            length: T, tokens of a row.
            seed: of the order; 0 or more.
            rank, world: which of how many processes this is.
            workers: threads that prepare batches ahead; 0 prepares each when it is asked for.

        Raises:
            InputError: an impossible value.
        """
        lowest = {"rows": (rows, 1), "length": (length, 1), "world": (world, 1)}
        lowest |= {"seed": (seed, 0), "workers": (workers, 0), "rank": (rank, 0)}
        for name, (value, minimum) in lowest.items():
            if value < minimum:
                raise InputError(f"{name} must be {minimum} or more; got {value}.")
        if seed >= 2**64:
            raise InputError(f"seed must be below 2^64; got {seed}.")
        if rank >= world:
            raise InputError(f"rank must be below world; got rank {rank} of {world}.")
        self._split, self._rows, self._length, self._seed = split, rows, length, seed
        self._rank, self._world, self._workers = rank, world, workers
        stored = _stored(split, length)
        self._whole = stored if isinstance(stored, _Whole) else None
        self._epoch_rows = stored.num_rows
        self.epoch_tokens: int = stored.size
        """Tokens of an epoch; of conversations with what stays empty of their rows."""
        # The rows of a step may lie on both sides of the border of two epochs.
        self._epoch = lru_cache(maxsize=2)(self._open_epoch)

    def batch_at(self, step: int) -> Batch:
        """The batch of step 0, 1, ...; a pure function, from any thread."""
        begin, places = (step * self._world + self._rank) * self._rows, []
        for row in range(begin, begin + self._rows):
            epoch, number = divmod(row, self._epoch_rows)
            layout, order = self._epoch(epoch)
            places.append((layout, int(order[number])))
        return _batch(places, self._length)

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Batches from step `start` on, without end. Closing the generator ends its threads."""
        if not self._workers:
            for step in count(start):
                yield self.batch_at(step)
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="starlm-loader")
        ahead: deque[Future[Batch]] = deque()
        try:
            for step in count(start):
                ahead.append(pool.submit(self.batch_at, step))
                if len(ahead) > self._workers:
                    yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _open_epoch(self, number: int) -> tuple[_Layout, np.ndarray]:
        generator = np.random.Generator(np.random.Philox(key=np.array([self._seed, number], np.uint64)))
        documents = generator.permutation(self._split.num_documents)
        # Conversations lie in the same rows in each epoch.
        layout = self._whole or _Stream(self._split, documents, self._length)
        return layout, generator.permutation(self._epoch_rows)


class SequentialLoader:
    """Batches for evaluation: documents in stored order, each token of the split predicted once.

    Texts are packed as in training, and the <|bos|> that ends the last document stands for the one that
    begins the first, which nothing precedes. So there are min(num_tokens, max_tokens) targets. In the last
    row, padding has inputs <|bos|>, targets -1 and itself as `first`.

    Of conversations, targets are the tokens that are learned, in rows as those of training; there are
    about max_tokens, since rows are taken whole.

    If that is not all, the rows are spread evenly over the split, so that each source has its share of them.
    """

    def __init__(self, split: Split, length: int, max_tokens: int | None = None, *, rows: int = 1) -> None:
        """Args:
            length: T, tokens of a row.
            max_tokens: so many targets; None takes all.
            rows: rows of a batch; the last batch may have fewer.

        Raises:
            InputError: length, rows or max_tokens below 1, or conversations of which nothing is learned.
        """
        for name, value in (("length", length), ("rows", rows), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more; got {value}.")
        self._split, self._length, self._batch_rows = split, length, rows
        self._layout = _stored(split, length)
        self.split_targets: int = self._layout.num_targets
        """How many targets there would be of the whole split."""
        self._numbers, self.num_targets = self._layout.part(max_tokens or self.split_targets)

    def __iter__(self) -> Iterator[Batch]:
        """The batches, from the first one on."""
        whole = isinstance(self._layout, _Whole)
        end = len(self._numbers) * self._length if whole else self.num_targets
        for top in range(0, len(self._numbers), self._batch_rows):
            numbers = self._numbers[top : top + self._batch_rows]
            batch = _batch([(self._layout, number) for number in numbers], self._length)
            places = top * self._length + np.arange(batch.inputs.size).reshape(batch.inputs.shape)
            padding = places >= end
            batch.inputs[padding], batch.targets[padding] = self._split.bos, -1
            batch.first[padding] = (places % self._length)[padding]
            yield batch


def _first(starts: np.ndarray) -> np.ndarray:
    """The column of the latest start up to each column, 0 before any: bool [B, T] to int64 [B, T]."""
    columns = np.arange(starts.shape[1], dtype=np.int64)
    return np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
