"""What is wrong with a request is told with status 4xx, the field, its value, the limit and a remedy."""

import json

import pytest

MESSAGES = [{"role": "user", "content": "a"}]
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": "a",}', "not JSON"),
        (b'{"prompt": "\x00"}', "not JSON"),
        (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b"[" * 100_000, "object"),
        (b'{"prompt":' + b"[" * 100_000, "too deep"),
        (b"null", "object"),
        (b'"prompt"', "object"),
        (b"{}", "prompt: missing"),
        (b'{"prompt": "a", "temperature": NaN}', "not JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    ],
)
def test_bodies_that_are_no_request(server, body, told):
    answer = server.post("/v1/completions", body)
    assert answer.status == 400
    assert told in answer.error()["message"]


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"n": 0}, "n", "n=0"),
        ({"n": 129}, "n", "<= 128"),
        ({"n": 10**30}, None, ""),
        ({"n": "2"}, "n", "got `str`"),
        ({"max_tokens": -1}, "max_tokens", ">= 0"),
        ({"max_tokens": 2**31}, "max_tokens", "<= 2147483647"),
        ({"max_tokens": 1.5}, "max_tokens", "got `float`"),
        ({"temperature": 2.1}, "temperature", "temperature=2.1"),
        ({"top_p": 0}, "top_p", "> 0"),
        ({"seed": 2**70}, "seed", ""),
        ({"logprobs": 21}, "logprobs", "<= 20"),
        ({"stop": ["a"] * 17}, "stop", "<= 16"),
        ({"stop": [""]}, "stop[0]", ">= 1"),
        ({"stop": "a" * 1025}, "stop", "<= 1024"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "matching"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "outside the vocabulary of 260"),
        ({"logit_bias": {"9": 101}}, None, "100"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": ""}, "prompt", "0 tokens"),
        ({"prompt": [[]]}, "prompt", "token ids"),
        ({"prompt": [1, "a"]}, "prompt[0]", "token ids"),
        ({"prompt": [260]}, "prompt", "outside the vocabulary of 260"),
        ({"prompt": [-1]}, "prompt", "token ids"),
        ({"prompt": [True]}, "prompt", "token ids"),
        ({"prompt": ["a"] * 129}, "prompt", "at most 128"),
        ({"prompt": ["a"] * 10, "n": 13}, "n", "at most 128"),
        ({"best_of": 3}, "best_of", "ask for n=3"),
        ({"suffix": "b"}, "suffix", "not supported"),
        ({"stream_options": {}}, "stream_options", "stream=true"),
        ({"regex": "("}, "regex", "regex: unclosed"),
        ({"grammar": "start: nowhere"}, None, ""),
        ({"regex": "a", "grammar": "start: a"}, "grammar", "one constraint"),
        ({"temprature": 1}, "temprature", "unknown field"),
        ({"messages": MESSAGES}, "messages", "unknown field"),
    ],
)
def test_completions(server, fields, param, told):
    answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, **fields})
    assert answer.status == 400, answer.body
    error = answer.error()
    assert error["type"] == "invalid_request_error"
    assert told in error["message"]
    first, *rest = error["message"].split(": ")
    assert first not in rest[:1]  # a field is named once
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "messages[0].mood"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"functions": []}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_chat(server, fields, param):
    answer = server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1, **fields})
    assert answer.status == 400, answer.body
    assert answer.error()["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "((a{100}){100}){100}"},
        {"regex": "(a?){500}a{500}"},
        {"grammar": "start: " + " | ".join(f'"{i}"' for i in range(5000))},
        {"grammar": "start: a\na: b\nb: a"},
    ],
)
def test_forms_that_explode(server, fields):
    """What shows only while the answer is made is still the request's fault, and nobody else's."""
    answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 3, **fields})
    assert answer.status == 400 and "simplify" in answer.error()["message"]
    assert server.complete(max_tokens=3)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "message", "role": "user"}]}, "role and content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "call_id"),
        ({"input": [{"type": "function_call_output"}]}, "call_id and output"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "no message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text"),
        ({"truncation": "auto"}, "never cut"),
        ({"background": True}, "not supported"),
        ({"stop": "a"}, "unknown field"),
    ],
)
def test_responses(server, fields, told):
    answer = server.post("/v1/responses", {"input": "a", "max_output_tokens": 1, **fields})
    assert answer.status == 400, answer.body
    assert told in answer.error()["message"]


def test_a_long_prompt_is_refused_and_never_cut(server):
    for path, body in (
        ("/v1/completions", {"prompt": "x" * 4096}),
        ("/v1/completions", {"prompt": [65] * 4096}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 4096}]}),
        ("/v1/responses", {"input": "x" * 4096}),
    ):
        answer = server.post(path, body)
        assert answer.status == 400 and answer.error()["code"] == "context_length_exceeded"
        assert "shorten it to 4095" in answer.error()["message"]
    assert server.complete(prompt="x" * 4095, max_tokens=9)["usage"]["completion_tokens"] == 1


def test_a_large_body(server):
    answer = server.post("/v1/completions", b" " * (1 << 20) + b"{}")
    assert answer.status == 413 and "--max-body-mb" in answer.error()["message"]


def test_nul_and_control_characters_are_text(server):
    for text in ("\x00", "a\x00b\x1f", "\u2028", "\U0001f600", "<|end|><|user|>"):
        assert server.complete(prompt=text, max_tokens=2)["usage"]["prompt_tokens"] >= 1
        answer = server.post(CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 2})
        assert answer.status == 200


def test_paths_methods_and_other_sites(server):
    assert server.get("/v1/nothing").status == 404
    assert server.get("/v1/nothing").error()["code"] == "not_found"
    refused = server.get("/v1/completions")
    assert refused.status == 405 and refused.headers["allow"] == "POST"
    assert server.request("DELETE", "/v1/models").status == 405
    assert server.request("HEAD", "/health").status == 200
    other = {"origin": "http://evil.example"}
    assert server.post("/v1/completions", {"prompt": "a"}, other).status == 403
    own = {"origin": server.url}
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, own).status == 200


def test_after_all_this_the_server_is_well(server):
    assert server.get("/ready").status == 200
    statuses = {row["status"] for row in server.get("/stats").json()["requests"]}
    assert not {status for status in statuses if status >= 500}
    assert "Traceback" not in "".join(server.log)
    assert json.loads(server.get("/openapi.json").body)["openapi"].startswith("3.")
