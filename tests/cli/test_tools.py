"""`quantize`, `inspect`, `bench`, `doctor`, `formats` and `pull`."""

import pytest


def test_quantize_and_run(lowbit, tiny_model, tmp_path):
    out = tmp_path / "small"
    done = lowbit("quantize", tiny_model, "int4-g32", "-o", out, "--json")
    assert done.code == 0, done.err
    result = done.json()
    assert {"output", "bits_per_weight", "seconds", "peak_rss_bytes", "layers"} <= set(result)
    assert 4.5 < result["bits_per_weight"] < 7.5
    assert result["output"] == str(out) and result["peak_rss_bytes"] > 2**20
    again = lowbit("quantize", tiny_model, "int4-g32", "-o", out)
    assert again.code == 2 and "--force" in again.err
    forced = (
        "quantize",
        tiny_model,
        "int8-g32",
        "-o",
        out,
        "--force",
        "--layer",
        "*.down_proj.weight=int4-g64",
    )
    assert lowbit(*forced).code == 0
    assert lowbit("run", out, "-p", "hello", "-n", "3", "--json").json()["generated_tokens"] <= 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("int44",), ["44"]),
        (("int4-g48",), ["48"]),
        (("int4", "--embedding", "nonsense"), ["nonsense"]),
        (("int4", "--layer", "no-equals"), ["PATTERN=FORMAT"]),
    ],
)
def test_quantize_refuses_and_leaves_nothing(lowbit, tiny_model, tmp_path, more, words):
    done = lowbit("quantize", tiny_model, *more, "-o", tmp_path / "out")
    assert done.code == 2 and done.err.count("\n") == 1
    for word in words:
        assert word in done.err
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_inspect(lowbit, tiny_model, tmp_path):
    result = lowbit("inspect", tiny_model, "--json").json()
    assert result["kind"] == "transformers" and result["config"]["n_layers"] == 2
    names = {tensor["name"] for tensor in result["tensors"]}
    assert "model.layers.1.mlp.down_proj.weight" in names
    lowbit("quantize", tiny_model, "int4-g32", "-o", tmp_path / "small")
    small = lowbit("inspect", tmp_path / "small", "--json").json()
    assert small["kind"] == "lowbit" and small["size_bytes"] < result["size_bytes"]
    down = next(t for t in small["tensors"] if t["name"] == "model.layers.1.mlp.down_proj.weight")
    assert down["format"] == "int4-g32" and 4.5 <= down["bits_per_weight"] < 4.6
    shown = lowbit("inspect", tmp_path / "small").out
    assert "int4-g32" in shown and "bits per weight" in shown


def test_bench(lowbit, tiny_model):
    done = lowbit("bench", tiny_model, "--prefill", "16", "--decode", "8", "--repeats", "1", "--json")
    assert done.code == 0, done.err
    keys = "isa threads bits_per_weight prefill_tokens_per_second decode_tokens_per_second "
    keys += "time_to_first_token_seconds peak_rss_bytes bandwidth_bytes_per_second "
    keys += "int8_multiply_adds_per_second decode_bound_fraction prefill_bound_fraction"
    result = done.json()
    assert set(keys.split()) <= set(result)
    for key in keys.split()[1:]:
        assert result[key] > 0, key


def test_doctor(lowbit, fresh_lowbit):
    result = fresh_lowbit("doctor", "--json", environment={"LOWBIT_THREADS": "1"}).json()
    keys = {"isa", "threads", "bandwidth_bytes_per_second", "int8_multiply_adds_per_second", "problems"}
    assert keys <= set(result) and isinstance(result["problems"], list)
    assert result["threads"] == 1
    assert "memory bandwidth" in lowbit("doctor").out


def test_formats(lowbit):
    result = lowbit("formats", "--json").json()
    assert {"int4-g64", "nf4-g64", "mxfp4", "ternary"} <= {f["name"] for f in result["formats"]}
    one = lowbit("formats", "int3-g128", "--json").json()
    assert one["levels"] == [[-4, -3, -2, -1, 0, 1, 2, 3]] and one["bits_per_weight"] == 3.125
    shown = lowbit("formats", "nf4").out
    assert "-0.696193" in shown and "|---" in shown
    for name in ("fp16", "bitmod4", "trit2", "int4a", "e4m3fn"):
        assert lowbit("formats", name).code == 0
    done = lowbit("formats", "nf44")
    assert done.code == 2 and "nf44" in done.err


def test_number_line():
    from lowbit.cli.formats import LINE_WIDTH, number_line

    line, labels = number_line([-1.0, 0.0, 1.0]).splitlines()
    assert len(line) == LINE_WIDTH and line[0] == line[LINE_WIDTH // 2] == line[-1] == "|"
    assert line.count("|") == 3 and labels.split() == ["-1", "0", "1"]
    assert number_line([0.0, 1e-9, 1.0]).startswith("#")


def test_pull_knows_local_models(lowbit, tiny_model):
    assert lowbit("pull", tiny_model, "--json").json()["path"] == str(tiny_model)
    done = lowbit("pull", "no/such/model")
    assert done.code == 2 and "no/such/model" in done.err
