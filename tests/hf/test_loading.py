"""Checkpoints go both ways between StarLM and transformers, and no weight is made up."""

import json
import subprocess
import sys

import pytest
import torch
from models import make_model, make_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from wrapped import ALL, make_pair, make_tokenizer, write_checkpoint

from starlm.errors import InputError
from starlm.generate.text import load
from starlm.hf import StarLMForCausalLM, StarLMHFConfig, StarLMModel
from starlm.model import checkpoint
from starlm.model.checkpoint import load_model
from starlm.model.config import StarLMConfig
from starlm.settings import to_dict


def states_equal(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name]), name
    return True


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(tmp_path, kind, dtype):
    model = make_model(kind, dtype=dtype)
    wrapper = AutoModelForCausalLM.from_pretrained(write_checkpoint(model, tmp_path / "a"))
    assert isinstance(wrapper, StarLMForCausalLM)
    assert not wrapper.training
    assert wrapper.config.shape == model.config
    assert states_equal(wrapper.state_dict(), model.state_dict())
    wrapper.save_pretrained(tmp_path / "b")
    assert load_file(tmp_path / "b/model.safetensors").keys() == model.state_dict().keys()
    again = load_model(tmp_path / "b")
    assert again.config == model.config
    assert states_equal(again.state_dict(), model.state_dict())
    tokens = make_tokens(2, 9)
    assert torch.equal(again(tokens), wrapper(tokens).logits)


def test_saving_over_a_checkpoint_leaves_one_that_loads(tmp_path):
    folder = write_checkpoint(make_model("star", dtype=torch.float32), tmp_path / "m")
    wrapper = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        wrapper.head.weight.fill_(1)
    wrapper.save_pretrained(folder)
    assert torch.equal(load_model(folder).head.weight, wrapper.head.weight)


def test_ways_to_load(tmp_path):
    model = make_model("star mixed", dtype=torch.float32)
    folder = write_checkpoint(model, tmp_path / "m")
    wanted = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    for options in ({"dtype": torch.bfloat16}, {"dtype": "bfloat16", "device_map": "cpu"}):
        assert states_equal(AutoModelForCausalLM.from_pretrained(folder, **options).state_dict(), wanted)
    headless = AutoModel.from_pretrained(folder)
    assert isinstance(headless, StarLMModel)
    assert not isinstance(headless, StarLMForCausalLM)
    tokens = make_tokens(1, 9)
    assert torch.equal(headless(tokens).last_hidden_state, model.hidden(tokens))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.eval()(tokens).logits, model(tokens))


def test_shards(tmp_path):
    model, wrapper = make_pair("star", dtype=torch.float32)
    wrapper.save_pretrained(tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert states_equal(load_model(tmp_path).state_dict(), model.state_dict())
    assert states_equal(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(InputError, match="does not list the weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("options", [{}, {"shift_init": 3.0, "preset": "gated"}])
def test_what_a_file_lacks_starts_by_the_recipe_and_nothing_else_changes(tmp_path, options):
    """All memory is NaN at first here: a weight that nobody started would show."""
    model = make_model("star", dtype=torch.float32, **options)
    folder = write_checkpoint(model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    lost = {"head.weight", "embedding.weight", "blocks.1.mixer.shift.weight", "blocks.0.mixer.out.weight"}
    save_file(
        {n: t for n, t in tensors.items() if n not in lost}, folder / "model.safetensors", {"format": "pt"}
    )
    wrapper, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == lost
    state = wrapper.state_dict()
    for name, tensor in tensors.items():
        if name not in lost:
            assert torch.equal(state[name], tensor), name
    assert not state["head.weight"].any()
    assert not state["blocks.0.mixer.out.weight"].any()
    assert state["embedding.weight"].std().item() == pytest.approx(1, rel=0.2)
    assert state["blocks.1.mixer.shift.weight"].isfinite().all()


def in_a_new_process(code, *words, path=None):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120, cwd=path
    )
    return done.returncode, done.stdout, done.stderr


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, copy = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "starlm.hf" in sys.modules
print(type(model).__module__, float(model(torch.tensor([[1, 2, 3]])).logits.double().sum()))
tokenizer = AutoTokenizer.from_pretrained(folder)
model.save_pretrained(copy)
tokenizer.save_pretrained(copy)
"""


@pytest.mark.slow
def test_remote_code_is_the_installed_package(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    tokenizer = make_tokenizer()
    model = make_model("star", dtype=torch.float32, vocab_size=tokenizer.vocab_size)
    folder = write_checkpoint(model, tmp_path / "m", tokenizer)
    code, out, err = in_a_new_process(REMOTE, folder, tmp_path / "copy")
    assert code == 0, err
    module, total = out.split()
    assert module == "starlm.hf.model"
    assert float(total) == pytest.approx(model(torch.tensor([[1, 2, 3]])).double().sum().item(), rel=1e-5)
    # What transformers saves is again a checkpoint of ours, with no source in it but the few lines.
    assert {file.name for file in (tmp_path / "copy").glob("*.py")} == {"modeling_starlm.py"}
    for name in ("config.json", "modeling_starlm.py"):
        assert "modeling_starlm" in (tmp_path / "copy" / name).read_text() or name.endswith("py")
    assert json.loads((tmp_path / "copy/config.json").read_text())["auto_map"] == checkpoint.AUTO_MAP
    again = load(tmp_path / "copy", device="cpu")
    assert states_equal(again.model.state_dict(), model.state_dict())
    assert again.tokenizer.fingerprint == tokenizer.fingerprint


def test_without_the_package_the_error_names_the_cure(tmp_path):
    (tmp_path / "modeling_starlm.py").write_text(checkpoint.REMOTE_CODE)
    blocked = "import sys; sys.modules['starlm'] = None; sys.path.insert(0, '.'); import modeling_starlm"
    code, _, err = in_a_new_process(blocked, path=tmp_path)
    assert code == 1
    assert "Its code is the Python package starlm" in err.splitlines()[-1]
    assert "pip install" in err.splitlines()[-1]


def test_the_config_is_that_of_starlm():
    config = StarLMHFConfig()
    assert {name: getattr(config, name) for name in to_dict(StarLMConfig())} == to_dict(StarLMConfig())
    assert config.num_hidden_layers == 4
    assert config.max_position_embeddings == 512
    assert config.hidden_size == 256
    assert config.num_attention_heads == StarLMConfig().num_heads
    config = StarLMHFConfig(num_hidden_layers=3, kinds=("now", "box"), bos_token_id=7)
    assert (config.depth, config.kinds, config.bos_token_id) == (3, ["now", "box"], 7)
    assert config.shape == StarLMConfig(depth=3, kinds=("now", "box"))
    config = StarLMHFConfig(hidden_size=64, num_attention_heads=2, final_logit_softcapping=None)
    assert config.shape == StarLMConfig(dim=64, heads=2, softcap=0)
    config.hidden_size, config.num_attention_heads = 96, 3
    assert config.shape == StarLMConfig(dim=96, heads=3, softcap=0)
    with pytest.raises(InputError, match=r"model\.heads must divide the width; got 7"):
        StarLMHFConfig(heads=7)
    with pytest.raises(InputError, match="preset in the config must be one of"):
        StarLMHFConfig(preset="moon")


def test_derived_names_are_told_and_follow_the_fields(tmp_path):
    StarLMHFConfig(depth=2).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
    assert [written[name] for name in names] == [128, 8, 2, 512]
    assert StarLMHFConfig.from_pretrained(tmp_path).shape == StarLMConfig(depth=2)
    assert StarLMHFConfig.from_pretrained(tmp_path, depth=3).hidden_size == 192
    assert StarLMHFConfig.from_pretrained(tmp_path, hidden_size=64).shape == StarLMConfig(depth=2, dim=64)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_hidden_layers", 5, "num_hidden_layers 5, but depth 2"),
        ("max_position_embeddings", 64, "max_position_embeddings 64, but context 512"),
        ("hidden_size", 256, "hidden_size 256, but dim 0, which means 128"),
        ("num_attention_heads", 2, "num_attention_heads 2, but heads 0, which means 8"),
    ],
)
def test_names_that_contradict_the_fields_are_refused(tmp_path, name, value, words):
    """As in a config that somebody has edited; which of the two was meant nobody knows."""
    known = StarLMHFConfig(depth=2).to_dict()
    assert StarLMHFConfig(**known).shape == StarLMConfig(depth=2)
    with pytest.raises(InputError, match=rf"{words}.*Give one of the two alone"):
        StarLMHFConfig(**{**known, name: value})
    (tmp_path / "config.json").write_text(json.dumps({**known, name: value}))
    with pytest.raises(InputError, match=words):
        StarLMHFConfig.from_pretrained(tmp_path)


def test_tied_embeddings_are_refused(tmp_path):
    with pytest.raises(InputError, match="tie_word_embeddings"):
        StarLMHFConfig(tie_word_embeddings=True)
    _, wrapper = make_pair("gated", dtype=torch.float32)
    wrapper.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(InputError, match="tie_word_embeddings"):
        load_model(tmp_path)


def test_keys_of_transformers_and_of_others_are_passed_over(tmp_path):
    """Values other than the defaults, because transformers leaves those out."""
    model, wrapper = make_pair("gated", dtype=torch.float32)
    wrapper.config.update(
        {
            "tie_word_embeddings": False,
            "sep_token_id": 3,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "is_decoder": True,
            "torch_dtype": "float32",
        }
    )
    wrapper.config.update(
        {"use_cache": False, "num_labels": 3, "problem_type": "regression", "return_dict": False}
    )
    wrapper.config.loss_type = "ForCausalLM"
    wrapper.save_pretrained(tmp_path)
    assert states_equal(load_model(tmp_path).state_dict(), model.state_dict())
