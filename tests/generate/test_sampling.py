"""The distribution that tokens are drawn from, by hand, and the draws."""

import math
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from starlm.errors import InputError, StarLMError
from starlm.generate import sampling as module
from starlm.generate.sampling import Sampler, Sampling
from starlm.ops import cpu_choose
from starlm.ops.plain import plain

# Chances 0.5, 0.25, 0.125, 0.125 in another order.
LOGITS = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64).log() + 3


def sampler(options, prompt=(), generated=(), vocab_size=None):
    made = Sampler(options, vocab_size or 100, prompt)
    for token in generated:
        made.add(token)
    return made


def probabilities(logits, options, prompt=(), generated=()):
    made = sampler(options, prompt, generated, len(logits))
    return module.probabilities(logits[None], [made])[0]


def choose(logits, made):
    return module.choose(logits[None], [made])[0]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [1, 4, 2, 1]),
        ({"temperature": 0.5}, [1, 16, 4, 1]),
        ({"temperature": 2.0}, [1, 2, math.sqrt(2), 1]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-30}, [0, 1, 0, 0]),
        ({"temperature": 1e-300}, [0, 1, 0, 0]),
        ({"temperature": 1e30}, [1, 1, 1, 1]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2, 1, 0]),
        ({"top_k": 4}, [1, 4, 2, 1]),
        ({"top_k": 99}, [1, 4, 2, 1]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 2, 1, 0]),
        ({"top_p": 0.74}, [0, 2, 1, 0]),
        # Of two equals the first one fills it up.
        ({"top_p": 0.76}, [1, 4, 2, 0]),
        ({"min_p": 0.51}, [0, 1, 0, 0]),
        ({"min_p": 0.49}, [0, 2, 1, 0]),
        ({"min_p": 0.24}, [1, 4, 2, 1]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        # In this order: temperature, then what top_k left, then top_p of the rest, then min_p.
        ({"temperature": 0.5, "top_p": 0.8}, [0, 4, 1, 0]),
        ({"top_k": 2, "top_p": 0.66}, [0, 1, 0, 0]),
        ({"top_k": 3, "min_p": 0.3}, [0, 2, 1, 0]),
    ],
)
def test_distribution(options, wanted):
    got = probabilities(LOGITS, Sampling(**{"temperature": 1.0, **options}))
    wanted = torch.tensor(wanted, dtype=torch.float64)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx((wanted / wanted.sum()).tolist(), rel=1e-9)
    assert probabilities(LOGITS.bfloat16(), Sampling()).dtype == torch.float32


def test_top_k_lets_no_tie_through():
    assert probabilities(torch.zeros(10), Sampling(top_k=3)).gt(0).sum() == 3
    made = sampler(Sampling(top_k=3, seed=1))
    assert {choose(torch.tensor([0.0, 1, 0, 0, 1, 0]), made) for _ in range(100)} == {0, 1, 4}


def test_repetition_penalty():
    """Positive logits are divided, negative ones multiplied, each once, however often a token occurred."""
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0, -2.0])
    wanted = torch.tensor([1.0, -2.0, 0.5, 3.0, -2.0])
    options = Sampling(temperature=1.0, repetition_penalty=2.0)
    torch.testing.assert_close(probabilities(logits, options, [0, 1, 1], [1, 0]), wanted.softmax(-1))
    assert logits[0] == 2, "the caller's logits are left alone"
    greedy = Sampling(temperature=0, repetition_penalty=10.0)
    assert probabilities(logits, greedy, [3]).argmax() == 0
    assert probabilities(logits, greedy).argmax() == 3


def test_presence_and_frequency_penalties():
    """logit[j] - count[j] * frequency - (count[j] > 0) * presence, counted over what was generated."""
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0, -2.0])
    wanted = logits - torch.tensor([2 * 0.25 + 1.5, 0.25 + 1.5, 0, 0, 0])
    options = Sampling(temperature=1.0, presence_penalty=1.5, frequency_penalty=0.25)
    got = probabilities(logits, options, prompt=[3, 3, 4], generated=[0, 1, 0])
    torch.testing.assert_close(got, wanted.softmax(-1))
    rewarded = Sampling(temperature=0, frequency_penalty=-2.0)
    assert probabilities(logits, rewarded, generated=[2, 2]).argmax() == 2


def test_logit_bias():
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0, -2.0])
    options = Sampling(temperature=1.0, logit_bias={1: 4.0, 3: -math.inf})
    wanted = torch.tensor([2.0, 3.0, 0.5, -math.inf, -2.0])
    torch.testing.assert_close(probabilities(logits, options), wanted.softmax(-1))
    assert choose(logits, sampler(Sampling(temperature=0, logit_bias={4: 100}), vocab_size=5)) == 4
    with pytest.raises(InputError, match="logit_bias names token 5; the vocabulary has 5 tokens"):
        Sampler(Sampling(logit_bias={5: 1.0}), 5)


def test_nothing_to_choose():
    nothing = sampler(Sampling(logit_bias=dict.fromkeys(range(3), -math.inf)), vocab_size=3)
    for logits, made in ((torch.zeros(3), nothing), (torch.full((3,), torch.nan), sampler(Sampling()))):
        with pytest.raises(StarLMError, match="not finite, or logit_bias forbids every token"):
            choose(logits, made)


def test_an_error_costs_the_others_no_draw():
    """Who is asked again after a neighbour's failure gets the token that it would have got."""
    logits = torch.randn(2, 50)
    logits[1, 7] = torch.nan
    made, alone = sampler(Sampling(seed=1)), sampler(Sampling(seed=1))
    for _ in range(20):
        with pytest.raises(StarLMError, match="not finite"):
            module.choose(logits, [made, sampler(Sampling(seed=2))])
        assert choose(logits[0], made) == choose(logits[0], alone)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("options", [Sampling(), Sampling(temperature=0), Sampling(top_p=0.5)])
@pytest.mark.parametrize("place", [0, 8, 18])
def test_one_bad_logit_is_seen(bad, options, place):
    logits = torch.randn(19)
    logits[place] = bad
    with pytest.raises(StarLMError, match="not finite"):
        choose(logits, sampler(options))


@pytest.mark.parametrize("vocab", [1, 2, 7, 300, 1021])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_chooses_as_defined(vocab, dtype):
    """Token by token what PyTorch draws in fp64, ties and all, since both draw at the same places."""
    torch.manual_seed(vocab)
    chance = random.Random(vocab)
    for turn in range(60):
        # Multiples of 1/8 have many equals, of which PyTorch's topk takes any.
        ranked = turn % 2 and dtype == torch.float32
        logits = torch.randn(8, vocab) * 3 if turn % 2 else torch.randint(-40, 40, (8, vocab)) / 8
        logits = logits.to(dtype)
        options = [
            Sampling(
                temperature=chance.choice([0, 1e-300, 0.3, 1.0, 2.0]),
                top_k=chance.choice([0, 0, 1, 4, 50]) if ranked else 0,
                top_p=chance.choice([1.0, 1.0, 0.97, 0.6, 1e-9]),
                min_p=chance.choice([0.0, 0.0, 0.011, 1.0]),
                repetition_penalty=chance.choice([1.0, 1.3]),
                presence_penalty=chance.choice([0.0, 0.5]),
                frequency_penalty=chance.choice([0.0, -0.25]),
                logit_bias=chance.choice([{}, {0: 2.0, vocab - 1: -math.inf if vocab > 1 else 1.0}]),
                seed=turn,
            )
            for _ in range(8)
        ]
        history = torch.randint(vocab, (2, 6)).tolist()
        ours, defined = ([sampler(o, *history, vocab) for o in options] for _ in range(2))
        if turn % 3 == 0:
            for made in ours[0], defined[0]:
                made.allowed = torch.arange(vocab) % 2 == 0
        assert module.choose(logits, ours) == module.choose(logits.double(), defined)


def test_plain_is_without_the_kernel(monkeypatch):
    logits, calls = torch.randn(2, 30), []
    kernel = cpu_choose.choose
    monkeypatch.setattr(cpu_choose, "choose", lambda *args: calls.append(1) or kernel(*args))
    ours, plainly = ([sampler(Sampling(seed=i)) for i in range(2)] for _ in range(2))
    chosen = module.choose(logits, ours)
    with plain():
        assert module.choose(logits, plainly) == chosen
    assert len(calls) == 1


def test_every_place_of_the_distribution():
    """The ends 0 and 1 - 2^-53 of where draws fall, and what stands first or last with chance 0."""
    logits = torch.full((1, 700), -torch.inf)
    logits[0, 300:310] = torch.tensor([1.0, 2.0] * 5).log()
    made = sampler(Sampling(temperature=1.0, seed=0))
    for point, token in (
        (0.0, 300),
        (1 - 2**-53, 309),
        (1 / 15 + 1e-6, 301),
        (0.2 - 1e-6, 301),
        (0.2001, 302),
    ):
        made.point = point
        assert module.choose(logits, [made]) == [token]


OPTIONS = st.builds(
    Sampling,
    temperature=st.sampled_from([0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 4, 50]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {3: 2.0}]),
    seed=st.integers(0, 9),
)


@given(rows=st.lists(OPTIONS, min_size=1, max_size=8), seed=st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_a_batch_is_its_rows(rows, seed):
    """Distribution and draw of each sample are what they would be alone."""
    torch.manual_seed(seed)
    logits = torch.randn(len(rows), 20) * 3
    histories = [torch.randint(20, (2, 6)).tolist() for _ in rows]

    def made():
        return [sampler(o, *history, 20) for o, history in zip(rows, histories, strict=True)]

    got = module.probabilities(logits, made())
    wanted = [probabilities(row, o, *h) for row, o, h in zip(logits, rows, histories, strict=True)]
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-5, atol=1e-7)
    alone = [choose(row, one) for row, one in zip(logits, made(), strict=True)]
    assert module.choose(logits, made()) == alone


@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0, 5),
    top_k=st.integers(0, 30),
    top_p=st.floats(1e-6, 1),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.5, 3),
)
@settings(max_examples=100, deadline=None)
def test_any_options(seed, temperature, top_k, top_p, min_p, penalty):
    """Always a distribution, never without the likeliest token, and order is kept."""
    torch.manual_seed(seed)
    logits, history = torch.randn(20) * 10, torch.randint(20, (5,)).tolist()
    options = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=1
    )
    chances = probabilities(logits, options, history)
    assert chances.ge(0).all()
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
    assert top_k == 0 or chances.gt(0).sum() <= top_k
    plain = probabilities(logits, Sampling(temperature=1.0, repetition_penalty=penalty), history)
    assert chances[plain.argmax()] == chances.max()
    assert chances[choose(logits, sampler(options, history, (), 20))] > 0


def test_greedy_is_argmax_and_so_is_top_k_1():
    for seed in range(50):
        logits = torch.randn(100)
        for options in (
            Sampling(temperature=0, seed=seed),
            Sampling(top_k=1, temperature=3.0, seed=seed),
            Sampling(top_p=1e-9, seed=seed),
        ):
            assert choose(logits, sampler(options)) == logits.argmax()


def test_impossible_logits_are_never_chosen():
    logits, made = torch.tensor([-torch.inf, 0.0, -torch.inf]), sampler(Sampling(seed=1))
    assert {choose(logits, made) for _ in range(50)} == {1}
    made.allowed = torch.tensor([True, False, True])
    assert {choose(torch.zeros(3), made) for _ in range(50)} == {0, 2}


def test_draws_follow_the_distribution():
    options = Sampling(temperature=1.0, seed=5)
    made = sampler(options)
    counts = torch.bincount(torch.tensor([choose(LOGITS, made) for _ in range(4000)]), minlength=4)
    # Five standard deviations of the largest.
    assert (counts / 4000 - LOGITS.softmax(-1)).abs().max() < 5 * math.sqrt(0.25 / 4000)


def draws(seed, index=0):
    made = Sampler(Sampling(seed=seed), 4, index=index)
    return [choose(LOGITS, made) for _ in range(40)]


def test_seed():
    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)
    assert draws(7, 1) == draws(7, 1)
    assert len({tuple(draws(seed, index)) for seed in (7, 8) for index in range(4)}) == 8
    torch.manual_seed(0)
    one = draws(7)
    torch.manual_seed(1)
    assert draws(7) == one, "independent of the global generator"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (-0.1, math.inf, math.nan)),
        ("top_k", (-1, 2**63)),
        ("top_p", (0.0, 1.1, math.nan)),
        ("min_p", (-0.1, 1.1, math.nan)),
        ("repetition_penalty", (0.0, -1.0, math.inf, math.nan)),
        ("presence_penalty", (math.inf, math.nan, 1e39)),
        ("frequency_penalty", (-math.inf, math.nan)),
        ("logit_bias", ({-1: 1.0}, {1: math.nan}, {1: math.inf}, {1: 1e39}, {1: -1e39})),
        ("seed", (2**64, -(2**63) - 1)),
    ],
)
def test_impossible_options(field, values):
    for value in values:
        with pytest.raises(InputError) as error:
            Sampling(**{field: value})
        assert f"{field} must be" in str(error.value)
        assert repr(value) in str(error.value)


def test_the_default_dtype_of_others_takes_no_penalty_away():
    logits = torch.zeros(1, 9)
    options = Sampling(temperature=0, logit_bias={3: -10.0, 4: -10.0}, presence_penalty=1.5)

    def chosen():
        made = sampler(options, generated=[0, 1, 2], vocab_size=9)
        made.add(3)
        return module.choose(logits.clone(), [made])

    wanted = chosen()
    assert wanted == [5]
    for other in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(other)
        try:
            assert chosen() == wanted
        finally:
            torch.set_default_dtype(torch.float32)
