"""The sampler against NumPy: which tokens it keeps, in what proportions it draws them, what it reports."""

import numpy as np
import pytest

from lowbit import _native


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities [vocab] after temperature, top-k, top-p and min-p, in float64; 0 where dropped."""
    order = np.lexsort((np.arange(len(logits)), -logits))  # descending; ties by id
    x = logits[order].astype(np.float64) / temperature
    p = np.exp(x - x[0])
    if top_k:
        p[top_k:] = 0
    p /= p.sum()
    p[np.cumsum(p) - p >= top_p] = 0
    p[p < min_p * p[0]] = 0
    out = np.zeros(len(logits))
    out[order] = p / p.sum()
    return out


def penalized(logits, history, repetition=1.0, presence=0.0, frequency=0.0):
    x = logits.astype(np.float64).copy()
    for token, count in zip(*np.unique(history, return_counts=True)):
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        x[token] -= presence + frequency * count
    return x


def log_softmax(logits):
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def draws(logits, n, **options):
    """Tokens of n samplers with seeds 0 .. n-1."""
    return np.array([_native.Sampler(seed=seed, **options).sample(logits) for seed in range(n)])


def assert_proportions(tokens, probabilities):
    """Chi-square over the likely tokens; tokens of probability 0 must not appear."""
    n = len(tokens)
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    likely = probabilities * n >= 10
    expected = np.append(probabilities[likely] * n, probabilities[~likely].sum() * n)
    seen = np.append(counts[likely], counts[~likely].sum())
    use = expected > 0
    statistic = ((seen[use] - expected[use]) ** 2 / expected[use]).sum()
    freedom = use.sum() - 1
    # Wilson and Hilferty: four standard deviations.
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * np.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-6
    assert statistic <= bound, (statistic, bound)


OPTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_k": 1},
    {"top_k": 10_000},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"temperature": 3.0, "top_p": 0.9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 300])
def test_draws_follow_the_kept_distribution(options, vocab, rng):
    logits = (2 * rng.normal(size=vocab)).astype(np.float32)
    options = {"temperature": 1.0} | options
    assert_proportions(draws(logits, 4000, **options), kept(logits, **options))


def test_chi_square_sees_a_wrong_temperature(rng):
    logits = (2 * rng.normal(size=300)).astype(np.float32)
    with pytest.raises(AssertionError):
        assert_proportions(draws(logits, 4000, temperature=1.2), kept(logits))


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.5}, {"top_p": 0.99}, {"min_p": 0.3}, {"top_k": 50}, {"top_k": 3000, "top_p": 0.7}, {}],
    ids=str,
)
def test_large_vocabularies(options, spread, rng):
    logits = (spread * rng.normal(size=50_000)).astype(np.float32)
    p = kept(logits, 1.0, **options)
    tokens = draws(logits, 200, temperature=1.0, **options)
    assert np.all(p[tokens] > 0)
    # Ranks of the draws are uniform over the cumulative distribution: mean 1/2 within four deviations.
    place = (np.cumsum(p) - p / 2)[tokens]
    if p.max() < 0.05:
        assert abs(place.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 200)


def test_successive_draws_of_one_sampler_follow_the_distribution(rng):
    logits = rng.normal(size=50).astype(np.float32)
    sampler = _native.Sampler(temperature=1.0, seed=11)
    tokens = np.array([sampler.sample(logits) for _ in range(5000)])
    assert_proportions(tokens, kept(logits))
    pairs = tokens[:-1:2] % 2 * 2 + tokens[1::2] % 2  # neighbours are independent
    odd = kept(logits)[1::2].sum()
    assert_proportions(pairs, np.array([(1 - odd) ** 2, (1 - odd) * odd, odd * (1 - odd), odd**2]))


def test_same_seed_same_tokens(rng):
    rows = rng.normal(size=(20, 500)).astype(np.float32)
    runs = []
    for seed in (5, 5, 6):
        sampler = _native.Sampler(temperature=1.0, seed=seed)
        runs.append([sampler.sample(row) for row in rows])
    assert runs[0] == runs[1] != runs[2]


def test_greedy_takes_the_lowest_of_equal_tokens():
    for vocab in (1, 3, 64, 65, 1000):
        logits = np.zeros(vocab, np.float32)
        assert _native.Sampler().sample(logits) == 0
        logits[vocab // 2 :] = 1
        assert _native.Sampler().sample(logits) == vocab // 2
        assert _native.Sampler(temperature=1.0, top_k=1).sample(logits) == vocab // 2
    # top-k keeps the lowest ids of a tie
    assert set(draws(np.zeros(1000, np.float32), 300, temperature=1.0, top_k=3)) == {0, 1, 2}
    assert set(draws(np.zeros(1000, np.float32), 300, temperature=1.0, top_p=0.0035)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition": 1.5},
        {"repetition": 0.7},
        {"presence": 0.8},
        {"frequency": 0.4},
        {"repetition": 1.2, "presence": 0.3, "frequency": -0.2},
    ],
    ids=str,
)
def test_penalties(penalties, rng):
    logits = rng.normal(size=40).astype(np.float32)
    history = rng.integers(0, 40, 30).astype(np.int32)
    named = {f"{name}_penalty": value for name, value in penalties.items()}
    want = penalized(logits, history, **penalties)

    def sampler(seed=0, temperature=0.0):
        s = _native.Sampler(seed=seed, temperature=temperature, **named)
        s.observe(history)
        return s

    assert sampler().sample(logits) == np.argmax(want)
    tokens = np.array([sampler(seed, 1.0).sample(logits) for seed in range(3000)])
    assert_proportions(tokens, kept(want))


def test_sampled_tokens_join_the_history():
    sampler = _native.Sampler(presence_penalty=10.0)
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    assert [sampler.sample(logits) for _ in range(4)] == [0, 1, 2, 0]
    assert logits.tolist() == [3.0, 2.0, 1.0]


def test_logprobs_are_those_of_the_raw_logits(rng):
    logits = (3 * rng.normal(size=70_000)).astype(np.float32)
    sampler = _native.Sampler(temperature=0.7, presence_penalty=1.0, top_p=0.9, seed=2, top_logprobs=20)
    sampler.observe([5, 6])
    token = sampler.sample(logits)
    want = log_softmax(logits)
    assert abs(sampler.logprob - want[token]) < 1e-5
    ids, values = zip(*sampler.top())
    assert list(ids) == np.argsort(-logits, kind="stable")[:20].tolist()
    np.testing.assert_allclose(values, want[list(ids)], atol=1e-5)
    assert len(_native.Sampler(top_logprobs=9).top()) == 0


def test_minus_infinity_is_never_drawn(rng):
    logits = np.full(5000, -np.inf, np.float32)
    logits[[17, 4500]] = 0.0
    for options in ({}, {"top_k": 50}, {"top_p": 0.999}, {"min_p": 0.1}):
        assert set(draws(logits, 60, temperature=1.0, **options)) == {17, 4500}
    sampler = _native.Sampler(top_logprobs=5)
    assert sampler.sample(logits) == 17
    assert [token for token, _ in sampler.top()] == [17, 4500]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 4999, 8191])
def test_logits_that_are_not_numbers_are_an_error(bad, place):
    logits = np.zeros(8192, np.float32)
    logits[place] = bad
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}):
        with pytest.raises(RuntimeError, match="finite"):
            _native.Sampler(**options).sample(logits)
    with pytest.raises(RuntimeError, match="finite"):
        _native.Sampler().sample(np.full(9, -np.inf, np.float32))


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -1.0),
        ("temperature", np.nan),
        ("temperature", 1e-9),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", np.inf),
        ("frequency_penalty", np.nan),
        ("top_logprobs", -1),
    ],
)
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        _native.Sampler(**{name: value})
    with pytest.raises(ValueError, match="outside"):
        _native.Sampler().observe([-3])
    with pytest.raises(ValueError, match="0 logits"):
        _native.Sampler().sample(np.zeros(0, np.float32))


def test_bias_is_added_before_penalties(rng):
    logits = rng.normal(size=40).astype(np.float32)
    bias = {3: 1.5, 7: -2.0, 39: 0.25}
    biased = logits.copy()
    biased[list(bias)] += list(bias.values())
    sampler = _native.Sampler(logit_bias={3: 1e4})
    assert sampler.sample(logits) == 3
    assert abs(sampler.logprob - log_softmax(logits)[3]) < 1e-5, "log-probabilities are raw"
    assert_proportions(draws(logits, 4000, temperature=1.0, logit_bias=bias), kept(biased))
    named = {"logit_bias": bias, "repetition_penalty": 1.5, "frequency_penalty": 0.4}
    history = np.array([3, 3, 7, 11], np.int32)

    def draw(seed):
        sampler = _native.Sampler(temperature=1.0, seed=seed, **named)
        sampler.observe(history)
        return sampler.sample(logits)

    want = kept(penalized(biased, history, repetition=1.5, frequency=0.4))
    assert_proportions(np.array([draw(seed) for seed in range(4000)]), want)


def test_forbidden_tokens_come_only_after_their_time():
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    assert [_native.Sampler(forbid=[0]).sample(logits) for _ in range(3)] == [1] * 3
    sampler = _native.Sampler(forbid=[0, 1, 500], forbid_until=2, top_logprobs=1)
    assert [sampler.sample(logits) for _ in range(4)] == [2, 2, 0, 0]
    assert sampler.top()[0][0] == 0
    assert set(draws(logits, 50, temperature=5.0, forbid=[1])) == {0, 2}


def test_masks_leave_only_what_they_allow(rng):
    logits = rng.normal(size=5000).astype(np.float32)
    allowed = rng.random(5000) < 0.01
    mask = np.packbits(np.append(allowed, np.zeros(24, bool)), bitorder="little").view(np.uint32)
    masked = np.where(allowed, logits, -np.inf).astype(np.float32)
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 9, "min_p": 0.1}):
        for seed in range(20):
            a, b = _native.Sampler(seed=seed, **options), _native.Sampler(seed=seed, **options)
            assert a.sample(logits, mask) == b.sample(masked)
    sampler = _native.Sampler()
    token = sampler.sample(logits, mask)
    assert abs(sampler.logprob - log_softmax(logits)[token]) < 1e-5
    with pytest.raises(RuntimeError, match="no token is allowed"):
        sampler.sample(logits, np.zeros(157, np.uint32))
    with pytest.raises(ValueError, match="156 words; 5000 logits need 157"):
        sampler.sample(logits, mask[:-1])
    for bias in ({-1: 1.0}, {1: np.nan}, {1: 1e6}):
        with pytest.raises(ValueError, match="logit_bias"):
            _native.Sampler(logit_bias=bias)
