"""Folders come back bit by bit, appear whole or not at all, and say what is wrong with them."""

import errno
import json
import os
import stat

import pytest
import torch
from models import BOUNDED, KINDS, make_model, make_tokens
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from starlm.errors import StarLMError
from starlm.files import whole_folder
from starlm.model import checkpoint
from starlm.model.checkpoint import load_model, write_model
from starlm.model.folder import TRAINING, verify, write_manifest

FILES = ("config.json", "generation_config.json", "model.safetensors", "modeling_starlm.py")


def write(model, path):
    with whole_folder(path) as folder:
        write_model(model, folder, bos=0)
        write_manifest(folder)
    return path


@pytest.fixture
def folder(tmp_path):
    return write(make_model("gated", dtype=torch.float32), tmp_path / "model")


def refused(call, *words):
    with pytest.raises(StarLMError) as error:
        call()
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("kind", [*KINDS, *BOUNDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, kind, dtype):
    model, tokens = make_model(kind, dtype=dtype), make_tokens(2, 20)
    loaded = load_model(str(write(model, tmp_path / "m")))
    assert loaded.config == model.config
    assert not loaded.training
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, wanted[name]), name
    assert all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(tokens), model(tokens))


def test_the_same_model_gives_the_same_bytes(tmp_path):
    one, two = (write(make_model("mixed"), tmp_path / name) for name in "ab")
    for file in (*FILES, "manifest.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_all_files_have_the_same_permissions(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = write(make_model("gated"), tmp_path / "model")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o666 & ~umask}


def test_hugging_face_layout(tmp_path):
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        folder = write(make_model("mixed", dtype=dtype), tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "starlm"
        assert config["architectures"] == ["StarLMForCausalLM"]
        assert config["dtype"] == name
        assert config["bos_token_id"] == config["eos_token_id"] == 0
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_starlm.StarLMForCausalLM"
        assert config["layers"] == "DA"
        assert {file.name for file in folder.iterdir()} == {*FILES, "manifest.json"}
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("file", FILES)
def test_missing_file(folder, file):
    (folder / file).unlink()
    refused(lambda: load_model(folder), str(folder), f"{file} is missing", "Copy the checkpoint again")


@pytest.mark.parametrize("keep", [0, 1, 50])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("manifest", [True, False])
def test_truncated_file(folder, file, keep, manifest):
    path = folder / file
    path.write_bytes(path.read_bytes()[:keep])
    if manifest:
        refused(lambda: load_model(folder), str(folder), file, "is damaged", "Copy the checkpoint again")
    elif file in ("config.json", "model.safetensors"):
        (folder / "manifest.json").unlink()
        refused(lambda: load_model(folder), str(path), "Copy")


@pytest.mark.parametrize("file", FILES)
def test_one_changed_bit(folder, file):
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    refused(lambda: load_model(folder), str(folder), file, "does not match its SHA-256", "Copy")
    refused(lambda: verify(folder), file)


@pytest.mark.parametrize("file", TRAINING)
def test_a_model_does_without_the_files_of_training(folder, file):
    """Nobody reads them to use it, not even to see whether they are whole."""
    for name in TRAINING:
        (folder / name).write_bytes(b"state")
    write_manifest(folder)
    verify(folder, training=True)
    (folder / file).write_bytes(b"stale")
    load_model(folder)
    refused(lambda: verify(folder, training=True), f"{file} is damaged", "Copy")
    (folder / file).unlink()
    load_model(folder)
    refused(lambda: verify(folder, training=True), f"{file} is missing", "Copy")


def test_an_edited_file_says_how_to_keep_the_edit(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "chat": True}))
    refused(lambda: load_model(folder), "config.json", "If you edited config.json, delete manifest.json.")
    (folder / "manifest.json").unlink()
    load_model(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}",
        "[]",
        "[" * 10**5,
        '{"files": []}',
        '{"files": {"config.json": 7}}',
        '{"files": {"config.json": {"bytes": 1}}}',
    ],
)
def test_damaged_manifest(folder, text):
    (folder / "manifest.json").write_text(text)
    refused(lambda: load_model(folder), "manifest.json", "Copy")


def change(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(max_shfit=3), ["max_shfit", "Did you mean 'max_shift'"]),
        (lambda c: c.update(anchors=[1]), ["anchors", "Known keys"]),
        (lambda c: c.update(depth="2"), ["depth", "of type int"]),
        (lambda c: c.update(heads=3), ["model.heads must divide"]),
        (lambda c: c.update(preset="moon"), ["preset", "product, value, gated"]),
    ],
)
def test_unknown_or_impossible_config(folder, edit, words):
    change(folder, edit)
    refused(lambda: load_model(folder), str(folder / "config.json"), *words)


@pytest.mark.parametrize(
    ("edit", "tensor"),
    [
        (lambda c: c.update(dim=32), "shape"),
        (lambda c: c.update(depth=3), "blocks.2."),
        (lambda c: c.update(depth=1), "blocks.1."),
        (lambda c: c.update(preset="product"), "blocks.0.mixer."),
        (lambda c: c.update(vocab_size=51), "embedding.weight"),
    ],
)
def test_weights_of_another_model(folder, edit, tensor):
    change(folder, edit)
    refused(lambda: load_model(folder), str(folder), tensor, "do not fit its config.json", "same checkpoint")


def test_weights_that_are_no_floats(folder):
    (folder / "manifest.json").unlink()
    path = folder / "model.safetensors"
    save_file({name: tensor.long() for name, tensor in load_file(path).items()}, path)
    refused(lambda: load_model(folder), str(folder), "int64", "blocks.0.mixer.gate.weight")


def fail(error):
    def raising(*args, **options):
        raise error

    return raising


@pytest.mark.parametrize("place", ["save_file", "write_json", "write_manifest"])
def test_full_disk(tmp_path, monkeypatch, place):
    """The library tells of it in its own error, the system in an OSError; nothing half is left."""
    model = make_model("gated")
    full = OSError(errno.ENOSPC, "No space left on device")
    if place == "save_file":
        full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    before = write(model, tmp_path / "model")
    kept = {file.name: file.read_bytes() for file in before.iterdir()}
    with monkeypatch.context() as patch:
        if place == "write_manifest":
            patch.setitem(globals(), place, fail(full))
        else:
            patch.setattr(checkpoint, place, fail(full))
        for path in (tmp_path / "new", tmp_path / "model"):
            refused(lambda path=path: write(model, path), "disk is full", str(path), "Free some space")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {file.name: file.read_bytes() for file in before.iterdir()} == kept
    load_model(before)


def test_other_write_errors_are_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", fail(SafetensorError("something else")))
    with pytest.raises(SafetensorError, match="something else"):
        write(make_model("gated"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_is_tied_to_the_embedding(tmp_path):
    """By hand: one tensor with two names, which safetensors does not write."""
    model = make_model("gated")
    model.head.weight = model.embedding.weight
    loaded = load_model(write(model, tmp_path / "model"))
    assert torch.equal(loaded.head.weight, model.embedding.weight)
    assert torch.equal(loaded.embedding.weight, model.embedding.weight)
