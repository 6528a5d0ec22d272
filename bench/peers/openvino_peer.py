"""Install and call OpenVINO GenAI, the CPU engine that was fastest at reading prompts.

Everything comes from PyPI in pinned versions, into an environment of its own under the ignored `.cache/`: its
torch, transformers and NumPy are not ours. The model is made from the same GGUF as all the others', by
transformers' own reader and optimum-intel, so nothing of lowbit is on that way. `openvino_worker.py` runs
inside the environment.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peers.llama_cpp import run

TORCH = "torch==2.13.0"
PACKAGES = (
    "openvino==2026.4.1",
    "openvino-genai==2026.4.1.0",
    "openvino-tokenizers==2026.4.1.0",
    "optimum-intel==2.2.0",
    "optimum==2.3.0",
    "nncf==3.4.0",
    "transformers==5.5.4",
    "accelerate==1.15.0",
    "gguf==0.19.0",
    "numpy==2.4.6",
)
WORKER = Path(__file__).resolve().parent / "openvino_worker.py"
# Weight compression by nncf's defaults; 4 bits in groups that divide every row.
GROUPS = {"int8": 0, "int4": 64}


@dataclass(frozen=True)
class OpenVino:
    """An environment with OpenVINO GenAI."""

    python: Path

    def describe(self) -> dict[str, object]:
        return {"name": "OpenVINO GenAI", "packages": [TORCH, *PACKAGES]}

    def export(self, source: Path, output: Path, kind: str) -> Path:
        """Make an OpenVINO model of `kind` (int8: per channel, int4: groups of 64) from a GGUF."""
        if not (output / "openvino_model.bin").exists():
            partial = output.with_name(f"{output.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            self._run("export", source, partial, kind[3:], GROUPS[kind])
            shutil.rmtree(output, ignore_errors=True)
            partial.rename(output)
        return output

    def speed(
        self, model: Path, threads: int, *, prompt: int, generate: int, repetitions: int
    ) -> dict[str, list[float]]:
        """Tokens per second of every repetition: {"prefill": [..], "decode": [..]}, after a warm-up."""
        return json.loads(self._run("speed", model, threads, prompt, generate, repetitions))

    def perplexity(self, model: Path, windows: Path, threads: int) -> float:
        """Perplexity over windows of token ids, int64 [n, length] in a .npy file; all but the first count."""
        return float(json.loads(self._run("perplexity", model, windows, threads))["perplexity"])

    def _run(self, *arguments: object) -> str:
        out = run([str(self.python), str(WORKER), *map(str, arguments)])
        return out.strip().splitlines()[-1]  # libraries print too; the answer comes last


def weight_bytes(model: Path) -> int:
    return (model / "openvino_model.bin").stat().st_size


def build(cache: Path, say: Callable[[str], None] = print) -> OpenVino:
    """Return the environment, from `cache` where it is. Raises PeerError if it cannot be installed."""
    digest = hashlib.sha256("\n".join([sys.version, TORCH, *PACKAGES]).encode()).hexdigest()[:8]
    home = cache / "peers" / f"openvino-{digest}"
    python, stamp = home / "bin" / "python", home / "lowbit-installed"
    if not stamp.exists():
        say("installing OpenVINO GenAI (a minute, 1.6 GB, once)")
        shutil.rmtree(home, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(home)])
        pip = [str(python), "-m", "pip", "-q", "--disable-pip-version-check"]
        run([*pip, "install", TORCH])
        constraint = home / "constraint.txt"
        constraint.write_text(f"{TORCH}\n")
        run([*pip, "install", "-c", str(constraint), *PACKAGES])
        # Comes as a dependency, is of no use for text, and its build may not fit the torch that is there.
        run([*pip, "uninstall", "-y", "torchvision"])
        stamp.write_text("")
    return OpenVino(python)
