"""Projections of the same rows, side by side."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from starlm.nn import linear
from starlm.nn.linear import project
from starlm.ops import plain


def problem(dtype=torch.float64, biases=(False, True, False)):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 3 + n, bias=bias, dtype=dtype) for n, bias in enumerate(biases)]
    return torch.randn(2, 4, 5, dtype=dtype, requires_grad=True), layers


def gradients(outs, leaves):
    return torch.autograd.grad(sum(out.sin().sum() for out in outs), leaves)


def counted(run):
    """Names of the operators that `run` calls."""
    names = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Counter():
        run()
    return names


def test_results_and_gradients_are_those_of_the_layers():
    x, layers = problem()
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    wanted = [layer(x) for layer in layers]
    got = project(x, *layers)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    for a, b in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences():
    x, layers = problem()
    parameters = [p for layer in layers for p in layer.parameters()]

    def call(x, *_):
        return project(x, *layers)

    assert torch.autograd.gradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


def test_gradients_of_x_are_added_up_inside_the_products():
    x, layers = problem(biases=(False, False, False))

    def run(project):
        outs = project()
        return counted(lambda: torch.autograd.backward(outs, [torch.ones_like(out) for out in outs]))

    assert run(lambda: [layer(x) for layer in layers]).count("add") >= 2
    names = run(lambda: project(x, *layers))
    assert (names.count("add"), names.count("addmm")) == (0, 2)


def test_what_is_frozen_has_no_gradient():
    x, layers = problem()
    layers[0].requires_grad_(False)
    layers[1].bias.requires_grad_(False)
    sum(out.sum() for out in project(x, *layers)).backward()
    assert [p.grad is None for layer in layers for p in layer.parameters()] == [True, False, True, False]
    # And a result that nobody uses.
    x.grad = None
    project(x, *layers)[2].sum().backward()
    torch.testing.assert_close(x.grad, layers[2].weight.sum(0).expand_as(x))


@pytest.mark.parametrize("cast", [True, False])
def test_under_autocast(cast):
    """In the dtype that products take, where the rows are in it; weights' gradients in their own."""
    x, layers = problem(torch.float32)
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    with torch.autocast("cpu", torch.bfloat16):
        rows = x.bfloat16() if cast else x
        got, wanted = project(rows, *layers), [layer(rows) for layer in layers]
    assert [out.dtype for out in got] == [torch.bfloat16] * 3
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    for a, b in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_under_gradient_checkpointing():
    x, layers = problem()
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    wanted = gradients(project(x, *layers), leaves)
    outs = checkpoint(lambda x: project(x, *layers), x, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(outs, leaves), wanted, strict=True))


class Adapted(nn.Linear):
    """As adapters are: what it computes is not in its weight alone."""

    def forward(self, x):
        return super().forward(x) + 1


def test_layers_that_are_more_than_their_weights_are_asked(monkeypatch):
    monkeypatch.setattr(linear._Projections, "apply", lambda *_: pytest.fail("not asked"))
    x, layers = problem()
    adapted = Adapted(5, 3, dtype=torch.float64)
    assert torch.equal(project(x, layers[0], adapted)[1], adapted(x))
    called = []
    handle = layers[1].register_forward_hook(lambda *_: called.append(1))
    project(x, *layers)
    handle.remove()
    handle = layers[1].register_full_backward_hook(lambda *_: called.append(2))
    sum(out.sum() for out in project(x, *layers)).backward()
    handle.remove()
    monkeypatch.setattr(layers[1], "forward", lambda x: called.append(3) or x)
    project(x, *layers)
    assert called == [1, 2, 3]
    with plain():
        project(x, *problem()[1])
    with torch.no_grad():
        project(x, *problem()[1])


# Of PyTorch's own, when it loads its rules.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_derivatives_are_those_of_the_layers():
    x, layers = problem()
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        outs = project(torch.autograd.forward_ad.make_dual(x, tangent), *layers)
        for out, layer in zip(outs, layers, strict=True):
            found = torch.autograd.forward_ad.unpack_dual(out).tangent
            torch.testing.assert_close(found, tangent @ layer.weight.T)


def test_gradients_of_each_row_alone():
    x, layers = problem()

    def loss(row):
        return sum(out.sin().sum() for out in project(row, *layers))

    found = torch.func.vmap(torch.func.grad(loss))(x.detach())
    torch.testing.assert_close(found, gradients(project(x, *layers), [x])[0])
