"""The definition of `deform` once more, as scalar loops in Python floats, and the comparison with it."""

import math

import torch


def loop_deform(values, shift, origin=None, first=None, past=0):
    """DESIGN's formula, one element at a time, in fp64."""
    batch, length, heads, channels = shift.shape
    out = torch.zeros(shift.shape, dtype=torch.float64)
    for b in range(batch):
        before = int(past if isinstance(past, int) else past[b])
        for t in range(length):
            last = before + t
            low = 0 if first is None else int(first[b, t])

            def clip(row, low=low, last=last):
                return min(max(row, low), last)

            for h in range(heads):
                o = last if origin is None else int(origin[b, t, h])
                for c in range(channels):
                    s = float(shift[b, t, h, c])
                    if o < 0:
                        continue
                    if math.isnan(s):
                        out[b, t, h, c] = math.nan
                        continue
                    if math.isinf(s):
                        row = clip(low if s > 0 else last)
                        out[b, t, h, c] = values[b, row, h, c].double()
                        continue
                    k = math.floor(s)
                    near = values[b, clip(o - k), h, c].double()
                    far = values[b, clip(o - k - 1), h, c].double()
                    out[b, t, h, c] = near + (s - k) * (far - near)
    return out


def assert_same(name, got, wanted, tolerance):
    """Elementwise: NaN where NaN is wanted, and else within `tolerance` of it, absolutely."""
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    got, wanted = got.detach().double(), wanted.detach().double()
    assert torch.equal(got.isnan(), wanted.isnan()), f"{name}: NaN in other places"
    error = (got - wanted).nan_to_num(0.0).abs()
    worst = error.max().item() if error.numel() else 0.0
    where = error.argmax().item() if error.numel() else None
    assert worst <= tolerance, f"{name}: off by {worst:.3g} at {where}, allowed {tolerance:.3g}"
