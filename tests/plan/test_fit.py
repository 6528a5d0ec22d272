"""The fit finds the seconds that made-up steps were made of; what it is used for afterwards is checked
too.
"""

import json
import math

import numpy as np
import pytest

from lowbit.errors import CheckpointError
from lowbit.formats import Scheme, parse_format
from lowbit.plan import profile as profiles
from lowbit.plan.calibrate import grids_of
from lowbit.plan.cost import StepCost, expected_tokens, step_seconds
from lowbit.plan.fit import Point, fit, non_negative, rate_at
from lowbit.plan.interval import bounds
from lowbit.plan.machine import MeasuredMachine, distance
from lowbit.plan.profile import Profile
from lowbit.plan.work import PASS_SLACK, Runs, Workload, visited

from .made_up import SECONDS, machine, profile, rates
from .networks import RANDOM_1B, SMOLLM2, llama, network


def _steps():
    for config in (
        llama(4, 256, 512, 4, 2, 64),
        llama(3, 640, 1792, 10, 5, 4096),
        llama(2, 1024, 4096, 16, 2, 64),
    ):
        for name in ("int4-g32", "int8-g32"):
            work = Workload(network(config), Scheme.parse(name), 8, 2)
            for tokens in (1, 2, 4, 8, 32):
                for context in (0, 500, 2000):
                    yield work.amounts(Runs((), (context,) * tokens))
            for tokens in (16, 64):
                for before in (0, 700):
                    yield work.amounts(Runs(((tokens, before, True),)))


def _exact():
    """Steps that take exactly what the made-up machine says."""
    made = machine(threads=2)
    return [Point(amounts, made.part(amounts).total) for amounts in _steps()]


def test_the_fit_finds_what_steps_were_made_of():
    points = _exact()
    fitted = fit(points, grids_of([p.amounts for p in points]))
    again = MeasuredMachine(profile(seconds=fitted.seconds, rates=fitted.rates, threads=2))
    errors = [abs(math.log(again.part(p.amounts).total / p.seconds)) for p in points]
    assert (
        np.median(errors) < 0.01 and max(errors) < 0.15
    )  # linear between numbers of tokens, but the machine bends
    unseen = Workload(network(SMOLLM2), Scheme.parse("int4-g32"), 8, 2).amounts(Runs((), (300,) * 3))
    assert again.part(unseen).total == pytest.approx(machine(threads=2).part(unseen).total, rel=0.1)


def test_disturbed_steps_do_not_move_the_fit():
    points = _exact()
    rng = np.random.default_rng(1)
    disturbed = [Point(p.amounts, p.seconds * (4.0 if rng.random() < 0.15 else 1.0)) for p in points]
    fitted = fit(disturbed, grids_of([p.amounts for p in points]))
    again = MeasuredMachine(profile(seconds=fitted.seconds, rates=fitted.rates, threads=2))
    errors = [abs(math.log(again.part(p.amounts).total / p.seconds)) for p in points]
    assert np.median(errors) < 0.05


def test_non_negative_least_squares():
    from scipy.optimize import nnls

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.standard_normal((30, 12)), rng.standard_normal(30)
        assert non_negative(a, b) == pytest.approx(nnls(a, b)[0], abs=1e-6)


def test_rates_between_and_beyond_the_grid():
    assert rate_at([1, 2, 8], [1.0, 2.0, 5.0], 5) == pytest.approx(3.5)
    assert rate_at([1, 2, 8], [1.0, 2.0, 5.0], 0.5) == 1.0
    assert rate_at([1, 2, 8], [1.0, 2.0, 5.0], 10) == pytest.approx(6.0)


def test_passes_are_cut_as_the_decoder_cuts_them():
    small = Workload(network(SMOLLM2), Scheme.parse("int4-g32"), 8, 2)
    large = Workload(network(RANDOM_1B), Scheme.parse("int4-g32"), 8, 2)
    assert small.pass_tokens == 96 and large.pass_tokens == 384
    passes = list(small._passes(Runs(((512, 0, True),))))
    assert [tokens for tokens, _, _ in passes] == [90, 90, 90, 90, 90, 62]  # 6 passes of a multiple of 6
    assert [wanted for _, wanted, _ in passes] == [0, 0, 0, 0, 0, 1]
    assert len(list(small._passes(Runs(((96 + PASS_SLACK, 0, True),))))) == 1
    mixed = list(small._passes(Runs(((120, 10, False), (30, 0, True)), (5, 6))))
    assert sum(tokens for tokens, _, _ in mixed) == 152 and sum(w for _, w, _ in mixed) == 3
    assert mixed[0][2] == [(78, 10)] and mixed[1][2] == [(42, 88), (30, 0), (1, 5), (1, 6)]


def test_keys_that_queries_visit():
    assert visited(4, 0) == 1 + 2 + 3 + 4
    assert visited(3, 10) == 11 + 12 + 13
    assert visited(4, 0, tile=4) == 4 * 4
    assert visited(5, 0, window=2) == pytest.approx(1 + 2 + 3 * 2)


def test_of_the_last_layer_only_wanted_rows_pass_the_mlp():
    work = Workload(network(SMOLLM2), Scheme.parse("int4-g32"), 8, 1)
    fmt = parse_format("int4-g32")
    silent = work.amounts(Runs(((64, 0, False),))).products[fmt, 8, 64.0]
    whole = network(SMOLLM2).matrix_weights
    assert silent == whole - 3 * 576 * 1536
    assert work.amounts(Runs(((64, 0, True),))).products[fmt, 8, 1.0] == 3 * 576 * 1536


def test_steps_of_a_simulation():
    made = machine()
    small = network(SMOLLM2)
    cost = StepCost(small, Scheme.parse("int4-g32"), made)
    one = step_seconds(small, Scheme.parse("int4-g32"), made, 0, [100])
    assert one == pytest.approx(cost([], [100])) == pytest.approx(cost.token_seconds(100))
    assert step_seconds(small, Scheme.parse("int4-g32"), made, 64) == pytest.approx(cost.prompt_seconds(64))
    both = step_seconds(small, Scheme.parse("int4-g32"), made, [(40, 0), (20, 8, False)], [5, 900])
    assert both == pytest.approx(cost([(40, 0, True), (20, 8, False)], [5, 900]))
    assert both > one
    assert cost.prompt_seconds(600) > cost.prompt_seconds(300) > cost.prompt_seconds(100)
    assert cost.token_seconds(4000) > cost.token_seconds(10)


def test_speculation_pays_where_guesses_are_right():
    assert expected_tokens(3, 0.0) == 1 and expected_tokens(3, 1.0) == 4
    assert expected_tokens(2, 0.5) == pytest.approx(1.75)
    cost = StepCost(network(RANDOM_1B), Scheme.parse("int4-g32"), machine())
    assert (
        cost.speculative_seconds(100, 3, 0.9)
        < cost.token_seconds(100)
        < cost.speculative_seconds(100, 3, 0.0)
    )


def test_formats_that_were_not_measured_follow_the_most_alike():
    near = {name: parse_format(name) for name in ("int4-g32", "int8-g32", "nf4-g32", "bf16", "ternary-g64")}

    def nearest(name):
        return min(near, key=lambda n: distance(parse_format(name), near[n]))

    assert nearest("int4-g128") == "int4-g32" and nearest("int7-g32") == "int8-g32"
    assert (
        nearest("e2m1-g32") == "nf4-g32" and nearest("fp16") == "bf16" and nearest("ternary") == "ternary-g64"
    )
    made = machine()
    assert made.rate(parse_format("int4-g128"), 8, 1) < made.rate(parse_format("int4-g32"), 8, 1)
    assert made.rate(parse_format("int4-g128"), 8, 96) == made.rate(parse_format("int4-g32"), 8, 96)
    assert made.rate(parse_format("int8-g32"), 16, 96) > 1.5 * made.rate(parse_format("int8-g32"), 8, 96)


def test_nothing_is_interpolated_across_the_crossover():
    table = {("int4-g32", 8): ([1.0, 8.0, 16.0, 48.0, 96.0], [1.0, 2.0, 10.0, 26.0, 50.0])}
    made = machine(rates=table)  # few up to 8 tokens
    four = parse_format("int4-g32")
    assert made.rate(four, 8, 5) == pytest.approx(1 + 4 / 7)
    assert made.rate(four, 8, 9) == pytest.approx(10 - 7 * 0.5)  # the line of 16 and 48
    assert made.rate(four, 8, 20) == pytest.approx(12)


def test_intervals_are_wider_for_formats_of_another_kind():
    made = machine()
    assert made.is_known(parse_format("int4-g128")) and not made.is_known(parse_format("nf4-g32"))
    wide = {**profile().residuals, "format": [0.1 * i - 1.0 for i in range(21)]}
    made = machine(residuals=wide)
    known, guessed = (made.factors("decode", (parse_format(n),)) for n in ("int4-g64", "nf4-g32"))
    assert guessed[0] < known[0] and guessed[1] > known[1] and known == made.factors("decode")


def test_intervals_need_enough_points():
    assert bounds([0.1] * 8) is None  # 9 points are the least for 90%
    low, high = bounds([-0.1, 0.05, 0.0, 0.02, -0.03, 0.01, 0.0, 0.04, 0.2])
    assert high == pytest.approx(math.exp(0.2)) and low == pytest.approx(math.exp(-0.2))
    assert bounds([]) is None


def test_intervals_cover_what_they_promise():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        low, high = bounds(list(rng.normal(0.05, 0.1, 60)))
        inside.append(low <= math.exp(rng.normal(0.05, 0.1)) <= high)
    assert 0.86 <= np.mean(inside) <= 0.96


def test_a_profile_survives_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    made = profile()
    file = profiles.save(made)
    assert file.parent == tmp_path and profiles.load(file) == made
    if pytest.importorskip("lowbit._native"):
        assert profiles.load() is None  # of another machine


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 0},
        {"rates": [{"format": "int4-g32", "activation_bits": 8, "tokens": [1], "seconds_per_weight": []}]},
        {"seconds": {"step": -1}},
        {"bandwidth_bytes_per_second": 0},
        {"residuals": 3},
        {"identity": None},
    ],
)
def test_damaged_profiles_say_what_to_do(tmp_path, damage):
    file = tmp_path / "p.json"
    file.write_text(json.dumps({**profile().to_json(), **damage}))
    with pytest.raises(CheckpointError, match="lowbit doctor --profile"):
        profiles.load(file)


def test_a_profile_is_read_strictly():
    with pytest.raises(CheckpointError, match="profile of version"):
        Profile.from_json([], "x")
    assert set(SECONDS) and rates()
