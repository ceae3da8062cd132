"""The frame around the verbs: help, errors, exit codes."""

import errno
import json
import subprocess
import sys
import time

import pytest
import torch

from starlm.cli import main as cli
from starlm.errors import InputError, StarLMError
from starlm.version import __version__

HEAVY = {"torch", "numpy", "numba", "transformers", "matplotlib", "jinja2", "rich", "pyarrow", "tokenizers"}
HELPS = [[], *(name.split() for name in cli.VERBS)]


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_imports_nothing_heavy(words):
    code = (
        "import json, sys; from starlm.cli.main import main; status = main(sys.argv[1:]); "
        "print(json.dumps([status, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True, check=True
    )
    print(f"starlm {' '.join(words)} --help: {time.perf_counter() - began:.2f} s")
    status, modules = json.loads(done.stdout.splitlines()[-1])
    assert (status, HEAVY & set(modules)) == (0, set())
    assert "usage: starlm" in done.stdout


def test_version(command):
    assert command("--version").out == f"starlm {__version__}\n"


def test_without_a_verb(command):
    done = command()
    assert (done.code, done.out) == (2, "")
    assert "Begin with: starlm demo" in done.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["trian"], "Unknown verb 'trian'. Did you mean 'train'?"),
        (["xyzzy"], "Unknown verb 'xyzzy'. Known: demo, train,"),
        (["data"], "starlm data needs one of: prepare, stats."),
        (["data", "prepair"], "Unknown verb of starlm data 'prepair'. Did you mean 'prepare'?"),
        (["train", "--stepz", "3"], "--steps"),
        (["train", "--model.dpth", "3"], "--model.depth"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--precision", "float8"], "bfloat16"),
        (["train", "--preset", "smal"], "Unknown preset 'smal'. Did you mean 'small'?"),
        (["train", "--steps", "0"], "error: steps must be above 0 and below 1e+15, or left out; got 0."),
        (["train", "--config", "missing.toml"], "Cannot read the config file missing.toml"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "Give the prompt once"),
        (["generate", "a", "--prompt", "b"], "Give the prompt once"),
        (["bench", "op", "--lengths", "100"], "lengths must be divisors of batch_tokens (131072)"),
    ],
)
def test_bad_usage_is_2_and_named(command, words, text):
    done = command(*words)
    assert (done.code, done.out) == (2, "")
    assert text in " ".join(done.err.replace("│", " ").split())
    assert "Traceback" not in done.err


def test_help_on_a_group(command):
    done = command("data", "--help")
    assert done.code == 0
    assert "data prepare" in done.out
    assert "tokenizer" not in done.out


class OutOfMemoryError(RuntimeError):
    """torch's own is a class of this name; which one depends on the version."""


@pytest.mark.parametrize(
    ("error", "code", "texts"),
    [
        (StarLMError("The loss is nan."), 1, ["error: The loss is nan."]),
        (InputError("No such file."), 2, ["error: No such file."]),
        (MemoryError(), 1, ["error: Out of memory.", "--micro-rows"]),
        (OutOfMemoryError("CUDA out of memory"), 1, ["error: Out of memory.", "CUDA out of memory"]),
        (OSError(errno.ENOSPC, "No space left", "runs/x"), 1, ["error: The disk is full: runs/x."]),
        (PermissionError(errno.EACCES, "Permission denied", "y"), 2, ["error: Permission denied: y."]),
        (KeyError("depth"), 1, ["error: KeyError: 'depth'.", "a bug in StarLM", "--debug"]),
        (IndexError("too far."), 1, ["error: IndexError: too far. This is a bug"]),
        (ValueError("a\nb"), 1, ["error: ValueError: a b."]),
        (KeyboardInterrupt(), 130, ["interrupted: The last checkpoint is kept. Run the same command again"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_become_a_paragraph(command, stand_in, error, code, texts):
    def train(config, on_record):
        raise error

    stand_in("starlm.train.loop", train=train)
    done = command("train", "--json")
    assert (done.code, done.out) == (code, "")
    assert len(done.err.strip().splitlines()) == 1
    assert all(text in done.err for text in texts), done.err


def test_torch_out_of_memory_is_recognised(command, stand_in):
    def train(config, on_record):
        torch.ones(2**60)

    stand_in("starlm.train.loop", train=train)
    assert command("train").err.startswith("error: Out of memory.")


@pytest.mark.parametrize("number", [130, 143])
def test_a_run_that_a_signal_stopped_is_no_error(command, stand_in, number):
    class Interrupted(StarLMError):
        exit_code = number

    def train(config, on_record):
        raise Interrupted("Stopped at step 3; saved.")

    stand_in("starlm.train.loop", train=train)
    done = command("train")
    assert (done.code, done.err) == (number, "Stopped at step 3; saved.\n")


@pytest.mark.parametrize("verb", ["serve", "chat", "inspect"])
def test_a_model_without_its_option(command, tmp_path, verb):
    (tmp_path / "run").mkdir()
    done = command(verb, "run", "--port", "0")
    assert done.code == 2
    assert done.err.endswith(f"Perhaps: starlm {verb} --model run --port 0\n")
    # Of what is no folder, and of a verb whose --model is something else, nothing is known.
    assert "Perhaps" not in command(verb, "walk").err
    assert "Perhaps" not in command("train", "run").err


def test_debug_prints_the_traceback(command, stand_in):
    stand_in("starlm.train.loop", train=lambda config, on_record: 1 / 0)
    done = command("train", "--debug")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "error: ZeroDivisionError" in done.err


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m starlm train --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: starlm train")
    assert done.stderr == ""


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "starlm", "trian"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: Unknown verb")
