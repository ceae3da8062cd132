"""Reading metrics.jsonl of runs that were cut off, went on, or are no runs."""

import json
import math

import pytest

from starlm.errors import InputError
from starlm.report.metrics import read_run, smooth
from starlm.report.page import write_report


def append(folder, *records):
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_a_whole_run(tmp_path, write_run):
    run = read_run(write_run(tmp_path / "a"))
    assert (run.name, run.last_step, run.tokens, run.seconds) == ("a", 60, 60 * 4096, 60.0)
    assert [r["step"] for r in run.validations] == [20, 40, 60]
    assert [r["prompt"] for r in run.samples] == ["def ", "<script>alert(1)</script>"]
    assert (run.end is not None, run.sessions, run.damaged, run.config) == (True, 1, 0, {"seed": 1})


@pytest.mark.parametrize("tail", ['{"kind": "st', '{"kind": "step", "step": 61', "\x00\x00", "12"])
def test_a_torn_last_line_is_dropped(tmp_path, write_run, tail):
    run = read_run(write_run(tmp_path / "a", tail=tail))
    assert (run.last_step, run.damaged) == (60, 0)


def test_damage_in_the_middle_is_counted(tmp_path, write_run):
    folder = write_run(tmp_path / "a", tail='{"ki\n[]\n{"kind": "step"}\n')
    append(folder, {"kind": "checkpoint", "step": 60, "path": "x"})
    assert read_run(folder).damaged == 3


def test_going_on_replaces_what_came_after_the_checkpoint(tmp_path, write_run):
    folder = write_run(tmp_path / "a")
    append(
        folder,
        {"kind": "plan", "step": 40, "steps": 90, "start_step": 40, "resumed": True},
        {"kind": "step", "step": 41, "loss": 1.5, "tokens": 41 * 4096, "seconds": 41.0},
    )
    run = read_run(folder)
    assert [r["step"] for r in run.steps] == list(range(1, 42))
    assert run.steps[-1]["loss"] == 1.5
    assert [r["step"] for r in run.validations] == [20, 40]
    assert (run.end, run.samples, run.sessions, run.plan["steps"]) == (None, [], 2, 90)


def test_the_later_record_of_a_step_counts(tmp_path, write_run):
    folder = write_run(tmp_path / "a")
    append(folder, {"kind": "validation", "step": 20, "loss": 1.0, "bits_per_byte": 0.5})
    run = read_run(folder)
    assert [r["step"] for r in run.validations] == [20, 40, 60]
    assert run.validations[0]["loss"] == 1.0


def test_no_run(tmp_path):
    with pytest.raises(
        InputError, match=r"cannot be reported on: metrics\.jsonl: No such file.*starlm train"
    ):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="has no record yet"):
        read_run(tmp_path)


def test_smooth():
    assert smooth([3.0], 9) == [3.0]
    assert smooth([], 9) == []
    assert smooth([1.0, 2.0], 9) == [1.0, 2.0]
    assert smooth([1.0, 2.0, 6.0], 3) == pytest.approx([0.5, 3.0, 5.5])
    line = [float(n) for n in range(50)]
    assert smooth(line, 11) == pytest.approx(line)


def test_smooth_does_not_end_on_the_noise_of_one_value():
    values = [3.0] * 50
    values[0] = values[-1] = 4.0
    smoothed = smooth(values, 7)
    assert len(smoothed) == 50
    assert max(smoothed) < 3.5


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "validation", "step": 60, "loss": None, "bits_per_byte": None},
        {"kind": "validation", "step": 60, "loss": 1.0},
        {"kind": "validation", "step": 60, "loss": "1", "bits_per_byte": 1.0},
        {"kind": "validation", "step": 60, "loss": 10**400, "bits_per_byte": 1.0},
        {"kind": "step", "step": 61, "loss": 1.0, "tokens": None, "seconds": 1.0},
        {"kind": "sample", "step": 61, "prompt": "a", "text": None},
        {"kind": ["step"], "step": 61},
    ],
)
def test_records_without_their_values_are_damaged(tmp_path, write_run, record):
    folder = write_run(tmp_path / "a")
    before = read_run(folder)
    append(folder, record, {"kind": "checkpoint", "step": 60, "path": "x"})
    run = read_run(folder)
    assert run.damaged == 1
    assert (run.steps, run.validations, run.samples) == (before.steps, before.validations, before.samples)


def test_a_line_that_nests_too_deep_is_damaged(tmp_path, write_run):
    assert read_run(write_run(tmp_path / "a", tail="[" * 100_000 + "\n{}\n")).damaged == 1


def test_no_loss_is_too_large_to_be_drawn(tmp_path, write_run):
    """What diverged stays as it is; what no sum can take is left out."""
    folder = write_run(tmp_path / "a")
    times = {"tokens": 1, "seconds": 1.0}
    append(folder, *({"kind": "step", "step": n, "loss": 1e308, **times} for n in range(61, 99)))
    append(folder, {"kind": "validation", "step": 98, "loss": math.inf, "bits_per_byte": math.nan})
    run = read_run(folder)
    assert (run.last_step, "loss" in run.steps[60], run.validations[-1]["loss"]) == (98, False, math.inf)
    assert "Training loss" in write_report([folder]).read_text()
