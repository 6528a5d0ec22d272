"""The page when things go wrong: a busy, broken, loading or locked server, and damaged memory."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("page_server", Path(__file__).with_name("page_server.py"))
page_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page_server)
scripted, browser, tab = page_server.scripted, page_server.browser, page_server.tab
server, page = page_server.server, page_server.page
POLL, ask, answered = page_server.POLL, page_server.ask, page_server.answered


def test_a_busy_server_is_asked_again(page, server):
    server.failures = [
        (503, {"Retry-After": "1"}, "the engine restarts"),
        (429, {"Retry-After": "600"}, None),
    ]
    ask(page, "Patience")
    page.wait_for_selector("text=the engine restarts")
    assert "by itself in 1 s" in page.inner_text(".error")
    page.wait_for_selector("text=The server is busy.")  # said for a server that only gives a status
    assert "by itself in 600 s" in page.inner_text(".error") or "by itself in 599 s" in page.inner_text(
        ".error"
    )
    page.click("#stop")
    page.wait_for_selector("#send:not([hidden])")
    page.click("text=Try again")
    assert answered(page) == ["Hello there."]
    assert len(server.bodies) == 3
    # Who does not want to wait need not.
    server.failures = [(503, {"Retry-After": "600"}, "not yet")]
    ask(page, "Now")
    page.click("text=/Try again .by itself in (600|599)/")
    assert answered(page) == ["Hello there."]
    page.complaints.clear()  # the browser's own lines about 503 and 429


def test_an_error_that_stays_is_shown_once(page, server):
    server.failures = [(400, {}, "prompt: 3000 tokens and the context holds 2048; shorten it")]
    ask(page, "Long")
    page.wait_for_selector("text=prompt: 3000 tokens and the context holds 2048; shorten it")
    assert len(server.bodies) == 1
    assert page.is_visible("#send")
    page.complaints.clear()


def test_a_broken_stream_keeps_its_text(page, server):
    server.cut, server.answer = 3, lambda body: ["a ", "b ", "c ", "d "]
    ask(page, "Break")
    page.wait_for_selector("text=The connection ended before the answer did.")
    assert page.inner_text(".text") == "a b c"
    page.wait_for_selector("#send:visible")
    assert "by itself" not in page.inner_text(".error")
    assert len(server.bodies) == 1
    server.cut = None
    page.click("text=Try again")
    assert answered(page) == ["a b c d"]


def test_an_api_key_is_asked_for_and_kept_in_the_tab(page, server):
    server.key = "secret"
    page.evaluate(POLL)
    page.wait_for_selector("#key-form:visible")
    page.fill("#key", "wrong")
    page.click("text=Use key")
    page.wait_for_selector("#notice:visible")
    page.fill("#key", "secret")
    page.click("text=Use key")
    page.wait_for_selector("#key-form", state="hidden")
    page.wait_for_selector("#notice", state="hidden")
    ask(page, "Let me in")
    assert answered(page) == ["Hello there."]
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    page.wait_for_selector("#model-a option", state="attached")
    assert page.is_hidden("#key-form")
    server.key = "changed"
    page.evaluate(POLL)
    page.wait_for_selector("#key-form:visible")
    server.key = None
    page.evaluate(POLL)
    page.wait_for_selector("#key-form", state="hidden")
    page.complaints.clear()


def test_the_conversation_stays_until_it_is_cleared(page, server):
    ask(page, "Remember me")
    answered(page)
    page.fill("#max_tokens", "33")
    page.reload()
    page.wait_for_selector(".turn")
    assert (page.inner_text(".question"), page.inner_text(".text")) == ("Remember me", "Hello there.")
    assert page.input_value("#max_tokens") == "33"
    page.click("#clear")
    assert "Remember" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.query_selector(".turn") is None
    page.reload()
    page.wait_for_selector("#model-a option", state="attached")
    assert page.query_selector(".turn") is None
    # What was said when the page was left is kept too.
    server.pause, server.answer = 0.02, lambda body: ["more "] * 2000
    ask(page, "Leave")
    page.wait_for_function("() => document.querySelector('.last .text')?.innerText.includes('more')")
    page.reload()
    page.wait_for_selector(".answer[data-status=stopped]")
    assert page.inner_text(".text").startswith("more")


def test_damaged_storage_does_not_stop_the_page(page, server):
    bad = [
        "{",
        "null",
        '{"turns": [{}]}',
        '{"turns": 5, "models": {}}',
        '{"settings": null, "models": null}',
    ]
    bad += ['{"turns": [{"question": "a", "answers": [null]}], "theme": {}}', '{"models": [5, null]}']
    for text in bad:
        page.goto(f"{server.url}page/page.css")  # where nothing is kept on leaving
        page.evaluate("text => localStorage.setItem('lowbit', text)", text)
        page.goto(server.url)
        page.wait_for_selector("#model-a option", state="attached")
        ask(page, "Still there?")
        assert answered(page) == ["Hello there."]


def test_a_server_can_be_watched_while_it_loads(page, server):
    """The page may be open before the models are, and while the server is away."""
    server.models = [page_server.description("four", bits=0, size=0)]
    server.engines = {"four": None}
    page.reload()
    page.wait_for_selector("[data-model=four] >> text=int0-g32, loading")
    server.models = [page_server.description("four", bits=4.5)]
    server.engines["four"] = dict(page_server.ENGINE)
    page.evaluate(POLL)
    page.wait_for_selector("[data-model=four] >> text=int4-g32, 4.5 bits/weight, 76.0 MB")
    page.wait_for_selector("#welcome-models >> text=76.0 MB")
    assert page.is_hidden("#compare")
    server.away = True
    page.evaluate(POLL)
    page.wait_for_selector("#state >> text=no answer")
    page.wait_for_selector("#notice >> text=The server answered 502.")
    server.away = False
    page.evaluate(POLL)
    page.wait_for_selector("#state >> text=ready")
    page.wait_for_selector("#notice", state="hidden")
    page.complaints.clear()
