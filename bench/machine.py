"""What a result was measured on: CPU, its flags, compiler, commit. Read from the system, never guessed."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

from lowbit.measure.machine import cache_bytes

ROOT = Path(__file__).resolve().parents[1]
# The flags that decide which kernels run; the whole list would bury them.
FLAGS = re.compile(
    "avx2|f16c|fma|avx_vnni|avx512(f|bw|vl|_vnni|_vbmi2?|_bf16|_bitalg)|gfni|amx_(int8|bf16)|asimd|asimddp|i8mm|sve"
)


def describe() -> dict[str, object]:
    """CPU, caches, memory, system, compiler and Python of this machine. Sizes are in bytes."""
    cpuinfo = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return {
        "cpu": name.group(1).strip() if name else platform.processor() or platform.machine(),
        "cpu_model": _cpu_model(cpuinfo),
        "cpu_flags": [f for f in (flags.group(1).split() if flags else []) if FLAGS.fullmatch(f)],
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "l3_bytes": cache_bytes(3),
        "memory_bytes": int(memory.group(1)) * 1024 if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "compiler": (_command("c++", "--version") or "unknown").splitlines()[0],
    }


def busy_cpus(seconds: float = 1.0) -> float:
    """CPUs in use by anyone, time stolen by the hypervisor included, while this process sleeps."""
    before = _cpu_seconds()
    time.sleep(seconds)
    return max(0.0, _cpu_seconds() - before) / seconds


def _cpu_seconds() -> float:
    """Seconds that all CPUs together have not been idle since start-up; 0 where the system does not say."""
    fields = _read("/proc/stat").split("\n", 1)[0].split()[1:9]
    if len(fields) < 8:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def commit() -> dict[str, object]:
    """The commit measured, and whether the working tree differed from it (results files aside)."""
    changed = _command("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return {"commit": _command("git", "rev-parse", "HEAD") or "unknown", "modified": bool(changed)}


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def result_name(date: str, cpu: str) -> str:
    """2025-01-31T10:00:00Z, "AMD EPYC (tm)" -> 2025-01-31-amd-epyc-tm.json"""
    slug = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    return f"{date[:10]}-{slug or 'cpu'}.json"


def _cpu_model(cpuinfo: str) -> str:
    """Family and model: virtual machines often hide the marketing name, never these."""
    found = [re.search(rf"^{key}\s*:\s*\d+$", cpuinfo, re.M) for key in ("cpu family", "model", "stepping")]
    return ", ".join(re.sub(r"\s*:\s*", " ", one.group(0)) for one in found if one)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _command(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
