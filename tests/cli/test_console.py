"""Progress as plain lines and as a bar; JSON."""

import io
import json
import re
import sys

import pytest

from starlm.cli.console import Console, duration


class Clock:
    """Time that passes when the test says so."""

    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_plain_lines(capsys, training_records):
    clock = Clock()
    with Console(clock=clock).training() as on_record:
        for record in training_records(steps=1000, every=250):
            if record["kind"] == "step":
                clock.now += 0.001
            on_record(record)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    lines = out.splitlines()
    assert lines[0] == "5.2 M parameters, layers 3 D and 1 W, 1,000 steps, on cpu (2 threads, float32)"
    steps = [line for line in lines if re.match(r"step [\d,]+/1,000  mean loss ", line)]
    # The first, the last, and one per 5 %.
    assert 20 <= len(steps) <= 22
    assert steps[0].startswith("step 1/1,000  mean loss 7.9000  4,096 tokens/s  eta 0:01")
    assert "step 250: validation loss 6.5000, 2.5000 bits per byte" in lines
    assert "    |     return [b]<x>" in lines
    assert sum("validation" in line for line in lines) == 4


def test_plain_lines_come_every_ten_seconds(capsys, training_records):
    clock = Clock()
    with Console(clock=clock).training() as on_record:
        for record in training_records(steps=1000, every=5000):
            if record["kind"] == "step":
                clock.now += 5.0
            on_record(record)
            if record.get("step") == 40:
                break
    steps = re.findall(r"^step (\d+)/", capsys.readouterr().out, re.MULTILINE)
    assert steps[:4] == ["1", "3", "5", "7"]


def test_a_resumed_run_says_so_and_its_eta_counts_from_there(capsys, training_records):
    clock = Clock()
    with Console(clock=clock).training() as on_record:
        for record in training_records(steps=100, start=90):
            if record["kind"] == "step":
                clock.now += 2.0
            on_record(record)
    out = capsys.readouterr().out
    assert "going on at step 90" in out
    assert "horizon" not in out
    assert "step 91/100  mean loss -1.1000  4,096 tokens/s  eta 0:18" in out


@pytest.mark.parametrize("epochs", [4.0, 10.52])
def test_more_epochs_than_help_are_told(capsys, training_records, epochs):
    with Console().training() as on_record:
        on_record(next(training_records(epochs=epochs)))
    said = f"every text is seen {epochs:.1f} times; beyond 4 times that gains ever less"
    assert (said in capsys.readouterr().out) == (epochs > 4)


def test_another_horizon_and_its_rate_are_told(capsys, training_records):
    with Console().training() as on_record:
        for record in training_records(steps=1100, start=90, before=100):
            on_record(record)
    said = "the horizon was 100 steps; now rates are those of a run of 1,100, the matrices' 0.0123"
    assert said in capsys.readouterr().out


def test_plain_progress(capsys):
    with Console(clock=Clock()).progress() as progress:
        for done in range(1, 101):
            progress("documents", done, 100)
        progress("tokens", 5, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "documents: 5/100 (5%)"
    assert lines[-1] == "documents: 100/100 (100%)"
    assert len(lines) == 20


def test_bar_on_a_terminal(monkeypatch, training_records):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Console().training() as on_record:
        for record in training_records(steps=20, start=5):
            on_record(record)
    screen = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", sys.stdout.getvalue())
    assert "20/20" in screen
    assert "tokens/s" in screen
    assert "eta" in screen
    assert "step 10: validation loss 6.5000" in screen
    assert "return [b]<x>" in screen


def test_samples_steer_no_terminal(monkeypatch):
    sample = {"kind": "sample", "step": 1, "prompt": "a", "text": "\x1b]0;title\x07\n\x85b"}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        with Console().training() as on_record:
            on_record(sample)
        assert "\x1b]0;" not in stream.getvalue()
        assert "    | a\\x1b]0;title\\x07\n    | \\x85b" in stream.getvalue()


def test_json_is_the_last_line_of_stdout_and_people_read_stderr(capsys):
    console = Console(json=True)
    console.say("hello")
    console.finish({"loss": float("nan"), "path": sys.prefix, "n": [1, 2.5, None, True]})
    captured = capsys.readouterr()
    assert captured.err == "hello\n"
    assert json.loads(captured.out) == {"loss": None, "path": sys.prefix, "n": [1, 2.5, None, True]}


def test_without_json_stdout_has_no_object(capsys):
    Console().finish({"a": 1})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (754, "12:34"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_run_that_was_done_before_does_not_go_on(capsys, training_records):
    with Console().training() as on_record:
        for record in training_records(steps=20, start=20):
            on_record(record)
    out = capsys.readouterr().out
    assert "all steps were done before" in out
    assert "going on" not in out
