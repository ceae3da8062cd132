"""The fused step of a layer against its composition from `deform`, `box`, RMSNorm and sigmoid."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same
from torch.utils.checkpoint import checkpoint

from starlm.errors import InputError
from starlm.ops import cpu_mix, deform
from starlm.ops import mix as module
from starlm.ops.box import box, prefix_sums
from starlm.ops.mix import mix

F32, BF16 = torch.float32, torch.bfloat16


def composed(values, shift, gate, origin, *, first=None, near, boxes=0, max_shift=None):
    """The docstring of `mix`, in fp64."""
    values, shift = values.double(), shift.double()
    heads = values.shape[2]
    v = torch.nn.functional.rms_norm(values, values.shape[-1:], eps=1e-6)
    parts = [slice(0, near), slice(near, heads - boxes), slice(heads - boxes, heads)]
    (v0, z0), (v1, z1), (v2, z2) = ((v[:, :, part], shift[:, :, part]) for part in parts)
    # PyTorch's softplus is x from 20 on, where it is not yet so in fp64.
    now = deform(v0, torch.nn.functional.softplus(z0, threshold=40).clamp(min=0, max=max_shift), first=first)
    anchored = deform(v1, z1, origin=origin, first=first)
    mean, width = box(prefix_sums(v2), (z2 / 2).exp().clamp(min=1, max=max_shift), first=first)
    y = torch.cat([now, anchored, mean * width.detach().clamp(max=16).sqrt()], dim=2)
    return y if gate is None else y * torch.sigmoid(gate.double())


def problem(batch=2, length=13, near=2, anchored=2, boxes=2, channels=3, gated=True, seed=0, packed=True):
    random = torch.Generator().manual_seed(seed)
    heads = near + anchored + boxes
    values, shift, gate = (
        torch.randn(batch, length, heads, channels, generator=random).requires_grad_() for _ in range(3)
    )
    with torch.no_grad():
        shift *= 3
    own = torch.arange(length).expand(batch, length)
    origin = torch.randint(-1, max(length, 1), (batch, length, anchored), generator=random)
    origin = torch.minimum(origin, own[..., None])
    first = torch.randint(0, length + 2, (batch, length), generator=random) if packed else None
    return {
        "values": values,
        "shift": shift,
        "gate": gate if gated else None,
        "origin": origin if anchored else None,
    }, {"first": first, "near": near, "boxes": boxes}


def results(function, inputs, options, seed=1):
    """Values and gradients."""
    out = function(**inputs, **options)
    random = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=random).bfloat16().to(out.dtype)
    wanted = [x for x in (inputs["values"], inputs["shift"], inputs["gate"]) if x is not None]
    return out, *torch.autograd.grad(out, wanted, grad)


def compare(inputs, options, tolerance=1e-4):
    names = ("out", "dvalues", "dshift", "dgate")
    got, wanted = results(mix, inputs, options), results(composed, inputs, options)
    for name, a, b in zip(names, got, wanted, strict=False):
        assert a.dtype == inputs["values"].dtype
        size = max([1.0, *b.detach().nan_to_num().abs().flatten().tolist()])
        assert_same(name, a, b, tolerance * size)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 30),
    heads=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)).filter(any),
    channels=st.integers(3, 9),
    gated=st.booleans(),
    packed=st.booleans(),
    max_shift=st.sampled_from([None, 1, 4, 100]),
    seed=st.integers(0, 100),
)
@settings(max_examples=80, deadline=None)
def test_equals_the_composition(batch, length, heads, channels, gated, packed, max_shift, seed):
    inputs, options = problem(batch, length, *heads, channels, gated, seed, packed)
    compare(inputs, {**options, "max_shift": max_shift})


def test_several_heads_in_one_unit_of_work_or_one(monkeypatch):
    inputs, options = problem(near=5, anchored=4, boxes=3)
    whole = results(mix, inputs, options)
    for slab in (1, 80, 120):
        monkeypatch.setattr(cpu_mix, "SLAB", slab)
        for a, b in zip(results(mix, inputs, options), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_far_shifts_infinite_ones_and_nan():
    inputs, options = problem(length=40)
    with torch.no_grad():
        inputs["shift"][:, ::3] = 50.0
        inputs["shift"][:, 1::5] = -50.0
        inputs["shift"][:, 2] = math.inf
        inputs["shift"][:, 4] = -math.inf
        inputs["shift"][0, 20, :, 0] = math.nan
    out, wanted = mix(**inputs, **options), composed(**inputs, **options)
    assert out[0, 20, :, 0].isnan().sum() >= 4, "an anchored head without an anchor is 0, whatever its shift"
    assert_same("out", out, wanted, 1e-4)


def test_a_wide_model_and_a_long_row():
    """Windows and distances of hundreds of rows, whose sums lose nothing."""
    inputs, options = problem(batch=1, length=1500, channels=8, packed=False)
    with torch.no_grad():
        inputs["shift"][:, :, 4:] = 2 * math.log(700) + inputs["shift"][:, :, 4:] / 10
        inputs["shift"][:, :, :2] += 300
    compare(inputs, options, 1e-4)


def test_bfloat16_rounds_inputs_and_results_only():
    inputs, options = problem(length=50, channels=8)
    low = {
        k: x.detach().bfloat16().requires_grad_()
        for k, x in inputs.items()
        if x is not None and k != "origin"
    }
    low["origin"] = inputs["origin"]
    got, wanted = results(mix, low, options), results(composed, low, options)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == BF16
        assert ((a.double() - b).abs() <= 2**-7 * b.abs() + 1e-4 * b.abs().max()).all()


def test_a_shift_in_fp32_beside_values_in_bfloat16_keeps_its_fraction():
    inputs, options = problem(length=400, packed=False, channels=4)
    inputs["values"] = inputs["values"].detach().bfloat16().requires_grad_()
    with torch.no_grad():
        inputs["shift"] += 300.3
    out, wanted = mix(**inputs, **options), composed(**inputs, **options)
    assert out.dtype == BF16
    assert ((out - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()


def test_first_isolates():
    """Nothing crosses into a document that begins later, in either direction."""
    inputs, options = problem(batch=1, length=20, packed=False)
    inputs["origin"] = torch.where(torch.arange(20)[None, :, None] < 9, inputs["origin"], -1)
    options["first"] = torch.tensor([[0] * 9 + [9] * 11])
    out = mix(**inputs, **options)
    (dvalues,) = torch.autograd.grad(out[:, 9:].sum(), inputs["values"], retain_graph=True)
    assert dvalues[:, :9].abs().max() < 1e-12
    changed = {**inputs, "values": torch.cat([-inputs["values"][:, :9], inputs["values"][:, 9:]], dim=1)}
    assert_same("later document", mix(**changed, **options)[:, 9:], out[:, 9:], 1e-6)


def test_wild_first_rows_and_origins_mean_what_lies_next_to_them():
    inputs, options = problem(packed=False)
    wanted = results(mix, inputs, options)
    for low in (-1, -(10**9), torch.iinfo(torch.int64).min):
        got = results(mix, inputs, {**options, "first": torch.full((2, 13), low)})
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    far, beyond = ({**inputs, "origin": torch.full_like(inputs["origin"], row)} for row in (2**29, 2**32 + 1))
    for a, b in zip(results(mix, far, options), results(mix, beyond, options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_dtype_without_kernels_is_refused(dtype):
    inputs, options = problem()
    with pytest.raises(InputError, match="float32 or bfloat16"):
        mix(**{name: x.to(dtype) if name != "origin" else x for name, x in inputs.items()}, **options)


def test_threads_change_nothing():
    inputs, options = problem(length=400, channels=16)
    threads = torch.get_num_threads()
    try:
        runs = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            runs.append(results(mix, inputs, options))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_no_tokens():
    for batch, length in ((0, 3), (2, 0)):
        inputs, options = problem(batch, length)
        assert [x.shape[:2] for x in results(mix, inputs, options)] == [(batch, length)] * 4


@pytest.mark.parametrize("gated", [True, False])
def test_registration(gated):
    inputs, options = problem(gated=gated)
    arguments = (*inputs.values(), options["first"], options["near"], options["boxes"], math.inf)
    torch.library.opcheck(module._mix, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        module._mix_backward,
        (torch.ones(2, 13, 6, 3), module._mix(*arguments)[1], *arguments),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_under_gradient_checkpointing():
    inputs, options = problem()
    leaves = [inputs[name] for name in ("values", "shift", "gate")]
    plain = torch.autograd.grad(mix(**inputs, **options).square().sum(), leaves)
    out = checkpoint(lambda *x: mix(*x, inputs["origin"], **options), *leaves, use_reentrant=False)
    for got, wanted in zip(torch.autograd.grad(out.square().sum(), leaves), plain, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("first", torch.zeros(1, 13, dtype=torch.long)),
        ("first", torch.zeros(2, 13)),
        ("origin", torch.zeros(2, 5, 2, dtype=torch.long)),
        ("origin", torch.zeros(2, 13, 1, dtype=torch.long)),
    ],
)
def test_rows_that_do_not_fit_never_reach_a_kernel(name, rows):
    inputs, options = problem()
    with pytest.raises(InputError, match=f"needs {name} as integers of shape"):
        inspect.unwrap(mix)(**{**inputs, **options, name: rows})


@pytest.mark.parametrize("name", ["shift", "gate", "origin", "first"])
def test_tensors_on_several_devices(name):
    """Which of them computes would be chance: of a meta tensor nothing but memory as it is."""
    x = torch.randn(1, 4, 2, 3)
    given = {"values": x, "shift": x, "gate": x, "origin": torch.zeros(1, 4, 1, dtype=torch.long)}
    given["first"] = torch.zeros(1, 4, dtype=torch.long)
    mix(**given, near=1)
    with pytest.raises(InputError, match=f"mix needs all tensors on one device; .*{name} on meta"):
        mix(**{**given, name: given[name].to("meta")}, near=1)


def test_another_default_device():
    given = {"values": torch.randn(1, 4, 2, 3, requires_grad=True), "shift": torch.randn(1, 4, 2, 3)}
    wanted = mix(**given, gate=None, origin=None, near=1, boxes=1)
    (slope,) = torch.autograd.grad(wanted.sum(), given["values"])
    with torch.device("meta"):
        found = mix(**given, gate=None, origin=None, near=1, boxes=1)
        (again,) = torch.autograd.grad(found.sum(), given["values"])
    assert torch.equal(found, wanted)
    assert torch.equal(again, slope)
