"""Mixtures of experts, quantized every way: tokens counted, rare experts named, results that run."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("lowbit._native")

import lowbit
from lowbit.compress.coverage import Coverage, expert_of
from lowbit.errors import RequestError
from lowbit.formats.auto import Auto
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.loader import load_model
from lowbit.model.reference import reference_logits
from lowbit.model.reference_experts import route

from ..model import tiny_models

TOKENS = np.random.default_rng(0).integers(0, 270, (4, 32))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Families by name, saved."""
    names = ("mixtral", "qwen3-moe-mixed", "olmoe", "gpt-oss")
    models = {name: tiny_models.build(tiny_models.CASES[name]) for name in names}
    return {name: tiny_models.save(m, tmp_path_factory.mktemp(name)) for name, m in models.items()}


@pytest.fixture(params=["qwen3-moe-mixed", "gpt-oss"])
def saved(request, folders):
    return folders[request.param]


def everything(folder):
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.config, {name: checkpoint.read(name) for name in checkpoint.names()}


def quantize(source, target, method, format="int4-g32", **options):
    return lowbit.quantize(source, format, target, method=method, calibration=TOKENS, verify=False, **options)


def chosen_experts(config, weights):
    """Tokens of every expert of the first layer, by the reference, and its router's scores."""
    seen = {}

    def trace(point, value):
        seen[point] = value

    counts = np.zeros(config.n_experts, int)
    for row in TOKENS:
        reference_logits(config, weights, row, trace=trace)
        x = seen["layers.0.after_attention"].astype(np.float64)
        h = x / np.sqrt(np.square(x).mean(1, keepdims=True) + config.norm_eps)
        h = h * weights["model.layers.0.post_attention_layernorm.weight"]
        scores = h @ weights["model.layers.0.mlp.router.weight"].T
        scores = scores + weights.get("model.layers.0.mlp.router.bias", 0)
        counts += np.bincount(route(config, scores)[0].ravel(), minlength=config.n_experts)
    return counts


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "gptq") for name in ("mixtral", "qwen3-moe-mixed", "olmoe", "gpt-oss")),
        *(("mixtral", method) for method in ("rtn", "awq+rtn", "gptq+mixllm")),
        ("gpt-oss", "smoothquant+gptq"),
        ("olmoe", "hadamard+rtn"),
    ],
)
def test_what_is_written_runs_as_it_says(folders, tmp_path, name, method):
    """8 bits: near the original; the native decoder equals the reference on the weights that were written."""
    saved = folders[name]
    options = {} if "gptq" in method or "awq" in method else {"calibration": None}
    report = lowbit.quantize(
        saved,
        "int8-g32",
        tmp_path / "out",
        method=method,
        verify=False,
        **{"calibration": TOKENS, "expert_tokens": 1, **options},
    )
    config, weights = everything(tmp_path / "out")
    formats = {layer["name"]: layer["format"] for layer in report["layers"]}
    assert formats["model.layers.0.mlp.router.weight"] == "fp16"
    assert formats["model.layers.0.mlp.experts.1.down_proj.weight"].startswith("int8")
    loaded = load_model(tmp_path / "out", activations="int16", kv_bits=16)
    ids = tiny_models.token_ids(12)
    ours = loaded.decoder.logits(np.array(ids, np.int32), [loaded.cache()], [12], all=True)
    wanted = reference_logits(config, weights, ids, kv_dtype=np.float16)
    assert np.abs(ours - wanted).max() < 0.02 * np.abs(wanted).max()
    before = reference_logits(*everything(saved), ids)
    off = np.abs(wanted - before).max(1) / np.abs(before).max()
    assert np.median(off) < 0.05  # a token that comes to another expert is far off


def test_tokens_are_those_that_the_router_sends(saved, tmp_path):
    config, weights = everything(saved)
    # The embedding is rounded before text runs through the layers: leave it as it is.
    report = quantize(saved, tmp_path / "out", "gptq", expert_tokens=70, embedding="fp32")
    sparse = [str(layer) for layer in range(config.n_layers) if config.sparse(layer)]
    assert list(report["experts"]["tokens"]) == sparse
    assert report["experts"]["tokens"]["0"] == list(chosen_experts(config, weights))
    for counts in report["experts"]["tokens"].values():
        assert sum(counts) == TOKENS.size * config.experts_per_token
    few = {(e["layer"], e["expert"]) for e in report["experts"]["few"]}
    table = report["experts"]["tokens"]
    assert few == {(int(n), e) for n in table for e, count in enumerate(table[n]) if count < 70}
    assert few and len(few) < len(sparse) * config.n_experts  # the limit tells them apart
    for layer in report["layers"]:
        number, expert = expert_of(layer["name"])
        if expert is not None:
            assert layer["tokens"] == table[str(number)][expert]
            assert ("relative_output_error" in layer) == ((number, expert) not in few)
    details = json.loads((tmp_path / "out" / "lowbit.json").read_text())
    assert details["experts"] == report["experts"]


def test_rare_experts_are_rounded_to_nearest(saved, tmp_path):
    """Their matrices are those of rtn, all others are not."""
    report = quantize(saved, tmp_path / "gptq", "gptq", expert_tokens=70, embedding="fp32")
    lowbit.quantize(saved, "int4-g32", tmp_path / "rtn", verify=False, embedding="fp32")
    few = {(e["layer"], e["expert"]) for e in report["experts"]["few"]}
    (_, ours), (_, nearest) = everything(tmp_path / "gptq"), everything(tmp_path / "rtn")
    for name in ours:
        if expert_of(name)[1] is not None and name.endswith(".weight"):
            assert np.array_equal(ours[name], nearest[name]) == (expert_of(name) in few)


def test_too_few_tokens_are_an_error_on_request(saved, tmp_path):
    with pytest.raises(RequestError, match=r"layer 0: . of . experts saw fewer than 100 .*expert \d \(\d+\)"):
        quantize(saved, tmp_path / "out", "gptq", expert_tokens=100, few_tokens="error")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="few_tokens='no'"):
        quantize(saved, tmp_path / "out", "gptq", few_tokens="no")
    with pytest.raises(RequestError, match="expert_tokens=-1"):
        Coverage(-1)


def test_a_run_that_was_killed_ends_the_same(saved, tmp_path):
    def fail(done, total, name):
        if "layers.1." in name:
            raise KeyboardInterrupt

    quantize(saved, tmp_path / "whole", "gptq", expert_tokens=70)
    with pytest.raises(KeyboardInterrupt):
        quantize(saved, tmp_path / "out", "gptq", expert_tokens=70, progress=fail)
    assert (tmp_path / ".out.unfinished" / "layer-00000.safetensors").is_file()
    quantize(saved, tmp_path / "out", "gptq", expert_tokens=70)
    for name in ("model.safetensors", "lowbit.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("sensitivity", ["fisher", "hawq", "output", "kl"])
def test_bits_are_chosen_for_experts(folders, tmp_path, sensitivity):
    saved = folders["mixtral"]
    auto = Auto(bits=4.5, choices=["int3-g32", "int4-g32", "int6-g32"], sensitivity=sensitivity)
    method = "gptq" if sensitivity == "kl" else "rtn"
    report = lowbit.quantize(
        saved, auto, tmp_path / "out", calibration=TOKENS, method=method, verify=False, expert_tokens=1
    )
    formats = {layer["name"]: layer["format"] for layer in report["layers"]}
    experts = {formats[name] for name in formats if ".experts." in name}
    assert len(experts) > 1
    assert formats["model.layers.0.mlp.router.weight"] == "fp16"
    assert load_model(tmp_path / "out").bits_per_weight > 3
