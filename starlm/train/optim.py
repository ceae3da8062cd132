"""Muon for the matrices, AdamW for the rest, one schedule for both."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from starlm.model.model import StarLM
from starlm.nn.deformer import Deformer
from starlm.train.config import OptimConfig, Precision
from starlm.train.muon import Muon

MOMENTUM_START, MOMENTUM_STEPS = 0.85, 300


def rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Share of the full learning rate at a step: linear up, flat, linear down to `final`; 1 at most.

    Args:
        step: 0 for the first step.
        num_steps: the horizon.
    """
    up, down = config.warmup * num_steps, config.warmdown * num_steps
    left = num_steps - step
    share = 1.0 if step >= up else min(1.0, (step + 1) / up)
    # Where the two overlap, the way down begins from what the way up has reached.
    return share if left >= down else share * (config.final + (1 - config.final) * left / down)


class Optimizers:
    """The optimizers of one model: each parameter in exactly one group.

    Matrices take Muon (kellerjordan.github.io/posts/muon); the shift projections are a Muon group with a
    rate of their own. Embedding, head and biases take AdamW, with rates scaled by (D / 768)^-0.5.

    On a GPU all that changes from step to step stands in tensors there, so that `update` can be recorded once
    and replayed (`starlm.train.step`).
    """

    def __init__(self, model: StarLM, config: OptimConfig, *, precision: Precision = "float32") -> None:
        """Args: precision: of Muon's products, as of those in training."""
        self.config = config
        on_gpu = model.head.weight.is_cuda
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        groups = _groups(model)
        scale = (model.config.width / 768) ** -0.5
        adam = [
            {"params": groups["embedding"], "lr": config.embedding_lr * scale},
            {"params": groups["head"], "lr": config.head_lr * scale},
            {"params": groups["biases"], "lr": config.head_lr * scale},
        ]
        # What their rate is depends on the horizon; until `schedule` is told it is that of a short run.
        short = config.matrix_rate(1)
        muon = [
            {"params": groups["matrices"], "lr": short, "factor": 1.0},
            {"params": groups["shifts"], "lr": short * config.shift_lr, "factor": config.shift_lr},
        ]
        self.adam = torch.optim.AdamW(
            [group for group in adam if group["params"]],
            betas=(config.beta1, config.beta2),
            eps=1e-10,
            weight_decay=0.0,
            capturable=on_gpu,
        )
        self.muon = Muon(
            [group for group in muon if group["params"]],
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32,
        )
        for optimizer in (self.adam, self.muon):
            for group in optimizer.param_groups:
                group["full_lr"] = group["lr"]
                for name in ("lr", "momentum") if on_gpu else ():
                    if name in group:
                        group[name] = torch.tensor(group[name], device=model.head.weight.device)

    def step(self, step: int, num_steps: int) -> float:
        """Update every parameter from its gradient, clear the gradients, and return the share of the rate."""
        share = self.schedule(step, num_steps)
        self.update()
        return share

    def schedule(self, step: int, num_steps: int) -> float:
        """Set rates and momentum for a step of `num_steps`; the share of the full rate."""
        share = rate(step, num_steps, self.config)
        ramp = min(step / MOMENTUM_STEPS, 1.0)
        for group in self.muon.param_groups:
            group["full_lr"] = self.config.matrix_rate(num_steps) * group["factor"]
            _set(group, "momentum", MOMENTUM_START + (self.config.momentum - MOMENTUM_START) * ramp)
        for optimizer in (self.adam, self.muon):
            for group in optimizer.param_groups:
                _set(group, "lr", group["full_lr"] * share)
        return share

    def update(self) -> None:
        """Update every parameter from its gradient, and clear the gradients."""
        for optimizer in (self.adam, self.muon):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The optimizers' state as named tensors: "<parameter>/<quantity>"."""
        return {
            f"{self.names[parameter]}/{key}": value
            for optimizer in (self.adam, self.muon)
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over the state that `tensors` once returned."""
        owner = {
            self.names[parameter]: (optimizer, parameter)
            for optimizer in (self.adam, self.muon)
            for parameter in _parameters(optimizer)
        }
        for key, value in tensors.items():
            name, quantity = key.rsplit("/", 1)
            optimizer, parameter = owner[name]
            # Without `capturable` AdamW counts its steps in a CPU tensor, wherever the parameter is.
            counts = quantity == "step" and not optimizer.defaults["capturable"]
            optimizer.state[parameter][quantity] = value.to("cpu" if counts else parameter.device)


def _set(group: dict[str, Any], name: str, value: float) -> None:
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _groups(model: StarLM) -> dict[str, list[nn.Parameter]]:
    deformers = [module for module in model.modules() if isinstance(module, Deformer)]
    shifts = {id(p) for module in deformers for p in module.shift_parameters()}
    groups: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("embedding", "head", "matrices", "shifts", "biases")
    }
    for name, parameter in model.named_parameters():
        if name.startswith(("embedding.", "head.")):
            groups[name.split(".")[0]].append(parameter)
        elif parameter.ndim != 2 or name.endswith("taps"):
            groups["biases"].append(parameter)
        else:
            groups["shifts" if id(parameter) in shifts else "matrices"].append(parameter)
    return groups
