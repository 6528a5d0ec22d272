"""Energy of a piece of work: read where a counter exists, estimated and so called where a power is known,
else unavailable, which is None and never 0.

    meter            a file that holds joules, of a plug or board meter
    rapl             the packages' and the memory's counters of the CPU (/sys/class/powercap), whole machine
    nvml_counter     the energy counter of an NVIDIA card
    estimated_tdp    a power that the user states, times the share of the cores in use
    unavailable      none of these; the work is still described by its core-seconds and bytes

A counter that does not move is absent: virtual machines show such ones.
Sources: Linux Documentation/power/powercap; NVML API, nvmlDeviceGetTotalEnergyConsumption.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from lowbit.errors import RequestError

POWERCAP = Path("/sys/class/powercap")
POLL_SECONDS = 30.0  # well before the counter of a busy package wraps around (minutes)
STILL_SECONDS = 0.05  # a counter that has not moved after so long a window stands still
IDLE_SHARE = 0.3  # of the stated power that an idle machine draws, for the estimate
SOURCES = ("meter", "rapl", "nvml_counter", "estimated_tdp", "unavailable")


@dataclass(frozen=True)
class EnergyReport:
    """joules: None where the source is "unavailable". interval: (lowest, highest) of an estimate.

    scope: what the joules belong to. idle: whether the power that an idle machine draws is part of them.
    core_seconds: CPU time of this process and its children in the window.
    """

    joules: float | None
    interval: tuple[float, float] | None
    source: str
    scope: str
    idle: str
    window_seconds: float
    core_seconds: float
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Counter(Protocol):
    """Joules since some beginning; `read` is called at least every POLL_SECONDS."""

    source: str
    scope: str

    def read(self) -> float: ...


class RaplCounter:
    """Packages and memory of all sockets. Raises OSError where they cannot be read."""

    source = "rapl"
    scope = "CPU packages and their memory, whole machine"

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = [
            (zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()))
            for zone in sorted(root.glob("intel-rapl:*"))
            if _counts((zone / "name").read_text().strip(), zone.name.count(":"))
        ]
        if not self._zones:
            raise OSError(f"no package zone under {root}")
        self._last = [int(path.read_text()) for path, _ in self._zones]
        self._joules = 0.0

    def read(self) -> float:
        for i, (path, wrap) in enumerate(self._zones):
            now = int(path.read_text())
            # The counter holds 0 .. wrap; going back means that it has passed the end once.
            moved = now - self._last[i] if now >= self._last[i] else now + wrap + 1 - self._last[i]
            self._joules += moved / 1e6
            self._last[i] = now
        return self._joules


def _counts(name: str, depth: int) -> bool:
    """Packages, and memory below them. Core and uncore are parts of a package; psys holds everything."""
    return (depth == 1 and name.startswith("package")) or (depth == 2 and name == "dram")


class NvmlCounter:
    """One NVIDIA card. Raises ImportError without its Python package, RuntimeError without the card."""

    source = "nvml_counter"

    def __init__(self, index: int = 0) -> None:
        import pynvml

        try:
            pynvml.nvmlInit()
            self._card = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._card)
        except pynvml.NVMLError as error:
            raise RuntimeError(f"card {index}: {error}") from error
        self._nvml = pynvml
        self.scope = f"card {index}"

    def read(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card)) / 1e3


class MeterFile:
    """A file that some meter keeps up to date: one number, joules since some beginning."""

    source = "meter"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.scope = f"what {path} meters"
        self.read()

    def read(self) -> float:
        try:
            return float(self._path.read_text())
        except (OSError, ValueError) as error:
            raise RequestError(
                f"energy: {self._path}: {error}; the meter's file holds one number, joules so far"
            ) from error


class EnergyMeter:
    """`with EnergyMeter() as meter: work()`; then `meter.report`.

    meter: a file of a meter. card: index of an NVIDIA card. watts: the machine's power under full load, for
    an estimate where no counter is. The first of meter, card, RAPL and watts that there is, counts.
    """

    def __init__(
        self,
        meter: Path | None = None,
        card: int | None = None,
        watts: float | None = None,
        powercap: Path = POWERCAP,
    ) -> None:
        if watts is not None and not 0 < watts < 1e6:
            raise RequestError(f"energy: watts={watts}; give the machine's power under full load")
        self._watts = watts
        self._reason = ""
        self._counter = self._open(meter, card, powercap)
        self.report: EnergyReport | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def _open(self, meter: Path | None, card: int | None, powercap: Path) -> Counter | None:
        if meter is not None:
            return MeterFile(meter)
        if card is not None:
            try:
                return NvmlCounter(card)
            except (ImportError, RuntimeError) as error:
                raise RequestError(f"energy: {error}; NVIDIA's energy counter cannot be read") from error
        try:
            return RaplCounter(powercap)
        except PermissionError:
            self._reason = f"{powercap} is readable by root only; run as root, or give a power (--watts)"
        except (OSError, ValueError):
            self._reason = "this machine shows no energy counter; give its power (--watts) for an estimate"
        return None

    def __enter__(self) -> EnergyMeter:
        self._begin = self._counter.read() if self._counter else 0.0
        self._cpu, self._started = core_seconds(), time.perf_counter()
        self._stop.clear()
        if self._counter:
            threading.Thread(target=self._poll, daemon=True).start()
        return self

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            with self._lock:
                if self._counter and not self._stop.is_set():
                    self._counter.read()

    def __exit__(self, *error: object) -> None:
        window = time.perf_counter() - self._started
        cores = core_seconds() - self._cpu
        self._stop.set()
        with self._lock:
            joules = self._counter.read() - self._begin if self._counter else 0.0
        if self._counter and (joules > 0 or window < STILL_SECONDS):
            self.report = EnergyReport(
                joules, None, self._counter.source, self._counter.scope, "included", window, cores
            )
            return
        reason = f"the {self._counter.source} counter stands still" if self._counter else self._reason
        if self._watts is None:
            self.report = EnergyReport(None, None, "unavailable", "none", "none", window, cores, reason)
            return
        self.report = estimate(self._watts, window, cores, reason)


def estimate(watts: float, window: float, cores: float, reason: str | None = None) -> EnergyReport:
    """Energy of `window` seconds in which `cores` core-seconds were used, of a machine of `watts`.

    The machine draws IDLE_SHARE of its power when idle and grows to all of it with the share of cores in use.
    The interval goes from the used share alone, as if idle were free, to full power throughout.
    """
    used = min(1.0, cores / (window * (os.cpu_count() or 1))) if window > 0 else 0.0
    likely = watts * window * (IDLE_SHARE + (1 - IDLE_SHARE) * used)
    return EnergyReport(
        likely,
        (watts * window * used, watts * window),
        "estimated_tdp",
        f"whole machine at {watts:g} W under full load",
        f"included, {IDLE_SHARE:.0%} of full load",
        window,
        cores,
        reason,
    )


def core_seconds() -> float:
    """CPU time of this process and its finished children, all threads."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total
