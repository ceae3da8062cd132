"""What a request may hold, and what it costs to say that it may not."""

import pytest
from pydantic import ValidationError

from starlm.serve.schemas import ChatRequest, CompletionRequest, ReadsRequest

MANY = 5000
COMPLETION = {"model": "tiny", "prompt": "a"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {**COMPLETION, **{f"x{number}": 1 for number in range(MANY)}}),
        (CompletionRequest, {**COMPLETION, "logit_bias": {str(number): "x" for number in range(MANY)}}),
        (CompletionRequest, {**COMPLETION, "prompt": [1.5] * MANY}),
        (CompletionRequest, {**COMPLETION, "prompt": [[1.5] * MANY]}),
        (CompletionRequest, {**COMPLETION, "prompt": [["x"] * MANY] * 128}),
        (CompletionRequest, {**COMPLETION, "stop": [1] * MANY}),
        (ChatRequest, {"model": "tiny", "messages": [{"role": "user", "content": [1] * MANY}]}),
        (ChatRequest, {"model": "tiny", "messages": [{}] * MANY}),
        (ReadsRequest, {"model": "tiny", "tokens": ["x"] * MANY}),
    ],
    ids=["fields", "bias", "tokens", "prompt", "prompts", "stop", "content", "messages", "reads"],
)
def test_a_flood_of_mistakes_stays_small(kind, body):
    """An error has a record of each mistake, which costs many times the bytes that made it."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate(body)
    assert error.value.error_count() < 1000


def test_what_changes_no_answer_is_taken():
    free = {"user": "u", "safety_identifier": "s", "metadata": {"a": "b"}, "prompt_cache_key": "k"}
    for retention in ("in_memory", "24h"):
        body = {**COMPLETION, **free, "prompt_cache_retention": retention}
        assert CompletionRequest.model_validate(body).metadata == {"a": "b"}
    for wrong in ({"metadata": {"a": 1}}, {"metadata": {str(n): "x" for n in range(17)}}):
        with pytest.raises(ValidationError):
            CompletionRequest.model_validate({**COMPLETION, **wrong})
