"""Checkpoint folders: the Hugging Face layout, found and verified. No torch here.

    config.json  generation_config.json  model.safetensors  modeling_starlm.py  manifest.json
    tokenizer.json  tokenizer_config.json  chat_template.jinja

`manifest.json` has the size and SHA-256 of every other file. `modeling_starlm.py` lets transformers load
the folder by `trust_remote_code=True`. A run folder keeps its checkpoints as `checkpoints/step-000300`, with
two files more (`TRAINING`), which the model can do without; its last one stands for the run.
"""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from starlm.errors import InputError
from starlm.files import sha256
from starlm.model.config import StarLMConfig
from starlm.settings import from_dict

MANIFEST = "manifest.json"
CONFIG = "config.json"
GENERATION = "generation_config.json"
# What only training that goes on reads; who shares a model leaves it out.
TRAINING = ("optimizer.safetensors", "trainer.json")
_STEP = re.compile(r"step-(\d+)$")
# Keys of config.json, as `write_model` writes it, that are no fields of StarLMConfig.
_OTHER_KEYS = {
    "architectures", "model_type", "auto_map", "dtype", "chat", "bos_token_id", "eos_token_id",
    "pad_token_id",
}  # fmt: skip


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file in the folder; the last file to be written."""
    files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
    entries = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    write_json(folder / MANIFEST, {"format": "starlm-checkpoint", "version": 1, "files": entries})


def steps(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if _STEP.search(path.name)]
    return sorted(found, key=lambda path: step_of(path))


def step_of(path: Path) -> int:
    """The step that a checkpoint folder's name says."""
    match = _STEP.search(path.name)
    assert match is not None
    return int(match[1])


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the last one of a run.

    Raises:
        InputError: there is none.
    """
    if not path.exists():
        raise InputError(
            f"There is no model at {path}. Give a run folder or a checkpoint folder; starlm demo makes one."
        )
    if (path / CONFIG).is_file() or (path / MANIFEST).is_file():
        return path
    found = steps(path)
    if not found:
        raise InputError(
            f"{path} holds no checkpoint: neither a config.json nor checkpoints/step-*. Give a run folder "
            f"or a checkpoint folder; starlm train or starlm demo makes one."
        )
    return found[-1]


def verify(folder: Path, *, training: bool = False) -> None:
    """Check the files of a checkpoint against its manifest, if it has one.

    Args:
        training: also those that only training reads.

    Raises:
        InputError: a file is missing, truncated or changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    manifest = read_json(path)
    try:
        entries = [
            (Path(name).name, entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()
        ]
    except (AttributeError, KeyError, TypeError):
        raise _unusable(folder, f"{MANIFEST} is damaged: it does not list the files") from None
    for name, size, digest in entries:
        if name in TRAINING and not training:
            continue
        file = folder / name
        if not file.is_file():
            raise _unusable(folder, f"{name} is missing")
        # People edit text, not weights.
        edited = "" if file.suffix == ".safetensors" else f" If you edited {name}, delete {MANIFEST}."
        if file.stat().st_size != size:
            problem = f"{name} is damaged: {file.stat().st_size} bytes instead of {size}"
            raise _unusable(folder, problem, edited)
        if sha256(file) != digest:
            raise _unusable(folder, f"{name} is damaged: its content does not match its SHA-256", edited)


def _unusable(folder: Path, problem: str, cure: str = "") -> InputError:
    return InputError(
        f"The checkpoint {folder} cannot be used: {problem}.{cure} Copy the checkpoint again, or delete this "
        f"folder to go on from an earlier one."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: missing or malformed file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"Cannot read {path}: {error}. Copy the folder it belongs to again.") from None


def read_model_config(folder: Path) -> StarLMConfig:
    """What the model in a checkpoint folder is.

    Raises:
        InputError: config.json is missing, damaged, or of a model that StarLM does not have.
    """
    where = str(folder / CONFIG)
    written = read_json(folder / CONFIG)
    check_untied(written.get("tie_word_embeddings"), where)
    values = {k: v for k, v in written.items() if k not in _OTHER_KEYS}
    if "transformers_version" in written:
        # transformers adds keys of its own, and whatever others have put into the config.
        values = {field.name: values[field.name] for field in fields(StarLMConfig) if field.name in values}
    return from_dict(StarLMConfig, values, where=where)


def ends(folder: Path) -> set[int]:
    """Ids of the tokens that end a text, as generation_config.json and config.json of a checkpoint say.

    Raises:
        InputError: one of them is damaged.
    """
    found: list[Any] = []
    for file in (folder / CONFIG, folder / GENERATION):
        value = read_json(file).get("eos_token_id") if file.is_file() else None
        found += value if isinstance(value, list) else [value]
    return {number for number in found if isinstance(number, int)}


def check_untied(tied: Any, where: str) -> None:
    """Refuse a model whose head would be its embedding.

    Raises:
        InputError: `tied`, what tie_word_embeddings is in `where`, is true.
    """
    if tied:
        raise InputError(
            f"tie_word_embeddings is true in {where}, and StarLM's embedding and head are two matrices. "
            f"Leave it out."
        )
