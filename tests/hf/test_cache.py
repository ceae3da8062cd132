"""The cache of transformers is a decode state."""

import pytest
import torch
from models import make_tokens
from wrapped import FEW, make_pair

from starlm.errors import InputError
from starlm.hf import StarLMCache


@pytest.fixture
def model():
    return make_pair("star")[0]


def filled(model, tokens):
    cache = StarLMCache(model.new_state(len(tokens)))
    with torch.no_grad():
        model(tokens, state=cache.state)
    return cache


def goes_on(model, cache, tokens):
    """Whether the cache continues as if it had read these tokens."""
    more = make_tokens(len(tokens), 2)
    with torch.no_grad():
        found = model(more, state=cache.state)
        torch.testing.assert_close(found, model(torch.cat([tokens, more], dim=1))[:, -2:])
    return True


@pytest.mark.parametrize("kind", FEW)
def test_rows_in_another_order(kind):
    model, tokens = make_pair(kind)[0], make_tokens(3, 9)
    cache = filled(model, tokens)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert goes_on(model, cache, tokens[[2, 0, 0]])
    cache = filled(model, tokens)
    cache.batch_select_indices(torch.tensor([False, True, True]))
    assert cache.batch_size == 2
    assert goes_on(model, cache, tokens[1:])
    cache = filled(model, tokens)
    cache.batch_repeat_interleave(2)
    assert goes_on(model, cache, tokens.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("kind", FEW)
def test_crop(kind):
    model, tokens = make_pair(kind)[0], make_tokens(2, 9)
    cache = filled(model, tokens)
    cache.crop(0)
    assert cache.get_seq_length() == 9
    cache.crop(-4)
    assert cache.get_seq_length() == 5
    assert goes_on(model, cache, tokens[:, :5])
    with pytest.raises(ValueError, match="minus the number of tokens to remove; got 3"):
        cache.crop(3)
    with pytest.raises(InputError, match="Cannot crop slot 0 to -1 tokens"):
        cache.crop(-8)
    cache.reset()
    assert not cache.is_initialized
    assert goes_on(model, cache, tokens[:, :0])


def test_what_it_says_of_itself(model):
    cache = filled(model, make_tokens(2, 9))
    assert cache.get_mask_sizes(3, 0) == (12, 0)
    assert cache.get_max_length() == -1
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.is_initialized
    assert not any(cache.is_linear + cache.is_sliding + cache.is_dummy)
    assert repr(cache) == f"StarLMCache(2 x 9 tokens, {cache.state.num_bytes} bytes)"
