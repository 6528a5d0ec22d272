"""`lowbit compare` as its users type it."""

import pytest

ROW = {"model", "path", "bits_per_weight", "size_bytes", "kl_nats_per_token", "kl_standard_error", "kl_99"}
ROW |= {"top1_agreement", "perplexity", "activations", "kv_bits"}


@pytest.fixture
def small_model(lowbit, tiny_model, tmp_path):
    assert lowbit("quantize", tiny_model, "int2-g32", "-o", tmp_path / "small").code == 0
    return tmp_path / "small"


def test_json(lowbit, tiny_model, small_model):
    more = ("--max-tokens", "200", "--context", "64", "--activations", "int16")
    result = lowbit("compare", tiny_model, tiny_model, small_model, *more, "--json").json()
    same, small = result["models"]
    assert set(same) == ROW and (result["tokens"], result["windows"], result["context"]) == (192, 3, 64)
    assert same["kl_nats_per_token"] == 0 and same["top1_agreement"] == 1
    assert small["kl_nats_per_token"] > 0.01 and small["kl_standard_error"] > 0
    assert small["model"] == str(small_model) and small["size_bytes"] < same["size_bytes"]
    assert 2 < small["bits_per_weight"] < 5 and 32 <= same["bits_per_weight"] < 33
    assert result["reference"]["perplexity"] == same["perplexity"] != small["perplexity"]
    evaluated = lowbit("eval", small_model, *more, "--json").json()
    assert evaluated["perplexity"] == pytest.approx(small["perplexity"], rel=1e-5)


def test_table(lowbit, tiny_model, small_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 10)
    done = lowbit("compare", tiny_model, small_model, "--text", text, "--context", "32")
    assert done.code == 0, done.err
    head, reference, row, note = done.out.splitlines()
    assert "KL (nats/token)" in head and "reference" in reference and " ± " in row and "%" in row
    assert note.startswith("288 tokens in 9 windows of 32")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--context", "129"), "129"),
        (("--text", "none.txt"), "none.txt"),
        (("--max-tokens", "0"), "at least 1"),
    ],
)
def test_refusals(lowbit, tiny_model, arguments, words):
    done = lowbit("compare", tiny_model, tiny_model, *arguments)
    assert done.code == 2 and done.err.count("\n") == 1 and words in done.err
    assert lowbit("compare", tiny_model).code == 2


def test_html(lowbit, tiny_model, small_model, tmp_path):
    more = ("--max-tokens", "128", "--context", "64", "--html")
    done = lowbit("compare", tiny_model, small_model, *more, tmp_path / "page.html")
    assert done.code == 0, done.err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "<svg" in page and str(small_model) in page
    refused = lowbit("compare", tiny_model, small_model, *more, tmp_path / "none" / "page.html")
    assert refused.code == 2 and "folder that exists" in refused.err
