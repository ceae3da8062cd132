"""The chunked loss against the plain formula: values, gradients, scaling, dtypes, ignored targets."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same

from starlm.errors import InputError
from starlm.ops import cross_entropy as module
from starlm.ops.cross_entropy import cross_entropy, cross_entropy_of

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several chunks, of unequal size."""
    monkeypatch.setattr(module, "CHUNK", {"cpu": 100})
    monkeypatch.setattr(module, "MIN_TOKENS", 3)


def plain(hidden, weight, targets, *, softcap=0.0, reduction="mean"):
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, F32))
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def problem(tokens=11, dim=5, vocab=23, dtype=F32, ignored=3, scale=3.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=random) * scale
    weight = torch.randn(vocab, dim, generator=random)
    targets = torch.randint(vocab, (tokens,), generator=random)
    targets[torch.randperm(tokens, generator=random)[:ignored]] = -1
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def results(function, hidden, weight, targets, *, factor=1.0, **options):
    """Value and both gradients of `factor` times the loss."""
    loss = function(hidden, weight, targets, **options)
    return loss, *torch.autograd.grad(loss * factor, (hidden, weight))


def compare(got, wanted, tolerance):
    for name, a, b in zip(("loss", "dhidden", "dweight"), got, wanted, strict=True):
        assert a.dtype == b.dtype, name
        assert_same(name, a, b, tolerance * max([1.0, *b.detach().nan_to_num().abs().flatten().tolist()]))


@given(
    tokens=st.integers(1, 40),
    dim=st.integers(1, 9),
    vocab=st.integers(1, 70),
    share=st.floats(0, 1),
    softcap=st.sampled_from([0.0, 0.5, 15.0, 1e4]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    dtype=st.sampled_from([F32, F64]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_plain_formula(tokens, dim, vocab, share, softcap, scale, dtype):
    hidden, weight, targets = problem(tokens, dim, vocab, dtype, int(share * tokens), scale)
    if (targets < 0).all():
        return
    # The oracle computes in fp64 what fp32 rounds.
    wanted = results(plain, hidden.double(), weight.double(), targets, softcap=softcap)
    got = results(cross_entropy, hidden, weight, targets, softcap=softcap)
    # Logits are rounded, and a chance is off by as much as its logit.
    rounded = (hidden @ weight.T).abs().max().item() * torch.finfo(dtype).eps
    compare(got, [x.to(dtype) for x in wanted], rounded + (1e-5 if dtype == F32 else 1e-12))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck(softcap):
    hidden, weight, targets = problem(dtype=F64, scale=1.0)
    for reduction in ("mean", "none"):

        def loss(h, w, reduction=reduction):
            return cross_entropy(h, w, targets, softcap=softcap, reduction=reduction).square().sum()

        assert torch.autograd.gradcheck(loss, (hidden, weight)), "behind it the loss is squared: not linear"


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_factor_behind_the_loss_is_a_factor_of_the_gradients_and_each_backward_adds_the_same(dtype):
    hidden, weight, targets = problem(dtype=dtype)
    loss = cross_entropy(hidden, weight, targets, softcap=5.0)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for factor in (-3.0, 0.0, 1e-3, 2.0**20):
        scaled = torch.autograd.grad(loss * factor, (hidden, weight), retain_graph=True)
        for a, b in zip(scaled, once, strict=True):
            torch.testing.assert_close(a, b * factor, rtol=1e-6, atol=0)
    again = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(again, once, strict=True))


def test_one_of_the_two_may_be_constant():
    hidden, weight, targets = problem()
    wanted = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    (dhidden,) = torch.autograd.grad(cross_entropy(hidden, weight.detach(), targets), hidden)
    (dweight,) = torch.autograd.grad(cross_entropy(hidden.detach(), weight, targets), weight)
    compare((torch.zeros(()), dhidden, dweight), (torch.zeros(()), *wanted), 1e-6)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_one_loss_per_token(softcap, dtype):
    hidden, weight, targets = problem(dtype=dtype)
    wanted = plain(hidden, weight, targets, softcap=softcap, reduction="none")
    with torch.no_grad():
        got = cross_entropy(hidden, weight, targets, softcap=softcap, reduction="none")
    assert_same("without gradient", got, wanted, 1e-5)
    factor = torch.linspace(-1, 1, len(targets), dtype=dtype)
    compare(
        results(
            lambda *a: cross_entropy(*a, softcap=softcap, reduction="none") @ factor, hidden, weight, targets
        ),
        results(lambda *a: plain(*a, softcap=softcap, reduction="none") @ factor, hidden, weight, targets),
        1e-5,
    )


def test_all_ignored_and_no_tokens_are_what_the_plain_formula_says():
    for tokens in (0, 4):
        problem_ = problem(tokens, ignored=tokens)
        got, wanted = results(cross_entropy, *problem_), results(plain, *problem_)
        assert got[0].isnan()
        compare(got, wanted, 0.0)
        assert all(x.eq(0).all() for x in got[1:])


@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_bfloat16_weights_and_autocast(softcap):
    hidden, weight, targets = problem(tokens=64, dim=32, vocab=100, ignored=7, scale=1.0)
    exact = results(plain, hidden, weight, targets, softcap=softcap)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    for inputs, autocast in (((hidden, weight), True), (low, False)):
        with torch.autocast("cpu", BF16, enabled=autocast):
            got = results(cross_entropy, *inputs, targets, softcap=softcap)
            wanted = results(plain, *inputs, targets, softcap=softcap)
        assert got[0].dtype == F32
        compare(got, wanted, 2e-3)
        for a, b, c in zip(got, wanted, exact, strict=True):
            # As far from the truth as the plain formula in bf16 is, and no further.
            assert (a - c).norm() <= 1.2 * (b - c).norm() + 1e-3 * c.norm()


def test_large_logits_do_not_overflow_and_nan_shows():
    hidden, weight, targets = problem(scale=1e4)
    for softcap in (0.0, 15.0, 1e6):
        got = results(cross_entropy, hidden, weight, targets, softcap=softcap)
        wanted = results(plain, hidden.double(), weight.double(), targets, softcap=softcap)
        assert_same("loss", got[0], wanted[0], 1e-6 * wanted[0].item())
        # 1 - tanh² is only as small as fp32 can say: 1e-7 of a hidden state of 1e4 is left where fp64 has 0.
        compare(got, [x.float() for x in wanted], 1e-2)
    spoilt = hidden.detach().clone()
    spoilt[targets.ne(-1).nonzero()[0]] = torch.nan
    for softcap in (0.0, 15.0):
        assert cross_entropy(spoilt, weight, targets, softcap=softcap).isnan()


def test_a_target_beyond_the_vocabulary_is_refused():
    hidden, weight, targets = problem(vocab=23)
    targets[0] = 23
    with pytest.raises(InputError, match="below the vocabulary's 23; got 23"):
        cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_second_derivative_is_refused_rather_than_wrong(dtype):
    hidden, weight, targets = problem(dtype=dtype)
    loss = cross_entropy(hidden.square(), weight, targets)
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="cross_entropy_backward"):
        torch.autograd.grad(first.sum(), hidden)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_registration(dtype):
    hidden, weight, targets = problem(dtype=dtype)
    for wants_grad in (True, False):
        torch.library.opcheck(
            module._loss,
            (hidden, weight, targets, 15.0, wants_grad),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_the_number_of_threads_and_of_chunks_changes_nothing_that_matters(monkeypatch):
    hidden, weight, targets = problem(tokens=64, dim=8, vocab=1000)
    wanted = results(cross_entropy, hidden, weight, targets)
    monkeypatch.setattr(module, "CHUNK", {"cpu": 1 << 20})
    monkeypatch.setattr(module, "MIN_TOKENS", 1000)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            compare(results(cross_entropy, hidden, weight, targets), wanted, 1e-6)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "targets", [torch.zeros(7).long(), torch.zeros(9).long(), torch.zeros(2, 4).long(), torch.zeros(8)]
)
def test_what_does_not_fit_is_refused(targets):
    """The kernel looks at no bounds: it would read and write past its arrays."""
    hidden, weight, _ = problem(tokens=8)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(InputError, match=r"targets as integers of shape \(8,\)"):
            inspect.unwrap(cross_entropy)(hidden, weight, targets)
    with pytest.raises(InputError, match=r'reductions "mean" and "none"; got .sum.'):
        inspect.unwrap(cross_entropy)(hidden, weight, torch.zeros(8).long(), reduction="sum")


def test_targets_on_another_device():
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(InputError, match=r"all tensors on one device; .*targets on meta"):
        cross_entropy(hidden, weight, torch.zeros(3, dtype=torch.long, device="meta"))


@pytest.mark.parametrize("change", [{"reduction": "sum"}, {"targets": torch.zeros(3)}])
def test_of_logits_is_refused_what_is_of_hidden_states(change):
    given = {"targets": torch.zeros(3, dtype=torch.long), "reduction": "mean", **change}
    with pytest.raises(InputError, match="cross_entropy"):
        inspect.unwrap(cross_entropy_of)(torch.randn(3, 5), **given)
