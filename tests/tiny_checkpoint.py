"""A small random Llama as a transformers directory, for tests that need a whole model and no download.

Two layers, 64 wide, one token per byte of UTF-8: its text is noise, in every way that text can be.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 128, 2, 4, 2, 128
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
VOCABULARY = 256 + len(SPECIAL)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tiny_llama(folder: Path, chat: bool = True, tokenizer: bool = True) -> Path:
    """Write the model into `folder` (made here) and return it."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 256,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(), folder / "model.safetensors")
    if tokenizer:
        write_tokenizer(folder, chat)
    return folder


def write_tokenizer(folder: Path, chat: bool = True) -> None:
    """Write a tokenizer of bytes beside any model of at least VOCABULARY tokens."""
    _tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat:
        settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    head = HIDDEN // HEADS

    def matrix(out_features: int, in_features: int) -> np.ndarray:
        return (rng.standard_normal((out_features, in_features)) / in_features**0.5).astype(np.float32)

    # Likely tokens are printable: small rows of the (tied) embedding give small logits.
    embedding = matrix(VOCABULARY, HIDDEN) * 2
    embedding[[i for i in range(VOCABULARY) if not 32 <= i < 127]] *= 0.4
    tensors = {"model.embed_tokens.weight": embedding}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, rows in (
            ("q", HEADS * head),
            ("k", KV_HEADS * head),
            ("v", KV_HEADS * head),
            ("o", HIDDEN),
        ):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = matrix(rows, HIDDEN)
        for name in ("gate", "up"):
            tensors[f"{layer}mlp.{name}_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{layer}mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
        for name in ("input", "post_attention"):
            tensors[f"{layer}{name}_layernorm.weight"] = np.ones(HIDDEN, np.float32)
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    return tensors


def _tokenizer() -> Tokenizer:
    """Byte-level, no merges: token id = byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    names = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={names[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The directory of the small model, with chat template."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """The same without chat template."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base", chat=False)
