"""`transformers serve` answers from a checkpoint, to OpenAI's own client."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import make_model
from openai import APIConnectionError, OpenAI
from wrapped import make_tokenizer, write_checkpoint

import starlm


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_transformers_serve_answers(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model("star", dtype=torch.float32, vocab_size=tokenizer.vocab_size)
    folder = write_checkpoint(model, tmp_path / "m", tokenizer)
    port = free_port()
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": str(Path(starlm.__file__).parents[1]),
    }
    command = [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        str(folder),
        "--trust-remote-code",
    ]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu"], env=environment, stdout=log, stderr=log
    )
    try:
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            for _ in range(120):
                try:
                    client.models.list()
                    break
                except APIConnectionError:
                    assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                    time.sleep(1)
            asked = {"model": str(folder), "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6}
            answer = client.chat.completions.create(**asked)
            assert answer.usage.prompt_tokens == 1 + 2 + len(tokenizer.encode("Hi")) + 1
            assert 1 <= answer.usage.completion_tokens <= 6
            assert answer.choices[0].finish_reason in ("stop", "length")
            pieces = [
                chunk for chunk in client.chat.completions.create(**asked, stream=True) if chunk.choices
            ]
            assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    finally:
        server.terminate()
        server.wait(20)
        log.close()
