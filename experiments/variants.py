"""The models that are compared: what differs between them, as settings of `StarLMConfig`."""

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "transformer": {"layers": "A"},
    "product": {"preset": "product"},
    "value": {"preset": "value"},
    "gated": {"preset": "gated"},
    "gated-no-mlp": {"preset": "gated", "mlp_ratio": 0},
    "anchors": {"preset": "gated", "kinds": ("now", "token", "now", "bigram")},
    "boxes": {"preset": "gated", "kinds": ("now", "token", "box", "bigram")},
    "star": {"preset": "star"},
    "conv": {"layers": "C"},
    "star-conv": {"preset": "star", "layers": "CDD"},
    "star-W": {"preset": "star", "layers": "DDW", "attention_window": 64},
    "star-A": {"preset": "star", "layers": "DDA"},
}
