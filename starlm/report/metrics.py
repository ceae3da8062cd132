"""What metrics.jsonl says about a run, whatever happened to the run."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any

from starlm.errors import InputError
from starlm.settings import read_toml
from starlm.text import printable

Record = dict[str, Any]
# Larger numbers are no measurements, and sums of their squares would overflow.
_LARGEST = 1e100
# What a record of each kind has besides its step.
_FIELDS: dict[str, dict[str, Any]] = {
    "step": {"tokens": int | float, "seconds": int | float},
    "validation": {"loss": int | float, "bits_per_byte": int | float},
    "sample": {"prompt": str, "text": str},
}


@dataclass(kw_only=True)
class RunMetrics:
    """One run folder as a report sees it. Records are in the order of their steps."""

    name: str
    folder: Path
    config: Record = field(default_factory=dict)
    """run.toml as plain values, with what follows from the depth as the plan has it; empty without one."""
    plan: Record = field(default_factory=dict)
    """The last session's plan."""
    horizons: list[Any] = field(default_factory=list)
    """Steps that the sessions were to end at, if they differ: then no one command trains the run again."""
    steps: list[Record] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    """Of the last step that has some."""
    end: Record | None = None
    """The last record of a run that reached its horizon."""
    sessions: int = 0
    """How often training was started or went on."""
    damaged: int = 0
    """Lines within the file that are no records; one that was cut off at its end does not count."""

    @property
    def last_step(self) -> int:
        """The last step that was trained."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.steps[-1]["tokens"] if self.steps else 0

    @property
    def seconds(self) -> float:
        """Time spent in steps, over all sessions."""
        return self.steps[-1]["seconds"] if self.steps else 0.0


def read_run(folder: Path) -> RunMetrics:
    """The metrics of a run folder.

    Where a run went on from a checkpoint, what it did after that checkpoint before is left out; where two
    records speak of the same step, the later one counts.

    Raises:
        InputError: there is no metrics.jsonl, or it has no record.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be reported on: {path.name}: {error.strerror}. Give a run folder; starlm train "
            f"or starlm demo makes one."
        ) from None
    run = RunMetrics(name=printable(folder.resolve().name), folder=folder)
    run.config = read_toml(folder / "run.toml") if (folder / "run.toml").is_file() else {}
    found: dict[tuple[Any, ...], Record] = {}
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            run.damaged += number < len(lines)
        elif record["kind"] == "plan":
            start = record.get("start_step", 0)
            found = {key: old for key, old in found.items() if old["step"] <= start and key[0] != "end"}
            if run.plan and record.get("steps") != run.plan.get("steps"):
                run.horizons += [run.plan.get("steps")] if not run.horizons else []
                run.horizons.append(record.get("steps"))
            run.plan, run.sessions = record, run.sessions + 1
        else:
            found[record["kind"], record["step"], record.get("prompt")] = record
    if not found and not run.plan:
        raise InputError(f"{path} has no record yet. Wait for the first step, then write the report again.")
    follows = run.plan.get("model")
    if isinstance(run.config.get("model"), dict) and isinstance(follows, dict):
        run.config["model"] |= follows
    records = sorted(found.values(), key=lambda record: record["step"])
    run.steps = _of_kind(records, "step")
    run.validations = _of_kind(records, "validation")
    samples = _of_kind(records, "sample")
    run.samples = [record for record in samples if record["step"] == samples[-1]["step"]]
    run.end = next(iter(_of_kind(records, "end")), None)
    return run


def _record(line: bytes) -> Record | None:
    """The record in a line, without values that say nothing; None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    record = {name: value for name, value in record.items() if value is not None and not _overflows(value)}
    wanted = {} if record["kind"] == "plan" else {"step": int, **_FIELDS.get(record["kind"], {})}
    return record if all(isinstance(record.get(name), kind) for name, kind in wanted.items()) else None


def _overflows(value: Any) -> bool:
    # Infinity stays, as NaN does: a run that diverged has them.
    return isinstance(value, int | float) and _LARGEST < abs(value) < float("inf")


def _of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Mean over the `span` values around each, which does not lag; at the ends, the line through as many.

    Args:
        values: finite numbers.
    """
    half = min(span // 2, (len(values) - 1) // 2)
    if half < 1:
        return list(values)
    width = 2 * half + 1
    sums = [0.0, *itertools.accumulate(values)]
    inner = [(sums[i + width] - sums[i]) / width for i in range(len(values) - width + 1)]
    # A mean over fewer values would end the curve on the noise of the last one; one over those of one side
    # would bend it.
    first = linear_regression(range(width), values[:width])
    last = linear_regression(range(width), values[-width:])
    begin = [first.intercept + first.slope * i for i in range(half)]
    end = [last.intercept + last.slope * i for i in range(half + 1, width)]
    return [*begin, *inner, *end]
