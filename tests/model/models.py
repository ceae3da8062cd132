"""Small models of every kind with random weights, and their inputs."""

import torch
from relations import randomise

from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM

# Few tokens, so that n-grams come again and anchored heads have something to read.
VOCAB = 8
STAR = {"preset": "star", "dim": 32, "heads": 8}
# Name -> what differs from the default config. Every preset, kind of head and layer, and mixed patterns.
KINDS = {
    "product": {"preset": "product"},
    "value": {"preset": "value"},
    "gated": {"preset": "gated"},
    "attention": {"layers": "A"},
    "attention, no positions": {"layers": "A", "rope_base": 0.0},
    "mixed": {"layers": "DA", "preset": "gated"},
    "mixed product": {"layers": "AD", "preset": "product"},
    "star": STAR,
    "star product": {"preset": "product", "kinds": ("box", "4-gram", "now", "token"), "dim": 32, "heads": 4},
    "star, longest match": {**STAR, "kinds": ("now", "longest", "box", "bigram")},
    "window": {"layers": "W", "attention_window": 4},
    "star window": {**STAR, "layers": "DDW", "depth": 3, "attention_window": 6},
    "convolution": {"layers": "C"},
    "star mixed": {**STAR, "layers": "DWC", "depth": 3, "attention_window": 7},
}
BOUNDED = {
    "product, bounded": {"preset": "product", "max_shift": 5},
    "value, bounded": {"preset": "value", "max_shift": 0},
    "gated, bounded": {"preset": "gated", "max_shift": 9, "shift_init": 3.0},
    "mixed, bounded": {"layers": "DA", "preset": "gated", "max_shift": 5},
    "star, bounded": {**STAR, "max_shift": 6},
    "star, own row": {**STAR, "max_shift": 0},
}
# Past 4096 tokens, cut where blocks of kernels begin, at both ends, and where bf16 cannot count on.
LONG = 4097
CUTS = (0, 255, 2047, 4095)


def make_model(kind, *, dtype=torch.float64, **options):
    """The model of a kind, two layers of width 16 if not told otherwise; fp64 makes relations sharp."""
    chosen = {"depth": 2, "dim": 16, "heads": 2, "vocab_size": VOCAB, **(KINDS | BOUNDED)[kind], **options}
    torch.manual_seed(1)
    return randomise(StarLM(StarLMConfig(**chosen))).to(dtype)


def make_tokens(*shape):
    return torch.randint(VOCAB, shape)


def in_precision(model, precision):
    """A call of the model in float32, bfloat16, or autocast to bfloat16."""
    if precision == "bfloat16":
        model.bfloat16()

    def run(tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            return model(tokens)

    return run


def make_changed(*shape):
    """Tokens, and others that differ from them everywhere."""
    tokens = make_tokens(*shape)
    return tokens, (tokens + torch.randint(1, VOCAB, shape)) % VOCAB
