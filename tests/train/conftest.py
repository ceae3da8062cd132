"""A tiny corpus, and runs on it."""

import random
from pathlib import Path

import pytest

from starlm.data.prepare import prepare
from starlm.model.config import StarLMConfig
from starlm.train.config import TrainConfig

NAMES = ["alpha", "beta", "gamma", "delta", "count", "total", "index", "value"]


def write_corpus(folder: Path) -> Path:
    """Eight files of short functions, which a model of a few thousand parameters can learn something of."""
    source = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(8):
        lines = []
        for _ in range(12):
            name, other = source.sample(NAMES, 2)
            lines.append(f"def {name}({other}):\n    return {other} + {source.randrange(10)}\n")
        (folder / f"{number}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder with a vocabulary of 300."""
    root = tmp_path_factory.mktemp("train")
    prepare([write_corpus(root / "text")], root / "data", vocab_size=300, validation_fraction=0.2)
    return root / "data"


@pytest.fixture
def config(data, tmp_path):
    """Makes settings of a tiny run; words with two underscores (model__depth) reach into the tables."""

    def make(**changes) -> TrainConfig:
        model = {"vocab_size": 300, "depth": 2, "dim": 32, "heads": 2, "layers": "DA", "context": 16}
        model |= {name[7:]: changes.pop(name) for name in list(changes) if name.startswith("model__")}
        values = {"data": data, "out": tmp_path / "run", "steps": 8, "batch_tokens": 64, "eval_tokens": 64}
        values |= {"sample_prompts": (), "precision": "float32", "device": "cpu"}
        return TrainConfig(model=StarLMConfig(**model), **{**values, **changes})

    return make
