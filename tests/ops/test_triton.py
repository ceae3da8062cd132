"""The Triton kernels: results by the interpreter, in another process, and the code compiled for GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from starlm.errors import InputError
from starlm.ops import deform

HERE = Path(__file__).parent
NVIDIA, OLD_NVIDIA, AMD = ("cuda", 90, 32), ("cuda", 80, 32), ("hip", "gfx942", 64)


def interpreted(*options, file="interpreted_triton.py"):
    # Triton chooses between interpreter and compiler when it is imported, once for a process.
    tests = HERE / file
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, tests],
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)
    assert "skipped" not in done.stdout


def test_under_the_interpreter():
    interpreted()


@pytest.mark.compile
def test_under_the_interpreter_and_torch_compile():
    interpreted("-m", "compile")


@pytest.mark.gpu
def test_on_this_gpu():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "check"], cwd=HERE.parents[1], timeout=600)
    assert done.returncode == 0


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Compile a kernel for a GPU that need not be there; gives what the compiler's stages say."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from starlm.ops import triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile(kernel, target, dtype="bf16", indices="i64", wide=False, **constants):
        exact = "fp64" if dtype == "fp64" else "fp32"
        reads = kernel == "_forward"
        constants |= {"EXACT": tl.float64 if exact == "fp64" else tl.float32, "WIDE": wide, "CHANNELS": 64}
        constants |= {"TIME": kernels.TIME, "LANES": kernels.LANES if reads else 32}
        alone = constants.get("ATOMIC") is False
        scatter = kernels._scatter_each(kernels.SCATTER_EACH, wide, alone)
        constants |= {"EACH": kernels.EACH if reads else scatter}
        constants |= {} if indices else dict.fromkeys(("origin", "first", "past"))
        types = dict.fromkeys(("values", "shift", "grad", "out", "dshift"), f"*{dtype}")
        types |= dict.fromkeys(("origin", "first", "past"), f"*{indices}") | {"dvalues": f"*{exact}"}
        kernel = getattr(kernels, kernel)
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(
            constants, "constexpr"
        )
        # As the launcher marks them for the usual sizes: this is what makes wide loads of channels possible.
        aligned = [["tt.divisibility", 16]]
        attributes = {
            (place,): aligned
            for place, name in enumerate(kernel.arg_names)
            if signature[name] != "constexpr" and name not in ("rows", "length", "span")
        }
        options = {"num_warps": kernels.WARPS if reads else 1, "enable_fp_fusion": False}
        source = ASTSource(kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget(*target), options=options).asm

    return compile


KERNELS = {
    "forward": ("_forward", {}),
    "backward": ("_backward", {"ATOMIC": True}),
    "deterministic": ("_backward", {"ATOMIC": False}),
}


@pytest.mark.parametrize("indices", ["i64", ""])
@pytest.mark.parametrize("kernel", KERNELS)
def test_code_for_gpus(build, kernel, indices):
    name, constants = KERNELS[kernel]
    stages = build(name, NVIDIA, indices=indices, **constants)
    # A program has one number: the other dimensions of a grid end at 65535.
    assert set(re.findall(r"tt\.get_program_id (\w)", stages["ttir"])) == {"x"}
    one_place_per_lane(stages)
    assert ("tt.atomic_rmw" in stages["ttir"]) == (kernel == "backward")
    if kernel == "forward":
        assert "ld.global.v2.b32" in stages["ptx"], "neighbouring channels are not loaded at once"
    if kernel == "backward" and not indices:
        assert "add.v2.f32" in stages["ptx"], "neighbouring channels are not added at once"


def one_place_per_lane(stages):
    """Neighbouring lanes own neighbouring channels; what a lane adds without atomics, it adds alone."""
    layouts = re.findall(r"sizePerThread = \[(.*?)\], threadsPerWarp = \[(.*?)\]", stages["ttgir"])
    assert ("1, 1", "32, 1") in layouts
    from starlm.ops import triton as kernels

    several = {(f"1, {each}", "32, 1") for each in (1, kernels.EACH, kernels.SCATTER_EACH)}
    assert set(layouts) <= several | {("1, 1", "16, 2")}
    if "tt.atomic_rmw" not in stages["ttgir"]:
        assert ("1, 1", "16, 2") not in layouts
    # A lane's channels may be named in two ways, but nothing goes through shared memory.
    assert not re.search(r"(ld|st)\.shared|bar\.sync", stages["ptx"])


def test_a_shift_of_nan_is_guarded_where_the_gpu_does_not(build):
    """An NVIDIA GPU makes 0 of NaN in fp32 by itself, of one in fp64 the least integer."""
    guarded = {
        dtype: "cmpf oeq" in build("_forward", NVIDIA, dtype=dtype)["ttir"] for dtype in ("fp32", "fp64")
    }
    assert guarded == {"fp32": False, "fp64": True}


@pytest.mark.parametrize("kernel", KERNELS)
def test_wide_places_have_no_narrow_product(build, kernel):
    name, constants = KERNELS[kernel]
    # But where the span of a program begins, which is below T.
    wanted = 0 if kernel == "forward" else 1
    assert narrow_products(build(name, NVIDIA, wide=True, **constants)["ttir"]) == wanted
    assert narrow_products(build(name, NVIDIA, wide=False, **constants)["ttir"]) > wanted


def narrow_products(ttir):
    """How many products in 32 bits have two factors that are no constants."""
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    products = re.findall(r"arith\.muli (%\S+), (%\S+) : (?:tensor<[\dx]*x)?i32\b", ttir)
    return sum(not constants & set(factors) for factors in products)


def test_a_narrow_product_is_found():
    assert narrow_products("%a = arith.muli %b, %c : tensor<16x128xi32>\n%d = arith.muli %e, %f : i32") == 2
    assert narrow_products("%c = arith.constant 128 : i32\n%a = arith.muli %b, %c : i32") == 0
    assert narrow_products("%a = arith.muli %b, %c : i64\n%d = arith.muli %e, %f : tensor<16xi64>") == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("target", "binary"), [(OLD_NVIDIA, "cubin"), (AMD, "hsaco")], ids=["sm_80", "gfx942"]
)
def test_older_and_other_gpus(build, target, binary, kernel):
    name, constants = KERNELS[kernel]
    assert build(name, target, **constants)[binary]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("indices", ["i64", "i32", ""])
@pytest.mark.parametrize("dtype", ["fp16", "fp32", "fp64"])
def test_every_dtype_is_compiled(build, dtype, indices, kernel):
    name, constants = KERNELS[kernel]
    for target, binary in ((NVIDIA, "cubin"), (OLD_NVIDIA, "cubin"), (AMD, "hsaco")):
        assert build(name, target, dtype, indices, **constants)[binary]


def test_cpu_tensors_need_the_interpreter():
    values = torch.zeros(1, 2, 1, 1)
    with pytest.raises(InputError, match=r"needs GPU tensors; got cpu. .*TRITON_INTERPRET=1"):
        deform(values, values, backend="triton")


def test_without_the_package(monkeypatch):
    # By its full name, which the function of the same name hides.
    monkeypatch.setattr(sys.modules["starlm.ops.deform"], "HAS_TRITON", False)
    values = torch.zeros(1, 2, 1, 1)
    with pytest.raises(InputError, match=r"pip install 'starlm\[gpu\]'"):
        deform(values, values, backend="triton")


def test_auto_takes_the_kernels_of_the_device(monkeypatch):
    module = sys.modules["starlm.ops.deform"]
    wanted = {"cpu": "cpu", "cuda": "triton", "meta": "reference"}
    assert {name: module._fastest(torch.device(name)) for name in wanted} == wanted
    monkeypatch.setattr(module, "HAS_TRITON", False)
    assert module._fastest(torch.device("cuda")) == "reference"
