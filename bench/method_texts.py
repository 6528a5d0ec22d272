"""The texts on which methods are compared: what calibrates, and what is scored.

A model of children's stories knows no other text, so its texts are sampled from itself, at temperature 1 and
with a fixed seed: tokens are a function of model, prompt and seed, and everybody gets the same ones. Kept
under the ignored `.cache/texts/`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TOGETHER = 16  # sequences in one step
WINDOW = 256  # tokens of a sampled sequence, what the model holds


def sampled(model: Path, windows: int, seed: int, cache: Path, say: Callable[[str], None]) -> Path:
    """A file of `windows` * 256 tokens drawn from the model, every sequence from its first token on."""
    # What else can change the text would be a defect of the engine.
    key = hashlib.sha256((model / "config.json").read_bytes()).hexdigest()[:8]
    path = cache / "texts" / f"{model.name}-{key}.{windows}x{WINDOW}.seed{seed}.txt"
    if not path.exists():
        say(f"sampling {path.name} (once)")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(_stories(model, windows, seed)), encoding="utf-8")
        partial.rename(path)
    return path


def _stories(model: Path, windows: int, seed: int) -> list[str]:
    import lowbit
    from lowbit.engine import SamplingParameters
    from lowbit.engine.sequence import new_cache, new_sampler

    loaded = lowbit.load(str(model), activations="int16", kv_bits=16)
    first = loaded.config.bos_ids[0]
    texts = []
    for begin in range(0, windows, TOGETHER):
        count = min(TOGETHER, windows - begin)
        caches = [new_cache(loaded.decoder, WINDOW) for _ in range(count)]
        samplers = [
            new_sampler(SamplingParameters(temperature=1.0, seed=seed * 100_000 + begin + i))
            for i in range(count)
        ]
        tokens = [np.full(count, first, np.int32)]
        for _ in range(WINDOW - 1):
            chosen, _ = loaded.decoder.sample(tokens[-1], caches, [1] * count, samplers)
            tokens.append(chosen)
        texts += [_text(loaded.tokenizer, row, first) for row in np.stack(tokens, axis=1).tolist()]
    return texts


def _text(tokenizer: Any, ids: list[int], first: int) -> str:
    """The text with the token that begins a story spelled out, so that encoding finds it again."""
    stories: list[list[int]] = []
    for token in ids:
        if token == first:
            stories.append([])
        else:
            stories[-1].append(token)
    return "".join("<s>" + tokenizer.decode(story) for story in stories)


def cut(path: Path, begin: int, characters: int, cache: Path) -> Path:
    """A file with so many characters of another, whole lines from character `begin` on."""
    text = path.read_text(encoding="utf-8")[begin : begin + characters]
    out = cache / "texts" / f"{path.stem}.{begin}+{characters}.txt"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text[text.find("\n") + 1 if begin else 0 :], encoding="utf-8")
    return out


def windows_file(subject: Any, cache: Path) -> Path:
    """The windows on which our methods calibrate, as token ids int64 [windows, tokens] in a .npy file."""
    from lowbit.compress.calibration import calibration_windows
    from lowbit.model.checkpoint import open_checkpoint

    text, count, length = subject.calibration
    path = cache / "texts" / f"{text.stem}.{count}x{length}.npy"
    with open_checkpoint(subject.source) as checkpoint:
        np.save(path, calibration_windows(text, checkpoint, count, length, 0))
    return path
