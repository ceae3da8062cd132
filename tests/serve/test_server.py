"""The process: loading, limits, clients that leave or read slowly, and the end."""

import json
import signal
import socket
import threading
import time

import psutil
import pytest
from servers import ENDLESS, Server, make_run, wait_for

from starlm.cli.main import main

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 50_000, **ENDLESS}
KEY = {"Authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def limited(run, tmp_path_factory):
    """A server with one slot, a queue of one, and small limits."""
    options = (
        *("--slots", "1", "--queue", "1", "--max-body", "5000", "--max-context", "60000"),
        *("--api-key", "sesame", "--cors-origin", "https://example.org", "--cors-origin", "http://a.b:3"),
    )
    found = Server(tmp_path_factory.mktemp("limited"), "--model", run, *options).ready()
    yield found
    assert found.stop() == 0
    assert "traceback" not in found.log.read_text()


@pytest.fixture(scope="module")
def hasty(run, tmp_path_factory):
    """A server with one slot that gives a request two seconds."""
    found = Server(tmp_path_factory.mktemp("hasty"), "--model", run, "--slots", "1", "--timeout", "2").ready()
    yield found
    assert found.stop() == 0
    assert "traceback" not in found.log.read_text()


class Open:
    """A request whose answer is not read unless asked for."""

    def __init__(self, server, body, path="/v1/completions", headers=None):
        data = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        # Little is kept on the way, so that a client that does not read is noticed.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode() + data)

    def read(self, count=65536) -> bytes:
        return self.socket.recv(count)

    def rest(self) -> str:
        """All that is still to come."""
        parts = []
        while part := self.read():
            parts.append(part)
        return b"".join(parts).decode()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()


def running(server, **more):
    found = server.metrics(**more)
    return tuple(found[f'starlm_requests_{what}{{model="tiny"}}'] for what in ("running", "waiting"))


def test_health_says_whether_the_models_are_loaded(serve, run):
    server = serve("--model", run)
    answer = server.get("/health")
    assert (answer.status, answer.body) == (503, {"status": "loading"})
    answer = server.post("/v1/completions", {"model": "tiny", "prompt": "a"})
    assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
    assert "is being loaded" in answer.body["error"]["message"]
    assert server.get("/").status == 200
    server.ready()
    assert server.get("/health").body == {"status": "ok"}
    assert server.post("/v1/completions", {"model": "tiny", "prompt": "a"}).status == 200
    assert server.stop() == 0


@pytest.mark.slow
def test_ctrl_c_while_the_models_are_loaded(serve, run):
    server = serve("--model", run)
    assert server.get("/health").status == 503
    assert server.stop(signal.SIGINT) == 0, server.text()
    assert "Ready" not in server.text()


def test_the_key(limited):
    for given in (None, "sesame", "Bearer wrong", "Basic sesame", "Bearer", "Bearer sesame x", "é"):
        headers = {} if given is None else {"Authorization": given}
        for path in ("/v1/models", "/metrics"):
            answer = limited.get(path, headers=headers)
            assert answer.status == 401
            assert answer.body["error"]["code"] == "invalid_api_key"
    assert limited.get("/v1/models", headers=KEY).status == 200
    # A scheme's case says nothing (RFC 9110).
    assert limited.get("/v1/models", headers={"Authorization": "bearer sesame"}).status == 200
    for path in ("/", "/health", "/docs"):
        assert limited.get(path).status == 200


def test_head_is_get_without_the_body(limited, server):
    for path in ("/", "/health", "/v1/models", "/metrics"):
        head, get = server.ask("HEAD", path), server.get(path)
        assert head.status == 200
        assert head.headers["Content-Type"] == get.headers["Content-Type"]
        # On the wire, since the client looks for no body.
        with socket.create_connection(("127.0.0.1", server.port)) as wire:
            wire.sendall(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda wire=wire: wire.recv(4096), b""))
        assert answer.endswith(b"\r\n\r\n")
        assert answer.count(b"\r\n\r\n") == 1
    logged = [json.loads(line) for line in server.log.read_text().splitlines() if '"HEAD"' in line]
    assert {line["path"] for line in logged} >= {"/", "/health", "/v1/models", "/metrics"}
    assert limited.ask("HEAD", "/v1/models").status == 401
    assert server.ask("HEAD", "/nowhere").status == 404


def test_names_that_a_foreign_dns_may_point_here(limited, server):
    for name in ("127.0.0.1:80", "localhost", "LOCALHOST:9", "a.localhost", "[::1]:80", "[::1]", "10.0.0.1"):
        assert server.get("/v1/models", headers={"Host": name}).status == 200, name
    for name in ("evil.org", "evil.org:8000", "localhost.evil.org", "127.0.0.1.evil.org", "1.2.3", "é"):
        for path in ("/v1/models", "/"):
            answer = server.get(path, headers={"Host": name})
            assert (answer.status, answer.body["error"]["code"]) == (403, "host_not_allowed"), name
    # A page elsewhere has no key.
    assert limited.get("/v1/models", headers=KEY | {"Host": "models.example.org"}).status == 200


def test_other_origins(limited, server):
    ask = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    asked = limited.ask("OPTIONS", "/v1/completions", headers=ask)
    assert (asked.status, asked.headers["Access-Control-Allow-Origin"]) == (200, "https://example.org")
    # OpenAI's client for browsers sends headers of its own.
    more = ask | {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}
    assert limited.ask("OPTIONS", "/v1/completions", headers=more).status == 200
    # Errors can be read by the page, too.
    assert limited.get("/v1/models", headers=ask).headers["Access-Control-Allow-Origin"]
    evil = ask | {"Origin": "https://evil.org"}
    assert limited.ask("OPTIONS", "/v1/completions", headers=evil).status == 400
    assert limited.get("/v1/models", headers=evil | KEY).headers["Access-Control-Allow-Origin"] is None
    # Off by default.
    assert server.ask("OPTIONS", "/v1/completions", headers=ask).status == 405
    assert server.get("/v1/models", headers=ask).headers["Access-Control-Allow-Origin"] is None


def test_limits(limited):
    answer = limited.post("/v1/completions", {**LONG, "max_tokens": 60_000}, headers=KEY)
    assert answer.status == 400
    error = answer.body["error"]
    assert "max_tokens is 60000: together more than the 60000 allowed" in error["message"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert limited.post("/v1/completions", {**LONG, "prompt": "a" * 6000}, headers=KEY).status == 413
    assert limited.post("/v1/completions", {**LONG, "n": 2}, headers=KEY).status == 400


def test_an_answer_whose_length_nobody_named_fits(serve, run):
    server = serve("--model", run, "--max-context", "50").ready()
    for length, left in ((10, 39), (48, 1)):
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "x" * length}], **ENDLESS}
        assert server.post("/v1/chat/completions", chat).body["usage"]["completion_tokens"] == left
    for name in ("max_tokens", "max_completion_tokens"):
        assert server.post("/v1/chat/completions", {**chat, name: 2}).status == 400
    chat["messages"][0]["content"] = "x" * 49
    answer = server.post("/v1/chat/completions", chat)
    error = answer.body["error"]
    assert answer.status == 400
    assert "tokens and with any answer that is more than the 50 allowed." in error["message"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    prompts = {"model": "tiny", "prompt": ["x", "x" * 45], **ENDLESS}
    assert server.post("/v1/completions", prompts).body["usage"]["completion_tokens"] == 16 + 4


@pytest.mark.slow
def test_time_is_up(hasty):
    began = time.monotonic()
    answer = hasty.post("/v1/completions", LONG)
    assert (answer.status, answer.body["error"]["code"]) == (504, "timeout")
    assert time.monotonic() - began < 30
    answer = hasty.post("/v1/completions", {**LONG, "stream": True})
    events = answer.body.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert len(events) > 10
    wait_for(lambda: running(hasty) == (0, 0))


def test_a_full_queue(limited):
    with Open(limited, {**LONG, "stream": True}, headers=KEY):
        # Its headers come while it still waits itself.
        wait_for(lambda: running(limited, headers=KEY) == (1, 0))
        with Open(limited, LONG, headers=KEY):
            wait_for(lambda: running(limited, headers=KEY) == (1, 1))
            answer = limited.post("/v1/completions", LONG, headers=KEY)
            assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
            assert answer.body["error"]["type"] == "rate_limit_error"
            # This many will never fit.
            many = limited.post("/v1/completions", {**LONG, "prompt": ["a", "b"]}, headers=KEY)
            assert many.status == 400
            assert "2 prompts at once are more than the 1 that may wait" in many.body["error"]["message"]
            assert running(limited, headers=KEY) == (1, 1)
        # Leaving the queue, without an answer.
        wait_for(lambda: running(limited, headers=KEY) == (1, 0))
    wait_for(lambda: running(limited, headers=KEY) == (0, 0))
    assert limited.post("/v1/completions", {**LONG, "max_tokens": 2}, headers=KEY).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(server, stream):
    with Open(server, {**LONG, "stream": stream}) as gone:
        wait_for(lambda: running(server) == (1, 0))
        if stream:
            gone.read(100)
    wait_for(server.idle)


def test_a_client_that_leaves_within_its_request(server):
    begun = b'POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"mo'
    for part in (begun[:20], begun):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(part)
    assert server.get("/health").status == 200


@pytest.mark.slow
def test_a_client_that_reads_nothing_harms_nobody(hasty):
    """Others are served when its time is up, and little is kept for it."""
    process = psutil.Process(hasty.process.pid)
    before = process.memory_info().rss
    with Open(hasty, {**LONG, "stream": True, "logprobs": 5}) as slow:
        slow.read(10)
        answer = hasty.post("/v1/completions", {**LONG, "max_tokens": 3}, timeout=30)
        assert answer.status in (200, 504)
        wait_for(lambda: running(hasty) == (0, 0))
        assert process.memory_info().rss - before < 200 << 20


def test_a_client_that_reads_slowly_gets_everything(server):
    with Open(server, {**LONG, "max_tokens": 2000, "stream": True, "seed": 1}) as slow:
        for _ in range(20):
            slow.read(500)
            time.sleep(0.02)
        slow.socket.settimeout(30)
        text = b""
        while b"[DONE]" not in text:
            text += slow.read()
        assert b'"finish_reason": "length"' in text


@pytest.mark.slow
def test_sigterm_lets_answers_finish(serve, run):
    server = serve("--model", run, "--grace", "60").ready()
    body = {**LONG, "max_tokens": 1500, "stream": True}
    with Open(server, body) as first, Open(server, {**body, "stream": False}) as second:
        wait_for(lambda: running(server) == (2, 0))
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: refused(server))
        assert first.rest().rstrip("\r\n0").endswith("data: [DONE]")
        assert second.rest().startswith("HTTP/1.1 200")
    assert server.process.wait(30) == 0
    assert "traceback" not in server.log.read_text()


def refused(server):
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
    except OSError:
        return True
    return False


def test_sigterm_cuts_off_what_takes_too_long(serve, run):
    server = serve("--model", run, "--grace", "0.5").ready()
    body = {**LONG, "stream": True}
    with Open(server, body) as first, Open(server, {**body, "stream": False}) as second:
        wait_for(lambda: running(server) == (2, 0))
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert "The server is shutting down; the answer was cut off." in first.rest()
        assert second.rest().startswith("HTTP/1.1 503")
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 20
    assert "traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(serve, run):
    server = serve("--model", run, "--grace", "60").ready()
    with Open(server, {**LONG, "stream": True}) as first:
        first.read()
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: refused(server))
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) is not None


@pytest.mark.slow
def test_sigterm_under_load(serve, run):
    """Every client gets an answer or is refused; none hangs."""
    server = serve("--model", run, "--slots", "4", "--grace", "20").ready()
    outcomes, stopping = [], threading.Event()

    def work():
        while not stopping.is_set():
            try:
                outcomes.append(server.post("/v1/completions", {**LONG, "max_tokens": 20}, timeout=30).status)
            except (OSError, ValueError):
                # Refused, or closed before the request was read.
                return

    threads = [threading.Thread(target=work, daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(outcomes) > 20)
    assert server.stop() == 0
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    stopping.set()
    assert set(outcomes) <= {200, 503}
    assert "traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "There is no model at nowhere"),
        (["--model", "bare"], "There is no readable tokenizer at"),
        (["--model", "run", "--model", "run"], "Two models are called 'run'. Name them: --model NAME=run."),
        (["--model", "a b=run"], "letters, digits"),
        (["--model", "run", "--host", "0.0.0.0"], "so it needs --api-key KEY"),
        (["--model", "run", "--api-key", ""], "api_key must be printable ASCII"),
        (["--model", "run", "--api-key", "k "], "api_key must be printable ASCII"),
        (["--model", "run", "--api-key", "é"], "api_key must be printable ASCII"),
        (["--model", "run", "--port", "70000"], "port must be between 0 and 65535; got 70000."),
        (["--model", "run", "--port", "TAKEN"], "Choose another with --port"),
        (["--model", "run", "--host", "no.such.host.invalid", "--api-key", "k"], "Cannot listen on no.such"),
        (["--model", "run", "--host", "..", "--api-key", "k"], "Cannot listen on .., port 0: "),
        (["--model", "run", "--cors-origin", "example.org"], "cors_origin must be scheme://host"),
        (["--model", "broken"], "The chat template is not valid Jinja"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_served(tmp_path, monkeypatch, capsys, options, message):
    make_run(tmp_path / "run")
    make_run(tmp_path / "bare")
    (tmp_path / "bare/checkpoints/step-000001/tokenizer.json").unlink()
    make_run(tmp_path / "broken", chat_template_DOT_jinja="{% if %}")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [port if word == "TAKEN" else word for word in options]
        code = main(["serve", *([] if "--port" in words else ["--port", "0"]), *words])
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error
