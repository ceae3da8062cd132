"""`python -m benchmarks.gpu`, as far as a machine without a GPU can tell."""

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_checks import NotRun, assert_close


@pytest.mark.parametrize("what", ["check", "bench"])
def test_without_a_gpu(what, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([what]) == 2
    assert f"benchmarks.gpu {what} needs a GPU" in capsys.readouterr().err


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit:
        gpu.main(["time"])
    assert exit.value.code == 2
    assert "'time'" in capsys.readouterr().err


def test_check_tells_what_failed_and_what_was_not_run(capsys):
    def wrong(device, length):
        raise AssertionError(f"off at {length} on {device}")

    def impossible(device, length):
        raise NotRun("needs 43 GiB, 2 are free")

    assert gpu.check("cpu", 7, {"fine": lambda device, length: None, "large": impossible}) == 0
    assert gpu.check("cpu", 7, {"fine": lambda device, length: None, "bad": wrong}) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "fine ok",
        "large not run: needs 43 GiB, 2 are free",
        "No check failed.",
        "fine ok",
        "bad FAILED: off at 7 on cpu",
        "1 of 2 failed",
    ]


def test_table():
    names = {"shape": (1, 2, 3, 4), "kind": gpu.FORWARD}
    cells = [
        gpu.Cell(peer="deform", milliseconds=1.5, low=1.25, high=2.0, share_of_copy=0.505, **names),
        gpu.Cell(peer="other", milliseconds=12.0, low=11.0, high=13.0, **names),
    ]
    head, one, two, blank = gpu.table((1, 2, 3, 4), cells)
    assert head.split() == ["B/T/H/C", "1/2/3/4", "ms", "quartiles", "of", "copy"]
    assert one.split() == ["deform,", "forward", "1.500", "1.250", "-", "2.000", "50%"]
    assert two.split() == ["other,", "forward", "12.000", "11.000", "-", "13.000"]
    assert len(head) == len(one)
    assert blank == ""


def test_file_name():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_notices_one_element(dtype):
    wanted = torch.randn(100).to(dtype)
    assert_close("same", wanted, wanted, dtype)
    for change in (lambda x: x * (1 + 4 * torch.finfo(dtype).eps), lambda x: x * torch.nan, lambda x: -x):
        wrong = wanted.clone()
        wrong[17] = change(wrong[17])
        with pytest.raises(AssertionError, match="wrong"):
            assert_close("wrong", wrong, wanted, dtype)
