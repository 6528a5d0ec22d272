"""`lowbit doctor`: what this machine can do and what stands in its way."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lowbit.cli import output

MEASURE_BYTES = 256 * 2**20
MEASURE_SECONDS = 0.3


def configure(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.measure import describe_machine, find_problems

    info = describe_machine()
    bandwidth = int8_peak = crossovers = None
    if info["native_error"] is None:
        from lowbit import _native
        from lowbit.kernels import tuning

        crossovers = tuning.tune()._asdict()
        bandwidth = float(_native.measure_bandwidth(MEASURE_BYTES, MEASURE_SECONDS))
        int8_peak = float(_native.measure_int8_peak(MEASURE_SECONDS))
    return {
        "isa": info["isa"],
        "threads": info["threads"],
        "bandwidth_bytes_per_second": bandwidth,
        "int8_multiply_adds_per_second": int8_peak,
        "crossovers": crossovers,
        "problems": find_problems(info),
        **{key: value for key, value in info.items() if key not in ("isa", "threads")},
    }


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    r = result
    quota = "no quota" if r["cgroup_cpus"] is None else f"quota {r['cgroup_cpus']:g}"
    rows = [
        ("cpu", f"{r['cpu']}, {r['cpus']} CPUs, {quota}"),
        ("instruction set", f"{r['isa']} of {', '.join(r['supported_isas'])}" if r["isa"] else "unknown"),
        ("threads", str(r["threads"])),
        ("memory", f"{_gib(r['memory_available_bytes'])} available of {_gib(r['memory_bytes'])}"),
    ]
    if r["bandwidth_bytes_per_second"]:
        rows += [
            ("memory bandwidth", f"{r['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"),
            ("int8 peak", f"{r['int8_multiply_adds_per_second'] / 1e9:,.0f} G multiply-adds/s"),
            ("decoded in registers", f"up to {r['crossovers']['few']} tokens, unpacked beyond"),
        ]
    sys.stdout.write(output.pairs(rows))
    if not r["problems"]:
        sys.stdout.write("\nNo problems found.\n")
    for problem in r["problems"]:
        sys.stdout.write(f"\nproblem: {problem}\n")


def _gib(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / 2**30:.1f} GiB"
