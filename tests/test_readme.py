"""What the README shows works: its Python blocks run and print what they say, its commands parse."""

import json
import re
import shlex
from pathlib import Path

import pytest

from starlm.cli.main import main
from starlm.data.tokenizer import Tokenizer
from starlm.model.checkpoint import write_model
from starlm.model.config import StarLMConfig
from starlm.model.folder import write_manifest
from starlm.model.model import StarLM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BLOCKS = [text for language, text in FENCES if language == "python"]
SHELL = "\n".join(text for language, text in FENCES if not language)
COMMANDS = re.findall(r"^(starlm .*?)(?:  #.*)?$", SHELL, re.MULTILINE)
TARGETS = re.findall(r"\bmake ([\w-]+)", SHELL)
LINKS = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)


@pytest.fixture
def _with_a_run(tmp_path, monkeypatch):
    """An empty folder, but for runs/demo, a small model."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"], 265)
    folder = tmp_path / "runs/demo/checkpoints/step-000001"
    folder.mkdir(parents=True)
    model = StarLM(StarLMConfig(depth=1, vocab_size=tokenizer.vocab_size))
    write_model(model, folder, bos=tokenizer.bos, end_of_turn=tokenizer.end_of_turn, pad=tokenizer.pad)
    tokenizer.save_pretrained(folder)
    write_manifest(folder)


def test_there_is_something_to_test():
    assert len(BLOCKS) >= 4
    assert {command.split()[1] for command in COMMANDS} >= {"demo", "data", "train", "generate", "bench"}
    assert TARGETS[:2] == ["demo", "test"]


@pytest.mark.usefixtures("_with_a_run")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("import ")[-1].split("\n")[0])
def test_python_blocks_print_what_they_say(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    said = re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.usefixtures("_with_a_run")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, capsys):
    words = shlex.split(command)[1:]
    assert main([*words, "--dry-run"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("target", TARGETS)
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_measured_claims_are_those_of_the_results():
    results = ROOT / "benchmarks/results"
    acceptance = json.loads((results / "op-cpu-xeon-2-cores-acceptance.json").read_text())
    growth = json.loads((results / "op-cpu-xeon-2-cores.json").read_text())
    rows = [
        [f"{row['ratio']:{form}}" for row in found if row["pass"] == name]
        for found, form in ((acceptance["cpu_over_reference"], ".1f"), (growth["cpu_time_per_token"], ".2f"))
        for name in ("forward", "forward+backward")
    ]
    claimed = re.findall(r"^\| forward.*\| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert [list(row) for row in claimed] == rows
