"""The fused layer's Triton kernels on CPU tensors, by Triton's interpreter, as interpreted_triton.py has it.

TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_triton_mix.py
"""

import math

import pytest
import torch
from oracle import assert_same
from test_mix import composed, problem, results

from starlm.nn.deformer import Deformer
from starlm.ops import backends
from starlm.ops import triton as helpers
from starlm.ops import triton_mix as host
from starlm.ops import triton_mix_kernels as kernels
from starlm.ops.backends import fuses
from starlm.ops.mix import mix
from starlm.ops.plain import plain

assert helpers.INTERPRETED, "set TRITON_INTERPRET=1"

# Of numpy, with which the interpreter calculates: inf - inf, exp of what is large, what float16 cannot hold.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"
)
NAMES = ("out", "dvalues", "dshift", "dgate")
# One unit in the last place: the interpreter cuts off what a GPU rounds.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# Heads of kind now, anchored, box.
ALL = (1, 2, 1)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    monkeypatch.setattr(backends, "on_gpu", lambda device: True)


def compare(inputs, options, tolerance=2e-5):
    got, wanted = results(mix, inputs, options), results(composed, inputs, options)
    for name, a, b in zip(NAMES, got, wanted, strict=False):
        assert a.dtype == inputs["values"].dtype
        size = max([1.0, *b.detach().nan_to_num().abs().flatten().tolist()])
        assert_same(name, a, b, (tolerance + ROUNDING[a.dtype]) * size)
    return got


@pytest.mark.parametrize("heads", [(2, 0, 0), (0, 2, 0), (0, 0, 2), ALL])
@pytest.mark.parametrize(("gated", "packed"), [(True, True), (False, False)])
def test_equals_the_composition(heads, gated, packed):
    inputs, options = problem(2, 19, *heads, gated=gated, packed=packed)
    for max_shift in (None, 3):
        compare(inputs, {**options, "max_shift": max_shift})


@pytest.mark.parametrize(("heads", "channels"), [((1, 1, 1), 33), ((3, 1, 2), 65), ((1, 0, 0), 129)])
def test_shapes_that_fill_no_block(heads, channels):
    compare(*problem(1, 2, *heads, channels=channels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    inputs, options = problem(1, 9, *ALL)
    for name in ("values", "shift", "gate"):
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    compare(inputs, options)


def test_a_shift_in_fp32_beside_values_in_bfloat16():
    inputs, options = problem(1, 9, *ALL)
    with torch.no_grad():
        inputs["shift"] += 0.003
    inputs["values"] = inputs["values"].detach().bfloat16().requires_grad_()
    out, wanted = mix(**inputs, **options), composed(**inputs, **options)
    assert out.dtype == torch.bfloat16
    assert_same("out", out, wanted, 2**-7 * wanted.abs().max().item())


@pytest.mark.parametrize("deterministic", [False, True])
def test_pieces_and_blocks_change_nothing(deterministic, monkeypatch):
    inputs, options = problem(2, 9, 2, 2, 2)
    compare(inputs, options)
    monkeypatch.setattr(host, "PIECE", 9 * 3 * 2)
    for name, size in {"TILE": 8, "BLOCKS": 2, "COLUMNS": 4, "TIME": 4, "SPAN": 2}.items():
        monkeypatch.setattr(host, name, size)
    pieces = list(host.pieces_of(inputs["values"], 2, 2, dict.fromkeys((0, 1, 2), host.PIECE)))
    # Both heads of kind now or anchored of one batch row, or one box head, whose sums are twice as large.
    assert [(p.kind, p.rows.start, p.heads.start) for p in pieces] == [
        *[(kind, row, head) for kind, head in ((0, 0), (1, 2)) for row in (0, 1)],
        *[(2, row, head) for head in (4, 5) for row in (0, 1)],
    ]
    torch.use_deterministic_algorithms(deterministic)
    try:
        compare(inputs, options)
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_are_honoured(monkeypatch):
    """The interpreter runs one program after the other, so how something is added has to be seen, too."""
    atomic = set()
    add = helpers._add.fn

    def watched(pointers, amount, mask, ATOMIC):
        atomic.add(ATOMIC)
        add(pointers, amount, mask, ATOMIC)

    monkeypatch.setattr(kernels, "_add", watched)
    inputs, options = problem(1, 20, *ALL, channels=2)
    torch.use_deterministic_algorithms(True)
    try:
        compare(inputs, options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert atomic == {False}
    compare(inputs, options)
    assert atomic == {False, True}


def test_far_shifts_infinite_ones_and_nan():
    inputs, options = problem(1, 12, *ALL)
    with torch.no_grad():
        inputs["shift"][:, ::3] = 50.0
        inputs["shift"][:, 1::5] = -50.0
        inputs["shift"][:, 2] = math.inf
        inputs["shift"][:, 4] = -math.inf
        inputs["shift"][0, 7, :, 0] = math.nan
        inputs["origin"][0, 7] = torch.tensor([3, -1])
    out, wanted = mix(**inputs, **options), composed(**inputs, **options)
    assert out[0, 7, :, 0].isnan().tolist() == [True, True, False, True]
    assert_same("out", out, wanted, 2e-5)


def test_no_anchor_gives_nothing_and_takes_nothing():
    inputs, options = problem(1, 5, 0, 2, 0)
    inputs["origin"] = torch.full((1, 5, 2), -1)
    assert all(x.eq(0).all() for x in results(mix, inputs, options))


def test_wild_first_rows_and_origins_touch_nothing_outside():
    inputs, options = problem(1, 4, *ALL, packed=False)
    for wrong in (-1, 4, -(2**31), 2**31, 2**40, torch.iinfo(torch.int64).min):
        out = results(mix, inputs, {**options, "first": torch.full((1, 4), wrong)})
        assert all(x.isfinite().all() for x in out)
        out = results(mix, {**inputs, "origin": torch.full((1, 4, 2), wrong)}, options)
        assert all(x.isfinite().all() for x in out)


def test_strided_inputs_and_gradients():
    inputs, options = problem(2, 6, *ALL, channels=4)
    wanted = results(mix, inputs, options)
    # Slices of one projection, without a copy.
    values, shift, gate = torch.stack([inputs[x] for x in ("values", "shift", "gate")], dim=2).unbind(2)
    got = results(mix, {**inputs, "values": values, "shift": shift, "gate": gate}, options)
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert_same(name, a, b, 1e-6)
    turned = {
        **inputs,
        "values": inputs["values"].mT.contiguous().mT,
        "gate": inputs["gate"].mT.contiguous().mT,
    }
    for name, a, b in zip(NAMES, results(mix, turned, options), wanted, strict=True):
        assert_same(name, a, b, 1e-6)
    leaves = [inputs[x] for x in ("values", "shift", "gate")]
    summed = torch.autograd.grad(mix(**inputs, **options).sum(), leaves)
    ones = torch.autograd.grad(mix(**inputs, **options), leaves, torch.ones(2, 6, 4, 4))
    for name, a, b in zip(NAMES[1:], summed, ones, strict=True):
        assert_same(name, a, b, 1e-6)


def test_nothing_leaks_from_the_future():
    inputs, options = problem(1, 20, *ALL)
    with torch.no_grad():
        poisoned = {**inputs, "values": inputs["values"].clone()}
        poisoned["values"][:, 11:] = torch.nan
        a, b = (mix(**x, **options)[:, :11] for x in (inputs, poisoned))
    assert torch.equal(a, b)


def test_documents_are_isolated():
    inputs, options = problem(1, 12, *ALL, packed=False)
    options["first"] = torch.tensor([[0] * 5 + [5] * 7])
    inputs["origin"] = torch.where(torch.arange(12)[:, None] < 5, inputs["origin"], -1)
    (dvalues,) = torch.autograd.grad(mix(**inputs, **options)[:, 5:].sum(), inputs["values"])
    assert dvalues[:, :5].abs().max() < 1e-12
    assert dvalues[:, 5:].abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_tokens(shape):
    inputs, options = problem(*shape)
    assert [x.shape[:2] for x in results(mix, inputs, options)] == [shape] * 4


@pytest.mark.parametrize("gated", [True, False])
def test_registration(gated):
    inputs, options = problem(1, 3, *ALL, gated=gated)
    # Not contiguous, and its fake result must not be so either.
    inputs["values"] = torch.randn(1, 3, 4, 6)[..., ::2].requires_grad_()
    arguments = (*inputs.values(), options["first"], options["near"], options["boxes"], math.inf)
    torch.library.opcheck(torch.ops.starlm.mix.default, arguments)


def test_which_values_are_mixed():
    values = torch.zeros(1)
    assert all(fuses(values.to(x)) for x in (torch.float32, torch.bfloat16, torch.float16))
    assert not fuses(values.double())
    with plain():
        assert not fuses(values)


@pytest.mark.parametrize("preset", ["product", "value", "gated", "star"])
def test_layers_take_it(preset, our_operators):
    layer = Deformer(16, 4, preset=preset, kinds=("now", "token", "box", "now") if preset == "star" else ())
    torch.nn.init.normal_(layer.get_parameter("query_shift.weight" if preset == "product" else "out.weight"))
    x, origins = torch.randn(1, 6, 16), {1: torch.tensor([[-1, -1, 0, 1, 2, 0]])}
    with our_operators() as names, torch.no_grad():
        out = layer(x, origins=origins)
    assert names == {"starlm::mix"}
    with plain():
        assert_same("out", out, layer(x, origins=origins), 1e-5)


def test_the_comparison_rejects_sabotage(monkeypatch):
    """Each of these wrong kernels must be noticed."""
    inputs, options = problem(1, 9, *ALL)
    place, up_to = kernels._place.fn, kernels._up_to.fn

    def halfway(z, *where, KIND):
        reach, near, far, fraction = place(z, *where, KIND)
        return reach, near, far, fraction * 0.5

    def first_block_only(x, totals, *where):
        return up_to(x, totals, *where) * 0.5

    for name, wrong in (("_place", lambda *x: halfway(*x[:-1], KIND=x[-1])), ("_up_to", first_block_only)):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, wrong)
            with pytest.raises(AssertionError):
                compare(inputs, options)
    compare(inputs, options)


@pytest.mark.compile
def test_compiles_without_a_graph_break():
    compiled = torch.compile(lambda inputs, options: mix(**inputs, **options) + 1, fullgraph=True)
    inputs, options = problem(1, 3, *ALL)
    wanted = results(lambda **x: mix(**x) + 1, inputs, options)
    got = results(lambda first, near, boxes, **x: compiled(x, {**options, "first": first}), inputs, options)
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert_same(name, a, b, 1e-6)
