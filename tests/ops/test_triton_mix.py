"""The fused layer's Triton kernels: results by the interpreter, in another process, and code for GPUs."""

import re
from contextlib import nullcontext

import pytest
import torch
from test_triton import AMD, NVIDIA, OLD_NVIDIA, interpreted, narrow_products, one_place_per_lane

TESTS = "interpreted_triton_mix.py"


def test_under_the_interpreter():
    interpreted(file=TESTS)


@pytest.mark.compile
def test_under_the_interpreter_and_torch_compile():
    interpreted("-m", "compile", file=TESTS)


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Compile a kernel for a GPU that need not be there; gives what the compiler's stages say."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from starlm.ops import triton_mix as host
    from starlm.ops import triton_mix_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile(kernel, target, dtype="bf16", full=True, channels=64, **constants):
        box = constants.get("KIND") == host.BOX
        columns = triton.next_power_of_2(channels)
        wide, alone = constants.get("WIDE", False), constants.get("ATOMIC") is False
        scatter = host._scatter_each(host.SCATTER_EACH, wide, alone)
        constants |= {
            "CHANNELS": channels,
            "LANES": host.LANES if kernel == "_forward" else 32,
            "EACH": host.EACH if kernel == "_forward" else scatter,
            "TIME": host.TIME,
            "WIDE": wide,
            "ROWS": host.TILE // columns,
            "COLUMNS": host.COLUMNS if kernel == "_scan" else columns,
            "BLOCKS": host.BLOCKS,
        }
        # What is not there: origins but of anchored heads, scales of sums; gate and first, where not full.
        absent = {"origin": constants.get("KIND") != host.ANCHORED, "scale": box}
        absent |= dict.fromkeys(("gate", "dgate", "first"), not full)
        absent |= {"totals": constants.get("SUMS") is False}
        name, kernel = kernel, getattr(kernels, kernel)
        constants |= {name: None for name, is_absent in absent.items() if is_absent}
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        types = dict.fromkeys(("values", "shift", "gate", "grad", "out", "dvalues", "dshift", "dgate"), dtype)
        types |= {"origin": "i64", "first": "i64", "totals": "fp64", "sums": "fp64", "scale": "fp32"}
        summed = box or constants.get("SUMS") or constants.get("REVERSE")
        types |= {"source": "fp64" if summed else dtype, "dread": "fp64" if summed else "fp32"}
        signature = {name: f"*{types[name]}" if name in types else "i32" for name in kernel.arg_names}
        signature |= {"furthest": "fp32"} if "furthest" in signature else {}
        signature |= dict.fromkeys(constants, "constexpr")
        # As the launcher marks them for the usual sizes.
        unmarked = ("scale_batch", "length", "span", "blocks", "heads", "furthest")
        attributes = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if signature[name] != "constexpr" and name not in unmarked
        }
        source = ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": 1 if name == "_backward" else 4, "enable_fp_fusion": True}
        return triton.compile(source, target=GPUTarget(*target), options=options).asm

    return compile


LANES = {
    f"{name} of {kind}": (kernel, {"KIND": number} | options)
    for number, kind in enumerate(("now", "anchored", "box"))
    for name, kernel, options in (
        ("forward", "_forward", {}),
        ("backward", "_backward", {"ATOMIC": True}),
        ("deterministic", "_backward", {"ATOMIC": False}),
    )
}
TILES = {
    "scales": ("_scales", {}),
    "totals": ("_totals", {"REVERSE": False}),
    "totals of gradients": ("_totals", {"REVERSE": True}),
    "scan": ("_scan", {}),
    "sums": ("_sums", {}),
    "finish": ("_finish", {"SUMS": False, "CLEAR": True}),
    "finish of sums": ("_finish", {"SUMS": True, "CLEAR": False}),
}


@pytest.mark.parametrize("kernel", LANES)
def test_lanes_for_gpus(build, kernel):
    name, constants = LANES[kernel]
    stages = build(name, NVIDIA, **constants)
    assert set(re.findall(r"tt\.get_program_id (\w)", stages["ttir"])) == {"x"}
    one_place_per_lane(stages)
    assert ("tt.atomic_rmw" in stages["ttir"]) == ("backward" in kernel)
    # No product of two sizes in 32 bits, but where the span of a program begins, which is below T.
    wide = build(name, NVIDIA, **constants, WIDE=True)
    assert narrow_products(wide["ttir"]) == (0 if name == "_forward" else 1)


@pytest.mark.parametrize("channels", [64, 48])
@pytest.mark.parametrize("kernel", TILES)
def test_tiles_for_gpus(build, kernel, channels):
    name, constants = TILES[kernel]
    stages = build(name, NVIDIA, channels=channels, **constants)
    assert set(re.findall(r"tt\.get_program_id (\w)", stages["ttir"])) == {"x"}
    assert narrow_products(stages["ttir"]) == 0
    # Neighbouring lanes have neighbouring channels.
    orders = re.findall(
        r"(#\w+) = #ttg.blocked<{sizePerThread = \[1, \d+\], .*order = \[1, 0\]}>", stages["ttgir"]
    )
    loads = re.findall(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr<\w+>, (#\w+)>", stages["ttgir"])
    assert loads
    assert set(loads) <= set(orders)


@pytest.mark.parametrize("kernel", ["scan", "finish"])
def test_nothing_is_overwritten_before_all_threads_have_read_it(build, kernel):
    """Its loads and stores may be spread over the threads in two ways: on a GPU some gradients were 0."""
    name, constants = TILES[kernel]
    steps = re.findall(r"tt\.load|tt\.store|barrier", build(name, NVIDIA, **constants)["ttgir"])
    # All that is loaded first, then the barrier, then what may overwrite it.
    barrier = steps.index("barrier")
    assert {*steps[:barrier]} == {"tt.load"}
    assert steps[barrier + 1] == "tt.store"


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [*LANES, *TILES])
@pytest.mark.parametrize(
    ("target", "binary"), [(OLD_NVIDIA, "cubin"), (AMD, "hsaco")], ids=["sm_80", "gfx942"]
)
def test_older_and_other_gpus(build, target, binary, kernel):
    name, constants = (LANES | TILES)[kernel]
    assert build(name, target, **constants)[binary]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [*LANES, *TILES])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_dtype_is_compiled(build, dtype, kernel):
    name, constants = (LANES | TILES)[kernel]
    assert build(name, NVIDIA, dtype, False, **constants)["cubin"]


def test_pieces_take_turns_on_streams_that_begin_and_end_in_the_current_one(monkeypatch):
    """With streams that only say who waits for whom; also where a piece fails."""
    from starlm.ops import triton_mix as host

    said, device, names = [], torch.device("cuda"), iter("abcdef")

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    monkeypatch.setattr(host, "_THREAD", host._Thread())
    monkeypatch.setattr(host, "STREAMS", 2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("here"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(stream.name))
    begin, end = ["a waits for here", "b waits for here"], ["here waits for a", "here waits for b"]

    def fails():
        with host._turns(3, device) as turns:
            for turn in turns:
                with turn as name:
                    said.append(name)
            raise MemoryError

    with pytest.raises(MemoryError):
        fails()
    assert said == [*begin, "a", "b", "a", *end]
    # One piece needs no other stream; the next call takes the same ones.
    said.clear()
    with host._turns(1, device) as turns:
        assert [type(turn) for turn in turns] == [nullcontext]
    assert said == []
    with host._turns(2, device):
        pass
    assert said == begin + end
