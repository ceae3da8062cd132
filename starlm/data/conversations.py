"""Conversations: messages, and the tokens that a model learns to hold them by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from starlm.errors import InputError

if TYPE_CHECKING:
    from starlm.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
# As ShareGPT has them, under "from".
_SENDERS = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str


def check_messages(values: Any) -> list[Message]:
    """Messages from what JSON gave: objects with "role" and "content", or, as ShareGPT, "from" and "value".

    Raises:
        InputError: anything but, perhaps, one of system, and then user and assistant in turn.
    """
    if not isinstance(values, list):
        raise InputError('it needs "messages", a list of objects with "role" and "content".')
    messages: list[Message] = []
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise InputError(
                f'message {number} must be an object with "role" and "content"; got {value!r:.80}.'
            )
        role, content = value.get("role"), value.get("content")
        if role is None and isinstance(value.get("from"), str):
            role, content = _SENDERS.get(value["from"], value["from"]), value.get("value")
        if role not in ROLES:
            raise InputError(f"message {number} needs a role of {', '.join(ROLES)}; got {role!r:.80}.")
        if not isinstance(content, str):
            raise InputError(f"message {number} needs a text as content; got {content!r:.80}.")
        if value.get("tool_calls") or value.get("function_call") or value.get("weight") == 0:
            raise InputError(
                f"message {number} calls a tool, or is not to be learned (weight 0), which is not supported."
            )
        expected = "assistant" if messages and messages[-1].role == "user" else "user"
        if role != expected and not (role == "system" and number == 1):
            raise InputError(f"message {number} must be of the {expected}, and is of the {role}.")
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
