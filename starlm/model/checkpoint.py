"""Models to and from checkpoint folders (`starlm.model.folder`)."""

import re
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from starlm.errors import InputError
from starlm.model.folder import (
    CONFIG,
    GENERATION,
    find_checkpoint,
    read_json,
    read_model_config,
    verify,
    write_json,
)
from starlm.model.model import StarLM
from starlm.settings import to_dict

WEIGHTS = "model.safetensors"
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
    write_json(folder / CONFIG, config)
    generation = {"do_sample": True, "temperature": 0.8, **tokens}
    if end_of_turn is not None:
        generation["eos_token_id"] = [bos, end_of_turn]
    write_json(folder / GENERATION, generation)
    write_remote_code(folder)
    save_tensors(model.state_dict(), folder / WEIGHTS)


def write_remote_code(folder: Path) -> None:
    """Write the file that `AUTO_MAP` names."""
    (folder / "modeling_starlm.py").write_text(REMOTE_CODE, encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Two names for one tensor, such as a head that somebody has tied to the embedding, are two in a file.
    owners = {tensor.data_ptr(): name for name, tensor in contiguous.items()}
    contiguous = {n: t if owners[t.data_ptr()] == n else t.clone() for n, t in contiguous.items()}
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


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> StarLM:
    """The model in a checkpoint or run folder, in evaluation mode.

    Args:
        dtype: what its weights are rounded to; None leaves them as they are in the file.

    Raises:
        InputError: no checkpoint there, damaged files, or weights that do not fit the config.
    """
    folder = find_checkpoint(Path(path))
    verify(folder)
    with torch.device("meta"):
        model = StarLM(read_model_config(folder))
    load_weights(model, folder, assign=True)
    return model.to(device=device, dtype=dtype).eval()


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
                f"config {asked}. Copy the two files from the same checkpoint; a model that was trained with "
                f"layers of its own (build=) needs them here, too."
            )
    return tensors
