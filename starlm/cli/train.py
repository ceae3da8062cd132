"""starlm train: pretraining."""

import shlex
from pathlib import Path
from typing import Any

from starlm.cli.console import Console, duration
from starlm.cli.options import Verb
from starlm.cli.plan import training_plan
from starlm.cli.presets import TRAIN
from starlm.settings import from_dict, read_toml, to_dict
from starlm.train.config import HORIZONS, TrainConfig, seen_from_here


def run(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Train until the horizon, with progress."""
    from starlm.train.loop import train

    with console.training() as on_record:
        result = train(config, on_record=on_record)
    say_result(result, console)
    out = shlex.quote(str(config.out))
    try_it = f"chat --model {out}" if result["chat"] else f'generate --model {out} --prompt "..."'
    console.say(f"Next: starlm {try_it}   or   starlm report {out}")
    return {**result, "out": str(config.out)}


def say_result(result: dict[str, Any], console: Console) -> None:
    """Print what training came to."""
    seen, held_out = result["validation_tokens"], result["validation_split_tokens"]
    part = "held-out text" if seen == held_out else f"{seen:,} of {held_out:,} held-out tokens"
    console.say(
        f"Done: {result['bits_per_byte']:.4f} bits per byte on {part} after {result['tokens']:,} "
        f"tokens in {duration(result['seconds'])}. Checkpoint: {result['checkpoint']}"
    )


RERUN = "The last checkpoint is kept. Run the same command again to go on from it."
RUN, METRICS = "run.toml", "metrics.jsonl"


def model_of_run(config: TrainConfig) -> dict[str, Any]:
    """The layer that makes the model the one that it begins from, or gives it its data's vocabulary."""
    from starlm.data.shards import META, TokenData
    from starlm.model.folder import find_checkpoint, read_model_config

    if config.init_from is not None:
        run = config.out / RUN
        if run.is_file():
            # It is under way, whatever has become of the model that it began with.
            return {"model": to_dict(from_dict(TrainConfig, read_toml(run), where=str(run)).model)}
        return {"model": to_dict(read_model_config(find_checkpoint(config.init_from)))}
    if not (config.data / META).is_file():
        return {}
    return {"model": {"vocab_size": TokenData.open(config.data).vocab_size}}


def read_config(file: Path) -> dict[str, Any]:
    """The settings in a file; those in a run folder mean that folder, and paths as the run saw them."""
    settings = read_toml(file)
    if file.name != RUN or not (file.parent / METRICS).is_file():
        return settings
    out = Path(str(settings.get("out", ".")))
    for name in ("data", "init_from"):
        if isinstance(path := settings.get(name), str):
            settings[name] = str(seen_from_here(Path(path), run=file.parent, out=out))
    return {**settings, "out": str(file.parent)}


VERBS = {
    "train": Verb(
        options=TrainConfig,
        run=run,
        presets=TRAIN,
        one_of=frozenset(HORIZONS),
        follow=model_of_run,
        follows=("data", "out", "init_from"),
        resumes=("out", RUN),
        read_config=read_config,
        plan=training_plan,
        rerun=RERUN,
    )
}
