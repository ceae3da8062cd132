"""starlm generate: continue a prompt."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from starlm.cli.console import Console, piped
from starlm.cli.options import Verb
from starlm.errors import InputError

# Presets differ in how bold the choice of the next token is.
PRESETS = {
    "greedy": {"temperature": 0.0},
    "careful": {"temperature": 0.5, "top_p": 0.9},
    "bold": {"temperature": 1.0, "min_p": 0.05},
}


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Which model, which prompt, and how the next token is chosen."""

    text: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[TEXT]")] = None
    """Text to continue; without it, and without prompt and prompt_file, stdin."""
    model: Path = Path("runs/demo")
    """Run folder (its last checkpoint is taken) or checkpoint folder."""
    prompt: str | None = None
    """The same, for a text that begins with a dash: --prompt=-x."""
    prompt_file: Path | None = None
    """File whose text is continued (UTF-8)."""
    max_tokens: int = 256
    """At most this many new tokens."""
    temperature: float = 0.8
    """0 always takes the likeliest token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability; 1 is off."""
    min_p: float = 0.0
    """Only tokens at least this share of the likeliest one's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that are there already less likely; 1 is off."""
    presence_penalty: float = 0.0
    """Taken from the score of each token that was chosen before; 0 is off."""
    frequency_penalty: float = 0.0
    """Taken from a token's score for each time that it was chosen before; 0 is off."""
    seed: int | None = None
    """Same seed, same text; without it a new one each time."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The text ends before this string; may be given again for further ones."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights and of what is remembered; auto is the checkpoint's. bfloat16 takes half the memory."""

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.text, self.prompt, self.prompt_file)) > 1:
            raise InputError("Give the prompt once: as it is, by --prompt, or by --prompt-file.")


def run(options: GenerateOptions, console: Console) -> dict[str, Any]:
    """Stream the continuation to stdout; on a terminal the prompt stands before it in bold."""
    text = options.prompt if options.text is None else options.text
    prompt = read_prompt(text, options.prompt_file, flags=('starlm generate "def "', "--prompt-file FILE"))
    from starlm.generate.text import load

    model = load(options.model, device=options.device, dtype=options.dtype)
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    names = ("temperature", "top_k", "top_p", "min_p", *penalties, "seed", "stop")
    chosen = {name: getattr(options, name) for name in names}
    out = console.human
    text, tokens = "", 0
    began = time.perf_counter()
    pieces = model.pieces(prompt, max_tokens=options.max_tokens, **chosen)
    if out.isatty():
        out.write(f"\x1b[1m{console.shown(prompt)}\x1b[0m")
    for piece in pieces:
        text, tokens = text + piece.text, tokens + len(piece.tokens)
        out.write(console.shown(piece.text))
        out.flush()
    seconds = time.perf_counter() - began
    out.write("\n")
    return {"text": text, "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def read_prompt(text: str | None, file: Path | None, *, flags: tuple[str, str]) -> str:
    """The text given, or that of the file, or stdin's.

    Args:
        flags: how to give the two, for the message when there is nothing.

    Raises:
        InputError: an unreadable file or stdin, or none of the three.
    """
    if text is not None:
        return text
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"Cannot read the prompt {file}: {error.strerror}. Check the path.") from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"The prompt {file} is not UTF-8 text: at byte {error.start}. Convert it."
            ) from None
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(f"Give a prompt: {flags[0]}, {flags[1]}, or pipe one in.")
    return piped()


ONE_OF = frozenset({"text", "prompt", "prompt_file"})
VERBS = {"generate": Verb(options=GenerateOptions, run=run, presets=PRESETS, one_of=ONE_OF)}
