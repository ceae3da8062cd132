"""Pretraining, from top to bottom.

    summary = train(TrainConfig(data=Path("data"), out=Path("runs/base"), steps=300))

Every event is a record: appended to metrics.jsonl, and given to `on_record`.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from starlm.data.loader import PackedLoader
from starlm.data.shards import TokenData
from starlm.data.tokenizer import Tokenizer
from starlm.device import has_bfloat16, pick_device
from starlm.errors import InputError, StarLMError
from starlm.evaluate.bits_per_byte import evaluate
from starlm.files import only_writer
from starlm.generate.text import TextModel
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.train.config import TrainConfig
from starlm.train.optim import Optimizers
from starlm.train.run import Run

SAMPLE_TOKENS = 96


class Interrupted(StarLMError):
    """The user stopped the run; a checkpoint was written."""

    exit_code = 130


def train(
    config: TrainConfig,
    *,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
    build: Callable[[StarLMConfig], StarLM] = StarLM,
) -> dict:
    """Train until the horizon; go on where `config.out` was, if it holds a run.

    Args:
        on_record: called with every record of metrics.jsonl as it is written. Kinds: plan, step, validation,
            sample, checkpoint, end.
        build: makes the model, for experiments that change more than the config can say.

    Returns:
        The last record, of kind "end": steps, tokens, seconds, loss, bits_per_byte, checkpoint.

    Raises:
        InputError: unusable data, settings or run folder, or another process that trains in it.
        StarLMError: the loss is no longer finite; the last checkpoint is kept.
        Interrupted: SIGINT or SIGTERM; the state was saved first.
    """
    run = Run(config)
    with only_writer(run.folder):
        return _train(run, on_record, build)


def _train(
    run: Run,
    on_record: Callable[[dict[str, Any]], None],
    build: Callable[[StarLMConfig], StarLM],
) -> dict:
    config = run.config
    # 1. What there is: data, tokenizer, device, an earlier session.
    data = TokenData.open(config.data)
    training, validation = data.splits["train"], data.splits["validation"]
    tokenizer = Tokenizer.load(config.data)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise InputError(
            f"The data in {config.data} has a vocabulary of {tokenizer.vocab_size} tokens, the model one of "
            f"{config.model.vocab_size}. Set model.vocab_size to {tokenizer.vocab_size} or leave it out, or "
            f"prepare other data."
        )
    device = pick_device(config.device)
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and has_bfloat16(device))
    num_steps, start = config.num_steps, run.last_step()
    if start > num_steps:
        raise InputError(
            f"{run.folder} is at step {start} already, beyond the horizon of {num_steps} steps. Give a "
            f"horizon of {start} steps or more, or another --out for a new run."
        )

    # 2. Model, optimizers, and what the last checkpoint remembers of them.
    torch.manual_seed(config.seed)
    model = build(config.model).to(device)
    optimizers = Optimizers(model, config.optim)
    before = {"seconds": 0.0, "data": training.fingerprint}
    if start:
        before |= run.load(model, optimizers)
    if before["data"] != training.fingerprint:
        raise InputError(
            f"{run.folder} was trained on other data than {config.data} now holds. Prepare the data as it "
            f"was, or choose another --out for a new run."
        )
    seconds = before["seconds"]
    loss_of = torch.compile(model.loss) if config.compile else model.loss
    text_model = TextModel(model, tokenizer)
    run.begin(tokenizer, start)

    def emit(kind: str, **values: Any) -> dict[str, Any]:
        record = {"kind": kind, **values}
        run.record(record)
        on_record(record)
        return record

    def save(step: int) -> Path:
        extra = {"seconds": seconds, "data": training.fingerprint}
        path = run.save(step, model, optimizers, tokenizer, extra)
        emit("checkpoint", step=step, path=str(path))
        return path

    def validate(step: int) -> dict[str, float]:
        result = evaluate(
            model,
            validation,
            tokenizer,
            max_tokens=config.eval_tokens or None,
            precision="bfloat16" if bfloat16 else "float32",
        )
        emit("validation", step=step, **result)
        return result

    def sample(step: int) -> None:
        model.eval()
        for prompt in config.sample_prompts:
            text = text_model.generate(prompt, max_tokens=SAMPLE_TOKENS, temperature=0.7, top_p=0.95, seed=0)
            emit("sample", step=step, prompt=prompt, text=text)
        model.train()

    emit(
        "plan",
        step=start,
        steps=num_steps,
        start_step=start,
        parameters=config.model.num_parameters,
        flops_per_token=config.model.flops_per_token(),
        device=str(device),
        precision="bfloat16" if bfloat16 else "float32",
        threads=torch.get_num_threads(),
        resumed=start > 0,
        time=time.time(),
    )

    # 3. The steps.
    rows = config.micro_rows or config.rows
    loader = PackedLoader(
        training,
        rows=config.rows,
        length=config.model.context,
        seed=config.seed,
        workers=config.workers,
    )
    model.train()
    with closing(loader.batches(start)) as batches, _stop_signal() as stopped:
        for step in range(start, num_steps):
            began = time.perf_counter()
            batch = next(batches)
            tensors = [torch.from_numpy(array) for array in (batch.inputs, batch.targets, batch.first)]
            losses = []
            for pieces in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
                inputs, targets, first = (piece.to(device) for piece in pieces)
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    loss = loss_of(inputs, targets, first=first)
                (loss * (rows / config.rows)).backward()
                losses.append(loss.detach())
            loss = torch.stack(losses).mean().item()
            norm = _clip(model, config.optim.clip)
            _require_finite(loss, norm, step + 1, run)
            share = optimizers.step(step, num_steps)
            elapsed = time.perf_counter() - began
            seconds += elapsed
            done = step + 1
            emit(
                "step",
                step=done,
                loss=loss,
                lr=share,
                grad_norm=norm,
                tokens=done * config.batch_tokens,
                tokens_per_second=config.batch_tokens / elapsed,
                seconds=seconds,
            )
            if done < num_steps:
                if config.eval_every and done % config.eval_every == 0:
                    validate(done)
                if config.sample_every and done % config.sample_every == 0:
                    sample(done)
                # Looked at once: who is told to stop must find a checkpoint.
                stop = stopped()
                if stop or (config.save_every and done % config.save_every == 0):
                    save(done)
                if stop:
                    raise Interrupted(f"Stopped at step {done} of {num_steps}; saved. Run it again to go on.")

    # 4. The end: the last checkpoint, then what only looks at the model: an interruption there costs nothing.
    path = save(num_steps) if num_steps > start else run.folder / "checkpoints" / f"step-{start:06d}"
    result = validate(num_steps)
    sample(num_steps)
    tokens = num_steps * config.batch_tokens
    return emit(
        "end", step=num_steps, seconds=seconds, **result | {"tokens": tokens, "checkpoint": str(path)}
    )


def _clip(model: StarLM, limit: float) -> float:
    """Clip the whole gradient to norm `limit` (0: leave it); its norm before."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf).item()


def _require_finite(loss: float, norm: float, step: int, run: Run) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = run.last_step()
    good = f"The checkpoint of step {kept} is kept" if kept else "No checkpoint had been written yet"
    raise StarLMError(
        f"Training stopped at step {step}: the loss is {loss}, the norm of its gradient {norm}. {good} in "
        f"{run.folder}. Lower optim.matrix_lr or optim.embedding_lr, set optim.warmup, or use "
        f"precision=float32, with another --out."
    )


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come, so that the loop can end behind a whole step.

    A second signal acts as it would without us. Off the main thread signals are left alone.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def remember(number: int, frame: Any) -> None:
        received.append(number)
        for each in numbers:
            signal.signal(each, before[each])

    for number in numbers:
        signal.signal(number, remember)
    try:
        yield lambda: bool(received)
    finally:
        for number in numbers:
            signal.signal(number, before[number])
