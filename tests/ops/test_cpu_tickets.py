"""Each ticket is taken once, by whoever comes, and nobody works before the leader or behind its back."""

import threading
import time

import numpy as np
import pytest

from starlm.ops import cpu_tickets
from starlm.ops.cpu_base import jit


@jit
def _work(counts, taken, total, barrier, leads):
    """Each ticket is counted; those from `barrier` on note how many were done before them."""
    if not cpu_tickets_begin(counts, leads):
        return
    while True:
        ticket = cpu_tickets_take(counts)
        if ticket >= total:
            break
        if ticket >= barrier:
            cpu_tickets_await(counts, barrier)
            taken[1, ticket] = taken[0, :barrier].sum()
        taken[0, ticket] += 1
        cpu_tickets_finish(counts)
    if leads:
        cpu_tickets_await(counts, total)


cpu_tickets_begin, cpu_tickets_take = cpu_tickets.begin, cpu_tickets.take
cpu_tickets_await, cpu_tickets_finish = cpu_tickets.await_done, cpu_tickets.finish


@pytest.mark.parametrize("helpers", [0, 1, 7])
def test_every_ticket_is_taken_once_and_in_order(helpers):
    total, barrier = 20_000, 9_000
    for _ in range(5):
        counts, taken = cpu_tickets.new_counts(), np.zeros((2, total), np.int64)
        threads = [
            threading.Thread(target=_work, args=(counts, taken, total, barrier, False))
            for _ in range(helpers)
        ]
        for thread in threads:
            thread.start()
        _work(counts, taken, total, barrier, True)
        # All is done when the leader is, whatever the others do.
        assert (taken[0] == 1).all()
        assert (taken[1, barrier:] == barrier).all()
        for thread in threads:
            thread.join()
        assert (taken[0] == 1).all()


def test_helpers_do_nothing_where_nobody_leads():
    counts, taken = cpu_tickets.new_counts(), np.zeros((2, 10), np.int64)
    begin = time.monotonic()
    _work(counts, taken, 10, 0, False)
    assert time.monotonic() - begin < 20
    assert not taken.any()
    _work(counts, taken, 10, 0, True)
    _work(counts, taken, 10, 0, False)
    assert (taken[0] == 1).all()


def test_waiting_is_told_in_nanoseconds():
    counts = cpu_tickets.new_counts()
    assert cpu_tickets.await_done(counts, 0) == 0
    # Compiled before the clock runs.
    cpu_tickets.finish(cpu_tickets.new_counts())
    begin = time.monotonic_ns()
    threading.Timer(0.2, cpu_tickets.finish, [counts]).start()
    waited = cpu_tickets.await_done(counts, 1)
    assert 1e8 < waited < time.monotonic_ns() - begin
