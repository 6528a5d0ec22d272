"""A scripted decoder, so that the engine is tested apart from the kernels."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lowbit.engine import LanguageModel, sequence

EOS = 256


class ByteStream:
    """Whole UTF-8 characters out of single bytes."""

    def __init__(self):
        self.bytes = b""

    def push(self, token_id):
        self.bytes += bytes([token_id])
        try:
            text = self.bytes.decode()
        except UnicodeDecodeError:
            return ""
        self.bytes = b""
        return text

    def flush(self):
        text, self.bytes = self.bytes.decode(errors="replace"), b""
        return text


class ByteTokenizer:
    """Token id = byte; 256 ends the text."""

    eos_ids = (EOS,)
    bos_id = None
    vocab_size = 257
    chat_template = "yes"

    def encode(self, text, add_special=True):
        return list(text.encode())

    def apply_chat(self, messages, add_generation_prompt=True):
        turns = "".join(f"<{m['role'][0]}>{m['content']}" for m in messages)
        return turns + "<a>" * add_generation_prompt

    def stream(self, continuing=False):
        return ByteStream()


class ScriptedCache:
    def __init__(self, decoder, capacity):
        self.capacity, self.length = capacity, 0

    def truncate(self, n):
        assert n <= self.length
        self.length = n
        return n


class ScriptedDecoder:
    """After every prompt says `answer`, then end-of-text forever. Records what it is fed."""

    def __init__(self, answer):
        self.answer = list(answer)
        self.fed = []
        self.step = 0

    def _feed(self, tokens, caches, counts):
        assert tokens.dtype == np.int32 and len(tokens) == counts[0]
        caches[0].length += counts[0]
        assert caches[0].length <= caches[0].capacity
        self.fed.append(tokens.tolist())

    def logits(self, tokens, caches, counts, all=False):
        self._feed(tokens, caches, counts)

    def sample(self, tokens, caches, counts, samplers):
        self._feed(tokens, caches, counts)
        if self.restart:
            self.step, self.restart = 0, False
        token = self.answer[self.step] if self.step < len(self.answer) else EOS
        self.step += 1
        return np.array([token], np.int32), np.array([-0.5], np.float32)


@pytest.fixture
def scripted(monkeypatch):
    """Return make(answer, context) -> LanguageModel whose decoder says the bytes of `answer`."""
    decoders = []

    class Sampler:
        def __init__(self):
            self.observed = []
            decoders[-1].sampler = self
            decoders[-1].restart = True

        def observe(self, tokens):
            self.observed += tokens.tolist()

        def top(self):
            return [(1, -0.5), (2, -1.5)]

    monkeypatch.setattr(sequence, "new_cache", ScriptedCache)
    monkeypatch.setattr(sequence, "new_sampler", lambda parameters, eos=(): Sampler())

    def make(answer: str | bytes, context: int = 200) -> LanguageModel:
        answer = answer.encode() if isinstance(answer, str) else answer
        decoders.append(ScriptedDecoder(answer))
        model = SimpleNamespace(
            config=SimpleNamespace(vocab_size=257, eos_ids=(EOS,)),
            tokenizer=ByteTokenizer(),
            decoder=decoders[-1],
            context=context,
            bits_per_weight=4.5,
            nbytes=1000,
        )
        return LanguageModel(model)

    return make


def _tiny_checkpoint():
    path = Path(__file__).resolve().parents[1] / "tiny_checkpoint.py"
    spec = importlib.util.spec_from_file_location("tiny_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_model = _tiny_checkpoint().tiny_model
