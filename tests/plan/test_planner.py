"""Plans: what an integer program chooses, budgets that bind, and what is written about them."""

import json
import math
import re
import shlex
from itertools import pairwise, product

import numpy as np
import pytest

from lowbit.errors import FormatError, RequestError
from lowbit.formats import Scheme, parse_format
from lowbit.formats.auto import parse_bytes
from lowbit.plan import budget as budgets
from lowbit.plan import report, views
from lowbit.plan.accuracy import divergence_scale, format_error, from_report, prior, to_loss
from lowbit.plan.budget import Budget, parse_choices
from lowbit.plan.choose import Item, choose, merge, spread
from lowbit.plan.cost import StepCost
from lowbit.plan.device import SpecifiedMachine, device_named
from lowbit.plan.planner import Planner, front, limited
from lowbit.plan.work import tensor_name

from .made_up import machine
from .networks import LLAMA_2_7B, RANDOM_1B, SMOLLM2, network

pytest.importorskip("scipy")


def planner(config=RANDOM_1B, on=None, accuracy=None, **limits):
    return Planner(network(config), on or machine(), Budget(**limits), accuracy)


def test_the_program_finds_the_best_of_all_choices():
    rng = np.random.default_rng(0)
    formats = parse_choices(["int2-g32", "int4-g32", "int8-g32"])
    for _ in range(15):
        items = [
            Item(
                (f"t{i}",),
                formats,
                {k: tuple(rng.uniform(1, 10, 3)) for k in ("bytes", "decode", "prompt", "nats")},
            )
            for i in range(5)
        ]
        limits = {"bytes": rng.uniform(15, 40), "decode": rng.uniform(15, 40)}
        best = math.inf
        for picks in product(range(3), repeat=5):
            sums = {
                k: sum(item.figures[k][f] for item, f in zip(items, picks))
                for k in ("bytes", "decode", "nats")
            }
            if all(sums[k] <= limits[k] for k in limits):
                best = min(best, sums["nats"])
        found = choose(items, "nats", limits)
        if found is None:
            assert best == math.inf
        else:
            assert found.sums["nats"] == pytest.approx(best, rel=1e-4)
            assert all(found.sums[k] <= limits[k] for k in limits)


def test_alike_items_are_counted_once_and_spread_by_bits():
    formats = parse_choices(["int2-g32", "int4-g32"])
    figures = {"bytes": (1.0, 2.0), "decode": (1.0, 2.0), "prompt": (1.0, 1.0), "nats": (4.0, 1.0)}
    items = merge([Item((f"t{i}",), formats, figures) for i in range(6)])
    assert len(items) == 1 and items[0].count == 6
    found = choose(items, "nats", {"bytes": 8.0})
    assert found.counts == ((4, 2),)
    names = [spread(items[0], found.counts[0])[f"t{i}"].name for i in range(6)]
    assert names == ["int4-g32"] * 2 + ["int2-g32"] * 4


def test_plans_keep_within_their_budgets_exactly():
    p = planner(memory_bytes=700_000_000, tpot_seconds=0.05, users=2, max_loss=0.2)
    plans = p.plans()
    assert plans
    for plan in plans:
        figures = limited(plan)
        assert figures["memory"] <= 700_000_000 and figures["tpot"] <= 0.05 and figures["loss"] <= 0.2
        assert plan.batch == 2
    assert plans == sorted(plans, key=p.rank)


def test_less_memory_means_fewer_bits():
    losses = []
    for memory in (3_000_000_000, 900_000_000, 600_000_000):
        best = planner(memory_bytes=memory).plans()[0]
        losses.append(best.figures.loss)
        assert best.figures.memory.total <= memory
    assert losses == sorted(losses) and losses[0] < losses[-1]


def test_objectives_are_met():
    by = {name: planner(objective=name, max_loss=0.5).plans()[0].figures for name in budgets.OBJECTIVES}
    assert by["tpot"].tpot == min(f.tpot for f in by.values())
    assert by["memory"].memory.total == min(f.memory.total for f in by.values())
    assert by["loss"].loss == min(f.loss for f in by.values())
    assert by["throughput"].throughput == max(f.throughput for f in by.values())
    assert by["throughput"].throughput > 1.5 * by["tpot"].throughput  # more users share the weights


def test_without_a_limit_of_loss_other_objectives_keep_one():
    assert planner(objective="tpot").plans()[0].figures.loss <= budgets.MAX_LOSS


def test_the_front_is_not_beaten():
    plans = planner(max_loss=1.0).plans()
    for plan in front(plans):
        f = plan.figures
        assert not any(
            g.figures.loss < f.loss and g.figures.tpot < f.tpot and g.figures.memory.total < f.memory.total
            for g in plans
        )


def test_budgets_that_cannot_be_met_say_which_and_what_could():
    p = planner(memory_bytes=200_000_000, tpot_seconds=10.0)
    assert p.plans() == []
    told = report.infeasible(p)
    assert told["binding"] == ["memory"] and "least possible" in told["message"]
    assert told["nearest"].figures.memory.total == pytest.approx(told["least_alone"]["memory"], rel=0.05)
    assert told["exceeds_by"] == pytest.approx(told["least_alone"]["memory"] / 200_000_000, rel=0.05)


def test_budgets_that_only_conflict_together_are_named_together():
    one = planner(max_loss=0.02).plans()[0].figures
    p = planner(max_loss=0.02, memory_bytes=int(one.memory.total * 0.6))
    if not p.plans():
        told = report.infeasible(p)
        assert set(told["binding"]) <= {"memory", "loss"} and "together" in told["message"]


def test_json_has_every_figure_with_interval_and_source():
    p = planner(users=4, context=4096, watts=50.0)
    told = json.loads(json.dumps(report.plan_json(p, p.plans()[0], "somewhere/model")))
    for name in (
        "time_to_first_token_seconds", "time_per_token_seconds", "tokens_per_second", "memory_bytes",
        "joules_per_token", "grams_co2_per_million_tokens", "litres_water_per_million_tokens", "loss",
    ):  # fmt: skip
        low, high = told[f"{name}_interval"]
        assert low <= told[name] <= high and told[f"{name}_source"], name
    assert told["money_per_million_tokens"] is None and "tariff" in told["money_per_million_tokens_source"]
    assert {"scheme", "kv_bits", "batch", "commands", "bits_per_weight"} <= set(told)
    assert Scheme.from_dict(told["scheme"]).kv_bits == told["kv_bits"]


def test_without_power_there_are_no_joules_and_no_zero():
    p = planner()
    told = report.plan_json(p, p.plans()[0], "m")
    assert told["joules_per_token"] is None and told["joules_per_token_interval"] is None
    assert told["joules_per_token_source"].startswith("unavailable")


def test_joules_by_hand():
    p = planner(users=2, watts=30.0, prompt=512, answer=256)
    f = p.plans()[0].figures
    assert f.bill.joules_per_token == pytest.approx(30 * (f.tpot / 2 + f.ttft / 256))


def test_specifications_have_no_interval():
    p = planner(LLAMA_2_7B, SpecifiedMachine(device_named("h100")), users=8, max_loss=0.05)
    told = report.plan_json(p, p.plans()[0], "m")
    assert told["time_per_token_seconds_interval"] is None
    assert told["time_per_token_seconds_source"] == "specification, no interval"
    assert told["joules_per_token"] > 0 and told["money_per_million_tokens"] > 0 and told["commands"] == []


def test_too_few_calibration_points_give_no_interval():
    from .made_up import profile

    p = planner(on=machine(residuals={"decode": [0.1], "prompt": [0.0], "format": [0.0]}))
    told = report.plan_json(p, p.plans()[0], "m")
    assert (
        told["time_per_token_seconds_interval"] is None and "too few" in told["time_per_token_seconds_source"]
    )
    assert profile().residuals["decode"]


def test_several_devices_share_weights_and_need_a_link():
    h100 = SpecifiedMachine(device_named("h100"))
    one, four = (
        planner(LLAMA_2_7B, h100, devices=n, choices=parse_choices(["bf16"])).plans()[0].figures
        for n in (1, 4)
    )
    assert four.memory.weights == pytest.approx(one.memory.weights / 4, rel=1e-6)
    assert one.tpot / 4 < four.tpot < one.tpot
    with pytest.raises(RequestError, match="--device"):
        planner(devices=2)
    with pytest.raises(RequestError, match="no published link"):
        planner(LLAMA_2_7B, SpecifiedMachine(device_named("m2-ultra")), devices=2).plans()


def test_commands_carry_the_plan_out():
    p = planner(SMOLLM2, memory_bytes=200_000_000, max_loss=0.3, tpot_seconds=0.02)
    plan = p.plans()[0]
    quantize, serve = (shlex.split(line) for line in report.commands(p, plan, "smollm2-135m"))
    assert quantize[:3] == ["lowbit", "quantize", "smollm2-135m"] and serve[:2] == ["lowbit", "serve"]
    layers = dict(text.rsplit("=", 1) for flag, text in pairwise(quantize) if flag == "--layer")
    again = Scheme.parse(
        {"weights": quantize[3], "embedding": quantize[quantize.index("--embedding") + 1], "layers": layers}
    )
    for number, layer in enumerate(p.network.layers):
        for matrix in layer.matrices:
            name = tensor_name(number, matrix.name)
            assert again.format_for(name) == plan.scheme.format_for(name)
    from lowbit.cli import options
    from lowbit.cli.quantize import configure as configure_quantize
    from lowbit.cli.serve import configure as configure_serve

    for configure, line in ((configure_quantize, quantize), (configure_serve, serve)):
        parser = options.Parser(prog="x", description="x")
        configure(parser)
        parser.parse_intermixed_args(line[2:])


def test_measured_sensitivities_take_the_priors_place():
    tensors = [
        f"model.layers.{i}.{m.name}.weight" for i, l in enumerate(network(SMOLLM2).layers) for m in l.matrices
    ]
    items = [
        {
            "tensors": [t],
            "sensitivity": {"int2-g32": 1.0, "int4-g32": 0.001 if "layers.3." in t else 0.00001},
            "bytes": {},
        }
        for t in tensors
    ]
    known = from_report(
        {"auto": {"sensitivity": "kl", "predicted_kl": 0.1, "achieved_kl": 0.15, "items": items}}
    )
    p = planner(
        SMOLLM2,
        accuracy=known,
        choices=parse_choices(["int2-g32", "int4-g32", "bf16"]),
        memory_bytes=300_000_000,
    )
    best = p.plans()[0]
    assert best.scheme.format_for("model.layers.3.mlp.down_proj.weight").name in ("bf16", "int4-g32")
    told = report.plan_json(p, best, "m")
    assert told["loss_source"] == "measured sensitivities (kl)"
    with pytest.raises(FormatError, match=r"auto\.items"):
        from_report({"x": 1})


def test_the_prior_fits_the_rows_it_was_made_from():
    # docs/methods.md, stories15M rounded to nearest: nats per token
    rows = {
        "int3-g32": 0.37206,
        "int4-g32": 0.08649,
        "nf4-g32": 0.06121,
        "int3-g16-m4": 0.34637,
        "int4a-g32": 0.0717,
    }
    for name, nats in rows.items():
        assert divergence_scale(15.2e6) * format_error(parse_format(name)) == pytest.approx(nats, rel=0.4)
    # AWQ's paper, table 4 (arXiv:2306.00978), round to nearest in groups of 128: perplexity before and after
    for parameters, name, before, after in (
        (7e9, "int4-g128", 5.47, 5.73), (7e9, "int3-g128", 5.47, 6.66),
        (70e9, "int4-g128", 3.32, 3.46), (70e9, "int3-g128", 3.32, 3.98),
    ):  # fmt: skip
        low, high = prior().factors
        nats = divergence_scale(parameters) * format_error(parse_format(name))
        assert low * nats <= math.log(after / before) <= high * nats
    assert to_loss(0.02) == pytest.approx(0.0202, rel=1e-2)


def test_errors_of_formats():
    assert format_error(parse_format("int8-g32")) < 1e-4 < format_error(parse_format("int4-g32")) < 0.012
    assert format_error(parse_format("int3-g32")) / format_error(parse_format("int4-g32")) == pytest.approx(
        4, rel=0.1
    )
    assert format_error(parse_format("ternary")) > format_error(parse_format("int2-g32"))
    assert format_error(parse_format("bf16")) < 1e-5


@pytest.mark.parametrize(
    ("call", "text", "value"),
    [
        (budgets.parse_seconds, "30ms", 0.03),
        (budgets.parse_seconds, "1.5 s", 1.5),
        (budgets.parse_count, "8k", 8192),
        (budgets.parse_count, "4096", 4096),
        (budgets.parse_share, "2%", 0.02),
        (budgets.parse_share, "0.02", 0.02),
        (budgets.parse_memory, "4GB", parse_bytes("4GB")),
    ],
)
def test_budgets_as_people_write_them(call, text, value):
    assert call(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (budgets.parse_seconds, "fast"), (budgets.parse_seconds, "0ms"), (budgets.parse_count, "many"),
        (budgets.parse_share, "-2%"), (budgets.parse_memory, "lots"),
    ],
)  # fmt: skip
def test_budgets_that_nobody_understands(call, text):
    with pytest.raises(RequestError, match=re.escape(repr(text))):
        call(text)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"objective": "speed"}, "objective"),
        ({"users": 0}, "users"),
        ({"context": 100, "prompt": 90, "answer": 20}, "do not fit"),
        ({"accepted": 2.0}, "probability"),
        ({"context": 1 << 20}, "beyond"),
        ({"choices": parse_choices(["int4-g1024"])}, "fits"),
    ],
)
def test_bad_budgets(limits, words):
    with pytest.raises(RequestError, match=words):
        planner(SMOLLM2, **limits).plans()


def test_views_explain():
    cost = StepCost(network(LLAMA_2_7B), Scheme.parse("bf16"), SpecifiedMachine(device_named("h100")), 16)
    rows = views.kinetics(cost, 256, 1)
    shares = [row["attention_share"] for row in rows]
    assert shares == sorted(shares) and rows[-1]["equivalent_operations"] > rows[0]["equivalent_operations"]
    context = views.long_context(cost, 80e9)
    assert [r["users"] for r in context] == sorted((r["users"] for r in context), reverse=True)
    assert context[1]["kv_bytes"] == 2 * context[0]["kv_bytes"] == 2048 * 524_288
    ideal = views.idealized(cost, 512, 128)
    assert 0.2 < ideal["of_ideal"] < 1
    measured = StepCost(network(SMOLLM2), Scheme.parse("int4-g32"), machine())
    assert views.kinetics(measured, 64, 2) and views.long_context(measured, 4e9)
    assert 0 < views.idealized(measured, 64, 64)["of_ideal"] <= 1
