"""What a verb says while it works: a progress bar on a terminal, plain lines elsewhere, JSON for programs."""

import io
import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from starlm.errors import InputError
from starlm.text import printable

Record = dict[str, Any]
# Plain progress: a line when this share of the work or this time has passed.
SHARE, SECONDS = 0.05, 10.0
# Up to about so many times the same text is worth what new text is (arXiv 2305.16264).
EPOCHS = 4


class Console:
    """Where human text goes, and the one JSON object."""

    def __init__(self, *, json: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: json: stdout is for the JSON object, human text goes to stderr."""
        self.json, self._clock = json, clock

    @property
    def human(self) -> TextIO:
        """The stream for people."""
        return sys.stderr if self.json else sys.stdout

    def shown(self, text: str) -> str:
        """A text of a model or a file as `human` takes it: `printable` on a terminal, elsewhere as it is."""
        return printable(text) if self.human.isatty() else text

    def say(self, text: str = "") -> None:
        """Print a line for people."""
        print(text, file=self.human, flush=True)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Print rows in aligned columns."""
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        for row in rows:
            self.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def finish(self, result: Record) -> None:
        """Print the JSON object if it was asked for: the last line of stdout."""
        if self.json:
            print(json.dumps(_plain(result), allow_nan=False), flush=True)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """A function of stage, done, total (None: not known) that shows how far the work is."""
        if self.human.isatty():
            with _bar(self.human, "{task.fields[note]}") as bar:
                yield _BarProgress(bar)
        else:
            yield _PlainProgress(self.say, self._clock)

    @contextmanager
    def training(self) -> Iterator[Callable[[Record], None]]:
        """A function of the training loop's records that shows how far the run is."""
        if self.human.isatty():
            columns = "mean loss [bold]{task.fields[loss]}[/]  {task.fields[speed]} tokens/s"
            with _bar(self.human, columns) as bar:
                yield _BarTraining(bar)
        else:
            yield _PlainTraining(self.say, self._clock)


def _plain(value: Any) -> Any:
    """`value` as JSON has it: paths as text, and null for what is no number."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def piped() -> str:
    """All text that was piped into stdin.

    Raises:
        InputError: it is not text in stdin's encoding.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        # In a plain locale Python hides bytes that are no text in halves of surrogate pairs.
        sys.stdin.reconfigure(errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(
            f"stdin is not {error.encoding.upper()} text: at byte {error.start}. Convert it."
        ) from None


def duration(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(stream: TextIO, columns: str) -> Any:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(columns),
        Elapsed(),
        TextColumn("eta"),
        Remaining(),
        console=RichConsole(file=stream, highlight=False),
        expand=True,
    )


class _BarProgress:
    def __init__(self, bar: Any) -> None:
        self._bar, self._tasks = bar, {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total, note="")
        self._bar.update(self._tasks[stage], completed=done, total=total)


class _PlainProgress:
    def __init__(self, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._say, self._clock, self._pace = say, clock, {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        pace = self._pace.setdefault(stage, _Pace(self._clock))
        finished = total is not None and done >= total
        if pace.due(done / total if total else None, always=finished):
            of = f"/{total:,} ({done / total:.0%})" if total else ""
            self._say(f"{stage}: {done:,}{of}")


class _Pace:
    """Says when the next plain line is due."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._share, self._time = clock, 0.0, clock()

    def due(self, share: float | None, *, always: bool = False) -> bool:
        now = self._clock()
        far = share is not None and share - self._share >= SHARE - 1e-9
        if not (always or far or now >= self._time + SECONDS):
            return False
        self._share, self._time = share or 0.0, now
        return True


class _Training(ABC):
    """What records mean; the subclasses decide how it looks."""

    def __init__(self) -> None:
        self.steps = self.start = 0
        self.loss = self.weight = self.speed = 0.0

    def __call__(self, record: Record) -> None:
        getattr(self, f"on_{record['kind']}", lambda record: None)(record)

    @abstractmethod
    def line(self, text: str) -> None:
        """Show a line of text."""

    def on_plan(self, record: Record) -> None:
        self.steps, self.start = record["steps"], record["start_step"]
        layers = " and ".join(f"{number} {letter}" for letter, number in Counter(record["layers"]).items())
        self.line(
            f"{record['parameters']['total'] / 1e6:.1f} M parameters, layers {layers}, "
            f"{record['steps']:,} steps, on {record['device']} ({record['threads']} threads, "
            f"{record['precision']})"
        )
        if record["epochs"] > EPOCHS:
            self.line(
                f"every text is seen {record['epochs']:,.1f} times; beyond {EPOCHS} times that gains ever "
                f"less: take more text or a shorter horizon"
            )
        if record["resumed"] and self.start == self.steps:
            self.line("all steps were done before; measured again:")
        elif record["resumed"]:
            self.line(f"going on at step {record['start_step']:,}")
            if (before := record.get("horizon_before", self.steps)) != self.steps:
                self.line(
                    f"the horizon was {before:,} steps; now rates are those of a run of {self.steps:,}, "
                    f"the matrices' {record['matrix_lr']:.3g}"
                )

    def on_step(self, record: Record) -> None:
        # Running means over about ten steps, without a bias towards the start.
        self.weight = 0.9 * self.weight + 0.1
        share = 0.1 / self.weight
        self.loss += share * (record["loss"] - self.loss)
        self.speed += share * (record["tokens_per_second"] - self.speed)

    def on_validation(self, record: Record) -> None:
        self.line(
            f"step {record['step']:,}: validation loss {record['loss']:.4f}, "
            f"{record['bits_per_byte']:.4f} bits per byte"
        )

    def on_sample(self, record: Record) -> None:
        between = "\n" if record.get("chat") else ""
        text = printable(record["prompt"] + between + record["text"]).rstrip()
        self.line(f"step {record['step']:,}: sample")
        self.line("\n".join(f"    | {line}" for line in text.splitlines()))

    def on_end(self, record: Record) -> None:
        self.line(f"{record['step']:,} steps in {duration(record['seconds'])}")


class _PlainTraining(_Training):
    def __init__(self, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        super().__init__()
        self._say, self._clock, self._pace = say, clock, _Pace(clock)
        self._began = clock()

    def line(self, text: str) -> None:
        self._say(text)

    def on_plan(self, record: Record) -> None:
        super().on_plan(record)
        self._began = self._clock()

    def on_step(self, record: Record) -> None:
        super().on_step(record)
        step = record["step"]
        if self._pace.due(step / self.steps, always=step in (self.start + 1, self.steps)):
            left = (self._clock() - self._began) / (step - self.start) * (self.steps - step)
            self._say(
                f"step {step:,}/{self.steps:,}  mean loss {self.loss:.4f}  {self.speed:,.0f} tokens/s  "
                f"eta {duration(left)}"
            )


class _BarTraining(_Training):
    def __init__(self, bar: Any) -> None:
        super().__init__()
        self._bar, self._task = bar, None

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def on_plan(self, record: Record) -> None:
        super().on_plan(record)
        self._task = self._bar.add_task("train", total=self.steps, loss="-", speed="-")
        # Steps of an earlier session are no measure of this one's speed.
        self._bar.update(self._task, completed=self.start)
        self._bar.reset(self._task, completed=self.start)

    def on_step(self, record: Record) -> None:
        super().on_step(record)
        self._bar.update(
            self._task, completed=record["step"], loss=f"{self.loss:.3f}", speed=f"{self.speed:,.0f}"
        )
