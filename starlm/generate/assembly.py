"""Tokens of an answer to its text: whole characters, up to a stop string."""

from collections.abc import Sequence

from starlm.data.tokenizer import Tokenizer


class Assembly:
    """The text of one answer, from tokens that come one at a time.

    What may turn out to be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), skip: int = 0) -> None:
        """Args:
        stop: the text ends before the first of these.
        skip: characters at the beginning that the reader has already.
        """
        self._text, self._stop, self._skip, self._held = tokenizer.stream(), stop, skip, ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The characters that this token brings to light; may be empty. A stop string sets `stopped`."""
        self._take(self._text.push(token))
        found = min((at for at in map(self._held.find, self._stop) if at >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            return self._release(self._held[:found], "")
        kept = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        shown = len(self._held) - kept
        return self._release(self._held[:shown], self._held[shown:])

    def flush(self) -> str:
        """What was held back, with U+FFFD for a character that was left unfinished."""
        if not self.stopped:
            self._take(self._text.flush())
        return self._release(self._held, "")

    def _take(self, text: str) -> None:
        self._held += text[self._skip :]
        self._skip = max(self._skip - len(text), 0)

    def _release(self, shown: str, held: str) -> str:
        self._held = held
        return shown
