"""torch.export of the model without a cache: one program for all lengths, or with a window for one."""

import pytest
import torch
from models import VOCAB, make_tokens
from wrapped import make_pair

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("kind", ["gated", "product", "star", "attention", "convolution"])
@torch.no_grad()
def test_export_for_every_length(kind):
    wrapper = make_pair(kind, dtype=torch.float32)[1]
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=3, max=512)
    shapes = {"input_ids": {0: batch, 1: length}, "position_ids": {0: batch, 1: length}}
    given = {"input_ids": make_tokens(2, 10), "position_ids": torch.arange(10).repeat(2, 1)}
    program = torch.export.export(wrapper, (), given, dynamic_shapes=shapes)
    for rows, columns in ((2, 10), (3, 33), (1, 300)):
        tokens = torch.randint(VOCAB, (rows, columns))
        positions = torch.arange(columns).repeat(rows, 1)
        # Two documents.
        positions[:, columns // 2 :] -= columns // 2
        found = program.module()(input_ids=tokens, position_ids=positions).logits
        wanted = wrapper(tokens, position_ids=positions).logits
        # Without export RMSNorm and relu² are kernels of ours, which round in another order.
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_window_is_exported_for_one_length():
    wrapper = make_pair("star mixed", dtype=torch.float32)[1]
    program = torch.export.export(wrapper, (make_tokens(2, 30),))
    tokens = make_tokens(2, 30)
    torch.testing.assert_close(program.module()(tokens).logits, wrapper(tokens).logits, rtol=1e-4, atol=1e-5)
