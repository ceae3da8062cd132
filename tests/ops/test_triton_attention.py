"""Attention's kernel for a decode step: results by the interpreter, apart, and the code compiled for GPUs."""

import re

import pytest
from test_triton import AMD, NVIDIA, OLD_NVIDIA, interpreted


def test_under_the_interpreter():
    interpreted(file="interpreted_triton_attention.py")


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Compile the kernel for a GPU that need not be there; gives what the compiler's stages say."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from starlm.ops import triton_attention

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile(target, dtype="bf16", channels=64, turned=True):
        kernel = triton_attention._attend
        constants = triton_attention.sizes(channels) | ({} if turned else {"turns": None})
        types = dict.fromkeys(("query", "key", "value", "out"), f"*{dtype}")
        types |= {"turns": "*fp32", "places": "*i64"}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constants)
        return triton.compile(source, target=GPUTarget(*target), options=triton_attention.OPTIONS).asm

    return compile


@pytest.mark.parametrize(("dtype", "channels"), [("fp32", 33), ("bf16", 64), ("fp16", 128), ("bf16", 1)])
@pytest.mark.parametrize("turned", [False, True])
def test_code_for_gpus(build, dtype, channels, turned):
    stages = build(NVIDIA, dtype, channels, turned)
    # A program has one number: the other dimensions of a grid end at 65535.
    assert set(re.findall(r"tt\.get_program_id (\w)", stages["ttir"])) == {"x"}
    assert stages["cubin"]
    # Rows are read 16 bytes at a time where heads are as wide.
    assert ("ld.global.v4.b32" in stages["ptx"]) == (channels > 33)


@pytest.mark.parametrize(
    ("target", "binary"), [(OLD_NVIDIA, "cubin"), (AMD, "hsaco")], ids=["sm_80", "gfx942"]
)
def test_older_and_other_gpus(build, target, binary):
    assert build(target)[binary]
