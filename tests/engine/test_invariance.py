"""Tokens depend on prompt, parameters and model: not on how the engine comes to them."""

import itertools
import json
import random
import shutil

import pytest

from lowbit import _native
from lowbit.engine import SamplingParameters, load
from lowbit.engine.core import EngineConfig, EngineCore
from lowbit.engine.request import Request

LENGTHS = [1, 64, 65, 130, 250, 255, 256, 300]
PARAMETERS = [
    SamplingParameters(max_tokens=14, ignore_eos=True),
    SamplingParameters(max_tokens=12, temperature=0.9, seed=7, ignore_eos=True),
    SamplingParameters(max_tokens=13, temperature=1.2, top_p=0.9, seed=2**63 + 5, frequency_penalty=0.7),
    SamplingParameters(max_tokens=11, repetition_penalty=1.3, logit_bias={70: 2.0}, min_tokens=5),
]
KV_BITS = [16, 8, 4, 2]


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """The small model with a context of several blocks."""
    folder = tmp_path_factory.mktemp("models") / "long"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return {bits: load(folder, kv_bits=bits) for bits in KV_BITS}


@pytest.fixture(scope="module")
def requests():
    rng = random.Random(5)
    text = [rng.choice(b"abcdefgh ") for _ in range(400)]
    prompts = [text[:n] for n in LENGTHS]
    prompts += [text[:192] + [rng.randrange(256) for _ in range(60)] for _ in range(2)]
    return [(prompt, PARAMETERS[i % len(PARAMETERS)]) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def expected(models, requests):
    """What each says alone, on a cache of its own."""
    return {
        bits: [model.generate_ids(prompt, parameters) for prompt, parameters in requests]
        for bits, model in models.items()
    }


class Guesser:
    """Guesses of which some hold: the truth, sometimes cut or wrong at a place."""

    def __init__(self, requests, expected):
        self.truth = {str(i): [*prompt, *ids] for i, ((prompt, _), ids) in enumerate(zip(requests, expected))}
        self.told = 0

    def propose(self, request_id, tokens, limit):
        n = len(tokens)
        guesses = self.truth[request_id.split("/")[0]][n : n + min(limit, n % 6)]
        if guesses and n % 2 == 0:
            guesses[n % len(guesses)] ^= 1
        return guesses

    def feedback(self, request_id, proposed, accepted):
        self.told += accepted


def answers(core, requests, together, names=""):
    """Ids of each request; all at once, or one after the other."""
    said = {f"{i}{names}": [] for i in range(len(requests))}
    for name, (prompt, parameters) in zip(said, requests):
        core.add(Request(prompt, parameters, request_id=name))
        while not together and not core.idle:
            for output in core.step():
                said[output.request_id] += output.ids
    while not core.idle:
        for output in core.step():
            said[output.request_id] += output.ids
    return list(said.values())


# chunk_tokens, with companions, preempt_every, kv_blocks. Each case takes a third, in which each value meets
# each other one.
WAYS = list(itertools.product([None, 5, 64], [True, False], [0, 3], [None, 3]))


@pytest.mark.parametrize("kv_bits", KV_BITS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("speculation", [None, "guesses", "ngram"])
def test_tokens_are_a_function_of_prompt_parameters_and_model(
    models, requests, expected, kv_bits, threads, speculation
):
    before = _native.threads()
    _native.set_threads(threads)
    try:
        for chunk, together, preempt, blocks in WAYS[(KV_BITS.index(kv_bits) + threads) % 3 :: 3]:
            guesser = Guesser(requests, expected[kv_bits])
            config = EngineConfig(
                kv_blocks=blocks,
                chunk_tokens=chunk,
                preempt_every=preempt,
                speculation=guesser if speculation == "guesses" else speculation,
            )
            core = EngineCore(models[kv_bits], config)
            for again in ("", "/again"):  # the second time with prefix hits
                said = answers(core, requests, together, again)
                assert said == expected[kv_bits], (chunk, together, preempt, blocks, again)
            stats = core.stats()
            if blocks is None:
                assert stats["prefix_hit_tokens"] > 1000
            if speculation == "guesses":
                assert 0 < stats["accepted_tokens"] < stats["drafted_tokens"]
            if preempt:
                assert stats["preemptions"] > 0
    finally:
        _native.set_threads(before)
