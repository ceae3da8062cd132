"""A corpus that no run here sees twice: the Python source of installed packages, without their tests."""

import hashlib
import sysconfig
from pathlib import Path

from starlm.errors import InputError

NAMES = ("matplotlib", "networkx", "numba", "numpy", "pandas", "scipy", "sklearn", "sympy", "torch")
_LARGEST = 300_000  # Bytes; beyond it stand tables and generated parsers.


def sources() -> list[Path]:
    """The files, each content once; the versions are those of constraints.txt.

    Raises:
        InputError: a package is not installed.
    """
    root = Path(sysconfig.get_path("purelib"))
    if missing := [name for name in NAMES if not (root / name).is_dir()]:
        raise InputError(
            f"The corpus of packages needs {', '.join(missing)} in {root}. Install the development set: make "
            f"install."
        )
    found: dict[bytes, Path] = {}
    for name in NAMES:
        for path in sorted((root / name).rglob("*.py")):
            tests = {"tests", "test", "testing"} & {*path.relative_to(root).parts}
            if not tests and 0 < path.stat().st_size <= _LARGEST:
                found.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
    return list(found.values())
