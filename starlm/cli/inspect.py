"""starlm inspect: draw where every head reads from, for a text."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starlm.cli.console import Console
from starlm.cli.generate import read_prompt
from starlm.cli.options import Verb
from starlm.cli.tokenizer import visible
from starlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Which model, which text, and what is drawn."""

    model: Path = Path("runs/demo")
    """Run folder (its last checkpoint is taken) or checkpoint folder."""
    text: str | None = None
    """Text to look at; without it and without prompt_file, stdin."""
    prompt_file: Path | None = None
    """File whose text is looked at (UTF-8)."""
    out: Path = Path("inspect.html")
    """Page to write (.html)."""
    png: Path | None = None
    """Picture to write beside it (.png): the arcs of one token, and how far back every layer reads."""
    token: int | None = None
    """The token whose arcs are drawn first, counted from 0, where the document begins; default the last."""
    draw: int = 256
    """At most this many tokens are drawn, around the chosen one; figures count all."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""

    def __post_init__(self) -> None:
        if self.text is not None and self.prompt_file is not None:
            raise InputError("Give the text once: --text or --prompt-file.")
        for name, path, ending in (("out", self.out, ".html"), ("png", self.png, ".png")):
            if path is not None and path.suffix != ending:
                raise InputError(f"{name} must end in {ending}; got {path}.")
        if self.draw < 1:
            raise InputError(f"draw must be 1 or more; got {self.draw}.")


def run(options: InspectOptions, console: Console) -> dict[str, Any]:
    """Write the page and the picture, and say how far back each kind of head reads."""
    text = read_prompt(options.text, options.prompt_file, flags=('--text "def "', "--prompt-file FILE"))
    from starlm.evaluate.reads import reads
    from starlm.generate.text import load
    from starlm.report.inspect import write_page
    from starlm.report.reads_plot import write_picture

    model = load(options.model, device=options.device)
    tokens = model.tokenizer.encode(text, bos=True)
    token = _token(options.token, len(tokens))
    begin = max(0, min(token - options.draw // 2, len(tokens) - options.draw))
    found = reads(model.model, tokens, begin=begin, end=begin + options.draw)
    drawn = range(found.begin, found.end)
    read = {row for head in found.heads for rows in head.rows for row, _ in rows}
    names = model.tokenizer.names
    texts = {
        row: names.get(tokens[row]) or visible(model.tokenizer.token_bytes(tokens[row]))
        for row in sorted(read.union(drawn))
    }
    data = {"title": str(options.model), "token": token, "texts": texts, **asdict(found)}
    files = [write_page(data, options.out, token=token)]
    png = options.png if found.heads else None
    if png is not None:
        files.append(write_picture(data, png, token=token))
    _say(data, console)
    if png != options.png:
        console.say(f"{options.png} was not written: a picture is of Deformer layers, and there are none.")
    for file in files:
        console.say(str(file))
    return {"html": str(options.out), "png": str(png) if png else None, **data}


def _token(token: int | None, length: int) -> int:
    if token is None:
        return length - 1
    if not 0 <= token < length:
        raise InputError(f"token must lie between 0 and {length - 1}, the text's last token; got {token}.")
    return token


def _say(data: dict[str, Any], console: Console) -> None:
    rows: list[list[str]] = [["layer", "kind", "heads", "median", "90 %", "max", "nothing"]]
    for group in data["groups"]:
        reach = group["reach"]
        reads = reach["nothing"] < 1
        figures = [f"{reach[name]:,}" if reads else "–" for name in ("median", "p90", "max")]
        nothing = f"{reach['nothing']:.1%}" if reach["nothing"] else ""
        rows.append([str(group["layer"] + 1), group["kind"], str(group["heads"]), *figures, nothing])
    if len(rows) > 1:
        console.table(rows)
    others = [name for name in data["layers"] if name != "deformer"]
    if others:
        console.say(
            f"Layers left out, because they choose no rows: {len(others)} ({', '.join(sorted(set(others)))})."
        )
    console.say()


VERBS = {"inspect": Verb(options=InspectOptions, run=run, one_of=frozenset({"text", "prompt_file"}))}
