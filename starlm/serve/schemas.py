"""Requests and answers of the API: OpenAI's fields and some more. What is not supported is refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Fields of OpenAI's requests and messages that mean something this server cannot do, and the values at which
# they mean nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "image_url": (),
    "input_audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "reasoning_effort": (),
    "refusal": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": (),
    "tool_call_id": (),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_MOST_BIASES = 1024
Token = Annotated[int, Field(ge=0, lt=2**31)]
# Of what a list has wrong only the first is told: the records of a million mistakes would fill the memory.
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]


def _few(biases: Any) -> Any:
    # Before they are judged one by one, where the mistakes would add up.
    if isinstance(biases, dict) and len(biases) > _MOST_BIASES:
        raise PydanticCustomError("value", "at most {most} tokens", {"most": _MOST_BIASES})
    return biases


Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=_MOST_BIASES),
    BeforeValidator(_few),
]


class Documented(BaseModel):
    """Fields are described by the text below them."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Strict(BaseModel):
    """No coercion of types, no unknown fields; null is the same as not given."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # The best of n is all of them.
        unsupported = _UNSUPPORTED | {"best_of": (values.get("n") or 1,)}
        kept = {}
        for name, value in values.items():
            if value is None:
                continue
            if name in cls.model_fields:
                kept[name] = value
            elif name not in unsupported:
                # Half of a surrogate pair cannot be told.
                told = name[:100].encode("utf-8", "backslashreplace").decode()
                raise PydanticCustomError("unknown", "unknown", {"param": told})
            # 0 == False, and True == 1, which are other values in JSON.
            elif not any(type(value) is type(same) and value == same for same in unsupported[name]):
                raise PydanticCustomError("unsupported", "unsupported", {"param": name})
        return kept


class StreamOptions(Strict):
    """What a stream has besides text."""

    include_usage: bool = False
    """A last chunk with the usage and no choices."""
    include_obfuscation: bool = False
    """Padding of chunks against eavesdroppers; only false, there is none."""


class GenerationRequest(Strict):
    """What both kinds of completion take."""

    model: Annotated[str, Field(max_length=200)]
    """Name as in /v1/models."""
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """At most this many new tokens."""
    n: Annotated[int, Field(ge=1, le=128)] = 1
    """Answers, each drawn on its own."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """0 always takes the likeliest token; 1 samples from the model's own distribution."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that together reach this probability."""
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    """Only the k likeliest tokens; 0 is off, and so is -1."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Only tokens at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Above 1 makes tokens that occurred, also in the prompt, less likely."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken from the logits of tokens that the answer has already."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """The same, times how often it has them."""
    logit_bias: Biases = Field({})
    """Added to the logits of these tokens, by id."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Same seed, same answer."""
    stop: Text | Annotated[list[Text], Field(max_length=16, fail_fast=True)] = Field([])
    """The answer ends before the first of these."""
    stream: bool = False
    """Server-sent events as the text comes."""
    stream_options: StreamOptions | None = None
    """Only with stream."""
    user: Annotated[str, Field(max_length=1000)] | None = None
    """Accepted, and not used."""
    safety_identifier: Annotated[str, Field(max_length=1000)] | None = None
    """Accepted, and not used."""
    metadata: Annotated[dict[str, Text], Field(max_length=16)] | None = None
    """Accepted, and not used."""
    prompt_cache_key: Annotated[str, Field(max_length=1000)] | None = None
    """Accepted, and not used: what prompts have in common is found by itself."""
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None
    """Accepted, and not used."""

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "GenerationRequest":
        if self.stream_options is not None:
            if not self.stream:
                raise PydanticCustomError("value", "is only allowed with stream", {"param": "stream_options"})
            if self.stream_options.include_obfuscation:
                padding = {"param": "stream_options.include_obfuscation"}
                raise PydanticCustomError("unsupported", "unsupported", padding)
        return self

    @property
    def length(self) -> int | None:
        """Tokens of an answer at most, if the request says."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: (
        Annotated[str, Field(max_length=10_000_000)]
        | Annotated[list[str], Field(min_length=1, max_length=128, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=128, fail_fast=True)]
    )
    """Text, token ids, or several of either."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Log-probabilities of the tokens taken and of this many likeliest ones."""

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """`prompt` as a list of prompts."""
        found: Any = self.prompt
        return found if isinstance(found, list) and not isinstance(found[0], int) else [found]


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: Annotated[str, Field(max_length=1000)] | None = None
    """Accepted, and not used."""

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """The newer name of max_tokens."""
    logprobs: bool = False
    """Log-probabilities of the tokens taken."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """And of this many likeliest ones; needs logprobs."""

    @property
    def length(self) -> int | None:
        """By either name."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _fields_fit(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("value", "needs logprobs to be true", {"param": "top_logprobs"})
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise PydanticCustomError("value", "and max_tokens differ", {"param": "max_completion_tokens"})
        return self


class ReadsRequest(Strict):
    """Body of POST /v1/starlm/reads: one of text, tokens and messages."""

    model: Annotated[str, Field(max_length=200)]
    """Name as in /v1/models."""
    text: str | None = None
    """A document that begins so."""
    tokens: Tokens | None = None
    """The same as token ids."""
    messages: Annotated[list[Message], Field(min_length=2, max_length=10_000, fail_fast=True)] | None = None
    """A conversation; the last message is the assistant's."""
    begin: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """First token whose reads are told; default 0, or where the assistant's message begins."""

    @model_validator(mode="after")
    def _one_of_three(self) -> "ReadsRequest":
        if [self.text, self.tokens, self.messages].count(None) != 2:
            raise PydanticCustomError("value", "give one of text, tokens and messages", {"param": "text"})
        return self


class ReadToken(Documented):
    """A token of the text."""

    id: int
    text: str


class HeadReads(Documented):
    """What one head reads."""

    layer: int
    head: int
    kind: str
    """now, token, bigram, ..., or box, of which the rows are where windows begin."""
    stream: str
    rows: list[list[tuple[int, float]]]
    """For each token from begin to end, numbers of the tokens read and the shares of the channels."""


class Reads(Documented):
    """Where a model reads in a text."""

    model: str
    tokens: list[ReadToken]
    begin: int
    end: int
    layers: list[str]
    """What each layer is; only deformer layers have heads here."""
    heads: list[HeadReads]


class Usage(Documented):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] = {}


class TopLogprob(Documented):
    """A token that might have been taken."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TopLogprob):
    """A token that was taken."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Documented):
    """One entry per token of the answer."""

    content: list[TokenLogprobs]


class CompletionLogprobs(Documented):
    """Lists with one entry per token of the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class AnswerMessage(Documented):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


Finish = Literal["stop", "length"]


class ChatChoice(Documented):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(Documented):
    """Answer of /v1/chat/completions; with stream, chunks with `delta` in the place of `message`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(Documented):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class Completion(Documented):
    """Answer of /v1/completions; with stream, chunks of the same form."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(Documented):
    """A model that can be asked."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    chat: Literal["template", "plain"]
    """How a conversation becomes a prompt: by the checkpoint's template, or all messages as one text."""
    vocab_size: int
    parameters: int
    max_context: int | None


class ModelList(Documented):
    """All models that can be asked."""

    object: Literal["list"]
    data: list[Model]


class ErrorDetail(Documented):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Documented):
    """Every error."""

    error: ErrorDetail


class Health(Documented):
    """State of the server."""

    status: Literal["ok", "loading"]
