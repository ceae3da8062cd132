"""Impossible values are refused by name; the numbers that follow from a config are those of the model."""

import itertools
import math
import re

import pytest

from starlm.errors import InputError
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.settings import from_dict, to_dict


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", 2**31 + 1),
        ("depth", 0),
        ("depth", 1001),
        ("dim", -64),
        ("dim", 2**20 + 1),
        ("heads", -1),
        ("layers", ""),
        ("layers", "DX"),
        ("layers", "d"),
        ("preset", "moon"),
        ("depth", "2"),
        ("depth", 2.5),
        ("depth", True),
        ("softcap", "15"),
        ("kinds", ("now", "moon")),
        ("attention_window", 0),
        ("mlp_ratio", -1),
        ("context", 0),
        ("max_shift", -1),
        ("shift_init", 0.0),
        ("shift_init", -1.0),
        ("shift_init", math.inf),
        ("shift_init", math.nan),
        ("softcap", -1.0),
        ("softcap", math.inf),
        ("softcap", math.nan),
        ("rope_base", 1.0),
        ("rope_base", math.inf),
        ("rope_base", math.nan),
    ],
)
def test_impossible_values(field, value):
    with pytest.raises(InputError) as error:
        StarLMConfig(**{field: value})
    assert re.match(rf"model\.{field} (in StarLMConfig )?must be", str(error.value))
    assert repr(value) in str(error.value)


def test_heads_that_do_not_fit():
    with pytest.raises(InputError, match=r"model.heads must divide the width; got 3 heads for width 64"):
        StarLMConfig(dim=64, heads=3)
    with pytest.raises(InputError, match=r"model.heads must divide the width; got 128 heads for width 64"):
        StarLMConfig(dim=64, heads=128)
    with pytest.raises(InputError, match=r"even number of channels.*got 3 .*model.heads"):
        StarLMConfig(dim=12, heads=4, layers="DA")
    assert StarLMConfig(dim=12, heads=4, layers="D").head_dim == 3
    # A pattern longer than the depth: the attention layer is never reached.
    assert StarLMConfig(dim=12, heads=4, depth=2, layers="DDA").layer_kinds == "DD"


@pytest.mark.parametrize(
    "options",
    [
        {"preset": preset, "mlp_ratio": ratio, "shift_init": init, "layers": layers}
        for preset, ratio, init, layers in itertools.product(
            ("product", "value", "gated"), (0, 4), (None, 2.0), ("D", "A", "DA", "DDA")
        )
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_num_parameters(options):
    config = StarLMConfig(depth=5, dim=24, heads=3, vocab_size=70, max_shift=9, **options)
    model = StarLM(config)

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    assert config.num_parameters == {
        "embedding": count(model.embedding),
        "head": count(model.head),
        "mixers": count(*(block.mixer for block in model.blocks)),
        "mlps": count(*(block.mlp for block in model.blocks if block.mlp is not None)),
        "total": count(model),
    }


@pytest.mark.parametrize("depth", [*range(1, 33), 64, 100])
def test_depth_is_a_dial(depth):
    """Any depth alone gives a model whose heads fit; width is 64 x depth."""
    for layers in ("D", "DDDA"):
        config = StarLMConfig(depth=depth, layers=layers)
        assert config.width == 64 * depth
        assert config.num_heads * config.head_dim == config.width
        assert config.num_heads == (8 if depth <= 4 else 2 * depth if depth <= 8 else depth)
        assert len(config.layer_kinds) == depth


def test_by_hand_beats_the_dial():
    config = StarLMConfig(depth=3, dim=100, heads=5, layers="DDA")
    assert (config.width, config.num_heads, config.head_dim) == (100, 5, 20)
    assert config.layer_kinds == "DDA"
    assert StarLMConfig(depth=7, layers="DDA").layer_kinds == "DDADDAD"


def test_flops_per_token():
    """6 for each weight behind the embedding; attention also reads T / 2 rows twice, forward and backward."""
    config = StarLMConfig(depth=4, dim=32, heads=2, vocab_size=100, layers="DA", context=64)
    weights = 100 * 32 + 4 * (4 + 8) * 32 * 32 + 2 * 32
    assert config.flops_per_token() == 6 * weights + 2 * (3 * 2 * 2 * 32 * 64 // 2)
    assert config.flops_per_token(128) - config.flops_per_token() == 2 * (3 * 2 * 2 * 32 * 32)
    # In a window of 16 the first 16 queries see 8 rows on average, the other 48 all 16.
    windowed = StarLMConfig(depth=4, dim=32, heads=2, vocab_size=100, layers="DW", attention_window=16)
    assert windowed.flops_per_token(64) == 6 * weights + round(2 * 3 * 2 * 2 * 32 * (16 * 8 + 48 * 16) / 64)
    linear = StarLMConfig(depth=4, dim=32, heads=2, vocab_size=100)
    assert linear.flops_per_token(10**6) == linear.flops_per_token(1)


def test_plain_values_and_back():
    config = StarLMConfig(depth=3, layers="DA", max_shift=7, shift_init=2.5, preset="product")
    assert from_dict(StarLMConfig, to_dict(config), where="x") == config
