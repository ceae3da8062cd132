"""Conversations in the web chat: kept, imported, in two tabs, left or broken off in the middle."""

import json

import pytest
from playwright.sync_api import expect
from servers import wait_for
from visits import ANSWERS, answers, done, never_ends, send, texts

pytestmark = pytest.mark.browser


def conversation(answer, **more):
    messages = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": answer, **more}]
    return {"id": "kept", "title": "asked", "changed": 1, "messages": messages}


def opened(page, text):
    """The conversation of this title, chosen in the list."""
    page.get_by_role("navigation").get_by_role("button", name=text, exact=True).click()


def second_tab(page):
    tab = page.context.new_page()
    tab.goto(page.url)
    expect(tab.get_by_label("Model")).to_have_value("tiny")
    return tab


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (conversation(">" * 4000 + " deep", model="other"), ">" * 3980 + " deep"),
        (conversation("whose numbers are damaged", stats={"tokens": 1}), "whose numbers are damaged"),
    ],
    ids=["deep quotes", "damaged"],
)
def test_no_stored_conversation_keeps_the_page_from_loading(page, answer, shown):
    page.evaluate("settings.markdown = true; keepSettings()")
    page.evaluate("chat => localStorage.setItem('starlm.chat.kept', JSON.stringify(chat))", answer)
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("tiny")
    assert texts(page) == ["asked", shown]
    assert page.locator("blockquote").count() == (20 if ">" in shown else 0)


def test_another_conversation_is_opened_while_an_answer_is_written(page, server):
    send(page, "first")
    done(page)
    page.get_by_role("button", name="New chat").click()
    never_ends(page)
    send(page, "second")
    expect(answers(page).locator(".body")).not_to_be_empty()
    opened(page, "first")
    wait_for(server.idle)
    done(page)
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)
    opened(page, "second")
    expect(page.locator(".stats")).to_contain_text("stopped")


def test_what_another_tab_has_written_is_kept(page, server):
    send(page, "one")
    done(page)
    tab = second_tab(page)
    tab.get_by_role("button", name="New chat").click()
    never_ends(tab)
    send(tab, "elsewhere")
    expect(answers(tab).locator(".body")).not_to_be_empty()
    send(page, "two")
    done(page)
    tab.get_by_role("button", name="Stop").click()
    done(tab)
    wait_for(server.idle)
    tab.unroute(ANSWERS)
    tab.evaluate("settings.max_tokens = 20")
    opened(tab, "one")
    assert texts(tab) == texts(page)
    send(tab, "three")
    done(tab)
    expect(page.locator(".turn")).to_have_count(6)
    assert texts(page) == texts(tab)
    assert texts(page)[::2] == ["one", "two", "three"]


def test_what_is_edited_outlives_what_another_tab_writes(page):
    send(page, "one")
    done(page)
    tab = second_tab(page)
    page.get_by_role("button", name="Edit").click()
    area = page.locator(".edit textarea")
    area.fill("not sent yet")
    send(tab, "two")
    done(tab)
    tab.get_by_role("button", name="New chat").click()
    send(tab, "elsewhere")
    done(tab)
    expect(page.get_by_role("navigation").get_by_role("listitem")).to_have_count(2)
    expect(area).to_have_value("not sent yet")
    page.get_by_role("button", name="Cancel").click()
    opened(tab, "one")
    assert texts(page) == texts(tab)
    assert texts(page)[::2] == ["one", "two"]


def test_an_answer_that_is_written_here_wins_over_another_tab(page):
    send(page, "one")
    done(page)
    tab = second_tab(page)
    held = []
    page.route(ANSWERS, lambda r: held.append(r))
    send(page, "two")
    expect(tab.locator(".turn")).to_have_count(3)
    send(tab, "three")
    done(tab)
    expect(page.locator(".turn")).to_have_count(4)
    held[0].continue_()
    done(page)
    assert texts(page)[::2] == ["one", "two"]
    expect(tab.locator(".turn")).to_have_count(4)
    assert texts(tab) == texts(page)


def test_a_full_storage_is_said(page):
    full = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"
    page.evaluate(f"() => {{ window.setItem = Storage.prototype.setItem; {full} }}")
    held = []
    page.route(ANSWERS, lambda r: r.continue_() if held else held.append(r))
    send(page, "hello")
    alert = page.get_by_role("alert")
    expect(page.locator(".busy")).to_have_count(1)
    expect(alert).to_contain_text("The browser's storage is full")
    wait_for(lambda: page.wait_for_timeout(20) or held)
    held[0].continue_()
    done(page)
    expect(alert).to_contain_text("The browser's storage is full")
    content = json.dumps({"chats": [conversation("imported")]}).encode()
    file = {"name": "chats.json", "mimeType": "application/json", "buffer": content}
    page.set_input_files("#file", file)
    expect(page.locator(".turn").last).to_contain_text("imported")
    expect(alert).to_contain_text("The browser's storage is full")
    page.evaluate("() => { Storage.prototype.setItem = window.setItem; }")
    send(page, "again")
    done(page)
    expect(alert).to_have_count(0)


def test_try_again_asks_without_the_half_answer(page):
    asked = []
    chunks = [{"choices": [{"delta": {"content": "half"}}]}, {"error": {"message": "It took too long."}}]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)

    def broken(route):
        asked.append([m["role"] for m in route.request.post_data_json["messages"]])
        route.fulfill(body=body, content_type="text/event-stream")

    page.route(ANSWERS, broken)
    send(page, "hi")
    for times in (1, 2):
        expect(page.get_by_role("alert")).to_contain_text("It took too long.")
        assert asked == [["user"]] * times
        assert texts(page) == ["hi", "half"]
        with page.expect_response(ANSWERS):
            page.get_by_role("button", name="Try again").click()
    done(page)
    page.unroute(ANSWERS)
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    done(page)
    assert page.evaluate("current.messages.map((m) => m.role)") == ["user", "assistant"]


def test_an_error_stays_with_its_conversation(page):
    """Or its "Try again" would ask in another."""
    page.route(ANSWERS, lambda route: route.abort())
    send(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_what_was_imported_is_opened(page, tmp_path):
    send(page, "mine")
    done(page)
    mine, file = texts(page), tmp_path / "chats.json"
    chat = conversation("from the file")
    for wrong in ([], [{**chat, "messages": []}]):
        file.write_text(json.dumps({"chats": wrong}))
        page.set_input_files("#file", file)
        expect(page.get_by_role("alert")).to_contain_text("chats.json holds no conversations")
        page.evaluate("fail()")
        assert texts(page) == mine
    file.write_text(json.dumps({"chats": [{**chat, "id": page.evaluate("current.id")}]}))
    page.set_input_files("#file", file)
    expect(page.locator(".turn").last).to_contain_text("from the file")
    expect(page.get_by_role("navigation").get_by_role("listitem")).to_have_count(2)
    page.reload()
    expect(page.locator(".turn").last).to_contain_text("from the file")
    opened(page, "mine")
    assert texts(page) == mine
