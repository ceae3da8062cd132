"""An index of the n-grams of a growing sequence: hash chains in numba, exact, and able to go back.

`table[bucket]` is the last position whose n-gram falls into the bucket, `chain[t]` the one before t. A
look-up walks the chain until the tokens themselves agree, so a collision costs a step and changes nothing.
Going back is the same walk in reverse: the bucket of t gets chain[t] again.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from starlm.ops.cpu_base import index, jit, kernel, pointer, spread

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
    origin = torch.empty(rows, length, len(orders), dtype=torch.int64, device="cpu")
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


# Without `nogil`: a token takes microseconds, and a thread that lets others in may wait for longer than that.
@kernel()
def _append_each(places, orders, lengths, tokens, first, origin):
    for b in range(tokens.shape[0]):
        place, begin = places[b], lengths[b]
        end = begin + tokens.shape[1]
        ids = carray(pointer(place[0]), (end,), np.int32)
        for t in range(begin, end):
            ids[t] = tokens[b, t - begin]
        for k in range(orders.size):
            table = carray(pointer(place[2 + k]), (place[1],), np.int32)
            chain = carray(pointer(place[2 + orders.size + k]), (end,), np.int32)
            _append(ids, orders[k], table, chain, begin, end, first[b], origin[b, k])


def append(
    indices: "Sequence[NgramIndex]", tokens: Int[Tensor, "B T"], first: Int[np.ndarray, "B T"] | None = None
) -> Int[np.ndarray, "B T N"]:
    """Index more tokens of each of several sequences.

    Args:
        indices: of the same orders, each once.
        tokens: on the host.
        first: first row that each of them may read, int64; default 0.

    Returns:
        Origins as `starlm.ops.anchors` gives them for the whole sequences, at these tokens.
    """
    batch, count = tokens.shape
    for one in indices:
        one.reserve(one.length + count)
    places = np.array([one.places for one in indices])
    lengths = np.array([one.length for one in indices])
    starts = np.zeros((batch, count), np.int64) if first is None else np.ascontiguousarray(first)
    orders = np.array(indices[0].orders)
    origin = np.empty((batch, len(orders), count), np.int64)
    _append_each(places, orders, lengths, index(tokens), starts, origin)
    for one in indices:
        one.length += count
    return origin.transpose(0, 2, 1)


class NgramIndex:
    """The n-grams of one sequence that grows at its end, for several n at once: by `append`.

    Appending costs one look-up per token and n; cropping one step per token and n given back; a copy is a
    copy of 4 arrays. About 12 bytes per token and n.
    """

    def __init__(self, orders: Sequence[int], capacity: int = 64) -> None:
        """Args: orders: the values of n. capacity: tokens that there is room for before it grows."""
        self.orders, self.length = tuple(orders), 0
        self._tokens = np.empty(capacity, np.int32)
        self._tables = [np.full(_table_size(capacity), -1, np.int32) for _ in self.orders]
        self._chains = [np.empty(capacity, np.int32) for _ in self.orders]
        self._place()

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length >= self.length:
            return
        for n, table, chain in zip(self.orders, self._tables, self._chains, strict=True):
            _remove(self._tokens, n, table, chain, length, self.length)
        self.length = length

    def copy(self) -> "NgramIndex":
        """An independent index of the same tokens."""
        return deepcopy(self)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held."""
        return sum(array.nbytes for array in (self._tokens, *self._tables, *self._chains))

    def reserve(self, length: int) -> None:
        """Make room for so many tokens."""
        if length <= len(self._tokens):
            return
        # A larger table has other buckets, so the chains are laid anew: each token moves a bounded number of
        # times, since the capacity doubles. All that may run out of memory comes first.
        larger = NgramIndex(self.orders, max(2 * len(self._tokens), length))
        append([larger], torch.from_numpy(self._tokens[None, : self.length]))
        self.__dict__.update(vars(larger))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A deep copy has arrays elsewhere.
        self.__dict__.update(state)
        self._place()

    def _place(self) -> None:
        """Note the addresses of the tokens, and, behind the size of a table, of tables and chains."""
        arrays = [self._tokens, *self._tables, *self._chains]
        tokens, *others = (array.ctypes.data for array in arrays)
        self.places = np.array([tokens, self._tables[0].size, *others])
