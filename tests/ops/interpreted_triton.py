"""The Triton kernels on CPU tensors, by Triton's interpreter: test_triton.py runs them in their own process.

    TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_triton.py

The interpreter takes about 10 ms for each query of a backward, so shapes are small.
"""

import mmap

import pytest
import torch
from oracle import assert_same
from test_deform import SHIFTS, make, run

from benchmarks import gpu
from starlm.ops import deform
from starlm.ops import triton as kernels
from starlm.ops.reference import deform_reference

assert kernels.INTERPRETED, "set TRITON_INTERPRET=1"

# Of numpy, with which the interpreter calculates: inf - inf, and what does not fit into float16.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

KINDS = [*SHIFTS, "negative", "-inf"]
NAMES = ("out", "dvalues", "dshift")
# One unit in the last place: the interpreter cuts bfloat16 off where a GPU rounds it.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# C, H: neither fills a block of channels, nor is a power of two; one channel a lane where C is odd, else two.
SHAPES = [(1, 3), (6, 3), (8, 3), (33, 3), (34, 8)]


def check(values, shift, options, grad=None, deterministic=False):
    """Output and gradients against the reference in the arithmetic's own precision; returns them."""
    grad = torch.randn(shift.shape).to(values.dtype) if grad is None else grad
    exact = torch.promote_types(torch.promote_types(values.dtype, shift.dtype), torch.float32)
    wanted = run("reference", values.to(exact), shift.to(exact), options, grad.to(exact))
    torch.use_deterministic_algorithms(deterministic)
    try:
        got = run("triton", values, shift, options, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [x.dtype for x in got] == [values.dtype, values.dtype, shift.dtype]
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        # Only the gradient of values is a sum; the rest is the reference's to the last bit, then rounded.
        order = 0.0 if name != "dvalues" else 1e-13 if exact == torch.float64 else 1e-6
        scale = b.abs().nan_to_num(0.0).clamp(min=1.0)
        assert_same(name, a.to(exact) / scale, b / scale, ROUNDING[a.dtype] + order)
    return got


def beyond(options, length, past=0):
    """Some documents begin behind the query's own row."""
    late = torch.rand(options["first"].shape) < 0.2
    options["first"] = torch.where(late, past + length + 3, options["first"])
    return options


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 129])
def test_equals_the_reference(length):
    channels, heads = SHAPES[length % 4]
    values, shift, options = make(
        length, batch=1, heads=heads, channels=channels, past=3, dtype=torch.float32
    )
    check(values, shift, beyond(options, length, past=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("length", [2, 65])
def test_other_dtypes(length, dtype):
    values, shift, options = make(length, batch=1, heads=3, channels=33, dtype=dtype)
    check(values, shift.to(dtype), beyond(options, length))


@pytest.mark.parametrize(
    ("dtype", "shift_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64), (torch.float16, torch.bfloat16)],
)
def test_dtypes_may_differ(dtype, shift_dtype):
    values, shift, options = make(9, "near", origin=False)
    check(values.to(dtype), shift.to(shift_dtype), options)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_shifts(kind, deterministic):
    for origin, first in ((False, False), (True, True)):
        values, shift, options = make(
            9, kind, batch=1, heads=2, channels=3, origin=origin, first=first, dtype=torch.float32
        )
        check(values, shift, options, deterministic=deterministic)


@pytest.mark.parametrize(("channels", "heads"), SHAPES)
def test_shapes(channels, heads):
    for origin, first in ((False, True), (True, False)):
        values, shift, options = make(
            18, batch=2, heads=heads, channels=channels, origin=origin, first=first, dtype=torch.float32
        )
        check(values, shift, options)


def test_no_such_row_gives_nothing_and_takes_nothing():
    values, shift, options = make(5, dtype=torch.float32, first=False)
    options["origin"] = torch.full((2, 5, 3), -1)
    assert all(x.eq(0).all() for x in check(values, shift, options))


def test_past_per_slot():
    values, shift, options = make(5, "near", batch=3, past=9, origin=False, first=False, dtype=torch.float32)
    options["past"] = torch.tensor([0, 4, 9])
    out, *_ = check(values, shift, options)
    for b, before in enumerate((0, 4, 9)):
        alone = deform(values[b : b + 1, : before + 5], shift[b : b + 1], past=before, backend="triton")
        assert torch.equal(out[b], alone[0])


def test_strided_inputs_and_gradients():
    base = torch.randn(2, 30, 8, 12)
    values, shift = base[:, ::2, 1:4, ::2], base[:, 1::2, 4:7, 1::2].abs()
    check(values, shift, {}, torch.randn(3, 15, 6, 2).permute(3, 1, 0, 2))
    # Halves of one projection, without a copy; and what the gradient of a sum is.
    values, shift = torch.randn(2, 15, 2, 3, 6).unbind(2)
    check(values, shift, {}, torch.ones(()).expand(2, 15, 3, 6))
    check(values.mT.contiguous().mT, shift, {})
    indices = torch.randint(-1, 9, (2, 3, 9, 2))[..., 0].mT, torch.randint(9, (9, 2)).T
    values, shift, _ = make(9, dtype=torch.float32)
    check(values, shift, {"origin": indices[0], "first": indices[1].int()})


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 0, 2, 3), (2, 4, 2, 0), (2, 4, 0, 3)])
def test_empty_tensors(shape):
    values, shift = torch.randn(shape, requires_grad=True), torch.ones(shape, requires_grad=True)
    deform(values, shift, backend="triton").sum().backward()
    assert values.grad.shape == shift.grad.shape == shape


def test_rows_without_queries_have_gradient_zero():
    values, shift = torch.randn(2, 7, 2, 3, requires_grad=True), torch.empty(2, 0, 2, 3)
    deform(values, shift, backend="triton").sum().backward()
    assert values.grad.eq(0).all()


def test_nothing_leaks_from_the_future():
    values, shift, options = make(40, batch=1, dtype=torch.float32)
    poisoned = values.clone()
    poisoned[:, 20:] = torch.nan
    a, b = (deform(x, shift, backend="triton", **options)[:, :20] for x in (values, poisoned))
    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_no_input_makes_a_wild_pointer():
    """Rows outside the tensor, as a wrong `first`, `past` or `origin` asks for them, are not touched."""
    far, rows, length = 2**40, 6, 4
    fence = torch.full((4, rows, 2, 3), torch.nan)
    fence[1:3] = torch.randn(2, rows, 2, 3)
    values = fence[1:3].requires_grad_()
    for wrong in (far, -far, 2**31, -(2**31), rows, -1):
        for name, shape in (("first", (2, length)), ("past", (2,)), ("origin", (2, length, 2))):
            for kind in ("near", "huge", "-inf"):
                shift = make(length, kind, heads=2, channels=3, dtype=torch.float32)[1]
                out = deform(values, shift, backend="triton", **{name: torch.full(shape, wrong)})
                assert out.isfinite().all(), (wrong, name, kind)
    shift = make(length, "mixed", heads=2, channels=3, dtype=torch.float32)[1].nan_to_num(0.5)
    out = deform(values, shift, past=torch.tensor([far, -far]), backend="triton")
    (dvalues,) = torch.autograd.grad(out.sum(), values)
    assert dvalues.sum().item() == pytest.approx(out.numel())


def test_deterministic_algorithms_are_honoured(monkeypatch):
    """The interpreter runs one program after the other, so how something is added has to be seen, too."""
    atomic = set()
    add = kernels._add.fn

    def watched(pointers, amount, mask, ATOMIC):
        atomic.add(ATOMIC)
        add(pointers, amount, mask, ATOMIC)

    monkeypatch.setattr(kernels, "_add", watched)
    values, shift, options = make(40, "far", batch=1, heads=2, channels=3, dtype=torch.float32)
    grad = torch.randn(shift.shape)
    one, two = (check(values, shift, options, grad, deterministic=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert atomic == {False}
    check(values, shift, options, grad)
    assert atomic == {False, True}


def test_additions_that_meet_in_one_row_are_merged(monkeypatch):
    """Shifts that do not change need one addition a row, shifts beyond the first row two in all."""
    count = 0
    add = kernels._add.fn

    def counting(pointers, amount, mask, ATOMIC):
        nonlocal count
        count += int(mask.handle.data.sum())
        add(pointers, amount, mask, ATOMIC)

    monkeypatch.setattr(kernels, "_add", counting)
    # Of the latter the first rows are near all the same.
    for shift, wanted in ((2.5, kernels.SPAN - 2), (torch.inf, 2)):
        count = 0
        values = torch.randn(1, kernels.SPAN, 1, 1, requires_grad=True)
        deform(values, torch.full_like(values, shift), backend="triton").sum().backward()
        assert count == wanted


def test_addresses_are_64_bit():
    """Rows that lie 2^30 elements apart, in memory that is reserved and never touched."""
    # MAP_NORESERVE of Linux, which Python names from 3.13 on.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    apart, row = 2**30, 3
    with mmap.mmap(-1, 2 * (2 * apart + row), flags=flags) as memory:
        wide = torch.frombuffer(memory, dtype=torch.bfloat16)
        for batch, length, strides in ((1, 3, (0, apart)), (3, 1, (apart, 0))):
            far = wide.as_strided((batch, length, 1, row), (*strides, row, 1))
            near = torch.rand(batch, length, 1, row).bfloat16()
            far.copy_(near)
            other = torch.rand_like(near)
            for values, shift, grad in ((far, other, other), (other, far, other), (other, other, far)):
                copies = [x.contiguous() for x in (values, shift, grad)]
                wanted = (x.double() for x in run_raw(*copies))
                for name, a, b in zip(NAMES, run_raw(values, shift, grad), wanted, strict=True):
                    assert_same(name, a, b, 0.0)
        del wide, far, values, shift, grad


def run_raw(values, shift, grad):
    """Without autograd, which would copy."""
    out = kernels.forward(values, shift, None, None, None)
    return out, *kernels.backward(grad, values, shift, None, None, None)


def test_library_registration():
    values, shift, options = make(5, "near", batch=1, dtype=torch.float32)
    for origin, first, past in ((None, None, None), (options["origin"], options["first"], torch.tensor([0]))):
        args = (
            values.clone().requires_grad_(),
            shift.clone().requires_grad_(),
            origin,
            first,
            past,
            "triton",
        )
        torch.library.opcheck(torch.ops.starlm.deform.default, args)


def test_too_many_rows_are_refused():
    from starlm.errors import InputError

    values = torch.zeros(()).expand(1, 2**30, 1, 1)
    with pytest.raises(InputError, match=r"fewer than 1073741824 rows; got values \(1, 1073741824, 1, 1\)"):
        deform(values, torch.zeros(1, 1, 1, 1), backend="triton")


def test_the_comparison_rejects_sabotage(monkeypatch):
    """Each of these wrong kernels must be noticed."""
    values, shift, options = make(9, batch=1, dtype=torch.float32)
    locate, add = kernels._locate.fn, kernels._add.fn

    def one_row_off(shift, origin, start, last):
        _, far, fraction = locate(shift, origin, start, last)
        return far, far, fraction

    def unclipped(shift, origin, start, last):
        return locate(shift, origin, last * 0, last)

    def forgetful(pointers, amount, mask, ATOMIC):
        add(pointers, amount, mask & (amount < 1), ATOMIC)

    for name, wrong in (("_locate", one_row_off), ("_locate", unclipped), ("_add", forgetful)):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, wrong)
            with pytest.raises(AssertionError):
                check(values, shift, options)
    check(values, shift, options)


def test_the_checks_for_a_gpu_notice_a_wrong_kernel(monkeypatch, capsys):
    checks = {name: check for name, check in gpu.CHECKS.items() if "definition" not in name}
    assert gpu.check("cpu", 5, checks) == 0
    monkeypatch.setattr(kernels, "_store", lambda pointers, x, mask: None)
    capsys.readouterr()
    assert gpu.check("cpu", 5, {"long": gpu.CHECKS["definition, long, every dtype"]}) == 1
    assert "FAILED: output, T = 5: NaN in other places" in capsys.readouterr().out


def test_the_benchmark_runs_what_it_times(monkeypatch):
    """Once each, with no time taken: figures are made on GPUs only."""

    def call_once(call, **names):
        call()
        return gpu.Cell(milliseconds=1.0, low=1.0, high=1.0, recorded=True, **names)

    monkeypatch.setattr(gpu, "_time", call_once)
    skipped = []
    cells = list(gpu._measure((1, 4, 2, 8), "cpu", skipped, ("deform", "attention", "gla")))
    assert {cell.peer for cell in cells} >= {gpu.DETERMINISTIC, "FlashAttention, causal (PyTorch)"}
    # Not for a CPU, or not installed.
    assert [entry["peer"] for entry in skipped] == ["GLA (fla)"]
    assert [cell.share_of_copy for cell in cells if cell.peer == gpu.DETERMINISTIC] == [1.5, 4.0]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.compile
def test_compiles_without_a_graph_break():
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(values, shift, origin, first):
        return deform(values * 2, shift, origin=origin, first=first, backend="triton") + 1

    for length in (3, 17):
        values, shift, options = make(length, "far", batch=1, dtype=torch.float32)
        origin, first = options["origin"], options["first"]
        one, two = ([x.clone().requires_grad_() for x in (values, shift)] for _ in range(2))
        got = compiled(*one, origin, first)
        wanted = deform_reference(two[0] * 2, two[1], origin, first) + 1
        grad = torch.randn_like(got)
        got.backward(grad)
        wanted.backward(grad)
        assert_same("out", got, wanted, 1e-5)
        assert_same("dvalues", one[0].grad, two[0].grad, 1e-4)
        assert_same("dshift", one[1].grad, two[1].grad, 1e-4)
