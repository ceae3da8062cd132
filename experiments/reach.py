"""How far back the heads of a trained model read, per layer and kind, over validation data.

    python -m experiments.reach runs/demo --data data/demo --tokens 65536

Writes NAME.json and NAME.png into `results/reach`.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.store import save
from starlm.data.loader import sequential_rows
from starlm.data.shards import Split, TokenData
from starlm.evaluate.reads import BINS, LAYERS, GroupReads, Tally, watching
from starlm.model.checkpoint import load_model
from starlm.model.folder import find_checkpoint
from starlm.model.model import StarLM
from starlm.report.reads_plot import write_histograms

RESULTS = Path(__file__).parent / "results" / "reach"


@torch.inference_mode()
def measure(model: StarLM, split: Split, max_tokens: int) -> list[GroupReads]:
    """Reach by layer and kind, documents packed into rows of `context` tokens as in training.

    A document that does not fit into one row is cut, and its second part reads no row of the first.
    """
    tallies: dict[int, Tally] = {}
    for batch in sequential_rows(split, model.config.context, max_tokens=max_tokens, rows=8):
        inputs, targets, first = map(torch.from_numpy, (batch.inputs, batch.targets, batch.first))
        real = targets >= 0

        def see(layer, heads, found, real=real):
            tallies.setdefault(layer, Tally(heads)).add(found, counted=real)

        with watching(model, see):
            model.hidden(inputs, first=first)
    return [group for layer, tally in tallies.items() for group in tally.groups(layer)]


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run or checkpoint folder")
    parser.add_argument(
        "--data", type=Path, required=True, help="prepared data; its validation split is read"
    )
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    model = load_model(args.run)
    groups = measure(model, TokenData.open(args.data).splits["validation"], args.tokens)
    data = {
        "run": args.run.name,
        "checkpoint": find_checkpoint(args.run).name,
        "tokens": args.tokens,
        "context": model.config.context,
        "preset": model.config.preset,
        "layers": [LAYERS[letter] for letter in model.config.layer_kinds],
        "bins": BINS[: max((len(group.reach.histogram) for group in groups), default=0)],
        "groups": [asdict(group) for group in groups],
    }
    path = args.out / f"{args.run.name}.json"
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
    main()
