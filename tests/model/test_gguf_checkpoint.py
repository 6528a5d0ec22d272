"""GGUF files as checkpoints: names, row order, description and refusals, held against transformers."""

import dataclasses
import json

import numpy as np
import pytest

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.config import from_transformers
from lowbit.model.gguf_names import GLOBAL_TENSORS, LAYER_TENSORS
from lowbit.model.rope import inverse_frequencies
from lowbit.model.sources import unpermuted_rows

from .gguf_bytes import model_bytes, pair

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH, VOCAB = 4, 2, 16, 64, 96, 50
LAYERS = 2


def permuted(weight, heads):
    """llama.cpp's converter: the two halves of each head interleaved."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def canonical_name(name):
    """Of a tensor that lies alone."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.{parts[3]}"
    return f"{GLOBAL_TENSORS[parts[0]]}.{parts[1]}"


def metadata(arch="llama", **changes):
    values = {
        "block_count": ("u32", LAYERS),
        "context_length": ("u32", 128),
        "embedding_length": ("u32", HIDDEN),
        "feed_forward_length": ("u32", WIDTH),
        "attention.head_count": ("u32", HEADS),
        "attention.head_count_kv": ("u32", KV_HEADS),
        "attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        "rope.freq_base": ("f32", 10000.0),
        "rope.dimension_count": ("u32", HEAD_DIM),
        **changes,
    }
    pairs = [pair("general.architecture", "str", arch)]
    return pairs + [pair(f"{arch}.{key}", *value) for key, value in values.items() if value is not None]


def network(arch="llama", tied=False, bias=False):
    """(tensors under canonical names, the same as the file holds them)."""
    rng = np.random.default_rng(5)
    shapes = {
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM), "ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN),
        "ffn_down": (HIDDEN, WIDTH),
    }  # fmt: skip
    if arch == "qwen3":
        shapes |= {"attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,)}
    if arch == "bitnet":
        shapes |= {"attn_sub_norm": (HIDDEN,), "ffn_sub_norm": (WIDTH,)}
    stored = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        stored["output.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        stored |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        if bias:
            stored |= {
                f"blk.{layer}.{name}.bias": shapes[name][:1] for name in ("attn_q", "attn_k", "attn_v")
            }
    plain = {
        canonical_name(name): rng.normal(size=shape).astype(np.float32) for name, shape in stored.items()
    }
    file = {}
    for name in stored:
        array = plain[canonical_name(name)]
        if arch in ("llama", "smollm3") and (".attn_q." in name or ".attn_k." in name):
            array = permuted(array, HEADS if ".attn_q." in name else KV_HEADS)
        file[name] = (0, array)
    return plain, file


@pytest.fixture
def opened(tmp_path):
    def open_bytes(pairs, tensors):
        path = tmp_path / "model.gguf"
        path.write_bytes(model_bytes(pairs, tensors))
        return open_checkpoint(path)

    return open_bytes


def test_row_order_undoes_the_converter(rng):
    for heads, head_dim in ((1, 2), (3, 8), (5, 64)):
        weight = rng.normal(size=(heads * head_dim, 7))
        stored = permuted(weight, heads)
        np.testing.assert_array_equal(stored[unpermuted_rows(len(weight), heads)], weight)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "smollm3", "bitnet"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_under_canonical_names(opened, arch, tied):
    plain, file = network(arch, tied, bias=arch == "qwen2")
    with opened(metadata(arch), file) as checkpoint:
        assert checkpoint.kind == "gguf" and set(checkpoint.names()) == set(plain)
        assert checkpoint.config.tied == tied and checkpoint.config.family == arch
        for name, array in plain.items():
            assert checkpoint.shape(name) == array.shape and checkpoint.dtype(name) == "F32"
            np.testing.assert_array_equal(checkpoint.read(name), array)
            if array.ndim == 2:
                matrix = checkpoint.matrix(name)
                np.testing.assert_array_equal(matrix.dequantize(), array)
                kept = matrix, array
        values = checkpoint.read("model.norm.weight")
        values[0] = 9.0  # fresh, not a view of the file
    np.testing.assert_array_equal(kept[0].dequantize(), kept[1])  # outlives the file


def test_quantized_rows_are_put_in_order(opened, rng):
    """Q4_1 and Q8_0 query rows: whole rows of blocks move, nothing is decoded."""
    _, file = network("llama")
    blocks = rng.integers(0, 60, (HEADS * HEAD_DIM, HIDDEN // 32 * 20), dtype=np.uint8)
    file["blk.0.attn_q.weight"] = (3, blocks)
    with opened(metadata(), file) as checkpoint:
        name = "model.layers.0.self_attn.q_proj.weight"
        assert checkpoint.dtype(name) == "Q4_1"
        matrix = checkpoint.matrix(name)
        np.testing.assert_array_equal(matrix.dequantize(), checkpoint.read(name))
        from lowbit.model.gguf_types import TENSOR_TYPES, decode

        stored = decode(blocks.reshape(-1), TENSOR_TYPES[3]).reshape(-1, HIDDEN)
        np.testing.assert_array_equal(permuted(matrix.dequantize(), HEADS), stored)


def test_description_equals_config_json(opened):
    """Every field of the description equals the one read from the config.json of the same network."""
    cases = {
        "llama": {"model_type": "llama"},
        "qwen2": {"model_type": "qwen2", "num_key_value_heads": KV_HEADS},
        "qwen3": {"model_type": "qwen3", "head_dim": HEAD_DIM},
        "smollm3": {"model_type": "smollm3", "rope_theta": 10000.0},
        "bitnet": {"model_type": "bitnet", "hidden_act": "silu", "rope_theta": 10000.0},
    }
    common = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
        "rms_norm_eps": float(np.float32(1e-5)), "tie_word_embeddings": False,
    }  # fmt: skip
    for arch, fields in cases.items():
        with opened(metadata(arch), network(arch)[1]) as checkpoint:
            wanted = from_transformers({**common, **fields})
            assert dataclasses.asdict(checkpoint.config) == dataclasses.asdict(wanted)


def test_head_dim_biases_and_window(opened):
    pairs = metadata(
        **{"attention.key_length": ("u32", 16), "attention.value_length": ("u32", 16)},
        **{"attention.sliding_window": ("u32", 33)},
    )
    with opened(pairs, network()[1]) as checkpoint:
        assert checkpoint.config.family == "mistral" and checkpoint.config.windows == (33, 33)
    with opened(metadata(), network(bias=True)[1]) as checkpoint:
        assert checkpoint.config.qkv_bias
    with opened(metadata(feed_forward_length=("[u32]", [WIDTH, WIDTH])), network()[1]) as checkpoint:
        assert checkpoint.config.intermediate_size == WIDTH


def test_rope_scalings(opened):
    linear = {"rope.scaling.type": ("str", "linear"), "rope.scaling.factor": ("f32", 4.0)}
    yarn = {
        "rope.scaling.type": ("str", "yarn"),
        "rope.scaling.factor": ("f32", 4.0),
        "rope.scaling.original_context_length": ("u32", 32),
        "rope.scaling.yarn_beta_fast": ("f32", 16.0),
    }
    file = network()[1]
    with opened(metadata(**linear), file) as checkpoint:
        assert (checkpoint.config.rope.kind, checkpoint.config.rope.factor) == ("linear", 4.0)
    with opened(metadata(**yarn), file) as checkpoint:
        rope = checkpoint.config.rope
        assert (rope.kind, rope.factor, rope.original_max_position, rope.beta_fast) == ("yarn", 4.0, 32, 16.0)
        _, factor = inverse_frequencies(checkpoint.config, 128)
    with opened(metadata(**yarn, **{"rope.scaling.yarn_attn_factor": ("f32", 0.5)}), file) as checkpoint:
        assert inverse_frequencies(checkpoint.config, 128)[1] == pytest.approx(factor / 2)
    with opened(metadata(**{"rope.scaling.type": ("str", "none")}), file) as checkpoint:
        assert checkpoint.config.rope.kind == "default"


def test_llama3_factors_are_its_scaling(opened):
    """rope_freqs as the converter computes it gives the frequencies of the config.json it came from."""
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    _, file = network()
    with opened(metadata(), file) as checkpoint:
        plain = checkpoint.config
        fast, _ = inverse_frequencies(plain, 128)
    wanted_config = from_transformers(
        {
            "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDTH,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 128, "rope_scaling": llama3,
        }
    )  # fmt: skip
    wanted, _ = inverse_frequencies(wanted_config, 128)
    factors = (fast / wanted).astype(np.float32)
    with opened(metadata(), {**file, "rope_freqs.weight": (0, factors)}) as checkpoint:
        assert "rope_freqs.weight" not in checkpoint.names()
        got, _ = inverse_frequencies(checkpoint.config, 128)
    np.testing.assert_allclose(got, wanted, rtol=2e-7)
    with pytest.raises(UnsupportedError, match="one at a time"):
        linear = {"rope.scaling.type": ("str", "linear"), "rope.scaling.factor": ("f32", 4.0)}
        _ = opened(metadata(**linear), {**file, "rope_freqs.weight": (0, factors)}).config


REFUSED = {
    "soft cap": ({"attn_logit_softcapping": ("f32", 30.0)}, "attn_logit_softcapping"),
    "parallel": ({"use_parallel_residual": ("bool", 1)}, "use_parallel_residual=True"),
    "scaling": ({"rope.scaling.type": ("str", "su")}, "none, linear, yarn and longrope"),
    "partial rotation": ({"rope.dimension_count": ("u32", 8)}, "rope.dimension_count=8 with heads of 16"),
    "per layer": ({"attention.head_count_kv": ("[u32]", [2, 1])}, "one number for all layers"),
    "value length": ({"attention.value_length": ("u32", 8)}, "value_length=8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_lowbit_cannot_run_is_named(opened, case):
    changes, message = REFUSED[case]
    with pytest.raises(UnsupportedError, match=message):
        _ = opened(metadata(**changes), network()[1]).config


def test_neutral_keys_are_accepted(opened):
    changes = {"expert_count": ("u32", 0), "attention.causal": ("bool", 1), "logit_scale": ("f32", 1.0)}
    assert opened(metadata(**changes), network()[1]).config.family == "llama"


def test_missing_numbers_are_named(opened):
    for key in ("embedding_length", "block_count", "attention.head_count", "feed_forward_length"):
        with pytest.raises(CheckpointError, match=r"missing|must be"):
            _ = opened(metadata(**{key: None}), network()[1]).config


def test_unknown_architecture_and_tensors(opened):
    _, file = network()
    with pytest.raises(UnsupportedError, match=r"general\.architecture is 'opt'; lowbit runs llama, qwen2"):
        opened(metadata("opt"), file)
    with pytest.raises(
        UnsupportedError, match=r"1 tensors have no place in this network: blk\.0\.ffn_gate_inp"
    ):
        opened(
            metadata(), {**file, "blk.0.ffn_gate_inp_x.weight": (0, np.zeros((2, 32), np.float32))}
        ).names()
    del file["token_embd.weight"]
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is missing"):
        _ = opened(metadata(), file).config
    checkpoint = opened(metadata(), network()[1])
    with pytest.raises(CheckpointError, match="no tensor 'x'; it has 21 tensors"):
        checkpoint.read("x")
    with pytest.raises(CheckpointError, match="a matrix has two dimensions"):
        checkpoint.matrix("model.norm.weight")
    assert checkpoint.tokenizer() is None


def test_converter_agrees(tmp_path, shared_data):
    """stories15M written by hand as the converter would gives back its own tensors."""
    folder = shared_data("weights/stories15M/config.json").parent
    fields = json.loads((folder / "config.json").read_text())
    with open_checkpoint(folder) as source:
        file = {}
        inverse = {value: key for key, value in LAYER_TENSORS.items()}
        for name in source.names():
            parts = name.split(".")
            if parts[1] == "layers":
                short = f"blk.{parts[2]}.{inverse['.'.join(parts[3:-1])]}.weight"
            else:
                short = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight"
            array = source.read(name)
            if "attn_q" in short or "attn_k" in short:
                array = permuted(array, fields["num_attention_heads"])
            file[short] = (0, array)
        sizes = {
            "block_count": fields["num_hidden_layers"], "embedding_length": fields["hidden_size"],
            "feed_forward_length": fields["intermediate_size"], "context_length": 256,
            "attention.head_count": 6, "attention.head_count_kv": 6, "rope.dimension_count": 48,
        }  # fmt: skip
        path = tmp_path / "stories.gguf"
        path.write_bytes(model_bytes(metadata(**{key: ("u32", value) for key, value in sizes.items()}), file))
        with open_checkpoint(path) as copy:
            assert copy.config.tied
            for name in source.names():
                np.testing.assert_array_equal(copy.read(name), source.read(name))
