"""Time of one training step, by part, with each of our short cuts and without.

    python -m benchmarks.step --depth 6 --context 512 --threads 1 --out benchmarks/results/step.json

Every variant is the same model on the same batches, in one process, by turns. With one thread the clock is
the thread's own CPU time, which other programs on the machine disturb less; with more it is the wall's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from starlm.model import model as model_module
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.nn import deformer
from starlm.ops import elementwise
from starlm.report.environment import environment
from starlm.train import optim
from starlm.train.config import OptimConfig

PARTS = ("forward", "backward", "clip", "optimizers")


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float, reduction: str) -> Tensor:
    """`starlm.ops.cross_entropy`, by its formula."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def _pytorch_muon(params: Any, *, dtype: torch.dtype, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon(params, **options)


# What each short cut is called, and what stands in for it when it is off.
SHORT_CUTS = {
    "loss in chunks": lambda: patch.object(model_module, "cross_entropy", plain_loss),
    "Muon in float32": lambda: patch.object(optim, "Muon", _pytorch_muon),
    "fused RMSNorm, relu²": lambda: patch.object(elementwise, "fuses", lambda x: False),
    "fused layer": lambda: patch.object(deformer, "fuses", lambda values: False),
}


class Variant:
    """A model and its optimizers with some of the short cuts off."""

    def __init__(self, config: StarLMConfig, off: tuple[str, ...]) -> None:
        self.off = off
        with self._patched():
            torch.manual_seed(0)
            self.model = StarLM(config)
            self.optimizers = optim.Optimizers(self.model, OptimConfig())
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def _patched(self) -> ExitStack:
        stack = ExitStack()
        for name in self.off:
            stack.enter_context(SHORT_CUTS[name]())
        return stack

    def step(self, number: int, batch: tuple[Tensor, Tensor, Tensor], clock: Callable[[], float]) -> float:
        """One step of training; the loss."""
        inputs, targets, first = batch
        with self._patched():
            times = [clock()]
            loss = self.model.loss(inputs, targets, first=first)
            times.append(clock())
            loss.backward()
            times.append(clock())
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
            times.append(clock())
            self.optimizers.step(number, 1000)
            times.append(clock())
        for part, begin, end in zip(PARTS, times[:-1], times[1:], strict=True):
            self.seconds[part].append(end - begin)
        return loss.item()


def make_batch(config: StarLMConfig, tokens: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens as unequally common as words are, so that n-grams come again; two documents in a row."""
    random = torch.Generator().manual_seed(number)
    rows = tokens // config.context
    drawn = torch.rand(rows, config.context + 1, generator=random) ** 4 * config.vocab_size
    ids = drawn.long().clamp(max=config.vocab_size - 1)
    first = torch.zeros(rows, config.context, dtype=torch.long)
    first[:, config.context // 2 :] = config.context // 2
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), first


def main() -> None:
    """Print the table; write the JSON file if `--out` says where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    config = StarLMConfig(depth=options.depth, dim=options.dim, context=options.context)
    every = tuple(SHORT_CUTS)
    chosen = {"all": (), "none": every} | {f"all but {name}": (name,) for name in every}
    variants = {name: Variant(config, off) for name, off in chosen.items()}
    losses = {name: [] for name in variants}
    for number in range(options.rounds + 2):
        if number == 2:
            for variant in variants.values():
                variant.seconds = {part: [] for part in PARTS}
        for name, variant in variants.items():
            batch = make_batch(config, options.tokens, number)
            losses[name].append(variant.step(number, batch, clock))
    rows = {}
    for name, variant in variants.items():
        total = [sum(parts) for parts in zip(*variant.seconds.values(), strict=True)]
        rows[name] = {part: statistics.median(s) for part, s in variant.seconds.items()}
        rows[name] |= {"step": statistics.median(total), "steps": total, "losses": losses[name]}
    print(f"{options.threads} threads, {clock.__name__}, ms: medians of {options.rounds} steps")
    print(f"{'short cuts':<26}" + "".join(f"{part:>12}" for part in (*PARTS, "step")) + f"{'over all':>10}")
    for name, row in rows.items():
        figures = "".join(f"{1e3 * row[part]:12.0f}" for part in (*PARTS, "step"))
        print(f"{name:<26}{figures}{row['step'] / rows['all']['step']:10.2f}")
    if options.out:
        record = {
            "options": {**vars(options), "out": None},
            "clock": clock.__name__,
            "machine": environment(),
            "parameters": config.num_parameters,
            "flops_per_token": config.flops_per_token(),
            "variants": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
