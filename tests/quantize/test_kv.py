"""KV methods: exact where they say so, causal, and counted to the bit."""

import numpy as np
import pytest

from lowbit.errors import RequestError
from lowbit.quantize.kv import KV_METHODS

POSITIONS, HEADS, DIM = 100, 2, 64


def sequence(seed=0):
    """Keys with a few loud channels, values without."""
    rng = np.random.default_rng(seed)
    keys, values = (rng.standard_normal((POSITIONS, HEADS, DIM)).astype(np.float32) for _ in range(2))
    loud = np.ones((HEADS, DIM), np.float32)
    for head in range(HEADS):
        loud[head, rng.choice(DIM, 6, replace=False)] = 25
    return keys * loud, values, np.square(loud)


def rounded(name, **options):
    keys, values, energy = sequence()
    return KV_METHODS[name].apply(keys, values, energy, **options), keys, values


KEYS = [name for name, method in KV_METHODS.items() if method.reads == "keys"]


@pytest.mark.parametrize("name", KEYS)
def test_what_a_query_sees_depends_on_the_past_only(name):
    options = {"group": 8, "window": 16} if name == "kivi" else {}
    whole, keys, values = rounded(name, **options)
    energy = sequence()[2]
    assert np.abs(whole.keys - keys).max() > 0 and np.abs(whole.values - values).max() > 0
    for count in (1, 15, 16, 17, 40):
        part = KV_METHODS[name].apply(keys[:count], values[:count], energy, **options)
        np.testing.assert_array_equal(part.rounded_keys, whole.rounded_keys[:count])
        np.testing.assert_array_equal(part.rounded_values, whole.rounded_values[:count])
        k, v = part.rounded_keys[-1], part.rounded_values[-1]
        assert k <= count and v <= count
        np.testing.assert_array_equal(part.keys[:k], whole.keys[:k])
        np.testing.assert_array_equal(part.values[:v], whole.values[:v])


@pytest.mark.parametrize("name", KEYS)
def test_more_bits_err_less(name):
    options = {"window": 32} if name == "kivi" else {}
    errors = []
    for bits in (2, 4, 8):
        cache, keys, values = rounded(name, bits=bits, **options)
        errors.append([np.abs(cache.keys - keys).max(), np.abs(cache.values - values).max()])
    assert (np.diff(errors, axis=0) < 0).all()
    assert errors[-1][1] < 0.05


def test_token_bits():
    assert rounded("token", bits=4)[0].bits == 4 + 32 / DIM
    assert rounded("token", bits=2, group=16)[0].bits == 2 + 32 / 16
    assert rounded("bfp", bits=4)[0].bits == 4 + 8 / 32


def test_kivi_keeps_a_window():
    cache, keys, _ = rounded("kivi", bits=2, window=32)
    assert cache.rounded_keys[-1] == 96 and cache.rounded_values[-1] == 68
    np.testing.assert_array_equal(cache.rounded_keys[[0, 30, 31, 32, 63]], [0, 0, 32, 32, 64])
    np.testing.assert_array_equal(cache.rounded_values[[0, 31, 32, 99]], [0, 0, 1, 68])
    assert cache.bits == ((96 + 68) * 3 + (4 + 32) * 16) / 200
    wide, _, _ = rounded("kivi", bits=2, window=128)
    assert wide.bits == 16 and not wide.rounded_keys.any() and not wide.rounded_values.any()
    # Loud channels keep their noise to themselves; with a scale for each token all others drown in it.
    quiet = np.broadcast_to(sequence()[2] == 1, keys.shape)[:96]
    by_token = rounded("token", bits=2, group=32)[0]
    lost, drowned = (np.square(c.keys - keys)[:96][quiet].sum() for c in (cache, by_token))
    assert lost < 0.05 * drowned


def test_sorted_blocks_lose_less():
    plain, keys, _ = rounded("bfp", bits=4)
    ordered, _, _ = rounded("bfp", bits=4, sort=True)
    assert plain.bits == ordered.bits
    energy = sequence()[2]
    quiet = np.broadcast_to(energy == 1, keys.shape)

    def lost(cache):
        return np.square(cache.keys - keys)[quiet].sum()

    assert lost(ordered) < 0.7 * lost(plain)
    np.testing.assert_array_equal(plain.values, ordered.values)
    # A block's largest magnitude fixes its step: 4 bits are a sign and 7 steps.
    block = plain.keys[5, 1, :32]
    step = 2.0 ** (np.floor(np.log2(np.abs(keys[5, 1, :32]).max())) - 2)
    np.testing.assert_array_equal(block / step, np.clip(np.rint(keys[5, 1, :32] / step), -7, 7))


def test_xquant_counts_the_input():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 128)).astype(np.float32)
    for heads, expected in ((2, 5.0 / 2), (1, 5.0)):  # as many keys as inputs, half as many
        key, value = (rng.standard_normal((heads * DIM, 128)).astype(np.float32) for _ in range(2))
        for_keys, for_values, bits = KV_METHODS["xquant"].apply(x, key, value, bits=4)
        assert bits == expected
        np.testing.assert_array_equal(for_keys, for_values)
        for_keys, for_values, bits = KV_METHODS["xquant"].apply(x, key, value, bits=8, latent=True)
        assert bits == 9
        for weight, kept in ((key, for_keys), (value, for_values)):
            exact = x @ weight.T
            assert 0 < np.abs(kept @ weight.T - exact).max() < 0.02 * np.abs(exact).max()


def test_bad_options():
    for name, options in (("token", {"bits": 0}), ("kivi", {"window": 40}), ("bfp", {"bits": 1})):
        with pytest.raises(RequestError, match=name if name != "token" else "bits"):
            rounded(name, **options)
