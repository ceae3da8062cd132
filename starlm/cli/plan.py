"""What a training run will take, from its configuration alone. No torch, so that --dry-run stays instant."""

from typing import Any

from starlm.model.config import StarLMConfig
from starlm.train.config import TrainConfig

# The measured peak over what is saved for the backward pass: what a pass needs in passing, and the allocator.
_SLACK = 1.25
# What ops/cross_entropy.py, which imports torch, holds of the logits: so many, of so many tokens at least.
CHUNK, CHUNK_ON_GPU, MIN_TOKENS = 1 << 20, 1 << 26, 256


def training_plan(config: TrainConfig) -> dict[str, Any]:
    """Parameters, FLOPs, roughly the memory in MiB; steps and tokens if known, epochs if there are data."""
    from starlm.data.shards import META

    flops, there = config.model.flops_per_token(), (config.data / META).is_file()
    of_model = {"parameters": config.model.num_parameters, "flops_per_token": flops}
    needs = {"memory_MiB_approximate": memory(config)}
    if config.epochs is not None and not there:
        return {**of_model, **needs}
    config = config.in_tokens()
    tokens = config.num_steps * config.batch_tokens
    return {
        "steps": config.num_steps,
        "tokens": tokens,
        **({"epochs": tokens / config.epoch_tokens()} if there else {}),
        "matrix_lr": config.optim.matrix_rate(config.num_steps),
        **of_model,
        "flops_in_total": float(flops * tokens),
        **needs,
    }


def memory(config: TrainConfig) -> dict[str, int]:
    """MiB in float32: exact for weights, gradients and optimizer state, rough for activations.

    Where the device is auto, the loss is taken to be computed on a CPU, in small chunks.
    """
    parts = config.model.num_parameters
    weights = 4 * parts["total"]
    # AdamW keeps two moments of embedding and head, Muon one momentum of the matrices.
    optimizer = 8 * (parts["embedding"] + parts["head"]) + 4 * (parts["mixers"] + parts["mlps"])
    tokens = (config.micro_rows or config.rows) * config.model.context
    kept = tokens * _floats_per_token(config.model)
    loss = _floats_of_loss(config.model, tokens, on_gpu=config.device.startswith("cuda"))
    sizes = {
        "weights": weights,
        "gradients": weights,
        "optimizer": optimizer,
        "activations": round(4 * (_SLACK * kept + loss)),
    }
    sizes["total"] = sum(sizes.values())
    return {name: round(size / 2**20) for name, size in sizes.items()}


def _floats_per_token(model: StarLMConfig) -> int:
    """Numbers that the backward pass of the layers needs of each token: so many widths per layer."""
    # Counted through torch's saved-tensor hooks: a mixer 9 (attention) to 13 (product), an MLP 2 and twice
    # its hidden width.
    per_layer = 11 + (2 + 2 * model.mlp_ratio if model.mlp_ratio else 0)
    return model.depth * model.width * per_layer


def _floats_of_loss(model: StarLMConfig, tokens: int, *, on_gpu: bool) -> int:
    """Numbers that the loss holds: a chunk of logits, and the gradients of hidden states and head."""
    chunk = max(MIN_TOKENS, (CHUNK_ON_GPU if on_gpu else CHUNK) // model.vocab_size)
    return min(tokens, chunk) * model.vocab_size + (tokens + model.vocab_size) * model.width
