"""Many answers at once: each what it would be alone, whoever comes, goes or is cancelled beside it."""

import asyncio
import gc
import threading
import weakref

import hypothesis.strategies as st
import pytest
import torch
from engines import GREEDY, KINDS, MODELS, TOKENIZER, collected, drained, finish_of, ids_of, make, prompt
from hypothesis import given, settings

from starlm.errors import StarLMError
from starlm.generate.engine import Engine
from starlm.generate.request import Request
from starlm.generate.sampling import Sampling
from starlm.model.state import DecodeState


def assert_argmax(model, tokens, got, finish, count):
    """Each token is the argmax of a full forward over all before it, and the answer ends where it must."""
    with torch.no_grad():
        wanted = model.model(torch.tensor([[*tokens, *got]]))[0, len(tokens) - 1 :].argmax(-1).tolist()
    assert got == wanted[: len(got)]
    assert not model.stop_ids & set(got)
    if finish == "stop":
        assert wanted[len(got)] in model.stop_ids
    elif finish == "length":
        assert len(got) == count


REQUESTS = st.tuples(
    st.integers(1, 70), st.integers(1, 12), st.integers(0, 14), st.sampled_from([None, None, 0, 1, 5])
)


@given(
    kind=st.sampled_from(list(KINDS)),
    requests=st.lists(REQUESTS, min_size=1, max_size=32),
    slots=st.sampled_from([1, 3, 32]),
    chunk=st.sampled_from([1, 7, 64]),
    cache=st.sampled_from([0, 1 << 20, 1 << 28]),
)
@settings(max_examples=40, deadline=None)
def test_greedy_answers_are_the_argmax_of_full_forwards(kind, requests, slots, chunk, cache):
    """Requests that enter at random steps and are cancelled at random ones."""
    model = MODELS[kind]
    engine = Engine(model, slots=slots, prefill_chunk=chunk, cache_bytes=cache)
    streams, waiting, step = [], sorted(enumerate(requests), key=lambda pair: pair[1][2]), 0
    while waiting or engine.step():
        while waiting and waiting[0][1][2] <= step:
            number, (length, count, _, after) = waiting.pop(0)
            tokens = prompt(number, length)
            request = Request(tokens=tokens, max_tokens=count, sampling=GREEDY)
            streams.append(
                (*collected(engine, request), tokens, count, None if after is None else step + after)
            )
        for stream, *_, when in streams:
            if when is not None and step >= when:
                stream.cancel()
        stats = engine.stats()
        assert stats.running <= stats.used_slots <= slots
        step += 1
    for stream, pieces, tokens, count, when in streams:
        assert stream.done
        got, (finish,) = ids_of(pieces), finish_of(pieces)
        assert stream.completion_tokens == len(got)
        assert_argmax(model, tokens, got, finish, count)
        if finish == "cancelled":
            assert when is not None
        else:
            text = "".join(piece.text for piece in pieces)
            assert text == TOKENIZER.decode(got)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.used_slots) == (0, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_do_not_know_their_neighbours(kind):
    model = MODELS[kind]
    options = {"top_p": 0.95, "repetition_penalty": 1.1, "presence_penalty": 0.2}
    requests = [
        Request(tokens=prompt(n, 5 + 9 * n), max_tokens=15, n=1 + n % 3, sampling=Sampling(seed=n, **options))
        for n in range(6)
    ]
    alone = [list(Engine(model, cache_bytes=0).submit(request)) for request in requests]
    engine = Engine(model, slots=8, prefill_chunk=16)
    together = [collected(engine, request) for request in reversed(requests)][::-1]
    drained(engine)
    for request, wanted, (_, got) in zip(requests, alone, together, strict=True):
        for index in range(request.n):
            assert ids_of(got, index) == ids_of(wanted, index)
            assert len(ids_of(got, index)) > 2


def test_n_answers_come_from_one_prefill(monkeypatch):
    model, calls = make("star"), []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda tokens, **named: calls.append(tokens.shape) or forward(tokens, **named)
    )
    request = {"tokens": prompt(1, 60), "max_tokens": 12, "sampling": Sampling(seed=3, temperature=1.0)}
    engine = Engine(model, cache_bytes=0)
    pieces = list(engine.submit(Request(**request, n=5)))
    assert [shape for shape in calls if shape[1] > 1] == [(1, 81)]
    answers = [tuple(ids_of(pieces, index)) for index in range(5)]
    assert len(set(answers)) == 5
    assert len({answer[0] for answer in answers}) > 1, "each has a first token of its own"
    assert answers[0] == tuple(ids_of(list(engine.submit(Request(**request)))))


@pytest.mark.parametrize("kind", KINDS)
def test_the_prefix_cache_changes_nothing(kind):
    model = MODELS[kind]
    texts = [prompt(1, 30), prompt(1, 30) + [5, 6, 7] * 9, prompt(1, 30)[:50] + [8] * 5, prompt(1, 30)]

    def answers(engine):
        streams = []
        for tokens in texts:
            request = Request(tokens=tokens, max_tokens=6, n=2, sampling=Sampling(seed=4, temperature=0.5))
            pieces = []
            streams.append((engine.submit(request, pieces.append), pieces))
            drained(engine)
        return streams

    with_cache, without = Engine(model, prefill_chunk=16), Engine(model, prefill_chunk=16, cache_bytes=0)
    for (stream, got), (other, wanted) in zip(answers(with_cache), answers(without), strict=True):
        assert [ids_of(got, n) for n in (0, 1)] == [ids_of(wanted, n) for n in (0, 1)]
        assert other.cached_tokens == 0
        assert stream.cached_tokens < stream.prompt_tokens
    stats = with_cache.stats()
    assert stats.cache_hits == 3
    assert stats.cached_tokens >= 30 + 45 + 50
    assert without.stats().cache_bytes == 0


def test_the_next_turn_finds_the_answer_cached():
    engine, tokens = Engine(MODELS["gated"]), prompt(1, 30)
    first = list(engine.submit(Request(tokens=tokens, max_tokens=20, sampling=GREEDY)))
    turn = engine.submit(Request(tokens=[*tokens, *ids_of(first), 9, 9], max_tokens=1))
    drained(engine)
    assert turn.cached_tokens == len(tokens) + len(ids_of(first)) - 1


@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens(count):
    stream = Engine(MODELS["star"]).submit(
        Request(tokens=prompt(0, 5), max_tokens=count, n=2, sampling=GREEDY)
    )
    pieces = list(stream)
    assert [finish_of(pieces, index) for index in (0, 1)] == [["length"]] * 2
    assert [len(ids_of(pieces, index)) for index in (0, 1)] == [count] * 2
    assert (stream.prompt_tokens, stream.completion_tokens, stream.done) == (6, 2 * count, True)


def test_stop_strings_across_tokens():
    model = MODELS["gated"]
    request = {"tokens": prompt(0, 5), "max_tokens": 40, "sampling": Sampling(seed=8, temperature=1.0)}
    pieces = list(Engine(model).submit(Request(**request)))
    text = "".join(piece.text for piece in pieces)
    assert len(text) > 20
    for begin, end in ((3, 9), (10, 12), (0, 1), (15, len(text))):
        stop = text[begin:end]
        got = list(Engine(model).submit(Request(**request, stop=("never there", stop))))
        assert "".join(piece.text for piece in got) == text[: text.index(stop)]
        assert finish_of(got) == ["stop"]


def test_logprobs():
    model, tokens = MODELS["star"], prompt(0, 5)
    sampling = Sampling(seed=1, temperature=0.5, logit_bias={44: 3.0})
    request = Request(tokens=tokens, max_tokens=5, logprobs=3, sampling=sampling)
    told = [token for piece in Engine(model).submit(request) for token in piece.tokens]
    ids = [*tokens, *(token.id for token in told)]
    with torch.no_grad():
        wanted = model.model(torch.tensor([ids]))[0].log_softmax(-1)
    for row, token in enumerate(told, len(tokens) - 1):
        assert token.logprob == pytest.approx(wanted[row, token.id].item(), abs=1e-9)
        top = wanted[row].topk(3)
        assert [number for number, _ in token.alternatives] == top.indices.tolist()
        assert [chance for _, chance in token.alternatives] == pytest.approx(top.values.tolist(), abs=1e-9)
    (only,) = list(Engine(model).submit(Request(tokens=tokens, max_tokens=1, logprobs=0, sampling=GREEDY)))
    assert only.tokens[0].alternatives == ()
    assert only.tokens[0].logprob == pytest.approx(wanted[len(tokens) - 1].max().item(), abs=1e-9)


def test_a_long_prompt_does_not_stall_the_others():
    engine = Engine(MODELS["gated"], prefill_chunk=10, cache_bytes=0)
    quick, _ = collected(engine, Request(tokens=prompt(0, 5), max_tokens=20, sampling=GREEDY))
    engine.step()
    slow, _ = collected(engine, Request(tokens=prompt(0, 200), max_tokens=1, sampling=GREEDY))
    before = quick.completion_tokens
    for count in range(1, 11):
        engine.step()
        assert quick.completion_tokens == before + count, "a token in every step"
        assert not slow.completion_tokens
    assert engine.stats().waiting == 1


def test_short_prompts_share_a_chunk():
    engine = Engine(MODELS["gated"], prefill_chunk=64)
    for number in range(6):
        engine.submit(Request(tokens=prompt(0, 4 + number), max_tokens=5, sampling=GREEDY))
    engine.step()
    assert engine.stats().running == 6


def test_cancelling_frees_the_slots_at_once():
    engine = Engine(MODELS["star"], slots=3, prefill_chunk=16, cache_bytes=0)
    long = {"max_tokens": 100, "sampling": Sampling(temperature=0, logit_bias={TOKENIZER.bos: -100})}
    running, pieces = collected(engine, Request(tokens=prompt(0, 5), n=2, **long))
    engine.step()
    reading, _ = collected(engine, Request(tokens=prompt(0, 90), **long))
    waiting, _ = collected(engine, Request(tokens=prompt(0, 7), n=3, **long))
    engine.step()
    assert (engine.stats().running, engine.stats().used_slots, engine.stats().waiting) == (2, 3, 2)
    for stream, used in ((running, 1), (reading, 0), (waiting, 0)):
        stream.cancel()
        assert engine.stats().used_slots == used
        assert stream.done
    assert [finish_of(pieces, index) for index in (0, 1)] == [["cancelled"]] * 2
    running.cancel()
    assert len(finish_of(pieces)) == 1
    assert not engine.step()


def test_cancelling_during_a_step(monkeypatch):
    """From within the model call, as another thread would: nothing more comes, and nothing stays."""
    model = make("gated")
    engine = Engine(model, cache_bytes=0)
    stream, pieces = collected(engine, Request(tokens=prompt(0, 5), max_tokens=50, sampling=GREEDY))
    _, kept = collected(engine, Request(tokens=prompt(1, 5), max_tokens=5, sampling=GREEDY))
    engine.step()
    seen, forward = len(pieces), model.model.forward

    def cancelling(tokens, **named):
        stream.cancel()
        return forward(tokens, **named)

    monkeypatch.setattr(model.model, "forward", cancelling)
    drained(engine)
    assert [piece.finish for piece in pieces[seen:]] == ["cancelled"]
    assert finish_of(kept) in (["length"], ["stop"])
    alone = engine.submit(Request(tokens=prompt(0, 5), max_tokens=5))
    monkeypatch.setattr(
        model.model, "forward", lambda *args, **named: alone.cancel() or forward(*args, **named)
    )
    assert [piece.finish for piece in alone] == ["cancelled"]
    assert engine.stats().used_slots == 0


@pytest.mark.parametrize("where", ["prompt", "answer", "choice", "callback"])
def test_an_error_ends_its_own_request_alone(monkeypatch, where):
    model = make("star")
    engine = Engine(model, slots=8)
    bad = [TOKENIZER.bos, 61, 62, 63]
    forward = model.model.forward

    def failing(tokens, *, state, **named):
        poisoned = any(slot.length == 6 and where == "answer" for slot in state.slots)
        if poisoned or (where == "prompt" and tokens[0].tolist() == bad):
            raise MemoryError("no room")
        logits = forward(tokens, state=state, **named)
        if where == "choice":
            for row, slot in enumerate(state.slots):
                if slot.length == 7:
                    logits[row] = torch.nan
        return logits

    monkeypatch.setattr(model.model, "forward", failing)
    good = [prompt(n, 20 + n) for n in range(3)]
    requests = [Request(tokens=tokens, max_tokens=8, sampling=GREEDY) for tokens in good]
    streams = [collected(engine, request) for request in requests[:2]]
    never = Sampling(temperature=0, logit_bias={TOKENIZER.bos: -100})
    request = Request(tokens=bad, max_tokens=8, sampling=never, n=2)
    seen = []

    def on_piece(piece):
        seen.append(piece)
        if where == "callback" and len(seen) == 3:
            raise ValueError("the reader is gone")

    broken = engine.submit(request, on_piece)
    streams.append(collected(engine, requests[2]))
    drained(engine)
    assert broken.done
    assert isinstance(broken.error, StarLMError)
    text = {"choice": "not finite", "callback": "reader is gone"}.get(where, "MemoryError: no room")
    assert text in str(broken.error)
    assert [finish_of(seen, index) for index in (0, 1)] == [["error"]] * 2
    for tokens, (_, pieces) in zip(good, streams, strict=True):
        monkeypatch.undo()
        assert_argmax(model, tokens, ids_of(pieces), *finish_of(pieces), 8)
    assert engine.stats().used_slots == 0


def test_an_iterator_raises_the_error(monkeypatch):
    model = make("gated")
    monkeypatch.setattr(model.model, "forward", lambda *args, **named: 1 / 0)
    with pytest.raises(StarLMError, match="The request failed: ZeroDivisionError"):
        list(Engine(model).submit(Request(tokens=[1, 2])))


def test_on_a_thread():
    """Clients on threads of their own, and on an event loop, of one running engine."""
    model, got = MODELS["star"], {}

    def client(engine, number):
        stream = engine.submit(Request(tokens=prompt(number, 5 + number), max_tokens=10, sampling=GREEDY))
        got[number] = list(stream)

    async def clients(engine):
        async def one(number):
            loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
            request = Request(tokens=prompt(number, 5 + number), max_tokens=10, sampling=GREEDY)
            engine.submit(request, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece))
            seen = [await pieces.get()]
            while not seen[-1].finish:
                seen.append(await pieces.get())
            got[number] = seen

        await asyncio.gather(*(one(number) for number in range(4, 8)))

    with Engine(model, slots=3) as engine:
        threads = [threading.Thread(target=client, args=(engine, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        asyncio.run(clients(engine))
        for thread in threads:
            thread.join()
    assert sorted(got) == list(range(8))
    for number, pieces in got.items():
        assert_argmax(model, prompt(number, 5 + number), ids_of(pieces), *finish_of(pieces), 10)


def test_closing_ends_running_streams():
    never = Sampling(temperature=0, logit_bias={TOKENIZER.bos: -100})
    with Engine(MODELS["gated"], slots=2) as engine:
        streams = [
            engine.submit(Request(tokens=prompt(n, 5), max_tokens=10**6 // 4, sampling=never))
            for n in range(3)
        ]
        first = next(streams[0])
        assert first.finish is None
    for stream in streams:
        pieces = list(stream)
        assert pieces[-1].finish == "cancelled"
        assert stream.done
    with pytest.raises(StarLMError, match="closed"):
        engine.submit(Request(tokens=[1]))
    engine.close()
    assert engine.stats().used_slots == 0


def test_nothing_stays_behind(monkeypatch):
    """After many requests no slot, no state and no bytes, while their streams are still held."""
    states, made = [], DecodeState.__init__

    def remember(self, slots):
        made(self, slots)
        states.extend(map(weakref.ref, self.slots))

    monkeypatch.setattr(DecodeState, "__init__", remember)
    engine = Engine(MODELS["star"], slots=4, prefill_chunk=16, cache_bytes=0)
    streams = []
    gc.collect()
    gc.disable()
    try:
        for number in range(30):
            request = Request(
                tokens=prompt(number, 20), n=1 + number % 3, max_tokens=5, sampling=Sampling(seed=1)
            )
            streams.append(engine.submit(request))
            engine.step()
            if number % 4 == 0:
                streams[-1].cancel()
        drained(engine)
        assert len(states) > 100
        assert not any(ref() is not None for ref in states)
    finally:
        gc.enable()
    assert all(stream.done for stream in streams)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.used_slots, stats.cache_bytes) == (0, 0, 0, 0)
