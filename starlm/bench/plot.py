"""The operator's table as a chart: time per token over length, both axes logarithmic."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from starlm.bench.op import ATTENTION, COMPILED, CPU, MEMORY, NAMES, PASSES, REFERENCE, Cell
from starlm.files import readable_os_errors

_COLORS = {REFERENCE: "#9333ea", COMPILED: "#ea580c", CPU: "#2563eb", ATTENTION: "#dc2626", MEMORY: "#777777"}
_STYLES = ("-", "--", ":", "-.")


def draw(path: Path, ns_per_token: Mapping[Cell, float]) -> None:
    """Write the chart to `path`; its suffix decides the format.

    Raises:
        InputError: the place cannot be written.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, len(PASSES), sharey=True)
    shifts = list(dict.fromkeys(cell.shift for cell in ns_per_token if cell.shift is not None))
    for axes, kind in zip(panels, PASSES, strict=True):
        lines: dict[tuple[str, float | None], list[tuple[int, float]]] = {}
        for cell, ns in ns_per_token.items():
            if cell.kind == kind:
                lines.setdefault((cell.peer, cell.shift), []).append((cell.length, ns))
        for (peer, shift), points in sorted(lines.items(), key=lambda line: list(_COLORS).index(line[0][0])):
            axes.plot(
                *zip(*sorted(points), strict=True),
                color=_COLORS[peer],
                linestyle=":" if shift is None else _STYLES[shifts.index(shift) % len(_STYLES)],
                marker="o",
                markersize=3.5,
                label=peer if shift is None else f"{peer}, mean shift {shift:g}",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(NAMES[kind])
        axes.set_xlabel("T")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ns per token")
    panels[0].legend(fontsize=7)
    with readable_os_errors(path):
        figure.savefig(path)
