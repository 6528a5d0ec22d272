"""A whole small model stored in each type of GGUF gives the logits of the same weights as floats."""

import numpy as np
import pytest

from lowbit.model.gguf_types import TENSOR_TYPES, decode
from lowbit.model.loader import load_model

from .gguf_bytes import model_bytes, pair
from .test_gguf_types import HALVES

QUANTIZED = [kind for kind in TENSOR_TYPES.values() if kind.split is not None]
TOLERANCE = 5e-3  # of the deviation of logits; keys and values in fp16 that round the other way: up to 2.4e-3
HEADS, HEAD_DIM, HIDDEN, WIDTH, VOCAB = 4, 64, 256, 512, 40
SHAPES = {
    "token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN), "blk.0.attn_q": (HIDDEN, HIDDEN),
    "blk.0.attn_k": (HIDDEN, HIDDEN), "blk.0.attn_v": (HIDDEN, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN),
    "blk.0.ffn_gate": (WIDTH, HIDDEN), "blk.0.ffn_up": (WIDTH, HIDDEN), "blk.0.ffn_down": (HIDDEN, WIDTH),
}  # fmt: skip


def metadata():
    values = {
        "block_count": 1, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": WIDTH,
        "attention.head_count": HEADS, "attention.head_count_kv": HEADS, "rope.dimension_count": HEAD_DIM,
    }  # fmt: skip
    pairs = [pair("general.architecture", "str", "llama")]
    pairs += [pair(f"llama.{key}", "u32", value) for key, value in values.items()]
    return [*pairs, pair("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5)]


def random_blocks(rng, kind, shape):
    """Blocks of any codes and factors whose weights have a deviation of about 1/16."""
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // kind.block, kind.nbytes), dtype=np.uint8)
    if kind.name == "TQ2_0":
        blocks[:, :64] &= 0x55
    if kind.name == "MXFP4":
        blocks[:, 0] = rng.integers(120, 124, len(blocks))
    elif kind.name == "NVFP4":
        blocks[:, :4] = rng.integers(0x08, 0x18, (len(blocks), 4))
    elif kind.name == "IQ1_M":
        blocks[:, 49:57:2] = blocks[:, 49:57:2] & 15 | np.array([0, 0x10, 0x40, 0x20], np.uint8)
    else:
        for at in HALVES[kind.name]:
            blocks[:, at : at + 2] = np.float16([2.0**-4]).view(np.uint8)
    spread = decode(blocks.reshape(-1), kind).std()
    for at in HALVES[kind.name]:
        blocks[:, at : at + 2] = np.float16([2.0**-8 / spread]).view(np.uint8)
    return blocks


def model_files(folder, kind, rng):
    """(the model in blocks of `kind`, the same weights as F32)."""
    norms = {
        name: (0, np.ones(HIDDEN, np.float32)) for name in ("output_norm.weight", "blk.0.attn_norm.weight")
    }
    norms["blk.0.ffn_norm.weight"] = (0, np.ones(HIDDEN, np.float32))
    small, plain = dict(norms), dict(norms)
    for name, shape in SHAPES.items():
        blocks = random_blocks(rng, kind, shape)
        small[f"{name}.weight"] = (kind.number, blocks.reshape(shape[0], -1))
        plain[f"{name}.weight"] = (0, decode(blocks.reshape(-1), kind).reshape(shape))
    paths = folder / f"{kind.name}.gguf", folder / "floats.gguf"
    for path, tensors in zip(paths, (small, plain)):
        path.write_bytes(model_bytes(metadata(), tensors))
    return paths


def logits(path):
    """Of each position; activations have 16 bits, so that weights are all that could differ."""
    model = load_model(path, activations="int16")
    ids = (np.arange(17) * 7 % VOCAB).astype(np.int32)
    return model, model.decoder.logits(ids, [model.cache()], [len(ids)], all=True)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_same_logits_as_floats(kind, tmp_path, rng):
    small, plain = model_files(tmp_path, kind, rng)
    model, got = logits(small)
    _, want = logits(plain)
    assert want.std() > 0.1
    assert np.abs(got - want).max() < TOLERANCE * want.std()
    assert model.bits_per_weight < kind.run_bits + 1  # vectors, levels and padding of rows come on top
    raw = np.fromfile(small, np.uint8)
    raw[-4096:] ^= 1  # the test can fail: the lowest bits of some rows of the last matrix
    small.write_bytes(raw.tobytes())
    assert np.abs(logits(small)[1] - want).max() > 5 * TOLERANCE * want.std()
