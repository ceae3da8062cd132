"""Markdown on a terminal while it is being written."""

from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, emphasis, escape
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from starlm.text import printable


def _newline(state: StateInline, silent: bool) -> bool:
    """A line of a paragraph stays a line, with its indentation: answers hold code without fences."""
    if state.src[state.pos] != "\n":
        return False
    if not silent:
        state.pending = state.pending.rstrip(" ")
        state.push("hardbreak", "br", 0)
    state.pos += 1
    return True


def _emphasis(state: StateInline, silent: bool) -> bool:
    """By asterisks alone: __init__ is a name."""
    return state.src[state.pos] != "_" and emphasis.tokenize(state, silent)


def _escape(state: StateInline, silent: bool) -> bool:
    """Not of a line's end: there it is code that goes on."""
    return not state.src.startswith("\\\n", state.pos) and escape(state, silent)


# As rich has it, but for HTML, which rich leaves out: here List<String> is text. And as the web chat has it.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
_PARSER.inline.ruler.at("newline", _newline)
_PARSER.inline.ruler.at("emphasis", _emphasis)
_PARSER.inline.ruler.at("escape", _escape)


class MarkdownStream:
    """Shows a growing text: finished blocks are printed once, the last one is drawn again as it grows.

    with MarkdownStream(console) as stream:
        for piece in pieces:
            stream.push(piece)
    """

    def __init__(self, console: Console) -> None:
        """Args: console: on a terminal."""
        self._console, self._text = console, ""
        self._live = Live(console=console, refresh_per_second=8, transient=True, vertical_overflow="crop")

    def __enter__(self) -> "MarkdownStream":
        self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        # Also after an error: what came stays on the screen.
        self._live.update("")
        self._live.stop()
        self._print(self._text)

    def push(self, piece: str) -> None:
        """Add text."""
        self._text += printable(piece)
        done = finished(self._text)
        if done:
            self._print(self._text[:done])
            self._text = self._text[done:]
        self._live.update(_Block(self._text, last_only=True))

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(_Block(text))
            self._console.print()


def finished(text: str) -> int:
    """Characters of a text that nothing which follows can change: all blocks but the last."""
    blocks = [token.map[0] for token in _PARSER.parse(text) if token.map and token.level == 0]
    if len(blocks) < 2:
        return 0
    # Not splitlines, which knows more line ends than Markdown does.
    return sum(len(line) + 1 for line in text.split("\n")[: blocks[-1]])


class _Block:
    """Markdown without the empty lines around it."""

    def __init__(self, text: str, *, last_only: bool = False) -> None:
        """Args: last_only: only as many of the last lines as the screen has."""
        # Colours of the terminal's own palette: they can be read on light and on dark.
        self._inner, self._last_only = Markdown("", code_theme="ansi_dark"), last_only
        self._inner.parsed = _PARSER.parse(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._inner, options, pad=False)
        filled = [number for number, line in enumerate(lines) if "".join(part.text for part in line).strip()]
        if not filled:
            return
        lines = lines[filled[0] : filled[-1] + 1]
        if self._last_only:
            lines = lines[-max(console.height - 2, 1) :]
        for line in lines:
            yield from line
            yield Segment.line()
