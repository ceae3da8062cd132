"""Conversations as tokens, by a chat template of a checkpoint, in which nobody speaks in another's name."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from starlm.data.conversations import ROLES, Message
from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError

# In place of what a message says.
_LETTER, _VEIL = re.compile(r"\S"), "\uf8ff"
Signs = Mapping[int, str]
"""For characters that stand in place of others, by number, these others."""


def by_template(
    source: str, tokenizer: Tokenizer, *, bos_token: str = "<|bos|>", eos_token: str = "<|bos|>"
) -> "ChatTemplate":
    """A function from messages to tokens, by a chat template as transformers has them.

    The template runs in a sandbox. Special tokens come from it alone: a message in which one is spelt out
    holds these characters, so nobody can speak in another's name. What others have added to a vocabulary as
    ordinary tokens, and the template writes, a message may not hold; nor may it make a token with what the
    template writes around it. The assistant's messages may.

    Args:
        source: Jinja; gets `messages`, `bos_token`, `eos_token`, `add_generation_prompt`.

    Raises:
        InputError: not Jinja; and from the function, messages that the template refuses or fails on, or
            whose signs of which special tokens are made, bars for ours, it does more with than to write them,
            or who would speak by a token of its own.
    """
    return ChatTemplate(source, tokenizer, {"bos_token": bos_token, "eos_token": eos_token})


class ChatTemplate:
    """See `by_template`."""

    def __init__(self, source: str, tokenizer: Tokenizer, marks: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
            literals = {node.value for node in environment.parse(source).find_all(nodes.Const)}
        except Exception as error:  # What Python says of a template that is too deep, too.
            raise InputError(
                f"The chat template is not valid Jinja: {error}. Mend it, or take --conversation plain."
            ) from None
        self._source, self._tokenizer, self._marks = source, tokenizer, marks
        # What is a word like others no text can be kept from spelling.
        self._special = {name: number for name, number in tokenizer.special.items() if _sign(name)}
        for name in tokenizer.special.keys() - self._special.keys():
            if any(name in own for own in (source, *marks.values())):
                raise InputError(
                    f"The special token {name!r} is a word like others, so every text can spell it. Take "
                    f"--conversation plain."
                )
        self._names = re.compile(
            "(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")"
        )
        self._signs = sorted({_sign(name) for name in self._special})
        # What a template can ask for in a message, to be kept where the rest is veiled.
        asked = sorted((re.escape(t) for t in literals if isinstance(t, str) and t.strip()), key=len)
        self._unasked = re.compile("|".join([*(f"({text})" for text in reversed(asked)), r"\S"]))
        # Ordinary tokens are words like others, but for those with which the template itself speaks.
        self._ordinary = {n: name for name, n in tokenizer.ordinary.items() if not name.isspace()}
        longest = sorted(self._ordinary.values(), key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._speaks: set[int] = set()
        for roles in (ROLES, ROLES[1:]) if self._ordinary else ():
            with suppress(InputError):  # A template may know no system.
                frame = self._write([Message(role, _VEIL) for role in (*roles, "user")])
                self._speaks |= self._ordinary.keys() & self._encode(frame, {})

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which the assistant speaks."""
        # Every special token has a sign. Those of messages are other characters while the template runs, for
        # private use, which it can trim, split or turn into capitals as it would a bar.
        known = set(self._source).union(_VEIL, *self._tokenizer.special, *self._marks.values())
        known.update(*(message.content for message in messages))
        free = (char for char in map(chr, range(0xE000, 0xF900)) if char not in known)
        hidden = {ord(sign): next(free, "\ue000") for sign in self._signs}
        shown: Signs = {ord(char): chr(sign) for sign, char in hidden.items()}
        unsigned = [Message(m.role, m.content.translate(hidden)) for m in messages]
        written, plain = self._write(unsigned), self._write(messages)
        if written.translate(shown) != plain:
            # It looks for a sign in what was said, such as </think>; which is safe where no name is spelt,
            # and where those that the assistant spells are not written.
            by = {message.role for message in messages if self._names.search(message.content)}
            if by - {"assistant"} or (by and self._names.findall(plain) != self._names.findall(written)):
                told = " and ".join(self._signs)
                raise InputError(
                    f"The model's chat template does not only write the {told} of a message, so it might be "
                    f"taken for part of a special token. Leave out {told}; who runs the model may take "
                    f"--conversation plain."
                )
            unsigned, written, shown = [*messages], plain, {}
        self._check(unsigned, written, shown)
        return self._encode(written, shown)

    def _write(self, messages: Sequence[Message]) -> str:
        turns = [asdict(message) for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._marks)
        except Exception as error:  # What a template does can fail in any way.
            raise InputError(
                f"The model's chat template does not take this conversation: {f'{error}'.rstrip('.')}. "
                f"Change the messages; who runs the model may take --conversation plain."
            ) from None

    def _encode(self, written: str, shown: Signs) -> list[int]:
        """Special tokens are those that `written` spells; what `shown` has for other characters is text."""
        tokens: list[int] = []
        # What stands between two special tokens is encoded in one go, as in training.
        for piece in self._names.split(written):
            if piece in self._special:
                tokens.append(self._special[piece])
            else:
                tokens += self._tokenizer.encode(piece.translate(shown))
        return tokens

    def _check(self, messages: Sequence[Message], written: str, shown: Signs) -> None:
        """Refuse messages, `written` as they are, of which tokens come that are the template's to write.

        Tokens and not names are compared, since a tokenizer may take other characters for those of a name.
        """
        frames = self._frames(messages, shown)
        frame, controls = next(frames), set(self._speaks)
        if self._ordinary:
            controls |= self._ordinary.keys() & self._encode(frame, shown)
            signed = {ord(sign): chr(char) for char, sign in shown.items()}
            others = (m.content.translate(shown) for m in messages if m.role != "assistant")
            spelt = {n for content in others for n in self._tokenizer.encode(content)} & self._ordinary.keys()
            if spelt:
                # What the template writes because of other words that were said is its own, too.
                rest = self._with_others(
                    messages,
                    lambda text: self._spelt.sub(_VEIL, text.translate(shown)).translate(signed),
                )
                controls |= self._ordinary.keys() & self._encode(rest, shown)
            for number in sorted(spelt & controls):
                raise self._speaks_as_another(number)

        def found_in(text: str) -> list[int]:
            if not self._ordinary:
                return [self._special[name] for name in self._names.findall(text)]
            return [n for n in self._encode(text, shown) if n in controls or n in self._tokenizer.names]

        found, meant = found_in(written), found_in(frame)
        if found != meant:
            meant = found_in(next(frames, frame))
        if found != meant:
            more, less = Counter(found) - Counter(meant), Counter(meant) - Counter(found)
            raise self._speaks_as_another([*more, *less, *found][0])

    def _frames(self, messages: Sequence[Message], shown: Signs) -> Iterator[str]:
        """What the template writes where others have said nothing, and where they have said what it asks for.

        The latter stands apart from what the template writes, and only where signs are hidden.

        Raises:
            InputError: it can write neither.
        """
        changes = [lambda text: _LETTER.sub(_VEIL, text), *([self._keep_what_is_asked] if shown else [])]
        for number, change in enumerate(changes, 1):
            try:
                frame = self._with_others(messages, change)
            except InputError:
                # It takes messages apart, perhaps, at what it asks for.
                if number == len(changes):
                    raise
            else:
                yield frame

    def _keep_what_is_asked(self, text: str) -> str:
        kept = self._unasked.sub(lambda found: found[0] if found.lastindex else _VEIL, text)
        return f"{_VEIL}{kept}{_VEIL}"

    def _with_others(self, messages: Sequence[Message], change: Callable[[str], str]) -> str:
        """What the template writes where all but the assistant say something else."""
        return self._write(
            [m if m.role == "assistant" else Message(m.role, change(m.content)) for m in messages]
        )

    def _speaks_as_another(self, token: int) -> InputError:
        name = self._tokenizer.names.get(token) or self._ordinary[token]
        return InputError(
            f"A message holds {name}, or makes it with what the model's chat template writes around it, and "
            f"would be taken for the template. Leave it out."
        )


def _sign(name: str) -> str:
    """A character without which a text cannot name this special token; none if it is letters alone.

    The rarest: where it stands in a message, templates that look for it do not see it.
    """
    signs = [char for char in name if not char.isalnum() and not char.isspace()]
    return min(signs, key=lambda char: (char.isascii(), char != "|"), default="")


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
