"""The page in a real Chromium against `lowbit serve` and two small models: what users do first."""

import importlib.util
import json
import os
import re
import signal
from pathlib import Path

import pytest


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
page_server = load("page_server", HERE / "page_server.py")
tiny_checkpoint = load("tiny_checkpoint", HERE.parent / "tiny_checkpoint.py")


browser = page_server.browser


@pytest.fixture(scope="module")
def server(browser, start_server, tmp_path_factory):
    """Two widths of one model, with a context that takes a while to fill."""
    from lowbit.cli import main

    folder = tmp_path_factory.mktemp("page")
    whole = tiny_checkpoint.write_tiny_llama(folder / "whole")
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32768}))
    assert main(["quantize", str(whole), "int2-g32", "-o", str(folder / "int2"), "--json"]) == 0
    return start_server(whole, folder / "int2", "--threads", 1, "--api-key", "open sesame", "--kv-gb", 0.02)


@pytest.fixture
def page(browser, server):
    context = browser.new_context()
    page, complaints = page_server.watched(context, server.url)
    page.goto(server.url)
    page.wait_for_selector("#key-form:visible")
    page.fill("#key", "open sesame")
    page.click("text=Use key")
    page.wait_for_selector("[data-model=int2]")
    page.fill("#temperature", "0")
    complaints[:] = [line for line in complaints if "401" not in line]
    yield page
    context.close()
    assert complaints == []


def stats(server):
    return {model["id"]: model for model in server.get("/stats", KEY).json()["models"]}


KEY = {"authorization": "Bearer open sesame"}


def ask(page, question, answers=1):
    page.fill("#question", question)
    page.keyboard.press("Enter")
    page.wait_for_function(
        "n => document.querySelectorAll('.last .answer[data-status=done]').length === n", arg=answers
    )
    return [node.inner_text() for node in page.query_selector_all(".last .text")]


def test_chat_and_regenerate(page, server):
    page.fill("#max_tokens", "40")
    [first] = ask(page, "Hello")
    assert len(first) > 3
    figures = page.inner_text(".figures")
    assert re.search(r"[\d.]+ tokens/s\s+first token [\d.]+ m?s\s+40 tokens", figures), figures
    assert "cut at max tokens" in figures
    page.click("text=Regenerate")
    page.wait_for_selector(".answer[data-status=done]")
    assert page.inner_text(".text") == first
    # With the temperature up and no seed set, another answer; with the seed shown, the same again.
    page.fill("#temperature", "2")
    page.click("text=Regenerate")
    page.wait_for_selector(".answer[data-status=done]")
    second = page.inner_text(".text")
    assert second != first
    page.fill("#seed", re.search(r"seed (\d+)", page.inner_text(".figures"))[1])
    page.click("text=Regenerate")
    page.wait_for_selector(".answer[data-status=done]")
    assert page.inner_text(".text") == second


def test_stop_frees_the_engine_and_the_gauges_move(page, server):
    page.fill("#max_tokens", "")
    page.fill("#question", "Go on and on")
    page.keyboard.press("Enter")
    page.wait_for_selector("#engines >> text=1 running")
    page.wait_for_function("() => Number(document.querySelector('#rate').textContent) > 0")
    page.click("#stop")
    page.wait_for_selector(".answer[data-status=stopped]")
    assert len(page.inner_text(".text")) > 0
    server.until(lambda: stats(server)["whole"]["engine"]["running"] == 0, "an idle engine")
    page.wait_for_selector("[data-model=whole] >> text=0 running")
    assert len(page.get_attribute("#spark polyline", "points").split()) >= 2


def test_two_widths_side_by_side(page, server):
    page.fill("#max_tokens", "30")
    page.click("#compare")
    left, right = ask(page, "Compare", answers=2)
    assert left != right
    models = stats(server)
    assert models["int2"]["weights_bytes"] < models["whole"]["weights_bytes"]
    for name, head in zip(("whole", "int2"), page.query_selector_all(".last .answer h3")):
        bits = f"{models[name]['bits_per_weight']:.2f}".rstrip("0").rstrip(".")
        assert " ".join(head.inner_text().split()).startswith(f"{name} {bits} bits, ")
    assert "The answers part" in page.inner_text(".verdict")


def test_an_oversize_question_says_what_to_do(page, server):
    page.fill("#question", "x" * 33000)
    page.keyboard.press("Enter")
    page.wait_for_selector(".error:visible")
    assert re.search(r"330\d\d tokens and the context of 'whole' holds 32768", page.inner_text(".error"))
    page.complaints.clear()


def test_an_engine_that_dies_comes_back(page, server):
    """kill -9 of the engines: the page says so, waits, asks again, and has its answer."""
    page.fill("#max_tokens", "20")
    [before] = ask(page, "Again")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    for pid in children.read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    server.until(lambda: stats(server)["whole"]["engine"] is None, "a dead engine")
    page.click("text=Regenerate")
    page.wait_for_selector("#state >> text=starting")
    page.wait_for_selector("text=by itself in")
    page.wait_for_selector(".last .answer[data-status=done]", timeout=60_000)
    assert page.inner_text(".text") == before
    assert stats(server)["whole"]["restarts"] == 1
    page.complaints.clear()
