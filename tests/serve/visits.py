"""What a visitor of the web chat does and sees."""

import json

from playwright.sync_api import expect
from servers import ENDLESS

ANSWERS = "**/v1/chat/completions"


def box(page):
    return page.get_by_role("textbox", name="Message", exact=True)


def send(page, text):
    box(page).fill(text)
    box(page).press("Enter")


def done(page):
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(page.locator(".busy")).to_have_count(0)


def answers(page):
    return page.get_by_role("article", name="Assistant")


def texts(page):
    return page.locator(".turn .body").all_text_contents()


def never_ends(page):
    """From now on answers of this page end only by being stopped."""
    # The page has no way to say so, and the model would end one answer in some thousand tokens.
    page.route(ANSWERS, lambda r: r.continue_(post_data=json.dumps({**r.request.post_data_json, **ENDLESS})))
    page.evaluate("settings.max_tokens = 100000; settings.seed = ''; settings.temperature = 1")
