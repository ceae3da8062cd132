"""Conversations: messages, and the tokens that a model learns to hold them by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from starlm.errors import InputError

if TYPE_CHECKING:
    from starlm.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str


def check_messages(values: Any) -> list[Message]:
    """Messages from what JSON gave.

    Raises:
        InputError: anything but, perhaps, one of system, and then user and assistant in turn.
    """
    if not isinstance(values, list):
        raise InputError('it needs "messages", a list of objects with "role" and "content".')
    messages: list[Message] = []
    for number, value in enumerate(values, 1):
        role, content = (
            (value.get(key) for key in ("role", "content")) if isinstance(value, dict) else (None,) * 2
        )
        if role not in ROLES or not isinstance(content, str):
            raise InputError(
                f'message {number} needs a "role" of {", ".join(ROLES)} and a text as "content"; got '
                f"{str(value)[:80]!r}."
            )
        expected = "assistant" if messages and messages[-1].role == "user" else "user"
        if role != expected and not (role == "system" and number == 1):
            raise InputError(f"message {number} must be one of {expected}; got one of {role}.")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"message {number} has half of a surrogate pair, which is no character."
            ) from None
        messages.append(Message(role, content))
    return messages


def encode(
    conversations: Sequence[Sequence[Message]], tokenizer: "Tokenizer"
) -> list[tuple[list[int], list[bool]]]:
    """What a model learns of each conversation: what the chat template of our checkpoints writes.

    Args:
        conversations: as `check_messages` has them.

    Returns:
        For each its token ids, without <|bos|>, and which of them the model learns to predict: those that
        the assistant says, and those by which it ends. The others it reads.
    """
    turns = [list(_turns(messages)) for messages in conversations]
    texts = iter(tokenizer.encode_batch([text for turn in turns for _, text, _ in turn]))
    found = []
    for conversation in turns:
        ids: list[int] = []
        learned: list[bool] = []
        for (begin, _, end), text in zip(conversation, texts, strict=False):
            ids += [tokenizer.special[begin], *text, tokenizer.special[end]]
            spoken = begin == "<|assistant_start|>"
            learned += [False, *[spoken] * (len(text) + 1)]
        found.append((ids, learned))
    return found


def _turns(messages: Sequence[Message]) -> Iterator[tuple[str, str, str]]:
    """The special token that a turn begins with, its text, and the one that it ends with."""
    opening = ""
    for message in messages:
        if message.role == "system":
            opening = f"{message.content}\n\n"
            continue
        yield f"<|{message.role}_start|>", opening + message.content, f"<|{message.role}_end|>"
        opening = ""
