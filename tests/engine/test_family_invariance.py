"""What test_invariance.py shows for a Llama, on networks of other families: windows, caps, sinks, experts."""

import random

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from lowbit.engine import SamplingParameters, load
from lowbit.engine.core import EngineConfig, EngineCore

from .. import tiny_checkpoint
from ..model import tiny_models
from .test_invariance import answers

CASES = ["gemma2", "gemma3", "phi3-longrope", "olmo2", "gpt2", "opt", "neox", "gpt-oss", "mixtral"]
PARAMETERS = [
    SamplingParameters(max_tokens=9, ignore_eos=True),
    SamplingParameters(max_tokens=8, temperature=0.9, seed=7, ignore_eos=True),
]
WAYS = [(5, True, 0, "ngram"), (64, True, 3, None), (None, False, 0, None), (None, True, 3, "ngram")]


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    model = tiny_models.build(tiny_models.CASES[request.param], max_position_embeddings=512)
    folder = tiny_models.save(model, tmp_path_factory.mktemp("models") / request.param)
    tiny_checkpoint.write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_tokens_are_a_function_of_prompt_parameters_and_model(folder, kv_bits):
    model = load(folder, kv_bits=kv_bits)
    rng = random.Random(5)
    text = [rng.choice(b"abcdefgh ") for _ in range(300)]
    requests = [(text[:n], PARAMETERS[i % 2]) for i, n in enumerate([1, 64, 130, 255, 257])]
    expected = [model.generate_ids(prompt, parameters) for prompt, parameters in requests]
    assert len({tuple(ids) for ids in expected}) == len(expected)
    for chunk, together, preempt, speculation in WAYS:
        config = EngineConfig(chunk_tokens=chunk, preempt_every=preempt, speculation=speculation)
        core = EngineCore(model, config)
        for again in ("", "/again"):  # the second time with prefix hits
            assert answers(core, requests, together, again) == expected, (chunk, preempt, speculation, again)
        assert core.stats()["prefix_hit_tokens"] > 300
