"""starlm inspect, with a real model."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from runs import write_model_folder

TEXT = "def f(x):\n    return x\ndef f(x):\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("inspect") / "m", layers="DA")


def test_page_picture_and_data(command, model):
    """The page holds the numbers that --json gives, which are those of the function."""
    from starlm.evaluate.reads import reads
    from starlm.generate.text import load

    done = command(
        "inspect", "--model", model, "--text", TEXT, "--out", "a/b.html", "--png", "a/b.png", "--json"
    )
    assert done.code == 0, done.err
    assert Path("a/b.png").stat().st_size > 10_000
    text_model = load(model)
    tokens = text_model.tokenizer.encode(TEXT, bos=True)
    found = reads(text_model.model, tokens)
    assert done.json["num_tokens"] == len(tokens) == done.json["token"] + 1
    assert done.json["texts"]["0"] == "<|bos|>"
    assert done.json["heads"][3]["rows"] == json.loads(json.dumps(found.heads[3].rows))
    embedded = json.loads(re.search(r'id="data">(.*?)</script>', Path("a/b.html").read_text(), re.DOTALL)[1])
    assert embedded["heads"] == done.json["heads"]
    assert Path("a/b.html").stat().st_size > 10_000
    assert "Layers left out, because they choose no rows: 1 (attention)" in done.err
    assert re.search(r"^1 +trigram +1 ", done.err, re.MULTILINE)


@pytest.mark.parametrize(("token", "begin"), [(0, 0), (5, 3), (None, None)])
def test_what_is_drawn_lies_around_the_token(command, model, token, begin):
    chosen = [] if token is None else ["--token", token]
    done = command("inspect", "--model", model, "--text", TEXT, "--draw", "4", *chosen, "--json")
    last = done.json["num_tokens"]
    assert (done.json["begin"], done.json["end"]) == (
        (begin, begin + 4) if token is not None else (last - 4, last)
    )
    assert f"4 of {last} tokens are shown" in Path("inspect.html").read_text()
    rows = {row for head in done.json["heads"] for rows in head["rows"] for row, _ in rows}
    assert {str(row) for row in rows} <= done.json["texts"].keys()


def test_a_model_whose_layers_choose_no_rows(command, tmp_path):
    other = write_model_folder(tmp_path / "other", layers="A")
    done = command("inspect", "--model", other, "--text", TEXT, "--png", "a.png", "--json")
    assert (done.code, done.json["png"], done.json["heads"]) == (0, None, [])
    assert "a.png was not written: a picture is of Deformer layers, and there are none." in done.err
    assert "median" not in done.err
    assert not Path("a.png").exists()


def test_text_from_stdin_or_a_file(command, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    piped = command("inspect", "--model", model, "--json").json
    Path("t.txt").write_text(TEXT)
    assert command("inspect", "--model", model, "--prompt-file", "t.txt", "--json").json == piped


def test_an_empty_text_is_its_beginning(command, model):
    done = command("inspect", "--model", model, "--text", "", "--json")
    assert (done.code, done.json["num_tokens"], done.json["texts"]) == (0, 1, {"0": "<|bos|>"})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--text", "a", "--prompt-file", "b"), "Give the text once: --text or --prompt-file."),
        (("--text", "a", "--draw", "0"), "draw must be 1 or more; got 0"),
        (("--text", "a", "--token", "2"), "token must lie between 0 and 1, the text's last token; got 2"),
        (("--text", "a", "--token", "-1"), "got -1"),
        (("--text", "a", "--out", "a.txt"), "must end in .html; got a.txt"),
        (("--text", "a", "--png", "a.jpg"), "must end in .png; got a.jpg"),
        (("--prompt-file", "none"), "Cannot read the prompt none: No such file"),
        (("--text", "a", "--model", "none"), "There is no model at none"),
    ],
)
def test_errors(command, model, words, says):
    done = command("inspect", "--model", model, *words)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert says in done.err
    assert not list(Path().iterdir())


def test_without_a_text(command, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    done = command("inspect", "--model", model)
    assert done.code == 2
    assert 'Give a prompt: --text "def ", --prompt-file FILE, or pipe one in.' in done.err
