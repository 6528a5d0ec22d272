"""`lowbit plan`: which formats, on which machine, at what cost, with how much loss, before anything is
quantized.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli import options, output
from lowbit.cli.site import add_site, site_of
from lowbit.errors import RequestError

if TYPE_CHECKING:
    from lowbit.plan.budget import Budget
    from lowbit.plan.network import Network
    from lowbit.plan.planner import AnyMachine, Planner

VIEWS = ("kinetics", "context", "idealized")
MOST_PLANS = 12


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help=f"{options.MODEL_HELP}; or a config.json: no weights are needed",
    )
    parser.add_argument(
        "--device", default="this", metavar="NAME", help="a published device; default this machine"
    )
    parser.add_argument("--devices", type=options.positive, default=1, metavar="N", help="tensor-parallel")
    parser.add_argument("--pipeline", type=options.positive, default=1, metavar="N", help="pipeline stages")
    parser.add_argument("--list-devices", action="store_true", help="show the published devices and stop")
    limits = parser.add_argument_group("budget")
    limits.add_argument("--memory", metavar="SIZE", help="such as 4GB (default: what the machine has)")
    limits.add_argument("--tpot", metavar="TIME", help="time per token, such as 30ms")
    limits.add_argument("--ttft", metavar="TIME", help="time to the first token, such as 1s")
    limits.add_argument("--max-loss", metavar="SHARE", help="increase of perplexity, such as 2%%")
    limits.add_argument("--users", type=options.positive, metavar="N", help="at the same time")
    limits.add_argument(
        "--context", default="2048", metavar="N", help="positions of each user, such as 8k (default 2048)"
    )
    limits.add_argument(
        "--prompt", metavar="N", help="tokens of a prompt (default: the context less the answer)"
    )
    limits.add_argument(
        "--answer", metavar="N", help="tokens of an answer (default: a quarter of the context)"
    )
    limits.add_argument(
        "--objective", default="loss", help="loss, tpot, ttft, throughput, memory, energy or money"
    )
    wishes = parser.add_argument_group("choices")
    wishes.add_argument("--choices", metavar="LIST", help="formats to choose from, with commas between")
    wishes.add_argument(
        "--kv-bits", metavar="LIST", help="bits of keys and values to choose from, such as 8,4"
    )
    wishes.add_argument("--activations", choices=["int8", "int16"], default="int8", help="default int8")
    wishes.add_argument(
        "--method", choices=["rtn", "gptq"], default="rtn", help="of quantizing (default rtn)"
    )
    wishes.add_argument(
        "--sensitivity", metavar="FILE", help="what `lowbit quantize MODEL auto --json` printed"
    )
    wishes.add_argument("--guesses", type=int, default=0, metavar="K", help="of speculation, in each step")
    wishes.add_argument(
        "--accepted", type=float, default=0.0, metavar="A", help="probability that a guess is right"
    )
    parser.add_argument("--view", choices=VIEWS, help="explain instead of choosing, for --scheme")
    parser.add_argument(
        "--scheme", default="int4-g32", metavar="FORMAT", help="of --view (default %(default)s)"
    )
    parser.add_argument(
        "--profile", metavar="FILE", help="of a machine (default: what doctor --profile kept)"
    )
    parser.add_argument("--html", metavar="FILE", help="write plans and their Pareto front as a page")
    parser.add_argument("--watts", type=float, metavar="W", help="the machine's power under load")
    add_site(parser)


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.model.download import description
    from lowbit.plan.network import read_network

    if args.list_devices:
        from lowbit.plan.devices import DEVICES

        return {"devices": [device.to_json() for device in DEVICES.values()]}
    if args.model is None:
        raise options.UsageError("plan: MODEL is missing; name one, or see --list-devices")
    if args.html:
        from lowbit.measure.pages import check_target

        check_target(args.html)
    network = read_network(description(args.model))
    machine = machine_of(args, network)
    if args.view:
        return _view(args, network, machine)
    return _plans(args, network, machine)


def machine_of(args: argparse.Namespace, network: Network) -> AnyMachine:
    """The published device that is asked for, or this machine as it was measured."""
    from lowbit.plan import profile
    from lowbit.plan.device import SpecifiedMachine, device_named
    from lowbit.plan.machine import MeasuredMachine

    if args.device != "this":
        return SpecifiedMachine(device_named(args.device))
    if not network.runs:
        raise RequestError(f"plan: {network.notes[0]}; plan it for a published device with --device NAME")
    found = profile.load(Path(args.profile) if args.profile else None)
    if found is None:
        raise RequestError(
            "plan: this machine has no profile (or one of another CPU, instruction set or number of "
            "threads); "
            "make one in a minute: lowbit doctor --profile. Or plan for a published device with --device NAME"
        )
    return MeasuredMachine(found)


def _budget(args: argparse.Namespace) -> Budget:
    from lowbit.plan import budget

    def count(text: str | None) -> int | None:
        return None if text is None else budget.parse_count(text)

    kv_bits: tuple[int, ...] = ()
    if args.kv_bits:
        parts = args.kv_bits.split(",")
        if not all(part in ("2", "4", "8", "16") for part in parts):
            raise RequestError(
                f"plan: --kv-bits {args.kv_bits!r}; give some of 2, 4, 8, 16 with commas between"
            )
        kv_bits = tuple(int(part) for part in parts)
    return budget.Budget(
        memory_bytes=None if args.memory is None else budget.parse_memory(args.memory),
        tpot_seconds=None if args.tpot is None else budget.parse_seconds(args.tpot),
        ttft_seconds=None if args.ttft is None else budget.parse_seconds(args.ttft),
        max_loss=None if args.max_loss is None else budget.parse_share(args.max_loss),
        users=args.users,
        context=budget.parse_count(args.context),
        prompt=count(args.prompt),
        answer=count(args.answer),
        objective=args.objective,
        choices=budget.parse_choices(args.choices.split(",")) if args.choices else (),
        kv_bits=kv_bits,
        activations=args.activations,
        method=args.method,
        devices=args.devices,
        pipeline=args.pipeline,
        guesses=args.guesses,
        accepted=args.accepted,
        site=site_of(args),
        watts=args.watts,
    )


def _plans(args: argparse.Namespace, network: Network, machine: AnyMachine) -> dict[str, Any]:
    from lowbit.model.json_file import read_json
    from lowbit.plan import report
    from lowbit.plan.accuracy import from_report, prior
    from lowbit.plan.planner import Planner, front

    accuracy = prior(args.method)
    if args.sensitivity:
        accuracy = from_report(read_json(Path(args.sensitivity)), args.method)
    planner = Planner(network, machine, _budget(args), accuracy)
    found = planner.plans()
    result = _about(args, network, machine, planner)
    if not found:
        told = report.infeasible(planner)
        nearest = told.pop("nearest")
        result |= {"plans": [], "infeasible": told}
        told["nearest"] = None if nearest is None else report.plan_json(planner, nearest, args.model)
        return result
    best = {id(plan) for plan in front(found)}
    shown = [found[0], *(plan for plan in found[1:] if id(plan) in best)][:MOST_PLANS]
    result["plans"] = [report.plan_json(planner, plan, args.model) for plan in shown]
    if args.html:
        from lowbit.measure.pages import write_page
        from lowbit.measure.plan_page import plan_page

        write_page(args.html, plan_page(result))
        result["html"] = args.html
    return result


def _about(
    args: argparse.Namespace, network: Network, machine: AnyMachine, planner: Planner
) -> dict[str, Any]:
    budget = planner.budget
    return {
        "model": args.model,
        "parameters": network.parameters,
        "machine": machine.name,
        "machine_source": machine.source,
        "notes": list(network.notes),
        "objective": budget.objective,
        "prompt_tokens": budget.prompt_tokens,
        "answer_tokens": budget.answer_tokens,
        "limits": planner.limits(),
    }


def _view(args: argparse.Namespace, network: Network, machine: AnyMachine) -> dict[str, Any]:
    from lowbit.formats import Scheme
    from lowbit.plan import views
    from lowbit.plan.cost import StepCost

    budget = _budget(args)
    scheme = Scheme.parse(args.scheme)
    bits = budget.kv_bits[0] if budget.kv_bits else None
    cost = StepCost(network, scheme, machine, bits, budget.devices, budget.pipeline)
    result: dict[str, Any] = {
        "model": args.model,
        "machine": machine.name,
        "machine_source": machine.source,
        "scheme": args.scheme,
        "kv_bits": cost.kv_bits,
        "view": args.view,
    }
    if args.view == "kinetics":
        result["rows"] = views.kinetics(cost, budget.prompt_tokens, budget.users or 1)
    elif args.view == "context":
        memory = budget.memory_bytes or machine.memory_bytes
        if memory is None:
            raise RequestError("plan: the machine's memory is not known; give --memory")
        result["rows"] = views.long_context(cost, float(memory))
    else:
        result["rows"] = [views.idealized(cost, budget.prompt_tokens, budget.answer_tokens)]
    return result


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    if "devices" in result:
        _show_devices(result["devices"])
        return
    if "view" in result:
        names = list(result["rows"][0])
        rows = [
            ["" if row[name] is None else f"{row[name]:,.4g}" for name in names] for row in result["rows"]
        ]
        sys.stdout.write(output.table(names, rows, range(len(names))))
        return
    if not result["plans"]:
        told = result["infeasible"]
        sys.stdout.write(f"no plan meets the budgets: {told['message']}\n")
        if told["nearest"] is not None:
            sys.stdout.write(f"nearest, which exceeds them by {told['exceeds_by'] - 1:.0%}:\n")
            _show_plans([told["nearest"]])
        raise RequestError(f"plan: infeasible: {told['message']}")
    for note in result["notes"]:
        output.note(f"note: {note}")
    _show_plans(result["plans"])
    best = result["plans"][0]
    source = best["time_per_token_seconds_source"]
    sys.stdout.write(
        f"\ntimes: {source}\nloss: {best['loss_source']}\nenergy: {best['joules_per_token_source']}\n"
    )
    if best["commands"]:
        sys.stdout.write("\ncarry out the first:\n" + "".join(f"  {line}\n" for line in best["commands"]))
    if "html" in result:
        sys.stdout.write(f"\n{result['html']}\n")


def _show_plans(plans: list[dict[str, Any]]) -> None:
    from lowbit.measure.plan_page import COLUMNS, cells

    rows = [
        [text if bounds is None else f"{text} [{bounds[0]}, {bounds[1]}]" for text, bounds in cells(plan)]
        for plan in plans
    ]
    sys.stdout.write(output.table(COLUMNS, rows, range(1, len(COLUMNS))))


def _show_devices(devices: list[dict[str, Any]]) -> None:
    header = ["device", "kind", "memory", "bandwidth", "16-bit TFLOPS", "most W", "source"]
    rows = []
    for d in devices:
        peak = d["peaks"].get("bf16") or d["peaks"].get("fp16") or 0.0
        most = "?" if d["most_watts"] is None else f"{d['most_watts']:g}"
        rows.append(
            [
                d["name"],
                d["kind"],
                f"{d['memory'] / 1e9:g} GB",
                f"{d['bandwidth'] / 1e9:,.0f} GB/s",
                f"{peak / 1e12:g}",
                most,
                d["source"],
            ]
        )
    sys.stdout.write(output.table(header, rows, (2, 3, 4, 5)))
    sys.stdout.write("\nAll are specifications, none is measured by us.\n")
