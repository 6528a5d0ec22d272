"""The page in a real Chromium, against a server that says what each test wants to hear."""

import importlib.util
import json
import re
from pathlib import Path

spec = importlib.util.spec_from_file_location("page_server", Path(__file__).with_name("page_server.py"))
page_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page_server)
scripted, browser, tab = page_server.scripted, page_server.browser, page_server.tab
server, page = page_server.server, page_server.page
POLL, ask, answered = page_server.POLL, page_server.ask, page_server.answered


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
    assert page.inner_text(".last .figures .speed") == "100 tokens/s"
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
    server.rates["four"] = 148.0
    ask(page, "Go on")
    page.wait_for_function("() => document.querySelectorAll('.turn').length === 2")
    answered(page, 2)
    assert [body["messages"][1]["content"].split()[-1] for body in server.bodies[2:]] == ["four", "three"]
    assert "Both were as fast." in page.inner_text(".last .verdict")


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
