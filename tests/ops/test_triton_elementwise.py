"""The kernels of relu² and of the loss: by the interpreter, compiled for GPUs, and when they are taken."""

import re

import pytest
import torch
from test_triton import AMD, NVIDIA, OLD_NVIDIA, interpreted, narrow_products

from starlm.ops import elementwise
from starlm.ops.backends import fuses, has_kernels
from starlm.ops.cross_entropy import cross_entropy


def test_under_the_interpreter():
    interpreted(file="interpreted_triton_elementwise.py")


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Compile a kernel for a GPU that need not be there; gives what the compiler's stages say."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from starlm.ops import triton_elementwise as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile(kernel, target, dtype, constants):
        kernel = getattr(kernels, kernel)
        types = dict.fromkeys(("x", "grad", "out", "logits"), f"*{dtype}")
        types |= {"targets": "*i64", "losses": "*fp32", "softcap": "fp32", "size": "i64"}
        types |= {"rows": "i64", "eps": "fp32"}
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        attributes = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if signature[name].startswith("*")
        }
        source = ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": 8, "enable_fp_fusion": True}
        return triton.compile(source, target=GPUTarget(*target), options=options).asm

    return compile


KERNELS = {
    "rms": ("_rms", {"WIDTH": 768, "ROWS": 1, "COLUMNS": 1024}),
    "rms, backward": ("_rms_backward", {"WIDTH": 33, "ROWS": 16, "COLUMNS": 64}),
    "relu2": ("_relu2", {"BLOCK": 1024}),
    "relu2, backward": ("_relu2_backward", {"BLOCK": 1024}),
    "loss": ("_softmax_loss", {"CAPPED": False, "GRAD": False, "WIDTH": 4099, "BLOCK": 4096}),
    "gradient": ("_softmax_loss", {"CAPPED": True, "GRAD": True, "WIDTH": 50304, "BLOCK": 4096}),
}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_code_for_gpus(build, kernel, dtype):
    name, constants = KERNELS[kernel]
    stages = build(name, NVIDIA, dtype, constants)
    assert stages["cubin"]
    # Rows lie beyond 2^31 elements: no product of two sizes in 32 bits.
    assert narrow_products(stages["ttir"]) == 0


def test_no_logit_is_overwritten_before_all_threads_have_read_it(build):
    name, constants = KERNELS["gradient"]
    steps = re.findall(r"tt\.load|tt\.store|barrier", build(name, NVIDIA, "bf16", constants)["ttgir"])
    assert steps[-3:] == ["tt.load", "barrier", "tt.store"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("target", "binary"), [(OLD_NVIDIA, "cubin"), (AMD, "hsaco")], ids=["sm_80", "gfx942"]
)
def test_older_and_other_gpus(build, target, binary, kernel):
    name, constants = KERNELS[kernel]
    assert build(name, target, "bf16", constants)[binary]


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_are_taken(monkeypatch):
    from starlm.ops import triton_elementwise as kernels

    taken = []
    for name in ("rms", "rms_backward", "relu2", "relu2_backward", "softmax_loss"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *x, n=name, k=kernel: (taken.append(n), k(*x))[1])
    x = torch.randn(5, device="cuda", requires_grad=True)
    weight, targets = torch.randn(7, 5, device="cuda"), torch.arange(1, device="cuda")
    elementwise.rms(x).sum().backward()
    elementwise.relu2(x).sum().backward()
    cross_entropy(x[None], weight, targets, softcap=15.0).backward()
    assert taken == ["rms", "rms_backward", "relu2", "relu2_backward", "softmax_loss"]


@pytest.mark.gpu
def test_rms_for_products_under_autocast():
    x = torch.randn(3, 50, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        assert elementwise.rms(x).dtype == torch.float32
        y = elementwise.rms(x, cast=True)
    assert y.dtype == torch.bfloat16
    assert elementwise.rms(x, cast=True).dtype == torch.float32
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    assert grad.dtype == torch.float32


def test_where_relu2_has_kernels():
    assert all(has_kernels(torch.device(name), torch.bfloat16) for name in ("cpu", "cuda"))
    x = torch.zeros(1, requires_grad=True)
    assert fuses(x)
    assert not fuses(x.to("meta"))
    assert not fuses(x.double())
