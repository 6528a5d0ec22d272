"""The choice of formats equals the best of all combinations, and refuses what cannot be met."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("scipy")

from lowbit.compress.allocate import allocate
from lowbit.errors import FormatError


def brute_force(cost, size, budget, time=None, most_seconds=None):
    """Least sensitivity of every combination within the limits; None if there is none."""
    best = None
    for chosen in itertools.product(range(cost.shape[1]), repeat=len(cost)):
        rows = np.arange(len(cost))
        if size[rows, chosen].sum() > budget:
            continue
        if time is not None and time[rows, chosen].sum() > most_seconds:
            continue
        total = cost[rows, chosen].sum()
        best = total if best is None else min(best, total)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    layers, formats = 6, int(rng.integers(2, 5))
    cost = rng.lognormal(-8, 3, (layers, formats))  # sensitivities range over decades
    size = rng.integers(1, 60, (layers, formats)) * int(rng.choice([1, 64, 4096]))
    least = int(size.min(axis=1).sum())
    budget = least + int(rng.random() * (int(size.max(axis=1).sum()) - least))
    found = allocate(cost, size, budget)
    assert found.size <= budget and found.optimal
    assert found.sensitivity == pytest.approx(cost[np.arange(layers), found.chosen].sum())
    assert found.sensitivity == pytest.approx(brute_force(cost, size, budget), rel=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_equals_brute_force_with_seconds(seed):
    rng = np.random.default_rng(100 + seed)
    cost, size = rng.lognormal(0, 2, (5, 4)), rng.integers(1, 60, (5, 4))
    time = rng.random((5, 4))
    budget, most = int(np.median(size) * 5), float(np.median(time) * 5)
    expected = brute_force(cost, size, budget, time, most)
    if expected is None:
        with pytest.raises(FormatError, match=r"meets both|sum to|fastest"):
            allocate(cost, size, budget, time, most)
        return
    found = allocate(cost, size, budget, time, most)
    assert found.size <= budget and found.seconds <= most * (1 + 1e-6)
    assert found.sensitivity == pytest.approx(expected, rel=1e-6)


def test_a_tight_limit_of_seconds_changes_the_choice():
    cost, size = np.array([[3.0, 1.0], [3.0, 2.0]]), np.array([[1, 1], [1, 1]])
    time = np.array([[1.0, 5.0], [1.0, 5.0]])
    assert allocate(cost, size, 2).chosen == (1, 1)
    assert allocate(cost, size, 2, time, 6.0).chosen == (1, 0)  # 1 + 3 < 3 + 2
    assert allocate(cost, size, 2, time, 2.0).chosen == (0, 0)


def test_the_budget_is_used_to_the_byte():
    cost, size = np.array([[4.0, 1.0], [5.0, 1.0]]), np.array([[10, 21], [10, 20]])
    assert allocate(cost, size, 29).chosen == (0, 0)
    assert allocate(cost, size, 30).chosen == (0, 1)
    assert allocate(cost, size, 40).chosen == (0, 1)
    assert allocate(cost, size, 41).chosen == (1, 1)


def test_bytes_of_a_large_model_do_not_pass_the_budget_by_tolerance():
    rng = np.random.default_rng(3)
    size = np.sort(rng.integers(1_000_000, 400_000_001, (60, 4)), axis=1)
    cost = -np.sort(-rng.lognormal(-6, 2, (60, 4)), axis=1)
    budget = int(size.min(axis=1).sum() * 1.2)
    found = allocate(cost, size, budget)
    assert found.size <= budget
    assert found == allocate(cost, size, budget)


def test_ties_go_to_the_first_format_and_the_earlier_layer():
    cost, size = np.array([[2.0, 2.0, 1.0]] * 4), np.array([[1, 1, 2]] * 4)
    assert allocate(cost, size, 6).chosen == (2, 2, 0, 0)
    # what is larger and no better is never taken, however much there is to spend
    assert allocate(np.array([[1.0, 1.0]]), np.array([[8, 9]]), 100).chosen == (0,)


def test_a_format_that_does_not_fit_a_layer_is_not_taken():
    cost, size = np.array([[1.0, np.inf], [1.0, 0.0]]), np.array([[5, 1], [5, 1]])
    assert allocate(cost, size, 6).chosen == (0, 1)
    with pytest.raises(FormatError, match="sum to 6"):
        allocate(cost, size, 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[1.0, 2.0]], [[7, 9]], 6), "smallest of all choices sum to 7"),
        (([[1.0]], [[1]], 5, [[2.0]], 1.0), "fastest of all choices take 2"),
        (([[1.0]], [[1]], 5, [[2.0]]), "belong together"),
        (([[1.0]], [[1.5]], 5), "integers"),
        (([[1.0]], [[1, 2]], 5), r"\[layers, formats\]"),
        (([[float("nan")]], [[1]], 5), "NaN"),
        (([[float("inf")]], [[1]], 5), "no format fits layer 0"),
    ],
)
def test_what_cannot_be_met_is_refused(arguments, message):
    with pytest.raises(FormatError, match=message):
        allocate(*arguments)


def test_nothing_is_printed():
    """The solver has a line of its own for solutions that it repairs; a command's output must not hold it."""
    code = """
import numpy as np
from lowbit.compress.allocate import allocate
for seed in range(8):
    rng = np.random.default_rng(seed)
    size = rng.choice([5184, 13824], (42, 1)) * np.array([[231, 218, 305, 318, 331, 405, 418]])
    cost = rng.lognormal(-6, 1, (42, 1)) * np.array([[60, 66, 17, 14, 12, 4.5, 4]])
    cost = cost * rng.lognormal(0, 0.1, (42, 7))
    allocate(cost, size, int(size[:, 2].sum() * 1.01))
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"
