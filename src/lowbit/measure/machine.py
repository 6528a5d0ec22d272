"""The machine at hand: what it is, what it allows, and what stands in the way."""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

_GIB = 2**30
_FREQUENCY = "/sys/devices/system/cpu/cpu0/cpufreq"


def describe_machine() -> dict[str, Any]:
    """CPU, instruction set, threads and memory; works without the native module too.

    cgroup_cpus is the quota in CPUs (None: unlimited); memory in bytes, the cgroup's limit included.
    """
    info: dict[str, Any] = {
        "cpu": cpu_name(),
        "isa": None,
        "supported_isas": [],
        "threads": 0,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "cgroup_cpus": cgroup_cpus(),
        "memory_bytes": memory_bytes("MemTotal"),
        "memory_available_bytes": memory_bytes("MemAvailable"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "native_error": None,
    }
    try:
        from lowbit import _native
    except ImportError as error:
        info["native_error"] = str(error)
    else:
        info.update(
            isa=_native.isa(), supported_isas=list(_native.supported_isas()), threads=_native.threads()
        )
    return info


def find_problems(info: dict[str, Any]) -> list[str]:
    """What makes this machine slower or less able than it could be; each with a remedy."""
    problems = []
    isa, supported = info["isa"], info["supported_isas"]
    if info["native_error"] is not None:
        problems.append(
            f"the native module cannot be loaded ({info['native_error']}); nothing runs without it: "
            "run `make build`, or install a wheel for this platform"
        )
    if isa is not None and supported and isa != supported[-1] and os.environ.get("LOWBIT_ISA"):
        problems.append(
            f"LOWBIT_ISA={isa} is set and the CPU can do {supported[-1]}; unset it for full speed"
        )
    elif isa == "scalar":
        problems.append("the CPU has neither AVX2 nor NEON that lowbit can use; expect a tenth of the speed")
    elif isa == "avx2":
        problems.append(
            "the CPU has no VNNI; int8 products take three instructions for one, prefill is slower"
        )
    allowed = info["cpus"] if info["cgroup_cpus"] is None else min(info["cpus"], info["cgroup_cpus"])
    if info["threads"] > math.ceil(allowed):
        problems.append(
            f"{info['threads']} threads on {allowed:g} allowed CPUs wait for one another; "
            f"use --threads {max(1, math.ceil(allowed))} or unset LOWBIT_THREADS"
        )
    if 0 < info["threads"] < math.floor(allowed) and os.environ.get("LOWBIT_THREADS"):
        problems.append(
            f"LOWBIT_THREADS={info['threads']} leaves some of {allowed:g} CPUs idle; unset it for full speed"
        )
    available = info["memory_available_bytes"]
    if available is not None and available < _GIB:
        problems.append(
            f"only {available / _GIB:.2f} GiB of memory are available; a 1B model at 4 bits needs 1 GiB: "
            "close programs or choose a smaller model"
        )
    load = info["load_average"]
    if load is not None and load > info["cpus"] + 0.5:
        problems.append(
            f"the load average is {load:.1f} on {info['cpus']} CPUs: other programs are running and "
            "measurements will be low; wait or stop them"
        )
    # intel_pstate and amd-pstate call their normal, dynamic mode "powersave".
    governor, driver = (_read(f"{_FREQUENCY}/scaling_{name}") or "" for name in ("governor", "driver"))
    if governor == "powersave" and "pstate" not in driver:
        problems.append("the CPU governor is `powersave`; set it to `performance` for full speed")
    return problems


def cpu_name() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.processor() or platform.machine()


def cgroup_cpus() -> float | None:
    """CPU quota of the control group, version 2 or 1, in CPUs; None without one."""
    quota = (_read("/sys/fs/cgroup/cpu.max") or "").split()
    if len(quota) != 2:
        quota = [
            _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "-1",
            _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or "0",
        ]
    if not all(part.isdigit() for part in quota) or int(quota[1]) == 0:
        return None
    return int(quota[0]) / int(quota[1])


def memory_bytes(field: str) -> int | None:
    """A field of /proc/meminfo in bytes, no more than the control group allows."""
    for line in (_read("/proc/meminfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key == field:
            return min(int(value.split()[0]) * 1024, _cgroup_memory(field))
    return None


def cache_bytes(level: int) -> int | None:
    """Size of the first CPU's cache of that level, or None if the system does not say."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(f"{index}/level") == str(level):
            size = re.match(r"(\d+)([KM]?)", _read(f"{index}/size") or "")
            return int(size[1]) * {"": 1, "K": 1024, "M": 1024**2}[size[2]] if size else None
    return None


def peak_rss_bytes() -> int:
    """The most memory this process has held. /proc first: ru_maxrss survives exec and may be the parent's."""
    for line in (_read("/proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cgroup_memory(field: str) -> int:
    limit = _read("/sys/fs/cgroup/memory.max") or _read("/sys/fs/cgroup/memory/memory.limit_in_bytes") or ""
    if not limit.isdigit():
        return 2**63
    used = (
        _read("/sys/fs/cgroup/memory.current") or _read("/sys/fs/cgroup/memory/memory.usage_in_bytes") or "0"
    )
    return max(0, int(limit) - int(used)) if field == "MemAvailable" else int(limit)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
