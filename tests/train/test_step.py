"""One training step, and that a recorded one is the same."""

import copy

import numpy as np
import pytest
import torch

from starlm.data.loader import Batch
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.train.config import OptimConfig
from starlm.train.optim import Optimizers
from starlm.train.step import WARMUP, TrainingStep

STEPS = WARMUP + 4


def batches(seed=0):
    random = np.random.default_rng(seed)
    for _ in range(STEPS):
        tokens = random.integers(50, size=(4, 17))
        tokens[:, -1] = -1
        first = np.where(np.arange(16) < 7, 0, 7) * np.ones((4, 1), int)
        yield Batch(inputs=np.maximum(tokens[:, :-1], 0), targets=tokens[:, 1:], first=first)


def steps(model, device="cpu", schedule=OptimConfig(), **options):  # noqa: B008
    """Losses and norms of STEPS steps, and the model after them."""
    model = copy.deepcopy(model).to(device)
    optimizers = Optimizers(model, schedule)
    step = TrainingStep(model, optimizers, model.loss, **{"precision": "float32", "clip": 1.0} | options)
    found = []
    for number, batch in enumerate(batches()):
        optimizers.schedule(number, STEPS)
        found.append(step(batch))
    return torch.tensor(found), model


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = StarLM(StarLMConfig(vocab_size=50, depth=2, dim=48, heads=3, context=16, preset="star"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_loss_and_norm_are_those_of_the_model(model):
    batch = next(batches())
    inputs, targets, first = map(torch.from_numpy, (batch.inputs, batch.targets, batch.first))
    loss = model.loss(inputs, targets, first=first)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    found, _ = steps(model)
    torch.testing.assert_close(found[0], torch.stack([loss, norm]).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up_to_the_batch(model, parts):
    whole, _ = steps(model)
    found, _ = steps(model, parts=parts)
    torch.testing.assert_close(found, whole, rtol=2e-3, atol=0)
    assert len(set(whole[:, 0].tolist())) == STEPS


def test_each_target_counts_alike_in_whichever_part_it_is(model):
    """As of conversations, whose rows have many or few."""
    batch = next(batches())
    targets = batch.targets.copy()
    targets[0, 3:], targets[1, 1:] = -1, -1
    batch = Batch(inputs=batch.inputs, targets=targets, first=batch.first)
    found = []
    for parts in (1, 2, 4):
        one = copy.deepcopy(model)
        optimizers = Optimizers(one, OptimConfig())
        optimizers.schedule(0, STEPS)
        step = TrainingStep(one, optimizers, one.loss, precision="float32", parts=parts)
        found.append(step(batch))
    torch.testing.assert_close(torch.tensor(found[1:]), torch.tensor(found[:1] * 2), rtol=1e-5, atol=0)


def test_without_a_limit_nothing_is_clipped(model):
    (free, _), (wide, _), (clipped, _) = (steps(model, clip=clip) for clip in (0.0, 1e9, 1e-3))
    assert torch.equal(free, wide)
    assert not torch.equal(free[1:], clipped[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"parts": 2}, {"precision": "bfloat16"}, {"clip": 0.0}])
def test_a_recorded_step_is_the_same(model, options):
    schedule = OptimConfig(warmup=0.3, warmdown=0.3, weight_decay=0.1)
    recorded, a = steps(model, "cuda", schedule, **options)
    direct, b = steps(model, "cuda", schedule, graph=False, **options)
    torch.testing.assert_close(recorded, direct, rtol=1e-3, atol=1e-4)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_a_gpu_trains_as_a_cpu(model):
    schedule = OptimConfig(warmup=0.3, warmdown=0.3)
    (there, _), (here, _) = steps(model, "cuda", schedule), steps(model, "cpu", schedule)
    torch.testing.assert_close(there, here, rtol=0.05, atol=0.02)


@pytest.mark.gpu
def test_what_does_not_fit_says_so(model):
    calls = []

    def loss(*args, **kwargs):
        calls.append(1)
        if len(calls) > WARMUP:
            raise torch.OutOfMemoryError("too large")
        return model.loss(*args, **kwargs)

    model.cuda()
    step = TrainingStep(model, Optimizers(model, OptimConfig()), loss)
    *warm, batch = list(batches())[: WARMUP + 1]
    for each in warm:
        step(each)
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        step(batch)


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_named(model):
    from starlm.errors import StarLMError

    def loss(*args, **kwargs):
        return model.loss(*args, **kwargs) * torch.ones(()).cuda().item()

    model.cuda()
    step = TrainingStep(model, Optimizers(model, OptimConfig()), loss)
    *warm, batch = list(batches())[: WARMUP + 1]
    for each in warm:
        step(each)
    with pytest.raises(StarLMError, match="--no-cuda-graph"):
        step(batch)
