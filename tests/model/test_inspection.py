"""What is said about files of every kind, those that cannot run included."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lowbit.errors import CheckpointError, LowbitError, UnsupportedError
from lowbit.model.gguf_types import TENSOR_TYPES
from lowbit.model.inspection import inspect_model
from lowbit.packed import TensorWriter

from . import fuzz_seeds
from .gguf_bytes import assemble, entry, pair
from .test_fuzz_gguf import every_type
from .test_gguf_file import BAD, UNSUPPORTED, split_files


def entries_of(found):
    return {entry.name: entry for entry in found.entries}


def test_every_type_of_gguf_is_explained(tmp_path):
    path = tmp_path / "all.gguf"
    path.write_bytes(every_type()[0])
    found = inspect_model(path)
    entries = entries_of(found)
    assert found.kind == "gguf" and found.metadata["general.architecture"] == "llama"
    for kind in TENSOR_TYPES.values():
        tensor = entries[f"blk.0.{kind.name}.weight"]
        assert tensor.format == kind.name and tensor.shape == [2, 256]
        assert tensor.bits_per_weight == kind.file_bits
        assert (tensor.run_bytes is None) == (not kind.readable) == (tensor.kernel == "none")
    assert entries["blk.0.Q4_K.weight"].runs_as == "4-bit codes, 16 levels, 8-bit factors and offsets of 32"
    assert entries["blk.0.TQ1_0.weight"].runs_as == "base-3 codes, 3 levels, fp16 scales of 256"
    assert entries["blk.0.BF16.weight"].kernel == "floats"
    problems = " ".join(found.problems)
    assert "1 tensors of Q8_K have no decoder: blk.0.Q8_K.weight" in problems
    assert "embedding_length" in problems or "token_embd" in problems  # no network


def test_the_page_of_formats_has_these_bits(tmp_path):
    """docs/formats.md lists what each type takes in the file and as it runs."""
    path = tmp_path / "all.gguf"
    path.write_bytes(every_type()[0])
    entries = entries_of(inspect_model(path))
    page = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    for kind in TENSOR_TYPES.values():
        if kind.split is not None:
            words = entries[f"blk.0.{kind.name}.weight"].runs_as
            assert f"| {kind.name} | {kind.file_bits:g} | {kind.run_bits:g} | {words} |\n" in page


def test_an_unknown_type_and_network_are_named(tmp_path):
    path = tmp_path / "new.gguf"
    pairs = [pair("general.architecture", "str", "from-the-future"), pair("general.name", "str", "X")]
    data = np.zeros(64, "<f4").tobytes()
    path.write_bytes(
        assemble(pairs, [entry("a", (64,), 0, 0), entry("b", (64,), 777, 256)], data + bytes(64))
    )
    found = inspect_model(path)
    assert found.config is None and found.metadata["general.name"] == "X"
    assert entries_of(found)["b"].format == "type 777"
    problems = " ".join(found.problems)
    assert "from-the-future" in problems or "unknown type 777" in problems
    assert "1 tensors of type 777 have no decoder: b" in problems


def test_parts_are_one_model(tmp_path):
    paths = split_files(tmp_path)
    found = inspect_model(paths[2])
    assert found.files == [path.name for path in paths] and len(found.entries) == 3


@pytest.mark.parametrize("case", [*BAD, *UNSUPPORTED])
def test_whatever_is_damaged_is_an_error_of_ours(case, tmp_path):
    raw, _ = (BAD | UNSUPPORTED)[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    try:
        assert inspect_model(path).problems
    except LowbitError as error:
        assert str(path) in str(error)


@pytest.fixture
def directory(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in fuzz_seeds.transformers_directory().items():
        (folder / name).write_bytes(content)
    return folder


def change(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_directory(directory):
    found = inspect_model(directory)
    assert found.kind == "transformers" and len(found.files) == 2
    assert found.tokenizer_size == 4 and found.chat_template
    embedding = entries_of(found)["model.embed_tokens.weight"]
    assert (embedding.format, embedding.runs_as, embedding.kernel) == ("F32", "float32", "floats")
    assert entries_of(found)["model.norm.weight"].kernel == "vector"
    assert found.problems and "missing" in found.problems[0]  # the seed is half a network


def test_a_directory_that_cannot_run_is_still_listed(directory):
    change(directory, model_type="from_the_future", architectures=["FutureForCausalLM"])
    found = inspect_model(directory)
    assert found.metadata["architectures"] == ["FutureForCausalLM"] and found.config is None
    assert "from_the_future" in found.problems[0]
    assert entries_of(found)["model.norm.weight"].shape == [32]


@pytest.mark.parametrize("method", ["from_the_future", "hqq", None, 7, {}])
def test_a_quantization_that_is_unknown_is_named(directory, method):
    change(directory, quantization_config={"quant_method": method, "bits": 4})
    found = inspect_model(directory)
    assert found.quantization == {"quant_method": method, "bits": 4}
    assert any("quant" in problem for problem in found.problems)
    assert len(found.entries) == 5


def test_a_damaged_config_still_lists_tensors(directory):
    (directory / "config.json").write_text("{")
    found = inspect_model(directory)
    assert any("config.json" in problem for problem in found.problems) and len(found.entries) == 5


def test_a_lowbit_directory_that_cannot_run_is_still_listed(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    for name, content in fuzz_seeds.lowbit_directory(tmp_path).items():
        (folder / name).write_bytes(content)
    found = inspect_model(folder)
    assert found.kind == "lowbit" and "model.layers.0.mlp.down_proj.weight" in entries_of(found)
    details = json.loads((folder / "lowbit.json").read_text())
    (folder / "lowbit.json").write_text(json.dumps(details | {"version": 99}))
    found = inspect_model(folder)
    assert "99" in found.problems[0] and "model.layers.0.mlp.down_proj.weight.0.codes" in entries_of(found)


def test_gptq_is_shown_as_codes(tmp_path):
    """Arrays of a quantizer are one matrix each, with the bits of all of them in the file."""
    config = {**fuzz_seeds.CONFIG, "tie_word_embeddings": True}
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stem = "model.layers.0.mlp.down_proj"
    arrays = {
        f"{stem}.qweight": np.zeros((8, 32), np.int32),
        f"{stem}.qzeros": np.full((2, 4), 0x77777777, np.int32),
        f"{stem}.scales": np.ones((2, 32), np.float16),
        f"{stem}.g_idx": (np.arange(64) // 32).astype(np.int32),
        "model.norm.weight": np.ones(32, np.float32),
    }
    layout = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with TensorWriter(tmp_path / "model.safetensors", layout) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    found = inspect_model(tmp_path)
    matrix = entries_of(found)[f"{stem}.weight"]
    assert matrix.kernel == "codes" and matrix.runs_as.startswith("4-bit codes") and matrix.shape == [32, 64]
    assert matrix.bytes == sum(array.nbytes for name, array in arrays.items() if stem in name)
    assert matrix.run_bytes == pytest.approx(64 * 32 * 4.5 / 8, rel=0.1)


def test_a_quantization_in_a_file_of_its_own(directory):
    (directory / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    assert inspect_model(directory).quantization["quant_method"] == "gptq"


def test_one_file_of_a_directory(directory):
    found = inspect_model(directory / "model-00001-of-00002.safetensors")
    assert "give the directory" in found.problems[0] and len(found.entries) == 2


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.txt"])
def test_what_is_no_model_is_refused(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"\\x80\\x04 something")
    with pytest.raises((CheckpointError, UnsupportedError)):
        inspect_model(path)
    with pytest.raises(CheckpointError, match="absent"):
        inspect_model(tmp_path / "absent")


def test_the_command_explains_what_cannot_run(directory, capsys, monkeypatch):
    from lowbit.cli import main

    change(directory, model_type="from_the_future")
    assert main(["inspect", str(directory), "--tensors"]) == 0
    shown = capsys.readouterr().out
    for words in ("runs", "no", "from_the_future", "model.norm.weight", "as it runs", "float32 vector"):
        assert words in shown
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
