"""Reading metrics.jsonl of runs that were cut off, went on, or are no runs."""

import json

import pytest

from starlm.errors import InputError
from starlm.report.metrics import read_run, smooth


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
