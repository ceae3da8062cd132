"""Pretraining, from top to bottom.

    summary = train(TrainConfig(data=Path("data"), out=Path("runs/base"), steps=300))

Every event is a record: appended to metrics.jsonl, and given to `on_record`.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from starlm.data.conversations import Message
from starlm.data.loader import Batch, PackedLoader, SequentialLoader, check_tokens
from starlm.data.shards import TokenData
from starlm.data.tokenizer import Tokenizer
from starlm.device import pick_device
from starlm.errors import InputError, StarLMError
from starlm.evaluate.bits_per_byte import evaluate
from starlm.files import only_writer
from starlm.generate.chat import answer, own_template, speaker
from starlm.generate.engine import Engine
from starlm.generate.sampling import Sampling
from starlm.generate.text import TextModel
from starlm.model.checkpoint import load_weights
from starlm.model.config import StarLMConfig
from starlm.model.folder import CONFIG, find_checkpoint, read_json, read_model_config, verify
from starlm.model.model import StarLM
from starlm.settings import to_dict
from starlm.train.config import TrainConfig
from starlm.train.optim import Optimizers
from starlm.train.run import Run, differences
from starlm.train.step import TrainingStep

Record = dict[str, Any]

SAMPLE_TOKENS = 96
_BUILDING = threading.Lock()


class Interrupted(StarLMError):
    """A signal stopped the run; a checkpoint was written."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        """Args: number: of the signal."""
        super().__init__(message)
        # As shells have it of a process that a signal ends.
        self.exit_code = 128 + number


def train(
    config: TrainConfig,
    *,
    on_record: Callable[[Record], None] = lambda record: None,
    build: Callable[[StarLMConfig], StarLM] = StarLM,
) -> Record:
    """Train until the horizon; go on where `config.out` was, if it holds a run.

    Args:
        on_record: called with every record of metrics.jsonl as it is written. Kinds: plan, step, validation,
            sample, checkpoint, end.
        build: makes the model, for experiments that change more than the config can say.

    Returns:
        The last record, of kind "end": step, seconds, tokens (trained on), loss and bits_per_byte on
        validation_tokens and validation_bytes of a split of validation_split_tokens, checkpoint, chat
        (whether the model has learned conversations).

    Raises:
        InputError: unusable data, settings or run folder, or another process that trains in it.
        StarLMError: the loss is no longer finite, or the disk is full; the last checkpoint is kept.
        Interrupted: SIGINT or SIGTERM; the state was saved first.
    """
    run = Run(config)
    with only_writer(run.folder):
        return _Session(run, on_record, build).train()


class _Session:
    """One process at work on a run: from the last checkpoint to the horizon, or until it is told to stop."""

    def __init__(
        self, run: Run, on_record: Callable[[Record], None], build: Callable[[StarLMConfig], StarLM]
    ) -> None:
        config = self.config = run.config
        self.run, self.on_record = run, on_record
        self.data = TokenData.open(config.data)
        self.tokenizer = Tokenizer.load(config.data)
        if self.tokenizer.vocab_size != config.model.vocab_size and config.init_from is None:
            vocab = self.tokenizer.vocab_size
            raise InputError(
                f"The data in {config.data} has a vocabulary of {vocab} tokens, the model one of "
                f"{config.model.vocab_size}. Set model.vocab_size to {vocab} or leave it out, or prepare "
                f"other data."
            )
        self.start = self.done = run.last_step()
        # Asked for once: of a horizon in epochs the data are read.
        self.horizon = config.num_steps
        if self.start > self.horizon:
            raise InputError(
                f"{run.folder} is at step {self.start} already, beyond the horizon of {self.horizon} "
                f"steps. Give a horizon of {self.start} steps or more, or another --out for a new run."
            )
        self.device = pick_device(config.device)
        self.precision = run.precision
        # The generator is the process's: other runs must not draw from it in between, and it is the caller's.
        with _BUILDING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = build(config.model).to(self.device)
        self.optimizers = Optimizers(self.model, config.optim, precision=self.precision)
        self.step = TrainingStep(
            self.model,
            self.optimizers,
            torch.compile(self.model.loss) if config.compile else self.model.loss,
            precision=self.precision,
            clip=config.optim.clip,
            parts=config.rows // (config.micro_rows or config.rows),
            graph=config.cuda_graph,
        )
        self.fingerprint, self.seconds = self.data.splits["train"].fingerprint, 0.0
        self.chat = self.data.splits["train"].conversations
        self.loader = PackedLoader(
            self.data.splits["train"],
            rows=config.rows,
            length=config.model.context,
            seed=config.seed,
            workers=config.workers,
        )
        # Conversations of which nothing can be measured are found out before hours of training.
        SequentialLoader(self.data.splits["validation"], config.model.context)
        if self.start:
            self._go_on()
        elif config.init_from is not None:
            self._begin_from(config.init_from)

    def _begin_from(self, path: Path) -> None:
        """Take over the weights of another model: the same one, but for the length of its rows."""
        folder = find_checkpoint(path)
        verify(folder)
        theirs, ours = map(_settled, (read_model_config(folder), self.config.model))
        if changed := differences(theirs, ours, "model."):
            said = "; ".join(f"{name} is {a!r} there, {b!r} here" for name, a, b in changed)
            raise InputError(
                f"{folder} holds another model: {said}. Leave these settings out to take its own (in Python: "
                f"model=starlm.model.folder.read_model_config(Path({str(folder)!r}))), or train a new model "
                f"without init_from."
            )
        if Tokenizer.load(folder).fingerprint != self.tokenizer.fingerprint:
            raise InputError(
                f"{folder} and the data in {self.config.data} have different tokenizers, so its weights mean "
                f"other tokens. Prepare the data with its own: starlm data prepare ... --tokenizer {path}"
            )
        load_weights(self.model, folder)
        self.chat |= read_json(folder / CONFIG).get("chat") is True

    def _go_on(self) -> None:
        """Take over what the last checkpoint holds."""
        before = self.run.load(self.model, self.optimizers)
        if before["data"] != self.fingerprint:
            raise InputError(
                f"{self.run.folder} was trained on other data than {self.config.data} now holds. Prepare "
                f"the data as it was, or choose another --out for a new run."
            )
        self.seconds = before["seconds"]
        self.chat |= read_json(self.run.checkpoint(self.start) / CONFIG).get("chat") is True

    def train(self) -> Record:
        """All steps that are left; the last record."""
        config, horizon = self.config, self.horizon
        before = next((r for r in reversed(self.run.records()) if r.get("kind") == "plan"), {})
        self.run.begin(self.tokenizer, self.start, horizon)
        self._tell_plan(before)
        self.model.train()
        if not self.start and config.init_from is not None:
            # What the weights know of this text before it is learned.
            self._validate()
        if 0 < self.start < horizon:
            # Of a run that was killed behind its last checkpoint, and is longer now.
            self._look([record for record in self.run.records() if record.get("step") == self.start])
        with closing(self.loader.batches(self.start)) as batches, _stop_signal() as stopped:
            while self.done < horizon:
                self._step(next(batches))
                # At the end, what only looks at the model comes behind the checkpoint: an interruption there
                # costs nothing.
                if self.done < horizon:
                    self._look()
                save = stopped() or self.done == horizon or self._is_due(config.save_every)
                if save:
                    self._save()
                # Who is told to stop must find a checkpoint.
                if save and (number := stopped()):
                    raise Interrupted(
                        f"Stopped at step {self.done} of {horizon}; saved. Run it again to go on.", number
                    )
        result = self._validate()
        self._sample()
        return self._emit(
            "end",
            seconds=self.seconds,
            tokens=horizon * config.batch_tokens,
            loss=result["loss"],
            bits_per_byte=result["bits_per_byte"],
            **{f"validation_{name}": result[name] for name in ("tokens", "bytes", "split_tokens")},
            checkpoint=str(self.run.checkpoint(horizon)),
            chat=self.chat,
        )

    def _look(self, done: Sequence[Record] = ()) -> None:
        """Validate and write samples, what of it is due and not among the records `done`."""
        if self._is_due(self.config.eval_every) and not any(r["kind"] == "validation" for r in done):
            self._validate()
        if self._is_due(self.config.sample_every):
            self._sample(done)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.done % every == 0

    def _step(self, batch: Batch) -> None:
        """One step of the optimizers, and its record."""
        with self._kept():
            check_tokens(batch, self.data.splits["train"], self.tokenizer.vocab_size)
        began, config = time.perf_counter(), self.config
        share = self.optimizers.schedule(self.done, self.horizon)
        loss, norm = self.step(batch)
        _require_finite(loss, norm, self.done + 1, self.run)
        elapsed = time.perf_counter() - began
        self.done, self.seconds = self.done + 1, self.seconds + elapsed
        self._emit(
            "step",
            loss=loss,
            lr=share,
            grad_norm=norm,
            tokens=self.done * config.batch_tokens,
            tokens_per_second=config.batch_tokens / elapsed,
            seconds=self.seconds,
        )

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """What is done is saved if the data turn out to be damaged."""
        try:
            yield
        except InputError:
            if self.done > self.run.last_step():
                self._save()
            raise

    def _validate(self) -> Record:
        most = self.config.eval_tokens or None
        validation = self.data.splits["validation"]
        with self._kept():
            result = evaluate(
                self.model, validation, self.tokenizer, max_tokens=most, precision=self.precision
            )
        self._emit("validation", **result)
        return result

    def _sample(self, done: Sequence[Record] = ()) -> None:
        written = {record["prompt"] for record in done if record["kind"] == "sample"}
        self.model.eval()
        text_model = speaker(TextModel(self.model, self.tokenizer))
        render = own_template(self.tokenizer) if self.chat else None
        for prompt in self.config.sample_prompts:
            if prompt in written:
                continue
            engine = Engine(text_model, slots=1, cache_bytes=0)
            pieces = answer(
                engine,
                [Message("user", prompt)],
                render=render,
                max_tokens=SAMPLE_TOKENS,
                sampling=Sampling(temperature=0.7, top_p=0.95, seed=0),
            )
            text = "".join(piece.text for piece in pieces)
            self._emit("sample", prompt=prompt, text=text, chat=self.chat)
        self.model.train()

    def _save(self) -> Path:
        extra = {"seconds": self.seconds, "data": self.fingerprint}
        path = self.run.save(self.done, self.model, self.optimizers, self.tokenizer, extra, chat=self.chat)
        self._emit("checkpoint", path=str(path))
        return path

    def _tell_plan(self, before: Record) -> None:
        """Args: before: the plan of the session before, if there was one."""
        self._emit(
            "plan",
            steps=self.horizon,
            start_step=self.start,
            epochs=self.horizon * self.config.batch_tokens / self.loader.epoch_tokens,
            matrix_lr=self.config.optim.matrix_rate(self.horizon),
            # Where the settings say 0, as follows from the depth.
            model={"dim": self.config.model.width, "heads": self.config.model.num_heads},
            layers=self.config.model.layer_kinds,
            parameters=self.config.model.num_parameters,
            flops_per_token=self.config.model.flops_per_token(),
            device=str(self.device),
            precision=self.precision,
            threads=torch.get_num_threads(),
            resumed=self.start > 0,
            # Another horizon bends the schedule where it stands.
            horizon_before=(before if self.start else {}).get("steps", self.horizon),
            time=time.time(),
        )

    def _emit(self, kind: str, **values: Any) -> Record:
        record = {"kind": kind, "step": self.done, **values}
        self.run.record(record)
        self.on_record(record)
        return record


def _settled(model: StarLMConfig) -> dict[str, Any]:
    """The settings that models must share to share weights; what follows from others is written out."""
    values = {**to_dict(model), "dim": model.width, "heads": model.num_heads}
    del values["context"]
    return values


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
def _stop_signal() -> Iterator[Callable[[], int]]:
    """Which of SIGINT and SIGTERM has come, or 0, so that the loop can end behind a whole step.

    A second signal acts as it would without us. Off the main thread signals are left alone.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
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
        yield lambda: received[0] if received else 0
    finally:
        for number in numbers:
            signal.signal(number, before[number])
