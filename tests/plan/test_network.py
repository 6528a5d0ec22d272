"""Sizes from a config.json alone, against figures derived by hand and against what would be loaded."""

import json
from math import prod

import pytest

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats import Scheme
from lowbit.model.config import from_transformers
from lowbit.model.tensors import expected_tensors
from lowbit.packed.planned import planned_arrays
from lowbit.plan.memory import kv_bytes, plain_kv_bytes, weight_bytes
from lowbit.plan.network import network_from, read_network
from lowbit.plan.work import distinct_experts

from .networks import DEEPSEEK_LITE, LLAMA_2_7B, LLAMA_2_70B, LLAMA_3_8B, MIXTRAL, RANDOM_1B, SMOLLM2, network


@pytest.mark.parametrize(
    ("config", "parameters"),
    [  # as the model cards count them
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_2_70B, 68_976_648_192),
        (LLAMA_3_8B, 8_030_261_248),
        (SMOLLM2, 134_515_008),
    ],
)
def test_parameters_are_those_of_the_model_cards(config, parameters):
    assert network(config).parameters == parameters


def test_mixtral_and_deepseek_have_their_published_sizes():
    mixtral = network(MIXTRAL)
    assert mixtral.parameters == pytest.approx(46.7e9, rel=2e-3)  # arXiv:2401.04088: 47B, 13B active
    active = mixtral.active_weights() + mixtral.embedding_weights
    assert active == pytest.approx(12.9e9, rel=5e-3)
    lite = network(DEEPSEEK_LITE)
    assert lite.parameters == pytest.approx(
        15.7e9, rel=5e-3
    )  # arXiv:2405.04434, appendix B: 15.7B, 2.4B active
    assert lite.active_weights() + lite.vocab * lite.hidden == pytest.approx(2.4e9, rel=0.05)


def test_keys_and_values_per_token_by_hand():
    # 2 (keys, values) x layers x key-value heads x head_dim x bytes
    assert plain_kv_bytes(network(LLAMA_2_7B), 16) == 2 * 32 * 32 * 128 * 2 == 524_288
    assert plain_kv_bytes(network(LLAMA_2_70B), 16) == 2 * 80 * 8 * 128 * 2 == 327_680
    assert plain_kv_bytes(network(LLAMA_3_8B), 16) == 131_072
    assert plain_kv_bytes(network(MIXTRAL), 8) == 65_536
    # latents: L (r + d_rope) b / 8
    assert plain_kv_bytes(network(DEEPSEEK_LITE), 16) == 27 * (512 + 64) * 2


@pytest.mark.parametrize(("bits", "stored"), [(16, 23_040), (8, 12_600), (4, 6_165), (2, 3_285)])
def test_smollm2s_cache_is_as_documented(bits, stored):
    """docs/kv-cache.md: bytes per token stored."""
    whole = kv_bytes(network(SMOLLM2), bits, 256 * 100) - (
        kv_bytes(network(SMOLLM2), bits, 0) if bits < 8 else 0
    )
    assert whole == pytest.approx(stored * 25_600, rel=4e-3)  # blocks are of whole pages


def test_cache_sizes_are_those_of_the_native_pool():
    native = pytest.importorskip("lowbit._native")
    from lowbit.measure.synthetic import llama, synthetic

    for dim, bits in ((64, 16), (64, 8), (80, 8), (128, 4), (24, 2)):
        model = synthetic(llama(3, 64, 64, 4, 2, head_dim=dim), "int4-g32", bits)
        pool = native.KvPool(model.decoder, 1)
        assert kv_bytes(network_from(llama(3, 64, 64, 4, 2, head_dim=dim)), bits, 256) == (
            pool.block_bytes + pool.slot_bytes
        )


@pytest.mark.parametrize("config", [SMOLLM2, RANDOM_1B, LLAMA_3_8B])
@pytest.mark.parametrize("name", ["int4-g32", "int3-g16-m4", "mxfp4", "ternary", "bf16", "int4a-g64"])
def test_weights_are_what_packing_stores(config, name):
    scheme = Scheme.parse(name)
    expected = 0
    for tensor in expected_tensors(from_transformers(config)):
        if len(tensor.shape) == 1:
            expected += 4 * tensor.shape[0]
            continue
        arrays = planned_arrays(scheme.format_for(tensor.name), *tensor.shape)
        expected += sum(prod(shape) * kind().itemsize for kind, shape in arrays.values())
    assert weight_bytes(network(config), scheme) == expected


def test_weight_bytes_by_hand():
    # Llama-2-7B at int4 in groups of 128: 4 bits and 16 / 128, head and embedding in bf16.
    scheme = Scheme.parse({"weights": "int4-g128", "embedding": "bf16"})
    layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    tables = 32 * 7 * 16 * 4
    vectors = (2 * 32 + 1) * 4096 * 4
    assert weight_bytes(network(LLAMA_2_7B), scheme) == (
        layers * 4.125 / 8 + tables + vectors + 2 * 2 * 32000 * 4096
    )


def test_loaded_bytes_are_those_predicted():
    from lowbit.measure.synthetic import llama, synthetic

    config = llama(2, 128, 192, 4, 2, vocab=96)
    for name in ("int4-g32", "nf4-g64", "bf16"):
        model = synthetic(config, name)
        assert weight_bytes(network_from(config), Scheme.parse(name)) == model.nbytes


def test_distinct_experts():
    assert distinct_experts(8, 2, 1) == pytest.approx(2)
    assert distinct_experts(8, 2, 4) == pytest.approx(8 * (1 - 0.75**4))
    assert distinct_experts(8, 2, 1000) == pytest.approx(8)


def test_unknown_networks_are_named_with_what_is_known():
    with pytest.raises(UnsupportedError, match=r"mamba.*hidden_size.*lowbit runs .*llama"):
        network_from({"model_type": "mamba", "hidden_size": 8})
    other = network_from({**LLAMA_2_7B, "model_type": "newkind", "architectures": ["NewForCausalLM"]})
    assert not other.runs and "newkind" in other.notes[0]
    assert other.matrix_weights == network(LLAMA_2_7B).matrix_weights
    with pytest.raises(CheckpointError, match="JSON object"):
        network_from([1])


def test_a_config_file_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    assert (
        read_network(tmp_path).parameters == read_network(tmp_path / "config.json").parameters == 134_515_008
    )
