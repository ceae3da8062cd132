"""Muon against PyTorch's, and its orthogonalisation against the quintic in double precision."""

import copy

import pytest
import torch

from starlm.errors import InputError
from starlm.train.muon import Muon, orthogonalise

OPTIONS = (3.4445, -4.7750, 2.0315), 5, 1e-7
SHAPES = [(16, 16), (48, 12), (12, 48), (12, 23), (1, 9), (9, 1), (12, 24)]


def exact(matrix, steps=5):
    (a, b, c), _, eps = OPTIONS
    x = matrix.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def make(*shapes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalise(shape, steps):
    (matrix,) = make(shape)
    got = orthogonalise(matrix, OPTIONS[0], steps, OPTIONS[2])
    torch.testing.assert_close(got.double(), exact(matrix, steps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128)])
def test_orthogonalise_where_most_directions_are_nearly_empty(shape):
    """As gradients are: a few directions, and the rest 1e-4 of them."""
    rows, columns = shape
    matrix = torch.randn(rows, 4) @ torch.randn(4, columns) + 1e-4 * torch.randn(shape)
    wanted = exact(matrix)
    assert (orthogonalise(matrix, *OPTIONS) - wanted).norm() < 1e-3 * wanted.norm()
    low = orthogonalise(matrix.bfloat16(), *OPTIONS)
    assert (low - wanted).norm() > 0.01 * wanted.norm(), "bfloat16 would do: then why float32?"


@pytest.mark.parametrize("shape", [(16, 16), (12, 48)])
def test_zero_stays_zero(shape):
    assert orthogonalise(torch.zeros(shape), *OPTIONS).eq(0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_its_matrices(shape, dtype):
    """What a GPU does, on a CPU."""
    stack = torch.randn(3, *shape).to(dtype)
    got = torch.vmap(lambda matrix: orthogonalise(matrix, *OPTIONS))(stack)
    wanted = torch.stack([orthogonalise(matrix, *OPTIONS) for matrix in stack])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"nesterov": False, "momentum": 0.5}])
def test_it_is_the_library_s(options, bfloat16):
    ours, theirs = make(*SHAPES), make(*SHAPES)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    optimizers = [Muon(ours, lr=0.1, dtype=dtype, **options), torch.optim.Muon(theirs, lr=0.1, **options)]
    assert type(optimizers[0].state_dict()["param_groups"][0]) is dict
    start = [p.detach().clone() for p in ours]
    for step in range(4):
        for ps, optimizer in zip((ours, theirs), optimizers, strict=True):
            for number, (parameter, gradient) in enumerate(
                zip(ps, make(*SHAPES, seed=step + 1), strict=True)
            ):
                # One parameter has no gradient for a while.
                parameter.grad = None if (number, step) == (1, 0) else gradient.detach()
            optimizer.step()
    for before, a, b in zip(start, ours, theirs, strict=True):
        # What bfloat16 rounds is all that may differ, and nothing where we use it too.
        assert (a - b).norm() <= (1e-6 if bfloat16 else 0.04) * (b - before).norm(), tuple(a.shape)
        buffers = (o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (a, b), strict=True))
        torch.testing.assert_close(*buffers, rtol=1e-6, atol=1e-7)


def test_state_passes_between_the_library_and_ours():
    ours = make((12, 48), (16, 16))
    optimizer = Muon(ours, lr=0.1)
    for parameter in ours:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    other = torch.optim.Muon(copy.deepcopy(ours), lr=0.3)
    other.load_state_dict(optimizer.state_dict())
    back = Muon(copy.deepcopy(ours), lr=0.5)
    back.load_state_dict(other.state_dict())
    assert back.param_groups[0]["lr"] == 0.1
    for a, b in zip(optimizer.state.values(), back.state.values(), strict=True):
        assert a.keys() == b.keys() == {"momentum_buffer"}
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


def test_the_closure_is_called_with_gradients():
    (parameter,) = make((3, 4))
    optimizer = Muon([parameter], lr=0.1)

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0


def test_another_adjustment_of_the_rate_is_refused():
    with pytest.raises(InputError, match="adjust_lr_fn"):
        Muon(make((4, 4)), lr=0.1, adjust_lr_fn="match_rms_adamw")
