"""`benchmarks.gpu_tune` on CPU tensors, by Triton's interpreter: test_gpu_tune.py runs it in its own process.

TRITON_INTERPRET=1 python -m pytest tests/benchmarks/interpreted_gpu_tune.py
"""

from dataclasses import replace

import pytest

from benchmarks import gpu_tune
from starlm.ops import triton, triton_mix

assert triton.INTERPRETED, "set TRITON_INTERPRET=1"


@pytest.fixture
def timed(monkeypatch):
    """Calls that were timed, as 1 ms each."""
    calls = []

    def milliseconds(call, device):
        calls.append(call())
        return 1.0

    monkeypatch.setattr(gpu_tune, "milliseconds", milliseconds)
    return calls


def problems():
    return gpu_tune.problems("cpu", (2, 3, 2, 4), [0.8], (2, 3, 4, 2))


def test_heads_of_all_kinds(timed):
    *_, star = problems()
    # The interpreter takes seconds for each setting of box heads.
    copy, one = gpu_tune.measure("cpu", [replace(star, settings=[])], 1000)
    assert (one.problem, one.why) == ("layer, star (2+1+1)", "")
    assert one.share_of_copy == {"forward": 2.5, "backward": 4.0}
    (out, _), (values, shift, gate) = timed[1:]
    assert {x.shape for x in (out, values, shift, gate)} == {copy.shape}


@pytest.mark.parametrize(("number", "module"), [(0, triton), (1, triton_mix)])
def test_a_wrong_setting_is_named_and_not_timed(number, module, timed, monkeypatch):
    forward, wrong = module.forward, {"TIME": 8, "WARPS": 2}

    def off(*inputs):
        result = forward(*inputs)
        out = result[0] if isinstance(result, tuple) else result
        if module.TIME == 8:
            out[0, 1, 1, 1] += 1
        return result

    monkeypatch.setattr(module, "forward", off)
    problem = replace(list(problems())[number], settings=[wrong, {"EACH": 1}])
    copy, right, named, last = gpu_tune.measure("cpu", [problem], 1000)
    assert named.changed == wrong
    assert named.why.startswith("WRONG: output, T = 2: more than allowed off")
    assert (named.milliseconds, named.share_of_copy) == ({}, {})
    assert [len(one.milliseconds) for one in (copy, right, last)] == [1, 2, 1]
    assert len(timed) == 4
