"""Which of two paths a computation takes: kernels of our own, or its definition in plain PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager

_plain = False


def is_plain() -> bool:
    """Whether we are inside `plain`."""
    return _plain


@contextmanager
def plain() -> Iterator[None]:
    """Within, everything that has both is computed by its definition: operator, layers, anchors, loss.

    To compare results, to look for a mistake, or where our kernels do not run. It counts for all threads of
    the process. A `backend` that a call names is taken, and a decode state keeps its index of n-grams.

    Example:
        >>> import torch
        >>> from starlm import deform
        >>> with plain():
        ...     deform(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).item()
        1.0
    """
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before
