"""From a conversation to a prompt: by the checkpoint's chat template, or as lines of text."""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError
from starlm.serve.errors import bad_request
from starlm.serve.schemas import Message

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked to continue."""

    tokens: list[int]
    begin: bytes = b""
    """Bytes that the continuation must begin with, which are no part of the answer."""
    stop: tuple[str, ...] = ()
    """Where the answer ends, besides where the request says."""


class PlainChat:
    """Turns as lines of text, for models that were trained on no chats.

    A system message stands on top, an empty line below it; then `User: ...` and `Assistant: ...` in turn. The
    answer ends before the next `User:`.
    """

    kind: Literal["plain"] = "plain"

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Args: tokenizer: of the model."""
        self._tokenizer = tokenizer

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The prompt whose continuation is the assistant's next message."""
        lines = [self._line(message) for message in messages]
        tokens = self._tokenizer.encode("".join([*lines, "Assistant:"]), bos=True)
        return Prompt(tokens=tokens, begin=b" ", stop=("\nUser:",))

    def _line(self, message: Message) -> str:
        speaker = {"user": "User: ", "assistant": "Assistant: "}.get(message.role)
        return f"{speaker}{message.text}\n" if speaker else f"{message.text}\n\n"


class TemplateChat:
    """The checkpoint's own template, in Jinja as transformers has it.

    Only the template can name special tokens: what users write stays text, so nobody can speak as another.
    """

    kind: Literal["template"] = "template"

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Args: source: the template. tokenizer: of the model.

        Raises:
            InputError: no Jinja template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InputError(
                f"The chat template is not valid: {error}. Mend {TEMPLATE}, or serve with --chat plain."
            ) from None
        self._tokenizer = tokenizer
        self._special = re.compile("(" + "|".join(map(re.escape, tokenizer.special)) + ")")

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The prompt whose continuation is the assistant's next message.

        Raises:
            APIError: the template refuses the conversation.
        """
        # Marks stand for the users' texts while special tokens are looked for. Nobody can guess them.
        nonce = secrets.token_hex(8)
        marks = {f"text-{nonce}-{number}-": message.text for number, message in enumerate(messages)}
        turns = [{"role": m.role, "content": mark} for m, mark in zip(messages, marks, strict=True)]
        names = dict.fromkeys(("bos_token", "eos_token"), "<|bos|>")
        try:
            rendered = self._template.render(messages=turns, add_generation_prompt=True, **names)
        except TemplateError as error:
            raise bad_request(
                f"The model's chat template does not take this conversation: {error}", "messages"
            ) from None
        except Exception as error:
            raise bad_request(
                f"The model's chat template fails on this conversation ({type(error).__name__}: {error}).",
                "messages",
            ) from None
        tokens: list[int] = []
        # Odd pieces are the special tokens between the others. Text between two of them is encoded in one go,
        # as in training.
        for number, piece in enumerate(self._special.split(rendered)):
            if number % 2:
                tokens.append(self._tokenizer.special[piece])
            else:
                text = re.sub(rf"text-{nonce}-\d+-", lambda found: marks[found[0]], piece)
                tokens += self._tokenizer.encode(text)
        return Prompt(tokens=tokens)


def chat_format(folder: Path, tokenizer: Tokenizer, wanted: str) -> PlainChat | TemplateChat:
    """How conversations with the checkpoint in `folder` are written.

    Args:
        wanted: auto or plain; see `ServeOptions.chat`.
    """
    file = folder / TEMPLATE
    if wanted == "plain" or not file.is_file():
        return PlainChat(tokenizer)
    return TemplateChat(file.read_text(encoding="utf-8"), tokenizer)


def _refuse(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """{% generation %}: marks what the assistant says, for training; nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements in the block."""
        next(parser.stream)
        body: Any = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body
