"""The layer against the formulas of its presets, written out once more; how it starts; shapes."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from relations import assert_causal, assert_close, randomise, unchecked

from starlm.errors import InputError
from starlm.nn import state
from starlm.nn.deformer import Deformer
from starlm.ops import deform, plain
from starlm.ops.reference import deform_reference

PRESETS = ("product", "value", "gated")
OPTIONS = ({}, {"max_shift": 3}, {"shift_init": 4.0}, {"max_shift": 0, "shift_init": 0.5})
B, T, D, H = 2, 19, 12, 3


def make(preset, **options):
    layer = randomise(Deformer(D, H, preset=preset, **options)).double()
    return layer, torch.randn(B, T, D, dtype=torch.float64)


def formula(layer, x, first=None):
    """y of x as section 2 of the design has it, from weights and definition alone."""
    weights = dict(layer.named_parameters())

    def rms(name):
        v = (x @ weights[f"{name}.weight"].T).view(*x.shape[:2], H, D // H)
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def softplus(name):
        z = x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)
        s = torch.logaddexp(z, torch.zeros_like(z)).view(*x.shape[:2], H, D // H)
        return s if layer.max_shift is None else s.minimum(torch.tensor(float(layer.max_shift)))

    def read(name, shift):
        return deform_reference(rms(name), softplus(shift), first=first).reshape(x.shape)

    if layer.preset == "product":
        return read("query", "query_shift") * read("key", "key_shift")
    y = read("value", "shift")
    if layer.preset == "gated":
        y = y / (1 + torch.exp(-x @ weights["gate.weight"].T))
    return y @ weights["out.weight"].T


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_formula(preset, options):
    """Values, and gradients of the input and of every weight."""
    layer, x = make(preset, **options)
    x.requires_grad_()
    first = torch.tensor([[0] * 7 + [7] * (T - 7), [0] * T])
    inputs, grad = [x, *layer.parameters()], torch.randn(B, T, D, dtype=torch.float64)
    for row in (None, first):
        got, wanted = layer(x, first=row), formula(layer, x, row)
        assert_close(got, wanted)
        gradients = torch.autograd.grad(got, inputs, grad), torch.autograd.grad(wanted, inputs, grad)
        for one, two in zip(*gradients, strict=True):
            assert_close(one, two, 1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_formula_rejects_another_preset_and_other_options(preset):
    layer, x = make(preset, max_shift=3)
    wanted = formula(layer, x)
    layer.max_shift = 4
    assert (layer(x) - wanted).abs().max() > 1e-3
    layer.max_shift = 3
    next(iter(layer.shift_parameters())).data.mul_(1.001)
    assert (layer(x) - wanted).abs().max() > 1e-6


@pytest.mark.parametrize("shape", [(5, D), (B, T, D + 1)])
def test_input_of_another_shape(shape):
    with pytest.raises(InputError, match=rf"mixes \[B, T, {D}\]; got the shape"):
        unchecked(Deformer.forward)(Deformer(D, H), torch.randn(shape))


@pytest.mark.parametrize("preset", PRESETS)
def test_causal(preset):
    layer = randomise(Deformer(D, H, preset=preset))
    x, other = torch.randn(2, B, T, D)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert_causal(layer.to(dtype), x.to(dtype), other.to(dtype), cuts=range(T - 1))


@pytest.mark.parametrize("preset", PRESETS)
def test_causality_check_rejects_one_row_ahead(preset, monkeypatch):
    monkeypatch.setattr(state, "deform", lambda values, *args, **kw: deform(values.roll(-1, 1), *args, **kw))
    layer = randomise(Deformer(D, H, preset=preset))
    # Composed from `deform`: the fused step has tests of its own.
    with plain(), pytest.raises(AssertionError, match="knows its future"):
        assert_causal(layer, *torch.randn(2, B, T, D), cuts=range(T - 1))


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_reaches_no_future_token(preset):
    layer, x = make(preset)
    x.requires_grad_()
    for t in (0, 5, T - 2):
        (grad,) = torch.autograd.grad(layer(x)[:, t].sum(), x)
        assert grad[:, t + 1 :].eq(0).all()
        assert grad[:, t].ne(0).all()


def test_shift_in_bf16_keeps_its_fraction():
    """Distances are fp32 at the least: softplus of a bf16 number is not rounded to bf16 again."""
    layer = Deformer(D, H, preset="value").bfloat16()
    seen = {}

    def spy(values, shift, **options):
        seen["dtype"] = shift.dtype
        return deform(values, shift, **options)

    # Composed from `deform`: the fused step has tests of its own.
    with pytest.MonkeyPatch.context() as patch, plain():
        patch.setattr(state, "deform", spy)
        assert layer(torch.randn(B, T, D, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert seen["dtype"] == torch.float32


@pytest.mark.parametrize("tokens", [1e-3, 0.5, 8.0, 1000.0])
@pytest.mark.parametrize("preset", PRESETS)
def test_shift_init_is_where_every_channel_starts(preset, tokens):
    layer = Deformer(D, H, preset=preset, shift_init=tokens)
    biases = [p for p in layer.shift_parameters() if p.ndim == 1]
    assert len(biases) == (2 if preset == "product" else 1)
    for bias in biases:
        assert torch.nn.functional.softplus(bias).allclose(torch.tensor(tokens), rtol=1e-3)
        assert bias.shape == (D,)


@pytest.mark.parametrize("preset", PRESETS)
def test_start(preset):
    """Output and shift projections at zero, other matrices at 1/sqrt(fan_in); shifts are a group."""
    layer = Deformer(256, 4, preset=preset)
    streams = ("query_shift", "key_shift") if preset == "product" else ("shift",)
    for name, weight in layer.named_parameters():
        zero = name in ("out.weight", *(f"{stream}.weight" for stream in streams))
        wanted = 0.0 if zero else 1.0 if name.endswith("bias") else 1 / math.sqrt(256)
        assert weight.std().item() == pytest.approx(wanted, rel=0.15 if name.endswith("bias") else 0.03), name
    names = {name for name, p in layer.named_parameters() if any(p is s for s in layer.shift_parameters())}
    assert names == {f"{stream}.{part}" for stream in streams for part in ("weight", "bias")}
    if preset != "product":
        assert layer(torch.randn(1, 5, 256)).eq(0).all()


@pytest.mark.parametrize("preset", [*PRESETS, "star"])
def test_every_token_reads_at_the_same_distance_at_first_and_the_channels_at_many(preset):
    layer = Deformer(64, 8, preset=preset, window=100)
    origins = {n: torch.arange(20).expand(1, -1) for n in layer.orders}
    for reads in layer.reads(torch.randn(1, 20, 64), origins=origins, past=1000).values():
        back = reads.near - reads.near[:, :1] - torch.arange(20)[:, None, None]
        assert back[:, :, :2].eq(0).all()
        assert reads.fraction[:, :, :2].unique().numel() >= 16


def test_empty():
    for preset in PRESETS:
        layer, _ = make(preset)
        assert layer(torch.randn(0, 4, D).double()).shape == (0, 4, D)
        assert layer(torch.randn(2, 0, D).double()).shape == (2, 0, D)


def test_errors():
    for options, words in (
        ({"heads": 0}, "heads=0"),
        ({"heads": 2, "max_shift": -1}, "max_shift of 0 or more"),
        ({"heads": 2, "shift_init": 0.0}, "shift_init above 0"),
    ):
        with pytest.raises(InputError, match=words):
            Deformer(12, **options)
    with pytest.raises(InputError, match="heads=5, dim=12"):
        Deformer(12, 5)
    with pytest.raises(InputError, match="'moon'"):
        unchecked(Deformer.__init__)(Deformer(12, 3), 12, 3, preset="moon")


@pytest.mark.parametrize(
    ("shape", "first"),
    [((T, D), None), ((B, T, D, 1), None), ((B, T, D), (B, T + 1)), ((B, T, D), (B,))],
)
def test_shape_checks_reject_wrong_shapes(shape, first):
    """In the test run only: the annotations are checked there."""
    rows = None if first is None else torch.zeros(first, dtype=torch.long)
    with pytest.raises(TypeCheckError, match=r"parameter '(x|first)'"):
        Deformer(D, H)(torch.randn(shape), first=rows)


def test_shape_checks_reject_floats_for_rows():
    with pytest.raises(TypeCheckError, match="first"):
        Deformer(D, H)(torch.randn(B, T, D), first=torch.zeros(B, T))


def test_what_it_says_of_itself_and_where_it_lies():
    layer = Deformer(64, 4, kinds=("now", "token", "box"), max_shift=9, device="meta", dtype=torch.bfloat16)
    said = "64, heads=4 (2 now, 1 token, 1 box), preset='gated', max_shift=9"
    assert repr(layer).splitlines()[1].strip() == said
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_shift": 2.5}, "whole max_shift"),
        ({"max_shift": math.inf}, "whole max_shift"),
        ({"window": 1}, "a window of 2"),
    ],
)
def test_impossible_reaches(options, said):
    with pytest.raises(InputError, match=said):
        unchecked(Deformer.__init__)(Deformer.__new__(Deformer), 64, 4, **options)
