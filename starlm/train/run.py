"""The run folder: settings, metrics and checkpoints of one training run, and how a run goes on.

run.toml  tokenizer.json  metrics.jsonl  checkpoints/step-000300/  report.html
"""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlm.data.tokenizer import Tokenizer
from starlm.device import has_bfloat16, pick_device
from starlm.errors import InputError
from starlm.files import readable_os_errors, sync, whole_folder, write_whole
from starlm.model.checkpoint import load_tensors, load_weights, save_tensors, write_model
from starlm.model.folder import TRAINING, read_json, step_of, steps, verify, write_json, write_manifest
from starlm.model.model import StarLM
from starlm.settings import from_dict, read_toml, to_dict, to_toml
from starlm.train.config import HORIZONS, Precision, TrainConfig, findable, seen_from_here
from starlm.train.optim import Optimizers

# What may change between two sessions of one run: it alters neither the weights nor the data so far.
FREE = {
    *HORIZONS, "out", "data", "device", "micro_rows", "eval_every", "eval_tokens", "sample_every",
    "sample_prompts", "save_every", "keep", "workers", "cuda_graph",
}  # fmt: skip


class Run:
    """The folder of one run. Everything in it is written whole or not at all."""

    def __init__(self, config: TrainConfig) -> None:
        """Args: config: of the session that begins. If the folder holds a run, it must be the same one."""
        self.config, self.folder = config, config.out
        self._check_same()
        # Found out once: another machine, or another measurement, must not change a run's arithmetic.
        self.precision: Precision
        if self.config.precision == "auto":
            fast = has_bfloat16(pick_device(config.device))
            self.precision = "bfloat16" if fast else "float32"
            self.config = replace(self.config, precision=self.precision)
        else:
            self.precision = self.config.precision

    def _check_same(self) -> None:
        """Refuse a folder that holds another run; auto becomes the precision of the same one."""
        path = self.folder / "run.toml"
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file. Choose another --out, a folder.")
        if not path.is_file():
            if self.folder.exists() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
                raise InputError(
                    f"{self.folder} is not empty and holds no run (no run.toml). Choose another --out."
                )
            return
        old = read_config(self.folder)
        if not self.last_step():
            # Nothing is lost if it begins again, with whatever settings.
            return
        if old.init_from is not None:
            # What it began with, which may be gone now.
            old = replace(old, init_from=seen_from_here(old.init_from, run=self.folder, out=old.out))
        self._check_beginning(old)
        self.config = replace(self.config, init_from=old.init_from)
        if self.config.precision == "auto":
            self.config = replace(self.config, precision=old.precision)
        changed = [
            f"{name} was {a!r}, is {b!r}"
            for name, a, b in differences(to_dict(old), to_dict(self.config))
            if name not in FREE
        ]
        if changed:
            raise InputError(
                f"{self.folder} holds a run with other settings: {'; '.join(changed)}. To go on with it, "
                f"give the same settings (--config {shlex.quote(str(path))}); for a new run, another --out."
            )

    def _check_beginning(self, old: TrainConfig) -> None:
        """Refuse an init_from that is not what the run began with."""
        given, theirs = self.config.init_from, old.init_from
        if given in (None, theirs):
            return
        if theirs is None:
            began = "with random weights"
        elif theirs.resolve() != given.resolve():
            began = f"with those of {theirs}"
        else:
            return
        raise InputError(
            f"{self.folder} holds a run that began {began}, so it cannot begin with those of {given}. Leave "
            f"out --init-from to go on with it, or choose another --out for a new run."
        )

    def begin(self, tokenizer: Tokenizer, step: int, horizon: int) -> None:
        """Write settings and tokenizer; drop the records of what is done again, or was after `step`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        # The settings first: a folder without them is not taken for a run.
        write_whole(self.folder / "run.toml", to_toml(findable(self.config)).encode())
        tokenizer.save(self.folder / "tokenizer.json")
        again = {"plan", "end"} | ({"validation", "sample"} if step in (0, horizon) else set())
        records = ((record, record.get("step", 0)) for record in self.records())
        kept = [r for r, at in records if at < step or (at == step and r["kind"] not in again)]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_whole(self.folder / "metrics.jsonl", lines.encode())

    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl so far; a last line that was cut off is left out."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        records = []
        for line in path.read_bytes().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return records

    def record(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl.

        Raises:
            StarLMError: the disk is full.
        """
        path = self.folder / "metrics.jsonl"
        with readable_os_errors(path), path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")

    def last_step(self) -> int:
        """Steps behind the last checkpoint; 0 without one."""
        found = steps(self.folder)
        return step_of(found[-1]) if found else 0

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies, or would."""
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def save(
        self,
        step: int,
        model: StarLM,
        optimizers: Optimizers,
        tokenizer: Tokenizer,
        extra: dict,
        *,
        chat: bool = False,
    ) -> Path:
        """Write the checkpoint of a step, and remove those older than the last `keep`.

        Args:
            extra: plain values that `load` gives back.
            chat: whether the model was trained on conversations.
        """
        path = self.checkpoint(step)
        sync(self.folder / "metrics.jsonl")
        with whole_folder(path) as folder:
            write_model(
                model,
                folder,
                bos=tokenizer.bos,
                end_of_turn=tokenizer.end_of_turn,
                pad=tokenizer.pad,
                chat=chat,
            )
            tokenizer.save_pretrained(folder)
            save_tensors(optimizers.tensors(), folder / "optimizer.safetensors")
            write_json(folder / "trainer.json", {"step": step, **extra})
            write_manifest(folder)
        for old in steps(self.folder)[: -self.config.keep]:
            # Renamed first, so that a kill in the middle leaves no folder that looks like a checkpoint.
            old.rename(old.with_name(f".{old.name}.removed"))
        self._remove_leftovers()
        return path

    def _remove_leftovers(self) -> None:
        """Remove what is no checkpoint any more, or never became one."""
        for leftover in (self.folder / "checkpoints").glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def load(self, model: StarLM, optimizers: Optimizers) -> dict[str, Any]:
        """Take over weights and optimizer state of the last checkpoint; returns its `extra` and step.

        Raises:
            InputError: it is damaged, or holds a model alone.
        """
        folder = steps(self.folder)[-1]
        for name in TRAINING:
            if not (folder / name).is_file():
                raise InputError(
                    f"The checkpoint {folder} cannot be used to go on: {name} is missing, without which it "
                    f"is a model alone. Copy {name} from where it was trained, delete this folder to go on "
                    f"from an earlier one, or choose another --out for a new run."
                )
        verify(folder, training=True)
        load_weights(model, folder)
        optimizers.load(load_tensors(folder / "optimizer.safetensors"))
        return read_json(folder / "trainer.json")


def read_config(folder: Path) -> TrainConfig:
    """The settings in a run folder's run.toml.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / "run.toml"
    return from_dict(TrainConfig, read_toml(path), where=str(path))


def differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted names of the settings in `new` that are others in `old`, and both values."""
    found = []
    for key, value in new.items():
        if isinstance(value, dict):
            found += differences(old[key], value, f"{prefix}{key}.")
        elif old[key] != value:
            found.append((prefix + key, old[key], value))
    return found
