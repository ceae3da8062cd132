"""Where every head reads: the rows for each token of a text, and how far back they lie on the whole.

found = reads(model, tokens)
found.groups[0].reach.median
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from starlm.errors import InputError
from starlm.model.model import StarLM
from starlm.nn.deformer import Deformer, Reads

# A histogram's bins end at these distances: 0, 1, 2, 4, 8, ... tokens.
BINS = (0, *(2**n for n in range(41)))
# Rows that fewer of a head's channels read are left out of what is drawn, and the windows of a box head are
# told by where this many equal parts of its channels begin.
SHARE, PARTS = 0.01, 10
LAYERS = {"D": "deformer", "A": "attention", "W": "windowed attention", "C": "convolution"}
# Tokens that go through the model in one call.
_CHUNK = 512
# The largest distance of each bucket in which reads are counted: every one up to 1024 tokens, beyond to 1 %,
# with every power of two among them. So a million tokens take no more memory than a thousand.
_EDGES = torch.from_numpy(
    np.concatenate([np.arange(1024), np.round(2.0 ** np.linspace(10, 40, 30 * 70 + 1))]).astype(np.int64)
)

# Of one head and token: rows, rising, and the share of the channels that read each.
Rows = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far back some heads read, in tokens; of box heads, how long their windows are."""

    histogram: tuple[float, ...]
    """Share of the reads in each bin; bin n ends at BINS[n] tokens. As long as it has to be."""
    median: int
    """Half of the reads go no further back; 0 if nothing was read."""
    p90: int
    """Nine tenths go no further back."""
    max: int
    """No read goes further back."""
    nothing: float
    """Share of the queries that read nothing, because their n-gram had not been seen before."""


@dataclass(frozen=True, kw_only=True)
class GroupReads:
    """All heads of one kind in one layer."""

    layer: int
    kind: str
    heads: int
    reach: Reach
    """Of both streams, in layers of preset product."""


@dataclass(frozen=True, kw_only=True)
class HeadReads:
    """One head of one stream."""

    layer: int
    head: int
    kind: str
    stream: str
    """value; query or key in layers of preset product."""
    reach: Reach
    origins: tuple[int, ...]
    """For each token that is told one by one, the row that shift 0 reads; -1: there is none."""
    rows: tuple[Rows, ...]
    """For each of these tokens what is read; of a box head, the rows where its windows begin."""


@dataclass(frozen=True, kw_only=True)
class TextReads:
    """Where a model reads in one text."""

    num_tokens: int
    begin: int
    """First token that is told one by one."""
    end: int
    """The token behind the last of them."""
    layers: tuple[str, ...]
    """What each layer is. Only layers named deformer have heads here."""
    bins: tuple[int, ...]
    """Last distance, in tokens, of each bin of the longest histogram."""
    groups: tuple[GroupReads, ...]
    heads: tuple[HeadReads, ...]


@torch.inference_mode()
def reads(model: StarLM, tokens: Sequence[int], *, begin: int = 0, end: int | None = None) -> TextReads:
    """Where every head of every Deformer layer reads for `tokens`, as one document.

    Reach counts all tokens; rows are told for those from `begin` to `end`. Time is linear in the tokens, and
    memory is that of a decode state.

    Args:
        begin, end: as for a slice.

    Raises:
        InputError: no tokens.
    """
    if not len(tokens):
        raise InputError("There is no text to look at: give at least one token.")
    begin, end, _ = slice(begin, end).indices(len(tokens))
    state = model.new_state(rollback=0)
    tallies: dict[int, Tally] = {}
    told: dict[int, list[tuple[list[int], list[Rows]]]] = {}
    past = 0

    def see(layer: int, heads: tuple[Head, ...], found: Reads) -> None:
        tallies.setdefault(layer, Tally(heads)).add(found, past)
        asked = slice(max(begin - past, 0), max(end - past, 0))
        origin, near, far, fraction = (tensor[0, asked].cpu().numpy() for tensor in found)
        for number, head in enumerate(heads):
            origins, rows = told.setdefault(layer, [([], []) for _ in heads])[number]
            origins += origin[:, number].tolist()
            rows += map(partial(_rows, head.kind), near[:, number], far[:, number], fraction[:, number])

    with watching(model, see):
        for past in range(0, len(tokens), _CHUNK):
            piece = torch.tensor([tokens[past : past + _CHUNK]], device=model.head.weight.device)
            model(piece, state=state, last_only=True)
    groups = tuple(group for layer, tally in tallies.items() for group in tally.groups(layer))
    return TextReads(
        num_tokens=len(tokens),
        begin=begin,
        end=max(begin, end),
        layers=tuple(LAYERS[letter] for letter in model.config.layer_kinds),
        bins=BINS[: max((len(group.reach.histogram) for group in groups), default=0)],
        groups=groups,
        heads=tuple(
            HeadReads(
                layer=layer,
                **head._asdict(),
                reach=tally.reach([number]),
                origins=tuple(told[layer][number][0]),
                rows=tuple(told[layer][number][1]),
            )
            for layer, tally in tallies.items()
            for number, head in enumerate(tally.heads)
        ),
    )


def _rows(kind: str, near: np.ndarray, far: np.ndarray, fraction: np.ndarray) -> Rows:
    """Rows that the channels [C] of one head read for one token, rising, with the share of the channels."""
    if near[0] < 0:
        return ()
    rows = np.concatenate([near, far])
    weights = np.concatenate([1 - fraction, fraction]) / len(near)
    if kind == "box":
        # Each channel's window begins somewhere else, so the begins are told by their quantiles.
        order = np.argsort(rows, kind="stable")
        below = np.cumsum(weights[order])
        at = np.searchsorted(below, (np.arange(PARTS) + 0.5) / PARTS)
        rows, weights = rows[order][np.minimum(at, len(rows) - 1)], np.full(PARTS, 1 / PARTS)
    found, which = np.unique(rows, return_inverse=True)
    shares = np.bincount(which, weights)
    return tuple(
        (int(row), round(float(share), 3)) for row, share in zip(found, shares, strict=True) if share >= SHARE
    )


class Head(NamedTuple):
    """A head of a layer."""

    head: int
    kind: str
    stream: str


@contextmanager
def watching(model: StarLM, see: Callable[[int, tuple[Head, ...], Reads], None]) -> Iterator[None]:
    """Within it, every call of the model tells `see` what each Deformer layer reads.

    `see` gets the layer's number, its heads, stream by stream, and `Deformer.reads` of the very tensors that
    the layer was given, for these heads.
    """

    def look(layer: int, mixer: Deformer, args: tuple, kwargs: dict) -> None:
        inputs = dict(kwargs)
        state = inputs.pop("state", None)
        streams = mixer.reads(*args, **inputs, past=0 if state is None else state.lengths[0])
        heads = tuple(Head(head, kind, name) for name in streams for head, kind in enumerate(mixer.kinds))
        see(layer, heads, Reads(*(torch.cat(parts, dim=2) for parts in zip(*streams.values(), strict=True))))

    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            if isinstance(block.mixer, Deformer):
                hook = block.mixer.register_forward_pre_hook(partial(look, layer), with_kwargs=True)
                stack.callback(hook.remove)
        yield


class Tally:
    """How far back the heads of one layer read, counted over any number of calls."""

    def __init__(self, heads: Sequence[Head]) -> None:
        """Args: heads: in the order in which `add` gets them."""
        self.heads = tuple(heads)
        self._counts = torch.zeros(len(heads), len(_EDGES), dtype=torch.float64)
        self._furthest = torch.zeros(len(heads), dtype=torch.long)
        self._asked = 0

    def add(self, reads: Reads, past: int = 0, counted: Bool[Tensor, "B T"] | None = None) -> None:
        """Count what one call reads.

        Args:
            past: tokens before the first query.
            counted: queries that count; default all.
        """
        reads = Reads(*(tensor.cpu() for tensor in reads))
        batch, length, _, channels = reads.near.shape
        counted = torch.ones(batch, length, dtype=torch.bool) if counted is None else counted.cpu()
        # A window that begins at the query's own row has one token.
        boxed = torch.tensor([head.kind == "box" for head in self.heads]).long()[:, None]
        own = torch.arange(past, past + length)[:, None, None] + boxed
        read = (counted[..., None] & (reads.origin >= 0))[..., None]
        rows = torch.arange(len(self.heads))[:, None] * self._counts.shape[1]
        for row, share in ((reads.near, 1 - reads.fraction), (reads.far, reads.fraction)):
            distance = own - row
            weight = torch.where(read, share.double(), 0)
            bucket = rows + torch.bucketize(distance.clamp(min=0), _EDGES)
            sums = torch.bincount(bucket.flatten(), weight.flatten(), minlength=self._counts.numel())
            self._counts += sums.view_as(self._counts)
            furthest = torch.where(weight > 0, distance, 0).permute(2, 0, 1, 3).flatten(1)
            if furthest.numel():
                self._furthest = torch.maximum(self._furthest, furthest.amax(1))
        self._asked += int(counted.sum()) * channels

    def reach(self, heads: Sequence[int]) -> Reach:
        """The reach of these heads together."""
        counts, furthest = self._counts[heads].sum(0), int(self._furthest[heads].max())
        total, asked = counts.sum().item(), self._asked * len(heads)
        if not total:
            return Reach(histogram=(), median=0, p90=0, max=0, nothing=float(asked > 0))
        below = counts.cumsum(0) / total
        # Rounding may leave the last sum just below 1.
        median, p90 = (
            min(int(_EDGES[torch.searchsorted(below, share - 1e-9)]), furthest) if total else 0
            for share in (0.5, 0.9)
        )
        size = int(np.searchsorted(BINS, furthest)) + 1
        at_bins = below[torch.searchsorted(_EDGES, torch.tensor(BINS[:size]))]
        histogram = at_bins.diff(prepend=at_bins.new_zeros(1)).tolist()
        return Reach(
            histogram=tuple(round(share, 6) for share in histogram),
            median=median,
            p90=p90,
            max=furthest,
            nothing=max(0.0, round(1 - total / asked, 6)),
        )

    def groups(self, layer: int) -> Iterator[GroupReads]:
        """The reach of all heads of each kind."""
        kinds = [head.kind for head in self.heads]
        for kind in dict.fromkeys(kinds):
            heads = [number for number, other in enumerate(kinds) if other == kind]
            number = len({self.heads[one].head for one in heads})
            yield GroupReads(layer=layer, kind=kind, heads=number, reach=self.reach(heads))
