"""Text in, text out.

model = load("runs/demo")
print(model.generate("def "))
"""

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from starlm.data.tokenizer import Tokenizer
from starlm.device import pick_device, pick_dtype
from starlm.errors import InputError
from starlm.generate.engine import Engine
from starlm.generate.request import Piece, Request
from starlm.generate.sampling import Sampling
from starlm.model.checkpoint import load_model
from starlm.model.config import StarLMConfig
from starlm.model.folder import ends, find_checkpoint
from starlm.model.model import StarLM

# transformers and TRL fill vocabularies up to a multiple of at most so many rows.
FILL = 128
# Tokens of a prompt that are read in one call: enough to be efficient, few enough to bound the activations.
CHUNK = 512


class TextModel:
    """A model with its tokenizer."""

    def __init__(
        self, model: StarLM, tokenizer: Tokenizer, *, stop_ids: Collection[int] | None = None
    ) -> None:
        """Args:
            model: in evaluation mode. Rows of its head beyond the tokenizer's tokens are never chosen.
            tokenizer: the one it was trained with.
            stop_ids: tokens that end an answer; default <|bos|>, which ends a document.

        Raises:
            InputError: the tokenizer does not fit: the model has fewer rows, or more than those up to the
                next multiple of a number from 8 to 128.
        """
        known, rows = tokenizer.vocab_size, model.config.vocab_size
        if known != rows and not (known < rows < known + FILL and rows % 8 == 0):
            raise InputError(
                f"The tokenizer has {known} tokens, the model {rows}. Use the tokenizer.json that the model "
                f"was trained with; if it is that one, transformers' resize_token_embeddings({known})."
            )
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = frozenset([tokenizer.bos] if stop_ids is None else stop_ids)
        # A walk through a large vocabulary takes as long as a token, and every answer after a blank asks.
        self._fitting = lru_cache(maxsize=64)(partial(_fitting, tokenizer))
        self._longest = int(tokenizer.byte_lengths().max())

    @property
    def config(self) -> StarLMConfig:
        """The model's config."""
        return self.model.config

    def prompt(self, text: str) -> tuple[list[int], bytes]:
        """Tokens that ask for the continuation of a text, and the bytes that the answer must begin with.

        Blanks at the end of a prompt belong to the next token (" x" is one token), so the model is asked to
        continue from before them with tokens that begin with them; otherwise "def " would be a text such as
        it never saw.
        """
        bare = text.rstrip(" \t")
        return self.tokenizer.encode(bare, bos=True), text[len(bare) :].encode()

    def fitting(self, begin: bytes) -> Bool[Tensor, " V"]:
        """Tokens with which a text that begins with `begin` can begin."""
        return self._fitting(begin[: self._longest])

    def generate(
        self, prompt: str, *, max_tokens: int = 256, stop: str | Sequence[str] = (), **sampling
    ) -> str:
        """The continuation of `prompt`, as `stream` gives it piece by piece."""
        return "".join(self.stream(prompt, max_tokens=max_tokens, stop=stop, **sampling))

    def stream(
        self, prompt: str, *, max_tokens: int = 256, stop: str | Sequence[str] = (), **sampling
    ) -> Iterator[str]:
        """The text of `pieces`: whole characters, as they come."""
        pieces = self.pieces(prompt, max_tokens=max_tokens, stop=stop, **sampling)
        return (piece.text for piece in pieces)

    def pieces(
        self, prompt: str, *, max_tokens: int = 256, stop: str | Sequence[str] = (), **sampling
    ) -> Iterator[Piece]:
        """The continuation of `prompt`, as it comes: text, tokens, and at the end why it ends.

        An `Engine` for this one request, which works while the pieces are asked for.

        Args:
            prompt: text that the model continues; may be empty.
            max_tokens: at most this many new tokens.
            stop: the text ends before this string, or the first of these.
            sampling: fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty, seed ...

        Raises:
            InputError: impossible options, or a prompt whose decode state does not fit into memory.
        """
        if not isinstance(prompt, str):
            raise InputError(
                f"The prompt must be text; got {type(prompt).__name__}. For several, ask one by one."
            )
        tokens, begin = self.prompt(prompt)
        request = Request(
            tokens=tokens,
            max_tokens=max_tokens,
            sampling=Sampling(**sampling),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            begin=begin,
        )
        return Engine(self, slots=1, prefill_chunk=CHUNK, cache_bytes=0).submit(request)


def _fitting(tokenizer: Tokenizer, begin: bytes) -> Tensor:
    pieces = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    return torch.tensor([bool(p) and (p.startswith(begin) or begin.startswith(p)) for p in pieces])


def load(path: str | Path, *, device: str = "auto", dtype: str = "auto") -> TextModel:
    """The model and tokenizer of a run or checkpoint folder; answers end where its configs say, too.

    Args:
        path: run folder (its last checkpoint is taken) or checkpoint folder.
        device: auto, cpu, cuda, or cuda:N.
        dtype: of the weights, and of what is remembered of a text: float32, bfloat16, float16, or auto, as
            they are in the file. With half the bytes large models answer faster and remember twice as much.

    Raises:
        InputError: there is no usable checkpoint.
    """
    folder = find_checkpoint(Path(path))
    model = load_model(folder, device=pick_device(device), dtype=pick_dtype(dtype))
    tokenizer = Tokenizer.load(folder)
    return TextModel(model, tokenizer, stop_ids={tokenizer.bos, *ends(folder)})
