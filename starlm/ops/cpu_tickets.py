"""Work that threads share without meeting: numbered tickets, taken one by one by whoever has time.

A thread that wakes late, or that another program keeps from its core, takes fewer; nobody waits for more than
the tickets that are being worked on. One thread leads: helpers take tickets only once it has begun, and it
stays until all are done, so what they work on is there as long as they do, even where an interrupt keeps the
leader from beginning. Counts are int64 [COUNTS], zeros at the start, shared by all threads.
"""

import sys
import time
from typing import Any

import numba
import numpy as np
from numba.core import cgutils
from numba.extending import intrinsic

from starlm.ops.cpu_base import jit

# Of each count a cache line of its own.
TAKEN, DONE, BEGUN, COUNTS = 0, 8, 16, 24
# Looks at a count before the core is offered to others, some microseconds; and how often a helper does so.
PATIENCE, OFFERS = 1000, 20

if sys.platform == "win32":

    @jit
    def _yield():
        return 0

    @jit
    def now():
        return 0
else:
    _yield = numba.types.ExternalFunction("sched_yield", numba.types.int32())
    _clock = numba.types.ExternalFunction(
        "clock_gettime", numba.types.int32(numba.types.int32, numba.types.intp)
    )
    _MONOTONIC = time.CLOCK_MONOTONIC

    @jit
    def now():
        """Nanoseconds since some moment; 0 on Windows."""
        seconds_and_more = np.zeros(2, np.int64)
        _clock(_MONOTONIC, seconds_and_more.ctypes.data)
        return seconds_and_more[0] * 1_000_000_000 + seconds_and_more[1]


def _place(context, builder, signature, args):
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return cgutils.get_item_pointer(
        context, builder, signature.args[0], array, [args[1]], wraparound=False, boundscheck=False
    )


def _fetch_add(typingctx, counts, index):
    """Add 1 to counts[index]; what it was."""

    def codegen(context, builder, signature, args):
        one = context.get_constant(numba.types.int64, 1)
        return builder.atomic_rmw("add", _place(context, builder, signature, args), one, "acq_rel")

    return numba.types.int64(counts, numba.types.intp), codegen


def _load(typingctx, counts, index):
    """counts[index] as the other threads have left it."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_place(context, builder, signature, args), "acquire", 8)

    return numba.types.int64(counts, numba.types.intp), codegen


_add_one: Any = intrinsic(_fetch_add)
_look: Any = intrinsic(_load)


def new_counts() -> np.ndarray:
    """For one piece of work; who comes late still looks at them, so they are not used again."""
    return np.zeros(COUNTS, np.int64)


@jit
def begin(counts, leads):
    """Whether this thread may take tickets: the one that leads always, a helper if that one has begun."""
    if leads:
        _add_one(counts, BEGUN)
        return True
    for look in range(PATIENCE * OFFERS):
        if _look(counts, BEGUN):
            return True
        if look % PATIENCE == PATIENCE - 1:
            _yield()
    return False


@jit
def take(counts):
    """The next ticket."""
    return _add_one(counts, TAKEN)


@jit
def finish(counts):
    """A ticket that was taken is done."""
    _add_one(counts, DONE)


@jit
def await_done(counts, tickets):
    """Wait until so many are done; the nanoseconds of it, 0 where that was not long."""
    looks, begin = 0, 0
    while _look(counts, DONE) < tickets:
        looks += 1
        if looks % PATIENCE == 0:
            if not begin:
                begin = now()
            _yield()
    return now() - begin if begin else 0
