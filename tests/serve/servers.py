"""Real servers in processes of their own, with small random models."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import make_model

from starlm.data.tokenizer import Tokenizer
from starlm.files import whole_folder
from starlm.generate.chat import ENDS
from starlm.model.checkpoint import write_model

TOKENIZER = Tokenizer.train(["def add(a, b):\n    return a + b  # é 你好 🙂\n" * 30], 300)
# With these fields an answer never ends by itself.
ENDLESS = {"logit_bias": {str(TOKENIZER.special[name]): -100 for name in ("<|bos|>", *ENDS)}}


class Server:
    """A server that runs."""

    def __init__(self, folder: Path, *options: str) -> None:
        """Args: folder: for its log. options: of the command line."""
        self.log = folder / "log.jsonl"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "starlm", "serve", "--port", "0", *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()
        self.port = int(self._wait(lambda: re.search(r"http://127.0.0.1:(\d+)", "".join(self.lines)))[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def ready(self) -> "Server":
        """The server, when its models are loaded."""
        self._wait(lambda: self.get("/health").status == 200)
        return self

    def _wait(self, what, seconds=60.0):
        def happened():
            if not (found := what()) and self.process.poll() is not None:
                pytest.fail(self.text())
            return found

        return wait_for(happened, seconds)

    def text(self) -> str:
        """What it said."""
        return "".join(self.lines) + self.log.read_text()

    def ask(self, method, path, body=None, *, headers=None, timeout=60):
        """One request on a connection of its own; status, headers and body, as JSON where it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        given = {"Content-Type": "application/json"} if body is not None else {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, given | (headers or {}))
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        kind = answer.headers.get_content_type()
        parsed = json.loads(text) if text and kind == "application/json" else text.decode()
        return SimpleNamespace(status=answer.status, headers=answer.headers, body=parsed)

    def get(self, path, **more):
        """See `ask`."""
        return self.ask("GET", path, **more)

    def post(self, path, body, **more):
        """See `ask`."""
        return self.ask("POST", path, body, **more)

    def metrics(self, **more) -> dict[str, float]:
        """Samples by name and labels."""
        lines = self.get("/metrics", **more).body.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    def idle(self, model="tiny", **more) -> bool:
        """Whether nothing runs or waits."""
        found = self.metrics(**more)
        names = ("starlm_requests_running", "starlm_requests_waiting")
        return not any(found[f'{name}{{model="{model}"}}'] for name in names)

    def stop(self, sign=signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(sign)
        code = self.process.wait(60)
        self._reader.join(10)
        self.process.stdout.close()
        return code


def wait_for(what, seconds=20.0):
    """What `what` returns once it is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)
    return found


def make_run(folder: Path, kind: str = "star", **files: str) -> Path:
    """A run with a small random model; `files` are added to its checkpoint."""
    model = make_model(kind, vocab_size=TOKENIZER.vocab_size)
    # It seldom ends an answer of its own accord: once in some thousand tokens.
    with torch.no_grad():
        model.head.weight.mul_(3)[list(TOKENIZER.names)] = 0
    with whole_folder(folder / "checkpoints/step-000001") as checkpoint:
        write_model(model.float(), checkpoint, bos=TOKENIZER.bos, chat="chat_template_DOT_jinja" in files)
        TOKENIZER.save(checkpoint)
        for name, text in files.items():
            (checkpoint / name.replace("_DOT_", ".")).write_text(text)
    return folder
