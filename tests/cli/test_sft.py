"""starlm sft, from conversations to a model that answers."""

import json
import shlex
from pathlib import Path

import pytest
from runs import write_model_folder

from starlm.model.folder import find_checkpoint, read_json


@pytest.fixture
def folder(command, tmp_path):
    """An empty folder with a model, `base`, and 20 conversations, `talks.jsonl`; the command runs there."""
    write_model_folder(tmp_path / "base", context=64)
    talk = [{"role": "user", "content": "f(x)?"}, {"role": "assistant", "content": "return x"}]
    long = [{"role": "user", "content": "x" * 30}, {"role": "assistant", "content": "y" * 90}]
    lines = [json.dumps({"messages": long if number == 3 else talk}) for number in range(20)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def prepared(command, folder):
    done = command("data", "prepare", "talks.jsonl", "--tokenizer", "base", "--out", "data/chat")
    assert done.code == 0, done.err
    return done


def config_of(out):
    return read_json(find_checkpoint(Path(out)) / "config.json")


def test_from_conversations_to_a_model_that_answers(command, prepared):
    assert "learned" in prepared.out
    *_, following = prepared.out.strip().splitlines()
    assert following == "Next: starlm sft --init-from base --data data/chat --out runs/chat"
    assert config_of("base")["chat"] is False
    done = command(*shlex.split(following)[2:], "--steps", "2", "--json")
    assert done.code == 0, done.err
    assert "1 of 18 conversations are longer than the model's context of 64 tokens" in done.err
    assert "step 0: validation loss" in done.err
    assert "Next: starlm chat --model runs/chat   or   starlm report runs/chat" in done.err
    assert done.json["step"] == 2
    assert config_of("runs/chat")["chat"] is True
    # On where it was, with nothing but its place.
    again = command("sft", "--out", "runs/chat", "--steps", "3", "--json")
    assert again.code == 0, again.err
    assert again.json["step"] == 3


def test_the_model_is_that_of_the_beginning_and_the_horizon_three_epochs(command, prepared):
    done = command("sft", "--init-from", "base", "--dry-run", "--json")
    assert done.code == 0, done.err
    config, plan = done.json["config"], done.json["plan"]
    # Of so few, one row at a time.
    assert (config["model"]["dim"], config["model"]["context"], config["batch_tokens"]) == (32, 64, 64)
    assert config["optim"]["matrix_lr"] < 0.02
    assert plan["epochs"] == 3
    assert plan["steps"] > 10


def test_of_long_conversations_only_their_beginnings_count(command, folder):
    turns = [{"role": "user", "content": "f(x)?"}, {"role": "assistant", "content": "y" * 2000}]
    (folder / "long.jsonl").write_text("\n".join(json.dumps(turns) for _ in range(20)))
    assert command("data", "prepare", "long.jsonl", "--tokenizer", "base", "--out", "long").code == 0
    done = command("sft", "--init-from", "base", "--data", "long", "--dry-run", "--json")
    assert done.json["plan"]["steps"] > 40


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Name its run or checkpoint folder: --init-from RUN"),
        (["--init-from", "base", "--data", "texts"], "texts holds texts. Fine-tuning needs conversations"),
        (["--init-from", "base", "--data", "nothing"], "There is no prepared data in nothing"),
        (["--init-from", "nothing"], "There is no model at nothing"),
    ],
)
def test_what_it_cannot_begin_with_is_named(command, prepared, folder, words, said):
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"Text {number}.")
    assert (
        command("data", "prepare", "0.txt", "1.txt", "2.txt", "--tokenizer", "base", "--out", "texts").code
        == 0
    )
    done = command("sft", *words)
    assert done.code == 2
    assert said in done.err
    assert not Path("runs/chat").exists()


def test_conversations_without_a_model_say_what_to_do(command, folder):
    done = command("data", "prepare", "talks.jsonl", "--out", "data/chat", "--vocab-size", "265")
    assert done.code == 0, done.err
    assert "--tokenizer RUN" in done.out
    assert "Next" not in done.out
