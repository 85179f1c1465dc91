"""The page at /, in a headless Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect

import mlx_mtp
from mlx_mtp.server.app import make_app
from mlx_mtp.server.registry import Models
from mlx_mtp.server.settings import ServerOptions
from tests.support.browser import chromium
from tests.support.server import entry, running, wait_until

QUESTION = "What is a drafter?"
expect.set_options(timeout=30_000)
ANSWER, FIGURES = "article.assistant > div:nth-child(2)", "article.assistant .figures"


@pytest.fixture(scope="module")
def address(lm: mlx_mtp.MTPModel) -> Iterator[str]:
    with running(make_app(Models([entry("demo", lm), entry("other", lm)]))) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page, once it knows the models. Whatever it asks for, it asks this server for, and no script fails."""
    with browser.new_context() as context:
        opened, asked, failures = context.new_page(), list[str](), list[str]()
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("console", lambda message: failures.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: failures.append(str(error)))
        opened.goto(address)
        expect(opened.locator("#model option")).to_have_text(["demo", "other"])
        opened.fill("#temperature", "0")
        yield opened
        assert [url for url in asked if not url.startswith(f"{address}/")] == []
        assert failures == []


def say(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def posted(page: Page) -> list[dict[str, Any]]:
    """The bodies that the page will have posted."""
    bodies: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.method == "POST":
            bodies.append(request.post_data_json)

    page.on("request", note)
    return bodies


def test_an_answer_is_that_of_the_model_with_its_drafts_shaded(page: Page, lm: mlx_mtp.MTPModel):
    chunks = list(lm.stream(QUESTION, temperature=0, max_tokens=1024))
    stats = chunks[-1].stats
    say(page, QUESTION)
    expect(page.locator("article.user")).to_have_text(QUESTION)
    expect(page.locator(FIGURES)).to_have_text(
        re.compile(rf"{stats.generated_tokens} tokens, [\d.]+ tokens/s after the first; \d+ of \d+ drafts accepted")
    )
    assert page.locator(ANSWER).text_content() == "".join(chunk.text for chunk in chunks)
    drafted = page.locator(f"{ANSWER} .drafted")
    assert 0 < len("".join(drafted.all_text_contents())) < len(page.locator(ANSWER).text_content() or "")

    def background() -> str:
        return drafted.first.evaluate("element => getComputedStyle(element).backgroundColor")

    shaded = background()
    page.uncheck("#shade")
    assert shaded != background() == "rgba(0, 0, 0, 0)"
    page.check("#shade")
    assert background() == shaded


def test_an_answer_grows_while_it_is_written_and_stop_ends_it(page: Page, lm: mlx_mtp.MTPModel):
    def endless(route: Route) -> None:
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))

    page.route("**/v1/chat/completions", endless)
    page.fill("#tokens", "4000")
    say(page, QUESTION)
    expect(page.locator(ANSWER)).to_have_text(re.compile("drafter is a small model"))
    expect(page.locator("#send")).to_be_hidden()
    early = page.locator(ANSWER).text_content() or ""
    page.wait_for_function(
        "([where, n]) => document.querySelector(where).textContent.length > n", arg=[ANSWER, len(early)]
    )
    page.click("#stop")
    expect(page.locator(FIGURES)).to_have_text("stopped")
    wait_until(lambda: not lm._session.call(lambda it: it.scheduler).busy, seconds=5)
    said = page.locator(ANSWER).text_content() or ""
    assert said.startswith(early)
    page.unroute("**/v1/chat/completions")
    bodies = posted(page)
    say(page, "And now?")
    expect(page.locator(FIGURES)).to_have_text(["stopped", re.compile("tokens")])
    assert [message["content"] for message in bodies[0]["messages"]] == [QUESTION, said, "And now?"]


def test_what_is_picked_is_asked_for(page: Page, lm: mlx_mtp.MTPModel):
    bodies = posted(page)
    direct = lm.generate("What is the capital of France?", max_tokens=30, temperature=0, thinking=True)
    page.select_option("#model", "other")
    page.fill("#tokens", "30")
    page.check("#think")
    say(page, "What is the capital of France?")
    expect(page.locator(FIGURES)).to_have_text(re.compile("^30 tokens"))
    assert page.locator("article .thought").text_content() == direct.reasoning
    assert page.locator(ANSWER).text_content() == direct.text
    page.click("#clear")
    expect(page.locator("article")).to_have_count(0)
    page.fill("#temperature", "")
    page.uncheck("#think")
    say(page, "Hi")
    expect(page.locator(FIGURES)).to_have_text(re.compile("tokens"))
    first, second = bodies
    assert (first["model"], first["max_tokens"], first["temperature"], first["reasoning_effort"]) == (
        "other",
        30,
        0,
        "medium",
    )
    assert "temperature" not in second
    assert second["reasoning_effort"] == "none"
    assert second["messages"] == [{"role": "user", "content": "Hi"}]


def test_text_with_html_in_it_is_text(page: Page):
    html = "<img src=x onerror=\"document.title='interpreted'\"><b>bold</b>"
    choice = {"delta": {"content": html, "reasoning_content": html}, "spans": [{"text": html, "drafted": True}]}
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=f"data: {json.dumps({'choices': [choice]})}\n\n")
    )
    say(page, html)
    expect(page.locator(ANSWER)).to_have_text(html)
    expect(page.locator(".thought")).to_have_text(html)
    expect(page.locator("article.user")).to_have_text(html)
    page.unroute("**/v1/chat/completions")
    error = {"error": {"message": html}}
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=f"event: error\ndata: {json.dumps(error)}\n\n")
    )
    say(page, "again")
    expect(page.locator(".error")).to_have_text(html)
    assert page.locator("article img, article b").count() == 0
    assert page.title() == "mlx-mtp"


def test_a_key_is_asked_for_and_used(browser: Browser):
    with (
        mlx_mtp.load() as lm,
        running(make_app(Models([entry("locked", lm)]), ServerOptions(api_key="open sesame"))) as url,
        browser.new_context() as context,
    ):
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#key")).to_have_attribute("placeholder", "needed")
        say(page, "Hi")
        expect(page.locator(".error")).to_have_text("the API key is missing or wrong")
        page.fill("#key", "open sesame")
        page.press("#key", "Tab")
        expect(page.locator("#model option")).to_have_text(["locked"])
        say(page, "Hi")
        expect(page.locator(FIGURES)).to_have_text(re.compile("tokens"))
