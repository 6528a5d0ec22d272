"""What every part of a benchmark run needs to know: where things are, which peers there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import targets
from peers.llama_cpp import LlamaCpp
from peers.openvino_peer import OpenVino


@dataclass(frozen=True)
class Bench:
    """One run. A peer that is None could not be had; `missing` says why, by the peer's name."""

    cache: Path
    peer: LlamaCpp | None
    threads: tuple[int, ...]
    rounds: int
    text: Path
    tokens: int
    say: Callable[[str], None]
    made: dict[tuple[str, str], Path] = field(default_factory=dict)  # lowbit directories of this run
    avx2: LlamaCpp | None = None
    openvino: OpenVino | None = None
    server: LlamaCpp | None = None  # the build that has llama-server
    missing: dict[str, str] = field(default_factory=dict)

    def source(self, name: str) -> Path:
        return models.source_gguf(name, self.cache, self.say)

    def ours(self, name: str, scheme: str = targets.SCHEME) -> Path:
        """lowbit's directory of the model, made by the code that is measured."""
        if (name, scheme) not in self.made:
            self.made[name, scheme] = models.cached_directory(
                name, self.source(name), scheme, self.options(scheme), self.cache, self.say
            )
        return self.made[name, scheme]

    def quantize(self, name: str) -> dict[str, Any]:
        """Make lowbit's directory of the model, again if it is there; returns what `quantize` said."""
        scheme = targets.SCHEME
        path, told = models.lowbit_directory(
            name, self.source(name), scheme, self.options(scheme), self.cache
        )
        self.made[name, scheme] = path
        return told

    def options(self, scheme: str) -> tuple[str, ...]:
        return targets.QUANTIZE_OPTIONS if scheme == targets.SCHEME else ()

    def theirs(self, name: str, kind: str = targets.PEER_TYPE) -> Path | None:
        if self.peer is None:
            return None
        return models.peer_gguf(name, self.source(name), kind, self.cache, self.peer, self.say)

    def openvino_model(self, name: str, kind: str) -> Path | None:
        if self.openvino is None:
            return None
        path = self.cache / "models" / f"{name}.openvino-{kind}"
        if not path.exists():
            self.say(f"making {path.name} (minutes, once)")
        return self.openvino.export(self.source(name), path, kind)
