"""A fact a million tokens back: train at T = 1024, then read a million tokens and ask.

    python -m experiments.needle --length 1000000

A fact is one key token and one answer token, put into ordinary text (the embedded corpus); at the end the key
comes again and the model must say the answer. Prints time per token and memory along the way.
"""

import time
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

from experiments import corpora
from experiments.program import parser, start, unusual, within
from experiments.store import save, taken
from experiments.variants import DECODING, builder, settings
from starlm.data.shards import Split, TokenData
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.train.config import OptimConfig
from starlm.train.optim import Optimizers

RESULTS = Path(__file__).parent / "results" / "needle"
FACTS, TRAINED = 64, 1024
STEPS, WIDTH, DEPTH, DEPTHS = 300, 64, 2, [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]


def text(split: Split) -> np.ndarray:
    """All tokens of a split in stored order."""
    lengths = split.document_lengths()
    out = np.empty(int(lengths.sum()), np.int64)
    at = 0
    for number, length in enumerate(lengths):
        split.read(number, 0, int(length), out[at : at + length])
        at += length
    return out


def with_facts(
    stream: np.ndarray,
    rng: np.random.Generator,
    length: int,
    vocab: int,
    count: int,
    depth: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`length` tokens of text that hold `count` facts, their keys last, and the answers in that order.

    Args:
        vocab: ids from here on are keys, and answers behind them: the text has neither.
        depth: where the facts lie: 0 at the beginning, 1 at the end; None is anywhere.
    """
    tokens = np.resize(np.roll(stream, -rng.integers(0, len(stream))), length)
    places = (length - count) // 2
    at = 2 * (
        rng.permutation(places)[:count] if depth is None else int(depth * (places - count)) + np.arange(count)
    )
    keys = vocab + rng.permutation(FACTS)[:count]
    answers = vocab + FACTS + rng.integers(0, FACTS, count)
    tokens[at], tokens[at + 1], tokens[-count:] = keys, answers, keys
    return tokens, answers


def train(model: StarLM, stream: np.ndarray, vocab: int, rng: np.random.Generator, steps: int) -> float:
    """Train on 16 facts in 1024 tokens; the share of the last 20 batches' answers that were right."""
    optimizers = Optimizers(model, OptimConfig())
    right = []
    for step in range(steps):
        rows, answers = zip(*(with_facts(stream, rng, TRAINED, vocab, 16) for _ in range(8)), strict=True)
        logits = model.logits(model.hidden(torch.from_numpy(np.stack(rows)))[:, -16:]).flatten(0, 1)
        wanted = torch.from_numpy(np.concatenate(answers))
        nn.functional.cross_entropy(logits, wanted).backward()
        optimizers.step(step, steps)
        right.append((logits.argmax(-1) == wanted).float().mean().item())
    return float(np.mean(right[-20:]))


@torch.inference_mode()
def ask(model: StarLM, tokens: np.ndarray, report: bool) -> tuple[int, list[dict]]:
    """The model's answer after reading all tokens through the decode state, and measurements on the way."""
    state, notes, process = model.new_state(rollback=0), [], psutil.Process()
    began, last = time.perf_counter(), 0
    logits = None
    for begin in range(0, len(tokens), 1000):
        logits = model(torch.from_numpy(tokens[None, begin : begin + 1000]), state=state, last_only=True)
        done = min(begin + 1000, len(tokens))
        if report and (done - last >= len(tokens) // 10 or done == len(tokens)):
            # One token alone, as generation would read it; taken back afterwards.
            spare = state.fork()
            times = []
            for _ in range(20):
                start = time.perf_counter()
                model(torch.tensor([[int(tokens[0])]]), state=spare)
                times.append(time.perf_counter() - start)
            note = {
                "tokens": done,
                "prefill_us_per_token": (time.perf_counter() - began) / (done - last) * 1e6,
                "decode_ms_per_token": float(np.median(times)) * 1e3,
                "state_MiB": state.num_bytes / 2**20,
                "process_MiB": process.memory_info().rss / 2**20,
            }
            notes.append({name: round(value, 3) for name, value in note.items()})
            print(notes[-1], flush=True)
            began, last = time.perf_counter(), done
    assert logits is not None
    return int(logits.argmax()), notes


def main() -> None:
    """Train, then ask at several depths of a long text."""
    options, whole = parser(__doc__), within(int, 1)
    options.add_argument(
        "--variant", choices=DECODING, metavar="VARIANT", default="star", help=", ".join(DECODING)
    )
    options.add_argument("--length", type=within(int, 4), default=1_000_000)
    options.add_argument(
        "--depths", type=within(float, 0, 1), nargs="+", default=DEPTHS, help="0 is the beginning"
    )
    options.add_argument("--steps", type=whole, default=STEPS)
    options.add_argument("--width", type=whole, default=WIDTH)
    options.add_argument("--depth", type=whole, default=DEPTH, help="layers of the model")
    options.add_argument("--seed", type=within(int, 0), default=0)
    options.add_argument("--threads", type=whole, default=2)
    args = options.parse_args()
    asked = {
        "variant": args.variant,
        "length": args.length,
        "width": args.width,
        "depth": args.depth,
        "steps": args.steps,
        "depths": args.depths,
        "seed": args.seed,
    }
    other = unusual(args, w=("width", WIDTH), l=("depth", DEPTH), s=("steps", STEPS))
    path = RESULTS / f"{args.variant}-{args.length}{other}-seed{args.seed}.json"
    if taken(path, asked):
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = TokenData.open(corpora.folder("embedded"))
    vocab, rng = data.vocab_size, np.random.default_rng(args.seed)
    shape = {**settings(args.variant), "depth": args.depth, "dim": args.width}
    model = builder(args.variant)(StarLMConfig(vocab_size=vocab + 2 * FACTS, context=TRAINED, **shape))
    share = train(model, text(data.splits["train"]), vocab, rng, args.steps)
    print(f"trained at {TRAINED}: {share:.3f} of the answers right", flush=True)
    held_out, found = text(data.splits["validation"]), {}
    measured: list[dict] = []
    for number, depth in enumerate(args.depths):
        tokens, (answer,) = with_facts(held_out, rng, args.length, vocab, 1, depth)
        said, notes = ask(model, tokens, report=number == 0)
        measured = measured or notes
        found[depth] = said == int(answer)
        print(f"fact at depth {depth}: {'found' if found[depth] else 'not found'}", flush=True)
    result = {
        **asked,
        "trained_at": TRAINED,
        "trained_accuracy": share,
        "found": found,
        "along_the_way": measured,
    }
    save(path, result)


if __name__ == "__main__":
    start(main)
