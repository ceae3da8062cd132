"""Tables of peers: what is measured, compared, left out and drawn; the benchmarks at tiny sizes."""

import dataclasses
import json
import sys

import pytest
import torch

from starlm.bench import decode, layer, step, timing
from starlm.bench import grid as grid_module
from starlm.bench.config import DecodeOptions, LayerOptions, TrainBenchOptions
from starlm.bench.grid import Grid, Peer, run
from starlm.bench.timing import peak_memory
from starlm.errors import InputError

LAYER = LayerOptions(batch_tokens=64, lengths=(16, 64), dim=32, repeats=2, device="cpu")
GRID = Grid(axis="T", unit="ms per call", value=lambda seconds, _: seconds * 1e3, baseline="a")


def by_cell(result):
    return {(cell["peer"], cell["size"]): cell for cell in result["cells"]}


def test_a_table_of_two_peers(capsys):
    calls = []

    def peer(name):
        return Peer(make=lambda size: lambda: calls.append((name, size)))

    result = run("layer", GRID, {"a": peer("a"), "b": peer("b")}, LAYER, {"processor": "abacus"})
    # Each is called once to warm it, then in two rounds, by turns.
    assert calls[:6] == [("a", 16), ("b", 16), ("a", 16), ("b", 16), ("b", 16), ("a", 16)]
    cells = by_cell(result)
    assert set(cells) == {(name, size) for name in "ab" for size in (16, 64)}
    a, b = cells["a", 16], cells["b", 16]
    assert a["value"] == pytest.approx(sum(a["seconds"]) / 2 * 1e3)
    assert b["over_baseline"] == pytest.approx(sum(b["seconds"]) / sum(a["seconds"]))
    assert (
        result["command"]
        == "starlm bench layer --repeats 2 --device cpu --batch-tokens 64 --lengths 16 64 --dim 32"
    )
    assert result["device"] == "cpu"
    assert (a["calls"], result["left_out"]) == (1, {})
    assert json.loads(json.dumps(result))["machine"] == {"processor": "abacus"}
    out = capsys.readouterr().out
    assert "processor: abacus" in out
    assert "ms per call: median" in out


def test_sizes_that_are_compared_go_by_together(capsys):
    calls = []
    peers = {"a": Peer(make=lambda size: lambda: calls.append(size))}
    result = run("layer", dataclasses.replace(GRID, together=True), peers, LAYER, {})
    assert calls == [16, 64, 16, 64, 64, 16]
    assert set(by_cell(result)) == {("a", 16), ("a", 64)}
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:9].strip().isdigit()]
    assert rows == ["16", "64"]


def test_what_would_take_too_long_is_named_not_hidden(capsys):
    options = dataclasses.replace(LAYER, repeats=1, limit_seconds=0.0)
    fast = Peer(make=lambda size: lambda: None)
    growing = Peer(make=lambda size: lambda: sum(range(1000)), cost=float)
    result = run("layer", GRID, {"a": fast, "b": growing}, options, {})
    assert set(by_cell(result)) == {("a", 16), ("a", 64), ("b", 16)}
    assert [(row["peer"], row["size"]) for row in result["skipped"]] == [("b", 64)]
    out = capsys.readouterr().out
    assert "b at 64: skipped, about" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("       64")] == ["skipped"]


def test_what_a_longer_call_would_take_follows_from_its_cost():
    options = TrainBenchOptions(
        batch_tokens=64, lengths=(32, 256), dim=16, depth=1, repeats=1, limit_seconds=0.0, device="cpu"
    )
    result = step.main(options, {})
    (row,) = result["skipped"]
    (before,) = by_cell(result)[step.TRANSFORMER, 32]["seconds"]
    # 256 tokens where 64 were; each costs 6 D + T: 352 where it was 128.
    assert float(row["why"].split()[1]) == pytest.approx(before * 4 * 352 / 128, rel=0.06)


def test_layers(tmp_path):
    plot = tmp_path / "layer.png"
    options = dataclasses.replace(LAYER, repeats=1, plot=plot)
    result = layer.main(options, {})
    names = {"4 matrix products", "gated", "star", "attention", "short convolution", "Mamba-2"}
    assert {peer for peer, _ in by_cell(result)} == names
    assert plot.stat().st_size > 1000
    half = dataclasses.replace(LAYER, lengths=(16,), repeats=1, dtype="bfloat16")
    assert len(layer.main(half, {})["cells"]) == len(names)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts it")
def test_memory_of_a_call(capsys):
    def take(mebibytes):
        # Written to, for the kernel gives pages only then; let go before the call ends.
        bytearray(b"x") * (mebibytes << 20)

    take(200)
    for mebibytes in (32, 128):
        assert peak_memory(lambda m=mebibytes: take(m)) / 2**20 == pytest.approx(mebibytes, rel=0.1)
    assert peak_memory(lambda: None) < 2**20
    grid = dataclasses.replace(GRID, memory=True)
    peers = {"a": Peer(make=lambda size: lambda: take(size)), "b": Peer(make=lambda size: lambda: None)}
    cells = by_cell(run("layer", grid, peers, LAYER, {}))
    assert cells["a", 64]["peak_bytes"] / 2**20 == pytest.approx(64, rel=0.1)
    lines = capsys.readouterr().out.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("MiB that a call takes"))
    assert [line.split()[0] for line in lines[begin + 2 :]] == ["T", "16", "64"]


def test_memory_that_nobody_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "PROCESS", tmp_path / "none")
    calls = []
    assert peak_memory(lambda: calls.append(1)) is None
    assert calls == [1]
    grid = dataclasses.replace(GRID, memory=True)
    cells = by_cell(run("layer", grid, {"a": Peer(make=lambda size: lambda: None)}, LAYER, {}))
    assert cells["a", 16]["peak_bytes"] is None
    assert "MiB" not in capsys.readouterr().out


STEPS = TrainBenchOptions(
    batch_tokens=32, lengths=(16, 64), dim=32, depth=2, vocab_size=50, repeats=1, device="cpu"
)
DECODE = DecodeOptions(
    contexts=(10, 50), tokens=3, dim=32, depth=2, vocab_size=50, max_shift=4, repeats=1, device="cpu"
)


def test_steps():
    result = step.main(STEPS, {})
    cells = by_cell(result)
    assert {peer for peer, _ in cells} == {"transformer", "star", "gated", "short convolution"}
    few = step.main(dataclasses.replace(STEPS, lengths=(16,), peers=("conv", "star-W256")), {})
    assert [(cell["peer"], cell["over_baseline"]) for cell in few["cells"]] == [
        ("short convolution", None),
        ("star, DDW over 256", None),
    ]
    assert few["command"].endswith("--peers conv star-W256")
    # Two rows of 16 tokens, and one of 64 where a row is longer than batch_tokens.
    for size, tokens in ((16, 32), (64, 64)):
        assert cells["star", size]["value"] == pytest.approx(tokens / cells["star", size]["seconds"][0])


def test_what_a_step_had():
    """What was asked for, or what it came to where rows do not fill it."""
    for lengths, told in (((16, 32), "32"), ((16, 24, 64), "2 x 16, 1 x 24, 1 x 64")):
        options = dataclasses.replace(STEPS, lengths=lengths, batch_tokens=32)
        assert options.describe().startswith(f"{told} tokens a step, ")


@pytest.mark.parametrize(("value", "shown"), [(0.12345, "0.1235"), (999.4, "999.4"), (11738.2, "11,738")])
def test_figures_in_tables_can_be_read(capsys, value, shown):
    grid = dataclasses.replace(GRID, value=lambda seconds, _: value)
    run("layer", grid, {"a": Peer(make=lambda size: lambda: None)}, LAYER, {})
    assert f" {shown} (" in capsys.readouterr().out


def test_decoding(capsys):
    result = decode.main(DECODE, {})
    assert {peer for peer, _ in by_cell(result)} == {
        *("weights read once", "star", "gated", "gated, 4 back", "attention")
    }
    bytes_of = result["state_bytes"]
    assert bytes_of["star"][50] >= bytes_of["star"][10] > 0
    assert result["weight_bytes"] == 4 * (2 * 12 * 32 * 32 + 2 * 32 + 50 * 32)
    assert "Decode state, MiB" in capsys.readouterr().out
    bounded = dataclasses.replace(DECODE, contexts=(10,), peers=("bounded",))
    assert [peer for peer, _ in by_cell(decode.main(bounded, {}))] == ["weights read once", "gated, 4 back"]


def test_decoding_several_streams(capsys):
    one, three = (
        decode.main(dataclasses.replace(DECODE, contexts=(10,), batch=n, peers=("star", "attention")), {})
        for n in (1, 3)
    )
    for name in ("star", "attention"):
        assert three["state_bytes"][name][10] == 3 * one["state_bytes"][name][10] > 0
    for cell in three["cells"]:
        assert cell["tokens_per_second"] == pytest.approx(3 / cell["value"] * 1e3)
    out = capsys.readouterr().out
    assert "float32, one stream" in out
    assert "Tokens per second" in out
    assert "ms per step of 3 streams: median" in out


@pytest.mark.parametrize(
    ("verb", "options"), [(layer, LAYER), (step, STEPS), (decode, DECODE)], ids=["layer", "train", "decode"]
)
def test_a_device_that_is_not_there(verb, options):
    options = dataclasses.replace(options, device=f"cuda:{torch.cuda.device_count()}")
    with pytest.raises(InputError, match=r"device 'cuda:\d+' is not on this machine"):
        verb.main(options, {})


class TestFailures:
    """What a peer raises."""

    def failing(self, error, *, at, when):
        """A peer that fails at a size, when it is made, in its first call or in a later one."""

        def make(size):
            calls = iter(range(99))

            def call():
                if size == at and next(calls) == when:
                    raise error

            if size == at and when < 0:
                raise error
            return call

        return make

    @pytest.mark.parametrize("memory", [False, True])
    @pytest.mark.parametrize("when", [-1, 0, 2])
    def test_what_does_not_fit_into_memory_is_named(self, capsys, when, memory):
        error = torch.OutOfMemoryError("GPU out of memory. Tried to allocate 9 GiB.\nMore.")
        peers = {
            "a": Peer(make=lambda size: lambda: None),
            "b": Peer(make=self.failing(error, at=64, when=when)),
        }
        result = run("layer", dataclasses.replace(GRID, memory=memory), peers, LAYER, {})
        assert set(by_cell(result)) == {("a", 16), ("a", 64), ("b", 16)}
        (row,) = result["skipped"]
        why = "OutOfMemoryError: GPU out of memory. Tried to allocate 9 GiB."
        assert row == {"peer": "b", "size": 64, "why": why}
        assert f"b at 64: skipped, {why}" in capsys.readouterr().out

    def test_what_another_package_raises_is_named(self):
        make = self.failing(ValueError("no such head"), at=16, when=0)
        result = run("layer", GRID, {"a": Peer(make=make, foreign=True)}, LAYER, {})
        assert [row["why"] for row in result["skipped"]] == ["ValueError: no such head"]
        make = self.failing(ValueError("no such head"), at=16, when=0)
        with pytest.raises(ValueError, match="no such head"):
            run("layer", GRID, {"a": Peer(make=make)}, LAYER, {})


def test_peers_that_do_not_run_here(capsys):
    options = dataclasses.replace(LAYER, lengths=(16,), peers=("conv", "gla"))
    result = layer.main(options, {})
    assert {peer for peer, _ in by_cell(result)} == {"4 matrix products", "short convolution"}
    assert result["left_out"] == {"GLA (fla)": "its kernels are for GPUs"}
    assert "GLA (fla): left out, its kernels are for GPUs" in capsys.readouterr().out


def test_bursts():
    """On a GPU short calls are timed many at once, on a CPU never."""
    gpu, calls = torch.device("cuda"), []
    assert [timing.burst(seconds, gpu) for seconds in (0.0, 1e-3, 0.02, 3.0)] == [1000, 20, 1, 1]
    assert timing.burst(1e-3, timing.CPU) == 1
    found = timing.interleave({"a": lambda: calls.append(1)}, 2, times={"a": 5})
    assert (len(calls), len(found["a"].seconds)) == (10, 2)


@pytest.fixture
def gpu_log(monkeypatch):
    """What is asked of a GPU that is not there."""
    log = []
    monkeypatch.setattr(grid_module, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(grid_module, "describe", lambda device: {"GPU": "abacus"})
    monkeypatch.setattr(timing, "BURST_CALLS", 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 107)
    return log


GPU_GRID = dataclasses.replace(GRID, memory=True)
ONE = dataclasses.replace(LAYER, lengths=(16,), repeats=1)
WARMED = ["call"] * timing.WARM_CALLS + ["reset", "call"]


def timed_as(what):
    """One for the length of a burst, then a burst."""
    return [what, *["wait", what, "wait"], *["wait", *[what] * 3, "wait"]]


def test_what_a_gpu_is_asked_for(gpu_log, capsys):
    """Warm-up, the peak of tensors, bursts."""
    peers = {"a": Peer(make=lambda size: lambda: gpu_log.append("call"))}
    result = run("layer", GPU_GRID, peers, ONE, {})
    assert gpu_log == WARMED + timed_as("call")
    (cell,) = result["cells"]
    assert (cell["peak_bytes"], cell["calls"], result["device"]) == (7, 3, "cuda")
    out = capsys.readouterr().out
    assert "GPU: abacus" in out
    assert "CUDA graphs" not in out


def test_calls_that_are_recorded(gpu_log, capsys, monkeypatch):
    """The memory is that of the call as it is, the time that of its replays."""
    monkeypatch.setattr(
        grid_module, "recorded", lambda call, device: call() or (lambda: gpu_log.append("replay"))
    )
    peers = {"a": Peer(make=lambda size: lambda: gpu_log.append("call"), record=True)}
    result = run("layer", GPU_GRID, peers, ONE, {})
    assert gpu_log == [*WARMED, "call", *timed_as("replay")]
    assert result["not_recorded"] == []
    assert "recorded as CUDA graphs and replayed" in capsys.readouterr().out


@pytest.mark.parametrize("foreign", [False, True])
def test_calls_that_cannot_be_recorded(gpu_log, capsys, monkeypatch, foreign):
    def fail(call, device):
        try:
            raise RuntimeError("called a synchronizing CUDA operation\nMore.")
        finally:
            raise ValueError("no such graph") if foreign else RuntimeError("capture failed")

    monkeypatch.setattr(grid_module, "recorded", fail)
    peer = Peer(make=lambda size: lambda: gpu_log.append("call"), record=True, foreign=foreign)
    result = run("layer", GPU_GRID, {"a": peer}, ONE, {})
    assert gpu_log == WARMED + timed_as("call")
    why = "RuntimeError: called a synchronizing CUDA operation"
    assert result["not_recorded"] == [{"peer": "a", "size": 16, "why": why}]
    assert (len(result["cells"]), result["skipped"]) == (1, [])
    assert f"a at 16: not recorded, {why}\n" in capsys.readouterr().out


@pytest.mark.compile
def test_compiled_steps():
    options = dataclasses.replace(STEPS, depth=1, lengths=(16, 32), compile=True)
    result = step.main(options, {})
    assert len(result["cells"]) == 2 * len(options.peers)
    assert result["skipped"] == []


@pytest.mark.gpu
# Of PyTorch, where a thread of autograd begins with a product.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("verb", "options"), [(layer, LAYER), (step, STEPS), (decode, DECODE)], ids=["layer", "train", "decode"]
)
def test_on_a_gpu(verb, options, dtype, capsys):
    if verb is layer:
        # Layers of other packages are tuned for minutes first.
        options = dataclasses.replace(options, peers=layer.OWN)
    options = dataclasses.replace(options, device="cuda", dtype=dtype, dim=64)
    result = json.loads(json.dumps(verb.main(options, {})))
    assert result["device"] == "cuda"
    assert {"GPU", "CUDA"} <= set(result["machine"])
    assert (result["skipped"], result["not_recorded"]) == ([], [])
    assert all(cell["calls"] >= 1 and min(cell["seconds"]) > 0 for cell in result["cells"])
    if verb is not decode:
        assert all(cell["peak_bytes"] > 0 for cell in result["cells"])
    assert "the GPU idle before and after" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.gpu
def test_a_recorded_call_on_a_gpu():
    """It gives what the call gives, and leaves nothing behind; what waits for the GPU is refused."""
    device = torch.device("cuda")
    for module in (torch.nn.Linear(32, 32), layer.Deformer(32, 4, preset="star")):
        call = layer._layer(module, dataclasses.replace(LAYER, device="cuda"), 16)
        wanted = [gradient.clone() for gradient in call()]
        # The first time, libraries make workspaces for the stream.
        timing.recorded(call, device)
        held = torch.cuda.memory_allocated()
        replay = timing.recorded(call, device)
        for gradient in replay():
            gradient.zero_()
        for found, gradient in zip(replay(), wanted, strict=True):
            torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-4)
        del replay, found
        assert torch.cuda.memory_allocated() <= held
        with pytest.raises(RuntimeError, match="synchronizing"):
            timing.recorded(lambda call=call: call()[0].sum().item(), device)
    assert torch.randn(3, device=device).shape == (3,)


@pytest.mark.gpu
def test_memory_of_a_call_on_a_gpu():
    device = torch.device("cuda")
    peak = peak_memory(lambda: torch.empty(64 << 20, dtype=torch.uint8, device=device), device=device)
    assert peak == pytest.approx(64 << 20, rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (LayerOptions(cuda_graph=False), "--no-cuda-graph"),
        (TrainBenchOptions(compile=True, peers=("star",)), "--peers star --compile"),
        (TrainBenchOptions(dtype="bfloat16", lengths=(8, 16)), "--dtype bfloat16 --lengths 8 16"),
    ],
)
def test_the_command_that_measures_the_same(options, words):
    assert grid_module.command("train", options) == f"starlm bench train {words}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: LayerOptions(lengths=(100,)), "lengths must be divisors of batch_tokens"),
        (lambda: LayerOptions(dim=20), "dim must be a multiple of 16"),
        (lambda: TrainBenchOptions(depth=0), "depth must be at least 1"),
        (lambda: TrainBenchOptions(peers=()), "peers must be at least one name"),
        (lambda: DecodeOptions(contexts=()), "contexts must be 1 or more"),
        (lambda: DecodeOptions(repeats=0), "repeats must be at least 1"),
        (lambda: DecodeOptions(batch=0), "batch must be at least 1"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(InputError, match=message):
        options()


def test_timed_layers_have_nothing_that_is_zero():
    """Output projections start at zero, which would leave out work and gradients."""
    call = layer._layer(torch.nn.Linear(32, 32), LAYER, 16)
    assert all(gradient.abs().sum() > 0 for gradient in call())
