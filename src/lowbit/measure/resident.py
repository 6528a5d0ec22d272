"""What a process with a network takes in resident memory: a fresh process for each, its high-water mark."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lowbit.measure.synthetic import llama

_CODE = """
import json
import sys
from lowbit.formats import Scheme
from lowbit.measure.machine import peak_rss_bytes
from lowbit.measure.synthetic import Stepper, SyntheticCheckpoint, fill
from lowbit.engine.sequence import new_cache
from lowbit.model.loader import load_model
case = json.loads(sys.argv[1])
checkpoint = SyntheticCheckpoint(case["config"], Scheme.parse(case["scheme"]), once=True)
model = load_model(checkpoint, kv_bits=case["kv_bits"])
caches = [new_cache(model.decoder, case["positions"]) for _ in range(case["users"])]
for cache in caches:
    fill(model, cache, case["positions"])
print(peak_rss_bytes())
"""


@dataclass(frozen=True)
class MemoryCase:
    """A network with `users` caches that are full."""

    config: dict[str, Any]
    scheme: str
    kv_bits: int
    positions: int
    users: int = 1


NOTHING = MemoryCase(llama(1, 64, 64, 1, 1), "int4-g32", 8, 1)


def memory_cases() -> Iterator[MemoryCase]:
    """Networks of 60 to 200 MB: enough of them for an interval (interval.py)."""
    for layers, hidden, inner, heads, kv_heads, scheme, bits, positions, users in (
        (12, 768, 2048, 12, 4, "int4-g32", 8, 256, 1),
        (6, 1024, 4096, 16, 8, "int8-g32", 16, 512, 1),
        (20, 576, 1536, 9, 3, "int6-g32", 8, 256, 2),
        (4, 1536, 6144, 24, 8, "int4-g64", 4, 256, 1),
        (8, 1024, 2816, 16, 4, "nf4-g32", 16, 256, 3),
        (24, 640, 1792, 10, 5, "int8-g32", 8, 320, 1),
        (3, 2048, 5632, 32, 4, "int3-g32", 8, 128, 1),
        (10, 896, 3072, 14, 2, "mxfp4", 2, 256, 1),
        (6, 1280, 3584, 20, 20, "int4-g128", 8, 512, 1),
        (5, 1024, 4096, 16, 16, "bf16", 16, 128, 1),
    ):
        config = llama(layers, hidden, inner, heads, kv_heads, vocab=8192)
        yield MemoryCase(config, scheme, bits, positions, users)


def resident_bytes(case: MemoryCase) -> int:
    """The most that such a process has held."""
    path = [entry for entry in sys.path if entry]
    code = f"import sys\nsys.path[:0] = {path!r}\n{_CODE}"
    command = [sys.executable, "-c", code, json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)
