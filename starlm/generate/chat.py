"""Conversations: messages, how they become the tokens that a model continues, and the next answer.

A checkpoint's chat_template.jinja, or tokenizer_config.json, says how conversations are written. A model that
was trained on none, as its config.json says by `"chat": false`, only continues text: there the messages are
one text.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError
from starlm.files import write_whole
from starlm.generate.engine import Engine
from starlm.generate.request import Request, Stream
from starlm.generate.sampling import Sampling
from starlm.generate.text import TextModel
from starlm.model.folder import CONFIG, read_json

TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
ROLES = ("system", "user", "assistant")
# Tokens that end an answer besides <|bos|>.
ENDS = ("<|assistant_end|>", "<|user_start|>")

# In place of what a message says.
_LETTER, _VEIL = re.compile(r"\S"), "\uf8ff"

Style = Literal["auto", "template", "plain"]
Render = Callable[[Sequence["Message"]], list[int]]


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str


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


def _marks(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names of the first and the last token, as a tokenizer's settings say; a name may be in an object."""
    found = {}
    for key in ("bos_token", "eos_token"):
        value = settings.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str):
            found[key] = name
    return found


def by_template(
    source: str, tokenizer: Tokenizer, *, bos_token: str = "<|bos|>", eos_token: str = "<|bos|>"
) -> Render:
    """A function from messages to tokens, by a chat template as transformers has them.

    The template runs in a sandbox. Special tokens come from it alone: a message in which one is spelt out
    holds these characters, so nobody can speak in another's name. What others have added to a vocabulary as
    ordinary tokens, and the template writes, only the assistant's messages may hold; nor may a message make a
    token with what the template writes around it.

    Args:
        source: Jinja; gets `messages`, `bos_token`, `eos_token`, `add_generation_prompt`.

    Raises:
        InputError: not Jinja; and from the function, messages that the template refuses or fails on, or
            whose signs of which special tokens are made, bars for ours, it does more with than to write them,
            or who would speak by a token of its own.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _to_json
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise InputError(
            f"The chat template is not valid Jinja: {error}. Mend it, or take --conversation plain."
        ) from None
    own = "".join([source, bos_token, eos_token])
    # What is a word like others no text can be kept from spelling.
    special = {name: number for name, number in tokenizer.special.items() if _sign(name)}
    for name in tokenizer.special.keys() - special.keys():
        if name in own:
            raise InputError(
                f"The special token {name!r} is a word like others, so every text can spell it. Take "
                f"--conversation plain."
            )
    names = _one_of(special)
    signs = sorted({_sign(name) for name in special})

    def write(messages: Sequence[Message]) -> str:
        turns = [asdict(message) for message in messages]
        try:
            return template.render(
                messages=turns, bos_token=bos_token, eos_token=eos_token, add_generation_prompt=True
            )
        except Exception as error:  # What a template does can fail in any way.
            raise InputError(
                f"The model's chat template does not take this conversation: {f'{error}'.rstrip('.')}. "
                f"Change the messages; who runs the model may take --conversation plain."
            ) from None

    def veil(messages: Sequence[Message]) -> str:
        """What the template writes where only the assistant has said anything that can be read."""
        return write(
            [m if m.role == "assistant" else Message(m.role, _LETTER.sub(_VEIL, m.content)) for m in messages]
        )

    # Ordinary tokens are words like others, but for those with which the template itself speaks.
    signed = [name for name in tokenizer.ordinary if _sign(name)]
    frames = [own]
    for roles in (ROLES, ROLES[1:]) if signed else ():
        with suppress(InputError):  # A template may know no system.
            frames.append(write([Message(role, _VEIL) for role in (*roles, "user")]))
    controls = {name for name in signed if any(name in frame for frame in frames)}

    def render(messages: Sequence[Message]) -> list[int]:
        # Every special token has a sign. Those of messages are other characters while the template runs, for
        # private use, which it can trim, split or turn into capitals as it would a bar.
        known = set(source).union(_VEIL, *(message.content for message in messages))
        free = (char for char in map(chr, range(0xE000, 0xF900)) if char not in known)
        hidden = {ord(sign): next(free, "\ue000") for sign in signs}
        shown = {ord(char): chr(sign) for sign, char in hidden.items()}
        unsigned = [Message(m.role, m.content.translate(hidden)) for m in messages]
        written, plain = write(unsigned), write(messages)
        if written.translate(shown) != plain:
            told = " and ".join(signs)
            raise InputError(
                f"The model's chat template does not only write the {told} of a message, so it might be "
                f"taken for part of a special token. Leave out {told}; who runs the model may take "
                f"--conversation plain."
            )
        # A message may yet spell a token with what stands around it; and alone, one that is not special.
        checks = [(names, written, veil(unsigned))]
        if signed:
            frame = veil(messages)
            checks.append((_one_of([n for n in signed if n in controls or n in frame]), plain, frame))
        for wanted, text, frame in checks:
            found, meant = Counter(wanted.findall(text)), Counter(wanted.findall(frame))
            for name in found - meant:
                raise InputError(
                    f"A message holds {name}, or makes it with what the model's chat template writes around "
                    f"it, and would be taken for the template. Leave it out."
                )
        tokens: list[int] = []
        # What stands between two special tokens is encoded in one go, as in training.
        for piece in names.split(written):
            if piece in special:
                tokens.append(special[piece])
            else:
                tokens += tokenizer.encode(piece.translate(shown))
        return tokens

    return render


def _one_of(names: Collection[str]) -> re.Pattern[str]:
    """Any of these, the longest first; of none, nothing."""
    return re.compile(
        "(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")" if names else r"(?!)"
    )


def _sign(name: str) -> str:
    """A character without which a text cannot name this special token; none if it is letters alone."""
    signs = (char for char in name if not char.isalnum() and not char.isspace())
    return "|" if "|" in name else next(signs, "")


class _Generation(Extension):
    """{% generation %}: what the assistant says, marked for training; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements within."""
        next(parser.stream)
        inner: Any = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return inner


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """As transformers has it; Jinja's own is for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


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
