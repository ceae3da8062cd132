"""Defaults < preset < TOML < command line; --dry-run and --json."""

import inspect
import os
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from runs import write_model_folder

from starlm.cli import plan
from starlm.cli.main import VERBS
from starlm.cli.presets import DEMO, TRAIN
from starlm.cli.train import VERBS as TRAIN_VERBS
from starlm.data.tokenizer import Tokenizer
from starlm.model.config import StarLMConfig
from starlm.settings import from_dict
from starlm.train.config import TrainConfig


@pytest.fixture
def resolved(command):
    """The configuration that `starlm train ARGS` resolves to."""
    return lambda *argv: command("train", *argv, "--dry-run", "--json").json["config"]


def test_defaults(resolved):
    assert from_dict(TrainConfig, resolved(), where="") == TrainConfig()


def test_each_layer_goes_over_the_one_below(resolved):
    Path("a.toml").write_text("keep = 7\nseed = 7\n[model]\nheads = 2\n")
    preset = TRAIN["small"]["model"]
    config = resolved("--preset", "small", "--config", "a.toml", "--seed", "8", "--model.mlp-ratio=2")
    assert config["model"]["depth"] == preset["depth"]
    assert config["model"]["context"] == preset["context"]
    assert (config["model"]["heads"], config["keep"]) == (2, 7)
    assert (config["seed"], config["model"]["mlp_ratio"]) == (8, 2)


def test_layers_may_make_sense_only_together(resolved):
    # Neither 4096 tokens per step and a context of 384, nor 3840 and 512, fit together.
    Path("a.toml").write_text("[model]\ncontext = 384\n")
    config = resolved("--config=a.toml", "--batch_tokens", "3840")
    assert (config["model"]["context"], config["batch_tokens"]) == (384, 3840)


def test_a_horizon_replaces_the_one_below(resolved):
    Path("a.toml").write_text("tokens = 81920\n")
    names = ("steps", "tokens", "epochs", "tokens_per_param")
    assert [resolved("--preset", "demo")[n] for n in names] == [DEMO["steps"], *[None] * 3]
    assert [resolved("--preset", "demo", "--config", "a.toml")[n] for n in names] == [None, 81920, None, None]
    assert [resolved("--preset", "demo", "--epochs", "2")[n] for n in names] == [None, None, 2.0, None]
    assert [resolved("--config", "a.toml", "--tokens-per-param", "2")[n] for n in names] == [*[None] * 3, 2.0]


def test_what_may_be_given_again_replaces_the_file(command):
    Path("a.toml").write_text('model = ["demo=again"]\ncors_origin = ["https://a.org"]\n')

    def served(*argv):
        config = command("serve", "--config", "a.toml", *argv, "--dry-run", "--json").json["config"]
        return config["model"], config["cors_origin"]

    assert served() == (["demo=again"], ["https://a.org"])
    assert served("--cors-origin", "https://b.org") == (["demo=again"], ["https://b.org"])
    assert served("--model", "x=b", "--model=y=c") == (["x=b", "y=c"], ["https://a.org"])


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ([], {"prompt_file": "long.txt"}),
        (["said"], {"text": "said"}),
        (["--prompt", "said"], {"prompt": "said"}),
        (["--prompt-file", "b.txt"], {"prompt_file": "b.txt"}),
    ],
)
def test_a_prompt_replaces_the_one_in_the_file(command, argv, given):
    Path("a.toml").write_text('prompt_file = "long.txt"\n')
    done = command("generate", "--config", "a.toml", *argv, "--dry-run", "--json")
    assert done.code == 0, done.err
    names = ("text", "prompt", "prompt_file")
    assert {name: done.json["config"][name] for name in names if done.json["config"][name]} == given


def test_a_text_replaces_the_one_in_the_file(command):
    Path("a.toml").write_text('prompt_file = "long.txt"\n')
    done = command("inspect", "--config", "a.toml", "--text", "said", "--dry-run", "--json")
    assert (done.json["config"]["text"], done.json["config"]["prompt_file"]) == ("said", None)


def test_two_horizons_in_one_layer_are_an_error(command):
    done = command("train", "--steps", "3", "--tokens", "5")
    assert done.code == 2
    assert "Give the horizon once: got steps=3, tokens=5" in done.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\ndeph = 3\n", "Unknown key 'model.deph' in a.toml. Did you mean 'depth'?"),
        ("steps = 'many'\n", "steps in a.toml must be of type int; got 'many'."),
        ("steps = \n", "The config file a.toml is not valid TOML"),
        ("batch_tokens = 100\n", "batch_tokens must be a multiple of model.context (512); got 100."),
    ],
)
def test_toml_errors(command, text, message):
    Path("a.toml").write_text(text)
    done = command("train", "--config", "a.toml", "--dry-run")
    assert (done.code, done.out) == (2, "")
    assert message in done.err


@pytest.mark.parametrize("verb", VERBS)
def test_dry_run_prints_toml_and_runs_nothing(command, tmp_path, verb):
    done = command(*verb.split(), "--dry-run")
    assert (done.code, done.err) == (0, "")
    # The plan is in comments, so the output is itself a file for --config.
    Path(tmp_path / "again.toml").write_text(done.out)
    tomllib.loads(done.out)
    again = command(*verb.split(), "--config", "again.toml", "--dry-run")
    assert again.out == done.out
    assert [path.name for path in tmp_path.iterdir()] == ["again.toml"]


def test_dry_run_of_training_says_what_it_takes(command):
    done = command("train", "--preset", "demo", "--steps", "10", "--dry-run", "--json")
    assert "# flops per token" in done.err
    plan, model = done.json["plan"], StarLMConfig(**DEMO["model"])
    assert plan["parameters"] == model.num_parameters
    assert plan["flops_per_token"] == model.flops_per_token()
    assert (plan["steps"], plan["tokens"]) == (10, 10 * DEMO["batch_tokens"])
    assert plan["matrix_lr"] == 0.02
    assert command("train", "--steps", "9600", "--dry-run", "--json").json["plan"]["matrix_lr"] < 0.01
    assert plan["flops_in_total"] == model.flops_per_token() * plan["tokens"]
    memory = plan["memory_MiB_approximate"]
    assert memory["weights"] == memory["gradients"] == round(4 * model.num_parameters["total"] / 2**20)
    assert memory["total"] >= memory["weights"] + memory["optimizer"] + memory["activations"]


def test_a_dry_run_says_how_often_the_data_are_gone_through(command):
    Path("text").mkdir()
    for name in "ab":
        Path(f"text/{name}.txt").write_text(f"one two three {name}. " * 20)
    tokens = command("data", "prepare", "text", "--json").json["tokens"]["train"]
    plan = command("train", "--steps", "10", "--dry-run", "--json").json["plan"]
    assert plan["epochs"] == plan["tokens"] / tokens
    assert "epochs" not in command("train", "--data", "none", "--dry-run", "--json").json["plan"]


def test_the_memory_of_the_loss_is_that_of_a_chunk():
    from starlm.ops import cross_entropy as loss

    copies = (plan.CHUNK, plan.CHUNK_ON_GPU, plan.MIN_TOKENS)
    assert copies == (loss.CHUNK["cpu"], loss.CHUNK_ELSEWHERE, loss.MIN_TOKENS)
    model = {"depth": 1, "dim": 64, "heads": 2, "context": 512}

    def activations(vocab, device="auto"):
        model_config = StarLMConfig(**model, vocab_size=vocab)
        config = TrainConfig(model=model_config, batch_tokens=16384, device=device)
        return plan.memory(config)["activations"]

    # Measured on a CPU, everything together: 105 MiB, and 161.
    assert 90 < activations(300) < 120
    assert 120 < activations(32768) < 180
    assert activations(32768, "cuda") > activations(32768) + 200


def test_the_model_has_the_vocabulary_of_its_data_unless_told(command, resolved):
    # A small text yields fewer tokens than were asked for, so the number cannot be known before.
    Path("text").mkdir()
    Path("text/a.txt").write_text("one two three. " * 20)
    Path("text/b.txt").write_text("four five six. " * 20)
    size = command("data", "prepare", "text", "--json").json["vocab_size"]
    assert 265 <= size < 4096
    Path("a.toml").write_text("[model]\nvocab_size = 7\n")
    for preset in TRAIN:
        assert resolved("--preset", preset)["model"]["vocab_size"] == size
    assert resolved("--config", "a.toml")["model"]["vocab_size"] == 7
    assert resolved("--config", "a.toml", "--model.vocab-size", "8")["model"]["vocab_size"] == 8
    assert resolved("--data", "none")["model"]["vocab_size"] == 4096


def test_the_model_is_that_which_a_run_begins_with(command, resolved):
    write_model_folder(Path("old").absolute(), layers="DW")
    size = Tokenizer.load("old").vocab_size
    for words in ((), ("--preset", "small")):
        model = resolved("--init-from", "old", *words)["model"]
        assert (model["vocab_size"], model["dim"], model["layers"], model["context"]) == (size, 32, "DW", 512)
    assert resolved("--init-from", "old", "--model.context", "64")["model"]["context"] == 64
    # Whether settings make sense together is looked at with that model, not with the default one.
    write_model_folder(Path("short").absolute(), context=64)
    for flag in ("--init-from", "--init_from"):
        assert resolved(flag, "short", "--batch-tokens", "128")["batch_tokens"] == 128
    Path("short.toml").write_text('batch_tokens = 128\ninit_from = "short"\n')
    assert resolved("--config", "short.toml")["model"]["context"] == 64
    assert resolved("--init-from", "old", "--model.depth", "9")["model"]["depth"] == 9
    missing = command("train", "--init-from", "none", "--dry-run")
    assert (missing.code, "There is no model at none" in missing.err) == (2, True)
    # A run that is under way needs it no longer.
    Path("run/checkpoints/step-000001").mkdir(parents=True)
    Path("run/run.toml").write_text('init_from = "none"\n[model]\ndepth = 3\n')
    assert resolved("--out", "run")["model"]["depth"] == 3
    # Nor does it become what the other has become since.
    Path("run/run.toml").write_text('init_from = "old"\n[model]\ndepth = 3\n')
    for words in (("--out", "run"), ("--out", "run", "--init-from", "old", "--preset", "small")):
        assert resolved(*words)["model"]["depth"] == 3
    # What it was told at its beginning it is told still.
    Path("run/run.toml").write_text('init_from = "old"\n[model]\ncontext = 32\n')
    assert resolved("--out", "run")["model"]["context"] == 32


@pytest.mark.parametrize("name", TRAIN)
def test_presets_resolve(resolved, name):
    assert from_dict(TrainConfig, resolved("--preset", name), where=name).num_steps > 0


def test_verbs_without_presets_have_no_such_option(command):
    assert "--preset" not in command("doctor", "--help").out
    assert "--preset" in command("train", "--help").out
    done = command("doctor", "--preset", "x")
    assert done.code == 2
    assert "Unknown preset 'x'. There are: none here." in done.err


def test_option_file_named_last_counts(resolved):
    Path("a.toml").write_text("seed = 1\n")
    Path("b.toml").write_text("seed = 2\n")
    assert resolved("--config", "a.toml", "--config=b.toml")["seed"] == 2


def test_a_help_text_of_several_lines_is_one_paragraph():
    words = [sys.executable, "-m", "starlm", "train", "--help"]
    env = {**os.environ, "COLUMNS": "100"}
    text = subprocess.run(words, capture_output=True, text=True, check=True, env=env).stdout
    lines = [line.strip("│ ") for line in text.splitlines()]
    # The line of the source ends behind "so"; that of the help goes on as far as there is room.
    assert any(
        line.startswith("beyond, and 8 at the least, so that star has each of its kinds") for line in lines
    )


def test_every_option_has_help():
    # tyro takes it from the docstring under the field; one that is missing shows as a bare line.
    source = inspect.getsource(TrainConfig)
    for field in fields(TRAIN_VERBS["train"].options):
        after = source.split(f"    {field.name}: ", 1)[1].split("\n", 2)[1]
        assert after.strip().startswith('"""'), field.name


def test_a_run_folder_alone_says_how_it_goes_on(command, resolved):
    settings = 'seed = 7\nsteps = 9\nout = "run"\n[model]\ndepth = 3\nvocab_size = 300\n'
    Path("run").mkdir()
    Path("run/run.toml").write_text(settings)
    for words in (("--out", "run"), ("--out=run", "--steps", "11"), ("--out", "run", "--tokens", "4096")):
        options = resolved(*words)
        assert (options["seed"], options["model"]["depth"], options["out"]) == (7, 3, "run")
    assert (options["steps"], options["tokens"]) == (None, 4096)
    assert resolved("--out", "run", "--preset", "small")["seed"] == 0
    Path("a.toml").write_text("seed = 8\n")
    assert resolved("--out", "run", "--config", "a.toml")["seed"] == 8
    # Also where it is by default; and there it goes on, whatever it was called when it began.
    Path("runs/base").mkdir(parents=True)
    Path("runs/base/run.toml").write_text(settings)
    assert (resolved()["seed"], resolved()["out"]) == (7, "runs/base")
    # Help is not about a run, and does not fail for one.
    Path("runs/base/run.toml").write_text("unknown = 1\n")
    assert command("train", "--help").code == 0
    assert "Unknown key 'unknown' in runs/base/run.toml" in command("train").err
