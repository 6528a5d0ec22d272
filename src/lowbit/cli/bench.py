"""`lowbit bench`: speed and memory of a model beside the bounds of the machine."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lowbit.cli import options, output, site
from lowbit.cli.pull import locate


def configure(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--prefill", type=options.positive, default=512, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--decode", type=options.positive, default=128, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--repeats", type=options.positive, default=3, metavar="N", help="medians of N (default %(default)s)"
    )
    parser.add_argument(
        "--no-first-token",
        action="store_true",
        help="leave out the time to the first token (fresh processes)",
    )
    parser.add_argument("--breakdown", action="store_true", help="say what the time of a step goes into")
    parser.add_argument("--html", metavar="FILE", help="draw the breakdown on a page of its own")
    options.add_runtime(parser, "default: what the model was trained for")
    site.add_meter(parser)
    site.add_site(parser)


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.measure import bench

    if (args.watts or args.meter) and not args.energy:
        raise options.UsageError("--watts and --meter belong to --energy; add it")
    if args.html:
        from lowbit.measure.pages import check_target

        check_target(args.html)
    path = str(locate(args.model))
    result = bench(
        path,
        activations=args.activations,
        context=args.context,
        threads=args.threads,
        kv_bits=args.kv_bits,
        prefill=args.prefill,
        decode=args.decode,
        repeats=args.repeats,
        first_token=not args.no_first_token,
        progress=lambda text: output.note(f"[{text}]") if sys.stderr.isatty() else None,
    )
    result |= {"energy": None, "breakdown": None}
    if args.energy or args.breakdown or args.html:
        _look_closer(args, result)
    return result


def _look_closer(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """What is measured on a model of its own, after the speeds: nothing disturbs these."""
    model = options.load_model(args)
    if args.energy:
        from lowbit.measure.phase_energy import phase_energy

        result["energy"] = phase_energy(
            model, lambda: site.meter_of(args), site.site_of(args), args.prefill, args.decode
        )
    if args.breakdown or args.html:
        from lowbit.measure.breakdown import breakdown
        from lowbit.measure.flame import page
        from lowbit.measure.pages import write_page

        result["breakdown"] = breakdown(model, args.prefill, args.decode, args.repeats)
        if args.html:
            write_page(args.html, page(result["breakdown"], f"{args.model}: where the time of a step goes"))


def _show_breakdown(found: dict[str, Any]) -> None:
    for kind, told in (("decode", "one token"), ("prefill", "a prompt")):
        rows = [
            (
                row["name"],
                f"{1e6 * row['seconds_per_token']:,.2f}",
                f"{row['share']:.1%}",
                "" if row["of_bound"] is None else f"{row['of_bound']:.0%}",
                "=" * round(40 * row["share"]),
            )
            for row in found[kind]["phases"]
        ]
        header = (told, "us per token", "share", "of the bound", "")
        sys.stdout.write("\n" + output.table(header, rows, right=range(1, 4)))


def _memory(r: dict[str, Any]) -> str:
    kinds = ", ".join(f"{name} {output.megabytes(n)}" for name, n in r["memory_bytes"].items())
    return f"{output.megabytes(r['peak_rss_bytes'])}: {kinds}"


def _energy_rows(energy: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for phase in ("prefill", "decode"):
        found = energy[phase]
        report, cost = found["energy"], found["per_million_tokens"]
        cores = f"{1e3 * found['core_seconds_per_token']:.3f} ms of a core per token"
        if cost is None:
            rows.append((f"{phase} energy", f"unavailable: {report['reason']}; {cores}"))
            continue
        between = found["joules_per_token_interval"]
        spread = f" ({between[0]:.4f} to {between[1]:.4f})" if between else ""
        rows.append(
            (
                f"{phase} energy",
                f"{found['joules_per_token']:.4f} J/token{spread}, {report['source']}; {cores}",
            )
        )
        money = "" if cost["money"] is None else f", {cost['money']:,.3f} {cost['currency']}"
        told = f"{cost['kwh']:.4f} kWh, {cost['grams_co2']:,.1f} g CO2, {cost['litres_water']:,.3f} L water"
        rows.append(("per million", f"{told}{money} ({cost['source']})"))
    return rows


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    r = result
    bandwidth, peak = r["bandwidth_bytes_per_second"], r["int8_multiply_adds_per_second"]
    decode = f"{r['decode_tokens_per_second']:,.1f} tokens/s, {r['decode_bound_fraction']:.0%}"
    prefill = f"{r['prefill_tokens_per_second']:,.1f} tokens/s, {r['prefill_bound_fraction']:.0%}"
    first, after = r["time_to_first_token_seconds"], " from the start of a process"
    rows = [
        ("machine", f"{r['cpu']}, {r['isa']}, {r['threads']} threads"),
        ("bits per weight", f"{r['bits_per_weight']:.3f}"),
        ("decode", f"{decode} of the bound that {bandwidth / 1e9:.1f} GB/s of memory set"),
        ("prefill", f"{prefill} of the bound that {peak / 1e9:,.0f} G int8 multiply-adds/s set"),
        (
            "first token",
            "not measured" if first is None else f"{first:.3f} s{after}",
        ),
        ("peak memory", _memory(r)),
    ]
    rows += _energy_rows(r["energy"]) if r["energy"] else []
    sys.stdout.write(output.pairs(rows))
    if r["breakdown"]:
        _show_breakdown(r["breakdown"])
