"""How far back the heads of a trained model read, per layer and kind, over validation data.

    python -m experiments.reach runs/demo --data data/demo --tokens 65536

Writes NAME.json and NAME.png into `results/reach`.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from experiments.program import parser, start, within
from experiments.store import save
from experiments.variants import NAMES, builder
from starlm.data.loader import SequentialLoader
from starlm.data.shards import Split, TokenData
from starlm.evaluate.reads import BINS, LAYERS, GroupReads, Tally, watching
from starlm.model.checkpoint import load_model, load_weights
from starlm.model.folder import find_checkpoint, read_model_config
from starlm.model.model import StarLM
from starlm.report.reads_plot import write_histograms

RESULTS = Path(__file__).parent / "results" / "reach"


@torch.inference_mode()
def measure(model: StarLM, split: Split, max_tokens: int) -> tuple[int, list[GroupReads]]:
    """How many tokens were looked at, and reach by layer and kind.

    Documents are packed into rows of `context` tokens as in training. One that does not fit into a row is
    cut, and its second part reads no row of the first.
    """
    tallies: dict[int, Tally] = {}
    tokens = 0
    for batch in SequentialLoader(split, model.config.context, max_tokens, rows=8):
        inputs, targets, first = map(torch.from_numpy, (batch.inputs, batch.targets, batch.first))
        real = targets >= 0
        tokens += int(real.sum())

        def see(layer, heads, found, real=real):
            tallies.setdefault(layer, Tally(heads)).add(found, counted=real)

        with watching(model, see):
            model.hidden(inputs, first=first)
    return tokens, [group for layer, tally in tallies.items() for group in tally.groups(layer)]


def open_model(run: Path, variant: str | None) -> StarLM:
    """The model in a run or checkpoint folder; of a variant with layers of its own if that is named."""
    if variant is None:
        return load_model(run)
    folder = find_checkpoint(run)
    model = builder(variant)(read_model_config(folder))
    load_weights(model, folder)
    return model.eval()


def name_of(run: Path) -> str:
    """What results call a run; a checkpoint that is named has the name of its run before its own."""
    folder = run.resolve()
    return (
        f"{folder.parent.parent.name}-{folder.name}" if folder.parent.name == "checkpoints" else folder.name
    )


def main() -> None:
    """Measure one run."""
    options = parser(__doc__)
    options.add_argument("run", type=Path, help="run or checkpoint folder")
    options.add_argument(
        "--data", type=Path, required=True, help="prepared data; its validation split is read"
    )
    options.add_argument("--variant", choices=NAMES, metavar="VARIANT", help="of runs of experiments.lm")
    options.add_argument("--tokens", type=within(int, 1), default=65536)
    options.add_argument("--out", type=Path, default=RESULTS)
    args = options.parse_args()
    model = open_model(args.run, args.variant)
    tokens, groups = measure(model, TokenData.open(args.data).splits["validation"], args.tokens)
    data = {
        "run": args.run.resolve().name,
        "checkpoint": find_checkpoint(args.run).name,
        "tokens": tokens,
        "context": model.config.context,
        "preset": model.config.preset,
        "layers": [LAYERS[letter] for letter in model.config.layer_kinds],
        "bins": BINS[: max((len(group.reach.histogram) for group in groups), default=0)],
        "groups": [asdict(group) for group in groups],
    }
    path = args.out / f"{name_of(args.run)}.json"
    save(path, data)
    write_histograms(data, path.with_suffix(".png"))
    for group in groups:
        reach = group.reach
        print(
            f"layer {group.layer + 1}  {group.kind:8} median {reach.median:5,}  90 % {reach.p90:6,}  "
            f"max {reach.max:6,}  nothing {reach.nothing:.1%}"
        )
    print(path)


if __name__ == "__main__":
    start(main)
