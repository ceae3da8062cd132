"""`python -m benchmarks.gpu`, as far as a machine without a GPU can tell."""

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_fla
from benchmarks.gpu_comparisons import NotRun, assert_close


@pytest.mark.parametrize("what", ["check", "bench", "warm", "tune"])
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
        gpu.Cell(
            peer="deform", milliseconds=1.5, low=1.25, high=2.0, recorded=True, share_of_copy=0.505, **names
        ),
        gpu.Cell(peer="other", milliseconds=12.0, low=11.0, high=13.0, recorded=False, **names),
    ]
    head, one, two, blank = gpu.table((1, 2, 3, 4), cells)
    assert head.split() == ["B/T/H/C", "1/2/3/4", "ms", "quartiles", "of", "copy"]
    assert one.split() == ["deform,", "forward", "1.500", "1.250", "-", "2.000", "50%"]
    assert two.split() == ["other,", "forward", "12.000", "11.000", "-", "13.000", "not", "recorded"]
    assert len(head) == len(one)
    assert blank == ""


def test_file_name():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_part_of_the_table_is_named():
    assert gpu.part(gpu.SHAPES, gpu.PEERS) == []
    words = gpu.part([gpu.SHAPES[1], gpu.SHAPES[0]], ["deform"])
    assert words == ["--shapes", "1", "0", "--peers", "deform"]


@pytest.fixture
def kernel(monkeypatch):
    """A kernel with six variants that says which of them it is asked to compile, and what is stored of it."""
    triton = pytest.importorskip("triton")
    from triton.runtime.autotuner import Autotuner

    def double(x, size, heads, BLOCK):
        """Never run."""

    def run(*args, warmup, grid, **kwargs):
        assert warmup
        asked.append((args[2], kwargs["BLOCK"]))
        if kwargs["BLOCK"] == 64:
            raise ValueError("too large")

    def look(tuner, key, variants, tune):
        if key in stored:
            tuner.cache[key] = stored[key]
        else:
            tune()

    asked, stored = [], {}
    monkeypatch.setattr(Autotuner, "check_disk_cache", look)
    variants = [triton.Config({"BLOCK": 2**n}) for n in range(1, 7)]
    tuned = Autotuner(double, ["x", "size", "heads", "BLOCK"], variants, ["size"], None, None)
    tuned.fn = SimpleNamespace(run=run)
    return SimpleNamespace(call=tuned[1,], asked=asked, stored=stored, variants=variants)


def test_parts_compile_all_variants_once_and_run_none(kernel):
    x, counts = torch.zeros(4), []
    for part in range(4):
        compiler = gpu_fla.Compiler(part, 4, time.time() + 60)
        with compiler.instead_of_running():
            for size, heads in ((4, 1), (4, 1), (4, 2), (8, 2)):
                kernel.call(x, size, heads)
        counts.append((compiler.compiled, compiler.failed, compiler.late))
    # Heads are not tuned for.
    assert sorted(kernel.asked) == sorted((heads, 2**n) for heads in (1, 2) for n in range(1, 7))
    assert [sum(found) for found in zip(*counts, strict=True)] == [10, 2, 0]


def test_what_was_tuned_is_compiled_alone(kernel):
    kernel.stored[4, "torch.float32"] = kernel.variants[2]
    compiler = gpu_fla.Compiler(0, 1, time.time() + 60)
    with compiler.instead_of_running():
        kernel.call(torch.zeros(4), 4, 1)
        kernel.call(torch.zeros(4), 4, 2)
    assert kernel.asked == [(1, 8), (2, 8)]


def test_nothing_is_begun_after_the_limit(kernel):
    compiler = gpu_fla.Compiler(0, 1, time.time() - 1)
    with compiler.instead_of_running():
        kernel.call(torch.zeros(4), 4, 1)
    assert (compiler.compiled, compiler.late, kernel.asked) == (0, 6, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_notices_one_element(dtype):
    wanted = torch.randn(100).to(dtype)
    assert_close("same", wanted, wanted, dtype)
    for change in (lambda x: x * (1 + 4 * torch.finfo(dtype).eps), lambda x: x * torch.nan, lambda x: -x):
        wrong = wanted.clone()
        wrong[17] = change(wrong[17])
        with pytest.raises(AssertionError, match="wrong"):
            assert_close("wrong", wrong, wanted, dtype)
