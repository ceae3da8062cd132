import copy

import pytest
import torch

from starlm.errors import InputError
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.train.config import OptimConfig
from starlm.train.optim import MOMENTUM_START, MOMENTUM_STEPS, Optimizers, rate

WIDTH = 48
SCALE = (WIDTH / 768) ** -0.5


def make_model(**changes):
    options = {"vocab_size": 50, "depth": 2, "dim": WIDTH, "heads": 2, "context": 8, "shift_init": 3.0}
    model = StarLM(StarLMConfig(**options | changes))
    for parameter in model.parameters():
        # Zero matrices would have no gradient behind them.
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def backward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (2, 9), generator=generator)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()


def rates_of(optimizers):
    """Full learning rate and kind of each parameter, by name; a parameter in two groups is an error."""
    found = {}
    for optimizer, kind in ((optimizers.adam, "adam"), (optimizers.muon, "muon")):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = optimizers.names[parameter]
                assert name not in found
                found[name] = (kind, group["full_lr"])
    return found


@pytest.mark.parametrize("layers", ["D", "A", "DA"])
@pytest.mark.parametrize("preset", ["product", "value", "gated"])
def test_each_parameter_is_in_exactly_one_group(layers, preset):
    model = make_model(layers=layers, preset=preset)
    config = OptimConfig(matrix_lr=0.01, shift_lr=7.0, embedding_lr=0.3, head_lr=0.05)
    found = rates_of(Optimizers(model, config))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        if name == "embedding.weight":
            expected = ("adam", 0.3 * SCALE)
        elif name == "head.weight" or parameter.ndim == 1:
            expected = ("adam", 0.05 * SCALE)
        elif "shift" in name:
            expected = ("muon", 0.07)
        else:
            expected = ("muon", 0.01)
        assert found[name][0] == expected[0], name
        assert found[name][1] == pytest.approx(expected[1]), name
    shifts = [name for name in found if "shift" in name and name.endswith("weight")]
    assert len(shifts) == layers.count("D") * (2 // len(layers)) * (2 if preset == "product" else 1)


def newton_schulz(matrix, steps=5):
    """The zeroth power of a matrix, by the quintic of the post, in double precision."""
    x = matrix.double() / matrix.double().norm()
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if transposed else x


def test_a_matrix_moves_by_its_orthogonalised_momentum():
    model = make_model()
    optimizers = Optimizers(model, OptimConfig(warmdown=0.0, matrix_lr=0.1, shift_lr=1.0, momentum=0.95))
    momentum, steps, checked = {}, 100, 0
    for step in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients = {name: torch.randn_like(p) for name, p in before.items()}
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizers.step(step, steps)
        factor = MOMENTUM_START + (0.95 - MOMENTUM_START) * step / MOMENTUM_STEPS
        for name, parameter in model.named_parameters():
            assert parameter.grad is None
            if parameter.ndim < 2 or name in ("embedding.weight", "head.weight"):
                continue
            gradient = gradients[name]
            old = momentum.get(name, torch.zeros_like(gradient))
            momentum[name] = factor * old + (1 - factor) * gradient
            ahead = factor * momentum[name] + (1 - factor) * gradient
            moved = (before[name] - parameter.detach()).double()
            rows, columns = parameter.shape
            size = 0.1 * max(1, rows / columns) ** 0.5
            expected = newton_schulz(ahead) * size
            assert (moved - expected).norm() < 1e-4 * expected.norm(), name
            values = torch.linalg.svdvals(moved / size)
            assert values.max() < 1.3
            assert values.median() > 0.6
            checked += 1
    assert checked == 3 * 2 * (4 + 2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_matrices_are_orthogonalised_in_the_precision_of_the_run(precision):
    optimizers = Optimizers(make_model(), OptimConfig(), precision=precision)
    assert optimizers.muon.dtype == getattr(torch, precision)


def test_the_rest_moves_as_adam_says():
    for name, full in (("head.weight", 0.02 * SCALE), ("embedding.weight", 0.3 * SCALE)):
        model = make_model()
        optimizers = Optimizers(model, OptimConfig(warmdown=0.0, head_lr=0.02, embedding_lr=0.3))
        parameter = dict(model.named_parameters())[name]
        first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for step in range(1, 4):
            backward(model, seed=step)
            gradient, before = parameter.grad.clone(), parameter.detach().clone()
            optimizers.step(step - 1, 100)
            first = 0.8 * first + 0.2 * gradient
            second = 0.95 * second + 0.05 * gradient**2
            expected = (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-10) * full
            torch.testing.assert_close(before - parameter.detach(), expected, rtol=1e-3, atol=1e-5)


def test_weight_decay_pulls_matrices_only():
    model = make_model()
    plain = copy.deepcopy(model)
    for each, decay in ((model, 0.5), (plain, 0.0)):
        optimizers = Optimizers(each, OptimConfig(matrix_lr=0.1, weight_decay=decay, warmdown=0.0))
        backward(each)
        optimizers.step(0, 100)
    for (name, decayed), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        matrix = decayed.ndim == 2 and name not in ("embedding.weight", "head.weight")
        assert torch.equal(decayed, other) != matrix, name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"warmup": 0.0, "warmdown": 0.0}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 0.4, "warmdown": 0.0}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 0.0, "warmdown": 0.4}, [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"warmup": 0.2, "warmdown": 0.5, "final": 0.1}, [0.5, 1, 1, 1, 1, 1, 0.82, 0.64, 0.46, 0.28]),
        ({"warmup": 0.15, "warmdown": 0.0}, [2 / 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 0.8, "warmdown": 0.5}, [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.7, 0.6, 0.4, 0.2]),
        ({"warmup": 0.05, "warmdown": 1.0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_the_schedule(options, expected):
    config = OptimConfig(**options)
    assert [rate(step, 10, config) for step in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    {
        **{"matrix_lr": -0.1, "head_lr": float("nan"), "embedding_lr": float("inf"), "clip": -1.0},
        **{"momentum": 1.0, "beta1": 1.5, "warmup": 3.0, "warmdown": -0.1, "final": 1.1},
    }.items(),
)
def test_impossible_settings_are_named(name, value):
    with pytest.raises(InputError, match=f"optim.{name} must be"):
        OptimConfig(**{name: value})


def test_matrices_learn_more_slowly_in_longer_runs_unless_told():
    model = make_model()
    for steps, expected in ((1, 0.02), (300, 0.02), (1500, 0.01195), (6000, 0.007668)):
        assert OptimConfig().matrix_rate(steps) == pytest.approx(expected, rel=1e-3)
        assert OptimConfig(matrix_lr=0.3).matrix_rate(steps) == 0.3
        optimizers = Optimizers(model, OptimConfig(shift_lr=0.5, warmdown=0.0))
        optimizers.schedule(0, steps)
        found = rates_of(optimizers)
        for name, (kind, full) in found.items():
            if kind == "muon":
                assert full == pytest.approx(expected * (0.5 if "shift" in name else 1), rel=1e-3)
            else:
                assert full == rates_of(Optimizers(model, OptimConfig()))[name][1]


def test_the_schedule_reaches_every_group():
    model = make_model()
    optimizers = Optimizers(model, OptimConfig(warmdown=0.5))
    for step in (0, 6, 9):
        backward(model)
        share = optimizers.step(step, 10)
        assert share == rate(step, 10, optimizers.config)
        for optimizer in (optimizers.adam, optimizers.muon):
            for group in optimizer.param_groups:
                assert group["lr"] == group["full_lr"] * share


def test_momentum_rises():
    model = make_model()
    optimizers = Optimizers(model, OptimConfig(momentum=0.95))
    for step, expected in ((0, 0.85), (150, 0.9), (300, 0.95), (5000, 0.95)):
        backward(model)
        optimizers.step(step, 10_000)
        for group in optimizers.muon.param_groups:
            assert group["momentum"] == pytest.approx(expected)


def test_state_taken_over_goes_on_bit_by_bit():
    one = make_model(layers="DA")
    first = Optimizers(one, OptimConfig())
    assert first.tensors() == {}
    for step in range(2):
        backward(one, seed=step)
        first.step(step, 10)
    two = copy.deepcopy(one)
    second = Optimizers(two, OptimConfig())
    tensors = first.tensors()
    assert {key.rsplit("/", 1)[0] for key in tensors} == dict(one.named_parameters()).keys()
    second.load({key: value.clone() for key, value in tensors.items()})
    for step in range(2, 5):
        for model, optimizers in ((one, first), (two, second)):
            backward(model, seed=step)
            optimizers.step(step, 10)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    for key, value in first.tensors().items():
        assert torch.equal(value, second.tensors()[key]), key
