"""The models of a server, loaded in this process."""

import pytest
import torch

from starlm.generate.request import Request
from starlm.serve.config import ServeOptions
from starlm.serve.models import Models


@pytest.mark.parametrize(("dtype", "wanted"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_come_in_the_dtype_that_was_asked_for(run, dtype, wanted):
    models = Models(ServeOptions(model=(f"it={run}",), dtype=dtype, device="cpu", slots=2))
    try:
        models.load()
        served = models["it"]
        assert {parameter.dtype for parameter in served.text.model.parameters()} == {wanted}
        request = Request(tokens=[served.tokenizer.bos, 20], max_tokens=3)
        assert sum(len(piece.tokens) for piece in served.engine.submit(request)) == 3
    finally:
        models.close()


@pytest.mark.parametrize("room", [2, 3, 4, 5])
def test_little_room_is_no_reason_not_to_start(run, room):
    models = Models(ServeOptions(model=(f"it={run}",), device="cpu", slots=2, max_context=room))
    try:
        models.load()
        request = Request(tokens=[models["it"].tokenizer.bos], max_tokens=room - 1)
        assert list(models["it"].engine.submit(request))[-1].finish
    finally:
        models.close()
