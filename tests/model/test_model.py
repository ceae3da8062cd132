"""The model as a whole: definition, start, causality per dtype, packing and padding."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import BOUNDED, CUTS, KINDS, LONG, VOCAB, in_precision, make_changed, make_model, make_tokens
from relations import assert_causal, assert_close, unchecked
from torch import nn

from starlm.errors import InputError
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.ops.elementwise import rms

ALL = [*KINDS, *BOUNDED]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ALL)
def test_causal(kind, precision):
    run = in_precision(make_model(kind, dtype=torch.float32), precision)
    tokens, other = make_changed(2, 64)
    assert_causal(run, tokens, other, cuts=range(0, 63, 2))
    tokens, other = make_changed(1, LONG)
    assert_causal(run, tokens, other, CUTS)


@pytest.mark.parametrize("kind", ALL)
def test_causality_check_rejects_one_token_ahead(kind):
    model = make_model(kind, dtype=torch.float32)
    tokens, other = make_changed(2, 64)

    def looks_ahead(tokens):
        return model(torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1))

    def peeks(tokens):
        """One token, at one place, a little."""
        logits = model(tokens)
        logits[0, 30] += 1e-6 * tokens[0, 31]
        return logits

    with pytest.raises(AssertionError, match="knows its future"):
        assert_causal(looks_ahead, tokens, other, cuts=[10])
    with pytest.raises(AssertionError, match="row 30 knows"):
        assert_causal(peeks, tokens, other, cuts=range(63))


def test_causality_check_needs_random_weights():
    """A fresh model's logits are all zero: the check must not take that for causality."""
    model = StarLM(StarLMConfig(depth=1, dim=16, heads=2, vocab_size=VOCAB))
    with pytest.raises(AssertionError, match="the change was none"):
        assert_causal(model, *make_changed(1, 20), cuts=[5])


@pytest.mark.parametrize("kind", ALL)
def test_packed_documents_equal_each_alone(kind):
    model = make_model(kind)
    lengths = (1, 40, 2, 30)
    tokens, first = make_tokens(2, sum(lengths)), []
    for length in lengths:
        first += [len(first)] * length
    got = model(tokens, first=torch.tensor([first, [0] * len(first)]))
    wanted = torch.cat([model(document) for document in tokens[:1].split(lengths, dim=1)], dim=1)
    assert_close(got[:1], wanted)
    assert_close(got[1:], model(tokens[1:]))
    if model.config.max_shift != 0:
        assert (model(tokens[:1]) - wanted).abs().max() > 0.1, "without first the documents must mix"


@pytest.mark.parametrize("kind", ALL)
def test_left_padding_changes_nothing(kind):
    model, pads = make_model(kind), (0, 1, 9, 29)
    tokens = make_tokens(4, 30)
    got = model(tokens, first=torch.tensor(pads)[:, None].expand(4, 30))
    for row, pad in enumerate(pads):
        assert_close(got[row, pad:], model(tokens[row : row + 1, pad:])[0])
    assert got.isfinite().all()


@pytest.mark.parametrize("kind", ALL)
def test_packed_gradients_stay_in_their_document(kind):
    model, tokens = make_model(kind), make_tokens(1, 12)
    first = torch.tensor([[0] * 5 + [5] * 7])
    seen = []
    model.embedding.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad_()))
    loss = model(tokens, first=first)[:, 5:].sum()
    (grad,) = torch.autograd.grad(loss, seen[0])
    # Box heads subtract sums that began before the document: what should cancel, cancels to fp64's rounding.
    allowed = 1e-14 if "box" in model.config.head_kinds else 0
    assert grad[:, :5].abs().max() <= allowed
    assert grad[:, 5:].ne(0).any(-1).all()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_definition(softcap):
    model, tokens = make_model("mixed", softcap=softcap, preset="gated"), make_tokens(2, 9)
    x = rms(model.embedding.weight[tokens])
    for block in model.blocks:
        x = x + block.mixer(rms(x))
        x = x + block.mlp(rms(x))
    logits = rms(x) @ model.head.weight.T
    wanted = softcap * (logits / softcap).tanh() if softcap else logits
    assert_close(model(tokens), wanted)
    assert [type(block.mixer).__name__ for block in model.blocks] == ["Deformer", "Attention"]


@pytest.mark.parametrize("kind", KINDS)
def test_start(kind):
    """As the recipe has it: embedding std 1; head, output and shift projections zero, so the loss is ln V."""
    chosen = {"depth": 2, "dim": 64, "heads": 2, "vocab_size": 3000, **KINDS[kind]}
    model = StarLM(StarLMConfig(**chosen))
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.02)
    tokens, targets = torch.randint(3000, (2, 2, 8))
    assert model.loss(tokens, targets).item() == pytest.approx(math.log(3000), rel=1e-6)
    for name, weight in model.named_parameters():
        if name.endswith(("out.weight", "down.weight", "head.weight", "shift.weight")):
            assert weight.eq(0).all(), name
        elif weight.ndim == 2 and not name.endswith(("embedding.weight", "taps")):
            fan_out, fan_in = weight.shape
            wanted = fan_in**-0.5 * min(1, (fan_out / fan_in) ** 0.5)
            assert weight.std().item() == pytest.approx(wanted, rel=0.05), name


def test_start_is_repeatable_and_survives_the_meta_device():
    config = StarLMConfig(depth=2, dim=16, heads=2, vocab_size=VOCAB, layers="DA", shift_init=2.0)
    torch.manual_seed(3)
    one = StarLM(config)
    torch.manual_seed(3)
    with torch.device("meta"):
        two = StarLM(config)
    two.to_empty(device="cpu").reset_parameters()
    assert all(p.isfinite().all() for p in two.parameters())
    torch.manual_seed(3)
    three = StarLM(config)
    for (name, a), b in zip(one.named_parameters(), three.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_loss():
    model, tokens = make_model("gated"), make_tokens(2, 9)
    targets = make_tokens(2, 9)
    targets[0, 3:] = -1
    chances = model(tokens).log_softmax(-1)
    wanted = -chances.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    got = model.loss(tokens, targets, reduction="none")
    assert_close(got, torch.where(targets < 0, 0.0, wanted))
    assert_close(model.loss(tokens, targets), wanted[targets >= 0].mean())


def test_logits_are_fp32_at_the_least():
    for dtype in (torch.bfloat16, torch.float32):
        assert make_model("mixed", dtype=dtype)(make_tokens(1, 3)).dtype == torch.float32
    assert make_model("mixed")(make_tokens(1, 3)).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind):
    model = make_model(kind)
    assert model(make_tokens(2, 0)).shape == (2, 0, VOCAB)
    assert model(make_tokens(0, 3)).shape == (0, 3, VOCAB)
    state = model.new_state(2)
    assert model(make_tokens(2, 0), state=state).shape == (2, 0, VOCAB)
    assert state.lengths == [0, 0]


@pytest.mark.parametrize("kind", ["star", "star mixed", "product"])
@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_of_others_changes_nothing(kind, other):
    """Buffers of kernels have a dtype of their own."""
    model, tokens = make_model(kind, dtype=torch.float32), make_tokens(2, 9)

    def results():
        with torch.no_grad():
            state = model.new_state(2)
            steps = [model(piece, state=state) for piece in tokens.split([4, 1, 1, 1, 1, 1], dim=1)]
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        return [*steps, loss.detach(), torch.autograd.grad(loss, model.embedding.weight)[0]]

    wanted = results()
    torch.set_default_dtype(other)
    try:
        got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, 1e-5)


def test_what_does_not_fit_is_refused():
    model, tokens = make_model("star", dtype=torch.float32), make_tokens(2, 8)
    for targets in (tokens[:, 1:], torch.cat([tokens, tokens], dim=1), tokens[:1]):
        with pytest.raises(InputError, match="one target, that which follows"):
            unchecked(StarLM.loss)(model, tokens, targets)
    for first in (torch.tensor([[2, 3]]), torch.tensor([[2], [9]]), torch.full((2, 8), 1.5)):
        for state in (None, model.new_state(2)):
            with pytest.raises(InputError, match=r"first as integers of shape \(2, 8\)"), torch.no_grad():
                unchecked(StarLM.forward)(model, tokens, first=first, state=state)
    with pytest.raises(InputError, match=r"first as integers of shape \(2, 1\)"), torch.no_grad():
        unchecked(StarLM.forward)(
            model, tokens[:, :1], first=torch.tensor([[2, 9]] * 2), state=model.new_state(2)
        )
    with pytest.raises(InputError, match="rollback must be 0 or more; got -5"):
        model.new_state(rollback=-5)


def test_loss_on_the_meta_device():
    model = make_model("star", dtype=torch.float32).to("meta")
    tokens = torch.zeros(2, 8, dtype=torch.long, device="meta")
    assert model.loss(tokens, tokens).device.type == "meta"


def with_bias(model):
    model.head.bias = nn.Parameter(torch.randn(VOCAB, dtype=model.head.weight.dtype))
    return model


def with_a_hook(model):
    model.head.register_forward_hook(lambda module, inputs, out: 2 * out)
    return model


def with_another_forward(model):
    forward = model.head.forward
    model.head.forward = lambda hidden: 2 * forward(hidden)
    return model


def with_an_adapter(model):
    model.head = nn.Sequential(model.head)
    model.head.weight = model.head[0].weight
    model.head.add_module("more", nn.Linear(VOCAB, VOCAB, dtype=model.head.weight.dtype))
    return model


def with_other_logits(model):
    class Other(StarLM):
        def logits(self, hidden, *, step=False):
            return 3 * super().logits(hidden, step=step)

    model.__class__ = Other
    return model


CHANGES = [with_bias, with_a_hook, with_another_forward, with_an_adapter, with_other_logits]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_is_that_of_the_logits(change, reduction):
    """Of whatever head: the fused loss knows nothing but a weight."""
    model, tokens = change(make_model("gated")), make_tokens(2, 9)
    targets = torch.where(torch.rand(2, 9) < 0.3, -1, make_tokens(2, 9))
    wanted = F.cross_entropy(
        model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction
    )
    loss = model.loss(tokens, targets, reduction=reduction)
    assert_close(loss.flatten(), wanted.flatten())
    loss.sum().backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_a_backward_hook_of_the_head_is_called():
    model, called = make_model("gated"), []
    model.head.register_full_backward_hook(lambda *_: called.append(1))
    model.loss(make_tokens(1, 4), make_tokens(1, 4)).backward()
    assert called == [1]
