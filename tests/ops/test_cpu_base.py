"""What the CPU kernels share."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from numba.core.caching import IndexDataCacheFile

import starlm
from starlm.ops import cpu_base


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_work_after_a_fork():
    """Threads do not survive a fork: the child must not wait for the parent's.

    Torch's own operations are left out, since OpenMP hangs after a fork, whatever StarLM does.
    """
    done = np.zeros(1000)

    def fill(begin, end):
        done[begin:end] += 1

    cpu_base.spread(fill, done.size, cpu_base.SERIAL_ELEMENTS)
    parent_pool = cpu_base._pool()
    child = os.fork()
    if child == 0:
        # Nothing may escape into pytest's copy in the child.
        try:
            cpu_base.spread(fill, done.size, cpu_base.SERIAL_ELEMENTS)
            ok = (
                cpu_base._pool() is not parent_pool
                and cpu_base._pool().submit(lambda: 7).result(timeout=5) == 7
            )
            os._exit(0 if ok and (done == 2).all() else 1)
        finally:
            os._exit(1)
    assert exit_code(child, seconds=20) == 0
    assert cpu_base._pool() is parent_pool


def exit_code(child, seconds):
    """The child's exit code; one that hangs is killed and fails."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"the child was still running after {seconds} s")


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_work_is_shared_out_whole(count):
    done = np.zeros(count)

    def fill(begin, end):
        done[begin:end] += 1

    cpu_base.spread(fill, count, cpu_base.SERIAL_ELEMENTS)
    assert (done == 1).all()


def test_an_error_in_a_thread_arrives():
    def fail(begin, end):
        if begin:
            raise ValueError("from a share")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="from a share"):
            cpu_base.spread(fail, 10, cpu_base.SERIAL_ELEMENTS)
    finally:
        torch.set_num_threads(before)


def test_arrays_of_bfloat16_are_its_bits():
    found = cpu_base.array(torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.bfloat16).T)
    assert found.tolist() == [[0x3F80, 0x3F00], [0xC000, 0x0000]]
    assert cpu_base.index(torch.tensor([1, 2], dtype=torch.int32)).dtype == np.int64


def test_where_a_helper_had_lost_its_core_the_next_calls_have_none(monkeypatch):
    helped, led = [], []

    class Pool:
        def submit(self, work, leads):
            helped.append(leads)

    monkeypatch.setattr(cpu_base, "_pool", Pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(cpu_base, "_alone", 0)
    stalled = [False, True, *[False] * (cpu_base.ALONE + 1)]
    for _ in range(len(stalled)):
        cpu_base.together(lambda leads: led.append(leads) or stalled[len(led) - 1])
    assert led == [True] * len(stalled)
    # The first two calls and the one after ALONE others have two helpers each.
    assert helped == [False] * 6


CALLS = """
import logging, numba, torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
from starlm import anchors
numba.njit(lambda x: x + 1)(1)
print("begin", flush=True)
anchors(torch.ones(1, 4, dtype=torch.int64), [1])
anchors(torch.ones(1, 4, dtype=torch.int64), [1], first=torch.zeros(1, 4, dtype=torch.int64))
"""


def test_it_is_said_once_that_kernels_are_compiled(tmp_path):
    """Not that a user's own are, and not where the cache has them."""
    command = [sys.executable, "-c", CALLS]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for said in (1, 0):
        done = subprocess.run(
            command, env=environment, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        before, after = done.stdout.split("begin")
        assert "Compiling" not in before
        assert after.count("Compiling kernels") == said


@pytest.mark.slow
def test_a_kernel_is_compiled_anew_when_one_that_it_calls_has_changed(tmp_path):
    """They are in different files, of which numba looks at one."""
    package = Path(starlm.__file__).parent
    shutil.copytree(package, tmp_path / "starlm", ignore=shutil.ignore_patterns("__pycache__"))
    script = """
import os, sys
import numpy as np
from starlm.ops.cpu_product import CAP, _finish
if len(sys.argv) > 1:
    type(_finish._cache._cache_file)._save_data = lambda *args: os._exit(9)
out = np.empty(1, np.float32)
_finish(np.ones(1, np.float32), np.empty(0, np.float32), np.float32(1), CAP, np.float32(1), out)
print(out[0], _finish.stats.cache_hits.total())
"""

    def run(*kill):
        command = [sys.executable, "-c", script, *kill]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
        environment["PYTHONPATH"] = str(tmp_path)
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == (9 if kill else 0), done.stderr
        if kill:
            return None
        result, hits = done.stdout.split()
        return float(result), int(hits)

    assert run() == (pytest.approx(np.tanh(1)), 0)
    assert run() == (pytest.approx(np.tanh(1)), 1)
    called = tmp_path / "starlm" / "ops" / "cpu_math.py"
    changed = called.read_text().replace("return less / (less + TWO)", "return TWO * less / (less + TWO)")
    called.write_text(changed)
    run("killed behind its index, which names what it has not written")
    assert run() == (pytest.approx(2 * np.tanh(1)), 0)


def test_kernels_are_written_by_one_process_at_a_time(monkeypatch, tmp_path):
    held = []

    def save(self, key, data):
        with pytest.raises(Timeout):
            FileLock(f"{self._index_path}.lock", timeout=0).acquire()
        held.append(key)

    monkeypatch.setattr(IndexDataCacheFile, "save", save)
    kept = cpu_base.jit(lambda x: x)._cache._cache_file
    monkeypatch.setattr(kept, "_index_path", str(tmp_path / "index"))
    kept.save("a key", None)
    assert held == ["a key"]


def test_functions_of_others_compile_beside_kernels():
    """Also those that were made by `exec`, which have no module."""
    found = {}
    exec("def add_one(x):\n    return x + 1", found)
    assert found["add_one"].__module__ is None
    assert numba.njit(found["add_one"])(1) == 2
