"""A server under load: time to the first token, between tokens, and tokens per second, by number of clients.

    starlm bench serve --model runs/demo
    starlm bench serve --model runs/demo --clients 1 --prompt-tokens 1000 100000

The server is a process of its own on the loopback interface; each client is a thread that sends its next
request when the one before is answered. Prompts are random tokens, no two alike, so nothing is cached.
"""

import http.client
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from starlm.bench.config import ServeBenchOptions
from starlm.bench.grid import command, load
from starlm.errors import StarLMError

# Seconds within which a client can read and parse what has come already, and no model makes a token.
_TOGETHER = 1e-4


def main(options: ServeBenchOptions, machine: dict[str, str]) -> dict[str, Any]:
    """Print the table; everything that was measured, for JSON."""
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    before, rows = load(), []
    with _server(options) as port:
        vocab = _get(port, "/v1/models")["data"][0]["vocab_size"]
        draw = np.random.default_rng(0)
        _load(port, draw.integers(9, vocab, (1, 1, min(options.prompt_tokens))), options.tokens)
        print(
            f"{options.describe()}, load {before}; milliseconds: median and 99th percentile\n\n"
            f"{'prompt':>9}{'clients':>9}{'first token':>20}{'between tokens':>20}{'tokens/s':>12}"
        )
        for length, clients in itertools.product(options.prompt_tokens, options.clients):
            prompts = draw.integers(9, vocab, (clients, options.requests, length))
            found = _load(port, prompts, options.tokens)
            rows.append({"prompt_tokens": length, "clients": clients, **found})
            first, between = (_written(found[name]) for name in ("first_ms", "between_ms"))
            speed = found["tokens_per_second"]
            print(f"{length:>9,}{clients:>9}{first:>20}{between:>20}{speed:>12,.0f}", flush=True)
    return {
        "command": command("serve", options),
        "machine": machine,
        "load": {"before": before, "after": load()},
        "options": {**vars(options), "model": str(options.model)},
        "rows": rows,
    }


@dataclass
class _Times:
    """What the clients saw, in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


def _load(port: int, prompts: np.ndarray, tokens: int) -> dict[str, Any]:
    """Figures of clients that ask at the same time; prompts: ids [clients, requests of each, length]."""
    clients, requests, _ = prompts.shape
    times = _Times()

    def work(client: int) -> None:
        try:
            for prompt in prompts[client]:
                _ask(port, prompt.tolist(), tokens, times)
        except Exception as error:
            times.errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(client,), daemon=True) for client in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if times.errors:
        raise StarLMError(f"{len(times.errors)} of {clients} clients failed. The first: {times.errors[0]}")
    return {
        "requests": clients * requests,
        "tokens": times.tokens,
        "seconds": seconds,
        "tokens_per_second": times.tokens / seconds,
        "first_ms": _percentiles(times.first),
        "between_ms": _percentiles(times.between),
    }


def _percentiles(seconds: list[float]) -> dict[str, float] | None:
    """In milliseconds; None of nothing: all of an answer may come at once."""
    if not seconds:
        return None
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {"p50": float(p50), "p99": float(p99)}


def _written(found: dict[str, float] | None) -> str:
    return "{p50:,.1f}  {p99:,.1f}".format(**found) if found else "-"


def gaps(came: list[float]) -> list[float]:
    """Seconds between tokens that came at these times.

    Those that a client found waiting, one right behind the other, share the time since those before.
    """
    reads: list[list[float]] = []
    for at, before in zip(came, [-math.inf, *came], strict=False):
        if at - before < _TOGETHER:
            reads[-1].append(at)
        else:
            reads.append([at])
    pairs = itertools.pairwise(reads)
    return [(now[0] - before[0]) / len(now) for before, now in pairs for _ in now]


def _ask(port: int, prompt: list[int], tokens: int, times: _Times) -> None:
    """One streamed completion."""
    body = {"model": "bench", "prompt": prompt, "max_tokens": tokens, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        began = time.perf_counter()
        data = json.dumps({**body, "stream_options": {"include_usage": True}})
        connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise StarLMError(f"The server answered {answer.status}: {answer.read().decode()}")
        came: list[float] = []
        for line in answer:
            now = time.perf_counter()
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event["usage"]:
                times.tokens += event["usage"]["completion_tokens"]
            elif event["choices"][0]["text"]:
                came.append(now)
        times.first += [at - began for at in came[:1]]
        times.between += gaps(came)
    finally:
        connection.close()


def _get(port: int, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return json.loads(answer.read()) if answer.status == 200 else None
    finally:
        connection.close()


@contextmanager
def _server(options: ServeBenchOptions) -> Iterator[int]:
    """The port of a server that is ready."""
    words = ["--model", f"bench={options.model}", "--port", "0", "--slots", str(options.slots)]
    words += ["--queue", str(max(options.clients))]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "starlm", "serve", *words], stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None
        try:
            port = None
            for line in process.stdout:
                found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
                port = int(found[1]) if found else port
                if line.startswith("Ready"):
                    break
            else:
                log.seek(0)
                raise StarLMError(f"The server did not start. {log.read().strip()}")
            assert port is not None
            yield port
        finally:
            process.terminate()
            process.stdout.close()
            process.wait(60)
