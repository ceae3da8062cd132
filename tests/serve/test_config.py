"""Which folders `--model` means, and what they are called."""

from pathlib import Path

import pytest

from starlm.errors import InputError
from starlm.serve.config import ServeOptions


@pytest.mark.parametrize(
    ("word", "name", "folder"),
    [
        ("runs/lr=0.02", "lr=0.02", "runs/lr=0.02"),
        ("lr=0.02", "lr=0.02", "lr=0.02"),
        ("fast=lr=0.02", "fast", "lr=0.02"),
        ("fast=runs/lr=0.02", "fast", "runs/lr=0.02"),
        ("fast=runs/a b", "fast", "runs/a b"),
        # None of these is there: of two ways to read it the one that is told to be missing.
        ("lr=0.03", "lr", "0.03"),
        ("runs/lr=0.03", "lr=0.03", "runs/lr=0.03"),
    ],
)
def test_names_of_models(tmp_path, monkeypatch, word, name, folder):
    monkeypatch.chdir(tmp_path)
    for path in ("lr=0.02", "runs/lr=0.02", "runs/a b"):
        Path(path).mkdir(parents=True)
    assert ServeOptions(model=(word,)).models == {name: Path(folder)}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["runs/a b"], "got 'a b'. Write NAME=RUN: --model 'NAME=runs/a b'."),
        (["a b=runs/x"], "got 'a b'. Write NAME=RUN: --model NAME=runs/x."),
        (["=runs/x"], "got ''. Write NAME=RUN: --model NAME=runs/x."),
        (["runs/x", "x=other"], "Two models are called 'x'. Name them: --model NAME=other."),
    ],
    ids=str,
)
def test_names_that_are_none(words, part):
    with pytest.raises(InputError) as error:
        ServeOptions(model=tuple(words))
    assert part in str(error.value)
