"""Decode states of prompts that were read, for prompts that begin alike."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from starlm.model.state import DecodeState

# A copy for fewer tokens than these costs more than reading them.
FEWEST = 16


@dataclass(frozen=True, eq=False)
class _Entry:
    tokens: np.ndarray
    state: DecodeState
    num_bytes: int


class PrefixCache:
    """States of one slot by the tokens they have read; the least recently used go first."""

    def __init__(self, limit: int) -> None:
        """Args: limit: bytes that may be held; 0 keeps nothing."""
        self.limit, self.num_bytes, self.hits, self.misses = limit, 0, 0, 0
        # The least recently used first; and by how they begin, since only what begins alike can serve.
        self._entries: OrderedDict[_Entry, None] = OrderedDict()
        self._alike: dict[bytes, list[_Entry]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Sequence[int]) -> DecodeState | None:
        """A copy of the state that has read most of the beginning of `tokens`, and not all of them."""
        wanted, best, length = np.asarray(tokens, np.int64)[:-1], None, FEWEST - 1
        for entry in self._alike.get(_beginning(wanted), ()):
            # Many may share a beginning: most of them differ where they would be longer than the best.
            if not _agree(entry.tokens, wanted, length):
                continue
            common = _common(entry.tokens, wanted)
            if common > length and _reaches(entry.state, common):
                best, length = entry, common
        if best is None:
            self.misses += 1
            return None
        self.hits += 1
        self._use(best)
        return best.state.fork(lengths=length)

    def put(self, tokens: Sequence[int], state: DecodeState, *, copy: bool = False) -> None:
        """Keep a state of one slot that has read `tokens`.

        Args:
            copy: keep a copy; otherwise the state must not be used elsewhere from now on.
        """
        ids = np.asarray(tokens, np.int64)
        if len(ids) < FEWEST or state.num_bytes + ids.nbytes > self.limit:
            return
        for other in list(self._alike.get(_beginning(ids), ())):
            if not _agree(other.tokens, ids, min(len(other.tokens), len(ids)) - 1):
                continue
            common = _common(other.tokens, ids)
            if common == len(ids) and _reaches(other.state, common):
                self._use(other)
                return
            if common == len(other.tokens) and _reaches(state, common):
                self._drop(other)
        state = state.fork() if copy else state
        entry = _Entry(ids, state, state.num_bytes + ids.nbytes)
        self._add(entry)
        self.num_bytes += entry.num_bytes
        while self.num_bytes > self.limit:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget all states."""
        self._entries.clear()
        self._alike.clear()
        self.num_bytes = 0

    def _add(self, entry: _Entry) -> None:
        self._entries[entry] = None
        self._alike.setdefault(_beginning(entry.tokens), []).append(entry)

    def _use(self, entry: _Entry) -> None:
        self._remove(entry)
        self._add(entry)

    def _drop(self, entry: _Entry) -> None:
        self._remove(entry)
        self.num_bytes -= entry.num_bytes

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry]
        beginning = _beginning(entry.tokens)
        alike = self._alike[beginning]
        alike.remove(entry)
        if not alike:
            del self._alike[beginning]


def _beginning(tokens: np.ndarray) -> bytes:
    return tokens[:FEWEST].tobytes()


def _agree(one: np.ndarray, two: np.ndarray, at: int) -> bool:
    """Whether both sequences have the same token at a place."""
    return at < min(len(one), len(two)) and one[at] == two[at]


def _common(one: np.ndarray, two: np.ndarray) -> int:
    """Tokens that two sequences have in common at their beginning."""
    length = min(len(one), len(two))
    differ = one[:length] != two[:length]
    return int(differ.argmax()) if differ.any() else length


def _reaches(state: DecodeState, length: int) -> bool:
    """Whether the state can be cropped to `length` tokens."""
    return state.slots[0].oldest <= length <= state.lengths[0]
