"""Within `plain` nothing of our own runs, and the results are the same."""

import pytest
import torch

from starlm import StarLM, StarLMConfig
from starlm.model.program import MOST_ROWS
from starlm.ops import cpu_elementwise, cpu_program, cpu_step, deform, plain
from starlm.ops.cross_entropy import cross_entropy
from starlm.ops.plain import is_plain


def trained(model, tokens, our_operators):
    """The loss and the gradients, and the operators of ours that they took."""
    model.zero_grad()
    with our_operators() as ours:
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    return [loss, *(p.grad.clone() for p in model.parameters())], ours


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = StarLM(StarLMConfig(vocab_size=40, depth=2, dim=32))
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def test_training_runs_nothing_of_our_own(model, our_operators):
    tokens = torch.randint(40, (2, 30))
    fused, ours = trained(model, tokens, our_operators)
    assert ours == {f"starlm::{name}" for name in (
        "anchors", "mix", "mix_backward", "rms", "rms_backward", "relu2", "relu2_backward",
        "cross_entropy", "cross_entropy_backward",
    )}  # fmt: skip
    with plain():
        defined, ours = trained(model, tokens, our_operators)
    assert not ours
    for got, wanted in zip(fused, defined, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_decoding_runs_nothing_of_our_own(model, monkeypatch, our_operators):
    """Neither in one piece, nor, for more slots than that is for, layer by layer."""
    calls, runs, norms = [], [], []
    for module, name, log in (
        (cpu_step, "step", calls),
        (cpu_program, "_run", runs),
        (cpu_elementwise, "rms", norms),
    ):
        kernel = getattr(module, name)
        counted = lambda *args, log=log, kernel=kernel, **named: log.append(1) or kernel(*args, **named)  # noqa: E731
        monkeypatch.setattr(module, name, counted)

    def decoded(tokens):
        state = model.new_state(len(tokens))
        return torch.cat([model(token, state=state) for token in tokens.split(1, dim=1)], dim=1)

    def counts():
        return len(calls), len(norms), len(runs)

    few, many = torch.randint(40, (2, 9)), torch.randint(40, (MOST_ROWS + 1, 9))
    with torch.no_grad():
        fused = decoded(few)
        assert counts() == (0, 0, 9)
        layered = decoded(many)
        assert counts() == (2 * 9, 6 * 9, 9)
        with plain(), our_operators() as ours:
            defined = decoded(few), decoded(many)
    assert counts() == (2 * 9, 6 * 9, 9)
    assert not ours
    torch.testing.assert_close((fused, layered), defined, rtol=1e-4, atol=1e-5)


def test_an_error_ends_it(our_operators):
    with pytest.raises(KeyError), plain():
        raise KeyError
    with our_operators() as ours:
        StarLM(StarLMConfig(vocab_size=9, depth=1, dim=32))(torch.tensor([[1]]))
    assert ours


def test_two_threads_may_overlap():
    first, second = plain(), plain()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_plain()
    second.__exit__(None, None, None)
    assert not is_plain()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_derivatives_are_those_of_the_definition(model):
    """Kernels have none: they would be zeros, in silence."""
    values, shift = torch.randn(1, 6, 2, 4), torch.rand(1, 6, 2, 4) * 3
    x, layer, tokens = torch.randn(1, 6, 32), model.blocks[0].mixer, torch.randint(40, (2, 9))
    origins = {n: torch.full((1, 6), -1) for n in layer.orders}
    head, hidden = model.head.weight, torch.randn(9, 32)
    for function, at in (
        (lambda v: deform(v, shift), values),
        (lambda s: deform(values, s), shift),
        (lambda x: layer(x, origins=origins), x),
        (lambda h: cross_entropy(h, head, tokens[0]), hidden),
    ):
        got = torch.func.jvp(function, (at,), (torch.ones_like(at),))
        with plain():
            wanted = torch.func.jvp(function, (at,), (torch.ones_like(at),))
        assert wanted[1].abs().sum() > 0
        torch.testing.assert_close(got, wanted)
    assert not is_plain()
