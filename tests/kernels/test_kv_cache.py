"""Pools of blocks: sharing, copy-on-write, running out, and results equal to those of private caches."""

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest

from lowbit import _native

from .decoder_net import NETS, build, make, random_tokens

BITS = [16, 8, 4, 2]


def setting(bits, name="nine_heads"):
    net = make(replace(NETS[name], bits=4, kv_bits=bits))
    return build(net), random_tokens(net, 1200)


def feed(decoder, cache, tokens):
    """Logits of every token after what the cache has."""
    assert cache.reserve(cache.length + len(tokens))
    return decoder.logits(tokens, [cache], [len(tokens)], all=True)


def private(decoder, tokens):
    return decoder.logits(tokens, [_native.KvCache(decoder, len(tokens))], [len(tokens)], all=True)


@pytest.mark.parametrize("bits", BITS)
def test_a_pool_gives_the_bits_of_a_private_cache(bits):
    decoder, tokens = setting(bits)
    want = private(decoder, tokens[:600])
    pool = _native.KvPool(decoder, 8)
    assert (pool.blocks, pool.free_blocks, pool.block_positions) == (8, 8, 256)
    a, b = _native.KvCache(pool, 700), _native.KvCache(pool, 700)
    # Taken in turn, so that neither has its blocks in a row.
    got = {a: [], b: []}
    for start in range(0, 600, 150):
        for cache in (a, b):
            got[cache].append(feed(decoder, cache, tokens[start : start + 150]))
    assert np.array_equal(np.concatenate(got[a]), want)
    assert np.array_equal(np.concatenate(got[b]), want)
    assert pool.free_blocks == 2


@pytest.mark.parametrize("bits", BITS)
def test_a_shared_beginning_continues_as_if_computed(bits):
    decoder, tokens = setting(bits)
    pool = _native.KvPool(decoder, 6)
    first = _native.KvCache(pool, 1200)
    feed(decoder, first, tokens[:600])
    blocks = first.blocks()
    page = pool.page_positions
    assert page == (1 if bits >= 8 else 64)
    assert [block.positions for block in blocks] == [256, 256, 88 // page * page]
    for length in (512, 512 + pool.page_positions, 576):
        second = _native.KvCache(pool, 1200)
        assert second.adopt(blocks, length) and second.length == length
        assert pool.free_blocks == 3 - (length > 512), "whole blocks are shared"
        tail = random_tokens(make(NETS["nine_heads"]), 40, seed=length)
        want = private(decoder, np.concatenate([tokens[:length], tail]))[length:]
        assert np.array_equal(feed(decoder, second, tail), want)
    # The first one goes on as if nobody had looked.
    rest = feed(decoder, first, tokens[600:700])
    assert np.array_equal(rest, private(decoder, tokens[:700])[600:])


@pytest.mark.parametrize("bits", BITS)
def test_whoever_writes_into_a_shared_block_copies_it(bits):
    decoder, tokens = setting(bits)
    pool = _native.KvPool(decoder, 3)
    cache = _native.KvCache(pool, 512)
    feed(decoder, cache, tokens[:128])
    held = cache.blocks()
    with pytest.raises(ValueError, match="reserve"):
        decoder.logits(tokens[128:130], [cache], [2])
    assert pool.free_blocks == 2
    feed(decoder, cache, tokens[500:600])  # other tokens than those that follow below
    assert pool.free_blocks == 1
    other = _native.KvCache(pool, 512)
    assert other.adopt(held, 128)
    assert np.array_equal(feed(decoder, other, tokens[128:200]), private(decoder, tokens[:200])[128:])


@pytest.mark.parametrize("bits", BITS)
def test_handles_keep_content_and_give_blocks_back(bits):
    decoder, tokens = setting(bits)
    pool = _native.KvPool(decoder, 4)
    cache = _native.KvCache(pool, 512)
    feed(decoder, cache, tokens[:512])
    held = cache.blocks()
    cache.clear()
    assert (cache.length, pool.free_blocks) == (0, 2)
    feed(decoder, cache, tokens[600:700])  # must not land in the held blocks
    heir = _native.KvCache(pool, 600)
    assert heir.adopt(held, 512)
    del cache, held
    gc.collect()
    assert pool.free_blocks == 2
    assert np.array_equal(feed(decoder, heir, tokens[512:540]), private(decoder, tokens[:540])[512:])
    del heir
    gc.collect()
    assert pool.free_blocks == 4
    pool.trim()
    again = _native.KvCache(pool, 600)
    assert np.array_equal(feed(decoder, again, tokens[:300]), private(decoder, tokens[:300]))


def test_handles_outlive_cache_and_pool():
    decoder, tokens = setting(8)
    pool = _native.KvPool(decoder, 2)
    cache = _native.KvCache(pool, 256)
    feed(decoder, cache, tokens[:256])
    held = cache.blocks()
    del cache, pool
    gc.collect()
    assert held[0].positions == 256


@pytest.mark.parametrize("bits", BITS)
def test_an_exhausted_pool_changes_nothing(bits):
    decoder, tokens = setting(bits)
    pool = _native.KvPool(decoder, 2)
    cache, other = _native.KvCache(pool, 1024), _native.KvCache(pool, 1024)
    feed(decoder, cache, tokens[:64])
    held = cache.blocks()
    assert not cache.reserve(600) and pool.free_blocks == 1 and cache.length == 64
    with pytest.raises(ValueError, match="cache 0 has no blocks"):
        decoder.logits(tokens[:150], [other], [150])
    assert other.reserve(256) and pool.free_blocks == 0
    assert not cache.reserve(65), "the shared block cannot be copied"
    third = _native.KvCache(pool, 1024)
    if pool.page_positions <= 64:
        assert not third.adopt(held, 64) and third.length == 0
    del held
    gc.collect()
    assert cache.reserve(65), "alone again, it may be written"
    assert np.array_equal(feed(decoder, cache, tokens[64:100]), private(decoder, tokens[:100])[64:])


@pytest.mark.parametrize("bits", [4, 2])
def test_pages_of_codes_are_kept_whole(bits):
    decoder, tokens = setting(bits)
    want = private(decoder, tokens[:560])
    pool = _native.KvPool(decoder, 4)
    cache = _native.KvCache(pool, 1024)
    # Within the page of the last position any length can be kept, elsewhere the beginning of a page.
    for fed, asked, kept in [
        (300, 290, 290),
        (64, 0, 0),
        (300, 255, 192),
        (128, 100, 100),
        (130, 127, 64),
        (449, 448, 448),
        (500, 500, 500),
        (320, 257, 257),
        (70, 64, 64),
    ]:
        cache.clear()
        assert np.array_equal(feed(decoder, cache, tokens[:fed]), want[:fed])
        assert cache.truncate(asked) == cache.length == kept
        assert np.array_equal(feed(decoder, cache, tokens[kept : kept + 60]), want[kept : kept + 60])
    with pytest.raises(ValueError, match="length=100 must be a multiple of 64"):
        _native.KvCache(pool, 512).adopt(cache.blocks(), 100)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("start", [58, 63, 64, 250])
def test_refused_guesses_leave_no_trace(bits, start):
    decoder, tokens = setting(bits)
    chosen = private(decoder, tokens[:start])[-1].argmax()
    rest = tokens[700:790]
    want = private(decoder, np.concatenate([tokens[:start], rest]))[start - 1 :]
    for guesses in (1, 12, 64):
        cache = _native.KvCache(decoder, 400)
        decoder.logits(tokens[: start - 1], [cache], [start - 1])
        wrong = np.full(guesses, (chosen + 1) % 101, np.int32)
        run = decoder.step(
            np.concatenate([tokens[start - 1 : start], wrong]),
            [cache],
            [guesses + 1],
            [_native.Sampler()],
            [guesses],
        )[0]
        assert (run.ids, cache.length) == ([chosen], start)
        assert np.array_equal(decoder.logits(rest, [cache], [90], all=True), want[1:])


@pytest.mark.parametrize("bits", [4, 2])
def test_a_failed_step_leaves_the_page_that_is_not_complete(bits):
    net = make(replace(NETS["plain"], kv_bits=bits))
    net.weights["embed"][7] = np.nan
    decoder, tokens = build(net), random_tokens(net, 900) % 7
    want = private(decoder, tokens[:200])
    cache = _native.KvCache(decoder, 1000)
    decoder.logits(tokens[:100], [cache], [100])
    bad = tokens.copy()
    bad[-1] = 7
    assert decoder.step(bad[100:], [cache], [800], [_native.Sampler()])[0].failed
    assert cache.length == 100
    assert np.array_equal(decoder.logits(tokens[100:200], [cache], [100], all=True), want[100:])


def test_four_bits_take_a_quarter_of_the_memory():
    blocks = {}
    for bits in BITS:
        net = make(replace(NETS["plain"], head_dim=64, rotary_dim=64, kv_bits=bits, n_heads=2, n_kv_heads=2))
        cache = _native.KvCache(build(net), 2048)
        blocks[bits] = cache.nbytes / (2048 * 2 * 2 * 128) * 8  # bits of a number
    assert blocks == {16: 16, 8: 8.75, 4: 4.28125, 2: 2.28125}


def test_truncate_gives_blocks_back():
    decoder, tokens = setting(16)
    pool = _native.KvPool(decoder, 4)
    cache = _native.KvCache(pool, 1024)
    feed(decoder, cache, tokens[:700])
    held = cache.blocks()
    assert cache.truncate(512) == 512
    del held
    gc.collect()
    assert pool.free_blocks == 2
    assert np.array_equal(feed(decoder, cache, tokens[512:600]), private(decoder, tokens[:600])[512:])


def test_a_private_cache_shares_too():
    decoder, tokens = setting(8)
    cache = _native.KvCache(decoder, 512)
    decoder.logits(tokens[:100], [cache], [100])
    held = cache.blocks()
    after = decoder.logits(tokens[100:120], [cache], [20], all=True)  # copies by itself
    assert np.array_equal(after, private(decoder, tokens[:120])[100:])
    assert held[0].positions == 100


def test_wrong_uses_are_named():
    decoder, tokens = setting(8)
    pool, strange = _native.KvPool(decoder, 3), _native.KvPool(decoder, 1)
    cache = _native.KvCache(pool, 300)
    feed(decoder, cache, tokens[:100])
    held = cache.blocks()
    for call, words in [
        (lambda: cache.reserve(301), "capacity=300"),
        (lambda: cache.adopt(held, 10), "clear it first"),
        (lambda: _native.KvCache(pool, 300).adopt(held, 101), "holds 100 positions"),
        (lambda: _native.KvCache(pool, 300).adopt(held, 257), "needs 2 blocks, got 1"),
        (lambda: _native.KvCache(pool, 50).adopt(held, 64), "capacity=50"),
        (lambda: _native.KvCache(strange, 300).adopt(held, 64), "another pool"),
        (lambda: _native.KvPool(decoder, 0), "blocks=0"),
        (lambda: _native.KvCache(pool, 0), "capacity=0"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError):
        _native.KvCache(pool, 300).adopt([None], 10)
    assert (cache.length, pool.free_blocks) == (100, 2)


def test_a_second_thread_is_turned_away():
    decoder, tokens = setting(16, "plain")
    cache = _native.KvCache(decoder, 1200)
    refused, done = [], threading.Event()

    def look():
        while not done.is_set():
            try:
                cache.blocks()
            except RuntimeError as error:
                refused.append(str(error))
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(200):
        cache.truncate(0) if cache.length else None
        try:
            decoder.logits(tokens, [cache], [len(tokens)])
        except ValueError:  # the watcher had the cache at that moment
            continue
        if refused:
            break
    done.set()
    watcher.join()
    assert refused and "another thread is using this cache" in refused[0]
