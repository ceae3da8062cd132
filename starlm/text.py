"""Text of a model or a file, as it may be shown."""

import re

# Halves of surrogate pairs, too, as which Python has the bytes of file names that are not UTF-8.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` as any terminal and file takes it: control characters but tabs and line ends are spelt out."""
    return _CONTROL.sub(_spelt_out, text)


def _spelt_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:x}"
