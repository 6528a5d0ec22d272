"""A machine's profile: what was measured on it, kept as JSON in the user's cache folder.

One file for each machine and number of threads; `lowbit doctor --profile` writes it. It says what it was
measured on (CPU, instruction set, threads, build of the native code): a profile of another machine is not
taken.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.plan.fit import Rates

VERSION = 1


@dataclass(frozen=True)
class Profile:
    """crossovers: largest batches of the kernels gemv and few, see kernels/tuning.py

    identity: cpu, isa, threads; seconds, rates: see fit.py; residuals: by family, see interval.py.

    runtime_bytes: of a process without a model; power: {"idle_watts", "busy_watts"} with a "source", or empty
    """

    identity: dict[str, Any]
    bandwidth_bytes_per_second: float
    int8_multiply_adds_per_second: float
    float_multiply_adds_per_second: float
    memory_bytes: int | None
    runtime_bytes: int
    seconds: dict[str, float]
    rates: Rates
    crossovers: dict[str, int] = field(default_factory=dict)
    residuals: dict[str, list[float]] = field(default_factory=dict)
    power: dict[str, Any] = field(default_factory=dict)
    measured_at: str = ""
    seconds_taken: float = 0.0
    lowbit: str = ""

    @property
    def threads(self) -> int:
        return int(self.identity.get("threads") or 1)

    @property
    def name(self) -> str:
        """What a person calls it."""
        i = self.identity
        return f"{i.get('cpu', 'this machine')}, {i.get('isa')}, {i.get('threads')} threads"

    def to_json(self) -> dict[str, Any]:
        rates = [
            {"format": name, "activation_bits": bits, "tokens": tokens, "seconds_per_weight": values}
            for (name, bits), (tokens, values) in self.rates.items()
        ]
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"version": VERSION, **fields, "rates": rates}

    @staticmethod
    def from_json(data: Any, where: str = "profile") -> Profile:
        """Raises CheckpointError, with the remedy, for anything but a profile of this version."""
        remedy = "measure again: lowbit doctor --profile"
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise CheckpointError(f"{where}: is {found!r}, not a profile of version {VERSION}; {remedy}")
        try:
            rates = {
                (str(r["format"]), int(r["activation_bits"])): (
                    [_positive(t) for t in r["tokens"]],
                    [_number(v) for v in r["seconds_per_weight"]],
                )
                for r in data["rates"]
            }
            if any(len(tokens) != len(values) or not tokens for tokens, values in rates.values()):
                raise ValueError("rates of unequal length")
            return Profile(
                identity=dict(data["identity"]),
                bandwidth_bytes_per_second=_positive(data["bandwidth_bytes_per_second"]),
                int8_multiply_adds_per_second=_positive(data["int8_multiply_adds_per_second"]),
                float_multiply_adds_per_second=_positive(data["float_multiply_adds_per_second"]),
                memory_bytes=None if data["memory_bytes"] is None else int(data["memory_bytes"]),
                runtime_bytes=int(data["runtime_bytes"]),
                seconds={str(k): _number(v) for k, v in data["seconds"].items()},
                rates=rates,
                crossovers={str(k): int(v) for k, v in data["crossovers"].items()},
                residuals={str(k): [float(x) for x in v] for k, v in data["residuals"].items()},
                power=dict(data["power"]),
                measured_at=str(data["measured_at"]),
                seconds_taken=_number(data["seconds_taken"]),
                lowbit=str(data["lowbit"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where}: damaged ({error!r}); {remedy}") from error


def _number(value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise ValueError(f"{value!r} is no number of at least 0")
    return float(value)


def _positive(value: Any) -> float:
    if _number(value) == 0:
        raise ValueError("0 where a positive number is needed")
    return float(value)


def folder() -> Path:
    """$LOWBIT_CACHE, else lowbit in the user's cache folder (as for kernels.json)."""
    given = os.environ.get("LOWBIT_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowbit"


def identity() -> dict[str, Any]:
    """What a profile holds for: CPU, instruction set, threads."""
    from lowbit import _native

    return {"cpu": _cpu(), "isa": _native.isa(), "threads": _native.threads()}


def _cpu() -> str:
    """Family, model and stepping too: virtual machines hide the name."""
    fields: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() not in fields:
            fields[key.strip()] = value.strip()
    name = next((fields[k] for k in ("model name", "Model", "cpu model") if k in fields), "")
    name = name or platform.processor() or platform.machine()
    numbers = [f"{k.split()[-1]} {fields[k]}" for k in ("cpu family", "model", "stepping") if k in fields]
    return " ".join([name, *(["(" + ", ".join(numbers) + ")"] if numbers else [])])


def path(who: dict[str, Any] | None = None) -> Path:
    """The file for a machine: this one if not given."""
    who = identity() if who is None else who
    slug = re.sub(r"[^a-z0-9]+", "-", f"{who['cpu']}-{who['isa']}-{who['threads']}".lower()).strip("-")
    return folder() / f"profile-{slug}.json"


def save(profile: Profile, target: Path | None = None) -> Path:
    """Write the profile, whole or not at all. Returns the file."""
    target = path(profile.identity) if target is None else target
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".profile-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump(profile.to_json(), out, indent=1)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def load(source: Path | None = None) -> Profile | None:
    """The profile of `source`, or of this machine; None if this machine has none (or one of another version).

    Raises CheckpointError for a `source` that cannot be read.
    """
    file = path() if source is None else source
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if source is None:
            return None
        raise CheckpointError(
            f"{file}: there is no such profile; make one: lowbit doctor --profile"
        ) from None
    except (OSError, ValueError) as error:
        if source is None:
            return None
        raise CheckpointError(f"{file}: {error}; measure again: lowbit doctor --profile") from error
    try:
        found = Profile.from_json(data, str(file))
    except CheckpointError:
        if source is None:
            return None
        raise
    if source is None and found.identity != identity():
        return None
    return found
