"""Text in, text out: pieces, stops, limits, and the same tokens as by full forwards."""

import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from models import BOUNDED, KINDS, make_model

from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError
from starlm.files import whole_folder
from starlm.generate import text as module
from starlm.generate.engine import Engine
from starlm.generate.request import Request
from starlm.generate.sampling import Sampling
from starlm.generate.text import TextModel, load
from starlm.model.checkpoint import write_model

TOKENIZER = Tokenizer.train(["def add(a, b):\n    return a + b  # é 你好 🙂\n" * 30], 300)
VOCAB = TOKENIZER.vocab_size


def make(kind="mixed", **options):
    return TextModel(make_model(kind, vocab_size=VOCAB, dtype=torch.float32, **options), TOKENIZER)


def answer(model, tokens, max_tokens, sampling, begin=b""):
    """Ids that the model continues `tokens` with."""
    engine = Engine(model, slots=1, cache_bytes=0, prefill_chunk=module.CHUNK)
    request = Request(tokens=tokens, max_tokens=max_tokens, sampling=sampling, begin=begin)
    return [token.id for piece in engine.submit(request) for token in piece.tokens]


@pytest.mark.parametrize("kind", [*KINDS, *BOUNDED])
def test_greedy_text_is_argmax_of_full_forwards(kind, monkeypatch):
    """Whatever the chunks in which the prompt is read."""
    model = make(kind)
    prompt = ("def add(a, b): return 12 + " * 3).rstrip()
    ids = [TOKENIZER.bos, *TOKENIZER.encode(prompt)]
    wanted = list(ids)
    for _ in range(30):
        with torch.no_grad():
            wanted.append(int(model.model(torch.tensor([wanted]))[0, -1].argmax()))
    for chunk in (512, 7, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        got = answer(model, ids, 30, Sampling(temperature=0))
        stop = wanted.index(TOKENIZER.bos, len(ids)) if TOKENIZER.bos in wanted[len(ids) :] else len(wanted)
        assert got == wanted[len(ids) : stop]
        assert len(got) > 5
    assert model.generate(prompt, max_tokens=30, temperature=0.0) == TOKENIZER.decode(got)
    assert model.generate(prompt, max_tokens=30, top_k=1, temperature=1.0) == TOKENIZER.decode(got)


def test_the_penalty_sees_prompt_and_answer():
    model, ids = make(), [TOKENIZER.bos, *TOKENIZER.encode("return")]
    got = answer(model, ids, 40, Sampling(temperature=0, repetition_penalty=1e6))
    with torch.no_grad():
        scores = model.model(torch.tensor([ids]))[0, -1]
    # Whatever occurred is all but impossible while something else has a positive score.
    assert scores.max() > 0
    assert not set(got[:10]) & set(ids)
    assert len(set(got[:10])) == len(got[:10])


def test_a_model_that_predicts_bos_ends():
    model = make()
    with torch.no_grad():
        model.model.head.weight.zero_()
    # All logits are equal: greedy takes the first id.
    assert TOKENIZER.bos == 0
    assert model.generate("def", max_tokens=50, temperature=0.0) == ""


@pytest.mark.parametrize("count", [0, 1, 5])
def test_max_tokens(count):
    model = make()
    ids = [TOKENIZER.bos]
    got = answer(model, ids, count, Sampling(seed=3, temperature=1.0))
    assert len(got) <= count
    longer = answer(model, ids, 20, Sampling(seed=3, temperature=1.0))
    assert longer[:count] == got
    assert len(longer) > 5
    assert model.generate("", max_tokens=0) == ""


def test_pieces_are_what_was_drawn():
    """A text cut into tokens again has others than an untrained model drew."""
    model = make()
    pieces = list(model.pieces("def", max_tokens=20, seed=3, temperature=1.0))
    assert sum(len(piece.tokens) for piece in pieces) == 20
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    text = "".join(piece.text for piece in pieces)
    assert text == "".join(model.stream("def", max_tokens=20, seed=3, temperature=1.0))
    assert len(TOKENIZER.encode(text)) != 20


def test_seed():
    model = make()
    one, two, three = (model.generate("def", max_tokens=30, seed=seed) for seed in (1, 1, 2))
    assert one == two != three


def test_a_prompt_longer_than_memory(monkeypatch):
    model = make("mixed")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    prompt = "a b c d e f g h " * 1000
    with pytest.raises(InputError) as error:
        # At the call, before a piece is asked for.
        model.stream(prompt)
    for word in ("decode state", "1 MiB of memory", "Shorten the prompt", "max_shift"):
        assert word in str(error.value)
    with pytest.raises(InputError, match="ask for fewer tokens"):
        model.generate("a", max_tokens=10**6)
    # A bounded state is as large for any number of tokens.
    make("gated, bounded").stream(prompt, max_tokens=10**6)
    with pytest.raises(InputError, match="a smaller max_shift"):
        make("gated", max_shift=10**6).stream(prompt, max_tokens=10**6)
    make("mixed").stream("a", max_tokens=10)


def test_impossible_requests():
    model = make()
    with pytest.raises(InputError, match="max_tokens must be a whole number, 0 or more; got -1"):
        model.stream("", max_tokens=-1)
    with pytest.raises(InputError, match="empty string"):
        model.stream("", stop=["a", ""])
    with pytest.raises(InputError, match="top_p must be"):
        model.stream("", top_p=2.0)
    with pytest.raises(InputError, match="must be text; got list"):
        model.stream(["a", "b"])
    with pytest.raises(InputError, match="surrogate"):
        model.stream("\ud800")
    with pytest.raises(InputError, match=rf"tokenizer has {VOCAB} tokens, the model 8"):
        TextModel(make_model("gated"), TOKENIZER)


def test_one_stop_string_is_not_a_list_of_letters():
    model = make("gated")
    text = model.generate("def", max_tokens=40, seed=1)
    for stop in (text[3:6], text[5], text[-4:]):
        assert model.generate("def", max_tokens=40, seed=1, stop=stop) == text[: text.index(stop)]


def test_rows_that_are_no_tokens_are_never_chosen():
    grown = make_model("gated", vocab_size=VOCAB + 7, dtype=torch.float32)
    with torch.no_grad():
        grown.head.weight[VOCAB:] *= 1000
    model, options = TextModel(grown, TOKENIZER), Sampling(temperature=2)
    assert max(answer(model, model.prompt("def")[0], 30, options)) < VOCAB
    engine = Engine(model, slots=2)
    stream = engine.submit(Request(tokens=[0], max_tokens=5, n=2, logprobs=20, sampling=options))
    for token in (token for piece in stream for token in piece.tokens):
        assert all(number < VOCAB for number, _ in token.alternatives)


def test_a_checkpoint_says_what_ends_an_answer(tmp_path):
    write_model(make("gated").model, tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").stop_ids == {TOKENIZER.bos}
    for name, ids in (("config.json", 20), ("generation_config.json", [21, 22])):
        file = tmp_path / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ids}))
    assert load(tmp_path, device="cpu").stop_ids == {TOKENIZER.bos, 20, 21, 22}


def test_stop_ids():
    model = make("gated")
    ids = answer(model, model.prompt("def")[0], 30, Sampling(seed=1))
    ended = TextModel(model.model, TOKENIZER, stop_ids=[TOKENIZER.bos, ids[9]])
    assert answer(ended, model.prompt("def")[0], 30, Sampling(seed=1)) == ids[: ids.index(ids[9])]


def test_load(tmp_path):
    model = make("mixed")
    with whole_folder(tmp_path / "run/checkpoints/step-000003") as folder:
        write_model(model.model, folder, bos=TOKENIZER.bos)
        TOKENIZER.save(folder)
    wanted = model.generate("def", max_tokens=20, seed=1)
    assert load(tmp_path / "run", device="cpu").generate("def", max_tokens=20, seed=1) == wanted
    assert load(str(tmp_path / "run")).config == model.config
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        rounded = load(tmp_path / "run", device="cpu", dtype=name)
        assert {parameter.dtype for parameter in rounded.model.parameters()} == {dtype}
        model = make("mixed")
        model.model.to(dtype)
        wanted = model.generate("def", max_tokens=20, seed=1)
        assert rounded.generate("def", max_tokens=20, seed=1) == wanted
    with pytest.raises(InputError, match="dtype must be auto, float32, bfloat16, float16; got 'int8'"):
        load(tmp_path / "run", dtype="int8")
    (tmp_path / "run/checkpoints/step-000003/tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no readable tokenizer at .*tokenizer.json"):
        load(tmp_path / "run")


@pytest.mark.parametrize("blanks", ["", " ", "    ", "\t ", "  " * 9])
def test_blanks_at_the_end_of_a_prompt_belong_to_the_next_token(blanks):
    """What is generated, with the blanks that were given, is what follows the bare prompt."""
    model = make("gated")
    got = model.generate("def" + blanks, max_tokens=20, temperature=0)
    asked = [TOKENIZER.bos, *TOKENIZER.encode("def")]
    ids = answer(model, asked, 20, Sampling(temperature=0), blanks.encode())
    assert TOKENIZER.decode(ids) == blanks + got
    # Each token is the likeliest of those that fit what is still to come.
    left = blanks.encode()
    for number in ids:
        with torch.no_grad():
            logits = model.model(torch.tensor([asked]))[0, -1]
        for other in logits.argsort(descending=True).tolist():
            piece = TOKENIZER.token_bytes(other)
            if not left or (piece and (piece.startswith(left) or left.startswith(piece))):
                break
        assert other == number
        left = left[len(TOKENIZER.token_bytes(number)) :]
        asked.append(number)


@pytest.mark.parametrize(
    "begin", [b" ", b"    ", b" \t", b"x", "é".encode(), b" " * 500, b"def" + b" " * 500]
)
def test_what_fits(begin):
    """By its definition; looked up, not computed for each of n answers nor each length of a blank."""
    model = make("gated")
    pieces = map(TOKENIZER.token_bytes, range(TOKENIZER.vocab_size))
    wanted = [bool(p) and (p.startswith(begin) or begin.startswith(p)) for p in pieces]
    assert model.fitting(begin).tolist() == wanted
    assert model.fitting(begin) is model.fitting(begin)
    assert len(begin) < 500 or model.fitting(begin) is model.fitting(begin[:-1])


def test_a_prompt_of_blanks_only():
    assert isinstance(make("gated").generate("   ", max_tokens=5, temperature=0), str)
