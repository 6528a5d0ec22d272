"""Files of llama2.c from arrays, after its export.py and bitllama2.c's: for tests only."""

import struct

import numpy as np

MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.1", "ffn.2", "ffn.3")


def random_weights(
    rng, dim=64, hidden=96, layers=2, heads=4, kv_heads=2, vocabulary=270, positions=64, tied=True
):
    """(header numbers, name -> float32 array) of a network; matrices [layers, out, in]."""
    kv = dim // heads * kv_heads
    shapes = dict(zip(MATRICES, [(dim, dim), (kv, dim), (kv, dim), (dim, dim)], strict=False))
    shapes |= {"ffn.1": (hidden, dim), "ffn.2": (dim, hidden), "ffn.3": (hidden, dim)}
    weights = {name: rng.standard_normal((layers, *shape)) * 0.15 for name, shape in shapes.items()}
    for name in ("attn.norm", "ffn.norm"):
        weights[name] = 1 + 0.2 * rng.standard_normal((layers, dim))
    weights["norm"] = 1 + 0.2 * rng.standard_normal(dim)
    weights["embedding"] = rng.standard_normal((vocabulary, dim))
    if not tied:
        weights["head"] = rng.standard_normal((vocabulary, dim)) * 0.3
    numbers = (dim, hidden, layers, heads, kv_heads, vocabulary, positions)
    return numbers, {name: array.astype(np.float32) for name, array in weights.items()}


def legacy(numbers, weights):
    head = list(numbers)
    head[5] *= 1 if "head" not in weights else -1
    rotations = np.full(numbers[6] * numbers[0] // numbers[3], 7, np.float32)
    order = ["embedding", "attn.norm", *MATRICES[:4], "ffn.norm", *MATRICES[4:], "norm"]
    parts = [weights[name] for name in order] + [rotations] + [weights[n] for n in ("head",) if n in weights]
    return struct.pack("<7i", *head) + b"".join(part.tobytes() for part in parts)


def header(version, numbers, tied, group=0):
    head = struct.pack("<Ii7iB", 0x616B3432, version, *numbers, tied)
    return (head + (struct.pack("<i", group) if group else b"")).ljust(256, b"\0")


def plain(numbers, weights):
    order = ["attn.norm", "ffn.norm", "norm", "embedding", *MATRICES, "head"]
    parts = [weights[name].tobytes() for name in order if name in weights]
    return header(1, numbers, "head" not in weights) + b"".join(parts)


def q80(array, group):
    """(int8 [n], float32 [n / group]) of a flat array."""
    flat = array.reshape(-1, group)
    scales = (np.abs(flat).max(axis=1) / 127).astype(np.float32)
    codes = np.rint(flat / np.where(scales, scales, 1)[:, None]).astype(np.int8)
    return codes.reshape(-1), scales


def grouped(numbers, weights, group):
    data = header(2, numbers, "head" not in weights, group)
    data += b"".join(weights[name].tobytes() for name in ("attn.norm", "ffn.norm", "norm"))
    for name in ("embedding", *MATRICES, "head"):
        for matrix in (
            weights.get(name, ()) if name in MATRICES else [weights[n] for n in (name,) if n in weights]
        ):
            codes, scales = q80(matrix, group)
            data += codes.tobytes() + scales.tobytes()
    return data


def ternary(numbers, weights):
    """Also rounds the matrices of `weights` in place to what the file holds."""
    data = header(1, numbers, 1) + weights["norm"].tobytes() + weights["embedding"].tobytes()
    for name in MATRICES:
        for layer, matrix in enumerate(weights[name]):
            scale = np.abs(matrix).mean()
            codes = np.clip(np.rint(matrix / scale), -1, 1).astype(np.int64)
            bits = np.array([3, 0, 1])[codes + 1].reshape(-1, 4)
            packed = (bits << np.array([6, 4, 2, 0])).sum(axis=1).astype(np.uint8)
            data += np.float32(scale).tobytes() + packed.tobytes()
            weights[name][layer] = codes * np.float32(scale)
    return data


def tokenizer(vocabulary):
    """tokenizer.bin of so many tokens: the bytes, a space, and letters and pairs of them."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [" ", "a", "b", "ab", " a", " ab"]
    pieces += [chr(0x100 + i) for i in range(vocabulary - len(pieces))]
    pieces = pieces[:vocabulary]
    data = struct.pack("<i", 6)
    for i, piece in enumerate(pieces):
        raw = piece.encode()
        data += struct.pack("<fi", 0.0 if i < 259 else float(-i), len(raw)) + raw
    return data
