"""From a conversation to what the engine is asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from starlm.data.conversations import Message as Turn
from starlm.errors import InputError
from starlm.generate.chat import Render, prompt
from starlm.generate.text import TextModel
from starlm.serve.errors import bad_request
from starlm.serve.schemas import Message


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked to continue."""

    tokens: list[int]
    begin: bytes = b""
    """Bytes that the continuation must begin with, which are no part of the answer."""


def text_prompt(text: str, model: TextModel) -> Prompt:
    """A document that begins with `text`."""
    tokens, begin = model.prompt(text)
    return Prompt(tokens=tokens, begin=begin)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """How conversations with a model are written."""

    model: TextModel
    render: Render | None
    """By the checkpoint's template; None: all messages as one text, which the model continues."""

    @property
    def kind(self) -> Literal["template", "plain"]:
        """As /v1/models says it."""
        return "template" if self.render else "plain"

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The prompt whose continuation is the assistant's next message.

        Raises:
            APIError: the template refuses the conversation.
        """
        # OpenAI's newer name of the same role.
        turns = [Turn("system" if m.role == "developer" else m.role, m.text) for m in messages]
        try:
            tokens, begin = prompt(self.model, turns, self.render)
        except InputError as error:
            raise bad_request(f"{error}", "messages") from None
        return Prompt(tokens=tokens, begin=begin)
