"""starlm tokenizer train and show."""

import io
import sys
from pathlib import Path

import pytest

from starlm.cli.tokenizer import visible
from starlm.data.tokenizer import Tokenizer


def test_train_then_show(command):
    Path("text").mkdir()
    Path("text/a.txt").write_text("the cat and the hat and the bat\n" * 20)
    done = command("tokenizer", "train", "text", "--out", "t.json", "--vocab-size", "275", "--json")
    assert done.code == 0, done.err
    assert (done.json["vocab_size"], done.json["documents"]) == (275, 1)
    shown = command("tokenizer", "show", "the rat\n", "--tokenizer", "t.json", "--json")
    ids = Tokenizer.load("t.json").encode("the rat\n")
    assert shown.json["ids"] == ids
    assert "".join(shown.json["tokens"]) == "the·rat↵"
    assert shown.json["bytes_per_token"] == 8 / len(ids)
    assert "the│" in shown.err


def test_train_without_text_keeps_the_one_that_is_there(command):
    Path("empty.txt").write_text(" \n")
    Path("t.json").write_text("as it was")
    done = command("tokenizer", "train", "empty.txt", "--out", "t.json", "--vocab-size", "300")
    assert (done.code, done.out) == (2, "")
    assert "There is no text in empty.txt: every document is empty. Name other sources." in done.err
    assert Path("t.json").read_text() == "as it was"


def test_train_reads_nothing_for_a_vocabulary_that_cannot_be(command):
    done = command("tokenizer", "train", "nowhere", "--vocab-size", "100")
    assert (done.code, "vocab_size must be at least 265" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("name", "what", "out"),
    [
        ("meta.json", "prepared data", "data"),
        ("meta.json", "prepared data", "data/new.json"),
        ("run.toml", "a run", "data"),
        ("config.json", "a checkpoint", "data/"),
        ("config.json", "a checkpoint", "link.json"),
        ("adapter_config.json", "a checkpoint", "data"),
        ("pytorch_model-00001-of-00002.bin", "a checkpoint", "data"),
    ],
)
def test_train_spoils_no_folder(command, out, name, what):
    Path("data").mkdir()
    Path("data", name).write_text('{"model_type": "llama"}')
    Path("data/tokenizer.json").write_text("as it was")
    Path("link.json").symlink_to(Path("data/tokenizer.json").absolute())
    done = command("tokenizer", "train", "nowhere", "--out", out)
    assert done.code == 2
    assert f"is not written: its folder holds {what} ({name})" in " ".join(done.err.split())
    assert Path("data/tokenizer.json").read_text() == "as it was"
    assert len(list(Path("data").iterdir())) == 2


@pytest.mark.parametrize("text", ["{}", "[1]", "// a comment\n{}", "{"])
def test_train_beside_a_config_of_something_else(command, text):
    Path("text.txt").write_text("one two\n" * 50)
    Path("config.json").write_text(text)
    done = command("tokenizer", "train", "text.txt", "--vocab-size", "265")
    assert done.code == 0, done.err
    # Weights make it a checkpoint, whatever config.json says.
    Path("model.safetensors").touch()
    done = command("tokenizer", "train", "text.txt", "--vocab-size", "265")
    assert (done.code, "a checkpoint (model.safetensors)" in " ".join(done.err.split())) == (2, True)


def test_train_into_a_folder(command):
    Path("text.txt").write_text("one two\n" * 50)
    Path("there").mkdir()
    for out in ("there", "new/toks/"):
        done = command("tokenizer", "train", "text.txt", "--out", out, "--vocab-size", "265")
        assert done.code == 0, done.err
        assert Tokenizer.load(Path(out, "tokenizer.json")).vocab_size == 265


def test_show_reads_stdin(command, monkeypatch):
    Tokenizer.train(["abc"], 265).save(Path("t.json").absolute())
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab"))
    assert command("tokenizer", "show", "--tokenizer", "t.json", "--json").json["tokens"] == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    done = command("tokenizer", "show", "--tokenizer", "t.json")
    assert (done.code, done.err) == (2, "error: stdin is not UTF-8 text: at byte 3. Convert it.\n")
    monkeypatch.setattr(sys, "stdin", None)
    assert "Give a text" in command("tokenizer", "show", "--tokenizer", "t.json").err


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        (b" a", "·a"),
        (b"\n\t", "↵→"),
        (b"\xc3", "\\xc3"),
        ("é".encode(), "é"),
        (b"\x1b", "\\x1b"),
        (b"\0", "\\x00"),
    ],
)
def test_visible(piece, text):
    assert visible(piece) == text
