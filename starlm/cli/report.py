"""starlm report: a page about one run, or about several side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from starlm.cli.console import Console
from starlm.cli.options import Verb
from starlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Which runs."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[RUN ...]")] = (
        Path("runs/demo"),
    )
    """Run folders; several are compared."""
    out: Path | None = None
    """Page to write (.html; a .md of the same name is written beside it, but over nothing that is no report).
    Without it: report.html in the run folder, or comparison.html beside the first of several."""


def run(options: ReportOptions, console: Console) -> dict[str, Any]:
    """Write the page and its Markdown twin."""
    from starlm.report.page import write_report

    if not options.runs:
        raise InputError("Name at least one run folder.")
    page = write_report(list(options.runs), options.out)
    console.say(f"{page}\n{page.with_suffix('.md')}")
    return {"html": str(page), "markdown": str(page.with_suffix(".md"))}


VERBS = {"report": Verb(options=ReportOptions, run=run)}
