"""The programs as commands: what they leave, skip and refuse, in small runs."""

import json
import sys
from pathlib import Path

import pytest

from experiments import corpora, lm, mqar, needle, packages, reach, synthetic, tables
from experiments.program import start
from experiments.store import save, taken
from experiments.variants import NAMES, builder, settings
from starlm.errors import InputError
from starlm.model.config import StarLMConfig

SMALL = ("--steps", 2, "--length", 32, "--batch", 64, "--width", 32, "--depth", 2)
SMALL += ("--vocab", 265, "--eval-tokens", 64)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a program in an empty folder; its output, or the sentence that it ends with."""
    monkeypatch.chdir(tmp_path)
    for program in (lm, mqar, needle, reach, synthetic):
        monkeypatch.setattr(program, "RESULTS", tmp_path / "results" / program.__name__.split(".")[-1])
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    (tmp_path / "text").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "text" / f"{name}.txt").write_text(f"one two three {name}. " * 100)

    def run(program, *words) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
        ended = ""
        try:
            start(program.main)
        except SystemExit as end:
            ended = str(end.code)
        captured = capsys.readouterr()
        return captured.out, ended + captured.err

    return run


def language_model(run, *words):
    return run(lm, "star", "--corpus", "mine", "--corpus-path", "text", *SMALL, *words)


def test_a_language_model_is_trained_once(run):
    out, ended = language_model(run)
    assert (ended, "step 2 loss" in out) == ("", True)
    (path,) = Path("results/lm").iterdir()
    assert path.name == "mine-v265-star-w32-l2-t32-s2-b64-lr0.02-seed0.json"
    result = json.loads(path.read_text())
    assert result["layers"] == "DD"
    assert result["tokens_measured"] == 64
    assert (result["vocab"], result["eval_tokens"], result["batch_tokens"]) == (265, 64, 64)
    before = path.read_bytes()
    out, ended = language_model(run)
    assert (ended, out) == ("", f"{path.absolute()}: there already, skipped\n")
    _, ended = language_model(run, "--eval-tokens", "32")
    assert ended == (
        f"error: {path.absolute()} is there, of another run: eval_tokens was 64, is 32. Move it away first."
    )
    assert path.read_bytes() == before


def test_a_corpus_is_the_one_that_is_named(run):
    language_model(run)
    Path("other").mkdir()
    for name in ("a", "b"):
        Path(f"other/{name}.txt").write_text(f"four five {name}. " * 100)
    _, ended = run(lm, "star", "--corpus", "mine", "--corpus-path", "other", *SMALL, "--seeds", 1)
    assert "holds another preparation" in ended
    # Another vocabulary is other data, in a folder of its own.
    assert language_model(run, "--vocab", "270")[1] == ""
    assert sorted(path.name for path in (corpora.WORK / "data").iterdir()) == ["mine-v265", "mine-v270"]
    _, ended = run(lm, "star", "--corpus", "mine", *SMALL, "--seeds", "1")
    assert "The corpus mine needs a text. Give --corpus-path" in ended
    _, ended = run(lm, "star", "--corpus-path", "text", *SMALL)
    assert "The corpus embedded has a text of its own." in ended


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(packages, "NAMES", ("numpy", "no_such_package"))
    with pytest.raises(InputError, match=r"needs no_such_package in .*make install"):
        packages.sources()


def test_where_a_run_of_a_variant_reads(run):
    """Of a run and of a checkpoint, also where the variant has layers of its own."""
    assert run(lm, "star+static", "--corpus", "mine", "--corpus-path", "text", *SMALL)[1] == ""
    (folder,) = (corpora.WORK).glob("mine-*")
    data = ("--data", corpora.WORK / "data" / "mine-v265", "--tokens", 50)
    _, ended = run(reach, folder, *data)
    assert "do not fit its config.json" in ended
    for path, name in (
        (folder, folder.name),
        (folder / "checkpoints/step-000002", f"{folder.name}-step-000002"),
    ):
        out, ended = run(reach, path, *data, "--variant", "star+static")
        assert (ended, "layer 2" in out) == ("", True)
        assert json.loads((reach.RESULTS / f"{name}.json").read_text())["tokens"] == 50
        assert (reach.RESULTS / f"{name}.png").is_file()


@pytest.mark.parametrize("program", [synthetic, mqar, needle])
def test_a_variant_is_never_less_than_its_name(run, program, monkeypatch):
    """Two layers of DDW are plain star."""
    monkeypatch.setattr(corpora, "folder", lambda corpus: prepared())
    words = {synthetic: ("star-W", "--task", "lag-1"), mqar: ("star-W",), needle: ("--variant", "star-W")}
    _, ended = run(program, *words[program], "--width", "32", *(("--rows", 600) if program is mqar else ()))
    assert ended == "error: star-W has the layers DDW, of which 2 leave DD. Take --depth 3 or more."
    assert not program.RESULTS.exists()


def prepared() -> Path:
    from starlm.data.prepare import prepare

    return prepare(["text"], "data", vocab_size=265).out


def test_every_variant_fits_six_layers():
    for name in NAMES:
        config = StarLMConfig(vocab_size=9, depth=6, dim=64, context=16, **settings(name))
        assert builder(name)(config).config.layer_kinds == (config.layers * 6)[:6]


def test_synthetic_tasks(run):
    words = ("star", "--task", "lag-1", "--width", 32, "--steps", 1)
    out, ended = run(synthetic, *words, "--lengths", 16, 32)
    assert (ended, "1 updates, length 32: 0." in out) == ("", True)
    out, ended = run(synthetic, *words, "--lengths", 16, 32)
    assert "there already, skipped" in out
    _, ended = run(synthetic, *words, "--lengths", 16)
    assert "lengths was [16, 32], is [16]. Move it away" in ended
    assert run(synthetic, *words, "--lengths", 16, 32, "--seed", 1)[1] == ""
    out, _ = run(tables, "synthetic")
    rows = [line.split("|")[1:7] for line in out.splitlines() if line.startswith("| star")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["star", "32", "8", "0.02", seed, "1"] for seed in "01"
    ]
    _, ended = run(synthetic, "star", "--task", "lag-64", "--lengths", 32)
    assert ended == "error: lag-64 asks nothing in 32 tokens. Give longer --lengths."
    assert "invalid choice: 'taps'" in run(synthetic, "taps", "--task", "lag-1")[1]
    assert "--steps: must be 1 or more; got 0" in run(synthetic, *words, "--steps", 0)[1]


def test_mqar_of_few_examples(run, monkeypatch):
    monkeypatch.setattr(mqar, "TEST_ROWS", 50)
    words = ("gated", "--width", 32, "--rates", 0.01, "--epochs", 1, "--rows", 600, "--batch", 300)
    out, ended = run(mqar, *words)
    assert (ended, "step 2 loss" in out) == ("", True)
    assert (mqar.RESULTS / "gated-L64-k4-w32-lr0.01-n600-e1-seed0.json").is_file()
    _, ended = run(mqar, *words, "--batch", 200)
    assert "batch was 300, is 200" in ended
    assert "8 pairs and as many questions do not fit into 16" in run(mqar, *words, "--size", 16, 8)[1]
    _, ended = run(mqar, *words, "--batch", 601, "--seed", 1)
    assert "A batch of 601 examples is more than there are: 600" in ended


def results(kind: str, *records) -> None:
    for number, record in enumerate(records):
        save(tables.RESULTS / kind / f"{number}.json", record)


def test_table_of_recall(run):
    """By hand: the mean over seeds chooses the rate; runs that might take longer are others."""
    base = {"variant": "star", "width": 64, "length": 64, "pairs": 4, "batch": 512, "chance": 0.25}
    rows = [
        {"rate": 0.01, "seed": 0, "accuracy": 0.3, "epochs_allowed": 64, "updates": 9},
        {"rate": 0.01, "seed": 1, "accuracy": 0.9, "epochs_allowed": 64, "updates": 8},
        {"rate": 0.02, "seed": 0, "accuracy": 0.7, "epochs_allowed": 64, "updates": 7},
        {"rate": 0.02, "seed": 1, "accuracy": 0.6, "epochs_allowed": 64, "updates": 6},
        {"rate": 0.01, "seed": 0, "accuracy": 0.1, "epochs_allowed": 2, "updates": 5},
    ]
    results("mqar", *({**base, **row} for row in rows))
    out, ended = run(tables, "mqar")
    assert ended == ""
    assert out.splitlines()[2:] == [
        "| star | 64 | (64, 4) | 0.1000 | 0.01 of 1 | 1 | 5 | 2 | 0.2500 |",
        "| star | 64 | (64, 4) | 0.6500 (0.1000) | 0.02 of 2 | 2 | 7, 6 | 64 | 0.2500 |",
    ]
    assert "--plot draws the results of lm alone" in run(tables, "mqar", "--plot", "x.png")[1]


def test_table_of_language_models(run):
    """By hand; runs with other batches are other settings, and a chart is of one."""
    base = {"variant": "star", "corpus": "c", "width": 64, "depth": 2, "length": 64, "steps": 2}
    base |= {"tokens": 2e6, "by_position": {"0": 5.0}, "recall": 2.0, "other": 3.0, "curve": [[1, 4], [2, 3]]}
    base |= {"matrix_lr": 0.01, "eval_tokens": 64}
    rows = [
        {"seed": 0, "loss": 3.0, "batch_tokens": 64},
        {"seed": 1, "loss": 3.1, "batch_tokens": 64},
        {"seed": 0, "loss": 2.0, "batch_tokens": 128},
    ]
    results("lm", *({**base, **row} for row in rows))
    out, ended = run(tables, "lm", "--plot", "x.png")
    tops = [line for line in out.splitlines() if line.startswith("c, width")]
    assert tops == [
        f"c, width 64, depth 2, T 64, 2 steps of {n} tokens, measured on 64, 2.0 M tokens" for n in (64, 128)
    ]
    assert "| star | 3.050 (0.100) | 5.000 (0.000) | 2.000 (0.000) | 3.000 (0.000) | 0.01 of 1 | 2 |" in out
    assert "A chart is of one setting; these results have:\n  c, width 64" in ended
    assert not Path("x.png").exists()
    words = ("lm", "--batch-tokens", 64, "--plot")
    assert "x.svg is not a .png" in run(tables, *words, "x.svg")[1]
    assert run(tables, *words, "x.png")[1] == ""
    assert Path("x.png").stat().st_size > 5000
    assert "No results in" in run(tables, "lm", "--steps", "9")[1]


def test_what_older_results_do_not_say_is_not_compared(tmp_path):
    save(tmp_path / "a.json", {"seed": 0})
    assert taken(tmp_path / "a.json", {"seed": 0, "depth": (2, 3)})
    assert not taken(tmp_path / "b.json", {"seed": 0})
    with pytest.raises(InputError, match="seed was 0, is 1"):
        taken(tmp_path / "a.json", {"seed": 1})
