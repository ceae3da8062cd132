"""Conversations: to tokens and to text, from files, and answers of real models."""

import json

import pytest
import torch
from models import make_model
from talks import SOURCE, TALK
from tokenizers import Tokenizer as Library

from starlm.data.conversations import Message
from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError
from starlm.generate.chat import (
    ENDS,
    TEMPLATE,
    answer,
    as_text,
    read_conversation,
    renderer,
    speaker,
    write_conversation,
)
from starlm.generate.engine import Engine
from starlm.generate.sampling import Sampling
from starlm.generate.template import by_template
from starlm.generate.text import TextModel
from starlm.train.config import OptimConfig, TrainConfig
from starlm.train.optim import Optimizers
from starlm.train.run import Run


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["Be brief.\n\n\nHi Hello Bye."] * 3, 280)


@pytest.fixture
def model(tokenizer):
    return TextModel(make_model("star", dtype=torch.float32, vocab_size=tokenizer.vocab_size), tokenizer)


def engine_of(model):
    return Engine(speaker(model), slots=1)


def test_renderer(tmp_path, tokenizer):
    assert renderer(tmp_path, tokenizer) is None
    (tmp_path / TEMPLATE).write_text(SOURCE)
    (tmp_path / "config.json").write_text('{"chat": false}')
    assert renderer(tmp_path, tokenizer) is None
    assert renderer(tmp_path, tokenizer, "template") is not None
    (tmp_path / "config.json").write_text('{"chat": true}')
    assert renderer(tmp_path, tokenizer, "plain") is None
    found = renderer(tmp_path, tokenizer)
    assert found is not None
    assert found(TALK) == by_template(SOURCE, tokenizer)(TALK)
    (tmp_path / TEMPLATE).write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"Cannot read .*chat_template\.jinja"):
        renderer(tmp_path, tokenizer)
    (tmp_path / TEMPLATE).write_text("{{")
    with pytest.raises(InputError, match=r"chat_template\.jinja: The chat template is not valid"):
        renderer(tmp_path, tokenizer)


@pytest.mark.parametrize("end", ["<|im_end|>", "<im_end>"])
def test_a_template_with_tokens_of_its_own(tmp_path, tokenizer, end):
    """As `clone_chat_template` of TRL leaves one, here in the tokenizer's settings."""
    inner = Library.from_str(tokenizer._inner.to_str())
    inner.add_special_tokens([end])
    grown = Tokenizer(inner)
    source = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    settings = {"bos_token": {"content": "<|user_start|>"}, "eos_token": end, "chat_template": source}
    (tmp_path / "config.json").write_text('{"chat": true}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    render = renderer(tmp_path, grown)
    assert render is not None
    text = f"Hi <b {end}"
    wanted = [grown.special["<|user_start|>"], *grown.encode(text), grown.special[end]]
    assert render([Message("user", text)]) == wanted


def test_a_chat_model_without_a_template(tmp_path, tokenizer):
    (tmp_path / "config.json").write_text('{"chat": true}')
    for style in ("auto", "template"):
        with pytest.raises(InputError, match=r"has no chat template.*take --conversation plain"):
            renderer(tmp_path, tokenizer, style)
    assert renderer(tmp_path, tokenizer, "plain") is None


def test_templates_by_name(tmp_path, tokenizer):
    several = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    render = renderer(tmp_path, tokenizer, "template")
    assert render is not None
    assert render([Message("user", "Hi")]) == tokenizer.encode("Hi")


def test_plain_needs_no_settings(tmp_path, tokenizer):
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert renderer(tmp_path, tokenizer, "plain") is None


def test_as_text():
    assert as_text(TALK) == "Be brief.\n\nHiHello\nBye"
    assert as_text([Message("user", "a\n"), Message("assistant", "b\n"), Message("user", "c ")]) == "a\nb\nc "


def spoken(pieces):
    return "".join(piece.text for piece in pieces)


def test_answers_continue_the_text(model):
    sampling = Sampling(seed=4, temperature=0.7)
    got = spoken(answer(engine_of(model), TALK, render=None, max_tokens=12, sampling=sampling))
    assert got == model.generate("Be brief.\n\nHiHello\nBye", max_tokens=12, seed=4, temperature=0.7)


def test_answers_after_a_template(model, monkeypatch):
    """They end where the turn does, whole characters at a time."""
    tokenizer, render = model.tokenizer, by_template(SOURCE, model.tokenizer)
    euro = tokenizer.encode("€")
    assert len(euro) == 3

    def said(*tokens):
        script = iter(tokens)
        monkeypatch.setattr("starlm.generate.engine.choose", lambda logits, samplers: [next(script)])
        pieces = answer(engine_of(model), TALK, render=render, max_tokens=len(tokens), sampling=Sampling())
        return [piece.text for piece in pieces]

    for end in ("<|assistant_end|>", "<|user_start|>"):
        got = said(*tokenizer.encode("Hi"), *euro, tokenizer.special[end], 260, 261)
        assert "".join(got) == "Hi€"
        assert all(piece in ("", "H", "i", "Hi", "€") for piece in got)
    assert "".join(said(*euro[:2])) == "\ufffd"


def test_answers_after_a_template_are_the_models(model):
    """They go on from the rendered tokens."""
    tokenizer, render = model.tokenizer, by_template(SOURCE, model.tokenizer)
    with torch.inference_mode():
        tokens = render(TALK)
        for _ in range(9):
            tokens.append(int(model.model(torch.tensor([tokens]))[0, -1].argmax()))
    new = tokens[-9:]
    assert not {tokenizer.bos, *(tokenizer.special[name] for name in ENDS)} & set(new)
    greedy = Sampling(temperature=0)
    got = spoken(answer(engine_of(model), TALK, render=render, max_tokens=9, sampling=greedy))
    assert got == tokenizer.decode(new)


def test_a_turn_reads_on_where_the_one_before_ended(model):
    render, engine = by_template(SOURCE, model.tokenizer), engine_of(model)
    talk, sampling = [Message("user", "Be brief. " * 20)], Sampling(temperature=0)
    for turn in range(3):
        before = engine.stats()
        got = spoken(answer(engine, talk, render=render, max_tokens=6, sampling=sampling))
        fresh = answer(engine_of(model), talk, render=render, max_tokens=6, sampling=sampling)
        assert got == spoken(fresh)
        cached = engine.stats().cached_tokens - before.cached_tokens
        asked = engine.stats().prompt_tokens - before.prompt_tokens
        # What an untrained model said may be other tokens when it is read again.
        assert (cached == 0) if turn == 0 else (asked - cached < 30 and cached > 80)
        talk += [Message("assistant", got), Message("user", "Bye")]


def test_who_stops_listening_frees_the_slot(model):
    engine = engine_of(model)
    pieces = answer(engine, TALK, render=None, max_tokens=100, sampling=Sampling())
    next(pieces)
    assert engine.stats().used_slots == 1
    pieces.cancel()
    assert engine.stats().used_slots == 0
    assert spoken(answer(engine, TALK, render=None, max_tokens=3, sampling=Sampling(temperature=0)))


def test_files_come_back(tmp_path):
    path = tmp_path / "talk.json"
    talk = [*TALK, Message("assistant", '\u00e9\n"\\')]
    write_conversation(path, talk)
    assert read_conversation(path) == talk
    path.write_text(json.dumps([{"role": "user", "content": "a", "name": "x"}]))
    assert read_conversation(path) == [Message("user", "a")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("3", 'needs "messages"'),
        ('{"messages": {}}', 'needs "messages"'),
        ('["a"]', "message 1 must be an object .* got 'a'"),
        ('[{"role": "tool", "content": "a"}]', "message 1 needs"),
        ('[{"role": "user", "content": 3}]', "message 1 needs"),
        ('[{"role": ["user"], "content": "a"}]', "message 1 needs"),
        ('[{"role": "assistant", "content": "a"}]', "message 1 must be of the user, and is of the assistant"),
        (
            '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]',
            "2 must be of the assistant",
        ),
        ('[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]', "and is of the system"),
        ('[{"role": "user", "content": "\\ud800"}]', "message 1 has half of a surrogate pair"),
    ],
)
def test_files_that_are_no_conversation(text, says, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        read_conversation(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_conversation(tmp_path / "none.json")
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not JSON"):
        read_conversation(tmp_path / "a")


def test_what_training_writes_is_a_base_model(tmp_path, model):
    """It has seen no conversation, so no chat template may say that it has."""
    run = Run(TrainConfig(out=tmp_path / "run", data=tmp_path, model=model.config))
    run.folder.mkdir()
    run.record({"kind": "plan"})
    saved = run.save(1, model.model, Optimizers(model.model, OptimConfig()), model.tokenizer, {})
    assert renderer(saved, model.tokenizer) is None
