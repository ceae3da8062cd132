import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from starlm.model.checkpoint import load_model
from starlm.model.folder import steps, verify
from starlm.settings import to_toml

KILLS, STEPS = 20, 90


def start(settings: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "starlm", "train", "--config", str(settings)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(settings: Path) -> None:
    child = start(settings)
    _, said = child.communicate(timeout=200)
    assert child.returncode == 0, said.decode()


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*.partial-*"))


def wait_for(child: subprocess.Popen, condition) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < limit
        time.sleep(0.0005)


def losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "step"]


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_one_left_alone(config, tmp_path):
    """Killed by SIGKILL at starting up, between steps and in the midst of saving."""
    settings = {}
    for name in ("alone", "killed"):
        chosen = config(
            out=tmp_path / name, steps=STEPS, save_every=1, eval_every=7, model__preset="star", model__depth=1
        )
        settings[name] = tmp_path / f"{name}.toml"
        settings[name].write_text(to_toml(chosen))
    finish(settings["alone"])

    source, run = random.Random(0), tmp_path / "killed"
    # What each kill waits for: nothing, lines of metrics, or the folder that a save is writing.
    waits = ["nothing"] * 3 + ["lines"] * 7 + ["saving"] * 10
    assert len(waits) == KILLS
    source.shuffle(waits)
    unfinished = 0
    for wait in waits:
        child = start(settings["killed"])
        try:
            if wait == "nothing":
                time.sleep(source.uniform(0, 1))
            else:
                # What the session before has left is gone when this one says its first line.
                before = lines(run)
                wait_for(child, lambda: lines(run) not in (0, before))  # noqa: B023
                before, more = lines(run), source.randrange(4)
                wait_for(child, lambda: lines(run) >= before + more)  # noqa: B023
                if wait == "saving":
                    wait_for(child, lambda: saving(run))
                time.sleep(source.uniform(0, 0.01))
        finally:
            child.kill()
            child.communicate()
        assert child.returncode == -9
        unfinished += saving(run)
        # Whatever looks like a checkpoint is one.
        for checkpoint in steps(run):
            verify(checkpoint, training=True)
            load_model(checkpoint)
    assert unfinished >= 3
    finish(settings["killed"])

    assert losses(run) == losses(tmp_path / "alone")
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    one, other = (tmp_path / name / "checkpoints" for name in ("alone", "killed"))
    assert (
        sorted(os.listdir(one)) == sorted(os.listdir(other)) == [f"step-{n:06}" for n in (STEPS - 1, STEPS)]
    )
    for file in ("model.safetensors", "optimizer.safetensors", "tokenizer.json", "config.json"):
        a, b = (folder / f"step-{STEPS:06}" / file for folder in (one, other))
        assert a.read_bytes() == b.read_bytes(), file
