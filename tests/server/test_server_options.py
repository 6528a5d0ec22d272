"""Several models, TLS and keys of `lowbit serve`; what evaluation harnesses ask for."""

import http.client
import shutil
import ssl
import subprocess

import numpy as np
import pytest

import lowbit


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("the program openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ),
            *("-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def full(start_server, tiny_model, base_model, certificate):
    """Two models behind TLS and a key."""
    (certificate / "keys").write_text("secret\n\n")
    tls = ["--tls-cert", certificate / "cert.pem", "--tls-key", certificate / "key.pem"]
    server = start_server(
        tiny_model,
        base_model,
        "--name",
        "talker",
        "--api-key-file",
        certificate / "keys",
        "--threads",
        1,
        *tls,
    )
    context = ssl.create_default_context(cafile=certificate / "cert.pem")
    server.connect = lambda: http.client.HTTPSConnection(
        server.host, server.port, timeout=60, context=context
    )
    return server


KEY = {"authorization": "Bearer secret"}


def test_two_models_behind_tls(full, tiny_model):
    assert full.url.startswith("https://")
    assert [m["id"] for m in full.get("/v1/models", KEY).json()["data"]] == ["talker", "base"]
    for name in ("talker", "base"):
        body = {"model": name, "prompt": "Hi", "max_tokens": 4, "temperature": 0}
        answer = full.post("/v1/completions", body, KEY).json()
        assert answer["model"] == name
        assert (
            answer["choices"][0]["text"]
            == lowbit.load(tiny_model, threads=1).generate("Hi", max_tokens=4).text
        )
    assert full.post("/v1/completions", {"prompt": "Hi"}, KEY).error()["code"] == "missing_field"
    chat = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
    assert "no chat template" in full.post("/v1/chat/completions", chat, KEY).error()["message"]
    chat["model"] = "talker"
    stream = full.stream("/v1/chat/completions", KEY, **chat, max_tokens=3)
    assert stream.status == 200 and list(stream)[-1]["choices"][0]["finish_reason"]
    assert full.get("/v1/models").status == 401
    assert set(full.get("/ready").json()["models"]) == {"talker", "base"}
    assert "".join(full.log).count("tokens/s alone (measured)") == 2


def test_echo_scores_every_token_of_the_prompt(server, tiny_model):
    """What lm-eval's local-completions asks: echo=true, logprobs=1, max_tokens=1 (and 0)."""
    prompt = [72, 105, 32, 116, 104, 101]
    logits = lowbit.load(tiny_model, threads=1).model
    cache = logits.cache()
    rows = logits.decoder.logits(np.array(prompt, np.int32), [cache], [len(prompt)], all=True)
    rows = np.asarray(rows, np.float64).reshape(len(prompt), -1)
    rows -= np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) + rows.max(
        1, keepdims=True
    )
    expected = [rows[i, token] for i, token in enumerate(prompt[1:])]
    for max_tokens in (0, 1):
        fields = {"prompt": [prompt, prompt[:3]], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
        answer = server.complete(**fields)
        whole, part = (choice["logprobs"] for choice in answer["choices"])
        assert whole["token_logprobs"][0] is None and whole["top_logprobs"][0] is None
        np.testing.assert_allclose(whole["token_logprobs"][1:6], expected, atol=2e-3)
        assert part["token_logprobs"][1:3] == whole["token_logprobs"][1:3]
        assert len(whole["tokens"]) == len(prompt) + max_tokens
        assert "".join(whole["tokens"]) == answer["choices"][0]["text"]
        assert whole["text_offset"][:6] == list(range(6))
        for token, top in zip(whole["token_logprobs"][1:], whole["top_logprobs"][1:]):
            assert token in top.values() and max(top.values()) >= token
        assert answer["usage"]["completion_tokens"] == 2 * max_tokens


def test_a_stream_with_echo_and_scores(server):
    fields = {"prompt": "Hello", "echo": True, "logprobs": 2, "max_tokens": 6, "temperature": 0}
    whole = server.complete(**fields)["choices"][0]
    events = [e["choices"][0] for e in server.stream("/v1/completions", **fields)]
    assert "".join(e["text"] for e in events) == whole["text"]
    scored = [e["logprobs"] for e in events if e["logprobs"]]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for s in scored for x in s[name]] == whole["logprobs"][name]


def test_tokenize_and_back(server):
    ids = server.post("/tokenize", {"prompt": "Grüße", "return_token_strs": True}).json()
    assert ids["count"] == 7 == len(ids["tokens"]) and ids["token_strs"][0] == "G"
    assert server.post("/detokenize", {"tokens": ids["tokens"]}).json() == {"prompt": "Grüße"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "a"}]}).json()
    assert len(chat["tokens"]) == 3
    assert server.post("/tokenize", {"prompt": "a", "messages": []}).status == 400
    assert server.post("/tokenize", {}).status == 400
    assert server.post("/detokenize", {"tokens": [9999]}).status == 400


def test_a_shared_prefix_is_not_read_twice(server):
    prompt = "A long beginning that both have. " * 20
    first = server.complete(prompt=prompt + "One", max_tokens=4)
    second = server.complete(prompt=prompt + "Two", max_tokens=4)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 20 < cached < 700
    assert second["timings"]["cached_tokens"] == cached
