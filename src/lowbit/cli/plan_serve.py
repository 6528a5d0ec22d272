"""`lowbit plan serve`: what a service would be like, simulated with the engine's own scheduler."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli import options, output
from lowbit.errors import RequestError

if TYPE_CHECKING:
    from lowbit.plan.cluster import Link, MachineSpec
    from lowbit.plan.cost import StepCost
    from lowbit.plan.power import PhasePower
    from lowbit.plan.serving import Limits
    from lowbit.plan.trace import Request

MEMORY_MARGIN = 0.05  # of the memory that is left to other things
WHOLE = "whole"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help=f"{options.MODEL_HELP}; or a config.json: no weights are needed"
    )
    parser.add_argument("--scheme", default="int4-g32", metavar="FORMAT", help="default %(default)s")
    parser.add_argument("--kv-bits", type=int, choices=[2, 4, 8, 16], help="default: as the scheme says")
    parser.add_argument("--device", default="this", metavar="NAME", help="published; default this machine")
    parser.add_argument("--devices", type=options.positive, default=1, metavar="N", help="of a server")
    parser.add_argument("--servers", type=options.positive, default=1, metavar="N", help="default 1")
    parser.add_argument("--profile", metavar="FILE", help="of a machine (see `lowbit doctor --profile`)")
    load = parser.add_argument_group("the load")
    load.add_argument("--trace", type=Path, metavar="FILE", help="of Azure (CSV) or Mooncake (JSON)")
    load.add_argument("--rate", type=float, metavar="R", help="or R requests a second, at random")
    load.add_argument("--prompt-tokens", type=options.positive, default=512, metavar="N")
    load.add_argument("--answer-tokens", type=options.positive, default=128, metavar="N")
    load.add_argument("--requests", type=options.positive, default=300, metavar="N", help="default 300")
    load.add_argument("--longest", type=options.positive, metavar="N", help="leave out longer requests")
    load.add_argument("--scale", type=float, default=1.0, metavar="S", help="a trace S times as fast")
    load.add_argument("--length-scale", type=float, default=1.0, metavar="S", help="lengths S times as long")
    load.add_argument("--seed", type=int, default=0)
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--slo", metavar="LIST", default="", help="what users accept: ttft=1s,tpot=50ms[,share=90%%]"
    )
    limits.add_argument("--memory", metavar="SIZE", help="of a server (default: what the machine has)")
    limits.add_argument("--sequences", type=options.positive, default=64, metavar="N", help="default 64")
    limits.add_argument("--chunk", type=options.positive, metavar="N", help="prompt tokens of a step")
    parser.add_argument(
        "--sweep", choices=["chunk", "split"], help="chunks, or servers for prompts and for answers"
    )
    parser.add_argument("--link", default="10GB", metavar="SIZE", help="per second between servers (10GB)")
    power = parser.add_argument_group("power")
    power.add_argument("--power", metavar="LIST", help="watts: idle=75,token=380,prompt=700")
    power.add_argument("--power-cap", type=float, metavar="W", help="of a server")
    power.add_argument("--supply", type=options.positive, metavar="N", help="built for N: how many fit")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.cli.plan import machine_of
    from lowbit.formats import Scheme
    from lowbit.model.download import description
    from lowbit.plan.cost import StepCost
    from lowbit.plan.memory import kv_bytes
    from lowbit.plan.network import read_network

    network = read_network(description(args.model))
    machine = machine_of(args, network)
    cost = StepCost(network, Scheme.parse(args.scheme), machine, args.kv_bits, args.devices)
    blocks = _blocks(args, cost, machine.memory_bytes)
    longest = min(args.longest or network.max_context, network.max_context, blocks * 256)
    requests, left_out = _requests(args, longest)
    power = _power(args)
    spec = _spec(args, cost, blocks, power)
    result: dict[str, Any] = {
        "model": args.model,
        "scheme": args.scheme,
        "kv_bits": cost.kv_bits,
        "machine": machine.name,
        "machine_source": machine.source,
        "servers": args.servers,
        "kv_tokens": blocks * 256,
        "left_out": left_out,
        "longest": longest,
    }
    limits = _limits(args.slo)
    position_bytes = kv_bytes(network, cost.kv_bits, 256) / 256
    with output.Progress("simulating") as bar:
        found = _simulations(
            args, spec, requests, limits, position_bytes, lambda text: bar.update(0, 1, text)
        )
    result |= found
    if power is not None:
        result["power"] = _power_result(args, spec, requests, limits, power)
    return result


def _blocks(args: argparse.Namespace, cost: StepCost, known: float | None) -> int:
    """Blocks of keys and values beside the weights."""
    from lowbit.plan.budget import parse_memory
    from lowbit.plan.memory import kv_bytes, weight_bytes

    memory = parse_memory(args.memory) if args.memory else known
    if memory is None:
        raise RequestError("plan serve: the machine's memory is not known; give --memory")
    room = memory * args.devices * (1 - MEMORY_MARGIN) - weight_bytes(cost.network, cost.scheme)
    blocks = int(room // kv_bytes(cost.network, cost.kv_bits, 256))
    if blocks < 1:
        weights = weight_bytes(cost.network, cost.scheme)
        raise RequestError(
            f"plan serve: weights of {weights / 1e9:.2f} GB leave no room for keys and values in "
            f"{memory * args.devices / 1e9:.2f} GB; give more --devices, or fewer bits with --scheme"
        )
    return blocks


def _requests(args: argparse.Namespace, longest: int) -> tuple[list[Request], int]:
    from lowbit.plan.trace import Request, replay

    if (args.trace is None) == (args.rate is None):
        raise RequestError("plan serve: give a --trace, or a --rate of requests per second")
    if args.trace is not None:
        if args.scale <= 0 or args.length_scale <= 0:
            raise RequestError("plan serve: --scale and --length-scale must be positive")
        return replay(
            args.trace, scale=args.scale, lengths=args.length_scale, longest=longest, count=args.requests
        )
    if args.rate <= 0:
        raise RequestError(f"plan serve: --rate {args.rate} must be positive")
    if args.prompt_tokens + args.answer_tokens > longest:
        raise RequestError(
            f"plan serve: {args.prompt_tokens} + {args.answer_tokens} tokens; at most {longest} fit"
        )
    chance, at, requests = random.Random(args.seed), 0.0, []
    for _ in range(args.requests):
        requests.append(Request(args.prompt_tokens, args.answer_tokens, at))
        at += chance.expovariate(args.rate)
    return requests, 0


def _limits(text: str) -> Limits:
    from lowbit.plan.budget import parse_seconds, parse_share
    from lowbit.plan.serving import Limits

    given = _pairs(text, ("ttft", "tpot", "share"), "--slo")
    return Limits(
        parse_seconds(given["ttft"]) if "ttft" in given else None,
        parse_seconds(given["tpot"]) if "tpot" in given else None,
        min(1.0, parse_share(given["share"])) if "share" in given else 0.9,
    )


def _pairs(text: str, known: tuple[str, ...], option: str) -> dict[str, str]:
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known or not value or name in found:
            raise RequestError(
                f"plan serve: {option} {part!r}; give each of {', '.join(known)} once as NAME=VALUE"
            )
        found[name] = value
    return found


def _power(args: argparse.Namespace) -> PhasePower | None:
    from lowbit.plan.power import PhasePower

    if args.power is None:
        if args.power_cap is not None or args.supply is not None:
            raise RequestError("plan serve: --power-cap and --supply need --power idle=..,token=..,prompt=..")
        return None
    given = _pairs(args.power, ("idle", "token", "prompt"), "--power")
    try:
        return PhasePower(*(float(given[name]) for name in ("idle", "prompt", "token")))
    except (KeyError, ValueError) as error:
        raise RequestError(
            f"plan serve: --power {args.power!r}: {error}; give idle, token and prompt"
        ) from error


def _spec(args: argparse.Namespace, cost: StepCost, blocks: int, power: PhasePower | None) -> MachineSpec:
    from lowbit.plan.cluster import MachineSpec
    from lowbit.plan.power import capped

    limited = cost if power is None or args.power_cap is None else capped(cost, power, args.power_cap)
    return MachineSpec(limited, blocks, args.sequences, args.chunk)


def _simulations(
    args: argparse.Namespace,
    spec: MachineSpec,
    requests: list[Request],
    limits: Limits,
    position_bytes: float,
    say: Any,
) -> dict[str, Any]:
    from lowbit.plan import serving
    from lowbit.plan.budget import parse_memory
    from lowbit.plan.cluster import Link

    servers = [(WHOLE, spec)] * args.servers
    found: dict[str, Any] = {"limits": serving.limits_json(limits)}
    found["run"] = serving.simulate(requests, servers, limits)[0]
    found["goodput"] = None
    if limits.first_token_seconds is not None or limits.time_per_token_seconds is not None:
        found["goodput"] = serving.goodput(requests, servers, limits, None, say)
    if args.sweep == "chunk":
        found["chunks"] = serving.chunk_sweep(requests, spec, args.servers, limits)
    if args.sweep == "split":
        link: Link = Link(parse_memory(args.link), position_bytes)
        found["splits"] = serving.split_sweep(requests, spec, args.servers, limits, link, say)
    return found


def _power_result(
    args: argparse.Namespace,
    spec: MachineSpec,
    requests: list[Request],
    limits: Limits,
    power: PhasePower,
) -> dict[str, Any]:
    from lowbit.plan import serving
    from lowbit.plan.power import energy_joules, machines_fed, power_series

    run, steps = serving.simulate(requests, [(WHOLE, spec)] * args.servers, limits)
    seconds = run["seconds"]
    series = [power_series(steps, power, number, seconds) for number in range(args.servers)]
    joules = energy_joules(steps, power, seconds, args.servers)
    tokens = run["tokens_per_second"] * seconds
    told: dict[str, Any] = {
        "cap_watts": args.power_cap,
        "mean_watts": joules / seconds,
        "peak_watts": max(sum(watts) for watts in zip(*series)),
        "joules_per_token": joules / tokens,
        "supply": None,
    }
    if args.supply is not None:
        told["supply"] = machines_fed(series, args.supply, power, args.power_cap, args.seed)
    return told


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    run = result["run"]
    rows = [
        ("machine", f"{result['servers']} x {result['machine']} ({result['machine_source']})"),
        ("model", f"{result['model']}, {result['scheme']}, {result['kv_bits']}-bit keys and values"),
        ("room", f"keys and values of {result['kv_tokens']:,} tokens per server"),
        ("load", f"{run['requests']} requests, {run['requests_per_second']:.3g} a second{_left_out(result)}"),
        ("first token", _spread(run, "first_token_seconds")),
        ("per token", _spread(run, "time_per_token_seconds")),
        ("throughput", f"{run['tokens_per_second']:,.1f} tokens/s, servers busy {run['busy']:.0%}"),
    ]
    if result["goodput"] is not None:
        good, share = result["goodput"], result["limits"]["share"]
        rows.append(("within limits", f"{run['met']:.1%} of the requests"))
        told = (
            f"{good['requests_per_second']:.3g} requests a second, the load {good['speed']:.3g} times as fast"
        )
        rows.append((f"{share:.0%} within", told if good["speed"] else "at no rate"))
    if "power" in result:
        power = result["power"]
        watts = f"{power['mean_watts']:,.0f} W on average, {power['peak_watts']:,.0f} W at most"
        rows.append(("power", f"{watts}, {power['joules_per_token']:.3g} J per token"))
        if power["supply"]:
            fed = power["supply"]
            rows.append(
                ("supply", f"feeds {fed['machines']} servers, {fed['share_more']:.0%} more than rated")
            )
    sys.stdout.write(output.pairs(rows))
    for key, columns in (("chunks", ("chunk_tokens",)), ("splits", ("prompts", "answers"))):
        if key in result:
            _show_sweep(result[key], columns)


def _left_out(result: dict[str, Any]) -> str:
    if not result["left_out"]:
        return ""
    return f"; {result['left_out']} of more than {result['longest']:,} tokens left out"


def _show_sweep(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    header = (
        *(name.replace("_", " ") for name in columns),
        "requests/s",
        "first p95",
        "per token p95",
        "gap p95",
    )
    lines = []
    for row in rows:
        stands = ["fitted" if row[name] is None else str(row[name]) for name in columns]
        lines.append(
            (
                *stands,
                f"{row['requests_per_second']:.3g}" + ("" if row.get("speed", 1) else " (limits not met)"),
                f"{row['first_token_seconds_p95']:.3f} s",
                f"{1e3 * row['time_per_token_seconds_p95']:.2f} ms",
                f"{1e3 * row['longest_gap_seconds_p95']:.1f} ms",
            )
        )
    sys.stdout.write("\n" + output.table(header, lines, right=range(len(header))))


def _spread(run: dict[str, Any], name: str) -> str:
    unit, factor = ("s", 1.0) if name.startswith("first") else ("ms", 1e3)
    return ", ".join(f"p{p} {run[f'{name}_p{p}'] * factor:.3g} {unit}" for p in (50, 95, 99))
