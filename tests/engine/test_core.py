"""EngineCore on a whole small model: the tokens of a request are those it gets alone."""

from dataclasses import replace

import numpy as np
import pytest

from lowbit.engine import SamplingParameters, load
from lowbit.engine.core import EngineConfig, EngineCore
from lowbit.engine.request import Request
from lowbit.errors import BusyError, RequestError

PROMPTS = ["Hello world, this is", "abc", "The quick brown fox jumps over the lazy dog. " * 2, "x" * 70 + "y"]
PARAMETERS = [
    SamplingParameters(max_tokens=20),
    SamplingParameters(max_tokens=21, temperature=1.0, seed=3, presence_penalty=0.5),
    SamplingParameters(max_tokens=22, temperature=0.8, top_k=20, seed=4),
    SamplingParameters(max_tokens=23, repetition_penalty=1.2),
]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load(tiny_model)


@pytest.fixture(scope="module")
def expected(model):
    return [model.generate_ids(model.encode(p), q) for p, q in zip(PROMPTS, PARAMETERS)]


def finish(core: EngineCore) -> dict:
    """Step until idle: {request id: (ids, last output)}."""
    ids, last = {}, {}
    for _ in range(100_000):
        if core.idle:
            return {name: (ids[name], last[name]) for name in ids}
        for output in core.step():
            ids.setdefault(output.request_id, []).extend(output.ids)
            last[output.request_id] = output
    raise AssertionError("the engine does not come to rest")


def iter_outputs(core: EngineCore):
    while not core.idle:
        yield from core.step()


def run(core: EngineCore, model) -> list[list[int]]:
    for i, (prompt, parameters) in enumerate(zip(PROMPTS, PARAMETERS)):
        core.add(Request(model.encode(prompt), parameters, request_id=str(i)))
    ends = finish(core)
    return [ends[str(i)][0] for i in range(len(PROMPTS))]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"chunk_tokens": 1},
        {"chunk_tokens": 7},
        {"preempt_every": 3},
        {"max_sequences": 2},
        {"kv_blocks": 1},
    ],
    ids=str,
)
def test_tokens_are_those_of_a_request_alone(model, expected, config):
    core = EngineCore(model, EngineConfig(**config))
    assert run(core, model) == expected
    assert core.stats()["running"] == core.stats()["waiting"] == 0


def test_what_a_finished_request_tells(model):
    core = EngineCore(model)
    core.add(Request(model.encode("abc"), SamplingParameters(max_tokens=4, logprobs=2), request_id="a"))
    outputs = []
    while not core.idle:
        outputs += core.step()
    assert [len(o.ids) for o in outputs] == [1, 1, 1, 1]
    assert all(o.logprobs[0] <= 0 and len(o.tops[0]) == 2 for o in outputs)
    assert [o.finish_reason for o in outputs] == [None, None, None, "length"]
    timings = outputs[-1].timings
    assert (timings.prompt_tokens, timings.generated_tokens, timings.cached_tokens) == (3, 4, 0)
    assert min(timings.queued_seconds, timings.prompt_seconds, timings.generation_seconds) > 0
    stats = core.stats()
    assert (stats["generated_tokens"], stats["prompt_tokens"], stats["requests_finished"]) == (4, 3, 1)


def test_context_is_filled_exactly(model):
    core = EngineCore(model)
    prompt = [65] * (model.context - 3)
    core.add(Request(prompt, SamplingParameters(max_tokens=50, ignore_eos=True), request_id="a"))
    ids, last = finish(core)["a"]
    assert (len(ids), last.finish_reason) == (3, "context")


def test_prompt_scores_after_a_preemption(model):
    prompt = model.encode("It was the best of times, it was the worst of times")
    core = EngineCore(model, EngineConfig(chunk_tokens=20, max_sequences=1))
    core.add(Request(prompt, SamplingParameters(max_tokens=3), request_id="a", echo_scores=0))
    core.step()
    core.step()
    core.add(Request(prompt[:9], SamplingParameters(max_tokens=3), request_id="b", priority=1))
    outputs = [o for o in iter_outputs(core) if o.request_id == "a"]
    assert outputs[-1].timings.preemptions == 1
    want = model.decoder.score(np.array(prompt, np.int32), model.model.cache())
    assert np.array_equal(outputs[0].prompt_scores.logprobs, want)


def test_requests_that_are_refused(model):
    core = EngineCore(model, EngineConfig(max_queued_tokens=10))
    with pytest.raises(RequestError, match="0 tokens"):
        core.add(Request([]))
    with pytest.raises(RequestError, match=r"128 tokens and the context holds 128"):
        core.add(Request([65] * 128))
    with pytest.raises(RequestError, match="vocabulary"):
        core.add(Request([99999]))
    core.add(Request([65] * 8, request_id="a"))
    with pytest.raises(RequestError, match="in use"):
        core.add(Request([65], request_id="a"))
    with pytest.raises(BusyError, match="8 tokens are waiting") as error:
        core.add(Request([65] * 3))
    assert error.value.retry_after_seconds > 0
    core.add(Request([65] * 2))
    with pytest.raises(RequestError, match="999 is outside the vocabulary"):
        core.add(Request([65], SamplingParameters(logit_bias={999: 1.0})))
    with pytest.raises(RequestError, match="temperature"):
        core.add(Request([65], SamplingParameters(temperature=1e-6)))
    with pytest.raises(RequestError, match="kv_blocks=0"):
        EngineConfig(kv_blocks=0)


@pytest.mark.parametrize("steps", [0, 1, 3, 30])
def test_cancel_in_every_phase(model, steps):
    """Queued, in the prompt, as a stream: the memory is free at once."""
    core = EngineCore(model, EngineConfig(max_sequences=2, chunk_tokens=16, prefix_cache=False))
    free = core.stats()["kv_blocks_used"]
    for name in "abc":
        core.add(Request([65] * 60, SamplingParameters(ignore_eos=True), request_id=name))
    for _ in range(steps):
        core.step()
    for name in "cab":
        assert core.cancel(name)
    assert not core.cancel("a")
    assert core.stats()["kv_blocks_used"] == free
    assert {o.finish_reason for o in core.step()} == {"cancelled"}
    assert core.idle


def test_bias_and_min_tokens(model):
    """A bias ends the text at once; min_tokens holds end-of-text back."""
    eos = min(model.eos_ids)
    core = EngineCore(model)
    ends = SamplingParameters(max_tokens=9, logit_bias={eos: 1000.0})
    core.add(Request([65], ends, request_id="a"))
    core.add(Request([65], replace(ends, min_tokens=5), request_id="b"))
    core.add(Request([65], replace(ends, logit_bias={66: 1000.0}), request_id="c"))
    done = finish(core)
    assert (done["a"][0], done["a"][1].finish_reason) == ([], "eos")
    assert (len(done["b"][0]), done["b"][1].finish_reason) == (5, "eos")
    assert (done["c"][0], done["c"][1].finish_reason) == ([66] * 9, "length")


@pytest.mark.parametrize("chunk", [None, 1, 2, 5])
def test_prompt_scores(model, chunk):
    prompt = model.encode("It was the best of times, it was the worst of times")
    core = EngineCore(model, EngineConfig(chunk_tokens=chunk))
    core.add(Request(prompt, SamplingParameters(max_tokens=3), request_id="a", echo_scores=2))
    core.add(Request(prompt[:9], SamplingParameters(max_tokens=3), request_id="b"))
    outputs = [o for o in iter_outputs(core) if o.request_id == "a"]
    scores = outputs[0].prompt_scores
    assert [o.prompt_scores for o in outputs[1:]] == [None, None]
    want = model.decoder.score(np.array(prompt, np.int32), model.model.cache())
    assert np.array_equal(scores.logprobs, want)
    assert [len(top) for top in scores.tops] == [2] * (len(prompt) - 1)
    logits = model.decoder.logits(np.array(prompt, np.int32), [model.model.cache()], [len(prompt)], all=True)
    assert [top[0][0] for top in scores.tops] == logits[:-1].argmax(1).tolist()
    ids = [token for o in outputs for token in o.ids]
    assert ids == model.generate_ids(prompt, SamplingParameters(max_tokens=3))


class Letters:
    """Allows only some tokens; ends after `most` of them, or breaks."""

    def __init__(self, allowed, most=100, breaks=None):
        self.allowed, self.most, self.breaks, self.seen = allowed, most, breaks, []

    @property
    def finished(self):
        return len(self.seen) == self.most

    def mask(self):
        if self.breaks == "mask" and len(self.seen) == 2:
            raise RequestError("grammar: too deep")
        words = np.zeros(-(-260 // 32), np.uint32)
        for token in self.allowed:
            words[token // 32] |= 1 << token % 32
        return words

    def accept(self, token_id):
        assert token_id in self.allowed
        if self.breaks == "accept" and len(self.seen) == 2:
            raise RequestError("grammar: too deep")
        self.seen.append(token_id)


@pytest.mark.parametrize("speculation", [None, "ngram"])
def test_constraints(model, speculation):
    """They hold, end and fail each for its own request."""
    core = EngineCore(model, EngineConfig(speculation=speculation))
    free = SamplingParameters(max_tokens=9, ignore_eos=True)
    eos = min(model.eos_ids)
    constraints = {
        "two": Letters([65, 66], most=5),
        "end": Letters([eos]),
        "none": Letters([]),
        "mask": Letters([65, 66], breaks="mask"),
        "accept": Letters([65, 66], breaks="accept"),
        "long": Letters([70, 71]),
    }
    for name, constraint in constraints.items():
        parameters = replace(free, min_tokens=3, ignore_eos=False)
        core.add(Request([65, 66, 65], parameters, request_id=name, constraint=constraint))
    core.add(Request([65, 66, 65], free, request_id="free"))
    done = finish(core)
    assert {name: last.finish_reason for name, (_, last) in done.items()} == {
        "two": "stop",
        "end": "eos",
        "none": "error",
        "mask": "error",
        "accept": "error",
        "long": "length",
        "free": "length",
    }
    assert done["two"][0] == constraints["two"].seen and len(done["two"][0]) == 5
    assert len(done["mask"][0]) == len(done["accept"][0]) == 2 and set(done["long"][0]) <= {70, 71}
    assert "too deep" in done["mask"][1].error and "too deep" in done["accept"][1].error
    assert "no token is left" in done["none"][1].error
    assert done["free"][0] == model.generate_ids([65, 66, 65], free)
    assert core.stats()["kv_blocks_used"] == core.stats()["kv_blocks_cached"] and not core._constrained
