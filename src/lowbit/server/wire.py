"""What the API process and an engine process say to each other: msgpack frames over a socketpair.

A frame is its length (4 bytes, little-endian) and a msgpack array whose first item is its kind. One frame per
step carries what the step made for every request; structs are arrays, so no field name travels.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

MAX_FRAME_BYTES = 1 << 28  # a prompt of a million tokens with 20 likeliest tokens each stays below

_LENGTH = struct.Struct("<I")


class _Frame(msgspec.Struct, array_like=True, tag=True, omit_defaults=True):
    pass


class Configure(_Frame):
    """First frame to the engine: the model and the options of the engine. interval: see worker.Worker."""

    path: str
    load: dict[str, Any]  # arguments of engine.load
    engine: dict[str, Any]  # arguments of EngineConfig
    draft: str | None = None  # path of a draft model
    interval: float = 0.0  # seconds


class Add(_Frame):
    """A request. parameters: fields of SamplingParameters. constraint: (kind, text)."""

    id: str
    prompt: list[int]
    parameters: dict[str, Any]
    tenant: str = ""
    priority: int = 0
    constraint: tuple[str, str] | None = None
    echo: int | None = None  # likeliest tokens to give with each prompt score
    progress: bool = False  # tell how much of the prompt is read


class Cancel(_Frame):
    """End a request. reason: "stop" at a stop string, which is answered with the last output; else nobody
    waits for one."""

    id: str
    reason: str = "cancelled"


class Loaded(_Frame):
    """The engine can take requests. facts: fixed numbers of the model and its memory; stats: counters."""

    facts: dict[str, Any]
    stats: dict[str, Any]


class Failed(_Frame):
    """The model could not be loaded, or the engine found its own state broken; the process ends."""

    message: str
    is_bug: bool = False


class Delta(msgspec.Struct, array_like=True, omit_defaults=True):
    """What a step made for one request.

    finish: a reason of engine.request.FINISH_REASONS, or "refused" with `status` and `error`.
    scores: log-probabilities of the prompt after its first token. progress: prompt tokens read.
    """

    id: str
    ids: list[int] = []
    logprobs: list[float] = []
    tops: list[list[tuple[int, float]]] = []
    finish: str | None = None
    timings: dict[str, Any] | None = None
    scores: list[float] | None = None
    score_tops: list[list[tuple[int, float]]] | None = None
    error: str | None = None
    status: int = 0
    retry_after: float | None = None
    progress: int = -1


class Step(_Frame):
    """Everything since the last frame. Without deltas it is a heartbeat."""

    deltas: list[Delta] = []
    stats: dict[str, Any] | None = None


Command = Configure | Add | Cancel
Report = Loaded | Failed | Step

_encoder = msgspec.msgpack.Encoder()


def encode(frame: Command | Report) -> bytes:
    buffer = bytearray(_LENGTH.size)
    _encoder.encode_into(frame, buffer, _LENGTH.size)
    _LENGTH.pack_into(buffer, 0, len(buffer) - _LENGTH.size)
    return bytes(buffer)


class FrameReader:
    """Bytes as they arrive to frames of `kind` (Command or Report)."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The frames that `data` completes. Raises ValueError for bytes that are none."""
        frames = []
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"wire: a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
            end = at + _LENGTH.size + length
            if len(buffer) < end:
                break
            frames.append(self._decoder.decode(bytes(buffer[at + _LENGTH.size : end])))
            at = end
        del buffer[:at]
        return frames
