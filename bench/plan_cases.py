"""What `bench/plan.py` measures, and what the cost model says of each: pairs of measured and predicted."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import process
from lowbit.formats import Scheme
from lowbit.measure.synthetic import Stepper, forget, llama, synthetic
from lowbit.plan.budget import Budget, parse_choices
from lowbit.plan.cost import StepCost
from lowbit.plan.machine import MeasuredMachine
from lowbit.plan.memory import TOKENIZER_BYTES, Memory, kv_bytes, rows_bytes, weight_bytes
from lowbit.plan.network import network_from, network_of
from lowbit.plan.planner import Planner
from lowbit.plan.profile import Profile, load
from lowbit.plan.work import Runs, Workload

Say = Callable[[str], None]
Step = tuple[tuple[tuple[int, int], ...], tuple[int, ...]]  # prompts (tokens, before), contexts

SMOLLM2 = llama(30, 576, 1536, 9, 3, vocab=49152)
LLAMA_1B = llama(22, 2048, 5632, 32, 4, vocab=32000, tie_word_embeddings=False)
MODELS = {"SmolLM2-135M's shape": SMOLLM2, "1.1B shape": LLAMA_1B}
ROUNDS, STEPS = 3, 5
# Kinds of operations, the gate of each: `gate` is the family of intervals that it is held against.
GATES = {"operators": 0.10, "token": 0.10, "first": 0.15, "memory": 0.03}


def profile(path: Path | None, say: Say) -> Profile:
    """A fresh one, measured by the command that users run; or a given one."""
    if path is not None:
        found = load(path)
        assert found is not None
        return found
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "profile.json"
        told = process.lowbit_json("doctor", "--profile", "--output", target)
        say(f"profile: {told['profile']['seconds_taken']:.0f} s")
        found = load(target)
    assert found is not None
    return found


def row(
    kind: str, name: str, measured: float, predicted: float, factors: tuple[float, float] | None, **more: Any
) -> dict[str, Any]:
    """A figure beside its prediction and interval."""
    interval = None if factors is None else [predicted * factors[0], predicted * factors[1]]
    inside = interval is not None and interval[0] <= measured <= interval[1]
    return {
        "kind": kind,
        "name": name,
        "measured": measured,
        "predicted": predicted,
        "error": measured / predicted - 1,
        "interval": interval,
        "inside": inside if interval is not None else None,
        **more,
    }


def runs_of(step: Step) -> Runs:
    return Runs(tuple((count, before, True) for count, before in step[0]), step[1])


def _operators() -> Iterator[tuple[str, dict[str, Any], Scheme, int, list[Step]]]:
    """(what decides, config, scheme, bits of keys and values, steps)."""
    tokens = (1, 3, 5, 7, 14, 20, 40)
    for name in ("int4-g32", "int8-g32", "int3-g32", "int6-g32", "nf4-g32", "int4-g128", "int2-g32", "mxfp4"):
        wide = llama(3, 1792, 6912, 14, 7)
        yield f"products {name}", wide, Scheme.parse(name), 8, [((), (0,) * t) for t in tokens]
    for bits in (16, 8, 4):
        config = llama(8, 768, 2304, 12, 6, head_dim=64)
        steps: list[Step] = [((), (5000,)), (((90, 1200),), ()), (((48, 300),), ()), ((), (1500,) * 3)]
        yield f"attention kv{bits}", config, Scheme.parse("int4-g32"), bits, steps
    head = llama(1, 896, 256, 7, 7, vocab=65536)
    scheme = Scheme.parse({"weights": "int4-g32", "embedding": "int8-g32"})
    yield "head int8-g32", head, scheme, 8, [((), (0,) * t) for t in (1, 3, 6)]


def operators(machine: MeasuredMachine, quick: bool, cache: Path, say: Say) -> list[dict[str, Any]]:
    """Steps in which one operation decides."""
    rows = []
    for name, config, scheme, bits, steps in list(_operators())[:: 4 if quick else 1]:
        model = synthetic(config, scheme, bits)
        stepper = Stepper(model)
        cost = StepCost(network_of(model.config), scheme, machine, bits)
        for step in steps:
            seconds = statistics.median(stepper.time(*step, STEPS, ROUNDS))
            family = "prompt" if step[0] else "decode"
            where = f"{len(step[1])} at {step[1][0]}" if step[1] else f"{step[0][0][0]} after {step[0][0][1]}"
            factors = machine.factors(family, (scheme.weights,))
            rows.append(row(name, where, seconds, cost.seconds(runs_of(step)), factors))
        del model, stepper
        forget()
    return rows


# name of a scheme, bits of keys and values
SCHEMES = (
    ("int4-g32", 8),
    ("int8-g32", 8),
    ("int3-g32", 8),
    ("int4-g64", 8),
    ("nf4-g32", 8),
    ("int6-g32", 4),
    ("int2-g32", 16),
)
MIXED = {"weights": "int4-g32", "layers": {"*.down_proj.weight": "int6-g32", "*.v_proj.weight": "int8-g32"}}
TOKEN_STEPS: tuple[Step, ...] = (((), (64,)), ((), (1000,)), ((), (200,) * 4), ((), (100,) * 12))
PROMPTS = (128, 512, 1500)


def _whole() -> Iterator[tuple[str, dict[str, Any], Scheme, int]]:
    for model, config in MODELS.items():
        for name, bits in SCHEMES:
            yield f"{model}, {name}, kv{bits}", config, Scheme.parse(name), bits
        yield f"{model}, mixed, kv8", config, Scheme.parse(MIXED), 8


def token(machine: MeasuredMachine, quick: bool, cache: Path, say: Say) -> list[dict[str, Any]]:
    """Time per token of whole networks."""
    rows = []
    for name, config, scheme, bits in list(_whole())[:: 5 if quick else 1]:
        model = synthetic(config, scheme, bits)
        stepper = Stepper(model)
        cost = StepCost(network_of(model.config), scheme, machine, bits)
        factors = machine.factors("decode", tuple({scheme.weights, *scheme.layers.values()}))
        for step in sorted(TOKEN_STEPS, key=lambda s: -s[1][0]):
            for seconds in stepper.time(*step, STEPS, 1 if quick else 2):
                where = f"{name}: {len(step[1])} at {step[1][0]}"
                rows.append(row(name, where, seconds, cost.seconds(runs_of(step)), factors))
        del model, stepper
        forget()
    return rows


def first(machine: MeasuredMachine, quick: bool, cache: Path, say: Say) -> list[dict[str, Any]]:
    """Time to the first token: prompts in calls of 512 tokens, as the engine reads them."""
    from lowbit.engine.sequence import PREFILL_CHUNK, new_cache
    from lowbit.measure.synthetic import fill

    rows = []
    for name, config, scheme, bits in list(_whole())[:: 5 if quick else 1]:
        model = synthetic(config, scheme, bits)
        cost = StepCost(network_of(model.config), scheme, machine, bits)
        factors = machine.factors("prompt", tuple({scheme.weights, *scheme.layers.values()}))
        cache_of = new_cache(model.decoder, max(PROMPTS))
        fill(model, cache_of, 128)
        for prompt in PROMPTS[:2] if config is LLAMA_1B else PROMPTS:
            times = []
            for _ in range(3):
                cache_of.truncate(0)
                begun = time.perf_counter()
                fill(model, cache_of, prompt, PREFILL_CHUNK)
                times.append(time.perf_counter() - begun)
            predicted = cost.prompt_seconds(prompt)
            rows.append(row(name, f"{name}: {prompt} tokens", statistics.median(times), predicted, factors))
        del model, cache_of
        forget()
    return rows


def memory(machine: MeasuredMachine, quick: bool, cache: Path, say: Say) -> list[dict[str, Any]]:
    """Peak resident bytes of `lowbit run` on real directories, made from SmolLM2's file."""
    from lowbit.errors import LowbitError
    from lowbit.model.checkpoint import open_checkpoint
    from lowbit.model.download import resolve

    try:
        source = resolve("smollm2-135m")
    except LowbitError as error:
        say(f"memory: not measured, {error}")
        return []
    with open_checkpoint(source) as checkpoint:
        network = network_of(checkpoint.config)
    rows = []
    for name, bits in (("int4-g32", 8), ("int8-g32", 8), ("int3-g32", 4))[: 1 if quick else 3]:
        target = cache / "plan" / f"smollm2-{name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            process.lowbit_json(
                "quantize", source, name, "--output", target, "--no-verify", "--search", "minmax"
            )
        words = " ".join(f"word{i}" for i in range(120))
        told, peak = process.peak_rss(
            "run",
            target,
            "-p",
            words,
            "--raw",
            "--max-tokens",
            "32",
            "--kv-bits",
            str(bits),
            "--context",
            "1024",
        )
        used = int(told.get("prompt_tokens", 500)) + 32
        scheme = Scheme.parse(name)
        work = Workload(network, scheme, bits, machine.threads)
        parts = Memory(
            weight_bytes(network, scheme),
            kv_bytes(network, bits, used),
            rows_bytes(network, min(work.pass_tokens, used)),
            machine.profile.runtime_bytes + TOKENIZER_BYTES * network.vocab,
        )
        rows.append(
            row("run", f"SmolLM2-135M, {name}, kv{bits}", peak, parts.total, machine.factors("memory"))
        )
    return rows


def regret(machine: MeasuredMachine, quick: bool, cache: Path, say: Say) -> list[dict[str, Any]]:
    """For each budget: seconds per token of the chosen plan over those of the best measured plan that keeps
    it.

    The plans measured are one of each format that the planner may choose from, and what it chose.
    """
    rows = []
    names = ("int2-g32", "int3-g32", "int4-g32", "int6-g32", "int8-g32")
    for label, config in MODELS.items():
        network = network_from(config)
        seconds = {name: _measured(config, Scheme.parse(name), 8) for name in names}
        for share, users in ((0.4, 1), (0.6, 1), (0.6, 8))[: 1 if quick else 3]:
            limit = (
                int(weight_bytes(network, Scheme.parse("int8-g32")) * share) + machine.profile.runtime_bytes
            )
            budget = Budget(
                memory_bytes=limit + users * kv_bytes(network, 8, 512),
                users=users,
                context=512,
                kv_bits=(8,),
                objective="tpot",
                max_loss=1e9,
                choices=parse_choices(names),
            )
            planner = Planner(network, machine, budget)
            plans = planner.plans()
            if not plans:
                continue
            chosen = plans[0].scheme
            mine = _measured(config, chosen, 8, users)
            fitting = [
                n
                for n in names
                if planner.evaluate(Scheme.parse(n), users).figures.memory.total <= (budget.memory_bytes or 0)
            ]
            others = {
                n: seconds[n] if users == 1 else _measured(config, Scheme.parse(n), 8, users) for n in fitting
            }
            best = min([mine, *others.values()])
            told = {"chosen": chosen.weights.name, "best": min(others, key=lambda n: others[n], default="")}
            rows.append(
                {
                    "name": f"{label}: {share:.0%} of int8's memory, {users} users",
                    "measured": mine,
                    "best_measured": best,
                    "regret": mine / best - 1,
                    **told,
                }
            )
    return rows


def _measured(config: dict[str, Any], scheme: Scheme, bits: int, users: int = 1) -> float:
    model = synthetic(config, scheme, bits)
    seconds = min(Stepper(model).time((), (448,) * users, STEPS, ROUNDS))
    forget()
    return seconds


PARTS: dict[str, Callable[[MeasuredMachine, bool, Path, Say], list[dict[str, Any]]]] = {
    "operators": operators,
    "token": token,
    "first": first,
    "memory": memory,
    "regret": regret,
}
