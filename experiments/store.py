"""Results of experiments: one JSON file each."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlm.errors import InputError
from starlm.files import write_whole
from starlm.model.folder import read_json
from starlm.report.environment import environment


def taken(path: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the result of a run is there, so that it need not be run; says so.

    Args:
        asked: what decides the result, by the names that it has there. What an older file does not say is
            not compared.

    Raises:
        InputError: it is the result of something else.
    """
    if not path.is_file():
        return False
    known = read_json(path)
    wanted = json.loads(json.dumps(asked))
    others = [
        f"{name} was {known[name]}, is {value}"
        for name, value in wanted.items()
        if name in known and known[name] != value
    ]
    if others:
        raise InputError(f"{path} is there, of another run: {'; '.join(others)}. Move it away first.")
    print(f"{path}: there already, skipped", flush=True)
    return True


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result, with the machine and the software that it comes from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {**result, "machine": dict(environment())}
    write_whole(path, (json.dumps(whole, indent=1) + "\n").encode())
