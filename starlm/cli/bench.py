"""starlm bench: timings side by side with peers."""

from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from starlm.bench.config import DecodeOptions, LayerOptions, OpOptions, ServeBenchOptions, TrainBenchOptions
from starlm.cli.console import Console
from starlm.cli.options import Verb


def _main_of(module: str) -> Callable[[Any, Console], dict[str, Any]]:
    def run(options: Any, console: Console) -> dict[str, Any]:
        from starlm.report.environment import environment

        with redirect_stdout(console.human):
            return import_module(f"starlm.bench.{module}").main(options, dict(environment()))

    return run


VERBS = {
    "bench op": Verb(
        options=OpOptions,
        run=_main_of("op"),
        presets={
            "quick": {"batch_tokens": 4096, "lengths": [512, 2048], "repeats": 3},
            # The sizes that the operator's speed is promised for: B = 4, T = 2048, D = 768.
            "acceptance": {"batch_tokens": 8192, "lengths": [2048], "dim": 768, "repeats": 15},
        },
    ),
    "bench layer": Verb(
        options=LayerOptions,
        run=_main_of("layer"),
        presets={"quick": {"batch_tokens": 2048, "lengths": [256, 2048], "dim": 256, "repeats": 3}},
    ),
    "bench train": Verb(
        options=TrainBenchOptions,
        run=_main_of("step"),
        presets={"quick": {"batch_tokens": 2048, "lengths": [256, 2048], "dim": 128, "depth": 2}},
    ),
    "bench decode": Verb(
        options=DecodeOptions,
        run=_main_of("decode"),
        presets={
            "quick": {"contexts": [100, 1000], "dim": 128, "depth": 2},
            # About 100 million parameters.
            "large": {"contexts": [1000], "dim": 768, "depth": 12, "vocab_size": 16384},
        },
    ),
    "bench serve": Verb(
        options=ServeBenchOptions,
        run=_main_of("serve"),
        presets={"quick": {"clients": [1, 4], "requests": 2, "tokens": 16}},
    ),
}
