"""starlm demo: the whole way from text to a report, on the corpus that every machine has."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from starlm.cli.console import Console
from starlm.cli.presets import DEMO_BASE
from starlm.cli.train import VERBS as TRAINING
from starlm.cli.train import say_result
from starlm.train.config import TrainConfig


def run(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Tokenizer, data, training, evaluation, samples, report; what is there already is used again."""
    _heading("1/4  Tokenizer and data", console)
    _prepare(config, console)

    _heading("2/4  Training", console)
    from starlm.train.loop import train

    with console.training() as on_record:
        result = train(config, on_record=_with_headings(config, on_record, console))
    say_result(result, console)

    _heading("4/4  Report", console)
    from starlm.report.page import write_report

    page = write_report([config.out])
    console.say(f"{page}\n")
    out = shlex.quote(str(config.out))
    console.say("Next:")
    console.say(f'  starlm generate --model {out} "def "')
    console.say(f"  starlm eval --model {out}")
    console.say("  starlm data prepare YOUR_FOLDER --out data/mine")
    console.say("  starlm train --preset demo --data data/mine --out runs/mine")
    return {**result, "out": str(config.out), "data": str(config.data), "report": str(page)}


def _prepare(config: TrainConfig, console: Console) -> None:
    from starlm.data.prepare import prepare
    from starlm.data.shards import TokenData

    if config.data.exists():
        console.say(f"{config.data} is there already")
    else:
        console.say(f"The Python standard library's own source, to {config.data}")
        with console.progress() as progress:
            prepare(
                "embedded",
                config.data,
                vocab_size=config.model.vocab_size if config.init_from is None else None,
                tokenizer=config.init_from,
                progress=progress,
            )
    data = TokenData.open(config.data)
    console.table(
        [
            (f"  {name}", f"{split.num_documents:,} files", f"{split.num_tokens:,} tokens")
            for name, split in data.splits.items()
        ]
    )


def _with_headings(
    config: TrainConfig, on_record: Callable[[dict[str, Any]], None], console: Console
) -> Callable[[dict[str, Any]], None]:
    """`on_record` with a heading before what the training loop does last: evaluation and samples."""

    def heard(record: dict[str, Any]) -> None:
        if record["kind"] == "validation" and record["step"] == config.num_steps:
            _heading("3/4  Evaluation and samples", console)
        on_record(record)

    return heard


def _heading(text: str, console: Console) -> None:
    console.say(f"\n{text}")


VERBS = {
    "demo": replace(
        TRAINING["train"],
        run=run,
        base=DEMO_BASE,
        rerun="Run the same command again: finished stages are kept, and training goes on from its last "
        "checkpoint.",
    )
}
