"""Whatever is sent, the answer is an error of OpenAI's form with the right status, and never a 500."""

import json
import socket
from contextlib import suppress

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import TOKENIZER

COMPLETION = {"model": "tiny", "prompt": "a", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
BODIES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


def check_error(answer, status):
    assert answer.status == status, answer.body
    (error,) = answer.body.values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "must be a JSON object"),
        (b"{", 400, "The body is not JSON: Expecting"),
        (b'{"model": "tiny",}', 400, "at character"),
        (b"[]", 400, "must be a JSON object"),
        (b"null", 400, "must be a JSON object"),
        (b'"text"', 400, "must be a JSON object"),
        (b'{"model": "\xff\xfe"}', 400, "not JSON text in UTF-8"),
        (b"\xff" * 100, 400, "not JSON text in UTF-8"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, ""),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature: "),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400, "temperature: "),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "prompt: "),
        (b'{"model": "\\ud800", "prompt": "a"}', 400, "model: "),
        (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', 400, "There is no field"),
        ({}, 400, "model: Field required"),
        ({"model": "tiny"}, 400, "prompt: Field required"),
        ({**COMPLETION, "model": "none"}, 404, "There is no model 'none' here. There are: tiny, other."),
        ({**COMPLETION, "model": "none" * 1000}, 400, "model: "),
        ({**COMPLETION, "model": 3}, 400, "model: "),
        ({**COMPLETION, "prompt": {}}, 400, "prompt: "),
        ({**COMPLETION, "prompt": []}, 400, "prompt: "),
        ({**COMPLETION, "prompt": ["a", 3]}, 400, "prompt: "),
        ({**COMPLETION, "prompt": [TOKENIZER.vocab_size]}, 400, "tokens must be between 0 and"),
        ({**COMPLETION, "prompt": [-1]}, 400, "prompt: "),
        ({**COMPLETION, "max_tokens": "5"}, 400, "max_tokens: "),
        ({**COMPLETION, "max_tokens": 1.5}, 400, "max_tokens: "),
        ({**COMPLETION, "max_tokens": True}, 400, "max_tokens: "),
        ({**COMPLETION, "max_tokens": 0}, 400, "max_tokens: "),
        ({**COMPLETION, "max_tokens": 2**31 - 1}, 400, "MiB of memory"),
        ({**COMPLETION, "n": 0}, 400, "n: "),
        ({**COMPLETION, "n": 33}, 400, "at most the engine's 32 slots"),
        ({**COMPLETION, "temperature": 2.5}, 400, "temperature: "),
        ({**COMPLETION, "top_p": 0}, 400, "top_p: "),
        ({**COMPLETION, "stop": ""}, 400, "stop: "),
        ({**COMPLETION, "stop": ["a", ""]}, 400, "stop: "),
        ({**COMPLETION, "seed": 2**63}, 400, "seed: "),
        ({**COMPLETION, "logit_bias": {"x": 1}}, 400, "token ids below"),
        ({**COMPLETION, "logit_bias": {"1" * 5000: 1}}, 400, "token ids below"),
        ({**COMPLETION, "logit_bias": {"1": 101}}, 400, "logit_bias: "),
        ({**COMPLETION, "logprobs": 21}, 400, "logprobs: "),
        ({**COMPLETION, "stream_options": {"include_usage": True}}, 400, "only allowed with stream"),
        ({**COMPLETION, "temprature": 1}, 400, "There is no field 'temprature'"),
        ({**COMPLETION, "echo": True}, 400, "echo is not supported"),
        ({**COMPLETION, "suffix": "x"}, 400, "suffix is not supported"),
        ({**COMPLETION, "best_of": 2}, 400, "best_of is not supported"),
        ({**COMPLETION, "top_k": -2}, 400, "top_k: "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_completions(server, body, status, message):
    error = check_error(server.post("/v1/completions", body), status)
    assert message in error["message"]
    if message.endswith(": "):
        assert error["param"] == message[:-2]
    if message.startswith(("at most the engine's", "tokens must be")):
        assert error["param"] in ("n", "prompt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": "hi"}, "messages: "),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
        ({"tool_choice": "required"}, "tool_choice is not supported"),
        ({"functions": [{"name": "f"}]}, "functions is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"modalities": ["audio"]}, "modalities is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported"),
        ({"store": True}, "store is not supported"),
        ({"moderation": {}}, "moderation is not supported"),
        ({"prompt_cache_options": {}}, "prompt_cache_options is not supported"),
        ({"n": 33}, "more --slots"),
        ({"top_logprobs": 3}, "needs logprobs to be true"),
        ({"logprobs": 3}, "logprobs: "),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation is not",
        ),
    ],
    ids=str,
)
def test_chats(server, change, message):
    error = check_error(server.post("/v1/chat/completions", {**CHAT, **change}), 400)
    assert message in error["message"]


HI = {"role": "user", "content": "a"}
NOT = "is not supported by this server. Leave it out."


@pytest.mark.parametrize(
    ("message", "place", "text"),
    [
        ({"role": "user"}, "content", ": Field required."),
        ({"role": "user", "content": None}, "content", ": Field required."),
        ({"role": "robot", "content": "a"}, "role", ": Input should be 'system', 'developer', 'user' or"),
        (
            {"role": "user", "content": 3},
            "content",
            ": Input should be a valid string; or Input should be a valid list.",
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "content",
            ": Input should be a valid string; or messages[1].content[0].text: Field required.",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "content[0].image_url",
            f" {NOT}",
        ),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}],
            },
            "content[1].input_audio",
            f" {NOT}",
        ),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_calls", f" {NOT}"),
        ({"role": "tool", "content": "a", "tool_call_id": "1"}, "tool_call_id", f" {NOT}"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "refusal", f" {NOT}"),
    ],
    ids=str,
)
def test_messages(server, message, place, text):
    body = {**CHAT, "messages": [HI, message]}
    error = check_error(server.post("/v1/chat/completions", body), 400)
    assert error["param"] == f"messages[1].{place}"
    assert error["message"].startswith(f"messages[1].{place}{text}")


@pytest.mark.parametrize(
    ("body", "param", "within"),
    [
        ({"messages": [HI, {**HI, "nick": "Bo"}]}, "messages[1].nick", " in messages[1]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages[0].content[0].x",
            " in messages[0].content[0]",
        ),
        ({"stream": True, "stream_options": {"all": True}}, "stream_options.all", " in stream_options"),
        ({"": 1}, "", ""),
        ({".": 1}, ".", ""),
    ],
    ids=str,
)
def test_fields_that_there_are_not(server, body, param, within):
    error = check_error(server.post("/v1/chat/completions", {**CHAT, **body}), 400)
    assert error["param"] == param
    name = param.removeprefix(f"{within.removeprefix(' in ')}.") if within else param
    assert error["message"] == f"There is no field {name!r}{within}. See /docs."


def test_what_means_nothing_is_let_through(server):
    """Fields at the values that other clients send by default."""
    harmless = {
        **{"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False},
        **{"stop": None, "seed": None, "user": "me", "top_logprobs": None, "stream_options": None},
        **{"parallel_tool_calls": True, "service_tier": "auto", "modalities": ["text"], "functions": None},
    }
    assert server.post("/v1/chat/completions", {**CHAT, **harmless}).status == 200
    answered = {"role": "assistant", "content": "b", "name": "Bo", "refusal": None, "tool_calls": []}
    assert server.post("/v1/chat/completions", {**CHAT, "messages": [HI, answered, HI]}).status == 200
    harmless = {"echo": False, "suffix": None, "logit_bias": None, "n": None, "top_k": -1}
    for best in ({"best_of": 1}, {"best_of": 2, "n": 2}):
        assert server.post("/v1/completions", {**COMPLETION, **harmless, **best}).status == 200


def test_a_template_that_refuses(server):
    assert server.post("/v1/chat/completions", {**CHAT, "model": "other"}).status == 200


def test_routes(server):
    assert "There is no GET /v2" in check_error(server.get("/v2"), 404)["message"]
    error = check_error(server.get("/v1/completions"), 405)
    assert "GET /v1/completions is not allowed" in error["message"]
    check_error(server.ask("DELETE", "/"), 405)
    check_error(server.get("/v1/models/%ff%00"), 404)
    check_error(server.get("/%2e%2e/%2e%2e/etc/passwd"), 404)


def test_only_json_is_read(server):
    body = json.dumps(COMPLETION).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "nonsense"):
        error = check_error(server.post("/v1/completions", body, headers={"Content-Type": kind}), 400)
        assert "application/json" in error["message"]


def test_large_bodies(server):
    large = json.dumps({**COMPLETION, "prompt": "a" * (5 << 20)}).encode()
    assert "4194304 bytes" in check_error(server.post("/v1/completions", large), 413)["message"]
    for length in ("99999999999999999999999", "-1", "many"):
        answer = raw(
            server, f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        )
        assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400")), answer
    # Without a length, counted as it comes.
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert raw(server, head + chunk * 80).startswith(b"HTTP/1.1 413")


def raw(server, data):
    """What the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data if isinstance(data, bytes) else data.encode())
        try:
            return connection.recv(65536)
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize(
    "data", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\r\n", b"GET / HTTP/9\r\n\r\n"]
)
def test_what_is_not_http(server, data):
    answer = raw(server, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert server.get("/health").status == 200


def test_openai_clients_get_their_exceptions(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="none", prompt="a")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[], max_tokens=1)
    assert error.value.param == "messages"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = [
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n", "temperature", "top_p"),
    *("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed"),
    *("stop", "stream", "stream_options", "logprobs", "top_logprobs", "user", "tools", "echo", "text"),
    *("tokens", "begin"),
]
PATHS = [*BODIES, "/v1/starlm/reads"]


@given(path=st.sampled_from(PATHS), body=st.binary(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_bytes(server, path, body):
    check_error(server.post(path, body), 400)


@given(
    path=st.sampled_from(PATHS),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3),
    drop=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_fields(server, path, changes, drop):
    """Good bodies in which some fields are replaced by anything."""
    body = ({} if drop else BODIES.get(path, {"model": "tiny", "text": "a"})) | changes
    answer = server.post(path, json.dumps(body).encode())
    assert answer.status in (200, 400, 404), (answer.status, answer.body)
    if answer.status != 200:
        check_error(answer, answer.status)


@given(
    number=st.floats(allow_nan=True) | st.integers(),
    field=st.sampled_from(
        ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "seed"]
    ),
)
@settings(max_examples=60, deadline=None)
def test_any_numbers(server, number, field):
    """Extreme options are refused or work, and the model's chances stay finite."""
    answer = server.post(
        "/v1/completions", json.dumps({**COMPLETION, "max_tokens": 3, field: number}).encode()
    )
    assert answer.status in (200, 400), answer.body


@given(text=st.text(max_size=30), role=st.sampled_from(["user", "system", "assistant"]))
@settings(max_examples=60, deadline=None)
def test_any_text(server, text, role):
    messages = [{"role": role, "content": text}]
    for model in ("tiny", "other"):
        body = {"model": model, "messages": messages, "max_tokens": 1, "stop": text[:3] or None}
        assert server.post("/v1/chat/completions", body).status == 200
