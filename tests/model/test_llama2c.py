"""Files of llama2.c against transformers and against its own formulas; the published models tell stories."""

import random
import struct

import numpy as np
import pytest

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.loader import load_model
from lowbit.model.reference import reference_logits

from . import llama2c_bytes as files
from .fuzz_seeds import mutate_bytes
from .test_fuzz_readers import exercise

MAKERS = {
    "legacy": files.legacy,
    "version 1": files.plain,
    "version 2": lambda numbers, weights: files.grouped(numbers, weights, 32),
    "ternary": files.ternary,
}


PLAIN = {
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "ffn.1": "mlp.gate_proj",
    "ffn.2": "mlp.down_proj",
    "ffn.3": "mlp.up_proj",
}


def write(folder, raw, vocabulary=270):
    (folder / "model.bin").write_bytes(raw)
    (folder / "tokenizer.bin").write_bytes(files.tokenizer(vocabulary))
    return folder / "model.bin"


def transformers_logits(numbers, weights, tokens):
    """Logits of transformers' Llama with these weights; its queries and keys have halves, not pairs."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = numbers
    config = transformers.LlamaConfig(
        hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=positions,
        rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings="head" not in weights,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()

    def halves(matrix, count):
        return matrix.reshape(count, -1, 2, dim).swapaxes(1, 2).reshape(matrix.shape)

    state = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["norm"]}
    state["lm_head.weight"] = weights.get("head", weights["embedding"])
    for layer in range(layers):
        at = f"model.layers.{layer}."
        state[at + "input_layernorm.weight"] = weights["attn.norm"][layer]
        state[at + "post_attention_layernorm.weight"] = weights["ffn.norm"][layer]
        state[at + "self_attn.q_proj.weight"] = halves(weights["attn.q"][layer], heads)
        state[at + "self_attn.k_proj.weight"] = halves(weights["attn.k"][layer], kv_heads)
        for ours, theirs in PLAIN.items():
            state[f"{at}{theirs}.weight"] = weights[ours][layer]
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in state.items()})
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def our_logits(path, tokens):
    """(of the NumPy reference, of the native decoder)"""
    with open_checkpoint(path) as checkpoint:
        weights = {name: checkpoint.read(name) for name in checkpoint.names()}
        reference = reference_logits(checkpoint.config, weights, tokens)
    model = load_model(path, activations="int16", kv_bits=16)
    return reference, model.decoder.logits(
        np.array(tokens, np.int32), [model.cache(len(tokens))], [len(tokens)], all=True
    )


def close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.interop(type="llama2.c float32, versions 0 and 1", direction="read", against="transformers")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "head"])
@pytest.mark.parametrize("kind", ["legacy", "version 1"])
def test_floats(kind, tied, tmp_path, rng):
    numbers, weights = files.random_weights(rng, tied=tied)
    path = write(tmp_path, MAKERS[kind](numbers, weights))
    tokens = rng.integers(0, 270, 20).tolist()
    expected = transformers_logits(numbers, weights, tokens)
    reference, native = our_logits(path, tokens)
    close(reference, expected, 2e-5)
    close(native, expected, 5e-3)  # keys and values of 16 bits


@pytest.mark.interop(type="llama2.c Q8_0, version 2", direction="read", against="its arithmetic, in NumPy")
@pytest.mark.parametrize("group, kinds", [(32, {"codes"}), (64, {"codes"}), (8, {"floats"})])
def test_groups_of_8_bits(group, kinds, tmp_path, rng):
    """Groups of 64 in rows of 96 are cut into pieces of 32; groups of 8 fit no kernel: plain floats."""
    numbers, weights = files.random_weights(rng, vocabulary=276, tied=False)
    numbers = (*numbers[:5], 276, numbers[6])
    path = write(tmp_path, files.grouped(numbers, weights, group), 276)
    for name in (*files.MATRICES, "embedding", "head"):
        for matrix in weights[name] if name in files.MATRICES else [weights[name]]:
            codes, scales = files.q80(matrix, group)
            matrix[:] = (codes.reshape(-1, group) * scales[:, None]).reshape(matrix.shape)
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight"), weights["embedding"])
        np.testing.assert_array_equal(
            checkpoint.read("model.layers.1.mlp.down_proj.weight"), weights["ffn.2"][1]
        )
        found = {term.kind for term in checkpoint.matrix("model.layers.1.mlp.down_proj.weight").terms}
        assert found == kinds
    tokens = rng.integers(0, 276, 12).tolist()
    reference, native = our_logits(path, tokens)
    close(reference, transformers_logits(numbers, weights, tokens), 2e-5)
    close(native, reference, 5e-3)


def bit_forward(numbers, weights, tokens):
    """runbit.c in float64, without rounding activations to 8 bits."""
    dim, _, layers, heads, kv_heads, _, _ = numbers
    size, x = dim // heads, weights["embedding"][tokens].astype(np.float64)

    def norm(a):
        return a / np.sqrt(np.mean(a * a, axis=-1, keepdims=True)) / a.shape[-1]

    def turn(a):
        pairs = a.reshape(len(tokens), -1, size // 2, 2)
        angle = np.arange(len(tokens))[:, None] / 10000.0 ** (np.arange(0, size, 2) / size)
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        first, second = pairs[..., 0], pairs[..., 1]
        return np.stack([first * c - second * s, first * s + second * c], axis=-1).reshape(
            len(tokens), -1, size
        )

    for layer in range(layers):
        w = {name: weights[name][layer].astype(np.float64).T for name in files.MATRICES}
        h = norm(x)
        q, k = turn(h @ w["attn.q"]), turn(h @ w["attn.k"])
        v = (h @ w["attn.v"]).reshape(len(tokens), kv_heads, size)
        k, v = np.repeat(k, heads // kv_heads, axis=1), np.repeat(v, heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores[:, np.triu(np.ones((len(tokens),) * 2, bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", p / p.sum(axis=-1, keepdims=True), v).reshape(len(tokens), dim)
        x = x + norm(mixed) @ w["attn.o"]
        h = norm(x)
        gate = h @ w["ffn.1"]
        x = x + norm(gate / (1 + np.exp(-gate)) * (h @ w["ffn.3"])) @ w["ffn.2"]
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weights["norm"]
    return x @ weights["embedding"].T


@pytest.mark.interop(type="bitllama2.c ternary", direction="read", against="its formulas, in NumPy")
def test_ternary(tmp_path, rng):
    numbers, weights = files.random_weights(rng)
    path = write(tmp_path, files.ternary(numbers, weights))
    tokens = rng.integers(0, 270, 20).tolist()
    expected = bit_forward(numbers, weights, tokens)
    reference, native = our_logits(path, tokens)
    close(reference, expected, 1e-4)
    close(native, expected, 1e-2)
    with open_checkpoint(path) as checkpoint:
        matrix = checkpoint.matrix("model.layers.0.mlp.up_proj.weight")
        assert matrix.terms[0].packing == "base3"
        np.testing.assert_array_equal(matrix.dequantize(), weights["ffn.3"][0])


def test_the_tokenizer_is_found_by_its_size(tmp_path, rng):
    numbers, weights = files.random_weights(rng)
    path = write(tmp_path, files.legacy(numbers, weights))
    with open_checkpoint(path) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        assert tokenizer.encode("ab a") == [1, 264, 263]
        assert tokenizer.decode(tokenizer.encode("ab a\u00e9\n")) == "ab a\u00e9\n"
        assert checkpoint.config.eos_ids == (1, 2)
    (tmp_path / "tokenizer.bin").rename(tmp_path / "mytok270.bin")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tokenizer().encode("ab a") == [1, 264, 263]
    (tmp_path / "mytok270.bin").write_bytes(files.tokenizer(271))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tokenizer() is None


def test_other_files_are_refused_by_what_they_are(tmp_path, rng):
    numbers, weights = files.random_weights(rng)
    raw = files.plain(numbers, weights)
    cases = [
        (raw[:4] + struct.pack("<i", 3) + raw[8:], UnsupportedError, "version 3; lowbit reads 0, 1 and 2"),
        (raw[:-4], CheckpointError, r"but a llama2.c file of these sizes has \d+ \(F32\) or \d+ \(ternary\)"),
        (raw + b"\0", CheckpointError, "cut off, damaged"),
        (raw[:100], CheckpointError, "the header has 256"),
        (raw[:36] + b"\7" + raw[37:], CheckpointError, "the flag of a shared head is 7"),
        (files.legacy(numbers, weights)[:-1], CheckpointError, "no whole llama2.c file"),
        (b"\x80\x04\x95" + bytes(300), CheckpointError, "pickled weights may run code"),
    ]
    for content, error, named in cases:
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(error, match=named):
            open_checkpoint(tmp_path / "x.bin")
    bad = bytearray(files.ternary(numbers, weights))
    bad[-1] = 0b10
    (tmp_path / "y.bin").write_bytes(bad)
    with (
        open_checkpoint(tmp_path / "y.bin") as checkpoint,
        pytest.raises(CheckpointError, match="a code of 2"),
    ):
        checkpoint.matrix("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("kind", MAKERS)
def test_mutated_files(kind, tmp_path, rng):
    numbers, weights = files.random_weights(rng, 32, 64, 1, 2, 1, 270, 16)
    seed, tokens = MAKERS[kind](numbers, weights), files.tokenizer(270)
    assert exercise(write(tmp_path, seed))
    for case in range(60):
        chance = random.Random(case)
        folder = tmp_path / str(case % 2)
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.bin").write_bytes(mutate_bytes(tokens, chance) if case % 3 == 0 else tokens)
        changed = bytearray(seed)
        for _ in range(chance.randint(1, 4)):  # the size stays, or nothing would be opened
            changed[chance.randrange(len(changed) if chance.random() < 0.5 else 64)] = chance.randrange(256)
        (folder / "model.bin").write_bytes(mutate_bytes(seed, chance) if case % 4 == 0 else bytes(changed))
        exercise(folder / "model.bin")


@pytest.mark.parametrize("name", ["stories260K.bin", "bitllama2c_1M_msbfirst.bin"])
def test_published_models_tell_stories(name, shared_data):
    path = shared_data(f"weights/{name}")
    model = load_model(path)
    ids = model.tokenizer.encode("Once upon a time, there was a little girl named")
    cache, text = model.cache(), list(ids)
    for _ in range(50):
        logits = model.decoder.logits(
            np.array(text[cache.length :], np.int32), [cache], [len(text) - cache.length]
        )
        text.append(int(np.argmax(logits[-1])))
    story = model.tokenizer.decode(text)
    assert "Lily" in story and "She loved to play" in story
    scores = load_model(path).decoder.logits(np.array(text, np.int32), [model.cache()], [len(text)], all=True)
    shifted = (
        scores
        - np.log(np.exp(scores - scores.max(1, keepdims=True)).sum(1, keepdims=True))
        - scores.max(1, keepdims=True)
    )
    assert -shifted[np.arange(len(text) - 1), text[1:]].mean() < 1.0  # nats per token of its own text
