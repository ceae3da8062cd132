"""What is told of a text's reads, against counts by hand and against the gradients of the model itself."""

import math

import pytest
import torch
from models import KINDS, make_model

from starlm.errors import InputError
from starlm.evaluate import reads as module
from starlm.evaluate.reads import BINS, Head, Tally, reads, watching
from starlm.nn.deformer import Reads

TOKENS = torch.randint(8, (41,), generator=torch.Generator().manual_seed(3)).tolist()


def spread(model, shift):
    """`model` with every `now` head at this shift exactly."""
    with torch.no_grad():
        for block in model.blocks:
            for name, parameter in block.mixer.named_parameters():
                if "shift" in name:
                    parameter.fill_(math.log(math.expm1(shift)) if parameter.ndim == 1 else 0.0)
    return model


def test_a_known_shift():
    model = spread(make_model("gated", depth=1, shift_init=2.25), 2.25)
    found = reads(model, TOKENS)
    head = found.heads[0]
    assert (head.kind, head.stream, len(found.heads), found.layers) == ("now", "value", 2, ("deformer",))
    assert head.rows[10] == ((7, 0.25), (8, 0.75))
    assert head.origins[10] == 10
    # Tokens 0, 1, 2 have nothing so far back: token 0 reads itself, 1 and 2 the first row.
    assert head.rows[0] == head.rows[1] == head.rows[2] == ((0, 1.0),)
    reach = head.reach
    assert (reach.median, reach.p90, reach.max, reach.nothing) == (2, 3, 3, 0.0)
    far = 0.25 * 38 / 41
    assert reach.histogram == pytest.approx((1 / 41, 1 / 41, (0.75 * 38 + 1) / 41, far), abs=1e-5)
    assert found.bins == (0, 1, 2, 4)
    assert found.groups[0].reach == reach


def test_windows():
    """A window of w tokens, whatever the token, but for those with fewer before them."""
    model = make_model("star", depth=1, kinds=("box",))
    with torch.no_grad():
        model.blocks[0].mixer.shift.weight.zero_()
        model.blocks[0].mixer.shift.bias.fill_(2 * math.log(5))
    found = reads(model, TOKENS)
    assert found.heads[0].rows[20] == ((16, 1.0),)
    assert found.heads[0].rows[2] == ((0, 1.0),)
    reach = found.groups[0].reach
    assert (reach.median, reach.max, reach.histogram[0]) == (5, 5, 0.0)


def test_anchors():
    model = make_model("star", depth=1, kinds=("token", "bigram"))
    with torch.no_grad():
        for parameter in model.blocks[0].mixer.shift.parameters():
            parameter.zero_()
    text = [5, 6, 7, 5, 6, 1]
    found = reads(model, text)
    by_kind = {group.kind: group.reach for group in found.groups}
    assert (by_kind["token"].nothing, by_kind["bigram"].nothing) == (
        pytest.approx(4 / 6),
        pytest.approx(5 / 6),
    )
    assert (by_kind["bigram"].median, by_kind["bigram"].max) == (2, 2)
    token, bigram = found.heads[0], found.heads[-1]
    assert (token.kind, bigram.kind) == ("token", "bigram")
    assert token.origins == (-1, -1, -1, 1, 2, -1)
    assert token.rows == ((), (), (), ((1, 1.0),), ((2, 1.0),), ())
    assert bigram.origins == (-1, -1, -1, -1, 2, -1)


@pytest.mark.parametrize("kind", ["product", "value", "gated", "star", "star product", "star, longest match"])
def test_a_token_feels_the_rows_told_and_no_other(kind, monkeypatch):
    """By gradient: in one layer without MLP its logits depend on itself and the rows told, no other."""
    monkeypatch.setattr(module, "SHARE", 1e-9)
    monkeypatch.setattr(module, "PARTS", 100_000)
    model = make_model(kind, depth=1, mlp_ratio=0)
    found = reads(model, TOKENS)
    embedded = model.embedding(torch.tensor([TOKENS])).detach().requires_grad_()
    monkeypatch.setattr(model.embedding, "forward", lambda tokens: embedded)
    logits = model(torch.tensor([TOKENS]))
    for t in range(0, len(TOKENS), 5):
        (grad,) = torch.autograd.grad(logits[0, t].square().sum(), embedded, retain_graph=True)
        # Prefix sums of box heads leave a rounding of 1e-16 everywhere.
        felt = set(grad[0].abs().amax(-1).gt(1e-12).nonzero().flatten().tolist())
        told = {t}
        for head in found.heads:
            rows = [row for row, _ in head.rows[t]]
            told |= set(range(min(rows), t + 1)) if head.kind == "box" else set(rows)
        assert felt == told


def test_attention_is_named():
    found = reads(make_model("attention"), TOKENS)
    assert (found.layers, found.heads, found.groups, found.bins) == (("attention",) * 2, (), (), ())


@pytest.mark.parametrize("kind", KINDS)
def test_in_pieces_is_the_same(kind, monkeypatch):
    model = make_model(kind)
    whole = reads(model, TOKENS)
    monkeypatch.setattr(module, "_CHUNK", 9)
    assert reads(model, TOKENS) == whole


def test_a_part_is_that_part():
    model = make_model("star")
    whole, part = reads(model, TOKENS), reads(model, TOKENS, begin=-11, end=38)
    assert (part.begin, part.end, part.num_tokens) == (30, 38, 41)
    assert part.groups == whole.groups
    assert [head.rows for head in part.heads] == [head.rows[30:38] for head in whole.heads]
    assert reads(model, TOKENS, begin=50).heads[0].rows == ()


def test_streams_and_layers():
    found = reads(make_model("mixed product", depth=4), TOKENS)
    assert found.layers == ("attention", "deformer", "attention", "deformer")
    assert {(head.layer, head.stream) for head in found.heads} == {
        (layer, stream) for layer in (1, 3) for stream in ("query", "key")
    }
    assert [group.heads for group in found.groups] == [2, 2]


def test_no_token():
    with pytest.raises(InputError, match="no text to look at"):
        reads(make_model("star"), [])


def test_nothing_stays_behind():
    """Hooks are gone, also after an error."""
    model = make_model("gated")
    with pytest.raises(ZeroDivisionError), watching(model, lambda *args: 1 / 0):
        model(torch.tensor([TOKENS]))
    model(torch.tensor([TOKENS]))


def tally_of(distances):
    """A tally of one head that reads these distances, one query each."""
    own = len(distances) - 1
    near = torch.tensor([[[[own - d]] for d in distances]])
    # All from the last row: the query's own row is what `past` makes it.
    tally = Tally([Head(0, "now", "value")])
    for number in range(len(distances)):
        row = near[:, number : number + 1]
        origin = torch.full((1, 1, 1), own)
        tally.add(Reads(origin, row, row, torch.zeros(1, 1, 1, 1)), own)
    return tally.reach([0])


def test_far_distances_are_counted_to_a_percent():
    distances = [0, 1, 3, 900, 1023, 1024, 1025, 5000, 70_000, 1_000_000]
    reach = tally_of(distances)
    assert reach.max == 1_000_000
    assert reach.median == 1023
    assert reach.p90 == pytest.approx(70_000, rel=0.01)
    assert sum(reach.histogram) == pytest.approx(1)
    for number, share in enumerate(reach.histogram):
        low = BINS[number - 1] if number else -1
        assert share == pytest.approx(sum(low < d <= BINS[number] for d in distances) / 10, abs=1e-6)


def test_queries_that_do_not_count():
    tally = Tally([Head(0, "now", "value")])
    own = torch.arange(4)[None, :, None]
    counted = torch.tensor([[True, True, False, False]])
    row = torch.zeros(1, 4, 1, 1, dtype=torch.long)
    tally.add(Reads(own, row, row, torch.zeros(1, 4, 1, 1)), counted=counted)
    assert tally.reach([0]).histogram == (0.5, 0.5)
