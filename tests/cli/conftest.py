"""A command line in this process, and stand-ins for the rooms below it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from starlm.cli.main import main

# Helpers stand beside the tests that use them.
sys.path.insert(0, str(Path(__file__).parent))


@dataclass
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """The object on the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs `starlm ARGS` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv) -> Outcome:
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module of the given names in the place of a real one."""

    def put(name, **members):
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def training_records(steps=20, start=0, every=10, before=None, held_out=9, epochs=1.5):
    """What a training run says, from plan to end."""
    yield {
        **{"kind": "plan", "step": start, "steps": steps, "start_step": start, "resumed": start > 0},
        **{"parameters": {"total": 5_242_880}, "flops_per_token": 25_000_000, "time": 0.0},
        **{"device": "cpu", "precision": "float32", "threads": 2, "layers": "DDWD", "matrix_lr": 0.0123},
        **{"horizon_before": before or steps, "epochs": epochs},
    }
    for step in range(start + 1, steps + 1):
        yield {
            **{"kind": "step", "step": step, "loss": 8.0 - step / 10, "lr": 1.0, "grad_norm": 1.0},
            **{"tokens": step * 4096, "tokens_per_second": 4096.0, "seconds": float(step)},
        }
        if step % every == 0:
            yield {
                "kind": "validation",
                "step": step,
                "loss": 6.5,
                "bits_per_byte": 2.5,
                "tokens": 9,
                "bytes": 9,
                "split_tokens": 9,
            }
    yield {"kind": "sample", "step": steps, "prompt": "def ", "text": "f(x):\n    return [b]<x>\n"}
    yield {"kind": "checkpoint", "step": steps, "path": "runs/x/checkpoints/step"}
    yield {
        **{"kind": "end", "step": steps, "seconds": 1.0, "tokens": steps * 4096, "checkpoint": "runs/x/c"},
        **{"loss": 6.5, "bits_per_byte": 2.5},
        **{"validation_tokens": 9, "validation_bytes": 9, "validation_split_tokens": held_out, "chat": False},
    }


@pytest.fixture(name="training_records")
def _training_records():
    return training_records


@pytest.fixture
def fake_train(stand_in):
    """A training loop that writes and tells the records of 20 steps; its calls are kept."""
    calls = []

    def train(config, *, on_record=lambda record: None):
        calls.append(config)
        config.out.mkdir(parents=True, exist_ok=True)
        lines = []
        record = {}
        for record in training_records():
            lines.append(json.dumps(record) + "\n")
            on_record(record)
        (config.out / "metrics.jsonl").write_text("".join(lines))
        return record

    stand_in("starlm.train.loop", train=train)
    return calls


@pytest.fixture
def fake_data(stand_in):
    """Data that any folder holds once `prepare` has made it; calls of `prepare` are kept."""
    calls = []
    split = SimpleNamespace(
        **{"num_documents": 3, "num_tokens": 100, "num_bytes": 250, "fingerprint": "theirs"},
        **{"num_learned": 100, "conversations": False},
    )

    @dataclass
    class PrepareReport:
        out: Path
        reused: bool = False
        vocab_size: int = 4096
        tokens: int = 100
        skipped: int = 0
        skipped_first: tuple[str, ...] = ()
        notes: tuple[str, ...] = ()

    def prepare(sources, out, *, progress=None, **options):
        calls.append((sources, out, options))
        Path(out).mkdir(parents=True)
        progress("tokens", 1, 2)
        progress("tokens", 2, 2)
        return PrepareReport(Path(out))

    class TokenData:
        verified, vocab_size = 0, 300
        meta = {"tokenizer": "a fingerprint"}  # noqa: RUF012

        def __init__(self):
            self.splits = {"train": split, "validation": split}

        @classmethod
        def open(cls, folder):
            return cls()

        def verify(self):
            type(self).verified += 1

    stand_in("starlm.data.prepare", prepare=prepare, VOCAB_SIZE=4096)
    stand_in("starlm.data.shards", TokenData=TokenData, META="meta.json")
    return SimpleNamespace(prepared=calls, kind=TokenData)
