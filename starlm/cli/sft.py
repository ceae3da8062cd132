"""starlm sft: fine-tuning on conversations."""

import shlex
from dataclasses import replace
from typing import Any

from starlm.cli.console import Console
from starlm.cli.presets import SFT_BASE
from starlm.cli.train import VERBS as TRAINING
from starlm.cli.train import model_of_run, say_result
from starlm.errors import InputError
from starlm.train.config import TrainConfig


def run(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Teach a trained model to hold conversations."""
    _check(config)
    from starlm.data.shards import TokenData
    from starlm.train.loop import train

    split = TokenData.open(config.data).splits["train"]
    context = config.model.context
    if cut := int((split.document_lengths() > context).sum()):
        console.say(
            f"{cut:,} of {split.num_documents:,} conversations are longer than the model's context of "
            f"{context} tokens; what lies behind is not learned."
        )
    with console.training() as on_record:
        result = train(config, on_record=on_record)
    say_result(result, console)
    console.say(f"Next: starlm chat --model {shlex.quote(str(config.out))}")
    return {**result, "out": str(config.out)}


def _check(config: TrainConfig) -> None:
    from starlm.data.shards import TokenData

    if config.init_from is None:
        raise InputError(
            "Fine-tuning begins with a trained model. Name its run or checkpoint folder: --init-from RUN."
        )
    if not TokenData.open(config.data).splits["train"].conversations:
        raise InputError(
            f"{config.data} holds texts. Fine-tuning needs conversations, lines or rows with messages: "
            f"starlm data prepare talks.jsonl --tokenizer {config.init_from} --out data/chat. For texts take "
            f"starlm train --init-from."
        )


def _follow(config: TrainConfig) -> dict[str, Any]:
    """The model is the one that it begins from; a batch has whole rows of it."""
    layer = model_of_run(config)
    if context := layer.get("model", {}).get("context"):
        layer["batch_tokens"] = context * max(1, SFT_BASE["batch_tokens"] // context)
    return layer


VERBS = {"sft": replace(TRAINING["train"], run=run, base=SFT_BASE, presets={}, follow=_follow)}
