"""Where a served model reads for a text: what the chat's arcs show."""

import asyncio

import torch
from fastapi.responses import JSONResponse

from starlm.evaluate.reads import reads
from starlm.model.model import StarLM
from starlm.serve.errors import APIError, bad_request
from starlm.serve.models import Served
from starlm.serve.schemas import ReadsRequest

# Tokens of a text, and of those for which the reads are told: 64 heads make some megabytes of them.
MOST, TOLD = 4096, 256
# Requests that may wait for their turn; each takes up to a second or so.
WAITING = 32


class Reader:
    """Tells reads one request at a time, beside the engines and not through them."""

    def __init__(self) -> None:
        self._turn, self._inside = asyncio.Lock(), 0
        self._twins: dict[str, StarLM] = {}

    async def read(self, served: Served, body: ReadsRequest) -> JSONResponse:
        """The answer of /v1/starlm/reads.

        Raises:
            APIError: too long, or no tokens of this model (400), or too many wait already (429).
        """
        if self._inside > WAITING:
            text = f"{WAITING} requests are waiting to be read already. Try again later."
            raise APIError(429, text, code="queue_full", headers={"Retry-After": "1"})
        self._inside += 1
        try:
            # Who waits for his turn must not hold a thread: prompts are tokenized on them.
            async with self._turn:
                return await asyncio.to_thread(self._read, served, body)
        finally:
            self._inside -= 1

    def _read(self, served: Served, body: ReadsRequest) -> JSONResponse:
        tokens, begin = self._tokens(served, body)
        vocab = served.tokenizer.vocab_size
        if not 0 < len(tokens) <= MOST or max(tokens) >= vocab:
            raise bad_request(
                f"Between 1 and {MOST} tokens below {vocab} can be looked at; got {len(tokens)} up to "
                f"{max(tokens, default=0)}."
            )
        if begin >= len(tokens):
            raise bad_request(f"begin must be below the {len(tokens)} tokens; got {begin}.", "begin")
        found = reads(self._twin(served), tokens, begin=begin, end=begin + TOLD)
        answer = {
            "model": served.name,
            "tokens": [
                {"id": number, "text": served.tokenizer.decode([number], skip_special=False)}
                for number in tokens
            ],
            "begin": found.begin,
            "end": found.end,
            "layers": found.layers,
            "heads": [
                {"layer": h.layer, "head": h.head, "kind": h.kind, "stream": h.stream, "rows": h.rows}
                for h in found.heads
            ],
        }
        return JSONResponse(answer)

    def _tokens(self, served: Served, body: ReadsRequest) -> tuple[list[int], int]:
        """The tokens, and the first of those that are told."""
        if body.messages is None:
            tokens = body.tokens or served.tokenizer.encode(body.text or "", bos=True)
            return tokens, body.begin or 0
        *before, last = body.messages
        if last.role != "assistant":
            raise bad_request("The last of the messages must be the assistant's.", "messages")
        prompt = served.chat.prompt(before)
        answer = served.tokenizer.encode(prompt.begin.decode() + last.text)
        return [*prompt.tokens, *answer], len(prompt.tokens) if body.begin is None else body.begin

    def _twin(self, served: Served) -> StarLM:
        """A model of the same tensors. Looking into the engine's own would show what the engine does, too."""
        if served.name not in self._twins:
            with torch.device("meta"):
                twin = StarLM(served.text.config)
            twin.load_state_dict(served.text.model.state_dict(), assign=True)
            self._twins[served.name] = twin.eval()
        return self._twins[served.name]
