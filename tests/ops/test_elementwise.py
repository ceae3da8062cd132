"""Fused RMSNorm and relu² against their compositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from starlm.ops import backends
from starlm.ops import elementwise as module
from starlm.ops.backends import fuses
from starlm.ops.elementwise import relu2, rms
from starlm.ops.plain import plain

F32, BF16 = torch.float32, torch.bfloat16


def composed_rms(x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def composed_relu2(x):
    return torch.relu(x).square()


CASES = [(rms, composed_rms), (relu2, composed_relu2)]


def results(function, x, dtype):
    x = x.to(dtype).requires_grad_()
    out = function(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1000)).bfloat16().to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, x, grad)


@pytest.mark.parametrize(("function", "composed"), CASES)
@given(
    shape=st.lists(st.integers(1, 6), max_size=3),
    width=st.sampled_from([8, 16, 33]),
    dtype=st.sampled_from([F32, BF16]),
    scale=st.sampled_from([1e-2, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_equals_the_composition(function, composed, shape, width, dtype, scale, seed):
    random = torch.Generator().manual_seed(seed)
    x = (torch.randn(*shape, width, generator=random) * scale).to(dtype).float()
    wanted = results(composed, x, torch.float64)
    for a, b in zip(results(function, x, dtype), wanted, strict=True):
        assert a.dtype == dtype
        size = b.abs().amax(-1, keepdim=True) + 1e-6
        assert ((a - b).abs() / size).max() < (1e-5 if dtype == F32 else 2**-7)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_under_autocast_it_comes_as_products_take_it(dtype):
    x = torch.randn(50, 33, requires_grad=True)
    with torch.autocast("cpu", dtype):
        assert rms(x).dtype == F32
        out = rms(x, cast=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out, rms(x).to(dtype))
    grad = torch.randn(out.shape).to(dtype)
    (got,), (wanted,) = torch.autograd.grad(out, x, grad), torch.autograd.grad(rms(x), x, grad.float())
    assert got.dtype == F32
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("function", "composed"), CASES)
def test_large_and_transposed(function, composed):
    """More than one thread's worth, and memory in another order."""
    x = torch.randn(500, 700).T
    for a, b in zip(results(function, x, F32), results(composed, x, F32), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [rms, relu2])
def test_nan_shows_zero_stays_and_nothing_is_no_error(function):
    x = torch.tensor([[1.0, torch.nan], [2.0, 3.0], [0.0, 0.0]], requires_grad=True)
    out = function(x)
    assert out[0].isnan().any()
    assert out[1].isfinite().all()
    assert out[2].eq(0).all()
    assert function(torch.zeros(3, 0, requires_grad=True)).shape == (3, 0)
    assert function(torch.zeros(0, 3, requires_grad=True)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_registration(dtype):
    x = torch.randn(4, 5, dtype=dtype)
    for op, arguments in (
        (module._rms, (x, dtype)),
        (module._rms, (x, BF16)),
        (module._rms_backward, (x, x)),
        (module._rms_backward, (x, x.float())),
        (module._relu2, (x,)),
        (module._relu2_backward, (x, x)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


# Of PyTorch's own, when it loads its rules.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("function", [module.rms, module.relu2])
def test_forward_mode_is_not_dropped(function):
    x, along = torch.randn(2, 3, 8)
    out, tangent = torch.func.jvp(function, (x,), (along,))
    with plain():
        wanted = torch.func.jvp(function, (x,), (along,))
    torch.testing.assert_close((out, tangent), wanted)
    assert tangent.abs().max() > 0


def test_where_kernels_are_taken(monkeypatch):
    x = torch.randn(2, 3, requires_grad=True)
    assert fuses(x)
    assert fuses(x.bfloat16())
    assert not fuses(x.double())
    assert not fuses(x.half())
    with plain():
        assert not fuses(x)
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    with FakeTensorMode():
        there = torch.empty(2, 3, dtype=BF16, device="cuda")
        assert fuses(there)
        assert not fuses(there.double())
