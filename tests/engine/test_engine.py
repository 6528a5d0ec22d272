"""`lowbit.Engine`: answers equal those of the model alone, whoever else calls and whatever they do."""

import asyncio
import gc
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import lowbit
from lowbit import _native
from lowbit.engine import engine as engine_module
from lowbit.errors import LowbitError, RequestError, UnsupportedError

Say = lowbit.SamplingParameters
HANG = 60  # seconds; a generous limit for what must not wait for ever


@pytest.fixture(scope="module")
def model(tiny_model):
    """One thread: these tests are about callers, and a team of threads waits long on a busy machine."""
    before = _native.threads()
    yield lowbit.load(tiny_model, threads=1)
    _native.set_threads(before)


@pytest.fixture
def engine(model):
    with lowbit.Engine(model) as engine:
        yield engine


def alone(model, prompt, parameters):
    """The answer of the model without an engine."""
    return model.stream_ids(model.encode(prompt), parameters).generation


def settled(engine):
    """Statistics once nothing runs."""
    end = time.monotonic() + HANG
    while True:
        stats = engine.stats()
        if not stats["running"] and not stats["waiting"]:
            return stats
        assert time.monotonic() < end, stats
        time.sleep(0.005)


PROMPTS = ["abc", "The quick brown fox", "x", "The quick red fox jumps over", "é漢"]
KINDS = [
    Say(max_tokens=12),
    Say(max_tokens=20, temperature=0.9, seed=4),
    Say(max_tokens=9, logprobs=2, seed=1),
]


@pytest.mark.parametrize("parameters", KINDS)
def test_one_and_many_as_alone(engine, model, parameters):
    expected = [alone(model, p, parameters) for p in PROMPTS]
    many = engine.generate(PROMPTS, parameters)
    one = engine.generate(PROMPTS[1], parameters)
    for got, want in zip([*many, one], [*expected, expected[1]], strict=True):
        assert (got.text, got.token_ids, got.finish_reason) == (want.text, want.token_ids, want.finish_reason)
        assert (got.prompt_tokens, got.generated_tokens) == (want.prompt_tokens, want.generated_tokens)
        assert got.logprobs == want.logprobs
        assert got.seconds >= got.prompt_seconds > 0 and got.queued_seconds >= 0


def test_parameters_for_each_and_token_ids(engine, model):
    each = [Say(max_tokens=3 + i, seed=i, temperature=1.0) for i in range(3)]
    got = engine.generate([list(b"ab"), list(b"cd"), list(b"ef")], each)
    assert [g.token_ids for g in got] == [
        alone(model, ids, p).token_ids for ids, p in zip([b"ab", b"cd", b"ef"], each)
    ]
    assert engine.generate(list(b"ab"), each[0]).token_ids == got[0].token_ids
    assert engine.generate([]) == []


def test_chat(engine, model):
    turn = [{"role": "user", "content": "hi"}]
    want = model.chat(turn, max_tokens=10).text
    assert engine.chat(turn, Say(max_tokens=10)).text == want
    assert [g.text for g in engine.chat([turn, turn], Say(max_tokens=10))] == [want, want]
    assert "".join(engine.stream(turn, Say(max_tokens=10))) == want


def test_stream(engine, model):
    parameters = Say(max_tokens=30, temperature=1.0, seed=3)
    answer = engine.stream("abc", parameters)
    pieces = list(answer)
    assert "".join(pieces) == answer.generation.text == alone(model, "abc", parameters).text
    assert answer.done and list(answer) == []


def test_stop_strings_end_the_request(engine, model):
    whole = alone(model, "abc", Say(max_tokens=60)).text
    stop = whole[5:7]
    parameters = Say(max_tokens=60, stop=stop)
    want = alone(model, "abc", parameters)
    answer = engine.stream("abc", parameters)
    assert "".join(answer) == want.text == whole[: whole.index(stop)]
    got = answer.generation
    assert (got.finish_reason, got.token_ids) == ("stop", want.token_ids)
    assert settled(engine)["generated_tokens"] <= len(got.token_ids) + 1


def test_async(engine, model):
    parameters = Say(max_tokens=10, temperature=0.8, seed=2)
    want = [alone(model, p, parameters).text for p in PROMPTS]

    async def main():
        pieces = []
        async for piece in engine.astream(PROMPTS[0], parameters):
            pieces.append(piece)
        many = await engine.agenerate(PROMPTS, parameters)
        at_once = await asyncio.gather(*(engine.agenerate(p, parameters) for p in PROMPTS))
        chat = await engine.achat([{"role": "user", "content": "hi"}], Say(max_tokens=5))
        return "".join(pieces), [g.text for g in many], [g.text for g in at_once], chat.text

    first, many, at_once, chat = asyncio.run(main())
    assert first == want[0] and many == want == at_once
    assert chat == model.chat([{"role": "user", "content": "hi"}], max_tokens=5).text


def test_the_event_loop_goes_on_while_the_engine_works(engine):
    async def main():
        ticks = 0
        task = asyncio.ensure_future(engine.agenerate("abc", Say(max_tokens=100, ignore_eos=True)))
        while not task.done():
            ticks += 1
            await asyncio.sleep(0)
        return ticks

    assert asyncio.run(main()) > 2  # a loop that waits for the engine turns once


def test_many_threads(engine, model):
    want = [alone(model, p, Say(max_tokens=15)).text for p in PROMPTS]
    got, errors = {}, []

    def caller(i):
        try:
            for j in range(4):
                p = (i + j) % len(PROMPTS)
                text = "".join(engine.stream(PROMPTS[p], Say(max_tokens=15)))
                got[i, j] = text == want[p] == engine.generate(PROMPTS[p], Say(max_tokens=15)).text
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert not errors and len(got) == 24 and all(got.values())


LONG = Say(max_tokens=None, ignore_eos=True)  # to the end of the context


def slow_down(engine, monkeypatch, seconds=0.02):
    step = engine._loop.core.step
    monkeypatch.setattr(engine._loop.core, "step", lambda: time.sleep(seconds) or step())


def used(stats):
    return stats["kv_blocks_used"] - stats["kv_blocks_cached"]


def test_a_stream_left_early_frees_its_memory(engine, monkeypatch):
    slow_down(engine, monkeypatch)
    for piece in engine.stream("abc", LONG):
        if piece:
            break
    stats = settled(engine)
    assert used(stats) == 0 and stats["generated_tokens"] < 60
    held = engine.stream("abc", LONG)
    next(held)
    assert engine.stats()["running"] == 1
    del held
    gc.collect()
    assert used(settled(engine)) == 0
    with engine.stream("abc", LONG) as answer:
        next(answer)
    assert used(settled(engine)) == 0
    assert answer.generation.finish_reason == "cancelled"


def test_cancel(engine, monkeypatch):
    slow_down(engine, monkeypatch)
    answer = engine.stream("abc", LONG)
    first = next(answer)
    engine.cancel(answer.request_id)
    generation = answer.generation
    assert generation.finish_reason == "cancelled" and generation.text.startswith(first)
    assert first + "".join(answer) == generation.text
    engine.cancel(answer.request_id)
    engine.cancel("never seen")
    assert used(settled(engine)) == 0


def test_a_cancelled_task_ends_its_request(engine, monkeypatch):
    slow_down(engine, monkeypatch)

    async def main():
        whole = asyncio.ensure_future(engine.agenerate("abc", LONG))
        many = asyncio.ensure_future(engine.agenerate(["ab", "cd"], LONG))

        async def read():
            async for _ in engine.astream("abc", LONG):
                pass

        stream = asyncio.ensure_future(read())
        while engine.stats()["running"] < 4:
            await asyncio.sleep(0.01)
        for task in (whole, many, stream):
            task.cancel()
        done = await asyncio.gather(whole, many, stream, return_exceptions=True)
        assert all(isinstance(error, asyncio.CancelledError) for error in done)

    asyncio.run(main())
    stats = settled(engine)
    assert used(stats) == 0 and stats["generated_tokens"] < 200


def test_a_closed_event_loop_ends_its_stream(engine, monkeypatch):
    slow_down(engine, monkeypatch)
    answer = engine.astream("abc", LONG)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(answer.__anext__())
    loop.close()
    stats = settled(engine)
    assert used(stats) == 0 and stats["generated_tokens"] < 60


def test_who_does_not_read_holds_up_nobody(engine, model):
    silent = engine.stream("abc", LONG)
    assert engine.generate("x", Say(max_tokens=5)).text == alone(model, "x", Say(max_tokens=5)).text
    settled(engine)  # the silent one as well: the engine does not wait for it
    assert silent.generation.finish_reason == "context"
    assert silent._sink.pieces.qsize() <= 128  # no more than one answer
    assert "".join(silent) == silent.generation.text


def test_errors_surface_in_the_caller(engine, model):
    with pytest.raises(RequestError, match=r"the context holds 128"):
        engine.generate("a" * 200)
    with pytest.raises(RequestError, match=r"prompt 1\)"):
        engine.generate(["a", "b" * 200])
    assert engine.stats()["requests_finished"] == 0
    with pytest.raises(RequestError, match="0 tokens"):
        engine.stream("")
    with pytest.raises(RequestError, match=r"2 prompts and 1 parameters"):
        engine.generate(["a", "b"], [Say()])
    with pytest.raises(RequestError, match="parameters is a dict"):
        engine.generate("a", {"max_tokens": 3})
    with pytest.raises(RequestError, match="put it into a list"):
        engine.batch("abc")
    with pytest.raises(RequestError, match="conversation is a list"):
        engine.chat("abc")
    with pytest.raises(RequestError, match="vocabulary"):
        engine.generate([1, 2, 9999])
    with pytest.raises(RequestError, match="vocabulary"):  # found by the core, in its thread
        _ = engine.stream("abc", Say(logit_bias={9999: 1.0})).generation
    with pytest.raises(RequestError, match="vocabulary"):
        list(engine.stream("abc", Say(logit_bias={9999: 1.0})))
    assert engine.generate("x", Say(max_tokens=3)).text == alone(model, "x", Say(max_tokens=3)).text


def test_a_request_that_fails_leaves_the_others(engine, model, monkeypatch):
    slow_down(engine, monkeypatch)
    answers = [engine.stream("abc", LONG), engine.stream("abc", Say(max_tokens=8))]
    next(answers[0])
    core, step = engine._loop.core, engine._loop.core.step
    failed = answers[0].request_id

    def fails():
        core.cancel(failed)
        outputs = step()
        for output in outputs:
            if output.request_id == failed:
                output.finish_reason, output.error = "error", "generate: the logits are not finite"
        return outputs

    monkeypatch.setattr(core, "step", fails)
    with pytest.raises(UnsupportedError, match="not finite"):
        list(answers[0])
    assert answers[1].generation.text == alone(model, "abc", Say(max_tokens=8)).text


def test_a_core_that_breaks_tells_everybody(model, monkeypatch):
    engine = lowbit.Engine(model)
    slow_down(engine, monkeypatch, 0.05)
    answer = engine.stream("abc", LONG)
    next(answer)

    def broken():
        raise MemoryError("no more")

    monkeypatch.setattr(engine._loop.core, "step", broken)
    with pytest.raises(LowbitError, match="MemoryError: no more"):
        _ = answer.generation
    with pytest.raises(LowbitError, match="make a new one"):
        engine.generate("abc")
    assert engine.stats()["running"] == 1  # as it was left
    engine.close()


def test_close(model, monkeypatch):
    engine = lowbit.Engine(model)
    slow_down(engine, monkeypatch)
    answer = engine.stream("abc", LONG)
    next(answer)
    engine.close()
    engine.close()
    assert answer.generation.finish_reason == "cancelled"
    with pytest.raises(RequestError, match="closed"):
        engine.generate("abc")
    with pytest.raises(RequestError, match="closed"):
        list(engine.stream("abc"))
    assert used(engine.stats()) == 0


def test_a_forgotten_engine_ends_its_thread(model):
    engine = lowbit.Engine(model)
    engine.generate("abc", Say(max_tokens=2))
    thread = engine._finish.peek()[2][1]
    assert thread.is_alive()
    del engine
    gc.collect()
    thread.join(HANG)
    assert not thread.is_alive()
    # One that is only used by an answer lives as long as that.
    assert len("".join(lowbit.Engine(model).stream("abc", LONG))) > 0


def test_a_batch_larger_than_the_engine_holds(model, monkeypatch):
    monkeypatch.setattr(engine_module, "AHEAD", 2)
    config = lowbit.EngineConfig(max_sequences=3, max_queued_tokens=8)
    prompts = [f"{i} {'abc' * (i % 3)}" for i in range(25)]
    with lowbit.Engine(model, config) as engine:
        seen = dict(engine.batch(prompts, Say(max_tokens=4)))
        assert [seen[i].text for i in range(25)] == [alone(model, p, Say(max_tokens=4)).text for p in prompts]
        again = asyncio.run(engine.agenerate(prompts, Say(max_tokens=4)))
        assert [g.text for g in again] == [seen[i].text for i in range(25)]
        for _, _ in engine.batch(prompts, LONG):
            break
        gc.collect()
        assert used(settled(engine)) == 0


def test_idle_engine_waits(engine, monkeypatch):
    engine.generate("abc", Say(max_tokens=2))
    settled(engine)
    steps = []
    monkeypatch.setattr(engine._loop.core, "step", lambda: steps.append(1) or [])
    time.sleep(0.1)
    assert not steps


def test_the_example_of_the_module_runs(tiny_model, capsys):
    lines = engine_module.__doc__.splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    "))
    exec(code.replace("smollm2-135m", str(tiny_model)), {"lowbit": lowbit})
    assert capsys.readouterr().out.strip()


def test_nothing_is_left_of_callers_that_come_and_go(model):
    """Whole answers, streams left early, cancelled ones, at random and from several threads."""
    config = lowbit.EngineConfig(speculation="ngram", max_sequences=8, kv_blocks=12)

    def caller(seed):
        rng = random.Random(seed)
        for i in range(40):
            prompt = "".join(rng.choice("abcde ") for _ in range(rng.randrange(1, 100)))
            parameters = Say(max_tokens=rng.choice([5, None]), temperature=1.0, seed=i, ignore_eos=True)
            answer = engine.stream(prompt, parameters)
            kind = rng.randrange(3)
            if kind == 0:
                assert answer.generation.finish_reason in ("length", "context")
            elif kind == 1:
                next(answer, None)
            else:
                answer.cancel()
                assert answer.generation.finish_reason in ("length", "context", "cancelled")

    with lowbit.Engine(model, config) as engine:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(caller, range(4)))
        gc.collect()
        stats = settled(engine)
        assert used(stats) == 0 and stats["requests_finished"] == 160
        assert not engine._loop._sinks and not engine._loop.core._speculator._histories
