"""The routes."""

import asyncio
import re
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from starlm.serve import schemas
from starlm.serve.chat import Prompt, text_prompt
from starlm.serve.config import ServeOptions
from starlm.serve.errors import APIError, bad_request
from starlm.serve.gate import Gate
from starlm.serve.generation import ClientGone, EventStream, Generation, answer
from starlm.serve.metrics import Metrics
from starlm.serve.models import Models, Served
from starlm.serve.pages import add_pages
from starlm.serve.reading import Reader
from starlm.serve.replies import ChatReply, CompletionReply
from starlm.version import __version__

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": schemas.ErrorBody, "description": "A field that is missing, impossible or not supported."},
    401: {"model": schemas.ErrorBody, "description": "No key, or a wrong one."},
    403: {
        "model": schemas.ErrorBody,
        "description": "Asked for under another name than localhost, without a key.",
    },
    404: {"model": schemas.ErrorBody, "description": "No such model."},
    408: {"model": schemas.ErrorBody, "description": "The request's body did not arrive in time."},
    413: {"model": schemas.ErrorBody, "description": "The request's body is too large."},
    429: {
        "model": schemas.ErrorBody,
        "description": "The queue is full; Retry-After says for how long.",
    },
    503: {"model": schemas.ErrorBody, "description": "Loading, or shutting down."},
    504: {"model": schemas.ErrorBody, "description": "The answer took too long."},
}
# Before version 3.2 OpenAPI has no word for the items of a stream; readers take the schema for that of each.
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": _EVENT}},
        "description": "The answer; with `stream`, server-sent events of chunks, then `[DONE]`.",
    }
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ERRORS[status] for status in statuses}


def create_app(options: ServeOptions, models: Models) -> ASGIApp:
    """The server as an ASGI application."""
    metrics = Metrics(lambda: models.engines)
    app = FastAPI(
        title="StarLM",
        version=__version__,
        description="OpenAI's API for StarLM's models.",
        docs_url=None,
        redoc_url=None,
    )
    _add_state(app, models, metrics)
    _add_completions(app, options, models, metrics)
    _add_reads(app, models)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(APIError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(Exception, _bug)
    _describe(app)
    add_pages(app)
    gate: ASGIApp = Gate(app, options, metrics)
    if options.cors_origin:
        gate = CORSMiddleware(
            gate,
            allow_origins=options.cors_origin,
            allow_methods=["GET", "POST"],
            # OpenAI's own client sends some that say what it is.
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return gate


def _add_state(app: FastAPI, models: Models, metrics: Metrics) -> None:
    @app.get("/health", response_model=schemas.Health, responses={503: {"model": schemas.Health}})
    async def health() -> Response:
        """503 until all models are loaded."""
        if models.ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "loading"}, 503, headers={"Retry-After": "2"})

    @app.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {}}}, **_errors(401, 403)},
        response_class=Response,
    )
    def prometheus() -> Response:
        """Counters in Prometheus' format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", response_model=schemas.ModelList, responses=_errors(401, 403))
    async def list_models() -> dict[str, Any]:
        """The models that are loaded."""
        return {"object": "list", "data": [served.describe() for served in models.served]}

    @app.get("/v1/models/{model}", response_model=schemas.Model, responses=_errors(401, 403, 404, 503))
    async def show_model(model: str) -> schemas.Model:
        """One model."""
        return models[model].describe()


def _add_completions(app: FastAPI, options: ServeOptions, models: Models, metrics: Metrics) -> None:
    @app.post("/v1/completions", response_model=schemas.Completion, responses=_EVENTS | _ERRORS)
    async def completions(body: schemas.CompletionRequest, request: Request) -> Any:
        """Continue a text."""
        served = models[body.model]
        prompts = await asyncio.to_thread(lambda: [_prompt(p, served) for p in body.prompts])
        generation = Generation(served, metrics, body, logprobs=body.logprobs, max_tokens=16)
        await asyncio.to_thread(generation.submit, prompts)
        begins = [len(p.begin.decode()) for p in prompts for _ in range(body.n)]
        reply = CompletionReply(
            served.name, served.tokenizer, logprobs=body.logprobs is not None, begins=begins
        )
        return await _reply(request, body, generation, reply, len(prompts) * body.n)

    @app.post("/v1/chat/completions", response_model=schemas.ChatCompletion, responses=_EVENTS | _ERRORS)
    async def chat_completions(body: schemas.ChatRequest, request: Request) -> Any:
        """Say the assistant's next message."""
        served = models[body.model]
        prompt = await asyncio.to_thread(served.chat.prompt, body.messages)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        generation = Generation(served, metrics, body, logprobs=logprobs, max_tokens=options.max_tokens)
        await asyncio.to_thread(generation.submit, [prompt])
        reply = ChatReply(served.name, served.tokenizer, logprobs=body.logprobs)
        return await _reply(request, body, generation, reply, body.n)

    async def _reply(
        request: Request,
        body: schemas.GenerationRequest,
        generation: Generation,
        reply: ChatReply | CompletionReply,
        choices: int,
    ) -> Any:
        if body.stream:
            return EventStream(
                generation, reply, choices, include_usage=body.include_usage, timeout=options.timeout
            )
        return JSONResponse(await answer(request, generation, reply, choices, options.timeout))


def _add_reads(app: FastAPI, models: Models) -> None:
    reader = Reader()

    @app.post(
        "/v1/starlm/reads", response_model=schemas.Reads, responses=_errors(400, 401, 403, 404, 413, 429, 503)
    )
    async def where_it_reads(body: schemas.ReadsRequest) -> Response:
        """Which tokens every head reads for each token of a text."""
        return await reader.read(models[body.model], body)


def _prompt(prompt: str | list[int], served: Served) -> Prompt:
    return text_prompt(prompt, served.text) if isinstance(prompt, str) else Prompt(tokens=prompt)


def _describe(app: FastAPI) -> None:
    """The OpenAPI document without FastAPI's 422: what cannot be used is answered 400."""
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _gone(_: Request, error: Exception) -> Response:
    # Nobody reads it; the log has the status.
    return Response(status_code=499)


async def _bug(_: Request, error: Exception) -> Response:
    # The gate logs it.
    return JSONResponse(APIError(500, "A bug in StarLM; the server's log has it by x-request-id.").body, 500)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    text = {
        404: f"There is no {path} here. See /docs.",
        405: f"{path} is not allowed here. See /docs.",
        400: "The body is not JSON text in UTF-8.",
    }.get(error.status_code, str(error.detail))
    refused = APIError(error.status_code, text, headers=error.headers)
    return await _refused(request, refused)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _refused(request, _explain(error.errors()))


def _explain(errors: Any) -> APIError:
    """What pydantic found, as one sentence about the first field that is wrong."""
    # A field that is not known says more than that other alternatives of a union do not fit either.
    first = next((error for error in errors if error["type"] in ("unsupported", "unknown")), errors[0])
    if first["type"] == "json_invalid":
        return bad_request(f"The body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}.")
    param = _place(first)
    if first["type"] == "unsupported":
        return bad_request(
            f"{param} is not supported by this server. Leave it out.", param, code="unsupported_parameter"
        )
    if first["type"] == "unknown":
        name = first["ctx"]["param"]
        within = param.removesuffix(name).removesuffix(".")
        return bad_request(f"There is no field {name!r}{within and f' in {within}'}. See /docs.", param)
    if not param:
        return bad_request(f"The body must be a JSON object, sent as application/json. {first['msg']}.")
    # The alternatives of a union are errors of their own.
    found = [(_place(error), error["msg"]) for error in errors]
    rules = [rule if place == param else f"{place}: {rule}" for place, rule in found if _within(place, param)]
    return bad_request(f"{param}: {'; or '.join(dict.fromkeys(rules))}.", param)


def _place(error: Any) -> str:
    """Where something is wrong, as one writes it: messages[0].content."""
    place = ""
    for part in error["loc"][1:]:
        if isinstance(part, int):
            place += f"[{part}]"
        # The others say which alternative of a union it is.
        elif part != "str" and re.fullmatch("[a-z_]{1,100}", part):
            place += f".{part}"
    if "param" in error.get("ctx", {}):
        place += f".{error['ctx']['param']}"
    return place.removeprefix(".")


def _within(place: str, field: str) -> bool:
    return place == field or place.startswith((f"{field}.", f"{field}["))
