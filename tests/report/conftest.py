import json
import math

import pytest


def write_run(folder, *, steps=60, settings="seed = 1\n", tail="", **plan):
    """A run folder with plausible records; `tail` is raw text at the end of metrics.jsonl."""
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(settings)
    records = [
        {
            **{"kind": "plan", "step": 0, "steps": steps, "start_step": 0, "resumed": False, "time": 0.0},
            **{"parameters": {"total": 5_242_880}, "flops_per_token": 25_000_000},
            **plan,
        }
    ]
    for step in range(1, steps + 1):
        loss = 3 + 5 * math.exp(-step / 10) + 0.1 * math.sin(step**2)
        records.append(
            {
                **{"kind": "step", "step": step, "loss": loss, "lr": 1.0, "grad_norm": 1.0},
                **{"tokens": step * 4096, "tokens_per_second": 4096.0 + step, "seconds": float(step)},
            }
        )
        if step % 20 == 0:
            records.append({"kind": "validation", "step": step, "loss": loss, "bits_per_byte": loss / 2})
    for prompt in ("def ", "<script>alert(1)</script>"):
        text = "```\n<b>&\n"
        records.append({"kind": "sample", "step": steps, "prompt": prompt, "text": text})
    records.append({"kind": "end", "step": steps, "seconds": float(steps), "tokens": steps * 4096})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + tail)
    return folder


@pytest.fixture(name="write_run")
def _write_run():
    return write_run
