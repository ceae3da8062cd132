"""Tables as charts: one line per peer, both axes logarithmic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from starlm.files import readable_os_errors

_COLORS = ("#2563eb", "#dc2626", "#ea580c", "#9333ea", "#16a34a", "#777777", "#0891b2")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str = ""
    """Default: the next of a fixed list."""
    style: str = "-"


def draw(path: Path, panels: Mapping[str, Sequence[Line]], *, xlabel: str, ylabel: str) -> None:
    """Write a chart with one panel per title to `path`; its suffix decides the format.

    Raises:
        InputError: the place cannot be written.
    """
    figure = Figure(figsize=(1.5 + 4.25 * len(panels), 4.4), layout="constrained")
    found = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(found, panels.items(), strict=True):
        for number, line in enumerate(lines):
            axes.plot(
                *zip(*sorted(line.points), strict=True),
                color=line.color or _COLORS[number % len(_COLORS)],
                linestyle=line.style,
                marker="o",
                markersize=3.5,
                label=line.label,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.3)
    found[0].set_ylabel(ylabel)
    found[0].legend(fontsize=7)
    with readable_os_errors(path):
        figure.savefig(path)
