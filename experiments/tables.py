"""The tables of docs/evidence.md as Markdown, and the loss curves as a chart, from the results there are.

python -m experiments.tables lm
python -m experiments.tables synthetic
python -m experiments.tables mqar
python -m experiments.tables lm --plot docs/lm.png --steps 1500
"""

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.program import parser, start
from starlm.errors import InputError
from starlm.report.plots import COLORS
from starlm.train.config import OptimConfig

RESULTS = Path(__file__).parent / "results"
# What a chart calls a variant, where that is not its name.
LABELS = {"transformer": "Transformer", "star-W": "star, DDW over 64", "star-W256": "star, DDW over 256"}
Rows = list[dict[str, Any]]
# Runs of language models that agree on these can be compared.
SETTING = ("corpus", "width", "depth", "length", "steps", "batch_tokens", "eval_tokens")


def read(kind: str) -> Rows:
    """All results of one kind; another rate of the shifts, or precision, than usual is another variant."""
    rows = [json.loads(path.read_text()) for path in sorted((RESULTS / kind).glob("*.json"))]
    default = OptimConfig().shift_lr
    for row in rows:
        # What the first files do not say.
        row.setdefault("batch_tokens", 4096)
        row.setdefault("eval_tokens", 65536)
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


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and with several values the distance between the largest and the smallest."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({max(values) - min(values):.{digits}f})"


def at_best_rate(runs: Rows) -> Rows:
    """The runs of the rate whose mean loss is lowest."""
    rates = grouped(runs, "matrix_lr").values()
    return min(rates, key=lambda of_rate: statistics.mean(run["loss"] for run in of_rate))


def lm(rows: Rows) -> Iterable[str]:
    """One table per setting: of each variant its best rate, over its seeds; lowest loss first."""
    for key, group in sorted(grouped(rows, *SETTING).items()):
        tokens = group[0]["tokens"] / 1e6
        yield f"\n{_told(key)}, {tokens:.1f} M tokens\n"
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
                str(len({run["seed"] for run in runs})),
            )


def synthetic(rows: Rows) -> Iterable[str]:
    """Accuracy by length."""
    for (task,), group in sorted(grouped(rows, "task").items()):
        lengths = sorted({int(n) for row in group for n in row["accuracy"]})
        yield f"\n{task}\n"
        yield _line("variant", "width", "heads", "rate", "seed", "updates", *(f"{n:,}" for n in lengths))
        yield _line("---", *["---:"] * (len(lengths) + 5))
        order = ("variant", "width", "heads", "seed")
        for row in sorted(group, key=lambda row: [row.get(name, 0) for name in order]):
            figures = (row["accuracy"].get(str(n)) for n in lengths)
            yield _line(
                row["variant"],
                str(row["width"]),
                str(row.get("heads", "")),
                str(row.get("matrix_lr", "")),
                str(row["seed"]),
                str(row["updates"]),
                *("" if figure is None else f"{figure:.3f}" for figure in figures),
            )


def mqar(rows: Rows) -> Iterable[str]:
    """Of each variant the rate with the highest mean accuracy, by size and the epochs that it might take."""
    yield _line(
        *("variant", "width", "(length, pairs)", "accuracy", "rate of rates", "seeds"),
        *("updates", "epochs at most", "chance"),
    )
    yield _line("---", *["---:"] * 8)
    keys = ("variant", "width", "length", "pairs", "batch", "epochs_allowed")
    for (variant, width, length, pairs, _, epochs), group in sorted(grouped(rows, *keys).items()):
        rates = grouped(group, "rate")
        best = max(rates.values(), key=lambda runs: statistics.mean(run["accuracy"] for run in runs))
        yield _line(
            variant,
            str(width),
            f"({length}, {pairs})",
            spread([run["accuracy"] for run in best], digits=4),
            f"{best[0]['rate']:g} of {len(rates)}",
            str(len({run["seed"] for run in best})),
            ", ".join(str(run["updates"]) for run in best),
            str(epochs),
            f"{best[0]['chance']:.4f}",
        )


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _told(setting: tuple) -> str:
    """One of `SETTING` in words."""
    corpus, width, depth, length, steps, batch, measured = setting
    size = f"width {width}, depth {depth}, T {length}"
    return f"{corpus}, {size}, {steps} steps of {batch} tokens, measured on {measured}"


def draw(rows: Rows, path: Path) -> None:
    """Validation loss over training tokens: a line per variant at its best rate, seeds in the same colour.

    The highest end is named first.

    Raises:
        InputError: no runs, runs that cannot be compared, or a file of another kind than PNG.
    """
    groups = sorted(grouped(rows, *SETTING))
    if len(groups) != 1:
        several = "".join(f"\n  {_told(group)}" for group in groups) or " none"
        raise InputError(
            f"A chart is of one setting; these results have:{several}\n"
            f"Choose with --corpus, --steps, --length, --width, --depth, --batch-tokens and --eval-tokens."
        )
    if path.suffix != ".png":
        raise InputError(f"{path} is not a .png. Name one.")
    best = [at_best_rate(runs) for runs in grouped(rows, "variant").values()]
    best.sort(key=lambda runs: -statistics.mean(run["loss"] for run in runs))
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    precisions = {run.get("precision", "float32") for run in rows}
    for runs, color in zip(best, itertools.cycle(COLORS)):
        name = runs[0]["variant"]
        if len(precisions) == 1:
            name = name.removesuffix(f", {runs[0].get('precision')}")
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
    options, tables = parser(__doc__), {"lm": lm, "synthetic": synthetic, "mqar": mqar}
    options.add_argument("kind", choices=list(tables))
    options.add_argument("--corpus", help="only runs on this text")
    options.add_argument("--steps", type=int, help="only runs of this many steps")
    options.add_argument("--length", type=int, help="only runs on rows of this many tokens")
    for name, what in (("width", "models of this width"), ("depth", "models of so many layers")):
        options.add_argument(f"--{name}", type=int, help=f"only {what}")
    options.add_argument("--batch-tokens", type=int, help="only runs with so many tokens per step")
    options.add_argument("--eval-tokens", type=int, help="only losses on at most so many tokens")
    options.add_argument("--variants", nargs="+", help="only these")
    options.add_argument("--plot", type=Path, help="with lm: also draw the curves into this .png")
    args = options.parse_args()
    if args.plot and args.kind != "lm":
        options.error("--plot draws the results of lm alone")
    wanted = {name: getattr(args, name) for name in SETTING}
    rows = [
        row
        for row in read(args.kind)
        if all(value in (None, row.get(name)) for name, value in wanted.items())
        and (args.variants is None or row["variant"].split(",")[0] in args.variants)
    ]
    if not rows:
        raise InputError(f"No results in {RESULTS / args.kind} match.")
    print("\n".join(tables[args.kind](rows)))
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    start(main)
