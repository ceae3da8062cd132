"""What stands around the mixers: block, MLP, norm, and how matrices start."""

import pytest
import torch
from relations import assert_close, randomise

from starlm.nn.attention import Attention
from starlm.nn.block import Block
from starlm.nn.deformer import Deformer
from starlm.nn.linear import init_matrix, linear
from starlm.nn.mlp import MLP
from starlm.ops.elementwise import rms

D = 16


def test_rms():
    x = torch.randn(3, 5, D, dtype=torch.float64) * 100
    assert_close(rms(x), x / x.square().mean(-1, keepdim=True).sqrt(), 1e-8)
    assert rms(torch.zeros(2, D)).eq(0).all()
    assert rms(x.bfloat16()).dtype == torch.bfloat16


def test_mlp():
    mlp = randomise(MLP(D, ratio=3)).double()
    assert mlp.up.weight.shape == (3 * D, D)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    hidden = (x @ mlp.up.weight.T).clamp(min=0) ** 2
    assert_close(mlp(x), hidden @ mlp.down.weight.T)


@pytest.mark.parametrize("mixer", [Deformer(D, 2), Attention(D, 2)])
@pytest.mark.parametrize("mlp", [None, MLP(D)])
def test_block(mixer, mlp):
    block = randomise(Block(mixer, mlp)).double()
    x, first = torch.randn(2, 9, D, dtype=torch.float64), torch.tensor([[0] * 4 + [4] * 5] * 2)
    wanted = x + block.mixer(rms(x), first=first)
    if mlp is not None:
        wanted = wanted + block.mlp(rms(wanted))
    assert_close(block(x, first=first), wanted)


def test_fresh_block_is_the_identity():
    mlp = MLP(D)
    mlp.reset_parameters()
    x = torch.randn(2, 9, D)
    assert torch.equal(Block(Deformer(D, 2), mlp)(x), x)
    assert torch.equal(Block(Attention(D, 2), mlp)(x), x)


@pytest.mark.parametrize(("fan_in", "fan_out", "std"), [(256, 1024, 1 / 16), (1024, 256, 1 / 64)])
def test_matrices_start(fan_in, fan_out, std):
    layer = linear(fan_in, fan_out)
    assert layer.bias is None
    init_matrix(layer)
    assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
