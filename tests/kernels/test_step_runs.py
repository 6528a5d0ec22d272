"""Steps of several sequences: prompts, decoding, verified guesses, masks and scores side by side, each
against rows of logits and a sampler of its own, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest

from lowbit import _native

from .decoder_net import NETS, build, make, random_tokens

PENALIZED = {
    "temperature": 0.9,
    "top_p": 0.95,
    "seed": 3,
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.2,
    "logit_bias": {4: 2.5, 9: -1.0},
    "forbid": [11, 12, 13],
    "forbid_until": 5,
    "top_logprobs": 3,
}
OPTIONS = {"greedy": {}, "seeded": {"temperature": 1.2, "seed": 8}, "penalized": PENALIZED}
CAPACITY = 512


@pytest.fixture(scope="module")
def decoder():
    return build(make(replace(NETS["nine_heads"], bits=4, kv_bits=8)))


def prompt_of(n, seed=1):
    return random_tokens(NETS["nine_heads"], n, seed)


def no_mask(turn):
    return None


class Plain:
    """One sequence, one token at a time, from rows of logits: what every step must equal."""

    def __init__(self, decoder, prompt, options, mask=no_mask):
        self.decoder, self.mask = decoder, mask
        self.cache, self.sampler = _native.KvCache(decoder, CAPACITY), _native.Sampler(**options)
        self.sampler.observe(prompt)
        self.ids, self.logprobs, self.tops = [], [], []
        self.pending = prompt

    def go(self, n):
        for _ in range(n):
            row = self.decoder.logits(self.pending, [self.cache], [len(self.pending)])[0]
            self.ids.append(self.sampler.sample(row, self.mask(len(self.ids))))
            self.logprobs.append(self.sampler.logprob)
            self.tops.append(self.sampler.top())
            self.pending = np.array(self.ids[-1:], np.int32)
        return self


def begin(decoder, prompt, options):
    """A cache that holds all of `prompt` but the last token, and a sampler that has seen all of it."""
    cache, sampler = _native.KvCache(decoder, CAPACITY), _native.Sampler(**options)
    sampler.observe(prompt)
    if len(prompt) > 1:
        decoder.step(prompt[:-1], [cache], [len(prompt) - 1], [None])
    return cache, sampler


def wrong(token):
    return (token + 1) % NETS["nine_heads"].vocab_size


def guesses(want, right, count):
    """`count` guesses of the tokens `want`, of which the first `right` are right."""
    return [token if i < right else wrong(token) for i, token in enumerate(want[:count])]


@pytest.mark.parametrize("kv_bits", [16, 8, 4, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_guesses_do_not_change_a_bit(name, kv_bits):
    decoder = build(make(replace(NETS["nine_heads"], bits=4, kv_bits=kv_bits)))
    prompt = prompt_of(122)  # guesses cross the end of a page of 4- or 2-bit keys
    want = Plain(decoder, prompt, OPTIONS[name]).go(16)
    for count in (0, 1, 2, 7, 10):
        for right in {0, 1, count // 2, count} - set(range(count + 1, 11)):
            cache, sampler = begin(decoder, prompt, OPTIONS[name])
            tokens = [int(prompt[-1]), *guesses(want.ids, right, count)]
            [run] = decoder.step(tokens, [cache], [count + 1], [sampler], [count])
            assert not run.failed and run.scores is None and run.score_tops == []
            assert cache.length == len(prompt) + right
            ids, logprobs, tops = run.ids, run.logprobs, run.tops
            assert len(ids) == right + 1
            while len(ids) < len(want.ids):  # the sampler and the cache go on as if nothing had been guessed
                [run] = decoder.step(ids[-1:], [cache], [1], [sampler])
                ids, logprobs, tops = ids + run.ids, logprobs + run.logprobs, tops + run.tops
            assert (ids, logprobs, tops) == (want.ids, want.logprobs, want.tops)
    assert len(want.tops[0]) == OPTIONS[name].get("top_logprobs", 0)


def test_runs_of_every_kind_in_one_step(decoder):
    """Guesses that cross groups of 64 rows and passes, beside prompts, decoding and scores."""
    kinds = [
        # (prompt, options, guesses, how many of them are right)
        (prompt_of(9, 2), OPTIONS["greedy"], 0, 0),
        (prompt_of(30, 3), PENALIZED, 90, 90),
        (prompt_of(40, 4), OPTIONS["seeded"], 80, 47),
        (prompt_of(17, 5), OPTIONS["seeded"], 0, 0),
        (prompt_of(5, 6), PENALIZED, 3, 2),
        (prompt_of(50, 7), OPTIONS["greedy"], 66, 0),
    ]
    wants = [Plain(decoder, prompt, options).go(k + 4) for prompt, options, k, _ in kinds]
    starts = [begin(decoder, prompt, options) for prompt, options, _, _ in kinds]
    tokens, caches, counts, samplers, drafts, scores = [], [], [], [], [], []

    def add(ids, cache, sampler, guessed=0, score=-1):
        tokens.extend(map(int, ids))
        caches.append(cache)
        counts.append(len(ids))
        samplers.append(sampler)
        drafts.append(guessed)
        scores.append(score)

    chunk, ending, scored = prompt_of(70, 20), prompt_of(33, 21), prompt_of(45, 22)
    new = [_native.KvCache(decoder, CAPACITY) for _ in range(3)]
    add(chunk, new[0], None)
    for (prompt, _, k, right), want, (cache, sampler) in zip(kinds, wants, starts):
        add([prompt[-1], *guesses(want.ids, right, k)], cache, sampler, k)
    ended = _native.Sampler(**PENALIZED)
    ended.observe(ending)
    add(ending, new[1], ended)
    add(scored, new[2], _native.Sampler(), score=2)
    runs = decoder.step(tokens, caches, counts, samplers, drafts, None, scores)
    assert sum(counts) > 96 * 3, "the step is one pass only"

    assert runs[0].ids == [] and new[0].length == len(chunk)
    plain = Plain(decoder, ending, PENALIZED).go(1)
    assert (runs[-2].ids, runs[-2].logprobs, runs[-2].tops) == (plain.ids, plain.logprobs, plain.tops)
    assert np.array_equal(runs[-1].scores, decoder.score(scored, _native.KvCache(decoder, CAPACITY)))
    assert runs[-1].ids == Plain(decoder, scored, {}).go(1).ids
    for (prompt, _, _, right), want, (cache, sampler), run in zip(kinds, wants, starts, runs[1:]):
        assert cache.length == len(prompt) + right
        assert (run.ids, run.logprobs) == (want.ids[: right + 1], want.logprobs[: right + 1])
        [after] = decoder.step(run.ids[-1:], [cache], [1], [sampler])
        assert after.ids == want.ids[right + 1 : right + 2]
        assert after.logprobs == want.logprobs[right + 1 : right + 2]
    # The chunk's keys and values are those of a prompt of its own.
    last = decoder.logits([3], [new[0]], [1])
    cache = _native.KvCache(decoder, CAPACITY)
    decoder.logits(chunk, [cache], [len(chunk)])
    assert np.array_equal(last, decoder.logits([3], [cache], [1]))


def mask_of(allowed, vocab):
    bits = np.zeros(-(-vocab // 32) * 32, bool)
    bits[list(allowed)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("name", OPTIONS)
def test_masks(decoder, name):
    vocab = NETS["nine_heads"].vocab_size
    prompt, chance = prompt_of(20), np.random.default_rng(0)
    allowed = [chance.choice(vocab, size, replace=False) for size in (1, 3, 40, vocab, 2, 90)]
    masks = np.array([mask_of(some, vocab) for some in allowed])
    masks[:, -1] |= 1 << 31  # bits behind the vocabulary mean nothing
    want = Plain(decoder, prompt, OPTIONS[name], lambda turn: masks[turn]).go(6)
    assert all(token in some for token, some in zip(want.ids, allowed))
    assert want.ids != Plain(decoder, prompt, OPTIONS[name]).go(6).ids
    for right in (0, 3, 5):
        cache, sampler = begin(decoder, prompt, OPTIONS[name])
        tokens = [int(prompt[-1]), *guesses(want.ids, right, 5)]
        [run] = decoder.step(tokens, [cache], [6], [sampler], [5], [masks])
        assert (run.ids, run.logprobs) == (want.ids[: right + 1], want.logprobs[: right + 1])
        assert run.tops == want.tops[: right + 1], "tops ignore the mask"
    caches = [begin(decoder, prompt, {})[0] for _ in range(2)]
    samplers = [_native.Sampler(), _native.Sampler()]
    runs = decoder.step([prompt[-1]] * 2, caches, [1, 1], samplers, None, [None, masks[0]])
    assert [run.ids for run in runs] == [Plain(decoder, prompt, {}).go(1).ids, [int(allowed[0][0])]]


def test_a_mask_that_leaves_nothing_fails_the_run(decoder):
    prompt, vocab = prompt_of(20), NETS["nine_heads"].vocab_size
    want = Plain(decoder, prompt, PENALIZED).go(3)
    nothing, all_of_it = mask_of([], vocab), mask_of(range(vocab), vocab)
    cache, sampler = begin(decoder, prompt, PENALIZED)
    [run] = decoder.step(prompt[-1:], [cache], [1], [sampler], None, [nothing])
    assert run.failed and run.ids == [] and cache.length == len(prompt) - 1
    # Behind a guess the run ends before it, and the sampler goes on from there.
    masks = np.array([all_of_it, nothing])
    tokens = [int(prompt[-1]), want.ids[0]]
    [run] = decoder.step(tokens, [cache], [2], [sampler], [1], [masks])
    assert not run.failed and run.ids == want.ids[:1] and cache.length == len(prompt)
    [run] = decoder.step(want.ids[:1], [cache], [1], [sampler])
    assert run.ids == want.ids[1:2] and run.logprobs == want.logprobs[1:2]


def test_scores_and_the_likeliest_tokens_beside_them(decoder):
    tokens = prompt_of(150)
    rows = decoder.logits(tokens, [_native.KvCache(decoder, CAPACITY)], [150], all=True)
    wide = rows.astype(np.float64)
    logprobs = (
        wide
        - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True))
        - wide.max(1, keepdims=True)
    )
    caches = [_native.KvCache(decoder, CAPACITY) for _ in range(3)]
    runs = decoder.step(np.tile(tokens, 3), caches, [150] * 3, [None] * 3, None, None, [0, 4, None])
    for run in runs[:2]:
        np.testing.assert_allclose(run.scores, logprobs[np.arange(149), tokens[1:]], atol=2e-5)
    assert np.array_equal(runs[0].scores, runs[1].scores)
    assert runs[0].score_tops == [] and len(runs[1].score_tops) == 149
    assert runs[2].scores is None and runs[2].ids == []
    for top, row in zip(runs[1].score_tops, logprobs):
        order = np.argsort(-row, kind="stable")[:4]
        assert [token for token, _ in top] == order.tolist()
        np.testing.assert_allclose([value for _, value in top], row[order], atol=2e-5)
    assert [cache.length for cache in caches] == [150] * 3


def test_a_run_that_is_not_finite_disturbs_nobody():
    net = make(replace(NETS["nine_heads"], kv_bits=8))
    embed = net.weights["embed"].copy()
    embed[5] = np.inf
    decoder = build(replace(net, weights=net.weights | {"embed": embed}))
    good, bad = prompt_of(20), prompt_of(20, 9)
    good[good == 5], bad[7] = 6, 5
    want = Plain(decoder, good, PENALIZED | {"logit_bias": {5: -1e4}}).go(4)

    options = PENALIZED | {"logit_bias": {5: -1e4}}
    caches = [_native.KvCache(decoder, CAPACITY) for _ in range(4)]
    samplers = [_native.Sampler(**options) for _ in range(3)]
    for sampler in samplers:
        sampler.observe(good)
    tokens = np.concatenate([bad, good, bad, bad])
    runs = decoder.step(tokens, caches, [20] * 4, [*samplers, None], None, None, [-1, -1, 3, 0])
    assert [run.failed for run in runs] == [True, False, True, True]
    assert [cache.length for cache in caches] == [0, 20, 0, 0]
    for run in (runs[0], runs[2], runs[3]):
        assert run.ids == run.logprobs == run.tops == run.score_tops == [] and run.scores is None
    assert runs[1].ids == want.ids[:1]
    # A failed run may try again with other tokens: cache and sampler are as before.
    for cache, sampler in zip(caches[:3], samplers):
        if cache.length == 0:
            assert decoder.step(good, [cache], [20], [sampler])[0].ids == want.ids[:1]
        [run] = decoder.step(want.ids[:3], [cache], [3], [sampler], [2])
        assert run.ids == want.ids[1:4]

    # A guess that breaks the logits behind it ends the run there; the next step fails.
    cache, sampler = _native.KvCache(decoder, CAPACITY), _native.Sampler(logit_bias={5: 1e4})
    [run] = decoder.step([*good, 5, 5], [cache], [22], [sampler], [2])
    assert run.ids == [5] and not run.failed and cache.length == 20
    assert decoder.step([5], [cache], [1], [sampler])[0].failed and cache.length == 20


def test_wrong_arguments_are_named(decoder):
    cache, sampler = _native.KvCache(decoder, 8), _native.Sampler()
    words = mask_of([1], NETS["nine_heads"].vocab_size)
    for arguments, match in [
        (([1], [cache], [1], []), "0 samplers for 1 runs"),
        (([1], [cache], [1], [sampler], [1]), r"drafts\[0\]=1 must be less than counts\[0\]=1"),
        (([1, 2], [cache], [2], [None], [1]), "run 0 has drafts but no sampler"),
        (([1], [cache], [1], [None], None, [words]), "run 0 has a mask but no sampler"),
        (([1, 2], [cache], [2], [sampler], [1], None, [0]), "run 0 has drafts and scores"),
        (([1, 2], [cache], [2], [sampler], None, None, [10**6]), r"scores\[0\]=1000000"),
        (([1], [cache], [1], [sampler], [0, 0]), "2 drafts for 1 runs"),
        (([1], [cache], [1], [sampler], None, [words[1:]]), r"masks\[0\].*\[1, 4\]"),
        (([1], [cache], [1], [sampler], None, [words.astype(np.int64)]), r"masks\[0\]"),
        (([1, 2], [cache], [2], [sampler], [1], [words]), r"masks\[0\].*\[2, 4\]"),
        (([1], [cache], [1], [_native.Sampler(logit_bias={101: 1.0})]), "logit_bias names token 101"),
        (([1] * 9, [cache], [9], [sampler]), "capacity=8"),
    ]:
        with pytest.raises(ValueError, match=match):
            decoder.step(*arguments)
    two = [_native.KvCache(decoder, 8) for _ in range(2)]
    with pytest.raises(ValueError, match="sampler 1 appears twice"):
        decoder.step([1, 1], two, [1, 1], [sampler, sampler])
    with pytest.raises(TypeError):
        decoder.step([1], [cache], [1], ["greedy"])
    assert cache.length == 0
