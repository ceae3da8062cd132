"""starlm eval: bits per byte, or tasks of lm-evaluation-harness."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from starlm.cli.console import Console, duration
from starlm.cli.options import Verb
from starlm.errors import InputError
from starlm.settings import read_toml
from starlm.train.config import seen_from_here


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure, on what."""

    model: Path = Path("runs/demo")
    """Run folder (its last checkpoint is taken) or checkpoint folder."""
    data: Path | None = None
    """Folder of prepared data; without it, the data that the run was trained on."""
    split: Literal["validation", "train"] = "validation"
    """Which part of the data."""
    max_tokens: int = 0
    """Take this many tokens, spread over the split; 0 takes all."""
    rows: int = 8
    """Rows of `context` tokens per forward pass."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the matrix products."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    lm_eval: tuple[str, ...] = ()
    """Run these tasks of lm-evaluation-harness instead: names, or YAML files that define one."""
    limit: int = 0
    """Examples per task of --lm-eval; 0 takes all."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise InputError(f"limit must be 0 or more; got {self.limit}.")
        if self.lm_eval and self.data:
            raise InputError("--lm-eval tasks have data of their own. Leave out --data, or --lm-eval.")
        if self.max_tokens < 0 or self.rows < 1:
            raise InputError(
                f"max_tokens must be 0 or more and rows at least 1; got {self.max_tokens} and {self.rows}."
            )


def run(options: EvalOptions, console: Console) -> dict[str, Any]:
    """Measure, with progress."""
    return _tasks(options, console) if options.lm_eval else _bits_per_byte(options, console)


def _tasks(options: EvalOptions, console: Console) -> dict[str, Any]:
    from starlm.evaluate.harness import run_tasks

    began = time.perf_counter()
    results = run_tasks(
        options.model,
        options.lm_eval,
        limit=options.limit or None,
        rows=options.rows,
        precision=options.precision,
        device=options.device,
    )
    console.table(
        [(task, name, f"{value:.4f}") for task, values in results.items() for name, value in values.items()]
    )
    return {"model": str(options.model), "lm_eval": results, "seconds": time.perf_counter() - began}


def _bits_per_byte(options: EvalOptions, console: Console) -> dict[str, Any]:
    folder = options.data or trained_on(options.model)
    from starlm.data.shards import TokenData
    from starlm.evaluate.bits_per_byte import evaluate
    from starlm.generate.text import load

    model = load(options.model, device=options.device)
    data = TokenData.open(folder)
    if data.meta["tokenizer"] != model.tokenizer.fingerprint:
        raise InputError(
            f"{folder} was prepared with another tokenizer than that of {options.model}: its tokens would "
            f"mean other texts. Prepare it again with --tokenizer {options.model}, in another folder."
        )
    if options.data is None:
        _check_same_data(options.model, folder, data.splits["train"].fingerprint)
    began = time.perf_counter()
    with console.progress() as progress:
        result = evaluate(
            model.model,
            data.splits[options.split],
            model.tokenizer,
            max_tokens=options.max_tokens or None,
            rows=options.rows,
            precision=options.precision,
            progress=lambda done, total: progress("tokens", done, total),
        )
    seconds = time.perf_counter() - began
    console.say(
        f"{result['bits_per_byte']:.4f} bits per byte, loss {result['loss']:.4f} nats per token: "
        f"{result['tokens']:,} of {result['split_tokens']:,} tokens, {result['bytes']:,} bytes of {folder} "
        f"({options.split}) in {duration(seconds)}"
    )
    return {
        **result,
        "seconds": seconds,
        "model": str(options.model),
        "data": str(folder),
        "split": options.split,
    }


def _check_same_data(model: Path, folder: Path, fingerprint: str) -> None:
    """Refuse data that were prepared again since the model was trained on them."""
    from starlm.model.folder import find_checkpoint, read_json

    file = find_checkpoint(model) / "trainer.json"
    if file.is_file() and read_json(file).get("data") != fingerprint:
        raise InputError(
            f"{folder} holds other data than {model} was trained on, so what it learned may count as held "
            f"out. Prepare the data as they were, or name them with --data to measure on them all the same."
        )


def trained_on(model: Path) -> Path:
    """The data folder that a model's run.toml names.

    Args:
        model: run folder, or a checkpoint folder in one.

    Raises:
        InputError: there is no run.toml, or the folder that it names is gone.
    """
    if not model.exists():
        raise InputError(f"There is no model at {model}. Give a run folder or a checkpoint folder.")
    files = [folder / "run.toml" for folder in (model, *model.absolute().parents[:2])]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise InputError(f"{model} belongs to no run, so its data is not known. Name a folder with --data.")
    settings = read_toml(file)
    folder = seen_from_here(
        Path(settings.get("data", "data")), run=file.parent, out=Path(settings.get("out", "."))
    )
    if not folder.exists():
        raise InputError(
            f"{file} names the data folder {folder}, which is not there (seen from {Path.cwd()}). Name it "
            f"with --data."
        )
    return folder


VERBS = {
    "eval": Verb(
        options=EvalOptions, run=run, presets={"quick": {"max_tokens": 65536}, "full": {"max_tokens": 0}}
    )
}
