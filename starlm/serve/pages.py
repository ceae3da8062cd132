"""What browsers are shown: the web chat and the API's documentation, complete in themselves."""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment

_FOLDER = files("starlm.serve")


def add_pages(app: FastAPI) -> None:
    """Serve `/`, and `/docs` of the routes that `app` has so far."""
    chat, docs = _page(_FOLDER.joinpath("chat.html").read_text(encoding="utf-8")), _page(_docs(app.openapi()))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_chat() -> Response:
        return chat

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def show_docs() -> Response:
        return docs


def _docs(document: dict[str, Any]) -> str:
    template = Environment(autoescape=True).from_string(
        _FOLDER.joinpath("docs.html.jinja").read_text(encoding="utf-8")
    )
    schemas = document["components"]["schemas"]
    return template.render(info=document["info"], paths=document["paths"], schemas=schemas, kind=_kind)


def _kind(field: dict[str, Any]) -> str:
    """A field's type in words."""
    if "$ref" in field:
        return field["$ref"].split("/")[-1]
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"] if option.get("type") != "null")
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}"
    return str(field.get("type", "any"))


def _page(text: str) -> Response:
    """The page, with a policy that allows its own scripts and styles, by their hashes, and this server."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        f"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)
