"""The scheduler apart from the model: nothing lost, nobody starved, the budget kept."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.engine.fairness import TenantCounters

from .simulated_engine import BLOCK, Simulation, alone, next_token

FAMILIES = [[(i * 13 + f) % 50 for i in range(900)] for f in range(3)]


def half_right(job):
    """Guesses of which some hold."""
    tokens, guesses = list(job.tokens), []
    for _ in range(len(tokens) % 5):
        guesses.append(next_token(tokens + guesses) if len(tokens) % 3 else 0)
    return guesses


requests = st.lists(
    st.tuples(
        st.integers(0, 2),  # which beginning
        st.sampled_from([1, 5, 64, 65, 128, 200, 256, 257, 320, 700]),  # how much of it
        st.lists(st.integers(0, 49), max_size=3),  # then this
        st.integers(1, 90),  # new tokens
        st.sampled_from("abc"),  # tenant
        st.integers(-1, 1),  # priority
        st.integers(0, 30),  # arrives before this step
        st.none() | st.integers(0, 60),  # cancelled before this step
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=requests,
    blocks=st.integers(4, 14),
    max_sequences=st.integers(1, 6),
    chunk=st.sampled_from([None, 1, 16, 100, 512]),
    prefix=st.booleans(),
    drafts=st.booleans(),
)
def test_everything_is_served_and_nothing_is_lost(requests, blocks, max_sequences, chunk, prefix, drafts):
    world = Simulation(blocks, max_sequences, chunk, prefix, half_right if drafts else None)
    scheduler, memory = world.scheduler, world.memory
    expected, cancelled = {}, set()
    steps = 0
    while steps < 31 or not scheduler.idle:
        for i, (family, length, tail, new, tenant, priority, arrives, leaves) in enumerate(requests):
            name = str(i)
            if steps == arrives:
                prompt = FAMILIES[family][:length] + tail
                expected[name] = alone(prompt, new)
                world.add(name, prompt, new, tenant, priority)
            if steps == leaves and name in world.jobs:
                world.cancel(name)
                cancelled.add(name)
        before = {job.request_id for job in scheduler.running if job.lag == 1}
        plan = world.step()
        steps += 1
        assert steps < 60_000, "somebody is never served"
        assert len(scheduler.running) <= max_sequences
        cached = world.prefix.idle_blocks if prefix else 0
        held = {block for job in scheduler.running for block in job.cache}
        assert memory.free_blocks == blocks - len(held) - cached
        if plan is not None:
            assert plan.prompt_tokens <= (chunk or 512)
            # Whoever has begun to speak is in every step, unless it was preempted.
            still = {job.request_id for job in scheduler.running} | world.done.keys()
            missing = before & still - {job.request_id for job in plan.jobs}
            assert not missing or scheduler.preemptions
    assert world.done == {name: ids for name, ids in expected.items() if name not in cancelled}
    assert scheduler.queued_tokens == scheduler.n_waiting == 0
    if prefix:
        world.prefix.evict(blocks)
        assert not world.prefix._nodes and not world.prefix._coming
    assert memory.free_blocks == blocks
    assert not scheduler.tenants._used and not scheduler._waiting


def test_a_prompt_does_not_stall_streams():
    world = Simulation(16, chunk=32)
    for i in range(3):
        world.add(f"stream{i}", [i + 1] * 5, new=60)
    world.step()
    long = world.add("long", [9] * 700, new=4)
    while long.computed < 700:
        plan = world.step()
        assert plan.decode_tokens == 3 and plan.prompt_tokens <= 32


def test_requests_that_arrive_together_share_their_prefix():
    world = Simulation(16, max_sequences=8, chunk=64)
    for i in range(6):
        world.add(str(i), [*FAMILIES[0][:400], i], new=4)
    computed = 0
    while not world.scheduler.idle:
        computed += world.step().prompt_tokens
    assert computed == 401 + 5 * (401 - 384)
    assert world.prefix.hit_tokens == 5 * 384


def test_other_tenants_share_nothing():
    world = Simulation(16, max_sequences=8)
    for i in range(3):
        world.add(str(i), FAMILIES[0][:400], new=2, tenant=str(i))
    while world.step():
        pass
    assert world.prefix.hit_tokens == 0


@pytest.mark.parametrize("blocks", [4, 8])
def test_streams_that_outgrow_the_memory_are_preempted_and_finish(blocks):
    world = Simulation(blocks, max_sequences=8, prefix=False)
    prompts = {str(i): [i + 1] * 200 for i in range(8)}
    for name, prompt in prompts.items():
        world.add(name, prompt, new=300)
    while world.step():
        pass
    assert world.scheduler.preemptions > 0
    assert world.order[0] == "0", "the first in rank was preempted"
    assert world.done == {name: alone(prompt, 300) for name, prompt in prompts.items()}


def test_a_flooding_tenant_does_not_starve_another():
    world = Simulation(64, max_sequences=4, prefix=False)
    for i in range(60):
        world.add(f"flood{i}", [i % 50] * 100, new=20, tenant="flood")
    for _ in range(30):
        world.step()
    for i in range(5):
        world.add(f"quiet{i}", [i] * 100, new=20, tenant="quiet")
    while len([name for name in world.done if name.startswith("quiet")]) < 5:
        world.step()
    behind = [name for name in world.order if name.startswith("flood")]
    assert len(behind) < 24, "a tenant that asked for little waited for one that asked for much"


def test_counters_differ_by_no_more_than_what_runs():
    """Two tenants that always have work get equal service: arXiv:2401.00588, theorem 4.4."""
    world = Simulation(64, max_sequences=4, chunk=64, prefix=False)
    for i in range(40):
        world.add(f"a{i}", [1] * 150, new=10, tenant="a")
        world.add(f"b{i}", [2] * 20, new=30, tenant="b")
    bound = 2 * 4 * (150 + 2 * 30)
    while len(world.scheduler._waiting) == 2:
        world.step()
        used = world.scheduler.tenants.used
        assert abs(used("a") - used("b")) <= bound
    assert used("a") > bound, "the test sees nothing"


def test_who_was_away_saves_up_nothing_and_forgets_nothing():
    counters = TenantCounters()
    counters.enter("a")
    counters.charge("a", 100, 50)
    counters.enter("new")
    assert counters.used("a") == 200 == counters.used("new")
    counters.charge("new", 10, 0)
    counters.leave("new")
    counters.enter("new")
    assert counters.used("new") == 210, "leaving made it cheaper"
    counters.leave("new")
    counters.charge("a", 30, 0)
    counters.enter("new")
    assert counters.used("new") == 230, "idle time was saved up"
    for i in range(1000):
        counters.enter(f"passing {i}")
        counters.charge(f"passing {i}", i, 0)
        counters.leave(f"passing {i}")
        counters.charge("a", 20, 0)
        counters.charge("new", 20, 0)
    assert len(counters._left_at) < 200


def test_nobody_waits_for_a_prefix_of_lower_priority():
    world = Simulation(16, chunk=64)
    world.add("low", FAMILIES[0][:700], new=2)
    world.step()
    same = world.add("same", FAMILIES[0][:700], new=2)
    high = world.add("high", FAMILIES[0][:700], new=2, priority=1)
    world.step()
    assert high.computed > 0 and not same.running


def test_priority_goes_first_and_takes_the_place_of_less():
    world = Simulation(4, max_sequences=2, prefix=False)
    for i in range(3):
        world.add(f"low{i}", [i] * 300, new=40)
    world.step()
    world.add("high", [7] * 600, new=5, priority=1)
    world.step()
    assert world.jobs["high"].running and world.scheduler.preemptions == 1
    while world.step():
        pass
    assert world.order[0] == "high" and len(world.done) == 4


def test_prompts_are_read_in_the_order_of_rank():
    world = Simulation(16, chunk=32, prefix=False)
    for name, tenant in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        world.add(name, [3] * 200, new=2, tenant=tenant)
    first = []
    for _ in range(12):
        first.append(world.step().jobs[0].request_id)
    # A chunk for each tenant in turn, and within a tenant who came first.
    assert first[:6] == ["a1", "b1"] * 3
    assert not world.jobs["a2"].computed


def test_a_shared_block_does_not_block_its_only_user():
    """Two blocks; the second job would copy a page of the first's and needs both blocks itself."""
    world = Simulation(2)
    world.add("a", FAMILIES[0][:100], new=2)
    while world.step():
        pass
    world.add("b", FAMILIES[0][:80] + [7] * 300, new=2)
    while world.step():
        pass
    assert set(world.done) == {"a", "b"}


def test_nothing_is_evicted_for_a_job_that_does_not_fit():
    world = Simulation(6)
    world.add("kept", FAMILIES[0][: BLOCK + 70], new=1)
    while world.step():
        pass
    world.add("runs", [1] * 700, new=60)
    world.step()
    waits = world.add("waits", [2] * 600, new=5)
    for _ in range(5):
        world.step()
    assert not waits.running and world.prefix.idle_blocks == 2
    while world.step():
        pass
    assert "waits" in world.done


def test_eviction_takes_the_least_recent_and_the_deepest_first():
    world = Simulation(6, max_sequences=1)
    for name, family in (("old", 0), ("new", 1)):
        world.add(name, FAMILIES[family][: 2 * BLOCK + 10], new=1)
        while world.step():
            pass
    assert world.prefix.idle_blocks == 4
    world.prefix.evict(1)
    job = world.add("again", FAMILIES[0][: 2 * BLOCK + 10], new=1)
    world.step()
    assert job.cached_tokens == BLOCK
    world.cancel("again")
    other = world.add("other", FAMILIES[1][: 2 * BLOCK + 10], new=1)
    world.step()
    assert other.cached_tokens == 2 * BLOCK


def test_a_longer_beginning_replaces_the_shorter():
    world = Simulation(8, max_sequences=1)
    for length in (70, 140, 210, 290):
        job = world.add(str(length), FAMILIES[0][:length], new=1)
        while world.step():
            pass
        assert world.prefix.idle_blocks == 1
    assert job.cached_tokens == 192
