"""What stands in the way of a step in one piece, or belongs to it: biases, hooks, patches, modes."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from models import make_model, make_tokens
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from starlm.model import program
from starlm.nn.mlp import MLP


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def steps(monkeypatch):
    """Counts steps in one piece."""
    found, logits = [], program.Program.logits

    def count(self, *args):
        found.append(1)
        return logits(self, *args)

    monkeypatch.setattr(program.Program, "logits", count)
    return found


assert_close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


def decode(model, tokens):
    state = model.new_state(len(tokens))
    return torch.cat([model(token, state=state) for token in tokens.split(1, 1)], dim=1)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        *[("gated", f"mixer.{name}") for name in ("value", "gate", "out")],
        *[("product", f"mixer.{name}") for name in ("query", "key")],
        *[("attention", f"mixer.{name}") for name in ("query", "key", "value", "out")],
        ("star", "mlp.up"),
        ("star", "mlp.down"),
    ],
)
def test_a_bias_where_the_model_has_none(kind, place, steps):
    model, tokens = make_model(kind, dtype=torch.float32), make_tokens(2, 12)
    before = model(tokens)
    owner = model.blocks[0].get_submodule(place.split(".")[0])
    layer = getattr(owner, place.split(".")[1])
    layer.bias = nn.Parameter(torch.randn(layer.out_features))
    assert (model(tokens) - before).abs().max() > 0.01
    assert_close(decode(model, tokens), model(tokens))
    assert len(steps) == 12


@contextmanager
def a_hook_on_all_modules():
    def double(module, inputs, out):
        return 2 * out if isinstance(module, MLP) else None

    handle = register_module_forward_hook(double)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def another_class():
    forward = MLP.forward
    MLP.forward = lambda self, x: 2 * forward(self, x)
    try:
        yield
    finally:
        MLP.forward = forward


@pytest.mark.parametrize("patch", [a_hook_on_all_modules, another_class])
def test_who_wants_to_be_called_is(patch, steps):
    model, tokens = make_model("star", dtype=torch.float32), make_tokens(1, 6)
    plain = decode(model, tokens)
    assert len(steps) == 6
    with patch():
        changed = model(tokens)
        assert (changed - plain).abs().max() > 0.01
        assert_close(decode(model, tokens), changed)
    assert len(steps) == 6
    assert_close(decode(model, tokens), plain)
    assert len(steps) == 12


def test_modes_see_the_operators():
    model, tokens = make_model("attention", dtype=torch.float32), make_tokens(1, 6)
    decode(model, tokens)
    with FlopCounterMode(display=False) as counter:
        decode(model, tokens)
    weights = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    assert counter.get_total_flops() >= 2 * 6 * weights


def test_another_default_device():
    model, tokens = make_model("star window", dtype=torch.float32), make_tokens(1, 9)
    wanted = model(tokens)
    with torch.device("meta"):
        assert_close(decode(model, tokens), wanted)
