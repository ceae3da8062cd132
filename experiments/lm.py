"""Train one variant and measure it: one JSON file per run.

    python -m experiments.lm star transformer --steps 300 --seeds 0 1 2 --rates 0.01 0.02 0.04

Runs that have a result are skipped, a run that was cut off goes on from its last checkpoint.
"""

import argparse
from pathlib import Path
from typing import Literal

import torch

from experiments import packages
from experiments.measure import by_position_and_recall
from experiments.store import save
from experiments.variants import NAMES, builder, settings
from starlm.data.prepare import prepare
from starlm.data.shards import TokenData
from starlm.device import pick_device
from starlm.errors import StarLMError
from starlm.model.checkpoint import load_weights
from starlm.model.config import StarLMConfig
from starlm.report.metrics import read_run
from starlm.train.config import OptimConfig, TrainConfig
from starlm.train.loop import train

RESULTS = Path(__file__).parent / "results" / "lm"
WORK = Path("runs/experiments")
BATCH = 4096
# Whole files, so that the tokens that are measured come from all of the corpus: how much of it is held out.
HELD_OUT = {"packages": 0.01}


def run(name: str, args: argparse.Namespace, seed: int, rate: float) -> Path:
    """Train and measure one variant; the path of its result."""
    shifts = "" if args.shift_rate == OptimConfig().shift_lr else f"-shift{args.shift_rate}"
    size = f"w{args.width}-l{args.depth}-t{args.length}-s{args.steps}"
    batch = "" if args.batch == BATCH else f"-b{args.batch}"
    precision = "" if args.precision == "float32" else f"-{args.precision}"
    key = f"{args.corpus}-{name}-{size}{batch}-lr{rate}{shifts}{precision}-seed{seed}"
    result = RESULTS / f"{key}.json"
    if result.is_file():
        return result
    torch.set_num_threads(args.threads)
    data = WORK / "data" / args.corpus
    if not data.exists():
        prepare(
            _sources(args), data, vocab_size=args.vocab, validation_fraction=HELD_OUT.get(args.corpus, 0.05)
        )
    vocab = TokenData.open(data).vocab_size
    config = TrainConfig(
        data=data,
        out=WORK / key,
        model=StarLMConfig(
            vocab_size=vocab, depth=args.depth, dim=args.width, context=args.length, **settings(name)
        ),
        optim=OptimConfig(matrix_lr=rate, shift_lr=args.shift_rate),
        batch_tokens=args.batch,
        steps=args.steps,
        eval_every=args.eval_every,
        eval_tokens=args.eval_tokens,
        save_every=args.save_every,
        keep=1,
        sample_prompts=(),
        precision=args.precision,
        device=args.device,
        seed=seed,
    )

    def note(record: dict) -> None:
        if record["kind"] == "validation":
            print(f"{key}: step {record['step']} loss {record['loss']:.4f}", flush=True)

    build = builder(name)
    end = train(config, on_record=note, build=build)
    model = build(config.model).to(pick_device(args.device)).eval()
    load_weights(model, Path(end["checkpoint"]))
    split = by_position_and_recall(model, TokenData.open(data).splits["validation"], args.eval_tokens)
    # From the run's own record, which knows of the sessions before this one.
    metrics = read_run(config.out)
    curve = [(r["step"], round(r["loss"], 4)) for r in metrics.validations]
    seconds = [r["tokens_per_second"] for r in metrics.steps]
    record = {
        "variant": name,
        "corpus": args.corpus,
        "width": args.width,
        "depth": args.depth,
        "length": args.length,
        "steps": args.steps,
        "tokens": end["tokens"],
        "matrix_lr": rate,
        "shift_lr": config.optim.shift_lr,
        "seed": seed,
        "batch_tokens": args.batch,
        "precision": args.precision,
        "device": torch.cuda.get_device_name() if pick_device(args.device).type == "cuda" else "cpu",
        "parameters": {
            "blocks": sum(p.numel() for p in model.blocks.parameters()),
            "total": sum(p.numel() for p in model.parameters()),
        },
        "eval_tokens": args.eval_tokens,
        "loss": end["loss"],
        "bits_per_byte": end["bits_per_byte"],
        "tokens_per_second_median": sorted(seconds)[len(seconds) // 2] if seconds else None,
        "curve": curve,
        **split,
    }
    save(result, record)
    return result


def _sources(args: argparse.Namespace) -> Literal["embedded"] | list[str | Path]:
    if args.corpus == "embedded":
        return "embedded"
    return [*packages.sources()] if args.corpus == "packages" else [args.corpus_path]


def main() -> None:
    """Run every combination that was asked for, in order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "variants",
        nargs="+",
        choices=NAMES,
        metavar="variant",
        help="a name in experiments/variants.py, with or without what becomes of its shifts: star+static",
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=BATCH, help="tokens per step")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02], help="Muon's learning rates")
    parser.add_argument(
        "--shift-rate",
        type=float,
        default=OptimConfig().shift_lr,
        help="the shift projections' over the others'",
    )
    parser.add_argument("--eval-every", type=int, default=150)
    parser.add_argument("--eval-tokens", type=int, default=65536, help="of the validation split")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or cuda:N")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--corpus", default="embedded", help="embedded, packages, or a name of your own")
    parser.add_argument("--corpus-path", help="text file or folder of your own corpus")
    args = parser.parse_args()
    try:
        for seed in args.seeds:
            for rate in args.rates:
                for name in args.variants:
                    run(name, args, seed, rate)
    except StarLMError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
