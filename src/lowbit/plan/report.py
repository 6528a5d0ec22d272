"""Plans as JSON: every figure with its interval and its source; and the commands that carry a plan out."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from typing import Any

from lowbit.formats import Format, Scheme
from lowbit.plan.accuracy import other_loss
from lowbit.plan.interval import around
from lowbit.plan.machine import MeasuredMachine
from lowbit.plan.planner import Plan, Planner

NO_INTERVAL = "specification, no interval"
GIB = 2**30


def plan_json(planner: Planner, plan: Plan, model: str) -> dict[str, Any]:
    """One plan. Keys ending in _interval hold [low, high] or null, in _source where the figure comes from."""
    f, machine = plan.figures, planner.machine
    formats = tuple({plan.scheme.weights, *plan.scheme.layers.values()})
    if isinstance(machine, MeasuredMachine):
        decode = machine.factors("decode", formats)
        prompt = machine.factors("prompt", formats)
        memory = machine.factors("memory")
        time_source = f"predicted from the profile of {machine.profile.measured_at}"
        guessed = sorted(x.name for x in formats if not machine.is_measured(x))
        if guessed:
            time_source += f"; {', '.join(guessed)} by the nearest measured format"
        missing = "; too few calibration points for an interval"
        decode_source = time_source + (missing if decode is None else "")
        prompt_source = time_source + (missing if prompt is None else "")
        memory_source = "computed: packed layout, cache blocks, rows of a pass, measured process"
        memory_source += "" if memory else "; no interval"
    else:
        decode = prompt = memory = None
        decode_source = prompt_source = NO_INTERVAL
        memory_source = "computed: packed layout, plain keys and values; " + NO_INTERVAL
    both = (
        None if decode is None or prompt is None else (min(decode[0], prompt[0]), max(decode[1], prompt[1]))
    )
    inverse = None if both is None else (1 / both[1], 1 / both[0])
    energy = decode if f.bill.joules_per_token is not None else None
    result: dict[str, Any] = {
        "scheme": plan.scheme.to_dict(),
        "formats": formats_summary(planner, plan.scheme),
        "bits_per_weight": bits_per_weight(planner, plan.scheme),
        "kv_bits": plan.scheme.kv_bits,
        "batch": plan.batch,
    }

    def figure(name: str, value: float | None, factors: tuple[float, float] | None, source: str) -> None:
        result[name] = value
        result[f"{name}_interval"] = around(value, factors)
        known = value is not None or source.startswith("unavailable")
        result[f"{name}_source"] = source if known else f"unavailable: {source}"

    figure("time_to_first_token_seconds", f.ttft, prompt, prompt_source)
    figure("time_per_token_seconds", f.tpot, decode, decode_source)
    figure("tokens_per_second", f.throughput, inverse, decode_source)
    figure("memory_bytes", float(f.memory.total), memory, memory_source)
    result["memory"] = {
        "weights_bytes": f.memory.weights,
        "keys_values_bytes": f.memory.keys_values,
        "rows_bytes": f.memory.rows,
        "process_bytes": f.memory.runtime,
    }
    low, high = planner.accuracy.factors
    rest = other_loss(plan.scheme.kv_bits or 8, "int16" if planner.on_device else plan.scheme.activations)
    result["loss"] = f.loss
    result["loss_interval"] = [
        (math.exp(min(f.nats * factor, 50.0))) * (1 + rest) - 1 for factor in (low, high)
    ]
    result["loss_source"] = planner.accuracy.source
    figures = f.bill
    figure("joules_per_token", figures.joules_per_token, energy, figures.sources["joules_per_token"])
    figure(
        "grams_co2_per_million_tokens",
        figures.grams_per_million,
        energy,
        figures.sources["grams_co2_per_million_tokens"],
    )
    figure(
        "litres_water_per_million_tokens",
        figures.litres_per_million,
        energy,
        figures.sources["litres_water_per_million_tokens"],
    )
    figure(
        "money_per_million_tokens",
        figures.money_per_million,
        both,
        figures.sources["money_per_million_tokens"],
    )
    result["commands"] = commands(planner, plan, model)
    return result


def formats_summary(planner: Planner, scheme: Scheme) -> dict[str, float]:
    """Share of the layers' weights by format."""
    from lowbit.plan.work import tensor_name

    counted: Counter[str] = Counter()
    for number, layer in enumerate(planner.network.layers):
        for matrix in layer.matrices:
            name = scheme.format_for(tensor_name(number, matrix.name)).name
            counted[name] += matrix.weights * matrix.copies
    total = sum(counted.values())
    return {name: count / total for name, count in counted.most_common()}


def bits_per_weight(planner: Planner, scheme: Scheme) -> float:
    """Of the layers' matrices, as stored."""
    from lowbit.plan.memory import stored_bytes
    from lowbit.plan.work import tensor_name

    stored = sum(
        m.copies * stored_bytes(scheme.format_for(tensor_name(number, m.name)), m.out_features, m.in_features)
        for number, layer in enumerate(planner.network.layers)
        for m in layer.matrices
    )
    return 8 * stored / planner.network.matrix_weights


def commands(planner: Planner, plan: Plan, model: str) -> list[str]:
    """`lowbit quantize` and `lowbit serve`; none where lowbit does not run the plan."""
    if planner.on_device or not planner.network.runs:
        return []
    scheme, budget = plan.scheme, planner.budget
    target = f"{model.rstrip('/').split('/')[-1].removesuffix('.gguf')}-{scheme.weights.name}"
    assert scheme.embedding is not None
    quantize = ["lowbit", "quantize", model, scheme.weights.name, "--embedding", scheme.embedding.name]
    for pattern, fmt in scheme.layers.items():
        quantize += ["--layer", f"{pattern}={fmt.name}"]
    if budget.method != "rtn":
        quantize += ["--method", budget.method]
    quantize += ["-o", target]
    gigabytes = math.ceil(plan.figures.memory.keys_values / 1e7) / 100
    serve = ["lowbit", "serve", target, "--kv-bits", str(scheme.kv_bits), "--context", str(budget.context)]
    serve += [
        "--activations",
        scheme.activations,
        "--max-sequences",
        str(plan.batch),
        "--kv-gb",
        f"{max(gigabytes, 0.01):g}",
    ]
    if budget.tpot_seconds is not None:
        serve += ["--target-ms", f"{budget.tpot_seconds * 1e3:g}"]
    return [shlex.join(quantize), shlex.join(serve)]


def infeasible(planner: Planner) -> dict[str, Any]:
    """Which budgets bind, what each could be at least, and the nearest plan."""
    limits = planner.limits()
    binding = planner.binding()
    nearest, factor = planner.nearest()
    reachable = {name: planner.best_alone(name) for name in binding}
    return {
        "binding": binding,
        "limits": limits,
        "least_alone": reachable,
        "nearest": nearest,
        "exceeds_by": factor,
        "message": message(binding, limits, reachable),
    }


def message(binding: list[str], limits: dict[str, float], reachable: dict[str, float]) -> str:
    """In a sentence."""
    words = {"memory": "memory", "tpot": "time per token", "ttft": "time to first token", "loss": "loss"}
    parts = []
    for name in binding:
        if reachable[name] > limits[name]:
            parts.append(
                f"{words[name]} {shown(name, limits[name])}: the least possible is "
                f"{shown(name, reachable[name])}"
            )
        else:
            parts.append(f"{words[name]} {shown(name, limits[name])}: not together with the other limits")
    return "; ".join(parts)


def shown(name: str, value: float) -> str:
    """A figure as people read it."""
    if name == "memory":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    if name == "loss":
        return f"{value:.2%}" if value < 10 else f"{value:.0f}00%"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def describe(fmt: Format) -> str:
    return fmt.name
