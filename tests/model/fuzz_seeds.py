"""Small, whole checkpoints of every kind and the mutations that damage them; for tests only."""

from __future__ import annotations

import copy
import json
import random
import struct
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from lowbit.model.detokenizer import byte_alphabet
from lowbit.packed import TensorWriter
from lowbit.quantize import quantize_array

from .gguf_bytes import model_bytes, pair

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "eos_token_id": [2, 3],
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (40, 32),
    LAYER + "self_attn.q_proj.weight": (32, 32),
    LAYER + "self_attn.k_proj.weight": (16, 32),
    LAYER + "mlp.down_proj.weight": (32, 64),
    "model.norm.weight": (32,),
}


def gguf_model(sentencepiece: bool = False) -> bytes:
    """One layer in F32, Q4_0, Q4_1 and Q8_0, with a vocabulary of either kind."""
    rng = np.random.default_rng(2)
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64}
    numbers |= {"attention.head_count": 2, "attention.head_count_kv": 1}
    pairs = [pair("general.architecture", "str", "llama"), pair("general.alignment", "u32", 32)]
    pairs += [pair(f"llama.{key}", "u32", value) for key, value in numbers.items()]
    pairs += [pair("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5)]
    key = "tokenizer.ggml."
    if sentencepiece:
        tokens = [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "▁",
            "a",
            "▁a",
            "b",
            "ab",
        ]
        pairs += [pair(key + "model", "str", "llama"), pair(key + "tokens", "[str]", tokens)]
        pairs += [pair(key + "scores", "[f32]", [-float(i) for i in range(len(tokens))])]
        pairs += [pair(key + "token_type", "[i32]", [2, 3, 3] + [6] * 256 + [1] * 5)]
        pairs += [pair(key + "add_bos_token", "bool", 1)]
    else:
        tokens = [*byte_alphabet(), "ab", "abc", "<bos>", "<eos>"]
        pairs += [pair(key + "model", "str", "gpt2"), pair(key + "pre", "str", "smollm")]
        pairs += [pair(key + "tokens", "[str]", tokens), pair(key + "merges", "[str]", ["a b", "ab c"])]
        pairs += [pair(key + "token_type", "[i32]", [1] * 258 + [3, 3])]
    pairs += [pair(key + "bos_token_id", "u32", 1), pair(key + "eos_token_id", "u32", 2)]
    pairs += [pair("tokenizer.chat_template", "str", "{% for m in messages %}{{ m.content }}{% endfor %}")]
    tensors = {
        "token_embd.weight": (8, rng.integers(0, 64, (40, 34), dtype=np.uint8)),
        "blk.0.attn_q.weight": (3, rng.integers(0, 64, (32, 20), dtype=np.uint8)),
        "blk.0.attn_k.weight": (2, rng.integers(0, 64, (16, 18), dtype=np.uint8)),
        "blk.0.ffn_down.weight": (0, rng.normal(size=(32, 64)).astype(np.float32)),
        "output_norm.weight": (0, np.ones(32, np.float32)),
    }
    return model_bytes(pairs, tensors)


def safetensors_bytes(entries: dict, data: bytes, length: int | None = None) -> bytes:
    """A file with any header at all; `length` may lie about the header's."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def float_file(names: list[str]) -> bytes:
    rng = np.random.default_rng(3)
    entries, data = {}, b""
    for name in names:
        raw = rng.normal(size=SHAPES[name]).astype("<f4").tobytes()
        entries[name] = {
            "dtype": "F32",
            "shape": list(SHAPES[name]),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return safetensors_bytes(entries, data)


def _tokenizer_files() -> dict[str, bytes]:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "</s>": 3}, "[UNK]"))
    config = {"eos_token": {"content": "</s>"}, "chat_template": "{{ messages[0].content }}"}
    return {"tokenizer.json": words.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def transformers_directory() -> dict[str, bytes]:
    """Two shards with their index, description and tokenizer: name -> content."""
    names = list(SHAPES)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    places = {name: shard for shard, held in shards.items() for name in held}
    files = {shard: float_file(held) for shard, held in shards.items()}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    files["config.json"] = json.dumps(CONFIG).encode()
    files["generation_config.json"] = json.dumps({"eos_token_id": 2}).encode()
    return files | _tokenizer_files()


def lowbit_directory(folder: Path) -> dict[str, bytes]:
    """Packed matrices of several kinds and a plain norm; `folder` is used for writing it once."""
    rng = np.random.default_rng(4)
    metas, arrays = {}, {"model.norm.weight": np.ones(32, np.float32)}
    matrices = [(name, shape) for name, shape in SHAPES.items() if len(shape) == 2]
    for number, (name, shape) in enumerate(matrices):
        format = ("int4-g32", "int4-g16-m4", "ternary")[number % 3]
        weight = rng.standard_normal(shape).astype(np.float32)
        metas[name], state = quantize_array(weight, format).state()
        arrays |= {f"{name}.{key}": array for key, array in state.items()}
    path = folder / "seed.safetensors"
    with TensorWriter(path, {name: (array.dtype, array.shape) for name, array in arrays.items()}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    details = {"version": 1, "format": "lowbit", "scheme": {}, "method": "rtn", "tensors": metas}
    files = {"model.safetensors": path.read_bytes(), "lowbit.json": json.dumps(details).encode()}
    return files | {"config.json": json.dumps(CONFIG).encode()} | _tokenizer_files()


_INTEGERS = (0, 1, 2, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def mutate_bytes(raw: bytes, random: random.Random) -> bytes:
    """One to four of: cut, flip bits, hostile integers, remove, repeat, move and overwrite pieces."""
    data = bytearray(raw)
    for _ in range(random.randint(1, 4)):
        if len(data) < 8:
            break
        # Headers are where structure is: half of the damage goes to the first eighth.
        limit = len(data) if random.random() < 0.5 else max(8, len(data) // 8)
        at = random.randrange(limit)
        kind = random.randrange(7)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            for _ in range(random.randint(1, 8)):
                data[random.randrange(limit)] ^= 1 << random.randrange(8)
        elif kind == 2:
            size = random.choice((1, 4, 8))
            value = random.choice(_INTEGERS) % (1 << 8 * size)
            data[at : at + size] = value.to_bytes(size, "little")
        elif kind == 3:
            del data[at : at + random.randint(1, 64)]
        elif kind == 4:
            piece = data[at : at + random.randint(1, 64)]
            data[at:at] = piece * random.randint(1, 4)
        elif kind == 5:
            piece = data[at : at + 16]
            to = random.randrange(limit)
            data[to : to + len(piece)] = piece
        else:
            data[at : at + 8] = bytes(random.randrange(256) for _ in range(8))
    return bytes(data)


_HOSTILE: list = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1e308, -0.5, float("nan"), float("inf")),
    *("", "x", "\0", "../../etc/passwd", "a" * 5000, "Infinity", "F32", "BF16", "U8", "codes", "floats"),
    *("fp16", "yarn", "llama3", [], {}, [1], [-1] * 50, [[1]], {"a": 1}, {"": None}, [0, 2**62], [5, 3]),
]


def _hostile_value(random: random.Random):
    deep: list = []
    for _ in range(500):
        deep = [deep]
    return copy.deepcopy(random.choice(_HOSTILE)) if random.random() < 0.97 else deep


def mutate_json(raw: bytes, random: random.Random) -> bytes:
    """Replace, remove, rename or copy entries anywhere in the tree."""
    value = json.loads(raw)
    for _ in range(random.randint(1, 3)):
        places = _places(value)
        if not places:
            break
        holder, key = random.choice(places)
        kind = random.randrange(5)
        if kind < 3:
            holder[key] = _hostile_value(random)
        elif kind == 3:
            del holder[key]
        elif isinstance(holder, dict):
            holder[str(key) + random.choice(("", ".0.codes", "x", "\u2028"))] = holder.pop(key)
        else:
            holder.append(holder[key])
    try:
        return json.dumps(value).encode()
    except RecursionError:  # one deep value within another
        return b"[" * 5000


def _places(value) -> list[tuple]:
    found, waiting = [], [value]
    while waiting:
        holder = waiting.pop()
        items = (
            holder.items()
            if isinstance(holder, dict)
            else enumerate(holder)
            if isinstance(holder, list)
            else ()
        )
        for key, item in items:
            found.append((holder, key))
            waiting.append(item)
    return found


def mutate_safetensors(raw: bytes, random: random.Random) -> bytes:
    """Damage the header as JSON, keeping its length right, or the bytes."""
    if random.random() < 0.4:
        return mutate_bytes(raw, random)
    (length,) = struct.unpack("<Q", raw[:8])
    return safetensors_bytes(mutate_json(raw[8 : 8 + length], random), raw[8 + length :])
