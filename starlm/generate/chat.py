"""Conversations: messages, how they become the tokens that a model continues, and the next answer.

A checkpoint's chat_template.jinja, or tokenizer_config.json, says how conversations are written. A model that
was trained on none, as its config.json says by `"chat": false`, only continues text: there the messages are
one text.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from starlm.data.conversations import Message, check_messages
from starlm.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from starlm.errors import InputError
from starlm.files import write_whole
from starlm.generate.engine import Engine
from starlm.generate.request import Request, Stream
from starlm.generate.sampling import Sampling
from starlm.generate.template import by_template
from starlm.generate.text import TextModel
from starlm.model.folder import CONFIG, read_json

TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
# Tokens that end an answer besides <|bos|>.
ENDS = ("<|assistant_end|>", "<|user_start|>")

Style = Literal["auto", "template", "plain"]
Render = Callable[[Sequence[Message]], list[int]]


def speaker(model: TextModel) -> TextModel:
    """The model, whose answers also end with the assistant's turn; one that knows no turns never says so."""
    ends = {model.tokenizer.special[name] for name in ENDS}
    return TextModel(model.model, model.tokenizer, stop_ids=model.stop_ids | ends)


def prompt(model: TextModel, messages: Sequence[Message], render: Render | None) -> tuple[list[int], bytes]:
    """Tokens that ask for the assistant's next message, and the bytes that the continuation begins with.

    Args:
        messages: up to one of the user.
        render: the tokens after which the assistant speaks; None continues `as_text` of the messages.

    Raises:
        InputError: the template refuses the messages.
    """
    return model.prompt(as_text(messages)) if render is None else (render(messages), b"")


def answer(
    engine: Engine,
    messages: Sequence[Message],
    *,
    render: Render | None,
    max_tokens: int,
    sampling: Sampling,
) -> Stream:
    """The next message of the assistant, in pieces as they come; who stops listening cancels it.

    Args:
        engine: of a `speaker`; reads only what its prefix cache does not hold of the conversation.
        messages, render: see `prompt`.

    Raises:
        InputError: the template refuses the messages, or the decode state does not fit into memory.
    """
    tokens, begin = prompt(engine.model, messages, render)
    return engine.submit(Request(tokens=tokens, max_tokens=max_tokens, sampling=sampling, begin=begin))


def as_text(messages: Sequence[Message]) -> str:
    """All messages as one text; after an answer, and a system message, the next begins on a new line."""
    text = ""
    for message in messages:
        if message.role == "user" and text and not text.endswith("\n"):
            text += "\n"
        text += message.content
    return text


def renderer(folder: Path, tokenizer: Tokenizer, style: Style = "auto") -> Render | None:
    """How conversations with the checkpoint in `folder` are written: by its template, or None, as one text.

    Args:
        style: template or plain; auto is the template, if there is one and the model has learned it.

    Raises:
        InputError: a template that cannot be read, is none, or is missing where `style` asks for it.
    """
    if style == "plain":
        return None
    config, settings = (
        read_json(folder / name) if (folder / name).exists() else {} for name in (CONFIG, SETTINGS)
    )
    learned = config.get("chat")
    if style == "auto" and learned is False:
        return None
    file = folder / TEMPLATE
    try:
        if file.exists():
            source = file.read_text(encoding="utf-8")
        else:
            file, source = folder / SETTINGS, settings.get("chat_template")
            if isinstance(source, list):  # as transformers once wrote several, each with a name
                named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
                source = named.get("default")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {file}: {error}. Copy the checkpoint again.") from None
    if not isinstance(source, str):
        if style == "auto" and not learned:
            return None
        raise InputError(
            f"{folder} has no chat template: neither {TEMPLATE} nor chat_template in {SETTINGS}. Copy it "
            f"from where the model was trained, or take --conversation plain."
        )
    try:
        return by_template(source, tokenizer, **_marks(settings))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def own_template(tokenizer: Tokenizer) -> Render:
    """How the chat template that our checkpoints are written with has conversations."""
    return by_template(CHAT_TEMPLATE.read_text(encoding="utf-8"), tokenizer)


def _marks(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names of the first and the last token, as a tokenizer's settings say; a name may be in an object."""
    found = {}
    for key in ("bos_token", "eos_token"):
        value = settings.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str):
            found[key] = name
    return found


def read_conversation(path: Path) -> list[Message]:
    """The messages in a JSON file.

    Raises:
        InputError: no such file, or not a conversation.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read the conversation {path}: {error.strerror}. Check the path.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not a conversation: it is not JSON ({error}). Give a file that starlm chat has saved."
        ) from None
    try:
        return check_messages(value.get("messages") if isinstance(value, dict) else value)
    except InputError as error:
        raise InputError(f"{path} is not a conversation: {error}") from None


def write_conversation(path: Path, messages: Sequence[Message]) -> None:
    """Write the messages as JSON, whole or not at all.

    Raises:
        StarLMError: the disk is full.
        InputError: the place is not writable.
    """
    value = {"messages": [asdict(message) for message in messages]}
    write_whole(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())
