"""The rows that a layer says it reads are those that it reads: its output, computed again from them alone."""

import pytest
import torch
from relations import assert_close, randomise

from starlm.nn import deformer as module
from starlm.nn.deformer import Deformer
from starlm.nn.state import LayerState, Streams
from starlm.ops import anchors, longest
from starlm.ops.constants import BOX_SCALE
from starlm.ops.elementwise import rms

B, T, D, H = 2, 23, 16, 8
KINDS = ("now", "token", "box", "bigram", "longest", "now", "box", "token")
LAYERS = {
    "product": {"preset": "product"},
    "value": {"preset": "value"},
    "gated": {"preset": "gated"},
    "star": {"preset": "star", "kinds": KINDS},
    "product of all kinds": {"preset": "product", "kinds": KINDS},
    "bounded": {"preset": "star", "kinds": KINDS, "max_shift": 4},
    "all in one place": {"preset": "star", "kinds": KINDS, "max_shift": 0},
}
FIRST = torch.tensor([[0] * 9 + [9] * (T - 9), [4] * T])


def make(name):
    layer = randomise(Deformer(D, H, window=6, **LAYERS[name])).double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    tokens = torch.randint(5, (B, T))
    return layer, x, tokens


def origins_of(tokens, first):
    found = dict(zip((1, 2), anchors(tokens, [1, 2], first=first).unbind(-1), strict=True))
    return {**found, 0: longest(found)}


def output_from(layer, x, streams):
    """y of x if every channel reads the rows that `streams` names: a loop over weights, one row at a time."""
    read = {}
    for stream, reads in streams.items():
        values = rms(getattr(layer, stream)(x).unflatten(-1, (H, -1)))
        weights = torch.zeros(B, T, H, D // H, T, dtype=torch.float64)
        boxed = torch.tensor([kind == "box" for kind in layer.kinds])[None, None, :, None]
        own = torch.arange(T)[None, :, None, None]
        for row in range(T):
            of_row = (reads.near == row) * (1 - reads.fraction) + (reads.far == row) * reads.fraction
            window = ((reads.near <= row) & (row <= own)) + (reads.far == row) * reads.fraction
            weights[..., row] = torch.where(boxed, window, of_row)
        total = weights.sum(-1)
        scale = torch.where(boxed, total.clamp(max=BOX_SCALE).sqrt() / total.clamp(min=1), 1.0)
        read[stream] = (torch.einsum("bthcs,bshc->bthc", weights, values) * scale).flatten(-2)
    if layer.preset == "product":
        return read["query"] * read["key"]
    y = read["value"]
    return layer.out(y if layer.preset == "value" else y * torch.sigmoid(layer.gate(x)))


@pytest.mark.parametrize("first", [None, FIRST], ids=["one document", "packed"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_the_rows_give_the_output(name, first):
    layer, x, tokens = make(name)
    origins = origins_of(tokens, first)
    streams = layer.reads(x, first=first, origins=origins)
    assert_close(output_from(layer, x, streams), layer(x, first=first, origins=origins))


@torch.no_grad()
def test_another_row_gives_another_output():
    """So that the comparison above means something."""
    layer, x, tokens = make("star")
    origins = origins_of(tokens, None)
    (reads,) = layer.reads(x, origins=origins).values()
    wanted = layer(x, origins=origins)
    for wrong in (
        reads._replace(near=(reads.near - 1).clamp(min=-1)),
        reads._replace(far=reads.near),
        reads._replace(fraction=1 - reads.fraction),
    ):
        assert (output_from(layer, x, {"value": wrong}) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_bounds(name):
    """Rows lie between the document's first and the query's own; -1 exactly where there is no anchor."""
    layer, x, tokens = make(name)
    own = torch.arange(T)[None, :, None, None]
    first = torch.minimum(FIRST, own[..., 0, 0])[:, :, None, None]
    for reads in layer.reads(x, first=FIRST, origins=origins_of(tokens, FIRST)).values():
        nothing = (reads.origin < 0)[..., None].expand_as(reads.near)
        assert torch.equal(nothing, reads.near == -1)
        assert torch.equal(nothing, reads.far == -1)
        assert nothing.any() == bool(layer.orders)
        assert (nothing | (first <= reads.far)).all()
        assert (nothing | ((reads.far <= reads.near) & (reads.near <= own))).all()
        assert ((reads.fraction >= 0) & (reads.fraction < 1)).all()


@pytest.mark.parametrize("name", ["star", "product of all kinds", "bounded"])
@torch.no_grad()
def test_in_pieces(name):
    """Behind a decode state the rows are the same, and the fractions but for a product's rounding."""
    layer, x, tokens = make(name)
    origins = origins_of(tokens, FIRST)
    whole = layer.reads(x, first=FIRST, origins=origins)
    for begin in range(0, T, 5):
        piece = slice(begin, begin + 5)
        got = layer.reads(
            x[:, piece],
            first=FIRST[:, piece],
            origins={n: rows[:, piece] for n, rows in origins.items()},
            past=begin,
        )
        for stream, reads in whole.items():
            for name, one in got[stream]._asdict().items():
                two = getattr(reads, name)[:, piece]
                assert torch.equal(one, two) if name != "fraction" else (one - two).abs().max() < 1e-12


@torch.no_grad()
def test_it_is_the_layer_that_says_it(monkeypatch):
    """Distances are computed in one place: what changes them changes the rows and the output alike."""
    layer, x, tokens = make("star")
    origins = origins_of(tokens, None)
    before = layer.reads(x, origins=origins)["value"]
    distances = module.Deformer._distances
    monkeypatch.setattr(
        module.Deformer, "_distances", lambda self, z: {k: d + 1.5 for k, d in distances(self, z).items()}
    )
    streams = layer.reads(x, origins=origins)
    assert not torch.equal(before.near, streams["value"].near)
    assert_close(output_from(layer, x, streams), layer(x, origins=origins))
    state = LayerState([Streams(0) for _ in range(B)], [0] * B)
    assert_close(output_from(layer, x, streams), layer(x, origins=origins, state=state))
