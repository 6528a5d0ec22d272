"""Other quantization toolkits from PyPI, each in an environment of its own under the ignored `.cache/`.

Versions are pinned; torch comes first and from its own build for CPUs, so that none brings CUDA along.
`weights_worker.py` runs inside and writes what the weights have become, so that one comparison measures all.
What it writes is kept, with its time and memory, as long as source, calibration and versions are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from peers.llama_cpp import PeerError, run

TORCH = "torch==2.13.0"
PACKAGES: dict[str, tuple[str, ...]] = {
    "hqq": ("hqq==0.2.8.post1", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.4.6"),
    "gptqmodel": ("gptqmodel==7.6.0", "transformers==5.23.0", "accelerate==1.15.0", "numpy==2.2.6"),
    "auto-round": ("auto-round==0.16.1", "transformers==5.23.0"),
    "llmcompressor": ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0"),
}
WORKER = Path(__file__).resolve().parent / "weights_worker.py"
GROUP = 32
LIMIT_SECONDS = 900
# Toolkit, its methods, the widths they are run at. `-sym`: without zero-points.
RUNS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("hqq", "rtn", (4, 3, 2)),
    ("hqq", "hqq", (4, 3, 2)),
    ("gptqmodel", "gptq-sym", (4, 3, 2)),
    ("llmcompressor", "rtn-sym", (4, 3, 2)),
    ("llmcompressor", "gptq-sym", (4, 3, 2)),
    ("llmcompressor", "awq", (3,)),  # two minutes for each width
    ("auto-round", "signround-sym", (3,)),
)


@dataclass(frozen=True)
class Toolkit:
    """An environment with one toolkit."""

    name: str
    python: Path

    def weights(
        self, method: str, bits: int, source: Path, windows: Path, cache: Path
    ) -> tuple[Path, dict[str, Any]]:
        """The directory with its weights and {"seconds", "peak_rss_bytes", "bits_per_weight"}."""
        digest = hashlib.sha256("\n".join([TORCH, *PACKAGES[self.name]]).encode())
        for file in (WORKER, windows, source / "config.json"):
            digest.update(file.read_bytes())
        name = f"{source.name}.{self.name}.{method}.int{bits}-g{GROUP}.{digest.hexdigest()[:8]}"
        path = cache / "models" / name
        told = path / "told.json"
        if not told.exists():
            partial = path.with_name(f"{name}.partial")
            arguments = [self.name, method, bits, GROUP, *(p.resolve() for p in (source, windows, partial))]
            made = self._run(*arguments)
            if os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1):
                made["seconds"] = None  # others had the machine; a time from then would mislead
            (partial / "told.json").write_text(json.dumps(made))
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
        return path, json.loads(told.read_text())

    def _run(self, *arguments: object) -> dict[str, Any]:
        command = [str(self.python), str(WORKER), *map(str, arguments)]
        try:
            with tempfile.TemporaryDirectory() as folder:  # some leave logs where they are
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=LIMIT_SECONDS,
                    cwd=folder,
                )
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"{self.name} {arguments[1]}: not done after {LIMIT_SECONDS} s") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise PeerError(f"{self.name} {arguments[1]}: {last[-300:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])  # libraries print too; the answer is last


def build(name: str, cache: Path, say: Callable[[str], None]) -> Toolkit:
    """Return the environment, from `cache` where it is. Raises PeerError if it cannot be installed."""
    packages = PACKAGES[name]
    digest = hashlib.sha256("\n".join([sys.version, TORCH, *packages]).encode()).hexdigest()[:8]
    home = cache / "peers" / f"{name}-{digest}"
    python, stamp = home / "bin" / "python", home / "lowbit-installed"
    if not stamp.exists():
        say(f"installing {name} (a minute or two, 1.5 GB, once)")
        shutil.rmtree(home, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(home)])
        pip = [str(python), "-m", "pip", "-q", "--disable-pip-version-check"]
        run([*pip, "install", TORCH])
        constraint = home / "constraint.txt"
        constraint.write_text(f"{TORCH}\n")
        run([*pip, "install", "-c", str(constraint), *packages])
        stamp.write_text("")
    return Toolkit(name, python)


def rows(
    source: Path,
    windows: Path,
    cache: Path,
    missing: dict[str, str],
    only: Sequence[str] | None,
    say: Callable[[str], None],
) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """What every toolkit makes of the model: rows without measurements, and the directories by key.

    only: patterns of the keys that are wanted; missing: gets the reason why a toolkit cannot be had
    """
    found, made = [], {}
    for name, method, widths in RUNS:
        keys = {bits: f"{name} {method}@int{bits}-g{GROUP}" for bits in widths}
        wanted = [b for b, key in keys.items() if not only or any(fnmatchcase(key, one) for one in only)]
        if name in missing or not wanted:
            continue
        try:
            toolkit = build(name, cache, say)
        except PeerError as error:
            missing[name] = _short(error)
            say(f"  going on without {name}: {missing[name]}")
            continue
        for bits in wanted:
            key = keys[bits]
            row: dict[str, Any] = {"key": key, "width": str(bits), "peer": name, "method": method}
            row["format"] = f"int{bits}-g{GROUP}"
            try:
                path, told = toolkit.weights(method, bits, source, windows, cache)
            except PeerError as error:
                row["refused"] = _short(error)
            else:
                row.update(told)
                made[key] = path
            say(f"  {key}: " + (row.get("refused") or "made"))
            found.append(row)
    return found, made


def _short(error: PeerError) -> str:
    return str(error).replace(str(Path.cwd()), "").replace(os.path.expanduser("~"), "")[-300:]
