"""Attention against its formula, written out once more with complex rotations and an explicit softmax."""

import math

import pytest
import torch
from relations import assert_causal, assert_close, randomise

from starlm.nn.attention import Attention

B, T, D, H = 2, 23, 24, 3


def make(**options):
    return randomise(Attention(D, H, **options)).double(), torch.randn(B, T, D, dtype=torch.float64)


def formula(layer, x, first=None):
    first = torch.zeros(x.shape[:2], dtype=torch.long) if first is None else first
    own = torch.arange(x.shape[1])
    channels = D // H
    frequency = layer.rope_base ** (-torch.arange(channels // 2).double() * 2 / channels)
    turn = torch.polar(torch.tensor(1.0).double(), -(own - first).clamp(min=0)[..., None] * frequency)

    def heads(weight):
        return (x @ weight.T).view(*x.shape[:2], H, channels)

    def rotated(weight):
        v = heads(weight)
        v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        pairs = torch.complex(v[..., : channels // 2], v[..., channels // 2 :]) * turn[:, :, None]
        return torch.cat([pairs.real, pairs.imag], -1)

    scores = torch.einsum("bthc,bshc->bhts", rotated(layer.query.weight), rotated(layer.key.weight))
    seen = (own <= own[:, None]) & ((own >= first[..., None]) | (own == own[:, None]))
    weights = (scores / math.sqrt(channels)).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    y = torch.einsum("bhts,bshc->bthc", weights, heads(layer.value.weight))
    return y.reshape(x.shape) @ layer.out.weight.T


@pytest.mark.parametrize("base", [10000.0, 20.0])
def test_formula(base):
    layer, x = make(rope_base=base)
    x.requires_grad_()
    inputs, grad = [x, *layer.parameters()], torch.randn(B, T, D, dtype=torch.float64)
    packed = torch.tensor([[0] * 7 + [7] * 9 + [16] * (T - 16), [0] * T])
    padded = torch.tensor([[5] * T, [0] * T])
    for first in (None, packed, padded):
        got, wanted = layer(x, first=first), formula(layer, x, first)
        # The layer's angles are fp32 on purpose: the bound is their rounding.
        assert_close(got, wanted, 1e-5)
        gradients = torch.autograd.grad(got, inputs, grad), torch.autograd.grad(wanted, inputs, grad)
        for one, two in zip(*gradients, strict=True):
            assert_close(one, two, 1e-5)


def test_formula_rejects_other_positions():
    layer, x = make()
    wanted = formula(layer, x)
    layer.rope_base = 9000.0
    assert (layer(x) - wanted).abs().max() > 1e-4


def test_causal():
    layer = randomise(Attention(D, H))
    x, other = torch.randn(2, B, T, D)
    first = torch.tensor([[0] * 7 + [7] * (T - 7), [3] * T])
    for dtype in (torch.float32, torch.bfloat16):
        layer, x, other = layer.to(dtype), x.to(dtype), other.to(dtype)
        assert_causal(layer, x, other, cuts=range(T - 1))
        assert_causal(lambda x, layer=layer: layer(x, first=first), x, other, cuts=range(T - 1))


def test_causality_check_rejects_attention_to_all(monkeypatch):
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **options: attend(q, k, v)
    )
    with pytest.raises(AssertionError, match="knows its future"):
        assert_causal(randomise(Attention(D, H)), *torch.randn(2, B, T, D), cuts=[4])


def test_starts_at_zero():
    assert Attention(D, H)(torch.randn(B, T, D)).eq(0).all()


def test_empty():
    layer, _ = make()
    assert layer(torch.randn(0, 4, D).double()).shape == (0, 4, D)
    assert layer(torch.randn(2, 0, D).double()).shape == (2, 0, D)
