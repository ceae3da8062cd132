"""What a training run will take, from its configuration alone. No torch, so that --dry-run stays instant."""

from typing import Any

from starlm.model.config import StarLMConfig
from starlm.train.config import TrainConfig

# The measured peak over what is saved for the backward pass: what a pass needs in passing, and the allocator.
_SLACK = 1.25


def training_plan(config: TrainConfig) -> dict[str, Any]:
    """Steps, tokens, parameters, FLOPs, and a rough estimate of memory in MiB."""
    tokens = config.num_steps * config.batch_tokens
    flops = config.model.flops_per_token()
    return {
        "steps": config.num_steps,
        "tokens": tokens,
        "matrix_lr": config.optim.matrix_rate(config.num_steps),
        "parameters": config.model.num_parameters,
        "flops_per_token": flops,
        "flops_in_total": float(flops * tokens),
        "memory_MiB_approximate": memory(config),
    }


def memory(config: TrainConfig) -> dict[str, int]:
    """MiB in float32: exact for weights, gradients and optimizer state, rough for activations."""
    parts = config.model.num_parameters
    weights = 4 * parts["total"]
    # AdamW keeps two moments of embedding and head, Muon one momentum of the matrices.
    optimizer = 8 * (parts["embedding"] + parts["head"]) + 4 * (parts["mixers"] + parts["mlps"])
    rows = config.micro_rows or config.rows
    sizes = {
        "weights": weights,
        "gradients": weights,
        "optimizer": optimizer,
        "activations": round(_SLACK * 4 * rows * config.model.context * _floats_per_token(config.model)),
    }
    sizes["total"] = sum(sizes.values())
    return {name: round(size / 2**20) for name, size in sizes.items()}


def _floats_per_token(model: StarLMConfig) -> int:
    """Numbers that the backward pass needs of each token: so many widths per layer, and the logits."""
    # Counted through torch's saved-tensor hooks: a mixer 9 (attention) to 13 (product), an MLP 2 and twice
    # its hidden width, the logits twice; their gradient is the third.
    per_layer = 11 + (2 + 2 * model.mlp_ratio if model.mlp_ratio else 0)
    return model.depth * model.width * per_layer + 3 * model.vocab_size
