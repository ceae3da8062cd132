"""New rows of each of many sequences against `mix` of all their rows, and box sums kept in buffers."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starlm.ops import cpu_step
from starlm.ops.backends import CPU_DTYPES
from starlm.ops.box import prefix_sums
from starlm.ops.mix import mix


def step(values, shift, gate, origin, streams, **layout):
    """`cpu_step.step` of tensors by head."""
    heads, flat = values.shape[2], [None if x is None else x.flatten(2) for x in (values, shift, gate)]
    rows = [] if origin is None else origin.unbind(-1)
    return cpu_step.step(*flat, rows, streams, heads=heads, **layout).view_as(values)


def sequence(length, heads, channels, random):
    return [torch.randn(1, length, heads, channels, generator=random) * scale for scale in (1, 3, 1)]


def buffers(values, kinds, dtype, new=1):
    """What `now`, anchored and box heads keep of all but the last `new` rows, and room for these."""
    near, anchored, boxes = kinds
    rows = torch.nn.functional.rms_norm(values, values.shape[-1:], eps=1e-6).to(dtype)
    rows[:, -new:] = torch.nan
    now, middle, box = rows.split([near, anchored, boxes], dim=2)
    sums = prefix_sums(box[:, :-new])
    room = sums.new_full((1, new, *sums.shape[2:]), torch.nan)
    return [now.clone(), middle.clone(), torch.cat([sums, room], dim=1)]


def table(kept, starts, new=1):
    """[3, 3, B]: address, rows and first of each kind's buffers of each sequence."""
    return np.array(
        [
            [
                [one[kind].data_ptr() for one in kept],
                [one[kind].shape[1] - new for one in kept],
                starts,
            ]
            for kind in range(3)
        ]
    )


@given(
    lengths=st.lists(st.integers(5, 40), min_size=1, max_size=4),
    new=st.integers(1, 5),
    kinds=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)).filter(any),
    channels=st.integers(1, 9),
    gated=st.booleans(),
    max_shift=st.sampled_from([None, 0, 3, 1000]),
    dtype=st.sampled_from(CPU_DTYPES),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=150)
def test_a_step_is_the_last_rows_of_mix(lengths, new, kinds, channels, gated, max_shift, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    near, anchored, boxes = kinds
    layout = {"near": near, "boxes": boxes, "max_shift": max_shift}
    texts, kept, wanted, last, origins, starts = [], [], [], [], [], []
    for length in lengths:
        text = [x.to(dtype) for x in sequence(length, sum(kinds), channels, random)]
        origin = torch.randint(-1, length, (1, length, anchored), generator=random)
        first = torch.randint(-2, length + 2, (1, length), generator=random)
        values, shift, gate = text
        full = mix(values, shift, gate if gated else None, origin, first=first, **layout)
        wanted.append(full[:, -new:])
        kept.append(buffers(values, kinds, dtype, new))
        texts.append(text)
        last.append([x[:, -new:] for x in text])
        origins.append(origin[:, -new:])
        starts.append(first[:, -new:])
    values, shift, gate = (torch.cat(parts) for parts in zip(*last, strict=True))
    first, origin = torch.cat(starts), torch.cat(origins)
    streams = table(kept, first[:, 0].tolist(), new)
    got = step(values, shift, gate if gated else None, origin, streams, first=first, **layout)
    assert got.dtype == dtype
    # In bfloat16 the buffers hold rounded rows, those of mix are exact.
    tolerance = 2e-5 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(got, torch.cat(wanted), rtol=tolerance, atol=tolerance)
    # The new row stands where it belongs, and nothing else was touched.
    for text, one in zip(texts, kept, strict=True):
        row = torch.nn.functional.rms_norm(text[0].float(), (channels,), eps=1e-6)
        now, middle, box = row.split(list(kinds), dim=2)
        torch.testing.assert_close(one[0].float(), now, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(one[1].float(), middle, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(one[2], prefix_sums(box), rtol=1e-2, atol=2e-1)


def test_nan_stays_in_its_channel():
    values, shift = torch.ones(1, 1, 2, 3), torch.zeros(1, 1, 2, 3)
    shift[0, 0, 0, 1] = torch.nan
    rows = [torch.ones(1, 1, 2, 3), torch.ones(1, 1, 0, 3), torch.ones(1, 1, 0, 3)]
    layout = {"near": 2, "boxes": 0, "max_shift": None}
    got = step(values, shift, None, None, table([rows], [0]), **layout)
    assert got.isnan().flatten().tolist() == [False, True, False, False, False, False]


def test_many_threads_give_the_same():
    """Enough sequences for a second thread."""
    random, results = torch.Generator().manual_seed(0), []
    texts = [sequence(5, 8, 64, random) for _ in range(70)]
    layout = {"near": 8, "boxes": 0, "max_shift": None}
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            kept = [buffers(values, (8, 0, 0), torch.float32) for values, _, _ in texts]
            values, shift, gate = (
                torch.cat(parts) for parts in zip(*([x[:, -1:] for x in text] for text in texts), strict=True)
            )
            streams = table(kept, [0] * len(texts))
            results.append(step(values, shift, gate, None, streams, **layout))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*results)
