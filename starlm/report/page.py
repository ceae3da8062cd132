"""A report on one run, or on several side by side: one HTML file that needs nothing else, and Markdown.

page = write_report([Path("runs/demo")])
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from starlm.errors import InputError
from starlm.files import readable_os_errors, write_whole
from starlm.report.environment import environment
from starlm.report.metrics import RunMetrics, read_run
from starlm.report.plots import curves
from starlm.text import printable
from starlm.version import __version__

Row = tuple[str, ...]
# Of the last line of every Markdown twin.
_SIGNATURE = b"Written by starlm report, version"


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page, and Markdown of the same name beside it.

    Args:
        runs: run folders; several are compared.
        out: the page. Default: report.html in the run folder, or comparison.html beside the first of several.

    Returns:
        The page's path.

    Raises:
        InputError: no run, a folder without metrics, or a place that cannot be written, or is somebody's .md.
    """
    if not runs:
        raise InputError("Name at least one run folder to report on.")
    if out is None:
        out = runs[0] / "report.html" if len(runs) == 1 else runs[0].parent / "comparison.html"
    if out.suffix != ".html":
        raise InputError(f"The report is a page: its name must end in .html; got {out}.")
    twin = out.with_suffix(".md")
    if twin.is_file() and _SIGNATURE not in twin.read_bytes():
        raise InputError(
            f"{twin}, which is written beside the page, is there and no report. Give the page another name "
            f"with --out, or move {twin} away."
        )
    values = _values([read_run(folder) for folder in runs])
    with readable_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, template("page.html.jinja", html=True).render(values).encode())
    write_whole(twin, template("page.md.jinja", html=False).render(values).encode())
    return out


def template(name: str, *, html: bool) -> jinja2.Template:
    """A template of this folder; with `html` what it is given is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("starlm.report", "."),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["fence"] = _fence
    environment.filters["cell"] = _cell
    return environment.get_template(name)


def _sample(record: dict[str, Any]) -> tuple[str, str]:
    """Prompt, and what the model wrote behind it; an answer stands on its own line."""
    between = "\n" if record.get("chat") else ""
    return printable(record["prompt"] + between), printable(record["text"])


def _values(runs: list[RunMetrics]) -> dict[str, Any]:
    """Everything that the templates show."""
    _tell_apart(runs)
    return {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        "runs": [
            {
                "name": run.name,
                "state": _state(run),
                "figures": figures(run),
                "samples": [_sample(record) for record in run.samples],
                "samples_step": run.samples[-1]["step"] if run.samples else 0,
                "config": settings(run.config),
                "command": command(run),
                "horizons": run.horizons,
                "damaged": run.damaged,
            }
            for run in runs
        ],
        "comparison": comparison(runs) if len(runs) > 1 else [],
        "plots": curves(runs),
        "validations": [
            (r["step"], f"{r['loss']:.4f}", f"{r['bits_per_byte']:.4f}") for r in runs[0].validations
        ]
        if len(runs) == 1
        else [],
        "environment": environment(),
        "version": __version__,
    }


def _tell_apart(runs: list[RunMetrics]) -> None:
    """Give runs of one name their whole path as a name."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = printable(str(run.folder))


def _state(run: RunMetrics) -> str:
    steps = run.plan.get("steps", run.last_step)
    sessions = f", in {run.sessions} sessions" if run.sessions > 1 else ""
    if run.end:
        return f"complete: {run.last_step:,} steps{sessions}"
    return f"not complete: step {run.last_step:,} of {steps:,}{sessions}"


def figures(run: RunMetrics) -> list[tuple[str, str, str]]:
    """Headline figures: value, unit, name."""
    parts, flops = run.plan.get("parameters", {}), run.plan.get("flops_per_token", 0)
    found: list[tuple[str, str, str]] = []
    if run.validations:
        last = run.validations[-1]
        found.append((f"{last['bits_per_byte']:.3f}", "", "bits per byte, validation"))
        found.append((f"{last['loss']:.3f}", "", "nats per token, validation"))
        seen, held_out = last.get("tokens"), last.get("split_tokens")
        if isinstance(seen, int) and isinstance(held_out, int) and seen < held_out:
            found.append((f"{seen:,}", f"of {held_out:,}", "validation tokens"))
    if "total" in parts:
        found.append((*scaled(parts["total"]), "parameters"))
    if run.steps:
        found.append((*scaled(run.tokens), "tokens trained on"))
        found.append((*_time(run.seconds), "training time"))
        found.append((f"{run.tokens / max(run.seconds, 1e-9):,.0f}", "tokens/s", "mean throughput"))
    if flops and run.tokens:
        found.append((*scaled(flops * run.tokens), "training FLOPs"))
    return found


def scaled(value: float) -> tuple[str, str]:
    """A large number in three digits, and the letter of its size: 4194304 is 4.19, M."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}", letter
    return f"{value:.3g}", ""


def _time(seconds: float) -> tuple[str, str]:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f}", unit
    return f"{seconds:.0f}", "s"


def comparison(runs: Sequence[RunMetrics]) -> list[Row]:
    """A table: a row of names, one per headline figure, one per setting that differs."""
    named = [{name: f"{value} {unit}".strip() for value, unit, name in figures(run)} for run in runs]
    configs = [dict(settings(run.config)) for run in runs]
    names = list(dict.fromkeys(name for each in named for name in each))
    keys = list(dict.fromkeys(key for each in configs for key in each))
    rows = [("", *(run.name for run in runs)), ("state", *(_state(run) for run in runs))]
    rows += [(name, *(each.get(name, "–") for each in named)) for name in names]
    for key in keys:
        values = [each.get(key, "–") for each in configs]
        if len(set(values)) > 1 and key != "out":
            rows.append((key, *values))
    return rows


def settings(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of a configuration."""
    rows: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, dict):
            rows += settings(value, f"{prefix}{name}.")
        else:
            rows.append((printable(prefix + name), printable(str(value))))
    return rows


def command(run: RunMetrics) -> str:
    """What trains this run again, into another folder."""
    config, out = (shlex.quote(str(path)) for path in (run.folder / "run.toml", f"{run.folder}-again"))
    return printable(f"starlm train --config {config} --out {out}") if run.config else ""


def _fence(text: str) -> str:
    """`text` as a Markdown code block that nothing in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{text}\n{ticks}"


def _cell(text: str) -> str:
    """`text` as a cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
