"""Small models of every kind, as StarLM and as transformers has them."""

from models import BOUNDED, KINDS, make_model

from starlm.data.tokenizer import Tokenizer
from starlm.files import whole_folder
from starlm.hf import StarLMForCausalLM, StarLMHFConfig
from starlm.model.checkpoint import write_model
from starlm.model.folder import write_manifest
from starlm.settings import to_dict

ALL = {**KINDS, **BOUNDED}
# One of each sort of decode state: unbounded and bounded rows, anchors and boxes, attention, windows.
FEW = ("gated", "gated, bounded", "star", "star, bounded", "star mixed", "mixed product")
TEXT = "def f(x):\n    return x\n\n\nfor name in names:\n    print(name, f(name))\n"


def make_pair(kind, **options):
    """The model of a kind and a transformers model with the same weights, both in evaluation mode."""
    model = make_model(kind, **options).eval()
    wrapper = StarLMForCausalLM(StarLMHFConfig(**to_dict(model.config))).to(model.head.weight.dtype).eval()
    wrapper.load_state_dict(model.state_dict())
    return model, wrapper


def make_tokenizer():
    return Tokenizer.train([TEXT] * 3, 280)


def write_checkpoint(model, path, tokenizer=None):
    """What training writes, as far as transformers reads it."""
    tokenizer = tokenizer or make_tokenizer()
    with whole_folder(path) as folder:
        write_model(model, folder, bos=tokenizer.bos, end_of_turn=tokenizer.end_of_turn, pad=tokenizer.pad)
        tokenizer.save_pretrained(folder)
        write_manifest(folder)
    return path
