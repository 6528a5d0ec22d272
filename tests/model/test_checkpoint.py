"""Opening by kind, transformers directories in all their forms, and lowbit directories."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.packed import FloatTerm, PackedMatrix, TensorWriter, pack_values

CONFIG = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


def tensors():
    rng = np.random.default_rng(1)
    shapes = {
        "model.embed_tokens.weight": (40, 32), "model.norm.weight": (32,), "lm_head.weight": (40, 32),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
    }  # fmt: skip
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    """A transformers directory of float32 tensors in one file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def shard(folder, places):
    """Split the file by name -> shard and write the index."""
    (folder / "model.safetensors").unlink()
    held = {}
    for name, place in places.items():
        held.setdefault(place, {})[name] = tensors()[name]
    for place, content in held.items():
        save_file(content, folder / place)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


PLACES = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors())}


def test_one_file(folder):
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.kind == "transformers" and checkpoint.path == folder
        assert set(checkpoint.names()) == set(tensors())
        for name, array in tensors().items():
            assert checkpoint.shape(name) == array.shape and checkpoint.dtype(name) == "F32"
            np.testing.assert_array_equal(checkpoint.read(name), array)
            if array.ndim == 2:
                np.testing.assert_array_equal(checkpoint.matrix(name).dequantize(), array)
        assert checkpoint.read("model.norm.weight").flags.writeable
        assert checkpoint.config.eos_ids == (2,) and checkpoint.tokenizer() is None
        with pytest.raises(CheckpointError, match="no tensor 'x'; it has 4 tensors"):
            checkpoint.read("x")
        with pytest.raises(CheckpointError, match="a matrix has two dimensions"):
            checkpoint.matrix("model.norm.weight")


def test_half_precision(folder):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    values = {name: torch.from_numpy(array) for name, array in tensors().items()}
    for dtype, kind, name in ((torch.float16, "fp16", "F16"), (torch.bfloat16, "bf16", "BF16")):
        rounded = {key: value.to(dtype) for key, value in values.items()}
        save_torch(rounded, folder / "model.safetensors")
        with open_checkpoint(folder) as checkpoint:
            for key, value in rounded.items():
                assert checkpoint.dtype(key) == name
                np.testing.assert_array_equal(checkpoint.read(key), value.float().numpy())
                if value.ndim == 2:
                    matrix = checkpoint.matrix(key)
                    assert matrix.terms[0].type == kind
                    np.testing.assert_array_equal(matrix.dequantize(), value.float().numpy())


def test_other_types_are_refused(folder):
    save_file({"model.norm.weight": np.zeros(4, np.int8)}, folder / "model.safetensors")
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(UnsupportedError, match="type I8; lowbit reads F32"),
    ):
        checkpoint.read("model.norm.weight")


def test_shards(folder):
    shard(folder, PLACES)
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.names()) == set(tensors())
        for name, array in tensors().items():
            np.testing.assert_array_equal(checkpoint.read(name), array)


def test_a_bare_model_gets_its_prefix(folder):
    bare = {name.removeprefix("model."): array for name, array in tensors().items()}
    save_file(bare, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.names()) == set(tensors())


@pytest.mark.parametrize(
    "place",
    [
        "../model.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "x.bin",
        ".x.safetensors",
        5,
        None,
    ],
)
def test_an_index_leads_nowhere_else(folder, place):
    index = shard(folder, PLACES)
    index.write_text(json.dumps({"weight_map": {**PLACES, "model.norm.weight": place}}))
    with pytest.raises(CheckpointError, match="not the plain name of a"):
        open_checkpoint(folder)


def test_index_and_shards_must_agree(folder):
    index = shard(folder, PLACES)
    other = next(place for name, place in PLACES.items() if place != PLACES["model.norm.weight"])
    for content, message in (
        ({}, "weight_map is missing"),
        ({"weight_map": []}, "weight_map is missing"),
        (
            {"weight_map": {**PLACES, "x": "model-00009-of-00002.safetensors"}},
            "1 of 3 shards are missing: model-00009",
        ),
        ({"weight_map": {**PLACES, "model.norm.weight": other}}, "does not hold 'model.norm.weight'"),
        (
            {"weight_map": {k: v for k, v in PLACES.items() if k != "model.norm.weight"}},
            "1 tensors that the index",
        ),
        (
            {"weight_map": {f"t{i}": f"s{i}.safetensors" for i in range(5000)}},
            "5000 shards, 4096 are allowed",
        ),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pickled \(pytorch_model\.bin\), and a pickle may run code"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="pickled weights may run code"):
        open_checkpoint(folder / "pytorch_model.bin")


def test_paths_that_are_no_checkpoint(folder, tmp_path_factory):
    with pytest.raises(CheckpointError, match="there is no such file or directory"):
        open_checkpoint(folder / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json: there is no such file"):
        open_checkpoint(tmp_path_factory.mktemp("empty"))
    with pytest.raises(CheckpointError, match="give the directory"):
        open_checkpoint(folder / "model.safetensors")
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="begins with b'hell'"):
        open_checkpoint(folder / "notes.txt")
    with pytest.raises(CheckpointError, match="check the path"):
        open_checkpoint("nul\0byte")


def test_generation_config_adds_end_tokens(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.eos_ids == (2, 3)


@pytest.fixture
def packed(folder):
    """A lowbit directory: two matrices packed, the norm plain."""
    matrices = {
        name: PackedMatrix(*array.shape, (FloatTerm("fp16", pack_values(array.astype(np.float16))),), "fp16")
        for name, array in tensors().items()
        if array.ndim == 2
    }
    layout, arrays, metas = {}, {}, {}
    for name, matrix in matrices.items():
        metas[name], state = matrix.state()
        arrays |= {f"{name}.{key}": array for key, array in state.items()}
    arrays["model.norm.weight"] = tensors()["model.norm.weight"]
    layout = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with TensorWriter(folder / "model.safetensors", layout) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    details = {
        "version": 1,
        "format": "lowbit",
        "source": "x",
        "scheme": {},
        "method": "rtn",
        "tensors": metas,
    }
    (folder / "lowbit.json").write_text(json.dumps(details))
    return folder


def test_lowbit_directory(packed):
    with open_checkpoint(packed) as checkpoint:
        assert checkpoint.kind == "lowbit" and checkpoint.details["method"] == "rtn"
        assert set(checkpoint.names()) == set(tensors())
        for name, array in tensors().items():
            assert checkpoint.shape(name) == array.shape
            if array.ndim == 2:
                assert checkpoint.dtype(name) == "fp16"
                matrix = checkpoint.matrix(name)
                np.testing.assert_array_equal(matrix.dequantize(), array.astype(np.float16))
                np.testing.assert_array_equal(checkpoint.read(name), matrix.dequantize())
                stored = matrix.terms[0].values
                assert not stored.flags.owndata and not stored.flags.writeable  # mapped, not copied
            else:
                assert checkpoint.dtype(name) == "F32"
                np.testing.assert_array_equal(checkpoint.read(name), array)
        with pytest.raises(CheckpointError, match="stored as a plain tensor"):
            checkpoint.matrix("model.norm.weight")
        with pytest.raises(CheckpointError, match="no tensor 'x'"):
            checkpoint.read("x")


def test_damaged_lowbit_directories(packed):
    path = packed / "lowbit.json"
    good = json.loads(path.read_text())

    def changed(**changes):
        path.write_text(json.dumps({**good, **changes}))

    changed(format="other")
    with pytest.raises(CheckpointError, match="format is 'other', not lowbit"):
        open_checkpoint(packed)
    changed(version=2)
    with pytest.raises(UnsupportedError, match="written in version 2"):
        open_checkpoint(packed)
    for wrong in ([], {"x": 5}):
        changed(tensors=wrong)
        with pytest.raises(CheckpointError, match="tensors is not an object of objects"):
            open_checkpoint(packed)
    name = "lm_head.weight"
    meta = good["tensors"][name]
    for wrong in (
        {**meta, "shape": [80, 32]},
        {**meta, "shape": [40]},
        {**meta, "shape": ["a", 2]},
        {**meta, "terms": []},
        {**meta, "terms": [{"kind": "codes"}]},
        {**meta, "terms": [{"kind": "floats", "type": "fp64"}]},
        {**meta, "terms": meta["terms"] * 2},
        {},
    ):
        changed(tensors={**good["tensors"], name: wrong})
        with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.weight'"):
            open_checkpoint(packed).matrix(name)
    changed(tensors={**good["tensors"], "model.norm.weight": meta})
    with pytest.raises(CheckpointError, match="both packed and plain"):
        open_checkpoint(packed)
