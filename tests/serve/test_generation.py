"""Answers on the wire."""

import asyncio
import json
from types import SimpleNamespace

from servers import TOKENIZER

from starlm.generate.request import Piece
from starlm.serve.generation import EventStream
from starlm.serve.replies import ChatReply


def test_an_event_is_one_line_for_every_client():
    """Some split lines also where Unicode does, as str.splitlines: no text may bring such a character."""
    said = "a\x1c\x85\u2028\u2029é"

    async def pieces():
        yield 0, Piece(0, said, (), "stop")

    async def main():
        sent = []

        async def send(message):
            sent.append(message)

        generation = SimpleNamespace(pieces=pieces, close=dict)
        reply = ChatReply("tiny", TOKENIZER, logprobs=False)
        stream = EventStream(generation, reply, 1, include_usage=False, timeout=10)
        await stream({}, asyncio.Event().wait, send)
        return b"".join(message.get("body", b"") for message in sent).decode()

    events = [line.removeprefix("data: ") for line in asyncio.run(main()).splitlines() if line]
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == said


def test_a_client_that_reads_no_longer_is_no_bug():
    """Not even that its time is up gets through to it: the request ends, without a traceback in the log."""

    async def pieces():
        await asyncio.Event().wait()
        yield

    async def main():
        async def send(message):
            if "body" in message:
                await asyncio.Event().wait()

        closed = []
        generation = SimpleNamespace(pieces=pieces, close=lambda: closed.append(1))
        reply = ChatReply("tiny", TOKENIZER, logprobs=False)
        stream = EventStream(generation, reply, 1, include_usage=False, timeout=0.05)
        await stream({}, asyncio.Event().wait, send)
        assert closed == [1]

    asyncio.run(main())
