"""The operator against its definition: values, gradients, causality, determinism, torch.library."""

import itertools
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from oracle import assert_same, loop_deform

from starlm.errors import InputError
from starlm.ops import deform
from starlm.ops.reference import deform_reference

LENGTHS = (1, 2, 3, 63, 64, 65, 129, 1000, 4097)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.002}
SHIFTS = ("zero", "integer", "near", "far", "huge", "inf", "nan", "mixed")


def make_shift(kind, shape, dtype=torch.float64):
    def one(kind):
        length = shape[1]
        return {
            "zero": lambda: torch.zeros(shape),
            "integer": lambda: torch.randint(0, 2 * length + 2, shape),
            "near": lambda: torch.nn.functional.softplus(torch.randn(shape)),
            "far": lambda: torch.rand(shape) * 1.5 * length,
            "huge": lambda: 10.0 ** (torch.rand(shape) * 38),
            "inf": lambda: torch.full(shape, torch.inf),
            "nan": lambda: torch.full(shape, torch.nan),
            "negative": lambda: torch.randn(shape) * 20,
            "-inf": lambda: torch.full(shape, -torch.inf),
        }[kind]().to(dtype)

    if kind != "mixed":
        return one(kind)
    kinds = ["zero", "integer", "near", "far", "huge", "inf", "nan", "negative", "-inf"]
    stack = torch.stack([one(kind) for kind in kinds])
    return stack.gather(0, torch.randint(len(kinds), (1, *shape)))[0]


def make(
    length,
    kind="mixed",
    *,
    batch=2,
    heads=3,
    channels=5,
    past=0,
    origin=True,
    first=True,
    dtype=torch.float64,
):
    """A problem: tensors and the operator's keyword arguments."""
    rows = past + length
    values = torch.randn(batch, rows, heads, channels, dtype=dtype)
    shift = make_shift(kind, (batch, length, heads, channels), torch.promote_types(dtype, torch.float32))
    own = past + torch.arange(length)
    options = {"past": past}
    if origin:
        options["origin"] = (torch.rand(batch, length, heads) * (own + 2)[:, None]).long() - 1
    if first:
        options["first"] = (torch.rand(batch, length) * (own + 1)).long()
    return values, shift, options


def run(backend, values, shift, options, grad):
    values, shift = (x.detach().clone().requires_grad_() for x in (values, shift))
    out = deform(values, shift, backend=backend, **options)
    return (out, *torch.autograd.grad(out, (values, shift), grad))


def finite_rows(shift):
    """Where a NaN shift poisons nothing: gradients are only compared there."""
    return not shift.isnan().any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", [*SHIFTS, "negative", "-inf"])
@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_definition(backend, kind, length):
    for past, origin, first in itertools.product((0, 4), (False, True), (False, True)):
        values, shift, options = make(length, kind, past=past, origin=origin, first=first)
        wanted = loop_deform(values, shift, **options)
        assert_same("out", deform(values, shift, backend=backend, **options), wanted, 1e-12)


@pytest.mark.parametrize("kind", [*SHIFTS, "negative"])
@pytest.mark.parametrize("length", LENGTHS)
def test_cpu_equals_reference_in_fp64(length, kind):
    for origin, first in ((False, False), (True, True)):
        values, shift, options = make(length, kind, origin=origin, first=first, past=3)
        grad = torch.randn_like(shift)
        wanted = run("reference", values, shift, options, grad)
        got = run("cpu", values, shift, options, grad)
        for name, a, b in zip(("out", "dvalues", "dshift"), got, wanted, strict=True):
            assert_same(name, a, b, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 65, 4097])
def test_lower_precision_rounds_once(dtype, length):
    """Arithmetic is fp32: the result is the fp32 result, rounded to the dtype."""
    values, shift, options = make(length, "far", dtype=dtype)
    grad = torch.randn_like(shift).to(dtype)
    for backend in ("reference", "cpu"):
        got = run(backend, values, shift, options, grad)
        exact = run("reference", values.double(), shift.double(), options, grad.double())
        assert_same("out", got[0], exact[0].to(dtype), TOLERANCE[dtype])
        assert got[0].dtype == dtype
        assert got[1].dtype == dtype
        # A row may collect thousands of terms: relative to the largest.
        for name, a, b in zip(("dvalues", "dshift"), got[1:], exact[1:], strict=True):
            scale = b.abs().max().clamp(min=1)
            assert_same(name, a / scale, b / scale, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "shift_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes_may_differ(dtype, shift_dtype):
    values, shift, options = make(33, "near", origin=False)
    values, shift, grad = values.to(dtype), shift.to(shift_dtype), torch.randn(shift.shape).to(dtype)
    exact = run("reference", values.double(), shift.double(), options, grad.double())
    for backend in ("reference", "cpu"):
        got = run(backend, values, shift, options, grad)
        assert [x.dtype for x in got] == [dtype, dtype, shift_dtype]
        for name, a, b in zip(("out", "dvalues", "dshift"), got, exact, strict=True):
            scale = b.abs().max().clamp(min=1)
            # What goes through the dtype of the values is no better than it.
            tolerance = max(TOLERANCE[a.dtype], TOLERANCE[dtype])
            assert_same(name, a.double() / scale, b / scale, tolerance)


def test_gradcheck():
    """First derivatives against finite differences, away from the kinks at integers; both backends."""
    for past, origin in ((0, False), (3, True)):
        values, shift, options = make(6, "far", past=past, origin=origin, batch=1, heads=2, channels=2)
        shift = shift.floor() + 0.2 + 0.6 * torch.rand_like(shift)
        for backend in ("reference", "cpu"):
            inputs = values.requires_grad_(), shift.detach().requires_grad_()
            torch.autograd.gradcheck(lambda v, s, b=backend, o=options: deform(v, s, backend=b, **o), inputs)


def test_slope_at_integers_looks_further_back():
    values = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    for backend in ("reference", "cpu"):
        shift = torch.ones(1, 3, 1, 1, requires_grad=True)
        out = deform(values, shift, backend=backend)
        out.sum().backward()
        assert out.flatten().tolist() == [1, 1, 10]
        assert shift.grad.flatten().tolist() == [0, 0, 1 - 10]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_such_row_gives_nothing_and_takes_nothing(backend):
    values = torch.randn(1, 4, 2, 3, requires_grad=True)
    shift = make_shift("mixed", (1, 4, 2, 3), torch.float32).requires_grad_()
    origin = torch.full((1, 4, 2), -1)
    out = deform(values, shift, origin=origin, backend=backend)
    out.sum().backward()
    assert out.eq(0).all()
    assert values.grad.eq(0).all()
    assert shift.grad.eq(0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_wild_first_rows_and_origins_mean_what_lies_next_to_them(backend):
    lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    values, shift, options = make(9, "far", past=3)
    shape, origins = options["first"].shape, options["origin"].shape
    for wild, tame in ((-3, 0), (-(10**9), 0), (lowest, 0), (2**32, 12), (highest, 12)):
        got, wanted = (
            deform(values, shift, first=torch.full(shape, row), past=3, backend=backend)
            for row in (wild, tame)
        )
        assert_same(f"{wild} as {tame}", got, wanted, 0.0)
    for wild, tame in ((lowest, -1), (-(2**32), -1), (2**30, 2**29), (2**32 + 1, 2**29), (highest, 2**29)):
        got, wanted = (
            deform(values, shift, origin=torch.full(origins, row), past=3, backend=backend)
            for row in (wild, tame)
        )
        assert_same(f"{wild} as {tame}", got, wanted, 0.0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nothing_leaks_from_the_future(backend):
    """Garbage in every row after t changes neither output nor gradient at or before t, bit for bit."""
    values, shift, options = make(40, dtype=torch.float32)
    shift = shift.nan_to_num(0.0)
    cut = 20
    poisoned = values.clone()
    poisoned[:, cut:] = torch.nan
    a = deform(values, shift, backend=backend, **options)[:, :cut]
    b = deform(poisoned, shift, backend=backend, **options)[:, :cut]
    assert torch.equal(a, b)


def test_strided_inputs_and_gradients():
    base = torch.randn(2, 30, 8, 12)
    values, shift = base[:, ::2, 1:4, ::2], base[:, 1::2, 4:7, 1::2].abs()
    grad = torch.randn(3, 15, 6, 2).permute(3, 1, 0, 2)
    wanted = run("reference", values.contiguous(), shift.contiguous(), {}, grad.contiguous())
    for backend in ("reference", "cpu"):
        for name, a, b in zip("ovs", run(backend, values, shift, {}, grad), wanted, strict=True):
            assert_same(name, a, b, 1e-5)
        expanded = deform(values, torch.ones(()).expand_as(shift), backend=backend)
        assert_same("expanded", expanded, deform(values, torch.ones_like(shift)), 0)


def test_past_per_slot():
    """Slots at different positions in one call equal each slot alone."""
    values, shift, _ = make(5, "near", batch=3, past=9)
    past = torch.tensor([0, 4, 9])
    for backend in ("reference", "cpu"):
        together = deform(values, shift, past=past, backend=backend)
        for b, before in enumerate(past.tolist()):
            alone = deform(values[b : b + 1, : before + 5], shift[b : b + 1], past=before, backend=backend)
            assert torch.equal(together[b], alone[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_tensors(backend):
    for shape in ((0, 4, 2, 3), (2, 0, 2, 3), (2, 4, 2, 0), (2, 4, 0, 3)):
        values, shift = torch.randn(shape, requires_grad=True), torch.ones(shape, requires_grad=True)
        deform(values, shift, backend=backend).sum().backward()
        assert values.grad.shape == shape


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    heads=st.integers(1, 4),
    channels=st.integers(1, 33),
    past=st.integers(0, 20),
    origin=st.booleans(),
    first=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(batch, length, heads, channels, past, origin, first, seed):
    torch.manual_seed(seed)
    values, shift, options = make(
        length, batch=batch, heads=heads, channels=channels, past=past, origin=origin, first=first
    )
    grad = torch.randn_like(shift)
    wanted, got = run("reference", values, shift, options, grad), run("cpu", values, shift, options, grad)
    for name, a, b in zip(("out", "dvalues", "dshift"), got, wanted, strict=True):
        assert_same(name, a, b, 1e-10)


def test_same_result_for_any_number_of_threads_and_every_time():
    values, shift, options = make(2000, "far", batch=1, heads=8, channels=16, dtype=torch.float32)
    grad = torch.randn_like(shift)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5, 2, 1):
            torch.set_num_threads(threads)
            results.append(run("cpu", values, shift, options, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_deterministic_algorithms_are_honoured():
    values, shift, options = make(300, "far", dtype=torch.float32)
    grad = torch.randn_like(shift)
    torch.use_deterministic_algorithms(True)
    try:
        for backend in ("reference", "cpu"):
            one, two = (run(backend, values, shift, options, grad) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_python_threads_may_call_it_at_once():
    values, shift, options = make(500, "far", heads=8, channels=16, dtype=torch.float32)
    wanted = deform(values, shift, **options)
    results = [None] * 8

    def work(i):
        for _ in range(5):
            results[i] = deform(values, shift, **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, wanted) for result in results)


def test_library_registration():
    """PyTorch's own checks: schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes."""
    values, shift, options = make(5, "near", dtype=torch.float32)
    past = torch.tensor([2, 2])
    values = torch.randn(2, 7, 3, 5)
    for origin, first, before in ((None, None, None), (options["origin"], options["first"], past)):
        args = (values.clone().requires_grad_(), shift.clone().requires_grad_(), origin, first, before, "cpu")
        torch.library.opcheck(torch.ops.starlm.deform.default, args)


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiles_without_a_graph_break(backend):
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(values, shift, origin, first):
        return deform(values * 2, shift, origin=origin, first=first, backend=backend) + 1

    for length in (33, 65):
        values, shift, options = make(length, "far", dtype=torch.float32)
        origin, first = options["origin"], options["first"]
        one, two = ([x.clone().requires_grad_() for x in (values, shift)] for _ in range(2))
        got = compiled(*one, origin, first)
        wanted = deform(two[0] * 2, two[1], origin=origin, first=first, backend="reference") + 1
        grad = torch.randn_like(got)
        got.backward(grad)
        wanted.backward(grad)
        assert_same("out", got, wanted, 1e-5)
        assert_same("dvalues", one[0].grad, two[0].grad, 1e-4)
        assert_same("dshift", one[1].grad, two[1].grad, 1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v, s: ((v[0], s), {}), "values [B, S, H, C]"),
        (lambda v, s: ((v, s[:, :, :1]), {}), "the same B, H and C"),
        (lambda v, s: ((v.long(), s), {}), "floating point"),
        (lambda v, s: ((v, s), {"origin": torch.zeros(2, 4)}), "origin as integers"),
        (lambda v, s: ((v, s), {"first": torch.zeros(2, 4, 1).long()}), "first as integers"),
        (lambda v, s: ((v, s), {"past": 1}), "past=1"),
        (lambda v, s: ((v[:, :3], s), {}), "past=0"),
        (lambda v, s: ((v, s), {"past": torch.zeros(3).long()}), "past as integers of shape (2,)"),
        (lambda v, s: ((v, s), {"past": torch.zeros(2)}), "past as integers"),
        (lambda v, s: ((v, s), {"past": torch.tensor([0, 1])}), "past between 0 and 1"),
        (lambda v, s: ((v, s), {"past": torch.tensor([-1, 0])}), "past between -1 and 0"),
        (lambda v, s: ((v, s.to("meta")), {}), "shift on meta"),
        (
            lambda v, s: ((v, s), {"first": torch.zeros(2, 4, dtype=torch.long, device="meta")}),
            "first on meta",
        ),
        (lambda v, s: ((v[:, :1].expand(-1, 2**30, -1, -1), s), {}), "rows"),
        (lambda v, s: ((v[:, :3], s), {"past": torch.zeros(2).long()}), "S >= T"),
        (lambda v, s: ((v, s), {"backend": "gpu"}), "'gpu'"),
        (lambda v, s: ((v.numpy(), s), {}), "as tensors; got ndarray and Tensor"),
        (lambda v, s: ((v.to("meta"), s.to("meta")), {"backend": "cpu"}), "backend='auto'"),
    ],
)
def test_errors_name_the_argument(change, words, unchecked):
    args, options = change(torch.randn(2, 4, 3, 5), torch.rand(2, 4, 3, 5))
    with pytest.raises(InputError) as error:
        unchecked(deform)(*args, **options)
    assert words in str(error.value)


@pytest.fixture
def unchecked():
    """The function without the shape checks that the test run wraps around it."""

    def strip(function):
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        return function

    return strip


def test_the_oracle_rejects_sabotage(monkeypatch):
    """A comparison that cannot fail shows nothing: each of these wrong operators must be noticed."""
    values, shift, options = make(17)
    wanted = loop_deform(values, shift, **options)
    assert_same("right", deform_reference(values, shift, **options), wanted, 1e-12)
    one_off = wanted.clone()
    one_off[1, 3, 1, 2] = one_off[1, 3, 1, 2].nan_to_num(0.0) + 1e-6
    unwritten = wanted.clone()
    unwritten[0, 0, 0, 0] = torch.nan if not wanted[0, 0, 0, 0].isnan() else 0.0
    late = deform_reference(values, shift + 1e-9, **options)
    unclipped = deform_reference(values, shift, origin=options["origin"], past=options["past"])
    for wrong in (one_off, unwritten, late, unclipped):
        with pytest.raises(AssertionError):
            assert_same("wrong", wrong, wanted, 1e-12)
