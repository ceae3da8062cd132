"""Checkpoint folders: the Hugging Face layout, verified on reading, written whole or not at all.

    config.json  generation_config.json  model.safetensors  modeling_starlm.py  manifest.json
    tokenizer.json  tokenizer_config.json  chat_template.jinja

`manifest.json` has the size and SHA-256 of every other file. `modeling_starlm.py` lets transformers load
the folder by `trust_remote_code=True`. A run folder keeps its checkpoints as `checkpoints/step-000300`, with
two files more (`TRAINING`), which the model can do without; its last one stands for the run.
"""

import json
import re
import stat
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from starlm.errors import InputError
from starlm.files import sha256
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.settings import from_dict, to_dict

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)$")
# Keys of config.json, as `write_model` writes it, that are no fields of StarLMConfig.
_OTHER_KEYS = {
    "architectures", "model_type", "auto_map", "dtype", "chat", "bos_token_id", "eos_token_id",
    "pad_token_id",
}  # fmt: skip
WEIGHTS = "model.safetensors"
# What only training that goes on reads; who shares a model leaves it out.
TRAINING = ("optimizer.safetensors", "trainer.json")
# What transformers finds by trust_remote_code: names in a file of the folder.
AUTO_MAP = {
    "AutoConfig": "modeling_starlm.StarLMHFConfig",
    "AutoModel": "modeling_starlm.StarLMModel",
    "AutoModelForCausalLM": "modeling_starlm.StarLMForCausalLM",
}
REMOTE_CODE = '''"""StarLM for transformers: the code is that of the installed package starlm."""

try:
    from starlm.hf import StarLMForCausalLM, StarLMHFConfig, StarLMModel
except ImportError as error:
    raise ImportError(
        "This is a StarLM model. Its code is the Python package starlm, with its extra hf, and cannot be "
        f"imported here ({error}). Install it from its source: pip install -e 'FOLDER_OF_STARLM[hf]'"
    ) from error

__all__ = ["StarLMForCausalLM", "StarLMHFConfig", "StarLMModel"]
'''


def write_model(
    model: StarLM,
    folder: Path,
    *,
    bos: int | None = None,
    end_of_turn: int | None = None,
    pad: int | None = None,
    chat: bool = False,
) -> None:
    """Write config, generation config, weights and remote code into an existing folder (see `whole_folder`).

    Args:
        bos: id of the token that begins and ends documents.
        end_of_turn: id of the token that ends an answer; `generate` of transformers stops there too.
        pad: id of the token that fills up batches in transformers.
        chat: whether the model was trained on conversations; a base model has a chat template to be trained
            with, and has not learned it.
    """
    tokens = {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": pad}
    tokens = {name: number for name, number in tokens.items() if number is not None}
    config = {
        "architectures": ["StarLMForCausalLM"],
        "model_type": "starlm",
        "auto_map": AUTO_MAP,
        "dtype": str(model.head.weight.dtype).removeprefix("torch."),
        "chat": chat,
        **tokens,
        **to_dict(model.config),
    }
    write_json(folder / "config.json", config)
    generation = {"do_sample": True, "temperature": 0.8, **tokens}
    if end_of_turn is not None:
        generation["eos_token_id"] = [bos, end_of_turn]
    write_json(folder / "generation_config.json", generation)
    write_remote_code(folder)
    save_tensors(model.state_dict(), folder / WEIGHTS)


def write_remote_code(folder: Path) -> None:
    """Write the file that `AUTO_MAP` names."""
    (folder / "modeling_starlm.py").write_text(REMOTE_CODE, encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # The library makes a file for its owner alone; one of ours has what the umask gives to all others too.
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
    except SafetensorError as error:
        # The library reports a full disk as text; the caller wants the OSError that it was.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), str(error), str(path)) from None


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
    if (path / "config.json").is_file() or (path / MANIFEST).is_file():
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


def load_model(path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> StarLM:
    """The model in a checkpoint or run folder, in evaluation mode.

    Args:
        dtype: what its weights are rounded to; None leaves them as they are in the file.

    Raises:
        InputError: no checkpoint there, damaged files, or weights that do not fit the config.
    """
    folder = find_checkpoint(path)
    verify(folder)
    where = str(folder / "config.json")
    written = read_json(folder / "config.json")
    check_untied(written.get("tie_word_embeddings"), where)
    values = {k: v for k, v in written.items() if k not in _OTHER_KEYS}
    if "transformers_version" in written:
        # transformers adds keys of its own, and whatever others have put into the config.
        values = {field.name: values[field.name] for field in fields(StarLMConfig) if field.name in values}
    with torch.device("meta"):
        model = StarLM(from_dict(StarLMConfig, values, where=where))
    load_weights(model, folder, assign=True)
    return model.to(device=device, dtype=dtype).eval()


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


def load_weights(model: StarLM, folder: Path, *, assign: bool = False) -> None:
    """Give a model the weights of a checkpoint folder, which `verify` has found whole.

    Args:
        assign: the file's tensors take the place of the parameters, which are otherwise written over.

    Raises:
        InputError: unreadable files, or weights of another model.
    """
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors |= load_tensors(file)
    model.load_state_dict(_fitting(tensors, model, folder), assign=assign)


def _weight_files(folder: Path) -> list[Path]:
    """The one file of weights, or, where transformers has split it, its parts."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    try:
        names = {str(name) for name in read_json(index)["weight_map"].values()}
    except (AttributeError, KeyError):
        raise InputError(f"{index} does not list the weights. Copy the checkpoint again.") from None
    return [folder / Path(name).name for name in sorted(names)]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        InputError: missing or damaged file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"Cannot read the weights {path}: {error}. Copy the checkpoint again, or use an earlier one."
        ) from None


def _fitting(tensors: dict[str, Tensor], model: StarLM, folder: Path) -> dict[str, Tensor]:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != wanted.get(name) or not tensor.is_floating_point():
            given = "is missing" if tensor is None else f"is {tensor.dtype} of shape {tuple(tensor.shape)}"
            asked = f"has floats of shape {wanted[name]}" if name in wanted else "does not know it"
            raise InputError(
                f"The weights in {folder} do not fit its config.json: {name} {given}; the model of that "
                f"config {asked}. Copy the two files from the same checkpoint."
            )
    return tensors
