"""What steps take, learned from steps that are measured in whatever order and with whatever disturbances."""

import random
from itertools import pairwise

import pytest

from lowbit.engine.budget import KNOTS, MAXIMUM_CHUNK, MINIMUM_CHUNK, StepTimes


def true_seconds(tokens):
    """A small model: the weights once, then the products; small steps do not fill the machine."""
    return 1.5e-3 + 0.4e-3 * min(tokens - 1, 24) + 0.2e-3 * max(tokens - 25, 0)


def learned(counts, noise=lambda seconds: seconds):
    times = StepTimes()
    for n in counts:
        times.observe(n, noise(true_seconds(n)))
    return times


def test_it_learns_what_it_sees():
    times = learned([1, 200, 1, 5, 1, 9, 2, 3, 17, 300] * 40)
    for n in (1, 2, 5, 9, 17, 200, 300):
        assert times.seconds(n) == pytest.approx(true_seconds(n), rel=0.15)


def test_the_scale_comes_from_the_first_step():
    times = StepTimes()
    times.observe(64, 2.0)
    assert times.seconds(64) == pytest.approx(2.0)
    assert times.seconds(64) > times.seconds(1) > 0.01


def test_time_grows_with_tokens_and_never_faster_than_they_do():
    rng = random.Random(2)
    times = StepTimes()
    for _ in range(500):
        n = rng.choice([1, 2, 3, 7, 8, 30, 512, 4096])
        times.observe(n, rng.random() * rng.choice([1e-3, 1e-2, 1.0]))
        knots = [times.seconds(1 << i) for i in range(KNOTS)]
        assert all(0 < low <= high * 1.0001 and high <= low * 2.0001 for low, high in pairwise(knots))


def test_a_pause_of_the_machine_is_forgotten():
    """The first steps, or the only one of its size, took forty times as long."""
    rng = random.Random(3)
    noise = lambda seconds: seconds * (40 if rng.random() < 0.03 else 1)  # noqa: E731
    times = learned([1, 200, 1, 5, 1, 9, 2, 3, 17, 300] * 40, noise)
    for n in (1, 5, 17, 200):
        assert times.seconds(n) == pytest.approx(true_seconds(n), rel=0.35)
    for n in (1, 9):
        cold = StepTimes()
        cold.observe(n, 40 * true_seconds(n))
        for _ in range(60):
            cold.observe(5, true_seconds(5))
        assert cold.seconds(1) < true_seconds(5)
        assert cold.seconds(9) < 2 * true_seconds(9)


def test_a_size_that_is_no_longer_used_is_guessed_again():
    """Or speculation would stay off, or on, for ever."""
    times = learned([1, 8] * 20)
    times._curve[3] = 2 * times._curve[2]  # far too high, and not measured any more
    for _ in range(3000):
        times.observe(1, true_seconds(1))
    assert times.seconds(8) < 5 * true_seconds(1)
    only_long = learned([9] * 500)
    assert only_long.seconds(1) < 0.4 * only_long.seconds(9)


def test_chunks_fit_the_target():
    times = learned([1, 16, 32, 64, 128, 256, 512, 4, 8] * 30)
    for target in (0.02, 0.05):
        times.target_seconds = target
        chunk = times.chunk(4)
        assert true_seconds(4 + chunk) == pytest.approx(target, rel=0.2)
    times.target_seconds = 1e-9
    assert times.chunk(4) == MINIMUM_CHUNK
    times.target_seconds = 10.0
    assert times.chunk(4) == MAXIMUM_CHUNK


def test_a_short_prompt_is_read_at_once():
    """Its pause is bearable; a long one, and any where the user names a target, is read in small chunks."""
    times = learned([1, 16, 32, 64, 128, 256, 512, 4, 8] * 30)
    chunk = times.chunk(2)
    assert chunk < 20
    for prompt in (30, 200, 400):
        assert times.chunk(2, prompt) == prompt
    for prompt in (2, 500, 4000):  # of which 500 would take 0.1 s and more
        assert times.chunk(2, prompt) == chunk
    times.target_seconds = 0.01
    assert times.chunk(2, 200) == times.chunk(2) < 100


def test_a_long_prompt_does_not_raise_the_target():
    """Where each prompt token costs more and more, the chunks shrink and the streams wait no longer."""
    times = StepTimes()
    for _ in range(50):
        times.observe(4, 0.004)
    chunk = times.chunk(4)
    for _ in range(300):
        chunk = times.chunk(4)
        times.observe(4 + chunk, 0.004 + 0.002 * chunk, chunk)
    assert chunk == MINIMUM_CHUNK
