"""The models that are compared: what differs between them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from experiments.candidates import Star, Taps
from starlm.errors import InputError
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.nn.deformer import Deformer
from starlm.nn.linear import init_matrix
from starlm.nn.mlp import MLP


def _star(config: StarLMConfig, **options: Any) -> nn.Module:
    return Star(config.width, config.num_heads, window=config.context // 2, **options)


def _taps(config: StarLMConfig, **options: Any) -> nn.Module:
    return Taps(config.width, config.num_heads, **options)


# As settings of `StarLMConfig`.
VARIANTS: dict[str, dict[str, Any]] = {
    "transformer": {"layers": "A"},
    "transformer-nope": {"layers": "A", "rope_base": 0.0},
    "product": {"preset": "product"},
    "value": {"preset": "value"},
    "gated": {"preset": "gated"},
    "gated-no-mlp": {"preset": "gated", "mlp_ratio": 0},
    "anchors": {"preset": "gated", "kinds": ("now", "token", "now", "bigram")},
    "boxes": {"preset": "gated", "kinds": ("now", "token", "box", "bigram")},
    "star": {"preset": "star"},
    "star-longest": {
        "preset": "star",
        "kinds": ("now", "token", "box", "longest", "now", "bigram", "box", "trigram"),
    },
    "conv": {"layers": "C"},
    "star-conv": {"preset": "star", "layers": "CDD"},
    "star-W": {"preset": "star", "layers": "DDW", "attention_window": 64},
    "star-W256": {"preset": "star", "layers": "DDW", "attention_window": 256},
    "star-DW": {"preset": "star", "layers": "DW", "attention_window": 64},
    "gated-W256": {"preset": "gated", "layers": "DDW", "attention_window": 256},
    "transformer-W256": {"layers": "W", "attention_window": 256},
    "star-A": {"preset": "star", "layers": "DDA"},
    "star-A1": {"preset": "star", "layers": "DDDADD"},
    "transformer-anchors": {"layers": "AD", "preset": "gated", "kinds": ("token", "bigram")},
}
_TAPS = partial(_taps, near=16, reach=64, orders=(1, 2, 3))
# Variants with layers that the product does not have: the settings, and what makes layers of a letter.
CANDIDATES: dict[str, tuple[str, dict[str, Callable[[StarLMConfig], nn.Module]]]] = {
    "star-keys": ("star", {"D": partial(_star, keys="head")}),
    "star-channel-keys": ("star", {"D": partial(_star, keys="channel")}),
    "star-W-channel-keys": ("star-W", {"D": partial(_star, keys="channel")}),
    "star-fit": ("star", {"D": partial(_star, fit=True)}),
    "star-back": ("star", {"D": partial(_star, back="now")}),
    "star-chain": ("star", {"D": partial(_star, back="chain")}),
    "star-taps": ("star-W", {"W": partial(_taps, near=16, reach=64)}),
    "star-taps-anchors": ("star-W", {"W": _TAPS}),
    "star-taps-2": ("star-DW", {"W": _TAPS}),
    "star-channel-keys-taps-2": ("star-DW", {"W": _TAPS, "D": partial(_star, keys="channel")}),
    "taps": ("star", {"D": _TAPS}),
}
# A variant and one of these, as in gated+static: what becomes of its predicted shifts.
SHIFTS = ("random", "frozen", "static")
# Where that is defined: models with layers of one shift projection, and an MLP to take its parameters.
NAMES = [
    *VARIANTS,
    *CANDIDATES,
    *(
        f"{name}+{shifts}"
        for name, of in VARIANTS.items()
        if of.get("preset", "product") != "product" and of.get("mlp_ratio") != 0
        for shifts in SHIFTS
    ),
]
# Candidates read whole rows only: they have no decode state.
DECODING = [name for name in NAMES if name not in CANDIDATES]


class Static(nn.Module):
    """One shift per channel, the same for every token, starting where predicted shifts are spread."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """The shift of every token of x [B, T, D]."""
        return self.bias.expand_as(x)


def settings(name: str) -> dict[str, Any]:
    """The settings of a variant, with or without a word about its shifts."""
    base, *_ = CANDIDATES.get(name, (name.partition("+")[0],))
    return VARIANTS[base]


def builder(name: str) -> Callable[[StarLMConfig], StarLM]:
    """What makes the variant's model.

    random: shift projections start at random, as other matrices do, in place of a spread of their biases.
    frozen: so, and they stay. static: a learned constant per channel takes their place, and their D²
    parameters go to the MLP, whose hidden width grows from 4 D to 4.5 D.

    The function raises InputError where a model is too shallow for the variant's pattern of layers.
    """
    shifts = name.partition("+")[2]

    def build(config: StarLMConfig) -> StarLM:
        if set(config.layers) != set(config.layer_kinds):
            raise InputError(
                f"{name} has the layers {config.layers}, of which {config.depth} leave {config.layer_kinds}. "
                f"Take --depth {len(config.layers)} or more."
            )
        model = StarLM(config)
        if name in CANDIDATES:
            makes = CANDIDATES[name][1]
            for block, kind in zip(model.blocks, config.layer_kinds, strict=True):
                if kind in makes:
                    block.mixer = makes[kind](config)
            return model
        for block in model.blocks:
            layer = block.mixer
            if not shifts or not isinstance(layer, Deformer):
                continue
            if shifts == "static":
                layer.shift = Static(layer.shift.bias.detach())
                block.mlp = _wider(config)
            else:
                init_matrix(layer.shift)
                boxes = layer.kinds.count("box") * layer.dim // layer.heads
                nn.init.zeros_(layer.shift.bias[: layer.dim - boxes])
                layer.shift.requires_grad_(shifts == "random")
        return model

    return build


def _wider(config: StarLMConfig) -> MLP:
    mlp = MLP(config.width, config.mlp_ratio)
    hidden = config.mlp_ratio * config.width + config.width // 2
    mlp.up = nn.Linear(config.width, hidden, bias=False)
    mlp.down = nn.Linear(hidden, config.width, bias=False)
    mlp.reset_parameters()
    return mlp
