"""A mixture of experts, quantized and served: its answers do not depend on their company either."""

import itertools

import pytest

pytest.importorskip("transformers")

import lowbit
from lowbit import _native
from lowbit.engine import load
from lowbit.engine.core import EngineConfig, EngineCore

from ..model import tiny_models
from ..tiny_checkpoint import VOCABULARY, write_tiny_llama
from .test_invariance import PARAMETERS, answers


@pytest.fixture(scope="module", params=["qwen3-moe", "gpt-oss"])
def model(request, tmp_path_factory):
    """Of 16 experts with four for each token, in 4 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"vocab_size": VOCABULARY, "max_position_embeddings": 1024, "eos_token_id": 256}
    settings |= {"num_experts": 16, "num_experts_per_tok": 4, "tie_word_embeddings": True}
    network = tiny_models.build(tiny_models.CASES[request.param], **settings)
    tiny_models.save(network, folder / "float")
    tokenizer = write_tiny_llama(folder / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "float" / name).write_text((tokenizer / name).read_text())
    lowbit.quantize(folder / "float", "int4-g32", folder / "int4", verify=False)
    return load(folder / "int4")


@pytest.fixture(scope="module")
def requests():
    text = list(b"several experts hear every word, and each word hears several experts. " * 8)
    lengths = [1, 2, 65, 130, 256, 400]
    return [(text[:n], PARAMETERS[i % len(PARAMETERS)]) for i, n in enumerate(lengths)]


def test_answers_are_those_of_each_alone(model, requests):
    assert model.config.n_experts == 16
    expected = [model.generate_ids(prompt, parameters) for prompt, parameters in requests]
    assert len({tuple(ids) for ids in expected}) > 3
    before = _native.threads()
    try:
        for chunk, threads, preempt in itertools.product([None, 5], [1, 2], [0, 3]):
            _native.set_threads(threads)
            core = EngineCore(model, EngineConfig(chunk_tokens=chunk, preempt_every=preempt))
            for again in ("", "/again"):
                assert answers(core, requests, True, again) == expected, (chunk, threads, preempt, again)
    finally:
        _native.set_threads(before)
