"""The tables of docs/evidence.md as Markdown, and the loss curves as a chart, from the results there are.

python -m experiments.tables lm
python -m experiments.tables synthetic
python -m experiments.tables mqar
python -m experiments.tables lm --plot docs/lm.png --steps 1500
"""

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from starlm.report.plots import COLORS
from starlm.train.config import OptimConfig

RESULTS = Path(__file__).parent / "results"
# What a chart calls a variant, where that is not its name.
LABELS = {"transformer": "Transformer", "star-W": "star, DDW over 64", "star-W256": "star, DDW over 256"}
Rows = list[dict[str, Any]]


def read(kind: str) -> Rows:
    """All results of one kind; another rate of the shifts, or precision, than usual is another variant."""
    rows = [json.loads(path.read_text()) for path in sorted((RESULTS / kind).glob("*.json"))]
    default = OptimConfig().shift_lr
    for row in rows:
        if (rate := row.get("shift_lr", default)) != default:
            row["variant"] += f", shift rate {rate:g}"
        if (precision := row.get("precision", "float32")) != "float32":
            row["variant"] += f", {precision}"
    return rows


def grouped(rows: Rows, *keys: str) -> dict[tuple, Rows]:
    """Rows by the values of some of their keys."""
    groups: dict[tuple, Rows] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def spread(values: Sequence[float]) -> str:
    """The mean, and with several values the distance between the largest and the smallest."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({max(values) - min(values):.3f})"


def at_best_rate(runs: Rows) -> Rows:
    """The runs of the rate whose mean loss is lowest."""
    rates = grouped(runs, "matrix_lr").values()
    return min(rates, key=lambda of_rate: statistics.mean(run["loss"] for run in of_rate))


def lm(rows: Rows) -> Iterable[str]:
    """One table per setting: of each variant its best rate, over its seeds; lowest loss first."""
    for key, group in sorted(grouped(rows, "corpus", "width", "depth", "length", "steps").items()):
        corpus, width, depth, length, steps = key
        tokens = group[0]["tokens"] / 1e6
        yield f"\n{corpus}, width {width}, depth {depth}, T {length}, {steps} steps, {tokens:.1f} M tokens\n"
        bounds = list(group[0]["by_position"])
        yield _line(
            "variant", "loss", *(f"from {b}" for b in bounds), "recall", "others", "rate of rates", "seeds"
        )
        yield _line(*["---", *["---:"] * (len(bounds) + 5)])
        best = []
        for (variant,), runs in grouped(group, "variant").items():
            at_best, rates = at_best_rate(runs), {run["matrix_lr"] for run in runs}
            best.append((statistics.mean(run["loss"] for run in at_best), variant, at_best, rates))
        for _, variant, runs, rates in sorted(best, key=lambda row: row[0]):
            yield _line(
                variant,
                spread([run["loss"] for run in runs]),
                *(spread([run["by_position"][b] for run in runs]) for b in bounds),
                spread([run["recall"] for run in runs]),
                spread([run["other"] for run in runs]),
                f"{runs[0]['matrix_lr']:g} of {len(rates)}",
                str(len(runs)),
            )


def synthetic(rows: Rows) -> Iterable[str]:
    """Accuracy by length."""
    for (task,), group in sorted(grouped(rows, "task").items()):
        lengths = sorted({int(n) for row in group for n in row["accuracy"]})
        yield f"\n{task}\n"
        yield _line("variant", "width", "heads", "rate", "updates", *(f"{n:,}" for n in lengths))
        yield _line("---", *["---:"] * (len(lengths) + 4))
        for row in sorted(group, key=lambda row: (row["variant"], row["width"], row.get("heads", 0))):
            figures = (row["accuracy"].get(str(n)) for n in lengths)
            yield _line(
                row["variant"],
                str(row["width"]),
                str(row.get("heads", "")),
                str(row.get("matrix_lr", "")),
                str(row["updates"]),
                *("" if figure is None else f"{figure:.3f}" for figure in figures),
            )


def mqar(rows: Rows) -> Iterable[str]:
    """The best of each variant's rates, by size."""
    yield _line("variant", "width", "(length, pairs)", "accuracy", "rate", "updates", "chance", "seeds")
    yield _line("---", *["---:"] * 7)
    for (variant, width, length, pairs), group in sorted(
        grouped(rows, "variant", "width", "length", "pairs").items()
    ):
        best = max(group, key=lambda row: row["accuracy"])
        yield _line(
            variant,
            str(width),
            f"({length}, {pairs})",
            f"{best['accuracy']:.4f}",
            f"{best['rate']:g} of {len({row['rate'] for row in group})}",
            str(best["updates"]),
            f"{best['chance']:.4f}",
            str(len({row["seed"] for row in group})),
        )


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(rows: Rows, path: Path) -> None:
    """Validation loss over training tokens: a line per variant at its best rate, seeds in the same colour.

    The highest end is named first.
    """
    best = [at_best_rate(runs) for runs in grouped(rows, "variant").values()]
    best.sort(key=lambda runs: -statistics.mean(run["loss"] for run in runs))
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for runs, color in zip(best, itertools.cycle(COLORS)):
        name = runs[0]["variant"].removesuffix(f", {runs[0].get('precision')}")
        for run in runs:
            scale = run["tokens"] / run["steps"] / 1e6
            axes.plot(
                [step * scale for step, _ in run["curve"]],
                [loss for _, loss in run["curve"]],
                color=color,
                marker="o",
                markersize=3,
                label=LABELS.get(name, name) if run is runs[0] else None,
            )
    axes.set_xlabel("million training tokens")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print one kind of table, of all results or of some; draw, if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = {"lm": lm, "synthetic": synthetic, "mqar": mqar}
    parser.add_argument("kind", choices=list(tables))
    parser.add_argument("--corpus", help="only runs on this text")
    parser.add_argument("--steps", type=int, help="only runs of this many steps")
    parser.add_argument("--length", type=int, help="only runs on rows of this many tokens")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--plot", type=Path, help="with lm: also draw the curves into this file")
    args = parser.parse_args()
    wanted = {"corpus": args.corpus, "steps": args.steps, "length": args.length}
    rows = [
        row
        for row in read(args.kind)
        if all(value in (None, row.get(name)) for name, value in wanted.items())
        and (args.variants is None or row["variant"].split(",")[0] in args.variants)
    ]
    print("\n".join(tables[args.kind](rows)))
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
