"""A small model with random weights, in a folder as training leaves it."""

import torch

from starlm.data.tokenizer import Tokenizer
from starlm.model.checkpoint import write_model
from starlm.model.config import StarLMConfig
from starlm.model.folder import write_manifest
from starlm.model.model import StarLM


def write_model_folder(folder, *, chat=False, **config):
    """`folder`, with a checkpoint of a model of two layers whose answers are noise."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"], 270)
    options = {"depth": 2, "dim": 32, "heads": 8, "vocab_size": tokenizer.vocab_size, **config}
    model = StarLM(StarLMConfig(**options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    # It never ends a document of its own accord, and no special token has text.
    with torch.no_grad():
        model.head.weight.mul_(5)[list(tokenizer.names)] = 0
    write_model(model, folder, bos=tokenizer.bos, chat=chat)
    tokenizer.save(folder)
    write_manifest(folder)
    return folder
