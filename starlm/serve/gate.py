"""What stands before every route: request ids, the access log, the key or host, the limit of the body."""

import asyncio
import ipaddress
import json
import logging
import re
import secrets
import time
from hmac import compare_digest
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from starlm.serve.config import ServeOptions
from starlm.serve.errors import APIError
from starlm.serve.metrics import Metrics

ACCESS = logging.getLogger("starlm.serve.access")
_LOG = logging.getLogger("starlm.serve")
# Seconds for a request's body to arrive.
_BODY_SECONDS = 60.0


class Gate:
    """ASGI middleware; lets pass what may, and answers the rest itself."""

    def __init__(self, app: ASGIApp, options: ServeOptions, metrics: Metrics) -> None:
        """Args: app: what is behind. options: key and limit. metrics: counts requests."""
        self._app, self._metrics, self._max_body = app, metrics, options.max_body
        self._key = None if options.api_key is None else options.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":
            # What GET would answer; of the copy the server does not know, and leaves the body out.
            scope = {**scope, "method": "GET"}
        began, status = time.perf_counter(), 0
        number = f"req-{secrets.token_hex(8)}"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", number.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        try:
            self._check_host(scope)
            self._check_key(scope)
            await self._app(scope, await self._with_body(scope, receive), watched)
        except APIError as error:
            await respond(error, watched)
        except _Left:
            pass
        except Exception:
            # It has been answered, as a 500.
            _LOG.exception("request %s failed", number)
        finally:
            self._log(scope, method, number, status, time.perf_counter() - began)

    def _check_host(self, scope: Scope) -> None:
        """Refuse names that somebody's DNS may have pointed here: his web page could read the answers."""
        name = re.sub(r":\d+$", "", Headers(scope=scope).get("host", "").lower())
        if self._key is not None or name in ("", "localhost") or name.endswith(".localhost"):
            return
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            raise APIError(
                403,
                f"Without an API key this server answers to localhost and to addresses, not to the name "
                f"{name[:100]!r}. Ask for it by its address, or start it with --api-key KEY.",
                code="host_not_allowed",
            ) from None

    def _check_key(self, scope: Scope) -> None:
        # Preflights carry no key; the page, the documents and the health say nothing secret.
        guarded = scope["path"].startswith("/v1") or scope["path"] == "/metrics"
        if self._key is None or not guarded or scope["method"] == "OPTIONS":
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not compare_digest(given.strip().encode("latin-1"), self._key):
            raise APIError(
                401,
                "Send the server's key as the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that gives the whole body, which has been read already."""
        too_large = APIError(413, f"The body may have {self._max_body} bytes.", code="body_too_large")
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._max_body:
            raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    part, more = message.get("body", b""), message.get("more_body", False)
                    parts.append(part)
                    size += len(part)
                    if size > self._max_body:
                        raise too_large
        except TimeoutError:
            raise APIError(408, f"The body did not arrive within {_BODY_SECONDS:g} seconds.") from None
        body: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def replay() -> Message:
            return body.pop() if body else await receive()

        return replay

    def _log(self, scope: Scope, method: str, number: str, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", None) or "other"
        # 499: the client left before there was anything to answer.
        self._metrics.requests.labels(path, str(status or 499)).inc()
        client = scope.get("client")
        ACCESS.info(
            "request",
            extra={
                "fields": {
                    "id": number,
                    "client": client[0] if client else None,
                    "method": method,
                    "path": scope["path"],
                    "status": status or 499,
                    "seconds": round(seconds, 6),
                    **scope.get("starlm.log", {}),
                }
            },
        )


async def respond(error: APIError, send: Send) -> None:
    """Send an error's answer."""
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Left(Exception):
    """The client went away within its own request."""


class JSONLines(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
