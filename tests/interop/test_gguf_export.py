"""Whole models to GGUF: what transformers' own reader and ours make of the file."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

import lowbit
from lowbit.errors import CheckpointError, RequestError, UnsupportedError
from lowbit.interop import export as export_module
from lowbit.interop.export import export
from lowbit.model.checkpoint import open_checkpoint

from ..model import tiny_models

TOKENS = tiny_models.token_ids(24)
# Rows that divide 256 and 32, so that every type has a matrix.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": None}
# What GGUF describes of the families (windows of single layers it does not).
CASES = ["llama", "llama-tied", "llama-biases", "llama-head-dim", "llama3", "mistral-full", "qwen2", "qwen3"]
# What transformers' reader leaves out: biases of llama, factors of rotation speeds; a head of qwen3 has 128.
UNREAD = {"llama-biases", "llama3"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A directory in float32 whose layers are 256 wide."""
    case = tiny_models.CASES["llama"]
    model = tiny_models.build(case, **{k: v for k, v in WIDE.items() if v is not None})
    return tiny_models.save(model, tmp_path_factory.mktemp("wide") / "model")


def same_weights(one, other):
    for name in one.names():
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.interop(type="F32", direction="write", against="transformers")
def test_transformers_reads_the_same_network(name, tmp_path):
    """Names, row order, metadata: transformers' GGUF reader gives the logits of the original."""
    model = tiny_models.build(tiny_models.CASES[name], **({"head_dim": 128} if name == "qwen3" else {}))
    source = tiny_models.save(model, tmp_path / "model")
    export(source, "gguf", tmp_path / "model.gguf")
    with open_checkpoint(source) as before, open_checkpoint(tmp_path / "model.gguf") as after:
        same_weights(before, after)
        assert config_of(after) == config_of(before)
    if name in UNREAD:
        return
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    np.testing.assert_allclose(
        tiny_models.logits(again, TOKENS), tiny_models.logits(model, TOKENS), atol=2e-4, rtol=1e-4
    )


def config_of(checkpoint):
    """What decides the result. GGUF says rotations by their speeds, and nothing of absent end tokens."""
    config = replace(checkpoint.config, ignored=(), eos_ids=(), bos_ids=(), rope=None, family="")
    return replace(config, norm_eps=round(config.norm_eps, 9))


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "q4_k", "q6_k", "tq1_0", "tq2_0", "mxfp4", "f16"])
def test_every_type_is_written_and_read(kind, wide, tmp_path):
    report = export(wide, f"gguf:{kind}", tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == kind.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert not report["exact"]
    limit = {"q8_0": 0.01, "q6_k": 0.03, "f16": 1e-3}.get(kind, 0.7 if kind.startswith("tq") else 0.16)
    with open_checkpoint(wide) as before:
        for tensor in reader.tensors:
            if tensor.name == "blk.1.ffn_down.weight":
                found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                original = before.read("model.layers.1.mlp.down_proj.weight")
                assert np.linalg.norm(found - original) < limit * np.linalg.norm(original)


@pytest.mark.parametrize(
    "format", ["int4-g32", "int4-g64", "int3-g16-m4", "int4-g32-m4", "ternary", "int4a-g64"]
)
def test_a_quantized_model_is_stored_exactly_and_comes_back(format, wide, tmp_path):
    lowbit.quantize(str(wide), format, tmp_path / "q", verify=False)
    report = export(tmp_path / "q", "gguf", tmp_path / "q.gguf")
    assert report["exact"]
    with open_checkpoint(tmp_path / "q") as before, open_checkpoint(tmp_path / "q.gguf") as after:
        readable = [n for n in before.names() if not after.dtype(n).startswith("TQ")]
        assert len(readable) > 5
        for name in readable:
            np.testing.assert_array_equal(after.read(name), before.read(name), err_msg=name)
    # And once more, from GGUF to GGUF.
    if format != "ternary":
        assert export(tmp_path / "q.gguf", "gguf", tmp_path / "again.gguf")["exact"]
        one, other = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("q", "again"))
        for a, b in zip(one.tensors, other.tensors):
            assert (a.name, a.tensor_type) == (b.name, b.tensor_type)
            np.testing.assert_array_equal(
                gguf.quants.dequantize(a.data, a.tensor_type), gguf.quants.dequantize(b.data, b.tensor_type)
            )


def test_rotation_factors_are_those_of_transformers(tmp_path):
    model = tiny_models.build(tiny_models.CASES["llama3"])
    source = tiny_models.save(model, tmp_path / "model")
    export(source, "gguf", tmp_path / "x.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    speeds = model.model.rotary_emb.inv_freq.numpy().astype(np.float64)
    plain = 500000.0 ** -(np.arange(len(speeds)) / len(speeds))
    np.testing.assert_allclose(plain / tensors["rope_freqs.weight"].data, speeds, rtol=1e-6)


def test_biases_of_query_and_key_move_with_their_rows(tmp_path):
    """By the converter's own rule: half of a head after half becomes pair after pair."""
    model = tiny_models.build(tiny_models.CASES["llama-biases"])
    source = tiny_models.save(model, tmp_path / "model")
    export(source, "gguf", tmp_path / "x.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for name, heads in (("q", 6), ("k", 2)):
        bias = getattr(model.model.layers[1].self_attn, f"{name}_proj").bias.detach().numpy()
        wanted = bias.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{name}.bias"], wanted)


def test_what_would_be_lost_is_said_and_needs_leave(wide, tmp_path):
    lowbit.quantize(str(wide), "nf4-g64", tmp_path / "q", verify=False)
    with pytest.raises(
        UnsupportedError, match=r"21 matrices of nf4-g64 would be rounded to Q4_K: \d+\.\d%.*--lossy"
    ):
        export(tmp_path / "q", "gguf:q4_k", tmp_path / "q.gguf")
    assert not (tmp_path / "q.gguf").exists()
    report = export(tmp_path / "q", "gguf:q4_k", tmp_path / "q.gguf", lossy=True)
    rounded = [tensor for tensor in report["tensors"] if not tensor["exact"]]
    assert len(rounded) == 21 and all(
        0.9 < t["changed"] <= 1 and 0.01 < t["relative_error"] < 0.2 for t in rounded
    )
    with pytest.raises(UnsupportedError, match=r"no type holds .*nf4-g64"):
        export(tmp_path / "q", "gguf", tmp_path / "q2.gguf")


def test_rows_that_do_not_divide_fall_back(tmp_path):
    source = tiny_models.save(tiny_models.build(tiny_models.CASES["llama"]), tmp_path / "model")
    report = export(source, "gguf:q4_k", tmp_path / "x.gguf")
    found = {(tuple(t["shape"]), t["type"], t.get("why")) for t in report["tensors"]}
    assert ((96, 160), "Q5_0", "rows of 160 are no multiple of 256 (Q4_K)") in found
    assert ((270, 96), "Q8_0", "rows of 96 are no multiple of 256 (Q6_K)") in found


def test_the_tokenizer_and_template_come_along(tiny_model, tmp_path):
    export(tiny_model, "gguf:q8_0", tmp_path / "x.gguf")
    with open_checkpoint(tiny_model) as before, open_checkpoint(tmp_path / "x.gguf") as after:
        one, other = before.tokenizer(), after.tokenizer()
        text = "Grüße, 3 cats\n\n and <|user|> 日本"
        assert other.encode(text) == one.encode(text)
        assert (other.chat_template, other.eos_ids) == (one.chat_template, one.eos_ids)


def test_an_existing_file_is_kept(tiny_model, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="--force"):
        export(tiny_model, "gguf", path)
    assert path.read_text() == "mine"
    export(tiny_model, "gguf", path, force=True)
    with pytest.raises(CheckpointError, match="the model that is read"):
        export(path, "gguf:q8_0", path, force=True)
    with pytest.raises(CheckpointError, match="directory"):
        export(tiny_model, "gguf", tmp_path, force=True)


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_full_disk_leaves_nothing(failing, tiny_model, tmp_path, monkeypatch):
    from lowbit.packed import whole_file

    path = tmp_path / "out" / "x.gguf"
    if failing == "write":

        class Full(io.FileIO):
            def write(self, data):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(whole_file.os, "fdopen", lambda number, mode, buffering: Full(number, mode))
    else:

        def sync(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(whole_file.os, "fsync", sync)
    with pytest.raises(CheckpointError, match=r"No space left on device \(the file needs \d+ bytes\)"):
        export(tiny_model, "gguf:q8_0", path)
    assert list(path.parent.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(tiny_model, tmp_path):
    def stop(done, total, name):
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        export(tiny_model, "gguf:q8_0", tmp_path / "out" / "x.gguf", progress=stop)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("target", "words"),
    [("onnx", "choose one of gguf"), ("gguf:q4_7", "q4_0, q5_0"), ("gguf:iq2_s", "q4_0, q5_0")],
)
def test_unknown_targets(target, words, tiny_model, tmp_path):
    with pytest.raises(RequestError, match=words):
        export(tiny_model, target, tmp_path / "x")


@pytest.mark.parametrize("case", ["qwen2-windows", "llama-gelu", "bitnet"])
def test_networks_that_llama_cpp_would_compute_otherwise(case, tmp_path):
    source = tiny_models.save(tiny_models.build(tiny_models.CASES[case]), tmp_path / "model")
    with pytest.raises(UnsupportedError, match="export to GGUF: this"):
        export(source, "gguf", tmp_path / "x.gguf")


def test_command(tiny_model, tmp_path):
    command = [sys.executable, "-m", "lowbit.cli", "export", str(tiny_model), "--to", "gguf:q8_0"]
    environment = {"PYTHONPATH": str(Path(export_module.__file__).parents[2]), "LOWBIT_TUNING": "off"}
    done = subprocess.run(
        [*command, str(tmp_path / "x.gguf"), "--json"], capture_output=True, text=True, env=environment
    )
    result = json.loads(done.stdout)
    assert result["measured"]["kl_nats_per_token"] < 0.01
    assert {t["type"] for t in result["tensors"]} == {"Q8_0"}
    shown = subprocess.run(
        [*command, str(tmp_path / "y.gguf")], capture_output=True, text=True, env=environment
    )
    assert "nats per token from the model" in shown.stdout and "Q8_0" in shown.stdout
    refused = subprocess.run(
        [*command, str(tmp_path / "y.gguf")], capture_output=True, text=True, env=environment
    )
    assert refused.returncode == 2 and "--force" in refused.stderr
