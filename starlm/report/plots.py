"""Curves as inline SVG whose colours are CSS variables, so that one page serves light and dark."""

import io
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import IO, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from starlm.report.metrics import RunMetrics, smooth

# matplotlib wants colours as numbers; these stand for the page's variables. The second value is what a
# viewer without the page's style sheet shows.
_INK, _GRID = "#010101", "#020202"
_SERIES = ["#030301", "#030302", "#030303", "#030304", "#030305", "#030306"]
COLORS = ["#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2"]
_VARIABLES = {
    _INK: "var(--ink,#777)",
    _GRID: "var(--line,#8884)",
    **{color: f"var(--series-{number},{COLORS[number]})" for number, color in enumerate(_SERIES)},
}
_STYLE: dict[str, Any] = {
    # Names have dollars, too.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "ytick.left": False,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}  # fmt: skip
# Points per curve: more make the page heavy and look the same.
_POINTS = 600


def curves(runs: Sequence[RunMetrics]) -> list[tuple[str, str]]:
    """Title and SVG of every plot that these runs have numbers for."""
    plots: list[tuple[str, str, Callable[..., bool], float]] = [
        ("Training loss, nats per token", "loss", _loss, 11.2),
        ("Validation, bits per byte", "bits", _bits, 5.4),
        ("Throughput, tokens per second", "speed", _speed, 5.4),
    ]
    drawn = [(title, _svg(name, title, draw, runs, width)) for title, name, draw, width in plots]
    return [(title, svg) for title, svg in drawn if svg]


def _svg(name: str, title: str, draw: Callable[..., bool], runs: Sequence[RunMetrics], width: float) -> str:
    """One plot as an SVG element, `width` inches wide; empty if there is nothing to draw."""
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, 3.4), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        drawn = [draw(axes, run, color) for run, color in zip(runs, itertools.cycle(_SERIES), strict=False)]
        if not any(drawn):
            return ""
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.02)
        if len(runs) > 1:
            # By name: of itself matplotlib leaves out those that begin with an underscore.
            named = [line for line in axes.lines if line.get_label() in {run.name for run in runs}]
            axes.legend(named, [str(line.get_label()) for line in named])
        file = io.StringIO()
        save(figure, file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return _inline(file.getvalue(), name, title)


def save(figure: Figure, file: IO, **options: Any) -> None:
    """Write a figure to `file`; what letters the font lacks is no news to who reads it.

    Args:
        options: of matplotlib's `savefig`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, **options)


def _inline(svg: str, name: str, title: str) -> str:
    """An SVG file as an element of a page: no prolog, ids of its own, the page's font and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _loss(axes: Any, run: RunMetrics, color: str) -> bool:
    tokens, losses = _points(run.steps, "loss")
    if len(tokens) < 2:
        return False
    smoothed = smooth(losses, max(len(losses) // 40, 5))
    keep = _thin(len(tokens))
    axes.plot([tokens[i] for i in keep], [losses[i] for i in keep], color=color, alpha=0.35, linewidth=1)
    axes.plot([tokens[i] for i in keep], [smoothed[i] for i in keep], color=color, label=run.name)
    # The first steps tower over the rest; leave them out of view so that the curve can be read.
    low = min(losses)
    high = max(low, *smoothed[len(smoothed) // 20 :])
    # A flat curve, too, needs some height.
    pad = max(0.05 * (high - low), 0.001 * abs(low)) or 1
    bottom, top = axes.get_ylim()
    drawn = len(axes.lines) > 2
    low, high = low - pad, high + pad
    axes.set_ylim(min(low, bottom) if drawn else low, max(high, top) if drawn else high)
    return True


def _bits(axes: Any, run: RunMetrics, color: str) -> bool:
    points = [(r["step"], r["bits_per_byte"]) for r in run.validations if _finite(r.get("bits_per_byte"))]
    if not points:
        return False
    per_step = run.tokens / run.last_step if run.last_step else 1.0
    tokens, bits = [step * per_step for step, _ in points], [value for _, value in points]
    axes.plot(tokens, bits, color=color, marker="o", markersize=5, label=run.name)
    axes.annotate(
        f"{bits[-1]:.3f}",
        (tokens[-1], bits[-1]),
        (0, 7),
        textcoords="offset points",
        ha="center",
        color=color,
    )
    return True


def _speed(axes: Any, run: RunMetrics, color: str) -> bool:
    tokens, speeds = _points(run.steps, "tokens_per_second")
    if len(tokens) < 2:
        return False
    smoothed = smooth(speeds, max(len(speeds) // 40, 5))
    keep = _thin(len(tokens))
    axes.plot([tokens[i] for i in keep], [smoothed[i] for i in keep], color=color, label=run.name)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.2 * max(smoothed)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return True


def _points(records: Sequence[dict], name: str) -> tuple[list[float], list[float]]:
    pairs = [(r["tokens"], r[name]) for r in records if _finite(r.get(name))]
    return [tokens for tokens, _ in pairs], [value for _, value in pairs]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")


def _thin(count: int) -> list[int]:
    """At most about `_POINTS` indices below `count`, the last one among them."""
    stride = max(count // _POINTS, 1)
    return sorted({*range(0, count, stride), count - 1})
