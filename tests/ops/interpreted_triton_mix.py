"""The fused layer's Triton kernels on CPU tensors, by Triton's interpreter, as interpreted_triton.py has it.

TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_triton_mix.py
"""

import itertools
import math
import sys

import pytest
import torch
from oracle import assert_same
from test_mix import composed, problem, results

from benchmarks import gpu
from starlm.ops import triton_mix as kernels
from starlm.ops.mix import mix
from starlm.ops.triton import INTERPRETED

assert INTERPRETED, "set TRITON_INTERPRET=1"

# Of numpy, with which the interpreter calculates: inf - inf, exp of what is large, and what float16 cannot hold.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"
)
NAMES = ("out", "dvalues", "dshift", "dgate")


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    # By its full name, which the function of the same name hides.
    monkeypatch.setattr(sys.modules["starlm.ops.mix"], "_on_gpu", lambda device: True)


def compare(inputs, options, tolerance=2e-5):
    got, wanted = results(mix, inputs, options), results(composed, inputs, options)
    for name, a, b in zip(NAMES, got, wanted, strict=False):
        size = max([1.0, *b.detach().nan_to_num().abs().flatten().tolist()])
        assert_same(name, a, b, tolerance * size)
    return got


@pytest.mark.parametrize("heads", [(2, 0, 0), (0, 2, 0), (0, 0, 2), (1, 2, 1)])
@pytest.mark.parametrize(("gated", "packed"), [(True, True), (False, False)])
def test_equals_the_composition(heads, gated, packed):
    inputs, options = problem(2, 19, *heads, gated=gated, packed=packed)
    for max_shift in (None, 3):
        compare(inputs, {**options, "max_shift": max_shift})
