"""The distribution that tokens are drawn from, by hand, and the draws."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from starlm.errors import InputError
from starlm.generate.sampling import Sampling, choose, probabilities

# Chances 0.5, 0.25, 0.125, 0.125 in another order.
LOGITS = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64).log() + 3


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


def test_repetition_penalty():
    """Positive logits are divided, negative ones multiplied, each once, however often a token occurred."""
    logits, history = torch.tensor([2.0, -1.0, 0.5, 3.0, -2.0]), torch.tensor([0, 1, 1, 1, 0])
    wanted = torch.tensor([1.0, -2.0, 0.5, 3.0, -2.0])
    got = probabilities(logits, Sampling(temperature=1.0, repetition_penalty=2.0), history)
    torch.testing.assert_close(got, wanted.softmax(-1))
    assert logits[0] == 2, "the caller's logits are left alone"
    greedy = Sampling(temperature=0, repetition_penalty=10.0)
    assert probabilities(logits, greedy, torch.tensor([3])).argmax() == 0
    for none in (None, torch.tensor([], dtype=torch.long)):
        assert probabilities(logits, greedy, none).argmax() == 3


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
    logits, history = torch.randn(20) * 10, torch.randint(20, (5,))
    options = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=1
    )
    chances = probabilities(logits, options, history)
    assert chances.ge(0).all()
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
    assert top_k == 0 or chances.gt(0).sum() <= top_k
    plain = probabilities(logits, Sampling(temperature=1.0, repetition_penalty=penalty), history)
    assert chances[plain.argmax()] == chances.max()
    assert chances[choose(logits, options, options.generator(), history)] > 0


def test_greedy_is_argmax_and_so_is_top_k_1():
    for seed in range(50):
        logits = torch.randn(100)
        for options in (Sampling(temperature=0), Sampling(top_k=1, temperature=3.0), Sampling(top_p=1e-9)):
            generator = torch.Generator().manual_seed(seed)
            assert choose(logits, options, generator) == logits.argmax()


def test_impossible_logits_are_never_chosen():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf])
    assert {choose(logits, Sampling(seed=1), Sampling(seed=1).generator()) for _ in range(20)} == {1}


def test_draws_follow_the_distribution():
    options = Sampling(temperature=1.0, seed=5)
    generator = options.generator()
    counts = torch.bincount(
        torch.tensor([choose(LOGITS, options, generator) for _ in range(4000)]), minlength=4
    )
    # Five standard deviations of the largest.
    assert (counts / 4000 - LOGITS.softmax(-1)).abs().max() < 5 * math.sqrt(0.25 / 4000)


def draws(seed):
    options = Sampling(seed=seed)
    generator = options.generator()
    return [choose(LOGITS, options, generator) for _ in range(40)]


def test_seed():
    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)
    torch.manual_seed(0)
    one = draws(7)
    torch.manual_seed(1)
    assert draws(7) == one, "independent of the global generator"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (-0.1, math.inf, math.nan)),
        ("top_k", (-1,)),
        ("top_p", (0.0, 1.1, math.nan)),
        ("min_p", (-0.1, 1.1, math.nan)),
        ("repetition_penalty", (0.0, -1.0, math.inf, math.nan)),
        ("seed", (2**64, -(2**63) - 1)),
    ],
)
def test_impossible_options(field, values):
    for value in values:
        with pytest.raises(InputError) as error:
            Sampling(**{field: value})
        assert f"{field} must be" in str(error.value)
        assert repr(value) in str(error.value)
