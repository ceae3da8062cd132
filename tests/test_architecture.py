"""Imports run downwards only, nothing reads pickles, and files stay small (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

import starlm

ROOT = Path(starlm.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What stands on one floor does not import each other; a floor may import every floor below it.
# __init__ and __main__ of the package itself stand on the roof.
FLOORS = [
    {"errors", "text", "version"},
    {"files", "settings"},
    {"device"},
    {"ops"},
    {"nn"},
    {"model", "data"},
    {"hf", "generate"},
    {"evaluate"},
    {"train"},
    {"report", "bench", "serve"},
    {"cli"},
]
# Stricter than the floor: all of starlm that a room may import.
ONLY = {
    "ops": {"errors"},
    "data": {"errors", "files", "settings"},
    "report": {"errors", "files", "settings", "text", "version"},
    "serve": {"errors", "version", "data", "model", "generate", "evaluate"},
}
# Modules from outside that a room must do without.
NEVER = {"data": {"torch", "transformers"}, "report": {"torch"}, "cli": set(), "settings": {"torch"}}
UNSAFE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def room_of(path: Path) -> str:
    """The folder or file directly in the package that `path` belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(source: str, package: str) -> set[str]:
    """Full names of all modules that a source imports, wherever in the file; relative ones resolved."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "starlm" else {module}
    return names


def violations(room: str, source: str, package: str) -> list[str]:
    """Imports in `source`, a file of `room`, that the floors forbid."""
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = []
    for name in sorted(imported(source, package)):
        top, *inner = name.split(".")
        if top in NEVER.get(room, set()) | UNSAFE:
            wrong.append(f"{room} must not import {top}")
        if top != "starlm" or not inner or inner[0] == room:
            continue
        allowed = ONLY.get(room, {other for other in height if height[other] < height[room]})
        if inner[0] not in allowed:
            wrong.append(f"{room} must not import {name}")
    return wrong


def package_of(path: Path) -> str:
    return ".".join(["starlm", *path.relative_to(ROOT).parts[:-1]])


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in FILES} - {"__init__", "__main__"}
    assert rooms <= set().union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert violations(room, path.read_text(), package_of(path)) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("ops", "from starlm.nn.deformer import Deformer"),
        ("ops", "from starlm.files import sha256"),
        ("nn", "import starlm.model.config"),
        ("nn", "from starlm import model"),
        ("nn", "from ..model import config"),
        ("model", "def f():\n    from starlm.train.loop import train"),
        ("model", "from starlm.data.tokenizer import Tokenizer"),
        ("data", "import torch"),
        ("data", "import torch.nn as nn"),
        ("data", "from starlm.ops import deform"),
        ("model", "import starlm.hf"),
        ("hf", "from starlm.generate.text import load"),
        ("generate", "from starlm.evaluate.bits_per_byte import evaluate"),
        ("evaluate", "from starlm.train.loop import train"),
        ("train", "from starlm.cli.console import Console"),
        ("report", "from starlm.train.config import TrainConfig"),
        ("bench", "from starlm.report.plots import curves"),
        ("serve", "from starlm.train.run import Run"),
        ("model", "import pickle"),
        ("cli", "from pickle import load"),
    ],
)
def test_a_wrong_import_is_found(room, source):
    assert len(violations(room, source, f"starlm.{room}")) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("ops", "import torch\nfrom starlm.errors import InputError\nfrom starlm.ops.reference import x"),
        ("train", "from starlm.evaluate.bits_per_byte import evaluate\nfrom .config import TrainConfig"),
        ("cli", "from starlm.report.page import write_report"),
    ],
)
def test_a_right_import_is_let_through(room, source):
    assert violations(room, source, f"starlm.{room}") == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_read(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in ("torch.load", "torch.save"), f"{path.name}:{node.lineno} reads pickles"
            unsafe = [k for k in node.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]
            assert not unsafe, f"{path.name}:{node.lineno} allows pickles"


@pytest.mark.parametrize("path", [*FILES, *sorted(TESTS.rglob("*.py"))], ids=lambda path: path.name)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 500


def test_every_file_says_what_it_is():
    bare = [
        path
        for path in FILES
        if path.name != "version.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert bare == []
