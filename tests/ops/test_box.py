"""Windowed means against sums by hand; precision at a million tokens; gradients."""

import pytest
import torch
from oracle import assert_same

from starlm.ops.box import box, prefix_sums


def by_hand(values, width, first=None):
    """The mean over (t - w, t], one element at a time; the row at the far edge counts in part."""
    out = torch.zeros_like(width)
    batch, length, heads, channels = width.shape
    for b in range(batch):
        for t in range(length):
            low = 0 if first is None else min(int(first[b, t]), t)
            for h in range(heads):
                for c in range(channels):
                    w = min(float(width[b, t, h, c]), t + 1 - low)
                    whole, part = int(w), w - int(w)
                    total = values[b, t + 1 - whole : t + 1, h, c].sum()
                    if part:
                        total = total + part * values[b, t - whole, h, c]
                    out[b, t, h, c] = total / w
    return out


def problem(length=23, dtype=torch.float64):
    values = torch.randn(2, length, 3, 4, dtype=dtype)
    return values, 1 + torch.rand(2, length, 3, 4, dtype=dtype).square() * 2 * length


def test_definition():
    values, width = problem()
    first = torch.tensor([[0] * 9 + [9] * 14, [3] * 23])
    for rows in (None, first):
        got, effective = box(prefix_sums(values), width, first=rows)
        assert_same("mean", got, by_hand(values, width, rows), 1e-12)
        available = torch.arange(1, 24) - (0 if rows is None else rows)
        assert (effective <= available.clamp(min=1).expand(2, 23)[..., None, None]).all()


def test_a_first_row_below_0_is_row_0():
    values, width = problem()
    sums = prefix_sums(values)
    for got, wanted in zip(box(sums, width, first=torch.full((2, 23), -4)), box(sums, width), strict=True):
        assert_same("wild", got, wanted, 0.0)


def test_width_one_is_the_own_row_and_a_long_window_the_mean_of_all():
    values, width = problem()
    sums = prefix_sums(values)
    assert_same("one", box(sums, torch.ones_like(width))[0], values, 1e-12)
    mean = values.cumsum(1) / torch.arange(1, 24).view(1, -1, 1, 1)
    for far in (24.0, 1e9, torch.inf):
        assert_same("all", box(sums, torch.full_like(width, far))[0], mean, 1e-12)


def test_continued_sums_and_slots_at_different_positions():
    values, width = problem()
    wanted, _ = box(prefix_sums(values), width)
    sums = prefix_sums(values[:, :9])
    sums = torch.cat([sums[:, :-1], prefix_sums(values[:, 9:], sums[:, -1:])], dim=1)
    got, _ = box(sums, width[:, 9:], past=9)
    assert_same("number", got, wanted[:, 9:], 1e-12)
    got, _ = box(sums, torch.stack([width[0, 9:12], width[1, 4:7]]), past=torch.tensor([9, 4]))
    assert_same("per slot", got, torch.stack([wanted[0, 9:12], wanted[1, 4:7]]), 1e-12)


def test_gradients():
    values, width = problem(7)
    width = torch.where((width - width.round()).abs() < 0.05, width + 0.1, width)

    def mean(values, width):
        return box(prefix_sums(values), width, first=torch.tensor([[0] * 7, [0, 0, 0, 3, 3, 3, 3]]))[0]

    torch.autograd.gradcheck(mean, (values.requires_grad_(), width.requires_grad_()))


def test_gradient_of_the_width_compares_the_edge_with_the_mean():
    values = torch.tensor([1.0, 5.0, 2.0, 2.0], dtype=torch.float64).view(1, 4, 1, 1)
    width = torch.full((1, 4, 1, 1), 2.5, dtype=torch.float64, requires_grad=True)
    mean, _ = box(prefix_sums(values), width)
    mean[0, 3].sum().backward()
    # Window (0.5, 3]: rows 3 and 2, and half of row 1.
    assert mean[0, 3].item() == pytest.approx((2 + 2 + 2.5) / 2.5)
    assert width.grad[0, 3].item() == pytest.approx((5 - 6.5 / 2.5) / 2.5)
    assert width.grad[0, :3].eq(0).all()


def test_later_rows_change_nothing():
    values, width = problem(dtype=torch.float32)
    poisoned = values.clone()
    poisoned[:, 12:] = torch.nan
    a, b = (box(prefix_sums(x), width)[0][:, :12] for x in (values, poisoned))
    assert torch.equal(a, b)


@pytest.mark.parametrize("width", [2.25, 1000.5])
def test_precision_at_a_million_tokens(width):
    """The mean of the last rows of a million is as good as alone, though the sum before it is large."""
    length, tail = 1_000_000, 2000
    values = torch.randn(1, length, 1, 2) + 1.0
    widths = torch.full((1, tail, 1, 2), width)
    sums = prefix_sums(values)
    assert sums[0, -1].abs().min() > 0.9 * length
    got, _ = box(sums, widths, past=length - tail)
    begin = length - 2 * tail
    wanted, _ = box(prefix_sums(values[:, begin:]), widths, past=tail)
    assert_same("mean", got, wanted, 1e-9)


def test_the_precision_test_would_notice_fp32():
    values = torch.randn(1, 1_000_000, 1, 1) + 1.0
    sums = prefix_sums(values).float().double()
    got, _ = box(sums, torch.full((1, 1, 1, 1), 2.25), past=999_999)
    wanted, _ = box(prefix_sums(values[:, -10:]), torch.full((1, 1, 1, 1), 2.25), past=9)
    assert (got - wanted).abs().max() > 1e-4
