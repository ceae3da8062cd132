"""The operator's benchmark at sizes where it costs nothing: what is in the table, and what is refused."""

import json

import pytest
import torch

from starlm.bench import op
from starlm.bench.config import OpOptions
from starlm.bench.timing import Timing, interleave
from starlm.errors import InputError, StarLMError
from starlm.ops.reference import deform_reference

TINY = {"batch_tokens": 64, "lengths": (64, 16), "dim": 6, "channels": 3, "repeats": 2}


@pytest.fixture
def _no_compiler(monkeypatch):
    """torch.compile takes seconds, and cannot trace the shape checks."""
    monkeypatch.setattr(op, "_compile", lambda: deform_reference)


@pytest.mark.usefixtures("_no_compiler")
def test_every_cell_is_measured_and_printed(capsys):
    result = op.main(OpOptions(**TINY), {"processor": "abacus"})
    assert json.loads(json.dumps(result))["machine"] == {"processor": "abacus"}
    cells = {(c["length"], c["shift"], c["peer"], c["kind"]) for c in result["cells"]}
    wanted = {
        (length, shift, peer, kind)
        for length in (16, 64)
        for shift in (0.8, 50.0)
        for peer in ("reference", "compiled", "cpu")
        for kind in ("forward", "both")
    }
    wanted |= {(length, None, "attention", kind) for length in (16, 64) for kind in ("forward", "both")}
    wanted |= {(length, None, "memory limit", "forward") for length in (16, 64)}
    assert cells == wanted
    assert result["skipped"] == []
    for cell in result["cells"]:
        assert len(cell["seconds"]) == 2
        assert cell["ns_per_token"] == pytest.approx(sum(cell["seconds"]) / 2 / 64 * 1e9)
    assert (
        result["command"]
        == "starlm bench op --batch-tokens 64 --lengths 64 16 --dim 6 --channels 3 --repeats 2"
    )
    out = capsys.readouterr().out
    assert "processor: abacus" in out
    rows = [line.split()[:3] for line in out.splitlines() if line.startswith(("     16", "     64"))]
    assert rows[:3] == [["16", "0.8", "reference"], ["16", "0.8", "compiled"], ["16", "0.8", "cpu"]]
    assert len([row for row in rows if row[0] == "64"]) == 2 * 3 + 2


@pytest.mark.usefixtures("_no_compiler")
def test_the_claims_are_ratios_of_the_medians(capsys):
    result = op.main(
        OpOptions(**{**TINY, "batch_tokens": 4096, "lengths": (2048, 4096), "shifts": (0.8,)}), {}
    )
    seconds = {(c["length"], c["peer"], c["kind"]): sum(c["seconds"]) / 2 for c in result["cells"]}
    first = result["cpu_over_reference"][0]
    assert (first["length"], first["pass"], first["shift"]) == (2048, "forward", 0.8)
    assert first["ratio"] == pytest.approx(
        seconds[2048, "reference", "forward"] / seconds[2048, "cpu", "forward"]
    )
    growth = result["cpu_time_per_token"]
    assert [(g["length"], g["over"], g["pass"]) for g in growth] == [
        (4096, 2048, "forward"),
        (4096, 2048, "forward+backward"),
    ]
    assert all(g["ratio"] > 0 for g in growth)
    out = capsys.readouterr().out
    assert "times as fast as the reference" in out
    assert "time per token at T = 4096 is" in out


@pytest.mark.usefixtures("_no_compiler")
def test_what_would_take_too_long_is_named_not_hidden(capsys):
    result = op.main(OpOptions(**TINY, limit_seconds=0.0), {})
    missing = [(c["length"], c["peer"], c["kind"]) for c in result["skipped"]]
    assert missing == [(64, "attention", "forward"), (64, "attention", "both")]
    assert "64         attention, forward: skipped, about" in capsys.readouterr().out


def test_without_a_compiler_the_rest_is_measured(capsys, monkeypatch):
    def broken(values, shift):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(op, "_compile", lambda: broken)
    result = op.main(OpOptions(**TINY), {})
    assert {c["peer"] for c in result["skipped"]} == {"compiled"}
    assert "torch.compile does not run here (RuntimeError)" in capsys.readouterr().out


@pytest.mark.parametrize("peer", ["cpu", "compiled"])
@pytest.mark.parametrize("fault", ["late", "nan"])
def test_a_wrong_operator_is_not_timed(monkeypatch, peer, fault):
    def wrong(values, shift):
        return (
            deform_reference(values, shift + 1e-3)
            if fault == "late"
            else deform_reference(values, shift) * torch.nan
        )

    monkeypatch.setattr(op, "_cpu", wrong if peer == "cpu" else deform_reference)
    monkeypatch.setattr(op, "_compile", lambda: deform_reference if peer == "cpu" else wrong)
    monkeypatch.setattr(op, "interleave", lambda calls, rounds: pytest.fail("it was timed"))
    with pytest.raises(StarLMError, match=f"output of {peer} is off by .* Run `starlm doctor`"):
        op.main(OpOptions(**TINY), {})


@pytest.mark.compile
def test_the_compiled_reference_is_a_peer():
    result = op.main(OpOptions(**{**TINY, "lengths": (16,), "shifts": (0.8,)}), {})
    assert result["skipped"] == []
    assert {c["peer"] for c in result["cells"]} >= {"compiled"}


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(tmp_path, capsys, suffix):
    path = tmp_path / f"op.{suffix}"
    op.main(OpOptions(**TINY, plot=path), {})
    assert path.stat().st_size > 5000
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize("mean", [0.8, 50.0])
def test_shifts_have_the_mean_they_are_named_for(mean):
    problem = op.Problem.make(2, 500, 4, 16, mean)
    assert problem.shift.mean().item() == pytest.approx(mean, rel=0.02)
    assert problem.shift.min().item() > 0


def test_calls_take_turns():
    order = []
    timings = interleave({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert all(len(timing.seconds) == 3 for timing in timings.values())


def test_spread_is_the_interquartile_range_over_the_median():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (timing.median, timing.spread) == (3.0, (4.0 - 2.0) / 3.0)
    assert Timing((7.0,)).spread == 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": (100,)}, "lengths must be divisors of batch_tokens (131072); got (100,)"),
        ({"lengths": ()}, "lengths must be divisors"),
        ({"dim": 100}, "channels must be a divisor of dim (100); got 64"),
        ({"shifts": (0.0,)}, "shifts must be above 0"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"plot": "nowhere/op.png"}, "plot must be in a folder that exists"),
        ({"plot": "op.gif"}, "plot must be a file that ends in .svg, .png, .pdf"),
    ],
)
def test_impossible_options_are_named(options, words, tmp_path):
    if "plot" in options:
        options = {"plot": tmp_path / options["plot"]}
    with pytest.raises(InputError) as error:
        OpOptions(**options)
    assert words in str(error.value)
