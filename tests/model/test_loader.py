"""Loading: coverage of tensors, damaged weights, contexts, tied heads and missing tokenizers."""

import dataclasses

import numpy as np
import pytest

from lowbit.errors import CheckpointError, RequestError, UnsupportedError
from lowbit.model.config import from_transformers
from lowbit.model.loader import load_model
from lowbit.model.tensors import EMBEDDING, HEAD, expected_tensors
from lowbit.packed import CodeTerm, FloatTerm, PackedMatrix, pack_codes, pack_groups, pack_values

pytest.importorskip("lowbit._native")

CONFIG = {
    "model_type": "llama",
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


class Tensors:
    """A checkpoint in memory with the interface of the readers."""

    path = "memory"
    kind = "test"

    def __init__(self, **settings):
        self.config = from_transformers({**CONFIG, **settings})
        rng = np.random.default_rng(0)
        self.tensors = {
            tensor.name: rng.normal(0, 0.2, tensor.shape).astype(np.float32)
            for tensor in expected_tensors(self.config)
        }
        self.matrices = {}

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name].copy()

    def matrix(self, name):
        if name in self.matrices:
            return self.matrices[name]
        return float_matrix(self.tensors[name])

    def tokenizer(self):
        return None


def float_matrix(weight, kind="fp32"):
    values = weight.astype(np.float16) if kind == "fp16" else weight.astype(np.float32)
    if kind == "bf16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    return PackedMatrix(*weight.shape, (FloatTerm(kind, pack_values(values)),))


def coded_matrix(shape, scale_type="fp16", **changes):
    """4-bit codes of 8 and scales of one."""
    scales = {"fp16": np.float16(1), "fp32": np.float32(1), "e8m0": np.uint8(127), "e4m3": np.uint8(56)}
    term = CodeTerm(
        bits=4,
        levels=np.arange(-8, 8, dtype=np.float32)[None],
        codes=pack_codes(np.full(shape, 9, np.uint8), 4),
        scales=pack_groups(np.full((shape[0], shape[1] // 32), scales[scale_type])),
        scale_type=scale_type,
        group_size=32,
    )
    return PackedMatrix(*shape, (dataclasses.replace(term, **changes),))


def first_logits(model, ids=(3, 1, 4)):
    cache = model.cache(16)
    return model.decoder.logits(np.array(ids, np.int32), [cache], [len(ids)])


def test_loads_and_counts_bits():
    model = load_model(Tensors())
    weights = sum(matrix.out_features * matrix.in_features for matrix in model.weights.values())
    norms = 5 * 32
    assert model.nbytes == sum(matrix.nbytes for matrix in model.weights.values()) + 4 * norms
    assert model.bits_per_weight == pytest.approx(8 * model.nbytes / (weights + norms))
    assert model.bits_per_weight > 32  # 70 rows of the embedding are padded to 96
    assert model.context == 64
    assert model.tokenizer is None
    assert first_logits(model).shape == (1, 70)


def test_missing_tensors_are_named():
    tensors = Tensors()
    del tensors.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(
        CheckpointError, match=r"1 of 21 tensors are missing: model.layers.1.mlp.up_proj.weight"
    ):
        load_model(tensors)
    tensors = Tensors()
    del tensors.tensors[HEAD]
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_model(tensors)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "visual.patch_embed.weight",
    ],
)
def test_leftover_tensors_are_named(name):
    tensors = Tensors()
    tensors.tensors[name] = np.zeros((2, 2), np.float32)
    with pytest.raises(UnsupportedError, match=name.replace(".", r"\.")):
        load_model(tensors)


def test_old_rotary_buffers_are_no_leftovers():
    tensors = Tensors()
    for layer in range(2):
        tensors.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    assert load_model(tensors).context == 64


@pytest.mark.parametrize("name", [EMBEDDING, "model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_wrong_shapes_are_named(name):
    tensors = Tensors()
    tensors.tensors[name] = tensors.tensors[name][:-1]
    with pytest.raises(CheckpointError, match=f"{name} has shape"):
        load_model(tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_weights_that_are_not_finite(value, kind):
    tensors = Tensors()
    name = "model.layers.1.mlp.down_proj.weight"
    weight = tensors.tensors[name]
    tensors.matrices[name] = float_matrix(weight, kind)
    load_model(tensors)
    weight[17, 5] = value
    tensors.matrices[name] = float_matrix(weight, kind)
    with pytest.raises(CheckpointError, match=f"values of {name} are not finite in rows 0 to 31"):
        load_model(tensors)


def test_norms_that_are_not_finite():
    tensors = Tensors()
    tensors.tensors["model.norm.weight"][3] = np.nan
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight\[3\] is nan"):
        load_model(tensors)


BAD_SCALES = [
    ("fp16", np.float16(np.nan)),
    ("fp16", np.float16(-np.inf)),
    ("fp32", np.float32(np.nan)),
    ("e8m0", np.uint8(255)),
    ("e4m3", np.uint8(127)),
    ("e4m3", np.uint8(255)),
]


@pytest.mark.parametrize("scale_type, value", BAD_SCALES, ids=str)
def test_scales_that_are_not_finite(scale_type, value):
    tensors = Tensors()
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors.matrices[name] = matrix = coded_matrix((32, 32), scale_type)
    load_model(tensors)
    scales = matrix.terms[0].scales.copy()
    scales[0, 0, 7] = value
    tensors.matrices[name] = coded_matrix((32, 32), scale_type, scales=scales)
    with pytest.raises(CheckpointError, match=f"scales of {name}"):
        load_model(tensors)
    good = coded_matrix((32, 32)).terms[0].scales
    tensors.matrices[name] = coded_matrix((32, 32), offsets=good)
    load_model(tensors)
    bad = good.copy()
    bad[0, 0, 31] = np.inf
    tensors.matrices[name] = coded_matrix((32, 32), offsets=bad)
    with pytest.raises(CheckpointError, match=f"offsets of {name}"):
        load_model(tensors)


def test_a_tied_head_that_is_stored_too():
    """Equal: one matrix. Different: both are used, as transformers does."""
    tied = Tensors(tie_word_embeddings=True)
    alone = load_model(tied)
    assert HEAD not in alone.weights
    tied.tensors[HEAD] = tied.tensors[EMBEDDING].copy()
    twice = load_model(tied)
    assert twice.config.tied
    assert HEAD not in twice.weights
    assert twice.nbytes == alone.nbytes
    np.testing.assert_array_equal(first_logits(twice), first_logits(alone))
    tied.tensors[HEAD] = 2 * tied.tensors[EMBEDDING]
    other = load_model(tied)
    assert not other.config.tied
    np.testing.assert_allclose(first_logits(other), 2 * first_logits(alone), rtol=1e-5)


def test_contexts():
    assert load_model(Tensors(), context=5).context == 5
    for wrong in (0, -1, 65):
        with pytest.raises(RequestError, match=f"context={wrong}.*from 1 to 64"):
            load_model(Tensors(), context=wrong)
    longer = Tensors(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert load_model(longer).context == 64
    assert load_model(longer, context=128).context == 128
    with pytest.raises(RequestError, match="from 1 to 128"):
        load_model(longer, context=129)


def test_arguments():
    with pytest.raises(RequestError, match="activations='int4'"):
        load_model(Tensors(), activations="int4")
    with pytest.raises(RequestError, match="threads=0"):
        load_model(Tensors(), threads=0)


def test_limits_of_the_native_decoder_are_errors_of_ours():
    with pytest.raises(UnsupportedError, match="head_dim=6"):
        load_model(Tensors(head_dim=6))


def test_a_quantized_model_runs_with_the_numbers_it_was_made_for(tmp_path):
    from lowbit.compress import quantize_checkpoint
    from lowbit.formats import Scheme

    from . import tiny_models

    source = tiny_models.save(tiny_models.build(tiny_models.CASES["llama"]), tmp_path / "source")
    for name, scheme in (("a", "int4-g32"), ("b", "int8-g32"), ("c", "int8-g32"), ("d", "fp16")):
        parsed = Scheme.parse(scheme)
        changes = {"a": {"activations": "int16", "kv_bits": None}, "b": {"kv_bits": 16}}.get(name, {})
        quantize_checkpoint(source, dataclasses.replace(parsed, **changes), tmp_path / name)
    numbers = {
        (name, asked): (model.activations, model.kv_bits)
        for name in "abcd"
        for asked in (None, "int8")
        for model in [load_model(tmp_path / name, activations=asked)]
    }
    assert numbers["a", None] == ("int16", 16) and numbers["a", "int8"] == ("int8", 8)
    assert numbers["b", None] == numbers["b", "int8"] == ("int8", 16)
    assert numbers["c", None] == numbers["c", "int8"] == ("int8", 8)
    assert numbers["d", None] == ("int8", 16)
    assert load_model(tmp_path / "b", kv_bits=8).kv_bits == 8
