"""`lowbit quantize --method` and `lowbit methods`."""

import json

import pytest

pytest.importorskip("torch")


def test_a_calibrated_method_with_a_report(lowbit, tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    page = tmp_path / "page.html"
    arguments = ["quantize", tiny_model, "int3-g32", "--method", "gptq:damping=0.05", "--calibration", text]
    done = lowbit(
        *arguments, "--samples", "4", "--length", "64", "-o", tmp_path / "out", "--report", page, "--json"
    )
    result = done.json()
    assert result["method"] == "gptq:damping=0.05" and result["calibration_tokens"] == 256
    assert 0 < result["measured"]["kl_nats_per_token"] < 1
    assert "gptq:damping=0.05" in page.read_text() and "<svg" in page.read_text()
    shown = lowbit(*arguments, "-o", tmp_path / "out", "--force", "--no-verify")
    assert shown.code == 0 and "nats" not in shown.out
    assert "nats per token" in lowbit("quantize", tiny_model, "int3-g32", "-o", tmp_path / "rtn").out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--method", "gptqq"], "'gptqq' is unknown; use one of rtn, "),
        (["--method", "gptq:damp=1"], "it takes order=given, damping=0.01"),
        (["--method", "gptq", "--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--method", "gptq", "--samples", "0"], "at least 1"),
        (["--report", "no/such/folder/page.html"], "folder that exists"),
    ],
)
def test_refusals(lowbit, tiny_model, tmp_path, more, words):
    done = lowbit("quantize", tiny_model, "int3-g32", "-o", tmp_path / "out", *more)
    assert done.code == 2 and words in done.err
    assert not (tmp_path / "out").exists()


def test_the_list(lowbit):
    methods = {method["name"]: method for method in lowbit("methods", "--json").json()["methods"]}
    assert methods["gptq"]["calibrated"] and not methods["rtn"]["calibrated"]
    assert methods["gptq"]["options"]["damping"] == 0.01
    shown = lowbit("methods")
    assert "arXiv:2210.17323" in shown.out
    every = lowbit("methods", "--json").json()
    assert {"flexq", "fmpq"} <= {entry["name"] for entry in every["activations"]}
    assert {"kivi", "xquant"} <= {entry["name"] for entry in every["caches"]}
    assert "arXiv:2410.12168" in shown.out and "arXiv:2402.02750" in shown.out


def test_formats_are_chosen_under_a_budget(lowbit, tiny_model, tmp_path):
    choices = ["--choices", "int2-g32,int4-g32,int8-g32", "--samples", "4", "--length", "32"]
    done = lowbit("quantize", tiny_model, "auto", "--bits", "4.5", *choices, "-o", tmp_path / "a", "--json")
    result = done.json()
    found = {layer["format"] for layer in result["layers"]} - {"int6-g32"}
    assert found <= {"int2-g32", "int4-g32", "int8-g32"} and len(found) > 1
    assert result["auto"]["bits_per_weight"] <= 4.5
    assert "auto" in json.loads((tmp_path / "a" / "lowbit.json").read_text())
    size = lowbit("quantize", tiny_model, "auto", "--bytes", "90kB", *choices, "-o", tmp_path / "b")
    assert size.code == 0 and "chosen: " in size.out
    assert (tmp_path / "b" / "model.safetensors").stat().st_size < 130_000
    shapes = {"x".join(map(str, layer["shape"])) for layer in result["layers"] if "layers." in layer["name"]}
    kernels = [
        {
            "format": format,
            "out_features": int(shape.split("x")[0]),
            "in_features": int(shape.split("x")[1]),
            "batch": 1,
            "seconds": seconds,
        }
        for format, seconds in (("int2-g32", 3e-6), ("int4-g32", 1e-6), ("int8-g32", 2e-6))
        for shape in shapes
    ]
    (tmp_path / "t.json").write_text(json.dumps({"kernels": kernels}))
    fast = ["--seconds", "1e-4", "--timings", tmp_path / "t.json"]
    arguments = ["quantize", tiny_model, "auto", "--bits", "9", *choices, *fast, "--no-verify", "--json"]
    told = lowbit(*arguments, "-o", tmp_path / "c").json()["auto"]
    assert 0 < told["seconds"] <= 1e-4
    assert lowbit("run", tmp_path / "a", "-p", "hello", "-n", "3").code == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["auto"], "give one of them"),
        (["auto", "--bits", "1"], "the smallest choices take 2.5243"),
        (["auto", "--bits", "4", "--bytes", "60MB"], "give one of them"),
        (["int4-g32", "--bits", "4"], "belongs to the format auto"),
        (["int4-g32", "--seconds", "1"], "belongs to the format auto"),
        (["auto", "--bits", "4", "--seconds", "1"], "belong together"),
        (["auto", "--bits", "4", "--seconds", "1", "--timings", "nowhere.json"], "no such file"),
        (["auto", "--bits", "4", "--layer", "*=int4-g32"], "no layers"),
    ],
)
def test_budgets_that_cannot_be_met(lowbit, tiny_model, tmp_path, more, words):
    done = lowbit("quantize", tiny_model, *more, "-o", tmp_path / "out")
    assert done.code == 2 and words in done.err, done.err
    assert not (tmp_path / "out").exists()
