"""For all tests: shapes checked, seeded, fresh memory full of NaN, so that what is left unwritten shows."""

import re
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from torch.utils._python_dispatch import TorchDispatchMode


class _OurOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "starlm":
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def our_operators():
    """A context, within which the names of all operators of ours that run are gathered in a set."""

    @contextmanager
    def gather():
        with _OurOperators() as mode:
            yield mode.names

    return gather


# Where tensors have shapes. Not starlm.ops.cpu: numba compiles what it finds there.
SHAPE_CHECKED = [
    "starlm.ops.anchors",
    "starlm.ops.box",
    "starlm.ops.cross_entropy",
    "starlm.ops.deform",
    "starlm.ops.elementwise",
    "starlm.ops.mix",
    "starlm.ops.reference",
    "starlm.nn",
    "starlm.model.model",
    "starlm.model.state",
]
_checks_shapes = pytest.StashKey[bool]()

# What `with torch.device(...)` moves is listed at its first use: that must not meet the replaced torch.empty.
with torch.device("meta"):
    torch.empty(0)


def pytest_configure(config):
    """Check the shape annotations of these modules at run time, but for `pytest -m compile`."""
    wanted = re.findall(r"(?:not )?\bcompile\b", config.option.markexpr)
    config.stash[_checks_shapes] = "compile" not in wanted
    if "compile" in wanted:
        # It lists PyTorch's functions at its first use, too.
        from torch._dynamo import trace_rules

        trace_rules.get_torch_obj_rule_map()
    if config.stash[_checks_shapes]:
        # The package itself may be: names of heads are looked up without tensors.
        early = [name for name in SHAPE_CHECKED if name in sys.modules and name != "starlm.nn"]
        assert not early, f"a conftest.py imports {early[0]} before its shapes are checked"
        install_import_hook(SHAPE_CHECKED, "beartype.beartype")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if config.stash[_checks_shapes] and any(item.get_closest_marker("compile") for item in items):
        raise pytest.UsageError(
            "torch.compile cannot trace the shape checks: run its tests by pytest -m compile."
        )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch):
    """`torch.empty` gives NaN: an output element that a kernel forgets fails every comparison."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        if tensor.is_floating_point() and not tensor.is_meta and not torch.compiler.is_compiling():
            tensor.fill_(torch.nan)
        return tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
