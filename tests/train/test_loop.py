import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from starlm.data.prepare import prepare
from starlm.data.shards import TokenData
from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError, StarLMError
from starlm.evaluate.bits_per_byte import evaluate
from starlm.generate.text import load
from starlm.model.model import StarLM
from starlm.nn.mlp import MLP
from starlm.train import loop
from starlm.train import run as run_module
from starlm.train.loop import Interrupted, train
from starlm.train.run import Run, read_config


def records_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run):
    return {record["step"]: record["loss"] for record in records_of(run) if record["kind"] == "step"}


def weights_of(run, step):
    return load_file(run / "checkpoints" / f"step-{step:06}" / "model.safetensors")


def stop_at(step, action):
    """Something for `on_record` that acts at a step."""

    def on_record(record):
        if record["kind"] == "step" and record["step"] == step:
            action()

    return on_record


class Crash(Exception):
    pass


def crash():
    raise Crash


def test_the_loss_falls(config):
    heard = []
    settings = config(steps=40, batch_tokens=128, eval_every=20, save_every=15, sample_prompts=("def ",))
    end = train(settings, on_record=heard.append)
    assert heard == records_of(settings.out)
    assert heard[0]["kind"] == "plan"
    assert (heard[0]["steps"], heard[0]["resumed"]) == (40, False)
    split = TokenData.open(settings.data).splits["train"]
    assert heard[0]["epochs"] == end["tokens"] / split.num_tokens
    assert heard[0]["model"] == {"dim": settings.model.width, "heads": settings.model.num_heads}
    assert heard[-1] == end
    losses = losses_of(settings.out)
    assert list(losses) == list(range(1, 41))
    # At the start every token is as likely as any other.
    assert losses[1] == pytest.approx(math.log(300), abs=0.01)
    assert losses[40] < losses[1] - 1.5
    validations = [record for record in heard if record["kind"] == "validation"]
    assert [record["step"] for record in validations] == [20, 40]
    assert validations[1]["bits_per_byte"] < validations[0]["bits_per_byte"]
    assert [record["step"] for record in heard if record["kind"] == "checkpoint"] == [15, 30, 40]
    assert [record["step"] for record in heard if record["kind"] == "sample"] == [40]
    assert (end["step"], end["tokens"]) == (40, 40 * 128)
    for name in ("tokens", "bytes", "split_tokens"):
        assert end[f"validation_{name}"] == validations[1][name]
    assert end["validation_tokens"] == 64 < end["validation_split_tokens"]
    # What the checkpoint holds is what was measured, and it stands for the run.
    model = load(settings.out)
    split = TokenData.open(settings.data).splits["validation"]
    again = evaluate(model.model, split, model.tokenizer, max_tokens=64, precision=settings.precision)
    assert again["bits_per_byte"] == end["bits_per_byte"]
    assert model.generate("def ", max_tokens=8, seed=0) == load(end["checkpoint"]).generate(
        "def ", max_tokens=8, seed=0
    )


def test_the_same_settings_give_the_same_run(config, tmp_path):
    runs = [
        config(out=tmp_path / name, seed=seed, workers=n)
        for n, (name, seed) in enumerate([("a", 3), ("b", 3), ("c", 4)], 1)
    ]
    for settings in runs:
        train(settings)
    a, b, c = (losses_of(settings.out) for settings in runs)
    assert a == b
    assert a != c
    one, other = (weights_of(settings.out, 8) for settings in runs[:2])
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("micro_rows", [1, 2])
def test_micro_batches_add_up_to_the_whole_batch(config, tmp_path, micro_rows):
    whole, parts = config(steps=3), config(steps=3, out=tmp_path / "parts", micro_rows=micro_rows)
    train(whole)
    train(parts)
    a, b = (records_of(settings.out) for settings in (whole, parts))
    for one, other in zip(a, b, strict=True):
        if one["kind"] == "step":
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    # The gradient is the whole batch's, so the weights are almost the same, whatever Muon makes of rounding.
    one, other = weights_of(whole.out, 3), weights_of(parts.out, 3)
    for name in one:
        assert (one[name] - other[name]).norm() < 0.05 * one[name].norm(), name


def test_the_gradient_is_clipped(config, tmp_path, monkeypatch):
    from starlm.train.optim import Optimizers

    seen, update = [], Optimizers.update

    def watch(self):
        norms = [parameter.grad.norm() for parameter in self.names if parameter.grad is not None]
        seen.append(torch.stack(norms).norm().item())
        return update(self)

    monkeypatch.setattr(Optimizers, "update", watch)
    for name, clip in (("on", 0.01), ("off", 0.0)):
        settings = config(out=tmp_path / name, steps=1)
        optim = type(settings.optim)(clip=clip)
        train(config(out=tmp_path / name, steps=1, optim=optim))
    norm = next(r["grad_norm"] for r in records_of(tmp_path / "off") if r["kind"] == "step")
    assert seen == [pytest.approx(0.01, rel=1e-3), pytest.approx(norm, rel=1e-5)]


@pytest.mark.parametrize("crash_at", [3, 5, 7])
def test_going_on_equals_never_having_stopped(config, tmp_path, crash_at):
    straight = config(out=tmp_path / "straight", save_every=2, eval_every=3)
    train(straight)
    stopped = config(out=tmp_path / "stopped", save_every=2, eval_every=3)
    with pytest.raises(Crash):
        train(stopped, on_record=stop_at(crash_at, crash))
    heard = []
    end = train(stopped, on_record=heard.append)
    assert (heard[0]["start_step"], heard[0]["resumed"]) == (crash_at - 1, True)
    assert losses_of(stopped.out) == losses_of(straight.out)
    steps = [record["step"] for record in records_of(stopped.out) if record["kind"] == "step"]
    assert steps == list(range(1, 9))
    validations = [
        [(r["step"], r["bits_per_byte"]) for r in records_of(run.out) if r["kind"] == "validation"]
        for run in (straight, stopped)
    ]
    assert validations[0] == validations[1]
    for file in ("model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json"):
        one, other = (run.out / "checkpoints" / "step-000008" / file for run in (straight, stopped))
        assert one.read_bytes() == other.read_bytes(), file
    assert end["seconds"] > 0


def test_a_model_that_its_config_does_not_describe_goes_on_too(config, tmp_path):
    def build(settings):
        model = StarLM(settings)
        model.blocks[1].mlp = MLP(settings.width, 3)
        return model

    straight, stopped = (config(out=tmp_path / name, save_every=2) for name in ("straight", "stopped"))
    train(straight, build=build)
    with pytest.raises(Crash):
        train(stopped, on_record=stop_at(5, crash), build=build)
    train(stopped, build=build)
    assert losses_of(stopped.out) == losses_of(straight.out)


def test_a_finished_run_stays_finished(config):
    settings = config(steps=3)
    first = train(settings)
    before = {path: path.read_bytes() for path in (settings.out / "checkpoints").rglob("*.*")}
    heard = []
    again = train(settings, on_record=heard.append)
    assert again == first
    assert not [record for record in heard if record["kind"] in ("step", "checkpoint")]
    assert {path: path.read_bytes() for path in (settings.out / "checkpoints").rglob("*.*")} == before


def test_a_run_can_be_made_longer_but_not_shorter(config):
    train(config(steps=3))
    train(config(steps=5))
    assert list(losses_of(config().out)) == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match=r"at step 5 already, beyond the horizon of 4 steps.*another --out"):
        train(config(steps=4))


def test_the_older_checkpoints_are_removed(config):
    train(config(save_every=1, keep=3))
    assert sorted(os.listdir(config().out / "checkpoints")) == ["step-000006", "step-000007", "step-000008"]


def test_a_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    settings, calls, loss = config(save_every=2), [], StarLM.loss

    def poisoned(self, *args, **options):
        if not options.get("reduction"):
            calls.append(1)
        result = loss(self, *args, **options)
        return result * math.nan if len(calls) == 6 else result

    monkeypatch.setattr(StarLM, "loss", poisoned)
    with pytest.raises(StarLMError) as caught:
        train(settings)
    assert not isinstance(caught.value, InputError)
    for part in ("at step 6", "the loss is nan", "checkpoint of step 4 is kept", "optim.matrix_lr", "--out"):
        assert part in str(caught.value)
    assert sorted(os.listdir(settings.out / "checkpoints")) == ["step-000002", "step-000004"]
    assert list(losses_of(settings.out)) == [1, 2, 3, 4, 5]
    load(settings.out)
    # It was a fluke: the run can go on.
    train(settings)
    assert list(losses_of(settings.out)) == list(range(1, 9))


def test_a_first_loss_that_is_not_finite_says_that_nothing_was_kept(config, monkeypatch):
    loss = StarLM.loss
    monkeypatch.setattr(StarLM, "loss", lambda self, *a, **o: loss(self, *a, **o) * math.inf)
    with pytest.raises(StarLMError, match=r"at step 1: the loss is inf.*No checkpoint had been written yet"):
        train(config())


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"model__depth": 3}, "model.depth was 2, is 3"),
        ({"batch_tokens": 128}, "batch_tokens was 64, is 128"),
        ({"precision": "bfloat16"}, "precision was 'float32', is 'bfloat16'"),
    ],
)
def test_other_settings_are_refused(config, change, part):
    train(config(steps=2))
    before = {path: path.read_bytes() for path in config().out.rglob("*.*")}
    with pytest.raises(InputError, match="holds a run with other settings") as caught:
        train(config(steps=2, **change))
    assert part in str(caught.value)
    assert f"(--config {config().out}/run.toml)" in str(caught.value)
    assert "another --out" in str(caught.value)
    assert {path: path.read_bytes() for path in config().out.rglob("*.*")} == before


def test_a_run_may_go_on_where_it_is_called_by_another_name(config):
    train(config(steps=2, device="auto"))
    assert train(config(steps=4, device="cpu"))["step"] == 4


def test_what_auto_has_chosen_stays(config, monkeypatch):
    """On another machine, or where a measurement comes out otherwise."""
    seen, made = [], loop.Optimizers

    def remembered(*args, **named):
        seen.append(made(*args, **named))
        return seen[-1]

    monkeypatch.setattr(loop, "Optimizers", remembered)
    for fast in (True, False):
        monkeypatch.setattr(run_module, "has_bfloat16", lambda device, fast=fast: fast)
        train(config(steps=4 if fast else 8, precision="auto"))
        assert read_config(config().out).precision == "bfloat16"
    assert [optimizers.muon.dtype for optimizers in seen] == [torch.bfloat16] * 2
    plans = [record for record in Run(config(precision="auto")).records() if record["kind"] == "plan"]
    assert [(plan["start_step"], plan["precision"]) for plan in plans] == [(0, "bfloat16"), (4, "bfloat16")]


def test_other_data_is_refused(config, data, tmp_path):
    train(config(steps=2))
    prepare([data.parent / "text" / f"{n}.py" for n in range(4)], tmp_path / "d", tokenizer=data)
    with pytest.raises(InputError, match=r"was trained on other data than .*d now holds.*another --out"):
        train(config(steps=3, data=tmp_path / "d"))
    prepare([data.parent / "text"], tmp_path / "same", vocab_size=300, validation_fraction=0.2)
    train(config(steps=3, data=tmp_path / "same"))


def test_a_vocabulary_that_does_not_fit_is_refused(config):
    with pytest.raises(
        InputError, match=r"of 300 tokens, the model one of 301\. Set model\.vocab_size to 300"
    ):
        train(config(model__vocab_size=301))
    assert not config().out.exists()


def test_a_folder_with_something_else_is_refused(config):
    settings = config()
    settings.out.mkdir()
    (settings.out / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match=r"is not empty and holds no run.*another --out"):
        train(settings)
    assert os.listdir(settings.out) == ["thesis.txt"]


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_dead(config):
    settings = config()
    code = f"""
import sys, time
from pathlib import Path
from starlm.files import only_writer
with only_writer(Path({str(settings.out)!r})):
    print("mine", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "mine\n"
        with pytest.raises(InputError, match=r"Another process is writing to .*another folder"):
            train(settings)
        first.kill()
    train(settings)
    assert list(losses_of(settings.out)) == list(range(1, 9))
    # What ended by itself is no hindrance either.
    train(settings)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_behind_a_whole_step(config, tmp_path, number):
    straight = config(out=tmp_path / "straight")
    train(straight)
    settings, before = config(), signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"Stopped at step 3 of 8; saved\. Run it again to go on") as caught:
        train(settings, on_record=stop_at(3, lambda: os.kill(os.getpid(), number)))
    assert caught.value.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert signal.getsignal(number) is before
    assert os.listdir(settings.out / "checkpoints") == ["step-000003"]
    train(settings)
    assert losses_of(settings.out) == losses_of(straight.out)
    one, other = weights_of(settings.out, 8), weights_of(straight.out, 8)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["step", "checkpoint"])
def test_a_signal_in_the_last_step_or_checkpoint_costs_nothing(config, kind):
    """And ends the run before its last evaluation."""

    def stop(record):
        if record["kind"] == kind and record["step"] == 8:
            os.kill(os.getpid(), signal.SIGINT)

    settings = config(save_every=0)
    with pytest.raises(Interrupted, match="Stopped at step 8 of 8; saved"):
        train(settings, on_record=stop)
    assert Run(settings).last_step() == 8
    assert train(settings)["bits_per_byte"] > 0
    assert list(losses_of(settings.out)) == list(range(1, 9))


def test_a_run_that_is_over_has_the_same_records_however_often_it_is_run(config):
    def kinds():
        return [(record["kind"], record["step"]) for record in Run(settings).records()]

    settings = config(sample_prompts=("def ",), eval_every=4)
    train(settings)
    once = kinds()
    assert once.count(("validation", 8)) == once.count(("sample", 8)) == once.count(("plan", 0)) == 1
    train(settings)
    again = kinds()
    assert sorted(again) == sorted([*once, ("plan", 8)])
    train(settings)
    assert kinds() == again


def test_a_signal_at_any_moment_ends_the_run_only_with_a_checkpoint(config, monkeypatch):
    answers = iter([0] * 5)

    @contextmanager
    def between_two_looks():
        yield lambda: next(answers, signal.SIGINT)

    monkeypatch.setattr(loop, "_stop_signal", between_two_looks)
    settings = config(save_every=0)
    with pytest.raises(Interrupted) as caught:
        train(settings)
    assert f"Stopped at step {Run(settings).last_step()} of 8; saved" in str(caught.value)


def test_the_last_checkpoint_is_there_before_the_last_evaluation(config, monkeypatch):
    settings = config(save_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *args, **options: crash())
        with pytest.raises(Crash):
            train(settings)
    assert Run(settings).last_step() == 8
    end = train(settings)
    assert end["bits_per_byte"] > 0
    assert list(losses_of(settings.out)) == list(range(1, 9))


@pytest.mark.parametrize("last", ["checkpoint", "validation", "sample"])
def test_what_a_kill_has_kept_from_being_looked_at_is_looked_at_when_the_run_becomes_longer(config, last):
    def die(record):
        if record["kind"] == last and record["step"] == 4:
            crash()

    settings = config(steps=4, eval_every=2, sample_every=4, sample_prompts=("def ", "class "))
    with pytest.raises(Crash):
        train(settings, on_record=die)
    longer = replace(settings, steps=8)
    train(longer)
    seen = records_of(settings.out)
    assert [record["step"] for record in seen if record["kind"] == "validation"] == [2, 4, 6, 8]
    samples = [(record["step"], record["prompt"]) for record in seen if record["kind"] == "sample"]
    assert samples == [(4, "def "), (4, "class "), (8, "def "), (8, "class ")]


def test_a_second_signal_acts_at_once(config):
    def twice():
        ours = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        # Two that come at once may be one.
        while signal.getsignal(signal.SIGINT) is ours:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        train(config(), on_record=stop_at(3, twice))
    assert Tokenizer.load(config().out).vocab_size == 300


def test_damaged_data_end_a_run_whose_work_is_kept(config, tmp_path):
    whole = config(out=tmp_path / "whole")
    train(whole)
    damaged = config(data=shutil.copytree(whole.data, tmp_path / "data"))
    shard = next(damaged.data.glob("train-*.tokens.npy"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-100] + b"\xff" * 100)
    with pytest.raises(InputError, match=r"are damaged: .* token 65535 of a vocabulary of 300.*--verify"):
        train(damaged)
    done = max(losses_of(damaged.out))
    assert 0 < done < 8
    assert [r["step"] for r in records_of(damaged.out) if r["kind"] == "checkpoint"][-1] == done
    assert weights_of(damaged.out, done)
    shard.write_bytes(content)
    train(damaged)
    got, wanted = (weights_of(out, 8) for out in (damaged.out, whole.out))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_damaged_validation_data_are_named(config, tmp_path):
    damaged = config(data=shutil.copytree(config().data, tmp_path / "data"), eval_every=2, save_every=0)
    shard = next(damaged.data.glob("validation-*.tokens.npy"))
    shard.write_bytes(shard.read_bytes()[:128] + b"\xff" * (shard.stat().st_size - 128))
    with pytest.raises(
        InputError, match=r"data are damaged: .* token 65535 of a vocabulary of 300.*--verify"
    ):
        train(damaged)
    # What was done was kept.
    assert Run(damaged).last_step() == 2


def test_the_generator_of_random_numbers_is_the_callers(config, tmp_path):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train(config(steps=1))
    assert torch.equal(torch.rand(3), wanted)

    # And what others draw meanwhile changes no run.
    def build(settings):
        model = StarLM(settings)
        thread = threading.Thread(target=lambda: train(config(steps=1, out=tmp_path / "inner")))
        thread.start()
        thread.join(0.5)
        return model

    outer = config(steps=1, out=tmp_path / "outer")
    train(outer, build=build)
    while not (tmp_path / "inner/checkpoints/step-000001").exists():
        time.sleep(0.05)
    ours, theirs = weights_of(outer.out, 1), weights_of(tmp_path / "inner", 1)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
