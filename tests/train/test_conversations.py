"""Runs on conversations: what they learn, what they leave, and that they go on."""

import json

import numpy as np
import pytest
import torch

from starlm.data.conversations import Message
from starlm.data.prepare import prepare
from starlm.data.shards import TokenData
from starlm.generate.chat import answer, own_template, speaker
from starlm.generate.engine import Engine
from starlm.generate.sampling import Sampling
from starlm.generate.text import load
from starlm.model.folder import find_checkpoint, read_json
from starlm.train.config import OptimConfig
from starlm.train.loop import train
from starlm.train.run import read_config

NAMES = ["alpha", "beta", "gamma", "delta"]


@pytest.fixture(scope="module")
def talks(tmp_path_factory, data):
    """Prepared conversations in which the assistant repeats a word, with the tokenizer of `data`."""
    root = tmp_path_factory.mktemp("talks")
    lines = []
    for number in range(60):
        name = NAMES[number % 4]
        turns = [("user", f"def {name} {number}?"), ("assistant", name)] * (1 + number % 2)
        lines.append(json.dumps([{"role": role, "content": content} for role, content in turns]))
    (root / "talks.jsonl").write_text("\n".join(lines))
    prepare([root / "talks.jsonl"], root / "data", tokenizer=data)
    return root / "data"


@pytest.fixture
def settings(config, talks, tmp_path):
    """Makes settings of a run on conversations."""

    def make(**changes):
        values = {"data": talks, "out": tmp_path / "talk", "model__context": 64, "batch_tokens": 256}
        return config(**{**values, "model__layers": "D", "model__heads": 8, **changes})

    return make


def config_of(folder):
    return read_json(find_checkpoint(folder) / "config.json")


def records_of(folder, kind):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def test_it_learns_to_answer_and_says_so(settings):
    one = settings(steps=80, sample_prompts=("def beta 7?",), model__dim=64)
    end = train(one)
    assert config_of(one.out)["chat"] is True
    model = speaker(load(one.out))
    said = answer(
        Engine(model, slots=1),
        [Message("user", "def gamma 2?")],
        render=own_template(model.tokenizer),
        max_tokens=20,
        sampling=Sampling(temperature=0),
    )
    assert "".join(piece.text for piece in said) == "gamma"
    assert [record["text"] for record in records_of(one.out, "sample")] == ["beta"]
    # All that is held out is the answers, and what ends them.
    assert end["validation_tokens"] == end["validation_split_tokens"]
    assert end["loss"] < 0.1


def test_the_loss_is_that_of_the_answers_each_behind_its_own_conversation(settings, talks):
    one = settings(steps=20, eval_tokens=0)
    end = train(one)
    model = load(one.out).model
    split, nats, count = TokenData.open(talks).splits["validation"], 0.0, 0
    for number, size in enumerate(split.document_lengths()):
        tokens, learned = np.empty((1, size), np.int64), np.empty(size, bool)
        split.read(number, 0, int(size), tokens[0])
        split.read_learned(number, 0, int(size), learned)
        with torch.inference_mode():
            logits = model(torch.from_numpy(tokens))[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[0, 1:]), reduction="none")
        nats += losses[torch.from_numpy(learned[1:])].sum().item()
        count += int(learned.sum())
    assert count == end["validation_tokens"]
    assert end["loss"] == pytest.approx(nats / count, rel=1e-5)


def test_a_run_that_goes_on_is_the_same(settings, tmp_path):
    optim = OptimConfig(warmdown=0.0, matrix_lr=0.02)
    straight = train(settings(steps=6, out=tmp_path / "straight", optim=optim))
    train(settings(steps=3, optim=optim))
    again = train(settings(steps=6, optim=optim))
    assert again["loss"] == straight["loss"]
    assert config_of(tmp_path / "talk")["chat"] is True


def test_what_has_learned_to_talk_keeps_that_in_mind(settings, config, data, tmp_path):
    train(settings(steps=1))
    more = {"data": data, "init_from": tmp_path / "talk", "model__context": 64, "batch_tokens": 256}
    more |= {"model__layers": "D", "model__heads": 8, "out": tmp_path / "more"}
    train(config(**more, steps=1))
    assert config_of(tmp_path / "more")["chat"] is True
    # And behind a restart, which does not look at the model that it began from.
    train(config(**more, steps=2))
    assert config_of(tmp_path / "more")["chat"] is True


def test_texts_alone_are_no_chat(config, tmp_path):
    train(config(steps=1))
    assert config_of(tmp_path / "run")["chat"] is False


@pytest.mark.parametrize("micro_rows", [1, 2])
def test_parts_of_a_batch_make_no_difference(settings, tmp_path, micro_rows):
    whole = train(settings(steps=3, out=tmp_path / "whole"))
    parts = train(settings(steps=3, micro_rows=micro_rows))
    torch.testing.assert_close(parts["loss"], whole["loss"], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("epochs", "of_talks"), [(2.0, True), (0.5, True), (1.0, False)])
def test_a_horizon_in_epochs(settings, config, talks, data, epochs, of_talks):
    one = (settings if of_talks else config)(steps=None, epochs=epochs, eval_tokens=64)
    split = TokenData.open(one.data).splits["train"]
    if of_talks:
        # Rows of 64 tokens: what the conversations need at least, and little more.
        assert split.num_tokens <= one.epoch_tokens() <= 1.1 * split.num_tokens + 64
    else:
        assert one.epoch_tokens() == split.num_tokens
    end = train(one)
    assert end["step"] == round(epochs * one.epoch_tokens() / one.batch_tokens) == one.num_steps
    (plan,) = records_of(one.out, "plan")
    assert plan["epochs"] == end["tokens"] / one.epoch_tokens()
    # It stays one: of data that were prepared anew before the first checkpoint it means these.
    assert read_config(one.out).epochs == epochs
