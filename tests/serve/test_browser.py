"""The web chat in a real Chromium: what a user does, at the size of a desk and of a phone."""

import json
import re

import pytest
from playwright.sync_api import expect
from servers import wait_for
from visits import answers, box, done, never_ends, send, texts

pytestmark = pytest.mark.browser


def test_send_and_stream(page, server):
    expect(page.get_by_text("This model continues texts:")).to_be_visible()
    send(page, "def add")
    done(page)
    asked, answer = texts(page)
    assert asked == "def add"
    settings = {"temperature": 0.8, "max_tokens": 60, "seed": 4}
    messages = [{"role": "user", "content": "def add"}]
    body = {"model": "tiny", "messages": messages, **settings}
    said = server.post("/v1/chat/completions", body).body["choices"][0]["message"]["content"]
    assert answer == said
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first after", page.locator(".stats").inner_text())
    send(page, "again")
    done(page)
    assert len(texts(page)) == 4


def test_stop(page, server):
    never_ends(page)
    send(page, "never end")
    expect(answers(page).locator(".body")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    done(page)
    before = texts(page)[1]
    expect(page.locator(".stats")).to_contain_text("stopped")
    wait_for(server.idle)
    assert texts(page)[1] == before
    # Escape does the same.
    send(page, "and again")
    expect(answers(page).nth(1).locator(".body")).not_to_be_empty()
    page.keyboard.press("Escape")
    done(page)
    wait_for(server.idle)


def test_edit_and_resend(page):
    send(page, "first")
    done(page)
    send(page, "second")
    done(page)
    page.get_by_role("button", name="Edit").first.click()
    area = page.locator(".edit textarea")
    expect(area).to_have_value("first")
    expect(area).to_be_focused()
    area.press("Escape")
    assert texts(page)[0] == "first"
    page.get_by_role("button", name="Edit").first.click()
    area.fill("changed")
    page.get_by_role("button", name="Send again").click()
    done(page)
    assert texts(page)[0] == "changed"
    assert len(texts(page)) == 2


def test_edit_before_anything_came(page):
    """The answer that is given up takes nothing of the new one with it."""
    send(page, "before")
    done(page)
    held = []
    page.route("**/v1/chat/completions", lambda r: r.continue_() if held else held.append(r))
    send(page, "first")
    expect(page.locator(".busy")).to_have_count(1)
    page.get_by_role("button", name="Edit").nth(1).click()
    page.locator(".edit textarea").fill("changed")
    page.get_by_role("button", name="Send again").click()
    done(page)
    assert len(texts(page)) == 4
    assert texts(page)[2] == "changed" != texts(page)[3]
    assert page.evaluate("current.messages.map((m) => m.role)") == ["user", "assistant"] * 2


def test_reads_of_a_conversation_that_was_left(page):
    send(page, "def")
    done(page)
    held = []
    page.route("**/v1/starlm/reads", lambda r: held.append(r))
    page.get_by_role("button", name="Where it reads").click()
    page.get_by_role("button", name="New chat").click()
    with page.expect_response("**/v1/starlm/reads"):
        held[0].continue_()
    page.wait_for_timeout(300)
    expect(page.get_by_role("region", name="Where it reads")).to_be_hidden()


def test_regenerate(page):
    page.evaluate("settings.seed = ''")
    send(page, "def")
    done(page)
    first = texts(page)[1]
    page.get_by_role("button", name="Regenerate").click()
    done(page)
    assert len(texts(page)) == 2
    assert texts(page)[1] != first


def test_several_conversations_outlive_a_reload(page):
    for text in ("one", "two"):
        page.get_by_role("button", name="New chat").click()
        send(page, text)
        done(page)
    kept = texts(page)
    page.reload()
    expect(page.locator(".turn").first).to_be_visible()
    assert texts(page) == kept
    chats = page.get_by_role("navigation", name="Conversations")
    chats.get_by_role("button", name="one", exact=True).click()
    assert texts(page)[0] == "one"
    page.on("dialog", lambda dialog: dialog.accept())
    chats.get_by_role("button", name="Delete one").click()
    expect(chats.get_by_role("listitem")).to_have_count(1)
    page.reload()
    expect(chats.get_by_role("listitem")).to_have_count(1)


def test_export_and_import(page, new_page, tmp_path):
    send(page, "keep me")
    done(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    content = json.loads(file.read_text())
    assert [m["role"] for m in content["chats"][0]["messages"]] == ["user", "assistant"]
    other = new_page()
    other.set_input_files("#file", file)
    expect(other.locator(".turn")).to_have_count(2)
    assert texts(other) == texts(page)
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"chats": [{"id": 1}]}')
    other.set_input_files("#file", wrong)
    expect(other.get_by_role("alert")).to_contain_text("wrong.json holds no conversations")
    assert len(texts(other)) == 2


def test_errors_can_be_read(page):
    page.evaluate("settings.stop = 'x'.repeat(2000)")
    send(page, "hello")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("String should have at most 1000 characters")
    assert texts(page) == ["hello"]
    page.evaluate("settings.stop = ''")
    alert.get_by_role("button", name="Try again").click()
    done(page)
    assert len(texts(page)) == 2
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "hello?")
    expect(alert).to_contain_text("The server cannot be reached. Is starlm serve still running?")
    page.unroute("**/v1/chat/completions")
    body = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
    page.route("**/v1/chat/completions", lambda r: r.fulfill(body=body, content_type="text/event-stream"))
    alert.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("ended in the middle")
    assert texts(page)[-1] == "half"


MARKDOWN = """# Title

Some **bold**, *italic* and `code`, snake_case_names and 2 * 3 * 4.

```python
def f(x):
    return x < 1 and "<b>"
```

- one
- two

> quoted

[link](https://example.org) [bad](javascript:alert(1))
<img src=x onerror=alert(1)><script>alert(2)</script>"""


def test_markdown_is_shown_and_markup_is_not(page):
    """Whatever a model says becomes text: no element of its own, no script, no link but to the web."""
    page.evaluate("settings.markdown = true")
    page.get_by_label("Model").select_option("other")
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": MARKDOWN}, "finish_reason": "stop"}]})
    body = f"data: {chunk}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda r: r.fulfill(body=body, content_type="text/event-stream"))
    send(page, "<b>show me</b>")
    done(page)
    answer = answers(page).locator(".body")
    assert texts(page)[0] == "<b>show me</b>"
    assert answer.locator("h3").inner_text() == "Title"
    assert answer.locator("strong").all_text_contents() == ["bold"]
    assert answer.locator("em").all_text_contents() == ["italic"]
    assert answer.locator("pre").inner_text() == 'def f(x):\n    return x < 1 and "<b>"'
    assert answer.locator("li").all_text_contents() == ["one", "two"]
    assert answer.locator("blockquote").inner_text() == "quoted"
    assert answer.locator("a").evaluate_all("all => all.map(a => a.href)") == ["https://example.org/"]
    assert answer.locator("img, script").count() == 0
    assert "<img src=x onerror=alert(1)>" in answer.inner_text()
    assert "snake_case_names and 2 * 3 * 4" in answer.inner_text()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer.get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == 'def f(x):\n    return x < 1 and "<b>"'


def test_settings_reach_the_server(page):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Instructions").fill("Be brief.")
    page.get_by_label("Longest answer").fill("3")
    page.get_by_label("Stop strings").fill("zz")
    page.get_by_label("Seed").fill("9")
    page.get_by_label("Seed").press("Tab")
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "go")
    done(page)
    sent = request.value.post_data_json
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}]
    assert (sent["max_tokens"], sent["seed"], sent["stop"]) == (3, 9, ["zz"])
    page.reload()
    assert page.evaluate("[settings.system, settings.max_tokens]") == ["Be brief.", 3]
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Back to the defaults").click()
    expect(page.get_by_label("Longest answer")).to_have_value("")


def test_what_was_not_changed_is_left_to_the_server(new_page, serve, run):
    page = new_page(at=serve("--model", run, "--max-context", "300", "--max-tokens", "20").ready())
    page.get_by_role("button", name="Settings").click()
    for label in ("Longest answer", "Temperature"):
        expect(page.get_by_label(label)).to_have_attribute("placeholder", "default")
        page.get_by_label(label).fill("")
        page.get_by_label(label).press("Tab")
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "def add")
    done(page)
    sent = request.value.post_data_json
    assert sent.keys() == {"model", "messages", "stream", "stream_options", "seed"}
    expect(page.locator(".stats")).to_contain_text("20 tokens ·")
    page.get_by_role("button", name="Back to the defaults").click()
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "again")
    done(page)
    assert request.value.post_data_json.keys() - sent.keys() == {"temperature"}
    assert len(texts(page)) == 4
    page.get_by_label("Top k").fill("7")
    page.get_by_label("Top k").press("Tab")
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "and again")
    done(page)
    assert request.value.post_data_json["top_k"] == 7


def test_dark_and_light(new_page):
    page = new_page(color_scheme="dark")

    def background():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    dark = background()
    page.get_by_role("button", name="Light colours").click()
    light = background()
    assert sum(map(int, re.findall(r"\d+", dark))) < 150 < 600 < sum(map(int, re.findall(r"\d+", light)))
    page.reload()
    assert background() == light


def test_a_phone(new_page):
    page = new_page(width=390, height=780, has_touch=True, is_mobile=True)
    send(page, "def add")
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    nav = page.get_by_role("navigation", name="Conversations")
    expect(nav).not_to_be_visible()
    page.get_by_role("button", name="Conversations").click()
    expect(nav).to_be_visible()
    nav.get_by_role("button", name="New chat").click()
    expect(nav).not_to_be_visible()
    expect(box(page)).to_be_in_viewport()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Instructions")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Instructions")).not_to_be_visible()


def test_where_it_reads(page, server):
    send(page, "def add(a, b): def add(a, b):")
    done(page)
    page.get_by_role("button", name="Where it reads").click()
    strip = page.locator("#strip")
    expect(strip).to_be_focused()
    head = page.get_by_label("Head", exact=True)
    turns = [{"role": "user", "content": texts(page)[0]}, {"role": "assistant", "content": texts(page)[1]}]
    found = server.post("/v1/starlm/reads", {"model": "tiny", "messages": turns}).body
    heads = [h for h in found["heads"] if h["layer"] == 0]
    assert head.locator("option").count() == len(heads)
    for number, reads in enumerate(heads):
        head.select_option(index=number)
        assert strip.locator("path").count() == sum(map(len, reads["rows"]))
    before = page.evaluate("chosen")
    strip.press("ArrowRight")
    assert page.evaluate("chosen") == before + 1
    assert page.locator("#said").inner_text().startswith("“")
    page.get_by_label("Layer", exact=True).select_option(index=1)
    page.locator("#close-reads").click()
    expect(strip).not_to_be_visible()


def test_everything_can_be_reached_by_keyboard(page):
    """Tab comes past every control, and each has a name."""
    send(page, "hi")
    done(page)
    name = "e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent.trim()"
    names = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        names.add(page.evaluate(f"(e => {name})(document.activeElement)"))
    assert names >= {"New chat", "hi", "Delete hi", "Export", "Import", "Model", "Settings", "Copy", "Edit"}
    assert names >= {"Send", "Regenerate", "Where it reads", "Message"}
    # The sliders repeat the numbers beside them.
    controls = "button, input:not([aria-hidden=true]), select, textarea"
    unnamed = f"[...document.querySelectorAll('{controls}')].filter(e => !({name})).map(e => e.outerHTML)"
    assert page.evaluate(unnamed) == []


def test_a_key_that_is_missing_is_named_and_the_message_waits_for_it(chromium, run, serve):
    at = serve("--model", run, "--api-key", "sesame").ready()
    page = chromium.new_page()
    page.set_default_timeout(20_000)
    try:
        page.goto(f"{at.url}/")
        expect(page.get_by_role("alert")).to_contain_text("asks for an API key")
        send(page, "def add")
        expect(page.get_by_role("alert")).to_contain_text("asks for an API key")
        page.evaluate("sessionStorage.setItem('starlm.key', 'sesame'); loadModels()")
        expect(page.get_by_role("alert")).to_contain_text("The server answers now.")
        page.get_by_role("button", name="Try again").click()
        done(page)
        assert texts(page)[0] == "def add"
        assert len(texts(page)) == 2
        expect(page.get_by_role("alert")).to_have_count(0)
    finally:
        page.close()
