"""Pieces of text in OpenAI's forms: chat.completion, text_completion, and the chunks of both."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from starlm.data.tokenizer import TextStream, Tokenizer
from starlm.generate.request import Piece, TokenLogprob


class Reply(ABC):
    """One answer to a request, with its choices."""

    kind: str
    prefix: str
    chunk_kind: str

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        """Args:
        model: its name.
        tokenizer: of the model.
        logprobs: whether they were asked for.
        """
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer, from all pieces of each choice."""
        found = [self._choice(index, pieces) for index, pieces in enumerate(choices)]
        return {**self._head, "object": self.kind, "choices": found, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An event of a stream."""
        return {**self._head, "object": self.chunk_kind, "choices": choices, **more}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices of the chunk before the first text."""
        return []

    @abstractmethod
    def deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Choices of the chunks that a piece becomes."""

    @abstractmethod
    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]: ...

    def _text(self, number: int) -> str:
        r"""The token's text, or, as OpenAI writes bytes that are no whole characters, bytes:\xf0\x9f."""
        if number in self._tokenizer.names:
            return self._tokenizer.names[number]
        spoken = self._tokenizer.token_bytes(number)
        try:
            return spoken.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spoken)


class ChatReply(Reply):
    """An answer of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Text, then how it ended."""
        found = []
        if piece.text or (self._logprobs and piece.tokens):
            delta, logprobs = {"content": piece.text}, self._content([piece])
            found.append({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if piece.finish:
            found.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": piece.finish})
        return found

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._content(pieces),
            "finish_reason": pieces[-1].finish,
        }

    def _content(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        tokens = [token for piece in pieces for token in piece.tokens]
        return {
            "content": [
                {**self._token(t.id, t.logprob), "top_logprobs": [self._token(*p) for p in t.alternatives]}
                for t in tokens
            ],
            "refusal": None,
        }

    def _token(self, number: int, logprob: float | None) -> dict[str, Any]:
        found = list(self._tokenizer.token_bytes(number))
        return {"token": self._text(number), "logprob": _finite(logprob), "bytes": found}


class CompletionReply(Reply):
    """An answer of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool, begins: Sequence[int]) -> None:
        """See `Reply`.

        Args:
            begins: for each choice the characters that its tokens begin with and its text leaves out.
        """
        super().__init__(model, tokenizer, logprobs=logprobs)
        # The text of each choice's tokens so far, and how far it has come.
        self._spoken: list[tuple[TextStream, int]] = [(tokenizer.stream(), -begin) for begin in begins]

    def deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """One chunk, if there is anything to say."""
        if not (piece.text or piece.finish or (self._logprobs and piece.tokens)):
            return []
        return [self._choice(index, [piece])]

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._lists(index, [token for piece in pieces for token in piece.tokens]),
            "finish_reason": pieces[-1].finish,
        }

    def _lists(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        texts, offsets = [self._text(t.id) for t in tokens], []
        stream, length = self._spoken[index]
        for token in tokens:
            offsets.append(max(length, 0))
            length += len(stream.push(token.id))
        self._spoken[index] = stream, length
        # The token taken is always among them.
        told = [(*t.alternatives, (t.id, t.logprob)) if t.alternatives else () for t in tokens]
        tops = [{self._text(number): _finite(logprob) for number, logprob in pairs} for pairs in told]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(t.logprob) for t in tokens],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": offsets,
        }


def _finite(logprob: float | None) -> float:
    # JSON has no minus infinity; this is OpenAI's value for it.
    return -9999.0 if logprob is None else max(logprob, -9999.0)
