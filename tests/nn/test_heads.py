"""Kinds of heads: their names, and the layer with mixed heads against its formula written out."""

import pytest
import torch
from relations import assert_causal, assert_close, randomise, unchecked

from starlm.errors import InputError
from starlm.nn.deformer import Deformer
from starlm.nn.heads import STAR, kinds_of_heads, lookups, order_of, orders_of
from starlm.nn.state import LayerState, Streams
from starlm.ops import anchors, longest, plain
from starlm.ops.reference import deform_reference

B, T, D, H = 2, 30, 16, 8
KINDS = ("now", "token", "box", "bigram", "now", "token", "box", "trigram")


def make(preset="star", kinds=KINDS, **options):
    layer = randomise(Deformer(D, H, preset=preset, kinds=kinds, **options)).double()
    tokens = torch.randint(3, (B, T))
    return layer, torch.randn(B, T, D, dtype=torch.float64), tokens


def origins(tokens, first=None, orders=(1, 2, 3, 4)):
    return dict(zip(orders, anchors(tokens, orders, first=first).unbind(-1), strict=True))


def formula(layer, x, tokens, first=None):
    """y = Wo (read(v) * sigmoid(Wg x)), head by head; kinds in the order now, anchored, box."""
    weights = dict(layer.named_parameters())
    v = (x @ weights["value.weight"].T).view(B, T, H, D // H)
    v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    z = (x @ weights["shift.weight"].T + weights["shift.bias"]).view(B, T, H, D // H)
    found = origins(tokens, first)
    start = torch.zeros(B, T, dtype=torch.long) if first is None else first
    ordered = ["now", "now", "token", "token", "bigram", "trigram", "box", "box"]
    heads = []
    for h, kind in enumerate(ordered):
        vh, zh = v[:, :, h : h + 1], z[:, :, h : h + 1]
        if kind == "now":
            read = deform_reference(vh, torch.logaddexp(zh, torch.zeros_like(zh)), first=first)
        elif kind == "box":
            read = torch.zeros_like(vh)
            for b in range(B):
                for t in range(T):
                    low = int(start[b, t])
                    for c in range(D // H):
                        w = min(max((zh[b, t, 0, c] / 2).exp().item(), 1.0), t + 1 - low)
                        whole, part = int(w), w - int(w)
                        total = vh[b, t + 1 - whole : t + 1, 0, c].sum()
                        total = total + (part * vh[b, t - whole, 0, c] if part else 0)
                        read[b, t, 0, c] = total / w * min(w, 16.0) ** 0.5
        else:
            origin = found[{"token": 1, "bigram": 2, "trigram": 3}[kind]][..., None]
            read = deform_reference(vh, zh, origin=origin, first=first)
        heads.append(read)
    y = torch.cat(heads, dim=2).flatten(-2) / (1 + torch.exp(-x @ weights["gate.weight"].T))
    return y @ weights["out.weight"].T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_window_beyond_every_number_has_a_gradient(dtype):
    layer = randomise(Deformer(8, 1, kinds=("box",))).to(dtype)
    torch.nn.init.constant_(layer.shift.bias, 4000.0)
    with plain():
        layer(torch.randn(1, 5, 8, dtype=dtype)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert layer.shift.bias.grad.eq(0).all()


@torch.no_grad()
def test_formula_of_star():
    layer, x, tokens = make()
    first = torch.tensor([[0] * 11 + [11] * 19, [0] * T])
    for rows in (None, first):
        got = layer(x, first=rows, origins=origins(tokens, rows))
        assert_close(got, formula(layer, x, tokens, rows))


def test_the_formula_notices_another_kind_and_another_anchor():
    layer, x, tokens = make()
    wanted = formula(layer, x, tokens)
    moved = {n: torch.where(o > 0, o - 1, o) for n, o in origins(tokens).items()}
    assert (layer(x, origins=moved) - wanted).abs().max() > 1e-3
    other, _, _ = make(
        kinds=("now", "token", "now", "bigram", "now", "token", "now", "trigram"), shift_init=1.0
    )
    other.load_state_dict(layer.state_dict())
    assert (other(x, origins=origins(tokens)) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("preset", ["product", "value", "gated", "star"])
def test_every_preset_takes_kinds(preset):
    """Causal with its anchors, and gradients reach every weight."""
    layer, x, tokens = make(preset, kinds=("box", "now", "token", "5-gram"))
    found = origins(tokens, orders=(1, 5))
    assert_causal(lambda y: layer(y, origins=found), x, torch.randn_like(x), cuts=(0, 12, T - 2))
    layer(x, origins=found).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_order_of_the_names():
    assert [order_of(kind) for kind in ("now", "box", "token", "bigram", "trigram", "4-gram", "12-gram")] == [
        *(None, None, 1, 2, 3, 4, 12)
    ]
    assert kinds_of_heads("star", (), 8) == tuple(
        sorted(STAR, key=lambda kind: ("now", "token", "bigram", "trigram", "box").index(kind))
    )
    assert order_of("longest") == 0
    assert lookups(orders_of(("now", "trigram", "box", "token"))) == (1, 3)
    assert lookups(orders_of(("longest", "12-gram"))) == (1, 2, 3, 4, 5, 6, 7, 8, 12)
    assert lookups(orders_of(("now", "box"))) == ()
    assert kinds_of_heads("star", ("box", "token", "longest", "now"), 4) == ("now", "longest", "token", "box")
    assert kinds_of_heads("gated", (), 3) == ("now",) * 3
    assert kinds_of_heads("gated", ("box", "now"), 5) == ("now", "now", "box", "box", "box")


@pytest.mark.parametrize("kind", ["nowhere", "3-gram", "0-gram", "-1-gram", "100-gram", "gram", ""])
def test_unknown_kinds(kind):
    with pytest.raises(InputError, match="now, token, bigram, trigram, 4-gram"):
        order_of(kind)


def test_anchored_heads_ask_for_origins():
    layer, x, tokens = make()
    with pytest.raises(InputError, match=r"needs origins for n = \[1, 2, 3\]: layer.origins\(tokens\)"):
        layer(x)
    with pytest.raises(InputError, match=r"n = \[0\]"):
        Deformer(16, 2, kinds=("now", "longest"))(x[..., :16], origins=origins(tokens))
    with pytest.raises(InputError, match=r"n = \[3\]"):
        layer(x, origins=origins(tokens, orders=(1, 2)))
    plain, x, _ = make("gated", kinds=("now", "box"))
    assert plain(x).shape == x.shape


@pytest.mark.parametrize("kinds", [KINDS, ("now", "longest", "bigram"), ("now", "12-gram")])
def test_origins_are_what_the_layer_asks_for(kinds):
    layer, x, tokens = make(kinds=kinds)
    first = torch.randint(0, 9, (B, 1)).expand(B, T)
    found = layer.origins(tokens, first=first)
    known = origins(tokens, first, orders=tuple(range(1, 13)))
    known[0] = longest({n: known[n] for n in range(1, 9)})
    assert found.keys() >= set(layer.orders)
    assert all(torch.equal(rows, known[n]) for n, rows in found.items())
    assert torch.equal(layer(x, origins=found, first=first), layer(x, origins=known, first=first))


def test_without_anchored_heads_there_are_no_origins():
    assert Deformer(D, H, kinds=("now", "box")).origins(torch.zeros(1, 3, dtype=torch.long)) == {}


def test_windows_start_log_spaced_and_shifts_at_shift_init_or_spread():
    layer = Deformer(64, 8, preset="star", window=200, shift_init=3.0)
    bias = layer.shift.bias.detach().view(8, 8)
    windows = (bias[6:] / 2).exp().flatten()
    assert windows[0].item() == pytest.approx(2, rel=1e-4)
    assert windows[-1].item() == pytest.approx(200, rel=1e-4)
    ratios = windows[1:] / windows[:-1]
    assert (ratios - ratios.mean()).abs().max() < 1e-3
    assert torch.allclose(torch.nn.functional.softplus(bias[:2]), torch.tensor(3.0))
    assert 0.5 < bias[2:6].std() < 1.5


@pytest.mark.parametrize("kinds", ["now", ("now", "token", "box")])
def test_kinds_that_have_no_head(kinds):
    """They would be left out without a word."""
    with pytest.raises(InputError, match=r"at most one kind per head, which are 2; got .*Give more heads"):
        kinds_of_heads("gated", kinds, 2)
    assert kinds_of_heads("star", (), 2) == ("now", "token")


@pytest.mark.parametrize(
    "change",
    [
        {"origins": lambda rows: {n: found[:1] for n, found in rows.items()}},
        {"origins": lambda rows: {n: found.float() for n, found in rows.items()}},
        {"first": torch.zeros(1, 1, dtype=torch.long)},
    ],
)
def test_row_numbers_that_do_not_fit_a_state(change):
    layer, x, tokens = make(kinds=("now", "token", "box", "bigram"))
    layer, x = layer.float(), x[:, :1].float()
    found = {n: rows[:, :1] for n, rows in origins(tokens).items()}
    state = LayerState([Streams(0), Streams(0)], [0, 0])
    given = {"origins": found, "first": None}
    given |= {name: new(found) if callable(new) else new for name, new in change.items()}
    with pytest.raises(InputError, match=r"needs (first|origins\[1\]) as integers of shape \(2, 1\)"):
        unchecked(Deformer.forward)(layer, x, state=state, **given)
