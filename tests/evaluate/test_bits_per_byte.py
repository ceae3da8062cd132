"""Bits per byte by hand, and the same whether documents are packed or alone."""

import math

import numpy as np
import pytest
import torch
from models import KINDS, make_model

from starlm.data.shards import Split
from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError
from starlm.evaluate.bits_per_byte import evaluate

TOKENIZER = Tokenizer.train(["def add(a, b):\n    return a + b  # é 🙂\n" * 30], 300)
TEXTS = ["def add(a, b):\n", "é🙂", "", "    return a + b\n" * 3, "x"]
DOCUMENTS = [TOKENIZER.encode(text, bos=True) for text in TEXTS]
SPLIT = Split.from_documents(DOCUMENTS)
BYTES = sum(len(text.encode()) for text in TEXTS)


def make(kind="mixed", context=64):
    return make_model(kind, vocab_size=TOKENIZER.vocab_size, context=context)


def by_hand(model, documents):
    """(nats of text, nats of all, bytes, tokens) of documents read alone, each to its ending <|bos|>."""
    text = total = size = count = 0
    for document in documents:
        with torch.no_grad():
            chances = model(torch.tensor([document]))[0].log_softmax(-1)
        for t, target in enumerate([*document[1:], TOKENIZER.bos]):
            nats = -chances[t, target].item()
            length = len(TOKENIZER.token_bytes(target))
            text, total = text + (nats if length else 0.0), total + nats
            size, count = size + length, count + 1
    return text, total, size, count


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind):
    """One row holds all documents: what evaluation packs equals each document alone."""
    model = make(kind, context=SPLIT.num_tokens + 10)
    text, total, size, count = by_hand(model, DOCUMENTS)
    got = evaluate(model, SPLIT, TOKENIZER, precision="float32")
    assert got["tokens"] == count == SPLIT.num_tokens
    assert got["bytes"] == size == BYTES
    assert got["loss"] == pytest.approx(total / count, rel=1e-9)
    assert got["bits_per_byte"] == pytest.approx(text / (math.log(2) * BYTES), rel=1e-9)
    assert abs(text - total) > 1, "special tokens cost something, and are left out of bits per byte"


def test_a_model_that_knows_nothing():
    model = make()
    with torch.no_grad():
        model.head.weight.zero_()
    got = evaluate(model, SPLIT, TOKENIZER)
    text_tokens = SPLIT.num_tokens - len(TEXTS)
    assert got["loss"] == pytest.approx(math.log(TOKENIZER.vocab_size), rel=1e-6)
    assert got["bits_per_byte"] == pytest.approx(
        text_tokens * math.log2(TOKENIZER.vocab_size) / BYTES, rel=1e-6
    )


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("context", [1, 5, 16, 1000])
def test_rows_of_context(context, rows):
    """Documents cut at the rows' ends begin anew there; rows at a time are a matter of speed."""
    model = make(context=context)
    pieces, place = [], 0
    for document in DOCUMENTS:
        for target_end, token in enumerate(document, place):
            if target_end == place or target_end % context == 0:
                pieces.append([])
            pieces[-1].append(token)
        place += len(document)
    # By hand again, but with the token that really follows each piece.
    stream = np.concatenate([*DOCUMENTS, [TOKENIZER.bos]])
    total, place = 0.0, 0
    for piece in pieces:
        with torch.no_grad():
            chances = model(torch.tensor([piece]))[0].log_softmax(-1)
        for t in range(len(piece)):
            place += 1
            total -= chances[t, stream[place]].item()
    got = evaluate(model, SPLIT, TOKENIZER, rows=rows, precision="float32")
    assert got["tokens"] == place == SPLIT.num_tokens
    assert got["bytes"] == BYTES
    assert got["loss"] == pytest.approx(total / place, rel=1e-9)


def test_max_tokens_and_progress():
    model, seen = make(context=8), []
    got = evaluate(model, SPLIT, TOKENIZER, max_tokens=19, rows=1, progress=lambda *now: seen.append(now))
    assert (got["tokens"], got["split_tokens"]) == (19, SPLIT.num_tokens)
    assert seen == [(8, 19), (16, 19), (19, 19)]
    stored, rows = np.concatenate(DOCUMENTS), -(-SPLIT.num_tokens // 8)
    begins = [row * rows // 3 * 8 for row in range(3)]
    taken = [*stored[begins[0] + 1 :][:8], *stored[begins[1] + 1 :][:8], *stored[begins[2] + 1 :][:3]]
    wanted = sum(len(TOKENIZER.token_bytes(token)) for token in taken)
    assert got["bytes"] == wanted


def test_the_model_is_left_as_it_was():
    model = make()
    for training in (True, False):
        model.train(training)
        evaluate(model, SPLIT, TOKENIZER)
        assert model.training == training
    assert all(p.grad is None for p in model.parameters())
    model.train()

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, SPLIT, TOKENIZER, progress=fail)
    assert model.training


def test_repeated_runs_are_equal():
    model = make().float()
    one, two = (evaluate(model, SPLIT, TOKENIZER) for _ in range(2))
    assert one == two


def test_precision():
    """bfloat16 is close to float32 and not the same; 0.02 is what 8 bits give after two layers."""
    model = make().float()
    exact = evaluate(model, SPLIT, TOKENIZER, precision="float32")
    rounded = evaluate(model, SPLIT, TOKENIZER, precision="bfloat16")
    assert exact != rounded
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)
    with pytest.raises(InputError, match="precision must be auto, float32, bfloat16; got 'bf16'"):
        evaluate(model, SPLIT, TOKENIZER, precision="bf16")
