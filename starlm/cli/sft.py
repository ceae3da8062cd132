"""starlm sft: fine-tuning on conversations."""

from dataclasses import replace
from typing import Any

from starlm.cli.console import Console
from starlm.cli.presets import SFT_BASE
from starlm.cli.train import VERBS as TRAINING
from starlm.cli.train import model_of_run
from starlm.cli.train import run as train
from starlm.errors import InputError
from starlm.train.config import TrainConfig

# Steps below which a run takes smaller batches.
FEW_STEPS = 100


def run(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Teach a trained model to hold conversations."""
    if config.init_from is None:
        raise InputError(
            "Fine-tuning begins with a trained model. Name its run or checkpoint folder: --init-from RUN."
        )
    from starlm.data.shards import TokenData

    split, context = TokenData.open(config.data).splits["train"], config.model.context
    if not split.conversations:
        raise InputError(
            f"{config.data} holds texts. Fine-tuning needs conversations, lines or rows with messages: "
            f"starlm data prepare talks.jsonl --tokenizer {config.init_from} --out data/chat. For texts take "
            f"starlm train --init-from."
        )
    # The token behind the last input is learned, too.
    if cut := int((split.document_lengths() > context + 1).sum()):
        console.say(
            f"{cut:,} of {split.num_documents:,} conversations are longer than the model's context of "
            f"{context} tokens; what lies behind is not learned."
        )
    return train(config, console)


def _follow(config: TrainConfig) -> dict[str, Any]:
    """The model is the one it begins from; of few conversations batches are small, lest there be one step."""
    from starlm.data.shards import META, TokenData

    layer = model_of_run(config)
    if context := layer.get("model", {}).get("context"):
        rows = SFT_BASE["batch_tokens"] // context
        if (config.data / META).is_file():
            lengths = TokenData.open(config.data).splits["train"].document_lengths()
            tokens = SFT_BASE["epochs"] * lengths.clip(max=context).sum()
            rows = min(rows, int(tokens / context / FEW_STEPS))
        layer["batch_tokens"] = context * max(rows, 1)
    return layer


VERBS = {"sft": replace(TRAINING["train"], run=run, base=SFT_BASE, presets={}, follow=_follow)}
