"""The software and the machine, in words; nothing heavy is imported for it."""

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from starlm.version import __version__

_ROOT = Path(__file__).parents[2]


def environment() -> list[tuple[str, str]]:
    """Software and machine that write the report."""
    rows = [
        ("StarLM", " ".join(filter(None, (__version__, commit(_ROOT))))),
        ("Python", platform.python_version()),
    ]
    for name in ("torch", "numba", "numpy"):
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return [*rows, ("processor", processor()), ("platform", platform.platform())]


def processor() -> str:
    """The processor's model name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def commit(root: Path) -> str:
    """The commit of the checkout that has this folder at its top; empty if it is none."""
    # git would take the next repository above, such as that of a project with its packages in it.
    if not (root / ".git").exists():
        return ""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"at {result.stdout.strip()}"
