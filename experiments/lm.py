"""Train one variant and measure it: one JSON file per run.

    python -m experiments.lm star transformer --steps 300 --seeds 0 1 2 --rates 0.01 0.02 0.04

Runs that have a result are skipped, a run that was cut off goes on from its last checkpoint.
"""

import argparse
from pathlib import Path

import torch

from experiments import corpora
from experiments.measure import by_position_and_recall
from experiments.program import parser, start, unusual, within
from experiments.store import save, taken
from experiments.variants import NAMES, builder, settings
from starlm.data.shards import TokenData
from starlm.device import pick_device
from starlm.model.checkpoint import load_weights
from starlm.model.config import StarLMConfig
from starlm.report.metrics import read_run
from starlm.train.config import OptimConfig, TrainConfig
from starlm.train.loop import train

RESULTS = Path(__file__).parent / "results" / "lm"
BATCH = 4096


def run(name: str, args: argparse.Namespace, seed: int, rate: float) -> Path:
    """Train and measure one variant; the path of its result."""
    size = f"w{args.width}-l{args.depth}-t{args.length}-s{args.steps}" + unusual(args, b=("batch", BATCH))
    shifts = unusual(args, shift=("shift_rate", OptimConfig().shift_lr))
    precision = "" if args.precision == "float32" else f"-{args.precision}"
    corpus = corpora.name_of(args.corpus, args.vocab)
    key = f"{corpus}-{name}-{size}-lr{rate}{shifts}{precision}-seed{seed}"
    asked = {
        "variant": name,
        "corpus": args.corpus,
        "vocab": args.vocab,
        "width": args.width,
        "depth": args.depth,
        "length": args.length,
        "steps": args.steps,
        "matrix_lr": rate,
        "shift_lr": args.shift_rate,
        "seed": seed,
        "batch_tokens": args.batch,
        "precision": args.precision,
        "eval_tokens": args.eval_tokens,
    }
    result = RESULTS / f"{key}.json"
    if taken(result, asked):
        return result
    torch.set_num_threads(args.threads)
    data = corpora.folder(args.corpus, path=args.corpus_path, vocab=args.vocab)
    vocab = TokenData.open(data).vocab_size
    config = TrainConfig(
        data=data,
        # A run that goes on is validated on the same tokens all the way.
        out=corpora.WORK / f"{key}-e{args.eval_tokens}",
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
        **asked,
        "tokens": end["tokens"],
        "layers": model.config.layer_kinds,
        "device": torch.cuda.get_device_name() if pick_device(args.device).type == "cuda" else "cpu",
        "parameters": {
            "blocks": sum(p.numel() for p in model.blocks.parameters()),
            "total": sum(p.numel() for p in model.parameters()),
        },
        "loss": end["loss"],
        "bits_per_byte": end["bits_per_byte"],
        "tokens_per_second_median": sorted(seconds)[len(seconds) // 2] if seconds else None,
        "curve": curve,
        **split,
    }
    save(result, record)
    return result


def main() -> None:
    """Run every combination that was asked for, in order."""
    options, whole = parser(__doc__), within(int, 1)
    options.add_argument(
        "variants",
        nargs="+",
        choices=NAMES,
        metavar="variant",
        help="a name in experiments/variants.py, with or without what becomes of its shifts: star+static",
    )
    options.add_argument("--steps", type=whole, default=300)
    options.add_argument("--width", type=whole, default=256)
    options.add_argument("--depth", type=whole, default=6)
    options.add_argument("--length", type=whole, default=512)
    options.add_argument("--batch", type=whole, default=BATCH, help="tokens per step")
    options.add_argument("--vocab", type=whole, default=corpora.VOCAB)
    options.add_argument("--seeds", type=within(int, 0), nargs="+", default=[0])
    options.add_argument("--rates", type=float, nargs="+", default=[0.02], help="Muon's learning rates")
    options.add_argument(
        "--shift-rate",
        type=float,
        default=OptimConfig().shift_lr,
        help="the shift projections' over the others'",
    )
    options.add_argument("--eval-every", type=within(int, 0), default=150)
    options.add_argument("--eval-tokens", type=whole, default=65536, help="of the validation split")
    options.add_argument("--save-every", type=within(int, 0), default=50, help="steps between checkpoints")
    options.add_argument("--threads", type=whole, default=1)
    options.add_argument("--device", default="cpu", help="cpu, cuda, or cuda:N")
    options.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    options.add_argument("--corpus", default="embedded", help="embedded, packages, or a name of your own")
    options.add_argument("--corpus-path", help="text file or folder of your own corpus")
    args = options.parse_args()
    for seed in args.seeds:
        for rate in args.rates:
            for name in args.variants:
                run(name, args, seed, rate)


if __name__ == "__main__":
    start(main)
