"""`lowbit plan serve`: a service on a published device, from a config alone."""

import json

import pytest

from lowbit.cli import main

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


def _run(capsys, *arguments):
    status = main(["plan", "serve", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_rate_and_limits(model, capsys):
    load = ("--device", "h100", "--rate", 20, "--requests", 40, "--prompt-tokens", 300, "--answer-tokens", 40)
    status, out, _ = _run(capsys, model, *load, "--slo", "ttft=1s,tpot=50ms", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["machine_source"] == "specification"
    assert result["run"]["requests"] == 40 and result["run"]["met"] == 1.0
    assert result["goodput"]["speed"] >= 1
    assert result["kv_tokens"] > 1e6  # of 80 GB
    status, out, _ = _run(capsys, model, *load)
    assert status == 0 and "p95" in out


def test_a_trace_a_split_and_a_supply(model, tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{46 + i // 4}.{i % 4 * 25}0000,{300 + 40 * i},{20 + i}" for i in range(40)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    power = ("--power", "idle=75,token=380,prompt=700", "--power-cap", 500, "--supply", 8)
    more = ("--device", "h100", "--servers", 2, "--sweep", "split", "--slo", "ttft=1s")
    status, out, _ = _run(capsys, model, "--trace", trace, *more, *power, "--json")
    result = json.loads(out)
    assert status == 0
    assert result["left_out"] == sum(320 + 41 * i > 2048 for i in range(40))
    assert [(row["prompts"], row["answers"]) for row in result["splits"]] == [(0, 0), (1, 1)]
    watts = result["power"]
    assert 150 < watts["mean_watts"] < 1000 and watts["supply"]["machines"] >= 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--trace, or a --rate"),
        (["--rate", 1, "--slo", "speed=1"], "'speed=1'"),
        (["--rate", 1, "--slo", "ttft=soon"], "'soon' is no time"),
        (["--rate", 1, "--memory", "0.5GB"], "leave no room"),
        (["--rate", 1, "--prompt-tokens", 4000], "at most 2048 fit"),
        (["--rate", 1, "--power", "idle=9"], "--power"),
        (["--rate", 1, "--supply", 3], "need --power"),
        (["--rate", 1, "--sweep", "split", "--slo", "ttft=1s"], "at least 2"),
        (["--rate", 1, "--device", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_is_named(model, capsys, arguments, says):
    device = [] if "--device" in arguments else ["--device", "h100"]
    status, _, err = _run(capsys, model, *device, "--requests", 4, *arguments)
    assert status == 2
    assert says in err
