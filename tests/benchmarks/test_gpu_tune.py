"""`python -m benchmarks.gpu tune`: times are made up here, there being no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_tune

HERE = Path(__file__).parent


def test_the_kernels_under_the_interpreter():
    # Triton chooses between interpreter and compiler when it is imported, once for a process.
    tests = HERE / "interpreted_gpu_tune.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.fixture
def clock(monkeypatch):
    """Now, in seconds; each timed call takes one."""
    seconds = [0.0]

    def milliseconds(call, device):
        call()
        seconds[0] += 1
        return 2.0

    monkeypatch.setattr(gpu_tune, "milliseconds", milliseconds)
    monkeypatch.setattr(gpu_tune.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture
def problem(monkeypatch, clock):
    """Of kernels that say with which constants they are run: wrong at TIME 64, without room at 128."""
    module, ran = ModuleType("kernels"), []

    def compare():
        assert module.TIME != 64, "output: off"
        if module.TIME == 128:
            raise RuntimeError("out of shared memory\nand more")

    module.TIME, module.SPAN, module.TILE = 32, 16, 2048
    module.ran = ran
    module.forward = lambda values: ran.append(("forward", module.TIME, module.SPAN))
    module.backward = lambda grad, values: ran.append(("backward", module.TIME, module.SPAN))
    monkeypatch.setitem(gpu_tune.TENSORS, module, {"forward": 3, "backward": 5})
    changes = [
        {"TIME": 32},
        {"TIME": 16, "SPAN": 16},
        {"SPAN": 8},
        {"TIME": 64},
        {"TIME": 128},
        {"TILE": 1024},
    ]
    return gpu_tune.Problem("some", module, (torch.randn(1, 2, 3, 4),), compare, changes)


def test_what_a_change_concerns_is_timed_with_it(problem):
    copy, *tried = gpu_tune.measure("cpu", [problem], 100)
    assert (copy.problem, copy.shape, copy.share_of_copy) == (
        "copy of one tensor",
        (1, 2, 3, 4),
        {"forward": 1.0},
    )
    assert [list(one.milliseconds) for one in tried] == [
        ["forward", "backward"],
        ["forward"],
        ["backward"],
        [],
        [],
        ["forward", "backward"],
    ]
    assert problem.module.ran == [
        ("forward", 32, 16),
        ("backward", 32, 16),
        ("forward", 16, 16),
        ("backward", 32, 8),
        ("forward", 32, 16),
        ("backward", 32, 16),
    ]
    assert tried[1].setting == {"TIME": 16, "SPAN": 16, "TILE": 2048}
    assert tried[0].share_of_copy == {"forward": 1.5, "backward": 2.5}
    assert (problem.module.TIME, problem.module.SPAN, problem.module.TILE) == (32, 16, 2048)


def test_what_is_wrong_or_has_no_room_is_named_and_not_timed(problem):
    tried = list(gpu_tune.measure("cpu", [problem], 100))
    assert {one.changed["TIME"]: one.why for one in tried if one.why} == {
        64: "WRONG: output: off",
        128: "RuntimeError: out of shared memory",
    }
    assert not [one for one in tried if bool(one.why) == bool(one.milliseconds)]
    assert str(tried[4]).split() == ["some", "TIME=64", "WRONG:", "output:", "off"]
    assert str(tried[2]).split() == ["some", "TIME=16", "forward", "2.0000", "ms", "150%"]


def test_nothing_is_begun_after_the_limit(problem):
    whys = [one.why for one in gpu_tune.measure("cpu", [problem, problem], 3)]
    assert whys == ["", "", *["no time left"] * 11]


def test_the_fastest(problem):
    def tried(name, **times):
        return gpu_tune.Tried(problem=name, shape=(1,), changed={}, setting={"TIME": 1}, milliseconds=times)

    found = gpu_tune.fastest(
        [tried("a", forward=3.0, backward=2.0), tried("b", forward=1.0), tried("a", forward=2.0)]
    )
    assert [(one.problem, one.milliseconds) for one in found] == [
        ("a", {"forward": 2.0}),
        ("a", {"backward": 2.0}),
        ("b", {"forward": 1.0}),
    ]


def test_the_file(problem, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "_machine", lambda: {"GPU": "NVIDIA H200"})
    assert gpu.tune("cpu", 5.5, [problem]) == 1
    said = capsys.readouterr().out
    assert "TIME=64" in said
    assert "Fastest:" in said
    result = json.loads((tmp_path / "tune-gpu-nvidia-h200.json").read_text())
    assert result["command"] == "python -m benchmarks.gpu tune --seconds 5.5"
    assert result["machine"] == {"GPU": "NVIDIA H200"}
    assert result["settings"][2] == {
        "problem": "some",
        "shape": [1, 2, 3, 4],
        "changed": {"TIME": 16},
        "setting": {"TIME": 16, "SPAN": 16, "TILE": 2048},
        "milliseconds": {"forward": 2.0},
        "share_of_copy": {"forward": 1.5},
        "why": "",
    }
    assert gpu.tune("cpu", 4, [problem]) == 0


def test_the_results_of_an_h200_have_the_form_of_the_file():
    found = json.loads((gpu.RESULTS / "tune-gpu-nvidia-h200.json").read_text())
    tried = [gpu_tune.Tried(**one) for one in found["settings"]]
    assert {one.problem for one in tried if one.setting} == {
        "deform, mean shift 0.8",
        "deform, mean shift 50",
        "layer, gated (32+0+0)",
        "layer, star (16+8+8)",
    }
    for one in tried:
        assert one.milliseconds.keys() == one.share_of_copy.keys()
        assert one.changed.items() <= one.setting.items()
        assert not one.setting or one.setting.keys() >= {*gpu_tune.CONSTANTS[:6]}


@pytest.mark.parametrize(("words", "seconds"), [([], 80.0), (["--seconds", "7"], 7.0)])
def test_the_command_line(words, seconds, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "tune", lambda *arguments: asked.append(arguments) or 1)
    assert gpu.main(["tune", *words]) == 1
    assert asked == [("cuda", seconds)]
