"""A run that begins with the weights of another model: which model may, what it knows, and how it goes on."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from starlm.cli.eval import trained_on
from starlm.data.prepare import prepare
from starlm.data.shards import TokenData
from starlm.errors import InputError
from starlm.evaluate.bits_per_byte import evaluate
from starlm.generate.text import load
from starlm.model.folder import find_checkpoint, read_model_config
from starlm.train.config import TrainConfig
from starlm.train.loop import train
from starlm.train.run import read_config


@pytest.fixture
def base(config, tmp_path):
    """A run of 30 steps, which has learned something, and its last record."""
    return train(config(out=tmp_path / "base", steps=30, batch_tokens=128))


@pytest.fixture
def begun(config, tmp_path):
    """Makes settings of a run that begins where `base` ended."""

    def make(**changes):
        return config(**{"out": tmp_path / "next", "init_from": tmp_path / "base", **changes})

    return make


def records_of(settings, kind):
    records = map(json.loads, (settings.out / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def test_it_begins_with_what_the_other_has_learned(base, begun):
    settings = begun(steps=2)
    train(settings)
    first, last = records_of(settings, "validation")
    assert (first["step"], first["loss"]) == (0, base["loss"])
    assert last["step"] == 2
    assert records_of(settings, "step")[0]["loss"] < base["loss"] + 0.5


def test_rows_of_another_length(base, begun, data):
    settings = begun(steps=1, model__context=32)
    train(settings)
    model = load(settings.init_from)
    model.model.config = replace(model.config, context=32)
    split = TokenData.open(data).splits["validation"]
    expected = evaluate(model.model, split, model.tokenizer, max_tokens=64, precision="float32")
    assert records_of(settings, "validation")[0]["loss"] == expected["loss"]
    assert load(settings.out).config.context == 32


def test_a_width_that_is_said_is_the_one_that_follows(config, begun, tmp_path):
    train(config(out=tmp_path / "base", steps=1, model__dim=0, model__heads=0))
    end = train(begun(steps=1, model__dim=128, model__heads=8))
    assert end["step"] == 1


def test_it_goes_on_without_the_other(base, begun, tmp_path):
    straight = begun(out=tmp_path / "straight", save_every=2)
    train(straight)

    def crash(record):
        if record["kind"] == "step" and record["step"] == steps[0]:
            raise RuntimeError

    stopped, steps = begun(out=tmp_path / "stopped", save_every=2), [1, 5]
    while steps:
        with pytest.raises(RuntimeError):
            train(stopped, on_record=crash)
        del steps[0]
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    train(replace(stopped, init_from=tmp_path / "by/another/../../base"))
    assert read_config(stopped.out).init_from == stopped.init_from
    assert [record["step"] for record in records_of(stopped, "validation")] == [0, 8]
    one, other = (
        load_file(settings.out / "checkpoints/step-000008/model.safetensors")
        for settings in (straight, stopped)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_began_otherwise_does_not_begin_again(base, begun, config, tmp_path, monkeypatch):
    """Whether there is what is named, or not."""
    alone = config(out=tmp_path / "alone", steps=1)
    train(alone)
    for path in (tmp_path / "base", tmp_path / "nowhere"):
        with pytest.raises(
            InputError, match=r"alone holds a run that began with random weights.*another --out"
        ):
            train(replace(alone, steps=2, init_from=path))
    train(begun(steps=1))
    with pytest.raises(InputError, match=r"began with those of .*base, .* with those of .*alone\. Leave out"):
        train(begun(steps=2, init_from=tmp_path / "alone"))
    assert train(begun(steps=2, init_from=None))["step"] == 2
    # By a name that it has elsewhere.
    monkeypatch.chdir(tmp_path)
    train(begun(steps=1, out=Path("runs/u"), init_from=Path("base")))
    monkeypatch.chdir("runs")
    assert train(begun(steps=2, out=Path("u"), init_from=Path("../base")))["step"] == 2
    # Also after a session elsewhere, and where another thing has the name.
    (tmp_path / "else" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "else")
    assert train(begun(steps=3, out=Path("../runs/u"), init_from=Path("../base")))["step"] == 3


@pytest.mark.parametrize("out", ["RUN", "../run", "."])
def test_a_run_finds_its_data_whatever_folder_it_is_in(base, begun, data, tmp_path, monkeypatch, out):
    """Where `out` does not tell from where its paths were seen."""
    here = tmp_path / ("run" if out == "." else "here")
    here.mkdir()
    monkeypatch.chdir(here)
    paths = {"data": data, "init_from": tmp_path / "base"}
    near = {name: Path(os.path.relpath(path)) for name, path in paths.items()}
    train(begun(steps=1, out=tmp_path / "run" if out == "RUN" else Path(out), **near))
    monkeypatch.chdir(data)
    old = read_config(tmp_path / "run")
    assert (old.data.resolve(), old.init_from.resolve()) == (data.resolve(), tmp_path / "base")
    assert trained_on(tmp_path / "run").samefile(data)
    assert train(replace(old, out=tmp_path / "run", steps=2))["step"] == 2


def test_another_model(base, begun, data, tmp_path):
    with pytest.raises(InputError) as error:
        train(begun(model__depth=3, model__softcap=0.0))
    for words in ("model.depth is 2 there, 3 here", "model.softcap is 15.0 there, 0.0 here", "Leave"):
        assert words in str(error.value)
    # Nor is it a matter of the vocabulary, where all settings are the default's.
    settings = TrainConfig(init_from=tmp_path / "base", data=data, out=tmp_path / "next", steps=1)
    with pytest.raises(InputError, match=r"model.vocab_size is 300 there, 4096 here") as error:
        train(settings)
    assert not (tmp_path / "next").exists()
    # The cure of the message.
    folder = find_checkpoint(tmp_path / "base")
    assert f"model=starlm.model.folder.read_model_config(Path('{folder}'))" in str(error.value)
    assert train(replace(settings, model=replace(read_model_config(folder), context=32)))["step"] == 1


@pytest.mark.parametrize("vocab", [300, 290])
def test_another_tokenizer(base, begun, tmp_path, vocab):
    """Of as many tokens, too: the weights would load, and mean other tokens."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(8):
        lines = (f"total_{number}{line} = [number * {line} for number in range(100)]\n" for line in range(99))
        (text / f"{number}.py").write_text("".join(lines))
    prepare([text], tmp_path / "data", vocab_size=vocab, validation_fraction=0.2)
    with pytest.raises(InputError, match=r"tokenizer.*starlm data prepare \.\.\. --tokenizer .*base"):
        train(begun(data=tmp_path / "data"))
    prepare([text], tmp_path / "mine", tokenizer=tmp_path / "base", validation_fraction=0.2)
    assert train(begun(data=tmp_path / "mine"))["step"] == 8


def test_no_model_there_or_a_damaged_one(base, begun, tmp_path):
    with pytest.raises(InputError, match="There is no model at"):
        train(begun(init_from=tmp_path / "none"))
    weights = tmp_path / "base/checkpoints/step-000030/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        train(begun())
    assert not (tmp_path / "next").exists()
