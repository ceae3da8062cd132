"""The model under torch.compile: without a graph break, equal to eager, and as causal."""

import pytest
import torch
from models import CUTS, LONG, in_precision, make_changed, make_model, make_tokens
from relations import assert_causal, assert_close

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _compile_anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["product", "value", "gated", "star", "attention"])
def test_causal(kind, precision):
    model = make_model(kind, dtype=torch.float32, depth=1)
    compiled = in_precision(torch.compile(model, fullgraph=True, dynamic=False), precision)
    tokens, other = make_changed(1, LONG)
    assert_causal(compiled, tokens, other, CUTS)
    if precision == "float32":
        # In bf16 the compiler rounds less often than eager PyTorch does.
        with torch.no_grad():
            assert_close(compiled(tokens), model(tokens), 1e-4)


def test_causality_check_rejects_one_token_ahead():
    model = make_model("gated", dtype=torch.float32, depth=1)
    compiled = torch.compile(lambda tokens: model(tokens.roll(-1, 1)), fullgraph=True)
    with pytest.raises(AssertionError, match="knows its future"):
        assert_causal(compiled, *make_changed(1, 64), cuts=[10])


@pytest.mark.parametrize("kind", ["star mixed", "mixed product"])
def test_training_step(kind):
    """Loss and gradients with packed documents, for changing lengths."""
    model = make_model(kind, dtype=torch.float32)
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=True)
    for length in (33, 70):
        tokens, targets = make_tokens(2, 2, length)
        first = torch.tensor([[0] * 10 + [10] * (length - 10)] * 2)
        results = []
        for loss in (model.loss, compiled):
            value = loss(tokens, targets, first=first)
            results.append((value, *torch.autograd.grad(value, list(model.parameters()))))
        for one, two in zip(*results, strict=True):
            assert_close(one, two, 1e-4)


def test_blocks_continue_a_decode_state():
    """What a user may compile of a decode step: rows break the graph, and the results are the same."""
    model = make_model("star mixed", dtype=torch.float32)
    tokens = make_tokens(2, 2, 12)[0]
    with torch.no_grad():
        wanted = model(tokens)
        for block in model.blocks:
            block.compile(backend="eager")
        state = model.new_state(2)
        pieces = [tokens[:, :9], *tokens[:, 9:].split(1, dim=1)]
        got = torch.cat([model(piece, state=state) for piece in pieces], dim=1)
    assert_close(got, wanted, 1e-4)
