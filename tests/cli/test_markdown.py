"""Markdown that grows looks at the end as if it had been there at once."""

import io

import pytest
from rich.console import Console

from starlm.cli.markdown import MarkdownStream, _Block, finished

TEXT = """# Title

Some *text* with `code`.

1. one
2. two

   more of two
3. three

```python
def f(x):

    return x
```

| a | b |
|---|---|
| 1 | 2 |

end"""


def screen(file=None):
    return Console(file=file or io.StringIO(), force_terminal=True, width=40, height=12, color_system=None)


def shown(pieces):
    """What stays on the screen: all but what is drawn for a moment and wiped out."""
    console = screen()
    printed = []
    with MarkdownStream(console) as stream:
        keep = stream._print
        stream._print = lambda text: (printed.append(text), keep(text))
        for piece in pieces:
            stream.push(piece)
    return printed


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_blocks_are_printed_whole_and_once(size):
    printed = shown(TEXT[at : at + size] for at in range(0, len(TEXT), size))
    assert "".join(printed) == TEXT
    whole = [block for block in printed if block.strip()]
    if size == 1:
        assert [block.strip()[:5] for block in whole] == ["# Tit", "Some ", "1. on", "```py", "| a |", "end"]
    assert any("def f(x):\n\n    return x\n" in block for block in whole)
    assert any("1. one\n2. two\n\n   more of two\n3. three" in block for block in whole)


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("", ""),
        ("one", ""),
        ("one\n\n", ""),
        ("one\n\ntwo", "one\n\n"),
        ("```\na\n\nb", ""),
        ("a\n\n- b\n\n  c", "a\n\n"),
        ("<div>\n\na", "<div>\n\n"),
        ("<!-- a\n\nb", "<!-- a\n\n"),
        # Markdown's lines end at line ends only.
        ("```\na\u2028b\u2028c\n```\n\nd", "```\na\u2028b\u2028c\n```\n\n"),
    ],
)
def test_finished(text, done):
    assert text[: finished(text)] == done


CODE = """def __init__(self, *args, **kwargs):
    self._name = args[0]
    if self._name:
        return _of(self) + \\
            __more__"""


def test_code_without_fences_keeps_its_lines():
    file = io.StringIO()
    console = Console(file=file, force_terminal=False, width=60, color_system=None)
    console.print(_Block(CODE + "\n\n    deeper = 1\n"), end="")
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert lines[:5] == CODE.splitlines()
    assert any("    deeper = 1"[4:] in line for line in lines[5:])


def test_what_came_stays_after_an_interruption():
    file = io.StringIO()

    def interrupted():
        with MarkdownStream(screen(file)) as stream:
            stream.push("half a ")
            stream.push("sentence")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.getvalue().rstrip().endswith("half a sentence")


def test_no_text_steers_the_terminal():
    file = io.StringIO()
    with MarkdownStream(screen(file)) as stream:
        stream.push("\x1b]0;title\x07")
    assert "\x1b]0;" not in file.getvalue()


@pytest.mark.parametrize("text", ["a List<String>", "if a<b and c>d", "a\n\n<div>b</div>\n\n<!-- c -->\n\nd"])
def test_html_is_text(text):
    file = io.StringIO()
    with MarkdownStream(Console(file=file, width=40)) as stream:
        for letter in text:
            stream.push(letter)
    assert file.getvalue().split() == text.split()
