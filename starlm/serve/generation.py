"""From a request to an answer: engines are asked, and their pieces gathered or streamed.

Whatever ends a request ends its sequences: a client that leaves, a limit of time, an error, a shutdown.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from fastapi import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from starlm.errors import InputError, StarLMError
from starlm.generate.engine import QueueFull
from starlm.generate.request import Piece, Request, Stream
from starlm.generate.sampling import Sampling
from starlm.serve.chat import Prompt
from starlm.serve.errors import APIError, bad_request
from starlm.serve.metrics import Metrics
from starlm.serve.models import Served
from starlm.serve.replies import Reply
from starlm.serve.schemas import ChatRequest, GenerationRequest

LOG = logging.getLogger("starlm.serve")


class Generation:
    """The sequences of one request: every choice of every prompt."""

    def __init__(
        self,
        served: Served,
        metrics: Metrics,
        body: GenerationRequest,
        *,
        logprobs: int | None,
        max_tokens: int,
    ) -> None:
        """Args:
        served: the model asked.
        metrics: what is counted.
        body: the request.
        logprobs: likeliest tokens to report beside each; None reports none.
        max_tokens: of each answer, where the request does not say; fewer where `max_context` has not so many.
        """
        self._served, self._metrics, self._body = served, metrics, body
        self._logprobs, self._max_tokens = logprobs, max_tokens
        self._streams: list[Stream] = []
        # Pieces of all streams with the streams' numbers.
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._began = time.perf_counter()

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Queue all of them, or none; from another thread than the loop's, since a long prompt takes a while.

        Raises:
            APIError: impossible (400), no room in the queue (429), or the engine was stopped (503).
        """
        try:
            self._check(prompts)
            sampling = self._sampling()
            requests = [
                Request(
                    tokens=prompt.tokens,
                    max_tokens=self._length(prompt),
                    sampling=sampling,
                    n=self._body.n,
                    stop=self._body.stops,
                    logprobs=self._logprobs,
                    begin=prompt.begin,
                )
                for prompt in prompts
            ]
            deliver = [self._deliver(number) for number in range(len(requests))]
            self._streams = self._served.engine.submit_all(list(zip(requests, deliver, strict=True)))
        except QueueFull as error:
            raise APIError(429, f"{error}", code="queue_full", headers={"Retry-After": "1"}) from None
        except InputError as error:
            raise bad_request(f"{error}") from None
        except StarLMError:
            raise _stopping() from None

    def _check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse by name what the engine would refuse, which knows no fields."""
        body, served = self._body, self._served
        field = "messages" if isinstance(body, ChatRequest) else "prompt"
        if body.n > served.engine.slots:
            raise bad_request(
                f"n must be at most the engine's {served.engine.slots} slots; got {body.n}. Ask for fewer "
                f"answers; who runs the server may take more --slots.",
                "n",
            )
        vocab = served.tokenizer.vocab_size
        for prompt in prompts:
            if max(prompt.tokens, default=0) >= vocab:
                raise bad_request(
                    f"prompt: tokens must be between 0 and {vocab - 1}; got {max(prompt.tokens)}.", field
                )
            read, room = len(prompt.tokens), served.max_context
            if room is not None and read + (body.length or 1) > room:
                asked = f"max_tokens is {body.length}: together" if read < room else "with any answer that is"
                cure = " or ask for fewer tokens" if read < room else ""
                raise bad_request(
                    f"The prompt has {read} tokens and {asked} more than the {room} allowed. Shorten the "
                    f"prompt{cure}.",
                    field,
                    code="context_length_exceeded",
                )

    def _length(self, prompt: Prompt) -> int:
        """Tokens of an answer at most. A length that nobody asked for is no reason to refuse."""
        if self._body.length is not None:
            return self._body.length
        if self._served.max_context is None:
            return self._max_tokens
        return min(self._max_tokens, self._served.max_context - len(prompt.tokens))

    def _deliver(self, number: int) -> Callable[[Piece], None]:
        """A callback for the engine's thread: it hands the pieces of a stream over to the loop's."""
        loop, pieces = self._loop, self._pieces

        def deliver(piece: Piece) -> None:
            # The loop is closed when a shutdown is over: nobody is there to be told.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

        return deliver

    def _sampling(self) -> Sampling:
        body = self._body
        bias: dict[int, float] = {}
        for key, value in body.logit_bias.items():
            if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= self._served.tokenizer.vocab_size:
                raise bad_request(
                    f"logit_bias must have token ids below {self._served.tokenizer.vocab_size} as keys; got "
                    f"{key[:50]!r}.",
                    "logit_bias",
                )
            bias[int(key)] = value
        return Sampling(
            temperature=body.temperature,
            top_k=max(body.top_k, 0),
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=bias,
            seed=body.seed,
        )

    def cancel(self) -> None:
        """Free the slots; what is finished stays as it is."""
        for stream in self._streams:
            stream.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """All pieces with the numbers of their choices, as they come; every choice ends with a finish.

        Raises:
            APIError: the engine was stopped (503), or failed (500).
        """
        name, metrics = self._served.name, self._metrics
        last: dict[int, float] = {}
        left = len(self._streams) * self._body.n
        while left:
            number, piece = await self._pieces.get()
            if piece.finish == "cancelled":
                raise _stopping()
            if piece.finish == "error":
                raise APIError(500, f"{self._streams[number].error}")
            index, now = number * self._body.n + piece.index, time.perf_counter()
            if index in last:
                metrics.between.labels(name).observe(now - last[index])
            else:
                metrics.first.labels(name).observe(now - self._began)
            last[index] = now
            if piece.finish:
                left -= 1
                metrics.finished.labels(name, piece.finish).inc()
            yield index, piece

    def usage(self) -> dict[str, Any]:
        """Tokens read and written."""
        prompt = sum(stream.prompt_tokens for stream in self._streams)
        written = sum(stream.completion_tokens for stream in self._streams)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in self._streams)},
        }

    def close(self) -> dict[str, Any]:
        """Cancel what still runs, and count; what the log says about it."""
        self.cancel()
        usage, name, metrics = self.usage(), self._served.name, self._metrics
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        metrics.prompt_tokens.labels(name).inc(usage["prompt_tokens"])
        metrics.cached_tokens.labels(name).inc(cached)
        metrics.generation_tokens.labels(name).inc(usage["completion_tokens"])
        return {
            "model": name,
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": cached,
            "completion_tokens": usage["completion_tokens"],
        }


async def answer(
    http: HTTPRequest, generation: Generation, reply: Reply, choices: int, timeout: float
) -> dict[str, Any]:
    """The whole answer.

    Args:
        choices: how many.
        timeout: seconds.

    Raises:
        APIError: out of time (504), or the engine was stopped (503).
        ClientGone: nobody waits for it.
    """

    async def gather() -> dict[str, Any]:
        found: list[list[Piece]] = [[] for _ in range(choices)]
        async for index, piece in generation.pieces():
            found[index].append(piece)
        return reply.whole(found, generation.usage())

    try:
        async with asyncio.timeout(timeout):
            return await _while_connected(http.receive, gather())
    except TimeoutError:
        raise APIError(504, _late(timeout), code="timeout") from None
    finally:
        http.scope["starlm.log"] = generation.close()


class EventStream(Response):
    """An answer as server-sent events."""

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, reply: Reply, choices: int, *, include_usage: bool, timeout: float
    ) -> None:
        """Args:
        generation: submitted.
        reply: the form.
        choices: how many.
        include_usage: whether the last chunk says how many tokens it were.
        timeout: seconds.
        """
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.generation, self.reply, self.choices = generation, reply, choices
        self.include_usage, self.timeout = include_usage, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end, or until the client is gone or the time is up."""

        async def write(data: str) -> None:
            text = f"data: {data}\n\n"
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        async def stream() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in self._events():
                    # In ASCII: some clients end lines also where Unicode does.
                    await write(json.dumps(event))
                await write("[DONE]")
            except APIError as error:
                await write(json.dumps(error.body))
            except Exception:
                LOG.exception("a stream failed")
                await write(json.dumps(APIError(500, "A bug in StarLM; its log has it.").body))
            await send({"type": "http.response.body", "body": b""})

        try:
            async with asyncio.timeout(self.timeout):
                await _while_connected(receive, stream())
        except ClientGone:
            pass
        except TimeoutError:
            # To a client that reads no longer even this may not get through.
            late = APIError(504, _late(self.timeout), code="timeout")
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await write(json.dumps(late.body))
                    await send({"type": "http.response.body", "body": b""})
        finally:
            scope["starlm.log"] = self.generation.close()

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        reply = self.reply
        # With include_usage, every chunk has the field.
        more: dict[str, Any] = {"usage": None} if self.include_usage else {}
        for index in range(self.choices):
            for choice in reply.opening(index):
                yield reply.chunk([choice], **more)
        async for index, piece in self.generation.pieces():
            for choice in reply.deltas(index, piece):
                yield reply.chunk([choice], **more)
        if self.include_usage:
            yield reply.chunk([], usage=self.generation.usage())


class ClientGone(Exception):
    """The client has closed the connection."""


async def _while_connected(receive: Receive, work: Any) -> Any:
    """What `work` returns; cancelled when the client leaves.

    Raises:
        ClientGone: it has left.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _stopping() -> APIError:
    return APIError(503, "The server is shutting down; the answer was cut off.", code="stopping")


def _late(timeout: float) -> str:
    return f"The answer took longer than {timeout:g} seconds. Ask for fewer tokens, or when less is going on."
