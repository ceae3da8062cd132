"""An index of the n-grams of a growing sequence: hash chains in numba, exact, and able to go back.

`table[bucket]` is the last position whose n-gram falls into the bucket, `chain[t]` the one before t. A
look-up walks the chain until the tokens themselves agree, so a collision costs a step and changes nothing.
Going back is the same walk in reverse: the bucket of t gets chain[t] again.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Int
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from starlm.ops.cpu_base import index, jit, pointer, spread

_MIX = np.uint64(0x9E3779B97F4A7C15)
_ONE, _HALF = np.uint64(1), np.uint64(32)


@jit
def _bucket(tokens, t, n, size):
    h = np.uint64(0)
    for i in range(t - n + 1, t + 1):
        h = (h ^ np.uint64(tokens[i])) * _MIX
        h ^= h >> _HALF
    return np.int64(h & (np.uint64(size) - _ONE))


@jit
def _append(tokens, n, table, chain, begin, end, first, origin):
    """Index positions begin .. end; origin[t - begin] as in `anchors`, `first` for each of them or None."""
    for t in range(begin, end):
        if t < n - 1:
            origin[t - begin] = -1
            continue
        bucket = _bucket(tokens, t, n, table.size)
        j = np.int64(table[bucket])
        chain[t] = j
        table[bucket] = t
        start = n - 1 + (np.int64(0) if first is None else max(first[t - begin], 0))
        found = np.int64(-1)
        # Positions fall along a chain: below `start` there is nothing more to find.
        while j >= start and t >= start:
            k = 0
            while k < n and tokens[j - k] == tokens[t - k]:
                k += 1
            if k == n:
                found = j + 1
                break
            j = np.int64(chain[j])
        origin[t - begin] = found


@jit
def _remove(tokens, n, table, chain, begin, end):
    """Undo `_append` of positions begin .. end, which are the last ones."""
    for t in range(end - 1, max(begin, n - 1) - 1, -1):
        table[_bucket(tokens, t, n, table.size)] = chain[t]


@jit
def _batch(tokens, orders, size, first, origin, begin, end):
    length = tokens.shape[1]
    table, chain = np.empty(size, np.int32), np.empty(length, np.int32)
    found = np.empty(length, np.int64)
    for part in range(begin, end):
        row, number = part // orders.size, part % orders.size
        table[:] = -1
        starts = None if first is None else first[row]
        _append(tokens[row], orders[number], table, chain, 0, length, starts, found)
        origin[row, :, number] = found


def batch(tokens: Tensor, orders: Sequence[int], first: Tensor | None) -> Tensor:
    """`starlm.ops.anchors` for CPU tensors."""
    rows, length = tokens.shape
    origin = torch.empty(rows, length, len(orders), dtype=torch.int64)
    ids = tokens.to(torch.int64).contiguous().numpy()
    starts = None if first is None else first.to(torch.int64).contiguous().numpy()
    numbers, size, out = np.array(orders, np.int64), _table_size(length), origin.numpy()
    spread(
        lambda begin, end: _batch(ids, numbers, size, starts, out, begin, end),
        rows * len(orders),
        origin.numel(),
    )
    return origin


def _table_size(length: int) -> int:
    return 1 << max(2 * length - 1, 15).bit_length()


# Without `nogil`: it takes microseconds, and a thread that lets others in may wait for longer than that.
@numba.njit(cache=True, error_model="numpy")
def _append_each(places, orders, lengths, tokens, first, origin):
    for b in range(tokens.size):
        place, t = places[b], lengths[b]
        ids = carray(pointer(place[0]), (t + 1,), np.int32)
        ids[t] = tokens[b]
        for k in range(orders.size):
            table = carray(pointer(place[2 + k]), (place[1],), np.int32)
            chain = carray(pointer(place[2 + orders.size + k]), (t + 1,), np.int32)
            _append(ids, orders[k], table, chain, t, t + 1, first[b : b + 1], origin[b, k : k + 1])


def append_each(
    indices: "Sequence[NgramIndex]", tokens: Int[Tensor, "B"], first: Int[np.ndarray, "B"]
) -> Int[np.ndarray, "B N"]:
    """One more token for each of several sequences: what `NgramIndex.append` says of it.

    Args:
        indices: of the same orders, each once.
        tokens: on the host.
        first: the first row that it may read, int64.
    """
    for one in indices:
        one.reserve(one.length + 1)
    places = np.array([one.places for one in indices])
    lengths = np.array([one.length for one in indices])
    origin = np.empty((len(indices), len(indices[0].orders)), np.int64)
    _append_each(places, np.array(indices[0].orders), lengths, index(tokens), first, origin)
    for one in indices:
        one.length += 1
    return origin


class NgramIndex:
    """The n-grams of one sequence that grows at its end, for several n at once.

    Appending costs one look-up per token and n; cropping one step per token and n given back; a copy is a
    copy of 4 arrays. About 12 bytes per token and n.
    """

    def __init__(self, orders: Sequence[int]) -> None:
        """Args: orders: the values of n."""
        self.orders, self.length = tuple(orders), 0
        self._tokens = np.empty(0, np.int32)
        self._tables: list[np.ndarray] = []
        self._chains: list[np.ndarray] = []
        # Addresses of the tokens, and, behind the size of a table, of tables and chains.
        self.places = np.empty(0, np.int64)
        self.reserve(1)

    def append(self, tokens: np.ndarray, first: np.ndarray | None = None) -> np.ndarray:
        """Index more tokens.

        Args:
            tokens: integers [T].
            first: first row that each of them may read, int64 [T]; default 0.

        Returns:
            Origins as `starlm.ops.anchors` gives them, int64 [T, N].
        """
        begin, end = self.length, self.length + len(tokens)
        self.reserve(end)
        self._tokens[begin:end] = tokens
        origin = np.empty((len(self.orders), len(tokens)), np.int64)
        for n, table, chain, found in zip(self.orders, self._tables, self._chains, origin, strict=True):
            _append(self._tokens, n, table, chain, begin, end, first, found)
        self.length = end
        return origin.T

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length >= self.length:
            return
        for n, table, chain in zip(self.orders, self._tables, self._chains, strict=True):
            _remove(self._tokens, n, table, chain, length, self.length)
        self.length = length

    def copy(self) -> "NgramIndex":
        """An independent index of the same tokens."""
        other = NgramIndex(self.orders)
        other.length, other._tokens = self.length, self._tokens.copy()
        other._tables = [table.copy() for table in self._tables]
        other._chains = [chain.copy() for chain in self._chains]
        other._place()
        return other

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held."""
        return sum(array.nbytes for array in (self._tokens, *self._tables, *self._chains))

    def reserve(self, length: int) -> None:
        """Make room for so many tokens."""
        if length <= len(self._tokens):
            return
        capacity = max(2 * len(self._tokens), length, 64)
        # A larger table has other buckets, so the chains are laid anew: each token moves a bounded number of
        # times, since the capacity doubles. All that may run out of memory comes first.
        tokens = np.resize(self._tokens, capacity)
        tables = [np.full(_table_size(capacity), -1, np.int32) for _ in self.orders]
        chains = [np.empty(capacity, np.int32) for _ in self.orders]
        unused = np.empty(self.length, np.int64)
        for n, table, chain in zip(self.orders, tables, chains, strict=True):
            _append(tokens, n, table, chain, 0, self.length, None, unused)
        self._tokens, self._tables, self._chains = tokens, tables, chains
        self._place()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A deep copy has arrays elsewhere.
        self.__dict__.update(state)
        self._place()

    def _place(self) -> None:
        arrays = [self._tokens, *self._tables, *self._chains]
        tokens, *others = (array.ctypes.data for array in arrays)
        self.places = np.array([tokens, self._tables[0].size, *others])
