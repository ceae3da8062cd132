"""The kernels of relu² and of the loss on CPU tensors, by Triton's interpreter, in a process of their own.

    TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_triton_elementwise.py

Against the definitions they are held by `benchmarks.gpu_checks`, which interpreted_triton.py runs.
"""

import sys

import pytest
import torch

from starlm.ops import elementwise, triton
from starlm.ops import triton_elementwise as kernels
from starlm.ops.cross_entropy import cross_entropy
from starlm.ops.plain import plain

assert triton.INTERPRETED, "set TRITON_INTERPRET=1"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def _on_the_cpu(monkeypatch):
    """What else a GPU's tensors take."""

    def losses(logits, targets, softcap, wants_grad):
        return kernels.softmax_loss(logits, targets, softcap, wants_grad), logits

    monkeypatch.setattr(sys.modules["starlm.ops.cross_entropy"], "_losses", losses)
    monkeypatch.setattr(elementwise, "load_kernels", lambda name, device: kernels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "out"), [((7, 33), None), ((3, 5, 64), torch.bfloat16), ((2, 1500), None)])
def test_rms(shape, out, dtype):
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(out or dtype)
    got = kernels.rms(x, elementwise.EPS, out or dtype)
    exact = x.double().requires_grad_()
    wanted = torch.nn.functional.rms_norm(exact, shape[-1:], eps=elementwise.EPS)
    (gradient,) = torch.autograd.grad(wanted, exact, grad.double())
    back = kernels.rms_backward(grad, x, elementwise.EPS)
    assert (got.dtype, back.dtype) == (out or dtype, dtype)
    # The interpreter cuts bfloat16 off.
    for a, b in ((got, wanted.detach()), (back, gradient)):
        tolerance = 1e-5 if a.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu2_in_memory_of_any_order(dtype):
    x, grad = torch.randn(40, 70).to(dtype).T, torch.randn(70, 40).to(dtype)
    x[0, 0] = torch.nan
    for got, wanted in (
        (kernels.relu2(x), x.float().relu().square()),
        (kernels.relu2_backward(grad, x), 2 * x.float().relu() * grad.float()),
    ):
        assert (got.shape, got.dtype) == (x.shape, dtype)
        torch.testing.assert_close(got.float(), wanted, rtol=2**-7, atol=1e-6, equal_nan=True)


@pytest.mark.usefixtures("_on_the_cpu")
def test_relu2_by_autograd():
    x = torch.randn(5, 300, requires_grad=True)
    grad = torch.randn(300, 5).T
    got, wanted = [], []
    for results, relu2 in ((got, elementwise.relu2), (wanted, lambda x: torch.relu(x).square())):
        out = relu2(x)
        results += [out, *torch.autograd.grad(out, x, grad)]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_what_is_not_wanted_is_not_written(softcap):
    logits = torch.randn(3, 50)
    before = logits.clone()
    targets = torch.tensor([[4, 0], [-1, 0], [49, 0]])[:, 0]
    losses = kernels.softmax_loss(logits, targets, softcap, False)
    assert torch.equal(logits, before)
    assert losses[1] == 0
    assert torch.equal(kernels.softmax_loss(logits, targets, softcap, True), losses)
    assert logits[1].eq(0).all()
    # The gradient of a row sums to 0 without a cap, and is negative at the target only.
    assert [row.lt(0).nonzero().flatten().tolist() for row in logits] == [[4], [], [49]]


def test_a_target_beyond_the_vocabulary_shows_and_reads_nothing():
    fence = torch.full((3, 8), 1e30)
    fence[1] = 0
    losses = kernels.softmax_loss(fence[1:2], torch.tensor([8]), 0.0, True)
    assert losses.isnan().all()
    torch.testing.assert_close(fence[1], torch.full((8,), 1 / 8))
    assert fence[[0, 2]].eq(1e30).all()


def test_nothing():
    assert kernels.relu2(torch.empty(0, 3)).shape == (0, 3)
    empty = torch.empty(0, dtype=torch.long)
    assert kernels.softmax_loss(torch.empty(0, 9), empty, 15.0, True).shape == (0,)


def test_large_logits_and_blocks_of_minus_infinity():
    """The first blocks of a row hold -inf alone, and exponentials must not overflow."""
    logits = torch.full((2, 3 * kernels.COLUMNS), -torch.inf)
    logits[0, -2:] = torch.tensor([1000.0, 999.0])
    logits[1, 0] = 3e38
    targets = torch.tensor([3 * kernels.COLUMNS - 1, 0])
    losses = kernels.softmax_loss(logits, targets, 0.0, True)
    torch.testing.assert_close(losses, torch.tensor([1.3132617, 0.0]))
    torch.testing.assert_close(logits[0, -2:], torch.tensor([0.7310586, -0.7310586]))
    assert logits[0, :-2].eq(0).all()
    assert logits[1].eq(0).all()


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_head(dtype, softcap):
    hidden = torch.randn(9, 16).to(dtype).requires_grad_()
    weight = torch.randn(37, 16).to(dtype).requires_grad_()
    targets = torch.randint(-1, 37, (9,))

    def results():
        loss = cross_entropy(hidden, weight, targets, softcap=softcap)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    got = results()
    with plain():
        wanted = results()
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        size = 1e-5 if dtype == torch.float32 else 2**-6
        assert (a - b).float().norm() <= size * b.float().norm()


@pytest.mark.usefixtures("_on_the_cpu")
def test_library_registration():
    x = torch.randn(2, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.starlm.relu2.default, (x,))
