"""Write a Llama of any shape with random weights as an F16 GGUF, for speed at sizes that nobody ships.

Speed does not depend on what the weights are, so normal numbers of standard deviation 0.02 (a usual
initialisation) stand in for a trained model. Tensor names and metadata follow the GGUF specification
(ggml docs/gguf.md); `gguf` writes the container. Tensors are made and written one at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

DEVIATION = 0.02
SEED = 20240607


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama. Weights are [out_features, in_features]; the output head is not tied."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 2048

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for _, shape in self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in file order; norms are the one-dimensional ones."""
        kv = self.hidden // self.heads * self.kv_heads
        yield "token_embd.weight", (self.vocab, self.hidden)
        for i in range(self.layers):
            yield f"blk.{i}.attn_norm.weight", (self.hidden,)
            yield f"blk.{i}.attn_q.weight", (self.hidden, self.hidden)
            yield f"blk.{i}.attn_k.weight", (kv, self.hidden)
            yield f"blk.{i}.attn_v.weight", (kv, self.hidden)
            yield f"blk.{i}.attn_output.weight", (self.hidden, self.hidden)
            yield f"blk.{i}.ffn_norm.weight", (self.hidden,)
            yield f"blk.{i}.ffn_gate.weight", (self.intermediate, self.hidden)
            yield f"blk.{i}.ffn_up.weight", (self.intermediate, self.hidden)
            yield f"blk.{i}.ffn_down.weight", (self.hidden, self.intermediate)
        yield "output_norm.weight", (self.hidden,)
        yield "output.weight", (self.vocab, self.hidden)


LLAMA_1B = Shape(layers=22, hidden=2048, intermediate=5632, heads=32, kv_heads=4, vocab=32000)


def write(path: Path, shape: Shape, vocabulary: Path | None = None, seed: int = SEED) -> Path:
    """Write the model to `path`, whole or not at all. `vocabulary`: a GGUF to take the tokens from."""
    partial = path.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, "llama")
    _add_metadata(writer, shape)
    _add_tokenizer(writer, shape.vocab, vocabulary)
    for name, size in shape.tensors():
        kind = np.dtype(np.float32 if len(size) == 1 else np.float16)
        writer.add_tensor_info(name, size, kind, int(np.prod(size)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for _, size in shape.tensors():
        writer.write_tensor_data(_weights(size, rng))
    writer.close()
    partial.rename(path)
    return path


def _weights(size: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if len(size) == 1:
        return np.ones(size, np.float32)
    values = rng.standard_normal(size, dtype=np.float32)
    values *= DEVIATION
    return values.astype(np.float16)


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name(f"random-llama-{shape.parameters / 1e9:.2f}B")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)


def _add_tokenizer(writer: gguf.GGUFWriter, size: int, vocabulary: Path | None) -> None:
    tokens, scores, types = synthetic_vocabulary(size)
    if vocabulary is not None:
        tokens, scores, types = read_vocabulary(vocabulary)
        if len(tokens) != size:
            raise ValueError(f"{vocabulary.name}: {len(tokens)} tokens, but the model's vocabulary is {size}")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def synthetic_vocabulary(size: int) -> tuple[list[bytes], list[float], list[int]]:
    """A SentencePiece-like vocabulary: specials, 256 bytes, then distinct words. Enough to tokenize."""
    kinds = gguf.TokenType
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256))]
    types = [int(kinds.UNKNOWN), int(kinds.CONTROL), int(kinds.CONTROL), *([int(kinds.BYTE)] * 256)]
    if size < len(tokens):
        raise ValueError(f"synthetic vocabulary: size={size} is below the {len(tokens)} it starts with")
    words = size - len(tokens)
    tokens += [f"\u2581w{i}".encode() for i in range(words)]
    types += [int(kinds.NORMAL)] * words
    return tokens, [-float(i) for i in range(size)], types


def read_vocabulary(path: Path) -> tuple[list[bytes], list[float], list[int]]:
    """Tokens, scores and types of a GGUF that holds (only) a SentencePiece vocabulary."""
    reader = gguf.GGUFReader(path)

    def field(key: str) -> gguf.ReaderField:
        found = reader.get_field(f"tokenizer.ggml.{key}")
        if found is None:
            raise ValueError(f"{path.name}: no tokenizer.ggml.{key}; a SentencePiece vocabulary has it")
        return found

    tokens = field("tokens")
    words = [bytes(tokens.parts[i]) for i in tokens.data]
    scores, types = field("scores"), field("token_type")
    return (
        words,
        [float(scores.parts[i][0]) for i in scores.data],
        [int(types.parts[i][0]) for i in types.data],
    )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: random_llama.py OUTPUT.gguf [VOCABULARY.gguf]")
    print(write(Path(sys.argv[1]), LLAMA_1B, Path(sys.argv[2]) if len(sys.argv) == 3 else None))
