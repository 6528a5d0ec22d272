"""Build and call llama.cpp, the peer of every speed claim.

The source is the one that the `llama-cpp-python` source distribution carries, fetched with pip by name,
checked against a pinned digest and built natively (Release, -march=native, OpenMP, weight repacking and
the tiled matrix product on: llama.cpp's own defaults). A second build, for machines with AVX2 alone, has no
AVX-512 and no VNNI. Only the tools in use are built. Everything lies under the ignored `.cache/`; nothing
of it is ever part of this repository.

Run this file to build and to print where the tools are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
COMMON = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",  # no model downloads, so no TLS
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # the web page of the server would be fetched while configuring
    "-DLLAMA_TOOLS_INSTALL=OFF",
)


@dataclass(frozen=True)
class Variant:
    """One way of building: its options and the tools that are wanted of it."""

    options: tuple[str, ...]
    tools: tuple[str, ...]


VARIANTS = {
    "native": Variant(
        ("-DGGML_NATIVE=ON", *COMMON),
        ("llama-bench", "llama-quantize", "llama-perplexity", "llama-imatrix"),
    ),
    "server": Variant(  # of an option that is given twice, the last counts
        ("-DGGML_NATIVE=ON", *COMMON, "-DLLAMA_BUILD_SERVER=ON"),
        ("llama-server",),
    ),
    "avx2": Variant(
        (
            "-DGGML_NATIVE=OFF",
            *(f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")),
            *(f"-DGGML_{name}=OFF" for name in ("AVX_VNNI", "AVX512")),
            *COMMON,
        ),
        ("llama-bench",),
    ),
}


class PeerError(RuntimeError):
    """The peer could not be fetched, built or run; the text says which step failed and why."""


@dataclass(frozen=True)
class LlamaCpp:
    """A built llama.cpp. `commit` is the one that the source distribution was made from."""

    version: str
    commit: str
    compiler: str
    build_seconds: float
    directory: Path  # holds the tools
    variant: str = "native"

    def describe(self) -> dict[str, object]:
        return {
            "name": "llama.cpp",
            "version": f"llama-cpp-python {self.version}",
            "commit": self.commit,
            "compiler": self.compiler,
            "variant": self.variant,
            "options": list(VARIANTS[self.variant].options),
            "build_seconds": round(self.build_seconds, 1),
        }

    def quantize(
        self, source: Path, output: Path, kind: str, threads: int, imatrix: Path | None = None
    ) -> Path:
        """Write `source` as `kind` (Q4_0, Q8_0, F16, ..). Already quantized tensors are requantized.

        imatrix: what `imatrix` wrote; the search of scales weighs inputs by it.
        """
        partial = output.with_suffix(".partial")
        arguments = ["--allow-requantize", *(["--imatrix", str(imatrix)] if imatrix else [])]
        arguments += [str(source), str(partial), kind, str(threads)]
        self._run("llama-quantize", arguments)
        partial.rename(output)
        return output

    def imatrix(
        self, model: Path, text: Path, output: Path, *, context: int, chunks: int, threads: int
    ) -> Path:
        """Write mean squares of the inputs of every matrix, over `chunks` windows of `context` tokens."""
        partial = output.with_suffix(".partial.gguf")
        arguments = ["-m", str(model), "-f", str(text), "-o", str(partial), "-c", str(context)]
        arguments += ["-b", str(context), "--chunks", str(chunks), "-t", str(threads), "--no-ppl"]
        self._run("llama-imatrix", arguments, merge=True)
        partial.rename(output)
        return output

    def speed(
        self, model: Path, threads: int, *, prompt: int, generate: int, repetitions: int, flash: str = "auto"
    ) -> dict[str, list[float]]:
        """Tokens per second of every repetition: {"prefill": [..], "decode": [..]}; llama-bench warms up."""
        counts = ["-p", str(prompt), "-n", str(generate), "-r", str(repetitions)]
        out = self._run(
            "llama-bench", ["-m", str(model), "-t", str(threads), "-fa", flash, "-o", "json", *counts]
        )
        return parse_speed(out)

    def perplexity(self, model: Path, text: Path, *, context: int, threads: int, chunks: int) -> float:
        """llama.cpp's own perplexity: windows of `context` tokens, the second half of each is scored."""
        arguments = ["-m", str(model), "-f", str(text), "-c", str(context), "-b", str(context)]
        arguments += ["-t", str(threads), "--chunks", str(chunks)]
        return parse_perplexity(self._run("llama-perplexity", arguments, merge=True))

    def _run(self, tool: str, arguments: Sequence[str], merge: bool = False) -> str:
        command = [str(self.directory / tool), *arguments]
        return run(command, stderr=subprocess.STDOUT if merge else subprocess.PIPE)


def parse_speed(text: str) -> dict[str, list[float]]:
    """Read llama-bench's JSON: one entry per test, told apart by how many tokens it generates."""
    speeds: dict[str, list[float]] = {}
    for test in json.loads(text):
        speeds["decode" if test["n_gen"] else "prefill"] = [float(v) for v in test["samples_ts"]]
    return speeds


def parse_perplexity(text: str) -> float:
    found = re.search(r"Final estimate: PPL = ([0-9.]+|nan|inf)", text)
    if not found:
        raise PeerError(f"llama-perplexity: no final estimate in its output; it ended with: {text[-400:]}")
    return float(found.group(1))


def run(command: Sequence[str], stderr: int = subprocess.PIPE, nice: int = 0) -> str:
    """Run to the end and return stdout; a failure carries the last lines of what the tool said."""
    if nice:
        command = ["nice", "-n", str(nice), *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr or done.stdout or "").strip()[-1500:]
        raise PeerError(f"{Path(command[0]).name}: exit status {done.returncode}: {said}")
    return done.stdout


def build(
    cache: Path, jobs: int | None = None, say: Callable[[str], None] = print, variant: str = "native"
) -> LlamaCpp:
    """Return the built peer, from `cache` where an equal build (version, options, CPU, compiler) is there.

    Raises PeerError when the source cannot be fetched (no network) or does not build.
    """
    compiler = run(["c++", "--version"]).splitlines()[0] if shutil.which("c++") else ""
    if not compiler:
        raise PeerError("building llama.cpp: there is no C++ compiler; install g++")
    home = cache / "peers" / f"llama.cpp-{VERSION}"
    wanted = VARIANTS[variant]
    target = home / f"build-{_key(compiler, wanted.options)}"
    stamp = target / "lowbit-build.json"
    if not stamp.exists() or not all((target / "bin" / tool).exists() for tool in wanted.tools):
        source, commit = _source(home, say)
        started = time.perf_counter()
        _compile(source, target, wanted, commit, jobs or os.cpu_count() or 1, say)
        seconds = time.perf_counter() - started
        stamp.write_text(json.dumps({"commit": commit, "compiler": compiler, "build_seconds": seconds}))
    made = json.loads(stamp.read_text())
    return LlamaCpp(VERSION, made["commit"], made["compiler"], made["build_seconds"], target / "bin", variant)


def _key(compiler: str, options: Sequence[str]) -> str:
    """Eight hex digits of all that decides what a build may contain."""
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = next((s for s in cpuinfo.read_text().splitlines() if s.startswith(("flags", "Features"))), "")
    return hashlib.sha256("\n".join([VERSION, compiler, flags, *options]).encode()).hexdigest()[:8]


def _source(home: Path, say: Callable[[str], None]) -> tuple[Path, str]:
    """Fetch and unpack the source distribution. Returns llama.cpp's root and its commit."""
    root = home / "source" / f"llama_cpp_python-{VERSION}"
    head = root / ".git" / "modules" / "vendor" / "llama.cpp" / "HEAD"
    tree = root / "vendor" / "llama.cpp"
    if not (tree / "CMakeLists.txt").exists():
        home.mkdir(parents=True, exist_ok=True)
        archive = home / f"llama_cpp_python-{VERSION}.tar.gz"
        if not archive.exists():
            say(f"fetching llama-cpp-python {VERSION} (source)")
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
            run([*pip, "--dest", str(home), f"llama-cpp-python=={VERSION}"])
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != SHA256:
            raise PeerError(f"{archive.name}: sha256 is {digest}, expected {SHA256}; delete it and try again")
        partial = home / "source.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        shutil.rmtree(home / "source", ignore_errors=True)
        partial.rename(home / "source")
    return tree, head.read_text().strip() if head.exists() else "unknown"


def _compile(
    source: Path, target: Path, wanted: Variant, commit: str, jobs: int, say: Callable[[str], None]
) -> None:
    # This file may run before or inside the project's environment, which brings its own cmake and ninja.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if not cmake or not ninja:
        raise PeerError("building llama.cpp: cmake and ninja are needed; `pip install cmake ninja`")
    say(f"building llama.cpp {commit[:12]} with {jobs} jobs (a few minutes, once)")
    # Without these two, llama.cpp would take the number and commit of the repository around it: this one.
    identity = [f"-DLLAMA_BUILD_COMMIT={commit[:12]}", "-DLLAMA_BUILD_NUMBER=0"]
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run([cmake, "-S", str(source), "-B", str(target), *generator, *wanted.options, *identity])
    run([cmake, "--build", str(target), "-j", str(jobs), "--target", *wanted.tools], nice=10)


if __name__ == "__main__":
    try:
        peer = build(Path(__file__).resolve().parents[2] / ".cache")
    except PeerError as error:
        sys.exit(f"llama_cpp.py: {error}")
    print(json.dumps({**peer.describe(), "directory": str(peer.directory)}, indent=1))
