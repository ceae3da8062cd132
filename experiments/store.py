"""Results of experiments: one JSON file each."""

import json
from pathlib import Path
from typing import Any

from starlm.files import write_whole
from starlm.report.environment import environment


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result, with the machine and the software that it comes from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {**result, "machine": dict(environment())}
    write_whole(path, (json.dumps(whole, indent=1) + "\n").encode())
