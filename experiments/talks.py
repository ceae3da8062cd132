"""Conversations about the standard library, to fine-tune a code model on: one JSON object per line.

    python -m experiments.talks talks.jsonl

Of each short function that says what it does there are two: what does it do, answered by that sentence; and
write it, answered by its code.
"""

import ast
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from experiments.program import parser, start
from starlm.data.documents import embedded_corpus
from starlm.files import write_whole

# Characters of a docstring's first paragraph, and of a function without it.
SAID, CODE = range(21, 300), 1200


def functions(source: str) -> Iterator[tuple[str, str, str]]:
    """Name, first paragraph and the rest of each function that has all of these."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        said = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
        docstring = node.body[0]
        rest = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
        code = textwrap.dedent("\n".join(rest))
        if len(said) in SAID and len(code) <= CODE:
            yield node.name, said, code


def conversations() -> Iterator[tuple[str, str]]:
    """Question and answer, of all functions of the standard library in the order of its files."""
    for file in embedded_corpus():
        try:
            found = list(functions(file.path.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, SyntaxError):  # Some files are there to be neither.
            continue
        for name, said, code in found:
            yield f"What does this function do?\n\n{code}", said
            yield f"Write a function `{name}`. {said}", code


def main() -> None:
    """Write the file."""
    options = parser(__doc__)
    options.add_argument("file", type=Path)
    args = options.parse_args()
    lines = []
    for question, answer in conversations():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    write_whole(args.file, "".join(lines).encode())
    print(f"{args.file}: {len(lines):,} conversations")


if __name__ == "__main__":
    start(main)
