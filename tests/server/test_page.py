"""The page in a real Chromium, against a server that says what each test wants to hear."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the page is served by uvicorn")
sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")

spec = importlib.util.spec_from_file_location("page_server", Path(__file__).with_name("page_server.py"))
page_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page_server)


@pytest.fixture(scope="module")
def scripted():
    server = page_server.ScriptedServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        yield page_server.chromium(playwright)


@pytest.fixture
def server(scripted):
    scripted.reset()
    return scripted


@pytest.fixture
def page(browser, server):
    """The page, opened. Ends with no error in the console, and nothing asked of any other host."""
    context = browser.new_context()
    page, complaints = page_server.watched(context, server.url)
    page.goto(server.url)
    page.wait_for_selector("#model-a option", state="attached")
    yield page
    context.close()
    assert complaints == []


POLL = "async () => (await import('/page/gauges.js')).pollNow()"  # instead of once a second


def ask(page, question):
    page.fill("#question", question)
    page.keyboard.press("Enter")


def answered(page, n=1):
    """The texts of the last turn's answers, once all are there."""
    page.wait_for_function(
        "n => document.querySelectorAll('.last .answer[data-status=done]').length === n",
        arg=n,
    )
    return [node.inner_text() for node in page.query_selector_all(".last .text")]


def test_a_question_is_answered(page, server):
    server.answer = lambda body: ["It is ", "**bold", "**, really."]
    page.fill("#system", "Be brief.")
    page.fill("#seed", "7")
    page.fill("#temperature", "0.25")
    ask(page, "Is it <b>?")
    assert answered(page) == ["It is bold, really."]
    assert page.inner_text(".last .question") == "Is it <b>?"
    assert page.inner_text(".last .text strong") == "bold"
    body = server.bodies[-1]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it <b>?"},
    ]
    assert (body["model"], body["seed"], body["temperature"]) == ("four", 7, 0.25)
    assert (body["stream"], body["max_tokens"]) == (True, 512)
    figures = page.inner_text(".last .figures")
    assert re.match(r"100 tokens/s\s+first token [\d.]+ m?s\s+3 tokens\s", figures)
    assert "20 of 30 prompt tokens cached" in figures
    assert "4 of 5 drafts accepted" in figures
    assert "seed 7" in figures
    ask(page, "And then?")
    page.wait_for_function("() => document.querySelectorAll('.turn').length === 2")
    answered(page)
    assert [message["content"] for message in server.bodies[-1]["messages"]] == [
        "Be brief.",
        "Is it <b>?",
        "It is **bold**, really.",
        "And then?",
    ]


def test_text_comes_as_it_is_made_and_stops(page, server):
    server.pause = 0.02
    server.answer = lambda body: [f"word{i} " for i in range(2000)]
    ask(page, "Count")
    page.wait_for_function("() => document.querySelector('.text')?.innerText.includes('word5')")
    assert page.get_attribute(".answer", "aria-busy") == "true"
    assert re.match(r"\d+(\.\d)? tokens/s", page.inner_text(".figures"))
    page.click("#stop")
    page.wait_for_selector(".answer[data-status=stopped]")
    text = page.inner_text(".text")
    assert text.startswith("word0 word1") and "word1999" not in text
    assert "stopped" in page.inner_text(".figures")
    page_server.until(page, lambda: server.aborted == 1)
    # Escape stops too; what was said stays in the history of the next question.
    server.answer = lambda body: ["more "] * 2000
    ask(page, "Go on")
    page.wait_for_function("() => document.querySelector('.last .text')?.innerText.includes('more')")
    assert server.bodies[-1]["messages"][1]["content"].startswith("word0 word1")
    page.keyboard.press("Escape")
    page.wait_for_selector(".last .answer[data-status=stopped]")
    page_server.until(page, lambda: server.aborted == 2)


def test_regenerate_draws_a_new_seed_unless_one_is_set(page, server):
    ask(page, "Again")
    answered(page)
    for expected in (2, 3):
        page.click("text=Regenerate")
        page_server.until(page, lambda expected=expected: len(server.bodies) == expected)
        answered(page)
        if expected == 2:
            page.fill("#seed", "5")
    first, second, third = server.bodies
    assert first["seed"] != second["seed"]
    assert third["seed"] == 5
    assert first["messages"] == second["messages"] == third["messages"]
    assert len(page.query_selector_all(".turn")) == 1


def test_the_last_question_is_edited(page, server):
    ask(page, "One")
    answered(page)
    ask(page, "Twi")
    page.wait_for_function("() => document.querySelectorAll('.turn').length === 2")
    answered(page)
    page.keyboard.press("ArrowUp")
    assert page.input_value("#question") == "Twi"
    page.keyboard.press("Escape")
    assert page.input_value("#question") == ""
    assert len(page.query_selector_all(".turn")) == 2
    page.click(".last >> text=Edit question")
    ask(page, "Two")
    page_server.until(page, lambda: len(server.bodies) == 3)
    answered(page)
    assert [node.inner_text() for node in page.query_selector_all(".question")] == ["One", "Two"]
    assert [message["content"] for message in server.bodies[-1]["messages"]] == ["One", "Hello there.", "Two"]


ATTACKS = [
    "<script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    "<svg onload='window.broken = 1'><a href='javascript:window.broken=1'>x</a></svg>",
    "[click](javascript:window.broken=1) [data](data:text/html,<script>1</script>)",
    "[x](https://a.test/\"onmouseover=\"window.broken=1) **<b onclick='window.broken=1'>b</b>**",
    "![picture](https://other.test/spy.png) <link rel=stylesheet href=https://other.test/x.css>",
    "```html\n<iframe srcdoc='<script>alert()</script>'></iframe>\n```\n`<style>*{display:none}</style>`",
    "| <td onclick=1> | x |\n|---|---|\n| <script>alert()</script> | <input autofocus onfocus='alert()'> |",
]


def test_what_a_model_says_is_text(page, server):
    said = "\n\n".join(ATTACKS)
    server.answer = lambda body: [said[i : i + 7] for i in range(0, len(said), 7)]
    server.models[0]["id"] = name = "<img src=x onerror=window.broken=1>"
    server.engines = {model["id"]: page_server.ENGINE for model in server.models}
    page.reload()
    page.wait_for_function("name => document.querySelector('#model-a').value === name", arg=name)
    ask(page, "<script>window.broken = 1</script>")
    [shown] = answered(page)
    for part in (
        "<script>window.broken = 1</script>",
        "<img src=x onerror=",
        "<iframe srcdoc=",
        "<style>*{display",
    ):
        assert part in shown
    tags, attributes = page.evaluate(
        """() => {
            const nodes = [...document.querySelectorAll(".text *")];
            return [nodes.map((node) => node.localName), nodes.flatMap((node) => node.getAttributeNames())];
        }"""
    )
    assert set(tags) <= {
        "p",
        "strong",
        "code",
        "pre",
        "a",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert set(attributes) <= {"href", "rel", "target", "class", "tabindex", "data-language"}
    assert all(link.startswith("http") for link in page.evaluate("[...document.links].map(a => a.href)"))
    assert page.evaluate("window.broken") is None
    # And if markup did get in, the policy would stop it.
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.broken = 1'}))"
    )
    assert page.evaluate("window.broken") is None
    page.complaints.clear()


def test_two_models_answer_side_by_side(page, server):
    words = ["one "] * 20
    server.answer = lambda body: [*words, "four" if body["model"] == "four" else "three"]
    page.click("#compare")
    assert page.input_value("#model-b") == "three"
    ask(page, "Differ")
    left, right = answered(page, 2)
    assert (left.split()[-1], right.split()[-1]) == ("four", "three")
    heads = [node.inner_text() for node in page.query_selector_all(".last .answer h3")]
    assert [" ".join(head.split()) for head in heads] == [
        "four 4.5 bits, 76.0 MB",
        "three 3.25 bits, 55.0 MB",
    ]
    verdict = page.inner_text(".verdict")
    assert "The answers part after 20 words." in verdict
    assert "three was 1.50 times as fast." in verdict
    one, two = server.bodies
    assert one["seed"] == two["seed"] and one["messages"] == two["messages"]
    boxes = [node.bounding_box() for node in page.query_selector_all(".last .answer")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    # Each model goes on from its own words.
    ask(page, "Go on")
    page.wait_for_function("() => document.querySelectorAll('.turn').length === 2")
    answered(page, 2)
    assert [body["messages"][1]["content"].split()[-1] for body in server.bodies[2:]] == ["four", "three"]


def test_models_take_turns_unless_told(page, server):
    server.pause = 0.02
    server.answer = lambda body: ["x "] * 20
    page.click("#compare")
    ask(page, "In turn")
    page.wait_for_selector(".answer.a[data-status=running]")
    assert page.get_attribute(".answer.b", "data-status") == "waiting"
    assert "Waits for its turn" in page.inner_text(".answer.b")
    answered(page, 2)
    page.uncheck("#in_turn")
    ask(page, "Together")
    page.wait_for_function("() => document.querySelectorAll('.last [data-status=running]').length === 2")
    answered(page, 2)
    assert "times as fast" not in page.inner_text(".last .verdict")


def test_a_busy_server_is_asked_again(page, server):
    server.failures = [
        (503, {"Retry-After": "1"}, "the engine restarts"),
        (429, {"Retry-After": "600"}, "queue full"),
    ]
    ask(page, "Patience")
    page.wait_for_selector("text=the engine restarts")
    assert "by itself in 1 s" in page.inner_text(".error")
    page.wait_for_selector("text=queue full")
    assert "The server is busy." in page.inner_text(".error")
    assert "by itself in 600 s" in page.inner_text(".error") or "by itself in 599 s" in page.inner_text(
        ".error"
    )
    page.click("#stop")
    page.wait_for_selector("#send:not([hidden])")
    page.click("text=Try again")
    assert answered(page) == ["Hello there."]
    assert len(server.bodies) == 3
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
        page.add_init_script(f"localStorage.setItem('lowbit', {json.dumps(text)})")
        page.reload()
        page.wait_for_selector("#model-a option", state="attached")
        ask(page, "Still there?")
        assert answered(page) == ["Hello there."]


def test_gauges_move(page, server):
    page.wait_for_selector("#state >> text=ready")
    engine = server.engines["four"]
    engine.update(running=3, waiting=2, kv_blocks_used=20, kv_blocks_cached=10)
    page.evaluate(POLL)
    page.wait_for_selector("[data-model=four] >> text=25% used, 25% cached")
    assert "3 running 2 waiting" in " ".join(page.inner_text("[data-model=four] .queue").split())
    assert page.get_attribute("[data-model=four] [role=meter]", "aria-valuenow") == "25"
    engine["generated_tokens"] += 500
    page.evaluate(POLL)
    page.wait_for_function("() => Number(document.querySelector('#rate').textContent) > 50")
    assert len(page.get_attribute("#spark polyline", "points").split()) >= 2
    server.engines["four"] = None
    page.evaluate(POLL)
    page.wait_for_selector("#state >> text=four starting")
    assert "starting" in page.inner_text("[data-model=four]")


def test_a_model_without_chat_template_continues_text(page, server):
    server.models[0]["chat"] = False
    page.reload()
    page.wait_for_selector("#model-a option", state="attached")
    ask(page, "Once upon a time")
    assert answered(page) == ["Hello there."]
    assert server.bodies[-1]["prompt"] == "Once upon a time"
    assert json.dumps(server.bodies[-1]).count("messages") == 0
