"""The files of the page: served as they are, cached by content, with nothing that could leave the server."""

import re
from pathlib import Path

import pytest

from lowbit.server import page_files

FILES = sorted(path.name for path in page_files.FOLDER.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_served_and_cached(name):
    status, kind, headers, body = page_files.respond(name)
    assert status == 200
    assert body == (page_files.FOLDER / name).read_bytes()
    assert kind.startswith(
        {"html": b"text/html", "css": b"text/css", "js": b"text/javascript"}[name.split(".")[1]]
    )
    etag = dict(headers)[b"etag"].decode()
    assert page_files.respond(name, etag) == (304, kind, headers, b"")
    assert page_files.respond(name, f'"other", {etag}')[0] == 304
    assert page_files.respond(name, '"other"')[0] == 200


@pytest.mark.parametrize("name", ["", "..", "../app.py", "/etc/passwd", "page.js.map", "index.html/"])
def test_nothing_else_is_served(name):
    assert page_files.respond(name) is None


def test_etags_differ():
    assert len({dict(page_files.respond(name)[2])[b"etag"] for name in FILES}) == len(FILES)


def test_the_policy_allows_the_own_server_only():
    policy = dict(page_files.respond("index.html")[2])[b"content-security-policy"].decode()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("img-src") == "data:"
    assert rules["default-src"] == "'none'"
    assert set(rules.values()) == {"'none'", "'self'"}


@pytest.mark.parametrize("name", FILES)
def test_files_name_no_other_host_and_use_no_markup_strings(name):
    text = (page_files.FOLDER / name).read_text(encoding="utf-8")
    hosts = set(re.findall(r"(?:https?:|\bsrc=.|\bhref=.|\burl\(.?)//[\w-]+(?:\.[\w-]+)+", text))
    assert hosts <= {"http://www.w3.org"}  # the name of SVG, which nothing fetches
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
    )
    if name.endswith(".html"):
        assert not re.search(r"\son\w+=|style=|<script(?![^>]*\bsrc=)|<style", text)


def test_files_are_short():
    assert {
        name: n
        for name in FILES
        if (n := len((Path(page_files.FOLDER) / name).read_text().splitlines())) >= 400
    } == {}
