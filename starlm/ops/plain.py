"""Which of two paths a computation takes: kernels of our own, or its definition in plain PyTorch."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

_depth, _lock = 0, threading.Lock()


def is_plain() -> bool:
    """Whether all is to be computed by its definition: within `plain`, and for forward-mode derivatives.

    Kernels have none of these, and would drop them in silence.
    """
    return _depth > 0 or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


@contextmanager
def plain() -> Iterator[None]:
    """Within, everything that has both is computed by its definition: operator, layers, anchors, loss.

    To compare results, to look for a mistake, or where our kernels do not run. It counts for all threads of
    the process, and where checkpointing computes again, `backward` belongs within. A `backend` that a call
    names is taken, and a decode state keeps its index of n-grams.

    Example:
        >>> import torch
        >>> from starlm import deform
        >>> with plain():
        ...     deform(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).item()
        1.0
    """
    global _depth
    with _lock:
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
