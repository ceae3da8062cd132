import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError, StarLMError
from starlm.model.checkpoint import load_model
from starlm.model.folder import verify
from starlm.model.model import StarLM
from starlm.settings import from_dict, read_toml
from starlm.train.config import TrainConfig
from starlm.train.optim import Optimizers
from starlm.train.run import FREE, Run, read_config

# A process number above what any system gives out.
DEAD = 2**22 + 1


@pytest.fixture
def parts(config, data):
    """Settings, model, optimizers after a step, and tokenizer."""
    settings = config()
    model = StarLM(settings.model)
    optimizers = Optimizers(model, settings.optim)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step(0, 10)
    return settings, model, optimizers, Tokenizer.load(data)


def begun(parts, step=0):
    settings, _, _, tokenizer = parts
    run = Run(settings)
    run.begin(tokenizer, step, run.config.num_steps)
    return run


def save(run, step, parts, **extra):
    _, model, optimizers, tokenizer = parts
    return run.save(step, model, optimizers, tokenizer, extra)


def names(folder):
    return sorted(os.listdir(folder))


def test_a_run_folder_holds_all_that_it_needs(parts):
    run = begun(parts)
    save(run, 3, parts, seconds=1.5)
    assert names(run.folder) == ["checkpoints", "metrics.jsonl", "run.toml", "tokenizer.json"]
    assert read_config(run.folder) == parts[0]
    assert from_dict(TrainConfig, read_toml(run.folder / "run.toml"), where="x") == parts[0]
    assert Tokenizer.load(run.folder).fingerprint == parts[3].fingerprint
    assert names(run.folder / "checkpoints" / "step-000003") == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "modeling_starlm.py",
        "optimizer.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer.json",
    ]
    verify(run.folder / "checkpoints" / "step-000003", training=True)


def test_what_was_saved_comes_back(parts):
    settings, model, optimizers, _ = parts
    run = begun(parts)
    assert run.last_step() == 0
    save(run, 3, parts, seconds=1.5)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step(1, 10)
    save(run, 12, parts, seconds=2.5)
    assert run.last_step() == 12
    fresh = StarLM(settings.model)
    fresh_optimizers = Optimizers(fresh, settings.optim)
    assert Run(settings).load(fresh, fresh_optimizers) == {"step": 12, "seconds": 2.5}
    for (name, one), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert optimizers.tensors().keys() == fresh_optimizers.tensors().keys()
    for key, value in optimizers.tensors().items():
        assert torch.equal(value, fresh_optimizers.tensors()[key]), key


def test_beginning_again_drops_what_will_be_done_again(parts):
    run = begun(parts)
    for record in (
        {"kind": "plan", "step": 0},
        *({"kind": "step", "step": step} for step in (1, 2, 3)),
        {"kind": "validation", "step": 2},
        {"kind": "end", "step": 2},
    ):
        run.record(record)
    with (run.folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "st')
    assert len(run.records()) == 6
    (run.folder / "checkpoints" / f".step-000003.partial-{DEAD}").mkdir(parents=True)
    (run.folder / "checkpoints" / ".step-000001.removed").mkdir()
    (run.folder / f".run.toml.partial-{DEAD}").write_text("half")
    begun(parts, step=2)
    assert [(r["kind"], r["step"]) for r in run.records()] == [
        ("plan", 0), ("step", 1), ("step", 2), ("validation", 2)
    ]  # fmt: skip
    assert names(run.folder / "checkpoints") == []
    assert names(run.folder) == ["checkpoints", "metrics.jsonl", "run.toml", "tokenizer.json"]
    run.record({"kind": "step", "step": 3})
    assert json.loads((run.folder / "metrics.jsonl").read_bytes().splitlines()[-1]) == {
        "kind": "step",
        "step": 3,
    }


def test_only_the_last_checkpoints_are_kept(parts):
    run = begun(parts)
    for step in (1, 2, 10, 9):
        save(run, step, parts)
    assert names(run.folder / "checkpoints") == ["step-000009", "step-000010"]
    # Beyond a million, names no longer sort as numbers do.
    save(run, 1_000_000, parts)
    save(run, 999_999, parts)
    assert names(run.folder / "checkpoints") == ["step-1000000", "step-999999"]
    assert run.last_step() == 1_000_000


@pytest.mark.parametrize("left", [["run.toml"], ["run.toml", "tokenizer.json"], [".run.toml.partial-1"], []])
def test_a_run_killed_while_it_began_can_begin_again(parts, left):
    run = begun(parts)
    (run.folder / ".run.toml.partial-1").write_text("half")
    for path in run.folder.iterdir():
        if path.name not in left:
            path.unlink() if path.is_file() else path.rmdir()
    begun(parts)
    assert set(names(run.folder)) >= {"metrics.jsonl", "run.toml", "tokenizer.json"}


@pytest.mark.parametrize("at", ["write_whole", "Tokenizer.save"])
def test_a_run_killed_before_a_file_of_its_beginning_can_begin_again(parts, monkeypatch, at):
    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"starlm.train.run.{at}", crash)
    with pytest.raises(KeyboardInterrupt):
        begun(parts)
    monkeypatch.undo()
    begun(parts)


def test_a_full_disk_is_named_when_a_record_does_not_fit(parts):
    run = begun(parts)
    (run.folder / "metrics.jsonl").unlink()
    (run.folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StarLMError, match=r"The disk is full: .*metrics\.jsonl"):
        run.record({"kind": "step", "step": 1})


OTHER = {
    "data": Path("elsewhere"), "steps": 9, "eval_every": 9, "eval_tokens": 9, "sample_every": 9,
    "sample_prompts": ("x",), "save_every": 9, "keep": 9, "workers": 9, "cuda_graph": False, "micro_rows": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_some_settings_may_change(parts, name):
    save(begun(parts), 3, parts)
    assert name in FREE
    Run(replace(parts[0], **{name: OTHER[name]}))


def test_all_settings_may_change_while_nothing_was_kept(parts):
    run, other = begun(parts), replace(parts[0], seed=1)
    Run(other)
    save(run, 3, parts)
    with pytest.raises(InputError, match="seed was 0, is 1"):
        Run(other)


def test_a_run_folder_may_be_moved(parts, tmp_path):
    save(begun(parts), 3, parts)
    parts[0].out.rename(tmp_path / "moved")
    Run(replace(parts[0], out=tmp_path / "moved"))


def test_damaged_settings_are_named(parts):
    run = begun(parts)
    for content, part in (
        ("steps = ", "not valid TOML"),
        ("stepz = 3", "Unknown key 'stepz'"),
        ("steps = 'x'", "steps"),
    ):
        (run.folder / "run.toml").write_text(content)
        with pytest.raises(InputError, match=r"run\.toml") as caught:
            Run(parts[0])
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "trainer.json", "tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_is_not_taken_over(parts, file, damage):
    _, model, optimizers, _ = parts
    run = begun(parts)
    path = save(run, 3, parts) / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-1] if damage == "truncated" else content)
    with pytest.raises(InputError, match=r"step-000003 cannot be used.*: .*delete this folder") as caught:
        run.load(model, optimizers)
    assert file in str(caught.value)


def test_a_model_alone_does_not_go_on(parts):
    _, model, optimizers, _ = parts
    run = begun(parts)
    folder = save(run, 3, parts)
    # With the manifest or without.
    for file in ("optimizer.safetensors", "manifest.json"):
        (folder / file).unlink()
        with pytest.raises(InputError, match=r"go on: optimizer.safetensors is missing.*another --out"):
            run.load(model, optimizers)
        load_model(run.folder)


def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before(parts, monkeypatch):
    run = begun(parts)
    save(run, 3, parts)
    before = {p: p.read_bytes() for p in run.folder.rglob("*.*") if p.is_file()}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("starlm.train.run.save_tensors", full)
    with pytest.raises(StarLMError, match=r"The disk is full: .*step-000004 could not be written"):
        save(run, 4, parts)
    assert {p: p.read_bytes() for p in run.folder.rglob("*.*") if p.is_file()} == before
    assert names(run.folder / "checkpoints") == ["step-000003"]
