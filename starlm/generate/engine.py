"""Continuous batching: answers to many requests, one model call per token for all of them.

with Engine(load("runs/demo"), slots=8) as engine:
    for piece in engine.submit(Request(tokens=tokens)):
        print(piece.text)

Each step reads at most one chunk of waiting prompts and then one token of every running answer, whatever the
length of each: answers enter and leave between any two tokens.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from starlm.device import free_memory
from starlm.errors import InputError, StarLMError
from starlm.generate.answer import Answer, with_logprobs
from starlm.generate.cache import PrefixCache
from starlm.generate.request import Finish, Piece, Request, Stream
from starlm.generate.sampling import Sampler, choose
from starlm.model.state import DecodeState

if TYPE_CHECKING:
    from starlm.generate.text import TextModel


class QueueFull(StarLMError):
    """More requests wait, or memory is promised to them, than the engine takes."""


@dataclass(frozen=True)
class Stats:
    """An engine at one moment."""

    running: int
    """Answers that get a token in each step."""
    waiting: int
    """Requests whose prompt is not read yet."""
    slots: int
    """Answers that can run at once."""
    used_slots: int
    """Slots of running answers and of the prompt that is being read."""
    cache_hits: int
    """Prompts whose beginning was cached."""
    cache_bytes: int
    """Memory of the prefix cache."""
    prompt_tokens: int
    """Tokens of all prompts so far, of which ..."""
    cached_tokens: int
    """... so many were cached."""
    completion_tokens: int
    """Tokens of all answers so far."""


@dataclass(eq=False)
class _Prompt:
    """A request before its answers run."""

    stream: Stream
    answers: list[Answer]
    state: DecodeState | None = None


def _bytes(rows: Sequence[int]) -> int:
    """Memory for decode states of so many bytes of rows each.

    Buffers double when they are full, old and new together for a moment.
    """
    return 2 * sum(rows) + max(rows, default=0)


class Engine:
    """Answers requests on a model, many at once.

    `start` runs it on a thread of its own; without, iterating over a stream, or `step`, does the work. Every
    other method may be called from any thread.
    """

    def __init__(
        self,
        model: "TextModel",
        *,
        slots: int = 32,
        prefill_chunk: int = 256,
        queue: int = 128,
        cache_bytes: int = 1 << 28,
        max_context: int | None = None,
    ) -> None:
        """Args:
            slots: answers that run at once.
            prefill_chunk: tokens of prompts that are read between two tokens of running answers.
            queue: requests that may wait.
            cache_bytes: memory for states of earlier prompts and answers; 0 keeps none.
            max_context: tokens of a prompt and its answer at most; None leaves it to the memory.

        Raises:
            InputError: a number that is too small.
        """
        for name, value, least in (
            ("slots", slots, 1),
            ("prefill_chunk", prefill_chunk, 1),
            ("queue", queue, 1),
            ("cache_bytes", cache_bytes, 0),
        ):
            if value < least:
                raise InputError(f"{name} must be {least} or more; got {value}.")
        self.model, self.slots, self.prefill_chunk, self.max_context = (
            model,
            slots,
            prefill_chunk,
            max_context,
        )
        self._queue, self._cache = queue, PrefixCache(cache_bytes)
        self._device = model.model.head.weight.device
        # `_changed` guards what follows; `_stepping` is held during a whole step, model calls included.
        self._changed, self._stepping = threading.Condition(threading.RLock()), threading.Lock()
        self._waiting: deque[_Prompt] = deque()
        self._reading: _Prompt | None = None
        self._running: dict[Answer, DecodeState] = {}
        self._totals = {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def started(self) -> bool:
        """Whether the engine runs on its own thread."""
        return self._thread is not None

    def start(self) -> "Engine":
        """Work on a thread of its own until `close`; the engine itself."""
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name="starlm-engine", daemon=True)
                self._thread.start()
        return self

    def close(self) -> None:
        """Stop; what is not finished ends as "cancelled"."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._changed:
            for stream in self._streams():
                self._end(stream, "cancelled")
            self._cache.clear()

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(self, request: Request, on_piece: Callable[[Piece], object] | None = None) -> Stream:
        """The answers to a request, as they come.

        Args:
            on_piece: gets each piece, in place of the iterator; called on the engine's thread and under its
                lock, so it must return at once (in asyncio: `loop.call_soon_threadsafe`).

        Raises:
            QueueFull: too many requests wait, or too little memory is left beside what they may need.
            InputError: the request can never be answered.
            StarLMError: the engine is closed.
        """
        return self.submit_all([(request, on_piece)])[0]

    def submit_all(
        self, requests: Sequence[tuple[Request, Callable[[Piece], object] | None]]
    ) -> list[Stream]:
        """All of these requests or none; each with its `on_piece`, and errors as of `submit`."""
        if not requests:
            return []
        if len(requests) > self._queue:
            raise InputError(
                f"{len(requests)} prompts at once are more than the {self._queue} that may wait. Send fewer "
                f"at a time."
            )
        checked = [self._checked(request, on_piece) for request, on_piece in requests]
        prompts = [_Prompt(answers[0].stream, answers) for answers in checked]
        with self._changed:
            if self._closed:
                raise StarLMError("The engine is closed. Make a new one.")
            if len(self._waiting) + len(prompts) > self._queue:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting already, of {self._queue} that may. Try "
                    f"again later."
                )
            self._check_memory(prompts)
            for prompt in prompts:
                if prompt.stream.request.max_tokens == 0:
                    self._end(prompt.stream, "length")
                else:
                    self._waiting.append(prompt)
                    self._totals["prompt_tokens"] += prompt.stream.prompt_tokens
            self._changed.notify_all()
        return [prompt.stream for prompt in prompts]

    def cancel(self, stream: Stream) -> None:
        """Finish a stream as "cancelled"; its slots are free at once."""
        with self._changed:
            self._end(stream, "cancelled")

    def stats(self) -> Stats:
        """Counts at this moment."""
        with self._changed:
            reserved = len(self._reading.answers) if self._reading else 0
            return Stats(
                running=len(self._running),
                waiting=len(self._waiting) + (self._reading is not None),
                slots=self.slots,
                used_slots=len(self._running) + reserved,
                cache_hits=self._cache.hits,
                cache_bytes=self._cache.num_bytes,
                **self._totals,
            )

    @torch.inference_mode()
    def step(self) -> bool:
        """Read one chunk of prompts, and one token of each running answer; whether there is more to do."""
        with self._stepping:
            budget = self.prefill_chunk
            while budget > 0 and (reading := self._next()):
                try:
                    budget -= self._read(reading, budget)
                except Exception as error:
                    self._fail(reading.stream, error)
            self._decode()
        with self._changed:
            return bool(self._waiting or self._reading or self._running)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._reading or self._running):
                    self._changed.wait()
                if self._closed:
                    return
            try:
                self.step()
            except Exception as error:
                # Whatever it was, those it may have touched end, and the engine goes on.
                with self._changed:
                    for stream in {answer.stream for answer in self._running}:
                        self._fail(stream, error)

    def _checked(self, request: Request, on_piece: Callable[[Piece], object] | None) -> list[Answer]:
        """The answers of a request that can be answered."""
        vocab, tokens = self.model.tokenizer.vocab_size, request.tokens
        if min(tokens) < 0 or max(tokens) >= vocab:
            raise InputError(f"tokens must be between 0 and {vocab - 1}; got {min(tokens)} to {max(tokens)}.")
        if request.n > self.slots:
            raise InputError(f"n must be at most the engine's {self.slots} slots; got {request.n}.")
        total = len(tokens) + request.max_tokens
        if self.max_context is not None and total > self.max_context:
            raise InputError(
                f"The prompt has {len(tokens)} tokens and max_tokens is {request.max_tokens}: together more "
                f"than the {self.max_context} allowed. Shorten the prompt or ask for fewer tokens."
            )
        stream = Stream(self, request, on_piece)
        return [
            Answer(
                self.model,
                stream,
                index,
                Sampler(request.sampling, vocab, tokens, index=index, device=self._device),
            )
            for index in range(request.n)
        ]

    def _check_memory(self, prompts: Sequence[_Prompt]) -> None:
        """Refuse what does not fit beside all that the engine has taken on; under the lock."""
        held = [*self._running.values(), *filter(None, [self._reading and self._reading.state])]
        free = free_memory(self._device) + sum(state.num_bytes for state in held)
        rows = [one for stream in self._streams() for one in self._rows(stream.request)]
        for request in (prompt.stream.request for prompt in prompts):
            own = self._rows(request)
            if _bytes(own) > free:
                raise InputError(
                    f"The prompt and the answer ({len(request.tokens) + request.max_tokens} tokens) need "
                    f"about {_bytes(own) / 2**20:.0f} MiB of decode state, and there are "
                    f"{free / 2**20:.0f} MiB of memory. Shorten the prompt, ask for fewer tokens, or use a "
                    f"model with a smaller max_shift, whose memory is constant."
                )
            rows += own
        # Of those that wait, the longest may come to run together.
        needed = _bytes(nlargest(self.slots, rows))
        if needed > free:
            raise QueueFull(
                f"With the requests that were accepted before, {needed / 2**20:.0f} MiB of decode state may "
                f"be needed, and there are {free / 2**20:.0f}. Try again later."
            )

    def _rows(self, request: Request) -> list[int]:
        """Bytes of the rows of each answer to a request, at its longest."""
        each = self.model.model.state_bytes(len(request.tokens) + request.max_tokens)
        return [each] * (request.n if request.max_tokens else 0)

    def _next(self) -> _Prompt | None:
        """The prompt to read, if there is one and slots for its answers."""
        with self._changed:
            free = self.slots - len(self._running)
            if self._reading is None and self._waiting and len(self._waiting[0].answers) <= free:
                self._reading = self._waiting.popleft()
            return self._reading

    def _read(self, prompt: _Prompt, budget: int) -> int:
        """Read up to `budget` tokens of a prompt; after its last one the answers run. How many were read."""
        stream, tokens, chunk = prompt.stream, prompt.stream.request.tokens, self.prefill_chunk
        if prompt.state is None:
            prompt.state = self._cache.find(tokens) or self.model.model.new_state(rollback=1)
            stream.cached_tokens = prompt.state.lengths[0]
            self._totals["cached_tokens"] += stream.cached_tokens
        state, begin = prompt.state, prompt.state.lengths[0]
        # Chunks end at the same places whatever was cached.
        end = min(len(tokens), begin + budget, begin - begin % chunk + chunk)
        piece = torch.tensor([tokens[begin:end]], device=self._device)
        logits = self.model.model(piece, state=state, last_only=True)[:, -1]
        # A bounded state cannot go back, so it is kept wherever another prompt may part from this one.
        if end == len(tokens) or (end % chunk == 0 and state.slots[0].bounded):
            self._cache.put(tokens[:end], state, copy=True)
        if end == len(tokens):
            self._run(prompt, state, logits)
        return end - begin

    def _run(self, prompt: _Prompt, state: DecodeState, logits: Tensor) -> None:
        """Give each answer its slot and its first token."""
        answers = prompt.answers
        copies = [state.fork() for _ in answers[1:]]
        with self._changed:
            if self._reading is not prompt:
                # It was cancelled meanwhile.
                return
            self._reading = None
            self._running.update(zip(answers, [state, *copies], strict=True))
        self._deliver(answers, logits.expand(len(answers), -1))

    def _decode(self) -> None:
        """One more token for every running answer."""
        with self._changed:
            running = dict(self._running)
        if not running:
            return
        try:
            results = [(list(running), self._logits(running))]
        except Exception:
            # One of them may be the cause: each alone, from where it was.
            results = []
            for answer, state in running.items():
                try:
                    results.append(([answer], self._logits({answer: state})))
                except Exception as error:
                    self._fail(answer.stream, error)
        for answers, logits in results:
            self._deliver(answers, logits)

    def _logits(self, running: dict[Answer, DecodeState]) -> Tensor:
        tokens = torch.tensor([[answer.ids[-1]] for answer in running], device=self._device)
        state = DecodeState.join(running.values())
        return self.model.model(tokens, state=state, last_only=True)[:, -1]

    def _deliver(self, answers: Sequence[Answer], logits: Tensor) -> None:
        """Choose the next token of each answer and hand its piece over; an error ends its own stream."""
        # A vocabulary may have been filled up with rows that are no tokens.
        logits = logits[:, : self.model.tokenizer.vocab_size].contiguous()
        try:
            tokens = choose(logits, [answer.sampler for answer in answers])
            told = with_logprobs(answers, tokens, logits)
        except Exception as error:
            if len(answers) == 1:
                self._fail(answers[0].stream, error)
            else:
                for row, answer in enumerate(answers):
                    self._deliver([answer], logits[row : row + 1])
            return
        with self._changed:
            for answer, token in zip(answers, told, strict=True):
                if answer.index not in answer.stream.open:
                    continue
                try:
                    piece = answer.take(token)
                    self._totals["completion_tokens"] += len(piece.tokens)
                    if piece.finish:
                        self._retire(answer)
                    answer.stream.emit(piece)
                except Exception as error:
                    self._fail(answer.stream, error)

    def _retire(self, answer: Answer) -> None:
        """Free the slot of a finished answer; what it has read may serve the next turn."""
        state = self._running.pop(answer)
        read = state.lengths[0]
        self._cache.put([*answer.stream.request.tokens, *answer.ids][:read], state)

    def _fail(self, stream: Stream, error: Exception) -> None:
        """End a stream by an error."""
        if not isinstance(error, StarLMError):
            failure = StarLMError(f"The request failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            error = failure
        with self._changed:
            stream.error = stream.error or error
            self._end(stream, "error")

    def _end(self, stream: Stream, finish: Finish) -> None:
        """Take a stream out of the engine, and finish its open answers; under the lock."""
        self._waiting = deque(prompt for prompt in self._waiting if prompt.stream is not stream)
        if self._reading and self._reading.stream is stream:
            self._reading = None
        self._running = {a: state for a, state in self._running.items() if a.stream is not stream}
        for index in sorted(stream.open):
            stream.open.discard(index)
            try:
                stream.emit(Piece(index, "", (), finish))
            except Exception as error:
                stream.error = StarLMError(f"The callback failed: {error}")

    def _streams(self) -> list[Stream]:
        prompts = [*self._waiting, *([self._reading] if self._reading else [])]
        return list(dict.fromkeys(part.stream for part in [*prompts, *self._running]))
