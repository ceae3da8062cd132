import sys
from pathlib import Path

import pytest

# Helpers stand beside the tests that use them.
here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent / "model"), str(here.parent / "nn")]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    # Not above: pytest reads this file before the shape checks are there.
    from servers import make_run

    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def serve(tmp_path):
    """Starts servers, and ends them after the test."""
    from servers import Server

    started = []

    def start(*options):
        folder = tmp_path / f"server-{len(started)}"
        folder.mkdir()
        started.append(Server(folder, *map(str, options)))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.stop()


@pytest.fixture(scope="session")
def server(run, tmp_path_factory):
    """One server for all tests that leave it as it was."""
    from servers import Server, make_run

    template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}_start|>{{ m.content }}<|{{ m.role }}_end|>"
        "{% endfor %}<|assistant_start|>"
    )
    chat = make_run(tmp_path_factory.mktemp("runs") / "chat", chat_template_DOT_jinja=template)
    found = Server(tmp_path_factory.mktemp("server"), "--model", run, "--model", f"other={chat}").ready()
    yield found
    left = not found.idle()
    assert found.stop() == 0, found.text()
    assert not left, "a sequence was left running"
    assert "traceback" not in found.log.read_text()


@pytest.fixture
def client(server):
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
