"""Where the heads read for one token, and how far back on the whole, as a picture."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Circle, PathPatch, Rectangle
from matplotlib.path import Path as Curve

from starlm.files import readable_os_errors, write_whole
from starlm.report.inspect import kinds_of, series, short
from starlm.report.plots import COLORS, save

INK, LINE = "#666d7a", "#e3e6eb"
# Characters of text that the picture is wide, and tokens on each side of a row that is read.
WIDTH, AROUND = 132, 2


def write_picture(data: Mapping[str, Any], out: Path, *, token: int) -> Path:
    """Write the picture as PNG; its path.

    Args:
        data: as for `write_page`.
        token: the one whose arcs are drawn.

    Raises:
        InputError: a place that cannot be written.
    """
    return _write(data, out, token)


def write_histograms(data: Mapping[str, Any], out: Path) -> Path:
    """Write only how far back every layer reads, as PNG; its path.

    Args:
        data: `layers`, `bins` and `groups`, as for `write_page`.

    Raises:
        InputError: as for `write_picture`.
    """
    return _write(data, out, None)


def _write(data: Mapping[str, Any], out: Path, token: int | None) -> Path:
    kinds = kinds_of(data["groups"])
    layers = sum(layer == "deformer" for layer in data["layers"])
    top = [] if token is None else [3]
    # Tokens have dollars, too.
    style: Any = {"text.parse_math": False, "axes.edgecolor": LINE}
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 9, **style}):
        size = (12, sum(top) * 1.25 + 0.15 + 0.95 * layers)
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        rows = [*top, *[0.8] * layers]
        grid = figure.add_gridspec(max(len(rows), 1), max(len(kinds), 1), height_ratios=rows or [1])
        if token is not None:
            _arcs(figure.add_subplot(grid[0, :]), data, kinds, token)
        _histograms(figure, grid, data, kinds, first_row=len(top))
        file = io.BytesIO()
        save(figure, file, format="png", dpi=150, metadata={"Software": None})
    with readable_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, file.getvalue())
    return out


def _arcs(axes: Any, data: Mapping[str, Any], kinds: Sequence[str], token: int) -> None:
    """The token's line of text, what is far apart on it drawn together, and arcs to what is read."""
    rows, anchors = gather(data["heads"], token - data["begin"])
    columns = chosen_columns(token, rows, anchors)
    left, at = 0.0, {}
    previous = None
    for column in columns:
        if previous is not None and column > previous + 1:
            axes.text(left + 1, -0.5, "⋯", color=INK, ha="center", va="center", fontsize=9)
            left += 2.5
        label = _label(data, column)
        frame = {"facecolor": "#16181d", "edgecolor": "none", "pad": 1.5} if column == token else None
        color = "white" if column == token else "black"
        axes.text(left, -0.5, label, family="monospace", fontsize=8, va="center", color=color, bbox=frame)
        at[column] = (left + len(label) / 2, len(label))
        left += len(label) + 0.6
        previous = column
    end = max(left, 60.0)
    for number, kind in enumerate(kinds):
        color = COLORS[series(kind)]
        if kind == "box":
            _windows(axes, rows[kind], at, token, color)
            continue
        for row, share in rows[kind].items():
            if row in at:
                _arc(axes, at[token][0], at[row][0], share, color, number, end)
        for row in anchors[kind]:
            if row in at:
                axes.plot(at[row][0], 0.28, "D", markersize=6, markerfacecolor="white", markeredgecolor=color)
    axes.set_xlim(-1, end)
    axes.set_ylim(-2, 8)
    axes.axis("off")
    shown = [axes.plot([], [], color=COLORS[series(kind)], linewidth=4, label=kind)[0] for kind in kinds]
    if set(kinds) - {"now", "box"}:
        label = "row behind an earlier match"
        shown += axes.plot([], [], "D", color="white", markeredgecolor=INK, label=label)
    axes.legend(handles=shown, loc="upper left", ncols=len(shown), frameon=False, fontsize=9, handlelength=1)
    missing = sorted({head["kind"] for head in data["heads"] if not head["rows"][token - data["begin"]]})
    says = f"; no such row for {', '.join(missing)} heads" if missing else ""
    axes.set_title(f"{data['title']}: what the heads of all layers read for token {token:,} (of 0 to "
                   f"{data['num_tokens'] - 1:,}){says}", loc="left", fontsize=11)  # fmt: skip


def gather(
    heads: Sequence[Mapping[str, Any]], at: int
) -> tuple[dict[str, dict[int, float]], dict[str, set[int]]]:
    """Per kind: the share of each row, as a mean over the kind's heads; and the rows measured from."""
    rows: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    anchors: dict[str, set[int]] = defaultdict(set)
    for head in heads:
        of_kind = sum(other["kind"] == head["kind"] for other in heads)
        for row, share in head["rows"][at]:
            rows[head["kind"]][row] += share / of_kind
        if head["kind"] not in ("now", "box") and head["origins"][at] >= 0:
            anchors[head["kind"]].add(head["origins"][at])
    return rows, anchors


def chosen_columns(
    token: int, rows: Mapping[str, Mapping[int, float]], anchors: Mapping[str, set[int]]
) -> list[int]:
    """Tokens that have a place in the picture: the chosen one, those before it, and what is read most."""
    wanted = {row: 2.0 for found in anchors.values() for row in found}
    for kind, found in rows.items():
        if kind != "box":
            for row, share in found.items():
                wanted[row] = wanted.get(row, 0.0) + share
    columns = set(range(max(token - 8, 0), token + 1))
    for row in sorted(wanted, key=lambda row: -wanted[row]):
        near = range(max(row - AROUND, 0), min(row + AROUND, token) + 1)
        if len(columns | set(near)) <= WIDTH // 4:
            columns |= set(near)
    # Where little is read, the text before the token fills the line.
    for row in range(token, -1, -1):
        if len(columns) < WIDTH // 6:
            columns.add(row)
    return sorted(columns)


def _label(data: Mapping[str, Any], row: int) -> str:
    # The rows that anchored heads measure from need not be read.
    text = data["texts"].get(row, f"#{row}")
    return text if len(text) <= 12 else f"{text[:11]}…"


def _arc(axes: Any, start: float, end: float, share: float, color: str, number: int, width: float) -> None:
    look = {
        "edgecolor": color,
        "facecolor": "none",
        "linewidth": 0.8 + 5 * share,
        "alpha": 0.35 + 0.6 * share,
    }
    if start == end:
        axes.add_patch(Circle((start, 1 + 0.5 * number), 0.5, **look))
        return
    height = 1.5 + 0.5 * number + 6 * min(abs(start - end) / width, 1)
    points = [(start, 0.1), (start, height), (end, height), (end, 0.1)]
    axes.add_patch(PathPatch(Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * 3]), capstyle="round", **look))


def _windows(
    axes: Any, begins: Mapping[int, float], at: Mapping[int, tuple[float, int]], token: int, color: str
) -> None:
    """A band below the text: the more windows cover a token, the stronger."""
    for column, (middle, length) in at.items():
        covered = sum(share for begin, share in begins.items() if begin <= column <= token)
        if covered:
            place = (middle - length / 2 - 0.3, -1.35)
            axes.add_patch(
                Rectangle(
                    place, length + 0.6, 0.3, color=color, alpha=min(0.1 + 0.9 * covered, 1), linewidth=0
                )
            )


def _histograms(
    figure: Any, grid: Any, data: Mapping[str, Any], kinds: Sequence[str], *, first_row: int
) -> None:
    """One histogram per layer and kind: share of the reads by distance."""
    names = [short(last) for last in data["bins"]]
    found = {(group["layer"], group["kind"]): group["reach"] for group in data["groups"]}
    deformers = [number for number, layer in enumerate(data["layers"]) if layer == "deformer"]
    for line, layer in enumerate(deformers):
        for column, kind in enumerate(kinds):
            axes = figure.add_subplot(grid[first_row + line, column])
            reach = found[layer, kind]
            axes.bar(
                range(len(reach["histogram"])), reach["histogram"], width=0.8, color=COLORS[series(kind)]
            )
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.set_yticks([])
            axes.spines[["top", "left", "right"]].set_visible(False)
            ticks = range(0, len(names), 3)
            last = line == len(deformers) - 1
            axes.set_xticks(
                ticks, [names[tick] for tick in ticks] if last else [""] * len(ticks), color=INK, fontsize=7
            )
            nothing = f", nothing {reach['nothing']:.0%}" if reach["nothing"] else ""
            says = f"median {reach['median']:,}, 90 % ≤ {reach['p90']:,}{nothing}"
            axes.set_title(
                says if reach["nothing"] < 1 else "reads nothing",
                fontsize=7.5,
                color=INK,
                loc="left",
                pad=2,
            )
            if column == 0:
                axes.set_ylabel(f"layer {layer + 1}", color=INK)
            if last:
                axes.set_xlabel(
                    "box: windows up to n tokens" if kind == "box" else f"{kind}: up to n tokens back",
                    color=INK,
                    fontsize=8,
                )
