"""What the CPU kernels share: how they are compiled, bfloat16, tensors as arrays, threads.

bfloat16 travels as its uint16 bits and is widened one element at a time.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from filelock import FileLock
from numba.core import cgutils, event
from numba.core.caching import IndexDataCacheFile
from numba.extending import intrinsic, overload
from torch import Tensor

# Below this many elements a thread hand-over costs more than the work.
SERIAL_ELEMENTS = 1 << 15
# Calls without helpers after one that had to wait for a helper.
ALONE = 20


def _stamp() -> str:
    """Of the code of all kernels."""
    digest, folder = hashlib.sha256(), Path(__file__).parent
    for path in sorted([*folder.glob("cpu*.py"), folder / "ngrams.py", folder / "constants.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_STAMP = _stamp()


class _Kept(IndexDataCacheFile):
    """What is compiled of one function, on disk, as long as no kernel's code changes.

    Functions are compiled into those that call them, but numba looks only whether a function's own file has
    changed. With the code of all in the files' names, whatever an index names is either of this code or not
    there yet, and then compiled. And one process writes at a time: of two, one would run what the other has
    compiled for another dtype (numba issue 4807).
    """

    def __init__(self, folder: str, name: str) -> None:
        super().__init__(folder, f"{name}.{_STAMP}", _STAMP)

    def save(self, key, data):
        with FileLock(f"{self._index_path}.lock"):
            super().save(key, data)
            _forget_others(Path(self._cache_path))


@cache
def _forget_others(folder: Path) -> None:
    """Remove what was compiled of other code; a process that still runs it compiles it anew."""
    for path in folder.glob("*.nb[ci]*"):
        if _STAMP not in path.name:
            path.unlink(missing_ok=True)


def kernel(**options: Any) -> Any:
    """A decorator that compiles a function with numba's options, and keeps it on disk."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = numba.njit(cache=True, error_model="numpy", **options)(function)
        # With NUMBA_DISABLE_JIT it is the function itself.
        if (kept := getattr(dispatcher, "_cache", None)) is not None:
            kept._cache_file = _Kept(kept._cache_path, kept._impl.filename_base)
        return dispatcher

    return decorate


jit = kernel(nogil=True)


class _Telling(event.Listener):
    """Says once that kernels are compiled, for which nothing else can be seen to happen."""

    told = False

    def on_start(self, event):
        # Functions of other libraries may come from nowhere.
        module = event.data["dispatcher"].py_func.__module__ or ""
        if module.startswith("starlm.") and not self.told:
            self.told = True
            logging.getLogger("starlm.ops").info(
                "Compiling kernels for this processor: up to half a minute, once."
            )

    def on_end(self, event):
        pass


event.register("numba:compile", _Telling())


def widen(x):
    """The number that an element of a kernel's array stands for."""
    raise AssertionError("only compiled code calls this")


def store(out, index, x):
    """Put a number into an element of a kernel's array, rounded to its dtype."""
    raise AssertionError("only compiled code calls this")


@overload(widen, inline="always")
def _widen_overload(x):
    if x == numba.types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


# Not inlined by numba, as `widen` is, but by LLVM: the other way loops that store are not vectorised.
@overload(store)
def _store_overload(out, index, x):
    if out.dtype == numba.types.uint16:

        def store_bf16(out, index, x):
            bits = np.float32(x).view(np.uint32)
            # Round to nearest, ties to even, on the upper 16 bits.
            even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint16(np.uint32(bits + even) >> np.uint32(16))
            out[index] = rounded if x == x else np.uint16(0x7FC0)

        return store_bf16

    def store_plain(out, index, x):
        out[index] = x

    return store_plain


def _as_pointer(typingctx, address):
    """An address as a pointer, of which `numba.carray` makes an array."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return numba.types.voidptr(numba.types.int64), codegen


pointer: Any = intrinsic(_as_pointer)


def array(tensor: Tensor) -> np.ndarray:
    """The tensor, contiguous, as an array; bfloat16 as its bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def index(tensor: Tensor) -> np.ndarray:
    """Integers as int64, contiguous."""
    return tensor.to(torch.int64).contiguous().numpy()


def spread(work: Callable[[int, int], None], count: int, elements: int) -> None:
    """Run work(begin, end) over 0 .. count, in equal shares on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), count) if elements >= SERIAL_ELEMENTS else 1
    if threads <= 1:
        work(0, count)
        return
    ends = [count * i // threads for i in range(threads + 1)]
    shares = [_pool().submit(work, *share) for share in pairwise(ends[1:])]
    try:
        work(ends[0], ends[1])
    finally:
        wait(shares)
    for share in shares:
        share.result()


def together(work: Callable[[bool], bool]) -> None:
    """Run work(True) here and work(False) on as many threads more as torch uses, for which nobody waits.

    So these may come when all is over, or never; `starlm.ops.cpu_tickets` is how such threads share work.
    `work` says whether it had to wait for one that another program kept from its core. Where that is so,
    one thread alone is faster, and the next calls have no other.
    """
    global _alone
    if _alone:
        _alone -= 1
    else:
        for _ in range(torch.get_num_threads() - 1):
            _pool().submit(work, False)
    if work(True):
        _alone = ALONE


_alone = 0
_POOL: ThreadPoolExecutor | None = None


def _pool() -> ThreadPoolExecutor:
    global _POOL
    if _POOL is None:
        _POOL = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="starlm-deform")
    return _POOL


def _forget_pool() -> None:
    """Threads do not survive a fork; the child makes its own."""
    global _POOL
    _POOL = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
