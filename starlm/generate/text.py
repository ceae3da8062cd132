"""Text in, text out.

model = load("runs/demo")
print(model.generate("def "))
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch

from starlm.data.tokenizer import Tokenizer
from starlm.device import pick_device
from starlm.errors import InputError
from starlm.generate.sampling import Sampling, choose
from starlm.model.checkpoint import find_checkpoint, load_model
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.model.state import DecodeState

# Tokens of a prompt that are read in one call: enough to be efficient, few enough to bound the activations.
CHUNK = 512


class TextModel:
    """A model with its tokenizer."""

    def __init__(self, model: StarLM, tokenizer: Tokenizer) -> None:
        """Args: model: in evaluation mode. tokenizer: the one it was trained with."""
        if tokenizer.vocab_size != model.config.vocab_size:
            raise InputError(
                f"The tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}. Use "
                f"the tokenizer.json that the model was trained with."
            )
        self.model, self.tokenizer = model, tokenizer

    @property
    def config(self) -> StarLMConfig:
        """The model's config."""
        return self.model.config

    def generate(
        self, prompt: str, *, max_tokens: int = 256, stop: str | Sequence[str] = (), **sampling
    ) -> str:
        """The continuation of `prompt`, as `stream` gives it piece by piece."""
        return "".join(self.stream(prompt, max_tokens=max_tokens, stop=stop, **sampling))

    def stream(
        self, prompt: str, *, max_tokens: int = 256, stop: str | Sequence[str] = (), **sampling
    ) -> Iterator[str]:
        """The continuation of `prompt`, in pieces of whole characters, as they come.

        Blanks at the end of a prompt belong to the next token (" x" is one token), so the model is asked to
        continue from before them with tokens that begin with them; otherwise "def " would be a text such as
        it never saw.

        Args:
            prompt: text that the model continues; may be empty.
            max_tokens: at most this many new tokens.
            stop: the text ends before this string, or the first of these.
            sampling: fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty, seed.

        Raises:
            InputError: impossible options, or a prompt whose decode state does not fit into memory.
        """
        options = Sampling(**sampling)
        if max_tokens < 0:
            raise InputError(f"max_tokens must be 0 or more; got {max_tokens}.")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stop):
            raise InputError("stop must not contain an empty string.")
        bare = prompt.rstrip(" \t")
        tokens = [self.tokenizer.bos, *self.tokenizer.encode(bare)]
        self._check_memory(len(tokens) + max_tokens)
        return self._pieces(tokens, prompt[len(bare) :], max_tokens, stop, options)

    def _pieces(
        self, tokens: list[int], blanks: str, max_tokens: int, stop: tuple[str, ...], sampling: Sampling
    ) -> Iterator[str]:
        text, held, given = self.tokenizer.stream(), "", len(blanks)
        for token in self.tokens(tokens, max_tokens, sampling, begin=blanks.encode()):
            new = text.push(token)
            held += new[given:]
            given = max(given - len(new), 0)
            found = min((at for at in (held.find(s) for s in stop) if at >= 0), default=-1)
            if found >= 0:
                yield held[:found]
                return
            # Hold back what may turn out to be the beginning of a stop string.
            keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        yield held + text.flush()

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], state: DecodeState) -> torch.Tensor:
        """Append tokens to the one-slot state, in chunks; the logits [V] after the last of them."""
        logits = None
        for begin in range(0, len(tokens), CHUNK):
            piece = torch.tensor([tokens[begin : begin + CHUNK]], device=self.model.head.weight.device)
            logits = self.model(piece, state=state, last_only=True)
        assert logits is not None
        return logits[0, -1]

    def tokens(
        self, tokens: Sequence[int], max_tokens: int, sampling: Sampling, *, begin: bytes = b""
    ) -> Iterator[int]:
        """New token ids that continue `tokens`, until the document ends or `max_tokens` are there.

        Args:
            begin: bytes that the new text must begin with.
        """
        history = list(tokens)
        if not max_tokens:
            return
        generator = sampling.generator()
        state = self.model.new_state(rollback=0)
        logits = self.read(history, state)
        for count in range(max_tokens):
            if begin:
                logits = logits.masked_fill(~self._fits(begin).to(logits.device), -torch.inf)
            seen = torch.tensor(history, device=logits.device) if sampling.repetition_penalty != 1 else None
            token = choose(logits, sampling, generator, seen)
            if token == self.tokenizer.bos:
                return
            yield token
            begin = begin[len(self.tokenizer.token_bytes(token)) :]
            history.append(token)
            if count + 1 < max_tokens:
                logits = self.read([token], state)

    def _fits(self, begin: bytes) -> torch.Tensor:
        """Tokens with which a text that begins with `begin` can begin: bool [V]."""
        pieces = map(self.tokenizer.token_bytes, range(self.tokenizer.vocab_size))
        return torch.tensor([bool(p) and (p.startswith(begin) or begin.startswith(p)) for p in pieces])

    def _check_memory(self, num_tokens: int) -> None:
        # The buffers double when they are full, old and new together for a moment: three times the rows.
        needed = 3 * self.model.state_bytes(num_tokens)
        free = psutil.virtual_memory().available
        if needed > free:
            raise InputError(
                f"The prompt and the answer ({num_tokens} tokens) need about {needed / 2**20:.0f} MiB of "
                f"decode state, and {free / 2**20:.0f} MiB of memory are free. Shorten the prompt, ask for "
                f"fewer tokens, or use a model with a smaller max_shift, whose memory is constant."
            )


def load(path: str | Path, *, device: str = "auto") -> TextModel:
    """The model and tokenizer of a run or checkpoint folder.

    Args:
        path: run folder (its last checkpoint is taken) or checkpoint folder.
        device: auto, cpu, cuda, or cuda:N.

    Raises:
        InputError: there is no usable checkpoint.
    """
    folder = find_checkpoint(Path(path))
    return TextModel(load_model(folder, device=pick_device(device)), Tokenizer.load(folder))
