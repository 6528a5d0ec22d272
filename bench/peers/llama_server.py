"""Run llama.cpp's server, the peer of the serving benchmarks: start, wait until it is ready, stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from peers.llama_cpp import LlamaCpp, PeerError

READY_SECONDS, STOP_SECONDS = 120.0, 10.0


class Server:
    """A server process that listens on a free port of 127.0.0.1, as a context manager.

    command: its program and arguments without the port. health: the route that answers 200 once it is ready.
    """

    def __init__(self, command: Sequence[str], health: str, environment: dict[str, str] | None = None):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        try:
            self._wait(health)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it politely, then not."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def said(self) -> str:
        """The end of what it wrote."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()[-800:]

    def _wait(self, health: str) -> None:
        until = time.monotonic() + READY_SECONDS
        name = Path(self._process.args[0]).name  # type: ignore[index]
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise PeerError(f"{name}: ended with {self._process.returncode}: {self.said()}")
            try:
                with urllib.request.urlopen(f"{self.url}{health}", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise PeerError(f"{name}: not ready after {READY_SECONDS:g} s: {self.said()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    peer: LlamaCpp, model: Path, *, threads: int, slots: int, context: int, options: Sequence[str] = ()
) -> Server:
    """llama-server with `slots` sequences of at most `context` tokens each, batched continuously.

    Its cache of prompts is off where a benchmark asks for that in `options`; flash attention is on, which was
    measured to be its fastest.
    """
    command = [str(peer.directory / "llama-server"), "-m", str(model), "--host", "127.0.0.1"]
    command += ["-t", str(threads), "-np", str(slots), "-c", str(slots * context), "-cb", "-fa", "on"]
    return Server([*command, "--no-webui", *options], "/health")
