"""The decode step's kernel: results by the interpreter, apart, and the code compiled for GPUs."""

import re

import pytest
from test_triton import AMD, NVIDIA, OLD_NVIDIA, interpreted


def test_under_the_interpreter():
    interpreted(file="interpreted_triton_step.py")


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Compile the kernel for a GPU that need not be there; gives what the compiler's stages say."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from starlm.ops import triton_step

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile(target, dtype="bf16", channels=64, without=()):
        kernel = triton_step._step
        constants = {"CHANNELS": channels, "LANES": triton.next_power_of_2(channels)} | dict.fromkeys(without)
        types = dict.fromkeys(("values", "shift", "gate", "out"), f"*{dtype}")
        types |= {"origin": "*i64", "streams": "*i64", "furthest": "fp32"}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        options = {"num_warps": max(constants["LANES"] // 32, 1), "enable_fp_fusion": False}
        source = ASTSource(kernel, signature, constants)
        return triton.compile(source, target=GPUTarget(*target), options=options).asm

    return compile


@pytest.mark.parametrize(("dtype", "channels"), [("fp32", 33), ("bf16", 128), ("fp16", 1)])
@pytest.mark.parametrize("without", [(), ("gate",), ("origin", "gate")])
def test_code_for_gpus(build, dtype, without, channels):
    stages = build(NVIDIA, dtype, channels, without)
    # A program has one number: the other dimensions of a grid end at 65535.
    assert set(re.findall(r"tt\.get_program_id (\w)", stages["ttir"])) == {"x"}
    assert stages["cubin"]


@pytest.mark.parametrize(
    ("target", "binary"), [(OLD_NVIDIA, "cubin"), (AMD, "hsaco")], ids=["sm_80", "gfx942"]
)
def test_older_and_other_gpus(build, target, binary):
    assert build(target)[binary]
