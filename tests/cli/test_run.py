"""`run`, `chat` and `eval` on a whole small model."""

import json

import pytest


def test_json_has_the_promised_keys(fresh_lowbit, tiny_model):
    result = fresh_lowbit("run", tiny_model, "-p", "hello", "-n", "5", "--json").json()
    assert {"text", "token_ids", "prompt_tokens", "generated_tokens", "seconds"} <= set(result)
    assert result["generated_tokens"] == len(result["token_ids"]) <= 5
    assert result["prompt_tokens"] == len("hello") + 2  # <|user|> hello <|assistant|>


def test_raw_and_template(lowbit, tiny_model, base_model):
    assert lowbit("run", tiny_model, "--raw", "-p", "hello", "-n", "1", "--json").json()["prompt_tokens"] == 5
    assert lowbit("run", base_model, "-p", "hello", "-n", "1", "--json").json()["prompt_tokens"] == 5
    with_system = ("run", tiny_model, "--system", "abc", "-p", "hello", "-n", "1", "--json")
    assert lowbit(*with_system).json()["prompt_tokens"] == 5 + 2 + 4
    done = lowbit("run", base_model, "--system", "abc", "-p", "hello")
    assert done.code == 2 and "no chat template" in done.err


def test_streamed_text_is_the_final_text(lowbit, fresh_lowbit, tiny_model):
    arguments = ("run", tiny_model, "-n", "40", "--temperature", "1", "--seed", "3", "hello")
    shown = fresh_lowbit(*arguments)
    assert shown.code == 0 and "tokens/s" in shown.err and "seed 3" in shown.err
    assert shown.out == lowbit(*arguments, "--json").json()["text"] + "\n"
    assert lowbit(*arguments, "--quiet").err == ""


def test_seeds(lowbit, tiny_model):
    def ids(*more):
        return lowbit("run", tiny_model, "hello", "-n", "20", "--temperature", "1", "--json", *more).json()

    a, b, c = ids("--seed", "1"), ids("--seed", "1", "--threads", "1"), ids("--seed", "2")
    assert a["token_ids"] == b["token_ids"] != c["token_ids"]
    free = ids()
    assert free["token_ids"] == ids("--seed", free["seed"])["token_ids"]


def test_stop_and_logprobs(lowbit, tiny_model):
    arguments = ("run", tiny_model, "hello", "-n", "40", "--temperature", "1", "--seed", "3", "--json")
    text = lowbit(*arguments).json()["text"]
    stop = next(c for c in text[5:] if c.isascii() and c not in text[:5] and not c.isspace())
    result = lowbit(*arguments, "--stop", stop, "--logprobs", "2").json()
    assert result["text"] == text[: text.index(stop)] and result["finish_reason"] == "stop"
    assert len(result["logprobs"]) == result["generated_tokens"]
    first = result["logprobs"][0]
    assert first["token_id"] == result["token_ids"][0] and first["logprob"] < 0
    assert len(first["top"]) == 2 and first["top"][0][1] >= first["top"][1][1]


def test_guesses_change_no_token(lowbit, tiny_model):
    arguments = ("run", tiny_model, "--raw", "abcabcabcabc", "-n", "40", "--json")
    plain, guessed = lowbit(*arguments).json(), lowbit(*arguments, "--speculate", "ngram").json()
    assert guessed["token_ids"] == plain["token_ids"] and guessed["text"] == plain["text"]
    assert guessed["accepted_tokens"] <= guessed["drafted_tokens"]
    chat = (
        "run",
        tiny_model,
        "--system",
        "abc",
        "hello",
        "-n",
        "20",
        "--temperature",
        "1",
        "--seed",
        "3",
        "--json",
    )
    assert lowbit(*chat, "--speculate", "ngram").json()["text"] == lowbit(*chat).json()["text"]


def test_json_of_a_schema(lowbit, tiny_model, tmp_path):
    pytest.importorskip("llguidance", reason="answers of a given form need llguidance")
    file = tmp_path / "schema.json"
    arguments = ("run", tiny_model, "--raw", "hello", "-n", "60", "--json-schema", file)
    file.write_text('{"enum": ["yes", "no", 3]}')
    shown = lowbit(*arguments)
    assert shown.code == 0 and json.loads(shown.out) in ("yes", "no", 3)
    assert json.loads(lowbit(*arguments, "--json").json()["text"]) == json.loads(shown.out)
    for text, words in [
        ('{"type": "strin"}', "strin"),
        ("{", "line 1 column"),
        (b"\xff", "name a file of JSON"),
    ]:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        done = lowbit(*arguments)
        assert done.code == 2 and words in done.err, done.err
    done = lowbit(*arguments[:-1], tmp_path / "none")
    assert done.code == 2 and "No such file" in done.err


def test_stdin(lowbit, tiny_model):
    given = lowbit("run", tiny_model, "-p", "hello", "-n", "3", "--json").json()
    piped = lowbit("run", tiny_model, "-n", "3", "--json", stdin="hello\n").json()
    assert given["token_ids"] == piped["token_ids"]
    raw = lowbit("run", tiny_model, "--raw", "-n", "1", "--json", stdin="hello\n").json()
    assert raw["prompt_tokens"] == 6  # the newline is part of a raw prompt
    done = lowbit("run", tiny_model, stdin=b"\xff\xfe")
    assert done.code == 2 and "UTF-8 at byte 0" in done.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("-p", "x" * 200), ["202", "128", "--context"]),
        (("-p", "x" * 60, "--context", "32"), ["62", "32"]),
        (("-p", "x", "--context", "4000"), ["4000", "128"]),
        (("-p", "x", "--temperature", "-1"), ["temperature", "-1"]),
        (("-p", "x", "y"), ["twice"]),
        (("-p", "x", "--stop", ""), ["stop"]),
    ],
)
def test_bad_requests(lowbit, tiny_model, more, words):
    done = lowbit("run", tiny_model, *more)
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
    for word in words:
        assert word in done.err
    assert lowbit("run", tiny_model, *more, "--json").json()["error"]["message"]


def test_context_is_never_exceeded(lowbit, tiny_model):
    arguments = ("run", tiny_model, "--raw", "-p", "x" * 30, "--context", "32", "-n", "50")
    result = lowbit(*arguments, "--temperature", "1", "--seed", "1", "--json").json()
    assert result["generated_tokens"] <= 2 and result["finish_reason"] in ("context", "eos")


def test_missing_and_broken_models(lowbit, tiny_model, tmp_path):
    missing = lowbit("run", tmp_path / "nothing.gguf", "-p", "x", "--json")
    assert missing.code == 2 and "nothing.gguf" in missing.json()["error"]["message"]
    (tmp_path / "empty").mkdir()
    assert lowbit("run", tmp_path / "empty", "-p", "x").code == 2
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    done = lowbit("inspect", tmp_path / "bad.gguf")
    assert done.code == 2 and "bad.gguf" in done.err


def test_directory_without_tokenizer(lowbit, tiny_model, tmp_path):
    import shutil

    shutil.copytree(tiny_model, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    done = lowbit("run", tmp_path / "mute", "-p", "x")
    assert done.code == 2 and "tokenizer" in done.err and done.err.count("\n") == 1


def test_chat_reads_turns_from_a_pipe(lowbit, tiny_model):
    talk = ("chat", tiny_model, "--seed", "1", "-n", "8", "--json")
    result = lowbit(*talk, stdin="hi\nthere\n/reset\nhi\n/exit\nnever\n").json()
    assert [turn["user"] for turn in result["turns"]] == ["hi", "there", "hi"]
    assert result["turns"][0]["token_ids"] == result["turns"][2]["token_ids"]
    assert result["turns"][1]["reused_tokens"] >= len("<|user|>") - 7 + len("hi")


def test_chat_needs_a_template(lowbit, base_model):
    done = lowbit("chat", base_model, stdin="hi\n")
    assert done.code == 2 and "chat template" in done.err


def test_eval(lowbit, tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 20)
    result = lowbit(
        "eval", tiny_model, "--text", text, "--context", "64", "--max-tokens", "200", "--json"
    ).json()
    assert {"perplexity", "tokens", "context", "bits_per_weight"} <= set(result)
    assert result["context"] == 64 and result["windows"] == 3 and result["tokens"] == 3 * 63
    assert result["perplexity"] > 1
    assert "perplexity" in lowbit("eval", tiny_model, "--text", text, "--context", "64").out


def test_eval_refuses(lowbit, tiny_model, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    done = lowbit("eval", tiny_model, "--text", tmp_path / "short.txt")
    assert done.code == 2 and "5 tokens" in done.err and "--context" in done.err
    done = lowbit("eval", tiny_model, "--text", tmp_path / "none.txt")
    assert done.code == 2 and "none.txt" in done.err
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    done = lowbit("eval", tiny_model, "--text", tmp_path / "latin.txt")
    assert done.code == 2 and "UTF-8" in done.err
