"""The native decoder, loaded from files, against transformers and against the NumPy reference."""

import json

import numpy as np
import pytest

from lowbit.errors import CheckpointError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.loader import load_model
from lowbit.model.reference import reference_logits

from . import tiny_models

pytest.importorskip("lowbit._native")

# As fractions of the range of the logits. The decoder keeps keys and values in float16 (2**-11 relative
# each); over 40 positions of these sharp random networks that alone moves logits by up to 2.5e-3, in NumPy
# as in native code. Against the reference that rounds them too, only float32 sums in another order (and a
# key that therefore rounds the other way) remain: measured up to 1.3e-4.
TOLERANCE = 5e-3
SAME_CACHE = 5e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These networks are too small to share out; that thread counts change nothing is tested elsewhere."""
    from lowbit import _native

    before = _native.threads()
    _native.set_threads(1)
    yield
    _native.set_threads(before)


def native_logits(model, ids, chunks=None):
    """Logits of every position [n, vocab], fed in runs of the given lengths."""
    cache = model.cache(len(ids))
    rows = []
    for part in np.split(np.array(ids, np.int32), np.cumsum(chunks or [])[: len(chunks or []) - 1]):
        rows.append(model.decoder.logits(part, [cache], [len(part)], all=True))
    assert cache.length == len(ids)
    return np.concatenate(rows)


def close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


def read_all(folder):
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.config, {name: checkpoint.read(name) for name in checkpoint.names()}


@pytest.fixture(scope="module", params=tiny_models.CASES, ids=str)
def saved(request, tmp_path_factory):
    """(transformers model, folder) of one family, float32."""
    model = tiny_models.build(tiny_models.CASES[request.param])
    return model, tiny_models.save(model, tmp_path_factory.mktemp(request.param))


def test_reader_and_reference(saved):
    model, folder = saved
    config, weights = read_all(folder)
    ids = tiny_models.token_ids(24)
    close(reference_logits(config, weights, ids), tiny_models.logits(model, ids), 1e-5)


@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_native_logits(saved, activations):
    """Float weights are multiplied in float32, whatever the activations of coded weights are."""
    model, folder = saved
    loaded = load_model(folder, activations=activations)
    ids = tiny_models.token_ids(40)
    ours, theirs = native_logits(loaded, ids), tiny_models.logits(model, ids)
    config, weights = read_all(folder)
    rounded = reference_logits(config, weights, ids, kv_dtype=np.float16)
    close(ours, rounded, SAME_CACHE)
    # Rounded keys may send a token to another expert, in NumPy as well.
    same = np.abs(rounded - theirs).max(axis=1) <= TOLERANCE * np.abs(theirs).max()
    assert same.all() if not config.n_experts else same.mean() > 0.9
    close(ours[same], theirs[same], TOLERANCE)


def test_one_token_at_a_time_is_the_same(saved):
    _, folder = saved
    loaded = load_model(folder)
    ids = tiny_models.token_ids(20)
    whole = native_logits(loaded, ids)
    np.testing.assert_array_equal(native_logits(loaded, ids, [1] * 20), whole)
    np.testing.assert_array_equal(native_logits(loaded, ids, [7, 1, 12]), whole)


def test_greedy_continuation(saved):
    model, folder = saved
    loaded = load_model(folder, activations="int16")
    ids = tiny_models.token_ids(12, seed=3)
    theirs = tiny_models.greedy(model, ids, 24)
    cache = loaded.cache()
    ours, feed = [], ids
    while len(ours) < 24:
        row = loaded.decoder.logits(np.array(feed, np.int32), [cache], [len(feed)])[0]
        feed = [int(np.argmax(row))]
        if feed[0] != theirs[len(ours)]:  # a tie closer than the tolerance may fall either way
            gap = row.max() - row[theirs[len(ours)]]
            assert gap < TOLERANCE * np.abs(row).max()
            break
        ours += feed
    assert len(ours) > 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3", "bitnet-untied"])
def test_stored_types_and_shards(tmp_path, name, dtype):
    model = tiny_models.build(tiny_models.CASES[name])
    folder = tiny_models.save(model, tmp_path, dtype, shard="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    loaded = load_model(folder)
    kinds = {term.type for matrix in loaded.weights.values() for term in matrix.terms}
    assert kinds == {"fp16" if dtype == "float16" else "bf16"}
    ids = tiny_models.token_ids(24)
    theirs = tiny_models.logits(model, ids)
    config, weights = read_all(folder)
    close(reference_logits(config, weights, ids), theirs, 1e-5)
    close(native_logits(loaded, ids), theirs, TOLERANCE)
    close(native_logits(loaded, ids), reference_logits(config, weights, ids, kv_dtype=np.float16), SAME_CACHE)


SCALINGS = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {**tiny_models.LLAMA3, "original_max_position_embeddings": 16},
]


@pytest.mark.parametrize("parameters", SCALINGS, ids=lambda p: p["rope_type"])
def test_positions_beyond_the_original_maximum(tmp_path, parameters):
    settings = {"rope_parameters": {"rope_theta": 1000.0, **parameters}, "max_position_embeddings": 32}
    model = tiny_models.build(tiny_models.CASES["llama"], **settings)
    folder = tiny_models.save(model, tmp_path)
    loaded = load_model(folder, context=60)
    ids = tiny_models.token_ids(60)
    ours = native_logits(loaded, ids)
    close(ours, tiny_models.logits(model, ids), TOLERANCE)
    config, weights = read_all(folder)
    close(ours, reference_logits(config, weights, ids, context=60, kv_dtype=np.float16), SAME_CACHE)


def test_without_a_tokenizer(tmp_path):
    """Token ids need none; the loaded model says that there is none."""
    model = tiny_models.build(tiny_models.CASES["llama"])
    loaded = load_model(tiny_models.save(model, tmp_path))
    assert loaded.tokenizer is None
    assert native_logits(loaded, [1, 2, 3]).shape == (3, 270)


def test_config_and_weights_that_disagree(tmp_path):
    folder = tiny_models.save(tiny_models.build(tiny_models.CASES["llama"]), tmp_path)
    path = folder / "config.json"
    right = json.loads(path.read_text())
    for change, named in (
        ({"num_hidden_layers": 4}, "missing"),
        ({"hidden_size": 192, "head_dim": 16}, "shape"),
        ({"num_attention_heads": 1 << 40}, "num_attention_heads"),
    ):
        path.write_text(json.dumps({**right, **change}))
        with pytest.raises(CheckpointError, match=named):
            load_model(folder)
