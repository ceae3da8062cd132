"""What an engine takes on, and what it refuses."""

import pytest
import torch
from engines import GREEDY, MODELS, VOCAB, drained, ids_of, prompt

from starlm.errors import InputError, StarLMError
from starlm.generate import engine as module
from starlm.generate.engine import Engine, QueueFull
from starlm.generate.request import Request
from starlm.generate.sampling import Sampling


def test_a_full_queue():
    engine = Engine(MODELS["gated"], slots=1, queue=2)
    request = Request(tokens=prompt(0, 5), max_tokens=3, sampling=GREEDY)
    streams = [engine.submit(request) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        engine.submit(request)
    assert issubclass(QueueFull, StarLMError)
    engine.step()
    streams.append(engine.submit(request))
    assert [len(ids_of(list(stream))) for stream in streams] == [3, 3, 3]


def test_several_requests_are_queued_at_once_or_not_at_all():
    engine = Engine(MODELS["gated"], slots=1, queue=3)
    request = Request(tokens=prompt(0, 5), max_tokens=3, sampling=GREEDY)
    heard = []
    several = [(request, heard.append)] * 2
    with pytest.raises(InputError, match="4 prompts at once are more than the 3 that may wait"):
        engine.submit_all(several * 2)
    bad = Request(tokens=[VOCAB], max_tokens=3)
    with pytest.raises(InputError, match="tokens must be between"):
        engine.submit_all([*several, (bad, None)])
    assert engine.stats().waiting == 0
    streams = engine.submit_all(several)
    with pytest.raises(QueueFull, match="2 requests are waiting already, of 3"):
        engine.submit_all(several)
    assert (engine.stats().waiting, engine.stats().prompt_tokens) == (2, 2 * len(request.tokens))
    drained(engine)
    assert all(stream.done for stream in streams)
    assert len(ids_of(heard)) == 6


def test_impossible_requests(monkeypatch):
    engine = Engine(MODELS["gated"], slots=2, max_context=50)
    for wrong, message in (
        ({"tokens": []}, "tokens must not be empty"),
        ({"tokens": "text"}, "sequence of token ids, .*TextModel.prompt"),
        ({"tokens": [1.5]}, "whole numbers"),
        ({"tokens": torch.tensor([1, 2])}, r"tensor.tolist\(\)"),
        ({"tokens": [VOCAB]}, f"tokens must be between 0 and {VOCAB - 1}"),
        ({"max_tokens": -1}, "max_tokens must be a whole number, 0 or more; got -1"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, 0 or more; got 2.5"),
        ({"stop": "ab"}, "stop must be a tuple of strings"),
        ({"max_tokens": 49}, "together more than the 50 allowed"),
        ({"n": 0}, "n must be a whole number, 1 or more"),
        ({"n": 3}, "at most the engine's 2 slots; got 3"),
        ({"stop": ("a", "")}, "empty string"),
        ({"logprobs": -1}, "logprobs must be a whole number, 0 or more"),
        ({"begin": "é".encode()[:1]}, "begin must be whole characters"),
        ({"sampling": Sampling(logit_bias={VOCAB: 1.0})}, "logit_bias names token"),
    ):
        with pytest.raises(InputError, match=message):
            engine.submit(Request(**{"tokens": [1, 2], "max_tokens": 5, **wrong}))
    for wrong in ({"slots": 0}, {"prefill_chunk": 0}, {"queue": 0}, {"cache_bytes": -1}):
        with pytest.raises(InputError, match=rf"{next(iter(wrong))} must be \d or more"):
            Engine(MODELS["gated"], **wrong)
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    with pytest.raises(InputError, match="decode state"):
        engine.submit(Request(tokens=[1] * 30, max_tokens=5))
    assert engine.stats().waiting == 0


@pytest.mark.parametrize("running", [False, True])
def test_memory_is_promised_once(monkeypatch, running):
    """What waits or runs will need it, whatever is free at the moment."""
    model = MODELS["star"]
    request = Request(tokens=prompt(1, 20), max_tokens=80, sampling=GREEDY)
    rows = model.model.state_bytes(len(request.tokens) + 80)
    engine = Engine(model, slots=4, cache_bytes=0)

    def free(device):
        # Twice the rows for each of two, and once more for the moment in which a buffer grows.
        return 5 * rows - sum(state.num_bytes for state in engine._running.values())

    monkeypatch.setattr(module, "free_memory", free)
    streams = [engine.submit(request) for _ in range(2)]
    if running:
        engine.step()
        assert free(None) < 5 * rows
    for many in (1, 2, 4):
        with pytest.raises(QueueFull, match=r"accepted before.*Try again later"):
            engine.submit_all([(request, None)] * many)
    assert len(engine._streams()) == 2
    streams[0].cancel()
    engine.submit(request)
    assert all(list(stream)[-1].finish for stream in streams)


def test_only_what_can_run_together_needs_memory(monkeypatch):
    request = Request(tokens=prompt(1, 20), max_tokens=80, sampling=GREEDY)
    engine = Engine(MODELS["star"], slots=1, cache_bytes=0)
    rows = engine.model.model.state_bytes(len(request.tokens) + 80)
    monkeypatch.setattr(module, "free_memory", lambda device: 3 * rows)
    streams = [engine.submit(request) for _ in range(5)] + engine.submit_all([(request, None)] * 5)
    assert engine.submit_all([]) == []
    assert engine.submit(Request(tokens=[1] * 10_000, max_tokens=0)).done
    assert len({tuple(p.tokens[0].id for p in stream if p.tokens) for stream in streams}) == 1
