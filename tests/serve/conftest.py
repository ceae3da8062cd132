import shutil
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


@pytest.fixture(scope="module")
def chromium():
    from playwright import sync_api as playwright

    with playwright.sync_playwright() as p:
        found = next(
            (path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None
        )
        if found is None and Path(p.chromium.executable_path).is_file():
            found = p.chromium.executable_path
        if found is None:
            pytest.skip("no Chromium: install one (apt install chromium, or playwright install chromium)")
        args = ["--no-sandbox", "--disable-background-networking"]
        browser = p.chromium.launch(executable_path=found, args=args)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium, server):
    """Opens the chat as a new visitor; fails on any error in its pages or request to elsewhere."""
    from playwright.sync_api import expect

    contexts, wrong = [], []

    def open_page(width=1200, height=760, at=server, **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(20_000)
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        context.on(
            "console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None
        )
        context.on(
            "request",
            lambda r: None if r.url.startswith((at.url, "blob:", "data:")) else wrong.append(r.url),
        )
        # Random models: short answers, and always the same. The empty page before has no storage.
        context.add_init_script(
            "if (location.host && !localStorage.getItem('starlm.settings')) "
            "localStorage.setItem('starlm.settings', "
            "JSON.stringify({max_tokens: 60, seed: 4, markdown: false}))"
        )
        page = context.new_page()
        page.goto(f"{at.url}/")
        expect(page.get_by_label("Model")).to_have_value("tiny")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(new_page):
    return new_page()
