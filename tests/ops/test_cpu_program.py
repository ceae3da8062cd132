"""A step's instructions against PyTorch, one by one; whole models: tests/model/test_step.py."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from starlm.ops import cpu_program, cpu_tickets
from starlm.ops.backends import CPU_DTYPES as DTYPES
from starlm.ops.cpu_product import ADD, RELU2, STORE

THEN = {STORE: lambda old, new: new, ADD: torch.add, RELU2: lambda old, new: torch.relu(new).square()}


def run(code, batch, table, streams=None, turns=None, head=False):
    """Of tokens 0 .. batch."""
    nothing = np.zeros((0, 0, 3, 3, batch), np.int64), np.zeros((batch, 2, 0), np.float32)
    streams, turns = (nothing[0] if streams is None else streams), (nothing[1] if turns is None else turns)
    return code.run(table, torch.arange(batch), streams, np.zeros((batch, 0), np.int64), turns, head=head)


@given(
    batch=st.integers(1, 9),
    width=st.integers(1, 70),
    hidden=st.integers(1, 300),
    then=st.sampled_from(sorted(THEN)),
    bias=st.booleans(),
    normalise=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1, 1000, cpu_program.MOST_BYTES]),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=150)
def test_products(batch, width, hidden, then, bias, normalise, dtype, size, threads, seed):
    """Three that wait for each other: of x, of what came of it, and back into x."""
    torch.manual_seed(seed)
    before = cpu_program.FEWEST_BYTES, cpu_program.MOST_BYTES
    cpu_program.FEWEST_BYTES, cpu_program.MOST_BYTES = min(size, before[0]), size
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        table = torch.randn(batch, width).to(dtype)
        shapes = (hidden, width), (hidden, hidden), (width, hidden)
        up, mid, down = (torch.randn(shape).to(dtype) / shape[1] ** 0.5 for shape in shapes)
        more = torch.randn(hidden).to(dtype) if bias else None
        code = cpu_program.Code(dtype, width)
        one, two = code.row("one", hidden), code.row("two", hidden)
        code.product(code.x, up, one, bias=more, normalise=normalise)
        code.product(code.x, up, two)
        code.product(one, mid, two, then=then)
        code.product(two, down, code.x, then=ADD)
        got = run(code, batch, table)
    finally:
        cpu_program.FEWEST_BYTES, cpu_program.MOST_BYTES = before
        torch.set_num_threads(torch_threads)
    x, up, mid, down = (t.double() for t in (table, up, mid, down))
    x = rms_norm(x, (width,), eps=1e-6)
    first = linear(
        rms_norm(x, (width,), eps=1e-6) if normalise else x, up, None if more is None else more.double()
    )
    x = x + linear(THEN[then](linear(x, up), linear(first, mid)), down)
    assert got.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got.double(), rms_norm(x, (width,), eps=1e-6), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("then", sorted(THEN))
def test_what_is_not_a_number_stays_so(then):
    table, code = torch.ones(1, 4), cpu_program.Code(torch.float32, 4)
    weight = torch.eye(4)
    weight[2, 1], weight[3, 0] = torch.nan, torch.inf
    out = code.row("out", 4)
    code.product(code.x, torch.zeros(4, 4), out)
    code.product(code.x, weight, out, then=then)
    code.product(out, torch.eye(4), code.x)
    assert not run(code, 1, table).isfinite().any(), "RMSNorm spreads it"


def test_a_code_can_go_on():
    """What was added after a run belongs to the next."""
    code, table, weight = cpu_program.Code(torch.float32, 3), torch.randn(2, 3), torch.randn(3, 3)
    out = code.row("out", 3)
    code.product(code.x, weight, out)
    code.product(out, weight, code.x, then=ADD)
    once = run(code, 2, table)
    code.product(code.x, weight, out)
    code.product(out, weight, code.x, then=ADD)
    x = rms_norm(table, (3,), eps=1e-6)
    for got in (once, run(code, 2, table)):
        x = x + linear(linear(x, weight), weight)
        torch.testing.assert_close(got, rms_norm(x, (3,), eps=1e-6))


@pytest.mark.parametrize("held", [False, True])
def test_a_step_says_whether_it_waited_for_half_of_its_time(held, monkeypatch):
    """For a ticket that somebody took and keeps for a while."""
    told = []
    monkeypatch.setattr(cpu_program, "together", lambda work: told.append(work(True)))
    code, table = cpu_program.Code(torch.float32, 4), torch.ones(1, 4)
    code.product(code.x, torch.eye(4), code.row("out", 4))
    code.product(code.row("out", 4), torch.eye(4), code.x)
    run(code, 1, table)

    def counts():
        counts = cpu_tickets.new_counts()
        if held:
            cpu_tickets.take(counts)
            threading.Timer(0.2, cpu_tickets.finish, [counts]).start()
        return counts

    monkeypatch.setattr(cpu_program, "new_counts", counts)
    run(code, 1, table)
    assert told[1] == held


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_sees_all_that_came_before(dtype, softcap):
    """And what asks for no logits goes without."""
    table, weight = torch.randn(3, 20).to(dtype), torch.randn(20, 20).to(dtype)
    head = torch.randn(501, 20).to(dtype) * 3
    code = cpu_program.Code(dtype, 20)
    code.head(head, softcap)
    code.product(code.x, weight, code.row("out", 20))
    code.product(code.row("out", 20), weight, code.x, then=ADD)
    x = rms_norm(table.double(), (20,), eps=1e-6)
    x = rms_norm(x + linear(linear(x, weight.double()), weight.double()), (20,), eps=1e-6)
    logits = linear(x, head.double())
    wanted = softcap * torch.tanh(logits / softcap) if softcap else logits
    for _ in range(3):
        got = run(code, 3, table, head=True)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
        assert run(code, 3, table).shape == table.shape
    assert code.sizes == [3]


@given(
    past=st.integers(0, 50),
    first=st.integers(-3, 60),
    window=st.sampled_from([None, 1, 7]),
    turned=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=100)
def test_attention(past, first, window, turned, dtype, seed):
    torch.manual_seed(seed)
    heads, channels, batch = 3, 4, 2
    width = heads * channels
    table = torch.randn(batch, width).to(dtype)
    weights = [torch.randn(width, width).to(dtype) for _ in range(3)]
    rows = [torch.randn(batch, past + 1, width).to(dtype) for _ in range(2)]
    streams = np.zeros((1, 1, 3, 3, batch), np.int64)
    for b in range(batch):
        for kind in range(2):
            streams[0, 0, kind, :, b] = rows[kind][b].data_ptr(), past, first
    angle = torch.rand(batch, channels // 2) * 6
    turns = torch.stack([angle.cos(), angle.sin()], dim=1) if turned else torch.zeros(batch, 2, 0)
    code = cpu_program.Code(dtype, width)
    parts = [code.row(name, width) for name in "qkv"]
    for weight, part in zip(weights, parts, strict=True):
        code.product(code.x, weight, part)
    code.attend(*parts, code.x, layer=0, heads=heads, window=window)
    got = run(code, batch, table, streams, turns.numpy())

    x = rms_norm(table.double(), (width,), eps=1e-6)
    q, k, v = (linear(x, weight.double()).view(batch, 1, heads, channels) for weight in weights)
    q, k = (rms_norm(t, (channels,), eps=1e-6) for t in (q, k))
    if turned:
        cos, sin = (t.double()[:, None, None] for t in (angle.cos(), angle.sin()))
        q, k = (turn(t, cos, sin) for t in (q, k))
    kept = [t.double().view(batch, past + 1, heads, channels).clone() for t in rows]
    for t, new in zip(kept, (k, v), strict=True):
        torch.testing.assert_close(t[:, past], new[:, 0].to(dtype).double(), rtol=1e-2, atol=1e-4)
    begin = min(max(first, 0, 0 if window is None else past + 1 - window), past)
    k, v = (t[:, begin:].transpose(1, 2) for t in kept)
    y = scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2)[:, 0]
    wanted, tolerance = rms_norm(y, (width,), eps=1e-6), 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def turn(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def test_logits_of_no_rows():
    assert cpu_program.logits(torch.zeros(0, 8), torch.randn(5, 8), 15.0).shape == (0, 5)
