"""A path means a checkpoint, and what the model in it is can be read without torch."""

import json
import subprocess
import sys

import pytest
from models import make_model

from starlm.errors import InputError
from starlm.files import whole_folder
from starlm.model.checkpoint import write_model
from starlm.model.folder import find_checkpoint, read_model_config, step_of, steps


def write(path, **settings):
    with whole_folder(path) as folder:
        write_model(make_model("gated", **settings), folder)
    return path


def test_no_model_there(tmp_path):
    file = tmp_path / "file.bin"
    file.write_bytes(b"x")
    for path, words in (
        (tmp_path / "none", "There is no model at .*Give a run folder"),
        (tmp_path, "holds no checkpoint: .*starlm train"),
        (file, "holds no checkpoint"),
    ):
        with pytest.raises(InputError, match=words) as error:
            find_checkpoint(path)
        assert str(path) in str(error.value)


def test_the_last_checkpoint_stands_for_the_run(tmp_path):
    for step in (5, 100, 20):
        write(tmp_path / f"checkpoints/step-{step:06d}", depth=1)
    # Neither leftovers nor strangers count.
    (tmp_path / "checkpoints/.step-000900.partial-1").mkdir()
    (tmp_path / "checkpoints/step-final").mkdir()
    assert find_checkpoint(tmp_path).name == "step-000100"
    assert [step_of(path) for path in steps(tmp_path)] == [5, 20, 100]
    assert read_model_config(find_checkpoint(tmp_path)).depth == 1


def test_the_config_comes_back_and_keys_of_transformers_are_passed_over(tmp_path):
    folder, config = write(tmp_path / "m", max_shift=7), make_model("gated", max_shift=7).config
    assert read_model_config(folder) == config
    file = folder / "config.json"
    written = json.loads(file.read_text()) | {"use_cache": True}
    file.write_text(json.dumps(written))
    with pytest.raises(InputError, match=r"Unknown key 'use_cache' in .*config\.json"):
        read_model_config(folder)
    file.write_text(json.dumps(written | {"transformers_version": "5.0.0"}))
    assert read_model_config(folder) == config
    file.write_text(json.dumps(written | {"tie_word_embeddings": True}))
    with pytest.raises(InputError, match="tie_word_embeddings"):
        read_model_config(folder)


def test_no_torch():
    code = "import sys, starlm.model.folder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
