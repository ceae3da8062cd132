"""Named settings of `starlm train`, `demo` and `sft`, in the form of a TOML file."""

from typing import Any

# The main job: a code model from the standard library in minutes on two CPU cores. Tune its numbers here.
DEMO: dict[str, Any] = {
    "model": {"depth": 4, "context": 256},
    "batch_tokens": 4096,
    "steps": 240,
    "eval_every": 60,
    "save_every": 60,
}

TRAIN: dict[str, dict[str, Any]] = {
    "demo": DEMO,
    # A laptop in hours: 12 M weights besides the embedding, 20 M tokens. For so many, attention over a window
    # in every third layer is better: docs/evidence.md.
    "small": {
        "model": {"depth": 6, "context": 512, "layers": "DDW"},
        "batch_tokens": 8192,
        "tokens": 20_000_000,
        "eval_every": 250,
        "save_every": 250,
    },
    # A workstation with a GPU in a day: 88 M weights besides the embedding, 1.8 G tokens.
    "medium": {
        "model": {"depth": 12, "context": 2048},
        "batch_tokens": 131072,
        "micro_rows": 8,
        "tokens_per_param": 20.0,
        "eval_every": 500,
        "eval_tokens": 1_048_576,
        "save_every": 500,
    },
}

# The demo itself: the same, with folders of its own.
DEMO_BASE: dict[str, Any] = {**DEMO, "data": "data/demo", "out": "runs/demo"}

# Fine-tuning: 0.3 times the rates of short pretraining, falling from the first step on. Of three factors the
# one that teaches most without making the model forget: docs/evidence.md.
SFT_BASE: dict[str, Any] = {
    "data": "data/chat",
    "out": "runs/chat",
    "epochs": 3.0,
    "batch_tokens": 4096,
    "eval_every": 100,
    "sample_prompts": [],
    "optim": {"matrix_lr": 0.006, "embedding_lr": 0.06, "head_lr": 0.0012, "warmdown": 1.0},
}
