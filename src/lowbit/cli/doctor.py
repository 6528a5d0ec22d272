"""`lowbit doctor`: what this machine can do and what stands in its way."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lowbit.cli import options, output

MEASURE_BYTES = 256 * 2**20
MEASURE_SECONDS = 0.3


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        action="store_true",
        help="time steps of many small networks, under a minute, and keep what `lowbit plan` needs",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="of the profile (default: the cache folder)")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.measure import describe_machine, find_problems

    if args.output and not args.profile:
        raise options.UsageError("doctor: --output names the file of a profile; give --profile as well")
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
        **(_profile(args) if args.profile else {}),
    }


def _profile(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, fit, keep."""
    from lowbit import __version__
    from lowbit.measure.profile import measure_profile
    from lowbit.plan import profile
    from lowbit.plan.calibrate import make_profile

    with output.Progress("time steps of small networks") as bar:
        measured = measure_profile(bar.update)
    made = make_profile(measured, profile.identity(), __version__)
    target = profile.save(made, Path(args.output) if args.output else None)
    return {"profile": made.to_json(), "profile_path": str(target)}


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
    if "profile" in r:
        rows += _profile_rows(r["profile"], r["profile_path"])
    sys.stdout.write(output.pairs(rows))
    if not r["problems"]:
        sys.stdout.write("\nNo problems found.\n")
    for problem in r["problems"]:
        sys.stdout.write(f"\nproblem: {problem}\n")


def _profile_rows(profile: dict[str, Any], path: str) -> list[tuple[str, str]]:
    """What a person wants to see of a profile: is it fast, is it trustworthy, where is it."""
    from lowbit.plan.interval import bounds

    rows = []
    for entry in profile["rates"]:
        if entry["activation_bits"] == 8:
            one, many = entry["seconds_per_weight"][0], entry["seconds_per_weight"][-1]
            tokens = entry["tokens"][-1]
            text = f"1 token: {1e-9 / max(one, 1e-30):,.1f} G weights/s, {tokens:g} tokens: "
            rows.append(
                (entry["format"], text + f"{1e-9 * tokens / max(many, 1e-30):,.0f} G multiply-adds/s")
            )
    for family, residuals in profile["residuals"].items():
        found = bounds(residuals)
        words = "too few points" if found is None else f"{found[0] - 1:+.0%} to {found[1] - 1:+.0%}"
        rows.append((f"90% of {family}", f"measured over predicted: {words} ({len(residuals)} points)"))
    rows.append(("profile", f"{path}, {profile['seconds_taken']:.0f} s"))
    return rows


def _gib(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / 2**30:.1f} GiB"
