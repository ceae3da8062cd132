"""Batches from documents: packed without a gap, and a function of (seed, step) alone."""

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

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


class _Stream:
    """The documents of a split, one after the other in some order, as one row of tokens."""

    def __init__(self, split: Split, order: np.ndarray) -> None:
        """Args: order: document numbers, int64 [documents]."""
        self._split, self._order = split, order
        self._ends = np.cumsum(split.document_lengths()[order])

    def read(self, begin: int, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Fill `tokens` [n] from `begin` on, and set the `starts` [n] where a document begins."""
        number = int(np.searchsorted(self._ends, begin, side="right"))
        document_begin = int(self._ends[number - 1]) if number else 0
        done = 0
        while done < len(tokens):
            offset = begin + done - document_begin
            document_end = int(self._ends[number])
            stop = min(document_end - begin, len(tokens))
            starts[done] = offset == 0
            self._split.read(int(self._order[number]), offset, offset + stop - done, tokens[done:stop])
            done, number, document_begin = stop, number + 1, document_end


class PackedLoader:
    """Endless batches of a split, in an order that depends on the seed alone.

    An epoch is the concatenation of its documents in the order of
    `np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_documents)`, and epochs follow
    one another without a gap: stream. Row i of the run is stream[i*T : i*T + T + 1], its first T tokens the
    inputs, its last T the targets. Step n has the rows from n * rows * world on, `rows` for each rank in
    turn, so the ranks together see what one process with rows * world would.

        with PackedLoader(split, rows=8, length=512, seed=0) as loader:
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
        self._next = 0
        self._epochs: dict[int, _Stream] = {}
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[Iterator[Batch]] = weakref.WeakSet()

    def batch_at(self, step: int) -> Batch:
        """The batch of step 0, 1, ...; a pure function, from any thread."""
        begin = (step * self._world + self._rank) * self._rows
        tokens = np.empty((self._rows, self._length + 1), dtype=np.int64)
        starts = np.zeros(tokens.shape, dtype=bool)
        for row in range(self._rows):
            self._read((begin + row) * self._length, tokens[row], starts[row])
        return Batch(inputs=tokens[:, :-1].copy(), targets=tokens[:, 1:].copy(), first=_first(starts[:, :-1]))

    def batches(self, start: int | None = None) -> Iterator[Batch]:
        """Batches from step `start` on, without end.

        Args:
            start: None goes on where `state` is: at 0, at what `restore` said, or behind the last batch.
        """
        if start is not None:
            self._next = start
        iterator = self._iterate(self._next)
        self._open.add(iterator)
        return iterator

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def state(self) -> dict[str, Any]:
        """Where the run is (`position`: the next row, counted over all ranks), and what that rests on."""
        position = self._next * self._rows * self._world
        return {
            "seed": self._seed,
            "length": self._length,
            "data": self._split.fingerprint,
            "position": position,
            "epoch": position * self._length // self._split.num_tokens,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, perhaps with other numbers of rows, ranks and workers.

        Raises:
            InputError: another seed, length or data, or a position that falls within a step.
        """
        try:
            position = int(state["position"])
            before = {name: state[name] for name in ("seed", "length", "data")}
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"The loader's saved state is damaged: {state!r}. Begin the run anew, or take an "
                f"earlier checkpoint."
            ) from None
        now = {"seed": self._seed, "length": self._length, "data": self._split.fingerprint}
        for name, value in before.items():
            if value != now[name]:
                raise InputError(
                    f"The run cannot go on in the same order: its {name} was {value}, now it is {now[name]}. "
                    f"Use the same {name} again, or begin a new run."
                )
        rows = self._rows * self._world
        if position < 0 or position % rows:
            raise InputError(
                f"The run stopped at row {position}, which is within a step of {rows} rows (rows x world). "
                f"Choose rows so that a step divides {position}."
            )
        self._next = position // rows

    def close(self) -> None:
        """End every iteration and its threads."""
        for iterator in list(self._open):
            iterator.close()  # pyright: ignore[reportAttributeAccessIssue]

    def __enter__(self) -> "PackedLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _iterate(self, step: int) -> Iterator[Batch]:
        if not self._workers:
            while True:
                self._next = step + 1
                yield self.batch_at(step)
                step += 1
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="starlm-loader")
        ahead: deque[Future[Batch]] = deque()
        try:
            while True:
                while len(ahead) <= self._workers:
                    ahead.append(pool.submit(self.batch_at, step + len(ahead)))
                batch = ahead.popleft().result()
                step += 1
                self._next = step
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, position: int, tokens: np.ndarray, starts: np.ndarray) -> None:
        done = 0
        while done < len(tokens):
            epoch, begin = divmod(position + done, self._split.num_tokens)
            stop = min(len(tokens), done + self._split.num_tokens - begin)
            self._epoch(epoch).read(begin, tokens[done:stop], starts[done:stop])
            done = stop

    def _epoch(self, number: int) -> _Stream:
        with self._lock:
            if number not in self._epochs:
                generator = np.random.Generator(
                    np.random.Philox(key=np.array([self._seed, number], np.uint64))
                )
                # Rows near the border of two epochs need both.
                while len(self._epochs) >= 2:
                    del self._epochs[min(self._epochs)]
                self._epochs[number] = _Stream(self._split, generator.permutation(self._split.num_documents))
            return self._epochs[number]


def sequential_rows(
    split: Split, length: int, max_tokens: int | None = None, *, rows: int = 1
) -> Iterator[Batch]:
    """Batches for evaluation: documents in stored order, each token of the split predicted once.

    Packed as in training, and the <|bos|> that ends the last document stands for the one that begins the
    first, which nothing precedes. So there are min(num_tokens, max_tokens) targets.

    Args:
        length: T, tokens of a row.
        max_tokens: stop after this many targets; None takes all.
        rows: rows of a batch; the last batch may have fewer.

    Yields:
        Batches. In the last row, padding has inputs <|bos|>, targets -1 and itself as `first`.

    Raises:
        InputError: length, rows or max_tokens below 1.
    """
    for name, value in (("length", length), ("rows", rows), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be 1 or more; got {value}.")
    return _sequential(split, length, min(split.num_tokens, max_tokens or split.num_tokens), rows)


def _sequential(split: Split, length: int, total: int, rows: int) -> Iterator[Batch]:
    stream = _Stream(split, np.arange(split.num_documents))
    num_rows = -(-total // length)
    for top in range(0, num_rows, rows):
        count = min(rows, num_rows - top)
        tokens = np.full((count, length + 1), split.bos, dtype=np.int64)
        starts = np.ones(tokens.shape, dtype=bool)
        for row in range(count):
            begin = (top + row) * length
            stop = min(length + 1, split.num_tokens - begin)
            starts[row, :stop] = False
            stream.read(begin, tokens[row, :stop], starts[row, :stop])
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        padding = np.arange(top * length, (top + count) * length).reshape(count, length) >= total
        inputs[padding], targets[padding] = split.bos, -1
        yield Batch(inputs=inputs, targets=targets, first=_first(starts[:, :-1] | padding))


def _first(starts: np.ndarray) -> np.ndarray:
    """The column of the latest start up to each column, 0 before any: bool [B, T] to int64 [B, T]."""
    columns = np.arange(starts.shape[1], dtype=np.int64)
    return np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
