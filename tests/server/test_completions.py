"""/v1/completions and /v1/chat/completions of a real server with a small random model."""

import lowbit


def test_a_completion_is_what_the_library_generates(server, tiny_model):
    model = lowbit.load(tiny_model, threads=1)
    expected = model.generate("Hello", max_tokens=20, temperature=0.9, seed=5, top_p=0.9)
    answer = server.complete(max_tokens=20, temperature=0.9, seed=5, top_p=0.9)
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert answer["choices"][0]["text"] == expected.text
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["seed"] == 5
    timings = answer["timings"]
    assert timings["generated_tokens"] == 20 and timings["tokens_per_second"] > 0
    assert timings["cached_tokens"] == answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_stream_says_the_same(server):
    fields = {"max_tokens": 30, "temperature": 0.8, "seed": 9}
    whole = server.complete(**fields)["choices"][0]
    stream = server.stream(
        "/v1/completions", prompt="Hello", **fields, stream_options={"include_usage": True}
    )
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    events = list(stream)
    assert "".join(e["choices"][0]["text"] for e in events if e["choices"]) == whole["text"]
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-2]["timings"]["generated_tokens"] == 30
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 30
    assert len({event["id"] for event in events}) == 1


def test_chat_renders_the_template(server, tiny_model):
    model = lowbit.load(tiny_model, threads=1)
    messages = [{"role": "user", "content": "Hi"}]
    expected = model.chat(messages, max_tokens=12)
    body = {"messages": messages, "max_tokens": 12, "temperature": 0}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == expected.text
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 12, "temperature": 0}
    events = list(server.stream("/v1/chat/completions", **body))
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    assert text == expected.text
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_models_health_and_ready(server):
    models = server.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["tiny"]
    assert server.get("/v1/models/tiny").json() == models["data"][0]
    assert server.get("/v1/models/large").status == 404
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"ready": True, "draining": False, "models": {"tiny": "ready"}}


def test_stop_strings_end_the_text_before_them(server):
    text = server.complete(max_tokens=40)["choices"][0]["text"]
    stop = text[10:13]
    answer = server.complete(max_tokens=40, stop=[stop])
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["timings"]["generated_tokens"] >= answer["usage"]["completion_tokens"] - 1
