"""What is asked of an engine, and what comes back."""

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Literal

from starlm.errors import InputError, StarLMError
from starlm.generate.sampling import Sampling

if TYPE_CHECKING:
    from starlm.generate.engine import Engine

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Answers that continue one prompt."""

    tokens: Sequence[int]
    """The prompt, <|bos|> and all; see `TextModel.prompt`."""
    max_tokens: int = 256
    """At most this many new tokens per answer."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are chosen."""
    n: int = 1
    """Answers; each has its own random stream, the first the one it would have alone."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these strings."""
    logprobs: int | None = None
    """Alternatives to report per token; 0 reports the chosen one alone, None nothing."""
    begin: bytes = b""
    """Bytes that each answer's tokens must begin with, and its text leaves out: blanks of the prompt."""

    def __post_init__(self) -> None:
        def require(ok: bool, rule: str, name: str) -> None:
            if not ok:
                raise InputError(f"{name} must be {rule}; got {getattr(self, name)!r}.")

        if isinstance(self.tokens, str) or not all(isinstance(token, Integral) for token in self.tokens):
            raise InputError(
                f"tokens must be a sequence of token ids, whole numbers: those of TextModel.prompt(text), or "
                f"tensor.tolist(); got {self.tokens!r:.80}."
            )
        if not len(self.tokens):
            raise InputError("tokens must not be empty: a text begins with <|bos|>.")
        require(_is_count(self.max_tokens), "a whole number, 0 or more", "max_tokens")
        require(_is_count(self.n) and self.n >= 1, "a whole number, 1 or more", "n")
        require(not isinstance(self.stop, str), "a tuple of strings", "stop")
        if not all(self.stop):
            raise InputError("stop must not contain an empty string.")
        require(_is_text(self.begin), "whole characters in UTF-8", "begin")
        known = self.logprobs is None or _is_count(self.logprobs)
        require(known, "a whole number, 0 or more, or None", "logprobs")


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer."""

    id: int
    """Its number in the vocabulary."""
    logprob: float | None = None
    """Log probability that the model gave it, before penalties and temperature; None if not asked for."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log probabilities, falling."""


@dataclass(frozen=True)
class Piece:
    """Some more of one answer."""

    index: int
    """Which of the n answers."""
    text: str
    """Whole characters; may be empty."""
    tokens: tuple[TokenLogprob, ...] = ()
    """The tokens that came; their text may be held back, for a stop string or an unfinished character."""
    finish: Finish | None = None
    """Why the answer ends here: a stop token or string, max_tokens, `Stream.cancel`, or `Stream.error`."""


class Stream:
    """The answers to one request, as an iterator of pieces that waits for them.

    With a callback (see `Engine.submit`) pieces go there and not here.
    """

    def __init__(
        self, engine: "Engine", request: Request, on_piece: Callable[[Piece], object] | None
    ) -> None:
        """Made by `Engine.submit`."""
        self.request = request
        self.prompt_tokens = len(request.tokens)
        self.cached_tokens = 0
        """Tokens of the prompt that were not read anew."""
        self.completion_tokens = 0
        """Tokens of all answers so far."""
        self.error: StarLMError | None = None
        """What went wrong, if an answer finished with "error"."""
        self._engine, self._on_piece = engine, on_piece
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._unread = request.n
        # Answers that are not finished; the engine's lock guards it.
        self.open = set(range(request.n))

    @property
    def done(self) -> bool:
        """Whether every answer is finished."""
        return not self.open

    def cancel(self) -> None:
        """Finish all answers as "cancelled" and free their slots; may be called from any thread."""
        self._engine.cancel(self)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        """The next piece; of an engine without a thread of its own, by its next steps.

        Raises:
            StarLMError: the work on this request failed.
        """
        if not self._unread or self._on_piece is not None:
            raise StopIteration
        while True:
            try:
                piece = self._pieces.get(block=self._engine.started)
                break
            except queue.Empty:
                self._engine.step()
        self._unread -= piece.finish is not None
        if piece.finish == "error" and self.error is not None:
            self._unread = 0
            raise self.error
        return piece

    def emit(self, piece: Piece) -> None:
        """Hand a piece over; called by the engine."""
        self.completion_tokens += len(piece.tokens)
        if piece.finish is not None:
            self.open.discard(piece.index)
        if self._on_piece is None:
            self._pieces.put(piece)
        else:
            self._on_piece(piece)
