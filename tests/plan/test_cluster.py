"""The simulated cluster against what can be computed by hand, and against queueing theory."""

import random

import pytest

from lowbit.errors import RequestError
from lowbit.plan.cluster import ANSWERS, PROMPTS, WHOLE, Cluster, Link, MachineSpec
from lowbit.plan.trace import Request


def _cost(prompts, contexts):
    """1 ms for a step, 10 us a prompt token, 0.1 ms a stream."""
    return 1e-3 + 1e-5 * sum(count for count, _, _ in prompts) + 1e-4 * len(contexts)


def _one(**changes):
    return [(WHOLE, MachineSpec(_cost, kv_blocks=64, **changes))]


def test_a_request_alone_takes_the_sum_of_its_steps():
    (outcome,) = Cluster(_one(chunk_tokens=100)).run([Request(250, 4, at_seconds=2.0)])
    # Three chunks of 100, 100 and 50 tokens, then three steps of one stream.
    assert outcome.first_token_seconds == pytest.approx(3 * 1e-3 + 250e-5)
    assert outcome.time_per_token_seconds == pytest.approx(1.1e-3)
    assert len(outcome.token_seconds) == 4
    assert outcome.token_seconds[0] > 2.0


def test_two_streams_share_their_steps():
    outcomes = Cluster(_one(chunk_tokens=512)).run([Request(100, 50), Request(100, 50)])
    assert [len(outcome.token_seconds) for outcome in outcomes] == [50, 50]
    assert outcomes[0].token_seconds[-1] < 2 * 50 * 1.1e-3  # less than one after the other
    assert outcomes[0].time_per_token_seconds == pytest.approx(1.2e-3, rel=0.03)


def test_the_order_of_a_trace_does_not_matter():
    requests = [Request(10 + i, 5, at_seconds=(i * 7) % 40) for i in range(40)]
    told = Cluster(_one()).run(requests)
    shuffled = requests[:]
    random.Random(1).shuffle(shuffled)
    again = Cluster(_one()).run(shuffled)
    assert sorted(o.token_seconds[-1] for o in told) == sorted(o.token_seconds[-1] for o in again)


def test_a_queue_waits_as_pollaczek_and_khinchine_say():
    service, load = 1.1e-3, 0.7  # one token per request, one request at a time
    chance = random.Random(5)
    at, requests = 0.0, []
    for _ in range(20000):
        at += chance.expovariate(load / service)
        requests.append(Request(10, 1, at))
    outcomes = Cluster(_one(max_sequences=1, chunk_tokens=10, prefix_cache=False)).run(requests)
    mean = sum(outcome.first_token_seconds for outcome in outcomes) / len(outcomes)
    expected = service + load * service / (2 * (1 - load))  # M/D/1
    assert mean == pytest.approx(expected, rel=0.06)


def test_named_beginnings_are_computed_once():
    spec = _one(chunk_tokens=4096)
    shared = [Request(1100, 2, float(i), blocks=(1, 2)) for i in range(3)]
    outcomes = Cluster(spec).run(shared)
    assert [outcome.cached_tokens for outcome in outcomes] == [0, 1024, 1024]
    assert outcomes[1].first_token_seconds < 0.3 * outcomes[0].first_token_seconds
    other = [Request(1100, 2, float(i), blocks=(3 * i, 3 * i + 1)) for i in range(3)]
    assert [outcome.cached_tokens for outcome in Cluster(_one()).run(other)] == [0, 0, 0]


def test_memory_that_is_short_preempts_and_all_is_answered():
    spec = [(WHOLE, MachineSpec(_cost, kv_blocks=4, prefix_cache=False))]
    outcomes = Cluster(spec).run([Request(200, 400) for _ in range(4)])
    assert all(len(outcome.token_seconds) == 400 for outcome in outcomes)
    assert sum(outcome.preemptions for outcome in outcomes) > 0
    with pytest.raises(RequestError, match="keys and values of 1024"):
        Cluster(spec).run([Request(1000, 100)])


def test_prompts_and_answers_on_machines_of_their_own():
    spec = MachineSpec(_cost, kv_blocks=64, chunk_tokens=512)
    link = Link(bytes_per_second=1e6, kv_bytes=100, seconds=0.5)
    (outcome,) = Cluster([(PROMPTS, spec), (ANSWERS, spec)], link).run([Request(400, 3)])
    assert outcome.first_token_seconds == pytest.approx(1e-3 + 400e-5)
    # 400 positions of 100 bytes and the latency, then a step of one stream.
    assert outcome.token_seconds[1] - outcome.token_seconds[0] == pytest.approx(0.5 + 0.04 + 1.1e-3)
    assert outcome.token_seconds[2] - outcome.token_seconds[1] == pytest.approx(1.1e-3)
    cluster = Cluster([(PROMPTS, spec), (ANSWERS, spec)], link)
    outcomes = cluster.run([Request(400, 1), Request(300, 9)])
    assert [len(outcome.token_seconds) for outcome in outcomes] == [1, 9]
    assert all(step.prompt_tokens == 0 for step in cluster.steps if step.machine == 1)


def test_streams_are_not_stalled_where_prompts_are_read_elsewhere():
    spec = MachineSpec(_cost, kv_blocks=400, chunk_tokens=2048)
    load = [Request(50, 300)] + [Request(2000, 2, 0.02 * i) for i in range(1, 10)]
    link = Link(1e9, 100)
    whole = Cluster([(WHOLE, spec)]).run(load)[0]
    split = Cluster([(PROMPTS, spec), (ANSWERS, spec)], link).run(load)[0]
    assert split.longest_gap_seconds < 0.3 * whole.longest_gap_seconds


def test_clusters_that_cannot_work_are_refused():
    spec = MachineSpec(_cost, kv_blocks=4)
    with pytest.raises(RequestError, match="roles none"):
        Cluster([])
    with pytest.raises(RequestError, match="roles prompts"):
        Cluster([(PROMPTS, spec)])
    with pytest.raises(RequestError, match="link"):
        Cluster([(PROMPTS, spec), (ANSWERS, spec)])
