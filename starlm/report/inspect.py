"""A page, and a picture, of where every head reads: one HTML file that needs nothing else.

The numbers are `starlm.evaluate.reads.reads`, as plain dictionaries, and the texts of the tokens shown.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlm.files import readable_os_errors, write_whole
from starlm.report.page import template
from starlm.version import __version__

# Colour of each kind, a number of the style sheet's series; n-grams beyond three share one.
SERIES = {"now": 0, "token": 1, "bigram": 2, "trigram": 3, "box": 5, "longest": 4}
ABOUT = {
    "now": "reads a predicted distance behind the token",
    "token": "reads around the row behind the last occurrence of this token",
    "bigram": "reads around the row behind the last occurrence of the last two tokens",
    "trigram": "reads around the row behind the last occurrence of the last three tokens",
    "longest": "reads around the row behind the last occurrence of the longest n-gram that came before",
    "box": "reads the mean of a window that ends at the token",
}


def write_page(data: Mapping[str, Any], out: Path, *, token: int) -> Path:
    """Write the page; its path.

    Args:
        data: the fields of `TextReads`, `title`, and `texts`: by number, of each token from `begin` to `end`
            and of those that these read.
        token: the one that is chosen when the page opens.

    Raises:
        InputError: a place that cannot be written.
    """
    kinds = kinds_of(data["groups"])
    page = template("inspect.html.jinja", html=True).render(
        title=data["title"],
        figures=_figures(data),
        hidden=data["num_tokens"] - (data["end"] - data["begin"]),
        kinds=[{"name": kind, "series": series(kind), "about": about(kind)} for kind in kinds],
        layers=_layers(data, kinds),
        heads=data["heads"],
        streams=len({head["stream"] for head in data["heads"]}) > 1,
        data={**{name: data[name] for name in ("begin", "end", "texts", "layers", "heads")}, "token": token},
        bins=bin_names(data["bins"]),
        furthest=short(max(data["bins"], default=0)),
        version=__version__,
    )
    _write(out, page.encode())
    return out


def _write(out: Path, content: bytes) -> None:
    with readable_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, content)


def kinds_of(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds of heads that there are, each once."""
    return list(dict.fromkeys(group["kind"] for group in groups))


def series(kind: str) -> int:
    """Number of the colour of a kind of heads."""
    return SERIES.get(kind, SERIES["longest"])


def about(kind: str) -> str:
    """What heads of a kind do, as the rest of a sentence."""
    n = kind.removesuffix("-gram")
    return ABOUT.get(kind, f"reads around the row behind the last occurrence of the last {n} tokens")


def bin_names(bins: Sequence[int]) -> list[str]:
    """What distances each bin has: 0, 1, 2, 3-4, 5-8, ..."""
    names = []
    for number, last in enumerate(bins):
        first = bins[number - 1] + 1 if number else 0
        names.append(short(last) if first == last else f"{short(first)}–{short(last)}")
    return names


def short(tokens: int) -> str:
    """A number of tokens in at most four characters: 1000 is 1000, 4096 is 4.1k."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if tokens >= size * (10 if size == 10**3 else 1):
            return f"{tokens / size:.3g}{letter}"
    return str(tokens)


def _figures(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Value, unit, name."""
    deformers = sum(layer == "deformer" for layer in data["layers"])
    per_layer = len({head["head"] for head in data["heads"]})
    reach = [g["reach"]["max"] for g in data["groups"] if g["kind"] != "box"]
    windows = [g["reach"]["max"] for g in data["groups"] if g["kind"] == "box"]
    found = [
        (f"{data['num_tokens']:,}", "", "tokens"),
        (str(deformers), f"of {len(data['layers'])}", "layers with heads that read rows"),
        (str(per_layer), "", "heads in each of them"),
    ]
    if reach:
        found.append((f"{max(reach):,}", "tokens", "furthest row read"))
    if windows:
        found.append((f"{max(windows):,}", "tokens", "longest window"))
    return found


def _layers(data: Mapping[str, Any], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """For each layer its name and a histogram per kind, or none; bars as shares of the highest bar."""
    found = {(group["layer"], group["kind"]): group for group in data["groups"]}
    rows = []
    for layer, name in enumerate(data["layers"]):
        cells = []
        for kind in kinds:
            group = found.get((layer, kind))
            if group is None:
                cells.append(None)
                continue
            histogram = group["reach"]["histogram"]
            top = max(histogram, default=0) or 1
            cells.append({**group["reach"], "bars": [share / top for share in histogram]})
            cells[-1] |= {"kind": kind, "series": series(kind)}
        rows.append({"number": layer + 1, "name": name, "cells": cells})
    return rows
