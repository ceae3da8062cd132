"""Which state of an earlier prompt serves a new one, and which are forgotten."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from models import make_model
from relations import assert_close

from starlm.generate import cache as module
from starlm.generate.cache import FEWEST, PrefixCache

KINDS = ["star mixed", "gated", "gated, bounded"]
MODELS = {kind: make_model(kind, max_shift=300) if "bounded" in kind else make_model(kind) for kind in KINDS}


def state_of(model, tokens):
    state = model.new_state(rollback=1)
    with torch.no_grad():
        model(torch.tensor([tokens]), state=state)
    return state


TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=40).map(lambda tail: [1, 2, 3, 4] * 4 + tail)


@given(kind=st.sampled_from(KINDS), texts=st.lists(TEXTS, min_size=2, max_size=6), data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_prompts(kind, texts, data):
    """What is found goes on as the whole prompt would; of states that can be cropped, it is the longest."""
    model, cache = MODELS[kind], PrefixCache(1 << 30)
    *earlier, last = texts
    for tokens in earlier:
        cache.put(tokens, state_of(model, tokens), copy=data.draw(st.booleans()))
    for tokens in (last, earlier[0]):
        found = cache.find(tokens)
        length = found.lengths[0] if found else 0
        assert length < len(tokens)
        if kind == "gated":
            common = [
                next((i for i, (a, b) in enumerate(zip(t, tokens[:-1], strict=False)) if a != b),
                     min(len(t), len(tokens) - 1))
                for t in earlier
            ]  # fmt: skip
            assert length == (max(common) if max(common) >= FEWEST else 0)
        if found:
            with torch.no_grad():
                got = model(torch.tensor([tokens[length:]]), state=found)
                assert_close(got, model(torch.tensor([tokens]))[:, length:])


def test_the_least_recently_used_go_first():
    model = MODELS["gated"]
    texts = [[number] * 20 for number in range(4)]
    size = state_of(model, texts[0]).num_bytes + 8 * 20
    cache = PrefixCache(3 * size)
    for tokens in texts[:3]:
        cache.put(tokens, state_of(model, tokens))
    assert cache.find([*texts[0], 7]) is not None
    cache.put(texts[3], state_of(model, texts[3]))
    assert [bool(cache.find([*tokens, 7])) for tokens in texts] == [True, False, True, True]
    assert (len(cache), cache.num_bytes) == (3, 3 * size)
    assert (cache.hits, cache.misses) == (4, 1)
    cache.clear()
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_a_state_that_another_covers_is_not_kept():
    model = MODELS["gated"]
    tokens, cache = [1, 2, 3] * 20, PrefixCache(1 << 30)
    for length in (30, 60, 40):
        cache.put(tokens[:length], state_of(model, tokens[:length]))
        assert len(cache) == 1
    assert cache.find(tokens).lengths == [59]


def test_a_prompt_is_compared_with_those_that_begin_alike_only(monkeypatch):
    compared, cache = [], PrefixCache(1 << 30)
    common = module._common
    monkeypatch.setattr(module, "_common", lambda *pair: compared.append(pair) or common(*pair))
    state = state_of(MODELS["gated"], [1] * 20)
    for number in range(100):
        cache.put([number] * 20, state, copy=True)
    assert (len(cache), compared) == (100, [])
    assert cache.find([7] * 30).lengths == [20]
    assert cache.find([100] * 30) is None
    cache.put([7] * 20, state)
    assert (len(cache), len(compared)) == (100, 2)
    # Of a hundred with one beginning, those that may be longer than the best.
    for number in range(100):
        cache.put([*[200] * 20, number], state, copy=True)
    assert (len(cache), len(compared)) == (200, 2)
    assert cache.find([*[200] * 20, 300, 1]).lengths == [20]
    assert len(compared) == 3
    cache.clear()
    assert (cache.find([7] * 30), len(cache._alike)) == (None, 0)


@pytest.mark.parametrize("limit", [0, 1000])
def test_what_is_too_large_is_not_kept(limit):
    cache = PrefixCache(limit)
    cache.put([1] * 50, state_of(MODELS["gated"], [1] * 50), copy=True)
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_what_is_found_is_a_copy():
    model, cache, tokens = MODELS["star mixed"], PrefixCache(1 << 30), [1, 2, 3] * 10
    state = state_of(model, tokens)
    cache.put(tokens, state, copy=True)
    with torch.no_grad():
        model(torch.tensor([[5] * 9]), state=state)
        for _ in range(2):
            found = cache.find([*tokens, 4])
            assert found.lengths == [30]
            wanted = model(torch.tensor([[*tokens, 4]]))[:, -1:]
            assert_close(model(torch.tensor([[4]]), state=found), wanted)
