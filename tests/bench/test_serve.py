"""The benchmark of a server, on a small one."""

import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent.parent / room) for room in ("serve", "model", "nn")]

from servers import make_run  # noqa: E402

from starlm.bench import serve  # noqa: E402
from starlm.bench.config import ServeBenchOptions  # noqa: E402
from starlm.errors import InputError, StarLMError  # noqa: E402


def test_a_server_under_load(tmp_path, capsys):
    options = ServeBenchOptions(
        model=make_run(tmp_path / "run"), clients=(1, 3), requests=2, prompt_tokens=(5, 40), tokens=4
    )
    result = json.loads(json.dumps(serve.main(options, {"processor": "abacus"})))
    for row, (length, clients) in zip(result["rows"], ((5, 1), (5, 3), (40, 1), (40, 3)), strict=True):
        assert (row["prompt_tokens"], row["clients"], row["requests"]) == (length, clients, 2 * clients)
        assert 0 < row["tokens"] <= 4 * row["requests"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 0 < row["first_ms"]["p50"] <= row["first_ms"]["p99"]
    out = capsys.readouterr().out
    assert "processor: abacus" in out
    assert [line.split()[:2] for line in out.splitlines()[-2:]] == [["40", "1"], ["40", "3"]]


def test_tokens_that_are_read_together_share_their_time():
    assert serve.gaps([]) == serve.gaps([1.0]) == []
    assert serve.gaps([1.0, 1.5, 3.5]) == [0.5, 2.0]
    # Of answers that came at once.
    assert serve._written(serve._percentiles([])) == "-"
    assert serve._written(serve._percentiles([0.5, 2.0, 2.0])) == "2,000.0  2,000.0"
    assert serve.gaps([1.0, 1.00005, 2.0, 2.00005, 2.0001]) == pytest.approx([1 / 3] * 3, abs=1e-4)


def test_a_server_that_does_not_start(tmp_path):
    with pytest.raises(StarLMError, match=r"did not start. error: There is no model at"):
        serve.main(ServeBenchOptions(model=tmp_path / "none"), {})


def test_impossible_options():
    with pytest.raises(InputError, match="clients must be 1 or more"):
        ServeBenchOptions(clients=())
    with pytest.raises(InputError, match="tokens must be at least 1; got 0"):
        ServeBenchOptions(tokens=0)
