"""Models and prompts for tests of the engine."""

import torch
from models import make_model

from starlm.data.tokenizer import Tokenizer
from starlm.generate.sampling import Sampling
from starlm.generate.text import TextModel

TOKENIZER = Tokenizer.train(["def add(a, b):\n    return a + b  # é 你好 🙂\n" * 30], 300)
VOCAB = TOKENIZER.vocab_size
KINDS = {
    "product": "product",
    "value": "value",
    "gated": "gated",
    "star": "star",
    "bounded": "star, bounded",
    "A, W, C": "star mixed",
}
GREEDY = Sampling(temperature=0)


def make(kind, **options):
    """fp64, so that rounding, which depends on the batch, cannot tip an argmax or a draw."""
    more = {"layers": "DAWC", "depth": 4} if kind == "A, W, C" else {}
    return TextModel(make_model(KINDS[kind], vocab_size=VOCAB, **more, **options), TOKENIZER)


MODELS = {kind: make(kind) for kind in KINDS}


def prompt(number, length):
    """Texts that share beginnings, and all differ."""
    generator = torch.Generator().manual_seed(number)
    tail = torch.randint(9, 40, (length,), generator=generator).tolist()
    return [TOKENIZER.bos, *range(50, 90)][: 1 + 20 * (number % 3)] + tail


def ids_of(pieces, index=0):
    return [token.id for piece in pieces if piece.index == index for token in piece.tokens]


def finish_of(pieces, index=0):
    return [piece.finish for piece in pieces if piece.index == index and piece.finish]


def drained(engine):
    while engine.step():
        pass


def collected(engine, request):
    """A request whose pieces are collected by a callback."""
    pieces = []
    return engine.submit(request, pieces.append), pieces
