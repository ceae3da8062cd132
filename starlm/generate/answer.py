"""One of the answers to a request, while it runs: how its tokens are chosen, and the text they make."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from starlm.generate.assembly import Assembly
from starlm.generate.request import Piece, Stream, TokenLogprob
from starlm.generate.sampling import Sampler

if TYPE_CHECKING:
    from starlm.generate.text import TextModel


class Answer:
    """One of the n answers to the request of a stream."""

    def __init__(self, model: "TextModel", stream: Stream, index: int, sampler: Sampler) -> None:
        request = stream.request
        self.model, self.stream, self.index, self.sampler = model, stream, index, sampler
        self.ids: list[int] = []
        self.assembly = Assembly(model.tokenizer, stop=request.stop, skip=len(request.begin.decode()))
        self._require(request.begin)

    def take(self, token: TokenLogprob) -> Piece:
        """The piece that this token makes."""
        if token.id in self.model.stop_ids:
            return Piece(self.index, self.assembly.flush(), (), "stop")
        self.ids.append(token.id)
        self.sampler.add(token.id)
        if self._begin:
            self._require(self._begin[len(self.model.tokenizer.token_bytes(token.id)) :])
        text, finish = self.assembly.push(token.id), None
        if self.assembly.stopped:
            finish = "stop"
        elif len(self.ids) >= self.stream.request.max_tokens:
            text, finish = text + self.assembly.flush(), "length"
        return Piece(self.index, text, (token,), finish)

    def _require(self, begin: bytes) -> None:
        """Choose only tokens with which a text that goes on with `begin` can go on."""
        self._begin = begin
        self.sampler.allowed = self.model.fitting(begin) if begin else None


def with_logprobs(answers: Sequence[Answer], tokens: list[int], logits: Tensor) -> list[TokenLogprob]:
    """The tokens chosen, with log probabilities where they were asked for."""
    told = [TokenLogprob(token) for token in tokens]
    for row, answer in enumerate(answers):
        count = answer.stream.request.logprobs
        if count is not None:
            chances = logits[row].log_softmax(-1)
            top = chances.topk(min(count, len(chances)))
            alternatives = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            told[row] = TokenLogprob(tokens[row], float(chances[tokens[row]]), alternatives)
    return told
