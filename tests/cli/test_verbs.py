"""What each verb does with what it is given."""

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import write_model_folder

from starlm.cli.console import Console
from starlm.cli.generate import GenerateOptions
from starlm.cli.train import say_result
from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError


def test_train(command, fake_train):
    done = command("train", "--out", "runs/x", "--steps", "20", "--json")
    assert done.code == 0
    assert done.json["bits_per_byte"] == 2.5
    assert done.json["out"] == "runs/x"
    assert "step 20: validation loss" in done.err
    assert fake_train[0].steps == 20


@pytest.mark.parametrize(("held_out", "said"), [(9, "held-out text"), (1234, "9 of 1,234 held-out tokens")])
def test_the_result_of_training_says_on_how_much_it_was_measured(capsys, training_records, held_out, said):
    *_, end = training_records(held_out=held_out)
    say_result(end, Console())
    assert f"Done: 2.5000 bits per byte on {said} after 81,920 tokens in " in capsys.readouterr().out


def test_demo_goes_all_the_way(command, fake_train, fake_data):
    done = command("demo", "--steps", "20")
    assert done.code == 0, done.err
    order = [
        *("1/4  Tokenizer and data", "2/4  Training", "step 1/20"),
        *("3/4  Evaluation and samples", "step 20: validation", "step 20: sample", "4/4  Report"),
        'starlm generate --model runs/demo "def "',
    ]
    places = [done.out.index(text) for text in order]
    assert places == sorted(places)
    assert done.out.count("3/4") == 1
    (sources, out, options), *more = fake_data.prepared
    assert (sources, out, options["vocab_size"], more) == ("embedded", Path("data/demo"), 4096, [])
    assert Path("runs/demo/report.html").is_file()


def test_demo_takes_what_is_there(command, fake_train, fake_data):
    command("demo", "--steps", "20")
    done = command("demo", "--steps", "20", "--json")
    assert len(fake_data.prepared) == 1
    assert "data/demo is there already" in done.err
    assert done.json["report"] == "runs/demo/report.html"


def test_data_prepare(command, fake_data):
    done = command("data", "prepare", "a", "b.txt", "--out", "d", "--vocab-size", "300", "--json")
    assert done.code == 0, done.err
    sources, out, options = fake_data.prepared[0]
    assert (sources, out, options["vocab_size"]) == (["a", "b.txt"], Path("d"), 300)
    assert done.json["out"] == "d"
    assert done.json["tokens"] == 100
    assert "tokens: 2/2 (100%)" in done.err


def test_what_comes_next_can_be_pasted(command, fake_train, fake_data):
    """Into a shell, whatever the folders are called."""
    prepared = command("data", "prepare", "a", "--out", "data ü 1").out
    assert "Next: starlm train --preset demo --data 'data ü 1' --out runs/mine\n" in prepared
    trained = command("train", "--out", "run 1", "--steps", "20").out
    assert "Next: starlm generate --model 'run 1' --prompt \"...\"   or   starlm report 'run 1'\n" in trained
    shown = command("demo", "--out", "run 2", "--steps", "20").out
    assert "  starlm generate --model 'run 2' \"def \"\n  starlm eval --model 'run 2'\n" in shown


def test_data_prepare_says_what_it_did_not_read(command):
    Path("text").mkdir()
    for name in ("a.txt", "b.txt"):
        Path("text", name).write_text("one two three")
    assert "Left out" not in command("data", "prepare", "text", "--out", "all").out
    Path("text/main.c").write_text("int main() {}")
    done = command("data", "prepare", "text", "--out", "some")
    assert "Left out, for their names: 1 .c. Plain text" in done.out


def test_data_prepare_passes_over_what_is_no_text_if_asked(command):
    Path("text").mkdir()
    for name, content in (("a.txt", b"one two"), ("b.txt", b"three"), ("latin.txt", b"\xe9")):
        Path("text", name).write_bytes(content)
    refused = command("data", "prepare", "text", "--out", "d", "--vocab-size", "265")
    assert refused.code == 2
    assert "--skip-unreadable" in refused.err
    done = command("data", "prepare", "text", "--out", "d", "--vocab-size", "265", "--skip-unreadable")
    assert done.code == 0, done.err
    assert "Passed over 1 without text: latin.txt\n" in done.out


def test_data_prepare_says_what_is_little(command):
    Path("text").mkdir()
    for number in range(20):
        Path(f"text/{number}.txt").write_text("one two three four " * (40 if number else 4000))
    few = command("data", "prepare", "text", "--out", "few").out
    assert "Only " in few
    assert "tokens are held out: losses on them will be noise" in few
    assert "vocabulary: " in few
    many = command(
        "data", "prepare", "text", "--out", "many", "--preset", "bytes", "--validation-fraction", "0.9"
    )
    assert "held out" not in many.out
    assert "vocabulary: 265 tokens" in many.out


@pytest.mark.parametrize("verb", [("data", "prepare"), ("tokenizer", "train")])
def test_a_small_vocabulary_is_said(command, verb):
    Path("text.txt").write_text("one two three\n" * 50)
    done = command(*verb, "text.txt", "--out", "out", "--vocab-size", "500")
    assert done.code == 0, done.err
    size = Tokenizer.load("out").vocab_size
    assert f"The tokenizer has {size} tokens, not 500: its text has no further pairs" in done.out
    assert "not 265" not in command(*verb, "text.txt", "--out", "few", "--vocab-size", "265").out


def test_data_prepare_says_that_it_was_done_before(command):
    Path("text.txt").write_text("one two three\n" * 50)
    words = ("data", "prepare", "text.txt", "--out", "out", "--vocab-size", "265")
    outs = [command(*words).out for _ in range(2)]
    assert ["out holds this very preparation" in out for out in outs] == [False, True]


@pytest.mark.parametrize("words", [("--vocab-size", "1000"), ("--preset", "bytes")])
def test_a_tokenizer_that_is_there_has_its_vocabulary(command, words):
    Tokenizer.train(["two"], 265).save(Path("t.json").absolute())
    done = command("data", "prepare", "embedded", "--tokenizer", "t.json", *words)
    assert done.code == 2
    assert "has its vocabulary, so vocab_size" in done.err
    assert "(or the preset that sets it)" in done.err


def test_demo_from_another_model_has_its_tokenizer(command, fake_train, fake_data):
    write_model_folder(Path("old").absolute())
    assert command("demo", "--steps", "20", "--init-from", "old").code == 0
    options = fake_data.prepared[0][2]
    assert (options["tokenizer"], options["vocab_size"]) == (Path("old"), None)


def test_data_prepare_with_a_tokenizer_that_is_there(command):
    Path("text").mkdir()
    Path("text/a.txt").write_text("one\n" * 50)
    tokenizer = Tokenizer.train(["two"], 265)
    tokenizer.save(Path("t.json").absolute())
    done = command("data", "prepare", "text", "--out", "d", "--tokenizer", "t.json", "--json")
    assert done.code == 0, done.err
    assert Tokenizer.load("d").fingerprint == tokenizer.fingerprint
    assert "Next: starlm train --preset demo --data d " in done.err
    # With that of a model it is data to go on with.
    write_model_folder(Path("old model").absolute())
    done = command("data", "prepare", "text", "--out", "e", "--tokenizer", "old model")
    assert "Next: starlm train --init-from 'old model' --data e --out runs/mine" in done.out


def test_data_prepare_of_the_embedded_corpus(command, fake_data):
    command("data", "prepare")
    assert fake_data.prepared[0][0] == "embedded"
    done = command("data", "prepare", "embedded", "mine")
    assert done.code == 2
    assert "stands alone" in done.err


def test_data_stats(command, fake_data):
    done = command("data", "stats", "--verify", "--json")
    assert done.json["splits"]["train"] == {
        **{"documents": 3, "tokens": 100, "learned": 100, "bytes": 250, "bytes_per_token": 2.5}
    }
    assert fake_data.kind.verified == 1


@pytest.fixture
def fake_model(stand_in):
    """A model that continues "x" with "x!" and keeps what it was asked."""
    asked = []

    class Model:
        tokenizer = SimpleNamespace(fingerprint="a fingerprint")
        model = SimpleNamespace()

        def pieces(self, prompt, **options):
            asked.append((prompt, options))
            yield SimpleNamespace(text=prompt, tokens=("1",))
            yield SimpleNamespace(text="!", tokens=("2", "3", "4"))

    def load(path, device="auto", dtype="auto"):
        if not Path(path).exists():
            raise InputError(f"There is no model at {path}.")
        return Model()

    stand_in("starlm.generate.text", load=load)
    Path("m").mkdir()
    return asked


def test_generate(command, fake_model):
    done = command(
        "generate", "--model", "m", "--prompt", "ab", "--top-k", "3", "--stop", "\n", "--max-tokens", "9"
    )
    assert (done.code, done.out, done.err) == (0, "ab!\n", "")
    prompt, options = fake_model[0]
    assert (prompt, options["top_k"], options["stop"], options["max_tokens"]) == ("ab", 3, ("\n",), 9)


def test_generate_stop_leaves_the_prompt_alone(command, fake_model):
    assert command("generate", "--model", "m", "--stop", "END", "--stop=\n", "Once").out == "Once!\n"
    assert fake_model[0][1]["stop"] == ("END", "\n")


def test_generate_on_a_terminal(command, fake_model, monkeypatch):
    """The prompt in bold; no text may steer the terminal, and elsewhere it stays what it is."""
    words = ("generate", "--model", "m", "--prompt", "a\x1b[2J\n")
    assert command(*words).out == "a\x1b[2J\n!\n"
    with monkeypatch.context() as change:
        change.setattr(sys.stdout, "isatty", lambda: True)
        assert command(*words).out == "\x1b[1ma\\x1b[2J\n\x1b[0ma\\x1b[2J\n!\n"


def test_generate_json(command, fake_model):
    done = command("generate", "--model", "m", "--prompt", "ab", "--json", "--preset", "greedy")
    assert done.err == "ab!\n"
    assert (done.json["text"], done.json["tokens"]) == ("ab!", 4)
    assert done.json["tokens_per_second"] > 0
    assert fake_model[0][1]["temperature"] == 0


def test_generate_takes_the_prompt_from_stdin_or_a_file(command, fake_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped"))
    assert command("generate", "--model", "m").out == "piped!\n"
    assert command("generate", "--model", "m", "said").out == "said!\n"
    assert command("generate", "--model", "m", "--prompt=-x").out == "-x!\n"
    Path("p.txt").write_text("filed")
    assert command("generate", "--model", "m", "--prompt-file", "p.txt").out == "filed!\n"
    Path("p.txt").write_bytes(b"\xff")
    assert "not UTF-8 text: at byte 0" in command("generate", "--model", "m", "--prompt-file", "p.txt").err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    done = command("generate", "--model", "m")
    assert (done.code, done.out) == (2, "")
    assert "Give a prompt" in done.err


def test_generate_without_a_model(command, fake_model):
    done = command("generate", "--model", "nowhere", "--prompt", "x")
    assert (done.code, done.err) == (2, "error: There is no model at nowhere.\n")


def test_generate_offers_all_of_sampling():
    from starlm.generate.sampling import Sampling

    options = {field.name: field.default for field in fields(GenerateOptions)}
    # Token ids are for programs.
    wanted = {f.name: f.default for f in fields(Sampling) if f.name != "logit_bias"}
    assert wanted.items() <= options.items()


def test_eval(command, fake_model, fake_data, stand_in, monkeypatch):
    calls = []

    def evaluate(model, split, tokenizer, *, progress, **options):
        calls.append(options)
        progress(50, 100)
        return {"loss": 3.0, "bits_per_byte": 1.5, "tokens": 99, "bytes": 250, "split_tokens": 1234}

    stand_in("starlm.evaluate.bits_per_byte", evaluate=evaluate)
    Path("d").mkdir()
    Path("m/run.toml").write_text('data = "d"\n')
    Path("m/checkpoints/step-1").mkdir(parents=True)
    Path("m/checkpoints/step-1/config.json").touch()
    for model in ("m", "m/checkpoints/step-1"):
        done = command("eval", "--model", model, "--json", "--max-tokens", "100")
        assert (done.code, done.json["bits_per_byte"], done.json["data"]) == (0, 1.5, "d"), done.err
    assert calls[0]["max_tokens"] == 100
    assert "1.5000 bits per byte" in done.err
    assert "99 of 1,234 tokens" in done.err
    # From another folder than that where the run was made.
    here = Path.cwd()
    Path("m/run.toml").write_text('data = "d"\nout = "m"\n')
    Path("far").mkdir()
    monkeypatch.chdir("far")
    done = command("eval", "--model", here / "m", "--json")
    assert (done.code, done.json["data"]) == (0, str(here / "d")), done.err


def test_eval_on_data_of_another_tokenizer(command, fake_model, fake_data, stand_in):
    """Its numbers would mean other tokens."""
    stand_in("starlm.evaluate.bits_per_byte", evaluate=None)
    fake_data.kind.meta = {"tokenizer": "another"}
    Path("data").mkdir()
    done = command("eval", "--model", "m", "--data", "data")
    assert (done.code, done.out) == (2, ""), done.err
    assert "data was prepared with another tokenizer than that of m" in done.err


def test_eval_without_data(command, fake_model):
    done = command("eval", "--model", "m")
    assert (done.code, "belongs to no run" in done.err) == (2, True)
    Path("m/run.toml").write_text('data = "gone"\n')
    done = command("eval", "--model", "m")
    assert (done.code, "names the data folder gone, which is not there" in done.err) == (2, True)
    assert "There is no model at x" in command("eval", "--model", "x").err


def test_report(command, fake_train):
    command("train", "--out", "runs/x")
    done = command("report", "runs/x", "--json")
    assert done.json == {"html": "runs/x/report.html", "markdown": "runs/x/report.md"}
    assert Path("runs/x/report.md").is_file()
    missing = command("report", "runs/none")
    assert (missing.code, "runs/none cannot be reported on" in missing.err) == (2, True)


def test_bench_op(command, stand_in):
    def main(options, machine):
        print("a table")
        return {"tokens": options.batch_tokens, "knows the machine": "torch" in machine}

    stand_in("starlm.bench.op", main=main)
    done = command("bench", "op", "--preset", "quick", "--json")
    assert (done.json, done.err) == ({"tokens": 4096, "knows the machine": True}, "a table\n")


def test_doctor(command):
    done = command("doctor", "--matmul-size", "64", "--json")
    assert done.code == 0, done.err
    machine = done.json["machine"]
    assert machine["operator, cpu"] == "works"
    assert {
        "python",
        "torch",
        "memory",
        "disk",
        "GPU",
        "torch threads",
        "matmul on the CPU",
    } <= machine.keys()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--folder", "nowhere", "There is no folder nowhere"), ("--matmul-size", "0", "matmul_size must be")],
)
def test_doctor_does_not_blame_the_installation_for_an_option(command, option, value, words):
    done = command("doctor", option, value)
    assert done.code == 2
    assert words in done.err


def test_doctor_knows_the_end_of_a_containers_memory(command, monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    monkeypatch.setattr("starlm.device._CGROUP", tmp_path)
    done = command("doctor", "--matmul-size", "64", "--json")
    assert done.json["machine"]["memory"].startswith("0.5 GiB usable here of ")
    assert "Under 2 GiB is usable" in done.json["problems"]["memory"]


def test_doctor_survives_what_it_looks_for(command, monkeypatch):
    import starlm.ops

    def broken(*args, backend, **kwargs):
        if backend == "cpu":
            raise OSError("libllvm is gone")
        return args[0]

    monkeypatch.setattr(starlm.ops, "deform", broken)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: 1 / 0)
    done = command("doctor", "--matmul-size", "64", "--json")
    assert done.code == 0
    assert "libllvm is gone" in done.json["problems"]["operator, cpu"]
    assert "ZeroDivisionError" in done.json["problems"]["disk"]
    assert "! operator, cpu: It does not run here" in done.err


def test_bytes_on_stdin_that_are_no_text_are_named(tmp_path):
    Tokenizer.train(["a"], 265).save(tmp_path)
    words = [sys.executable, "-m", "starlm", "tokenizer", "show", "--tokenizer", str(tmp_path)]
    done = subprocess.run(words, input=b"caf\xe9", capture_output=True, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 2
    assert b"stdin is not UTF-8 text: at byte 3" in done.stderr


def test_sigterm_ends_a_verb_as_ctrl_c_does(tmp_path):
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text(" ".join(f"word{number * 1000 + n}" for n in range(3000)))
    words = [sys.executable, "-m", "starlm", "data", "prepare", ".", "--out", "out/data"]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out").is_dir() or not os.listdir(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert b"interrupted: " in process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert os.listdir(tmp_path / "out") == []
