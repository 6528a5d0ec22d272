"""Token ids back to text, one at a time and never half a character.

A decoder of tokenizer.json is reduced to one rule per token, its bytes, so that text may be produced while
tokens arrive: bytes that do not finish a UTF-8 sequence wait for the next token. `Tokenizer.decode` uses the
same rules, therefore a stream and the whole decode are equal for any ids.

Three families of decoders cover the models lowbit runs: byte-level BPE (GPT-2, Llama 3, Qwen), SentencePiece
with byte fallback (Llama 1 and 2, Mistral, Phi-3), and none at all (words joined by spaces).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from lowbit.errors import UnsupportedError

_SPACE = "\u2581"  # SentencePiece writes a space as this
_MAX_STEPS = 16  # of a sequence of decoders


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE -> the byte.

    Bytes that are printable in Latin-1 stand for themselves, the others for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


class Detokenizer:
    """What each token says: its bytes, and whether the first token of a text loses a leading space."""

    def __init__(self, backend: Backend):
        self._backend = backend
        state = backend.decoder.__getstate__() if backend.decoder is not None else b"null"
        self._read(json.loads(state))
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._cache: dict[int, bytes] = {}

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to the text; none for an id that the vocabulary does not have."""
        found = self._cache.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
            found = self._cache[token_id] = b"" if token is None else self._convert(token)
        return found

    def _read(self, decoder: Mapping[str, Any] | None) -> None:
        """Reduce the JSON of a decoder to the four switches that `_convert` knows."""
        self._byte_level = self._byte_fallback = False
        self._replace: tuple[str, str] = ("", "")
        self.strips_first_space = decoder is None  # every word brings its space, the first one none
        self._prefix = " " if decoder is None else ""
        steps = [] if decoder is None else [decoder]
        for _ in range(_MAX_STEPS):
            if not steps:
                return
            step = steps.pop(0)
            kind = step["type"]
            if kind == "Sequence":
                steps = list(step["decoders"]) + steps
            elif kind == "ByteLevel":
                self._byte_level = True
            elif kind == "ByteFallback":
                self._byte_fallback = True
            elif kind == "Metaspace":
                self._replace = (step["replacement"], " ")
                self.strips_first_space = step.get("prepend_scheme", "always") != "never"
            elif kind == "Replace" and step["pattern"] == {"String": _SPACE}:
                self._replace = (_SPACE, step["content"])
            elif kind == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
                self.strips_first_space = True
            elif kind != "Fuse":
                raise UnsupportedError(
                    f"tokenizer: the decoder {json.dumps(step)[:200]} is unknown; lowbit reads ByteLevel, "
                    "ByteFallback, Metaspace, Replace of U+2581, Strip of one leading space and Fuse"
                )
        raise UnsupportedError(f"tokenizer: the decoder has more than {_MAX_STEPS} steps")

    def _convert(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return bytes([_ALPHABET[character] for character in token])
            except KeyError:  # an added token is stored as the text that it stands for
                return token.encode()
        if self._byte_fallback and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:
                pass
        before, after = self._replace
        return (self._prefix + (token.replace(before, after) if before else token)).encode()


class TextStream:
    """Text of a growing sequence of tokens.

    skip_special: leave out the tokens that mark structure (<|im_end|>, </s>).
    continuing: the tokens follow other text, so that the first one keeps its leading space.
    """

    def __init__(self, detokenizer: Detokenizer, skip_special: bool = True, continuing: bool = False):
        self._detokenizer = detokenizer
        self._skip_special = skip_special
        self._strip = detokenizer.strips_first_space and not continuing
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; bytes of an unfinished character wait."""
        if self._skip_special and self._detokenizer.is_special(token_id):
            return ""
        piece = self._detokenizer.token_bytes(token_id)
        if self._strip and piece:
            self._strip = False
            piece = piece[1:] if piece[:1] == b" " else piece
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What still waits, as U+FFFD; the stream then begins a new text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def decode(
    detokenizer: Detokenizer, ids: Iterable[int], skip_special: bool = True, continuing: bool = False
) -> str:
    """The text of all `ids`."""
    stream = TextStream(detokenizer, skip_special, continuing)
    pieces = [stream.push(token_id) for token_id in ids]
    return "".join(pieces) + stream.flush()
