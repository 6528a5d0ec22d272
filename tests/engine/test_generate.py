"""Generation over a scripted decoder: what is fed, what is said, when it ends."""

import pytest

from lowbit.engine import Conversation, SamplingParameters, sequence
from lowbit.errors import RequestError, UnsupportedError


def test_text_tokens_and_counts(scripted):
    model = scripted("Hello")
    g = model.generate("Say hi")
    assert g.text == "Hello" and g.token_ids == list(b"Hello")
    assert (g.prompt_tokens, g.generated_tokens, g.finish_reason) == (6, 5, "eos")
    assert g.logprobs is None and g.seconds >= g.prompt_seconds >= 0
    # The prompt once, then token by token; end-of-text is never fed.
    assert model.decoder.fed == [list(b"Say hi"), *[[c] for c in b"Hello"]]
    assert model.decoder.sampler.observed[:6] == list(b"Say hi")


def test_max_tokens(scripted):
    g = scripted("Hello").generate("x", max_tokens=3)
    assert (g.text, g.finish_reason, g.generated_tokens) == ("Hel", "length", 3)


def test_logprobs(scripted):
    g = scripted("Hi").generate("x", logprobs=2)
    assert [t.token_id for t in g.logprobs] == list(b"Hi")
    assert g.logprobs[0].logprob == -0.5 and g.logprobs[0].top == ((1, -0.5), (2, -1.5))


def test_stop_string_across_tokens(scripted):
    stream = scripted("one. two. three").stream("x", stop=". t")
    pieces = list(stream)
    assert "".join(pieces) == "one" == stream.generation.text
    assert stream.generation.finish_reason == "stop"
    assert stream.generation.generated_tokens == len("one. t")


def test_streamed_text_is_whole_characters(scripted):
    stream = scripted("añb漢🙂").stream("x")
    pieces = list(stream)
    assert pieces == ["a", "ñ", "b", "漢", "🙂"]
    assert "".join(pieces) == stream.generation.text


def test_unfinished_character_at_the_end(scripted):
    g = scripted("é".encode()[:1]).generate("x")
    assert g.text == "\ufffd" and g.finish_reason == "eos"


def test_context_is_filled_exactly(scripted):
    g = scripted("abcdefghij", context=8).generate("12345")
    assert (g.text, g.finish_reason) == ("abc", "context")
    assert g.prompt_tokens + g.generated_tokens == 8


def test_prompt_beyond_context(scripted):
    model = scripted("abc", context=8)
    assert model.generate("1234567").text == "a"
    with pytest.raises(RequestError, match=r"8 tokens and the context holds 8.*7 tokens.*--context"):
        model.generate("12345678")


def test_empty_prompt_and_foreign_token(scripted):
    with pytest.raises(RequestError, match="0 tokens"):
        scripted("a").generate("")
    with pytest.raises(RequestError, match="257"):
        scripted("a").generate([1, 257])


def test_long_prompts_go_in_chunks(scripted, monkeypatch):
    monkeypatch.setattr(sequence, "PREFILL_CHUNK", 4)
    model = scripted("a")
    model.generate("0123456789")
    assert model.decoder.fed[:3] == [list(b"0123"), list(b"4567"), list(b"89")]


def test_generate_ids_without_tokenizer(scripted):
    model = scripted("ab")
    model.tokenizer = None
    assert model.generate_ids([1, 2]) == [*b"ab"]
    forced = SamplingParameters(max_tokens=4, ignore_eos=True)
    assert model.generate_ids([1, 2], forced) == [*b"ab", 256, 256]
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        model.generate("text")
    with pytest.raises(UnsupportedError, match="stop strings"):
        model.generate_ids([1], SamplingParameters(stop="x"))


def test_interrupted_stream_has_a_clear_error(scripted):
    model = scripted("abc")
    stream = model.stream("x")
    next(stream)
    model.decoder.answer = None
    with pytest.raises(TypeError):
        next(stream)
    with pytest.raises(RequestError, match="ended by an error"):
        _ = stream.generation


def test_chat_needs_a_template_and_messages(scripted):
    model = scripted("ok")
    assert model.chat([{"role": "user", "content": "hi"}]).text == "ok"
    assert model.decoder.fed[0] == list(b"<u>hi<a>")
    with pytest.raises(RequestError, match="content"):
        model.chat([{"role": "user"}])
    model.tokenizer.chat_template = None
    with pytest.raises(UnsupportedError, match="base model"):
        model.chat([{"role": "user", "content": "hi"}])


def test_conversation_computes_only_what_is_new(scripted):
    model = scripted("yes")
    talk = Conversation(model, system="S")
    say = SamplingParameters(max_tokens=10)
    assert "".join(talk.send("one", say)) == "yes"
    model.decoder.fed.clear()
    assert "".join(talk.send("two", say)) == "yes"
    # <s>S<u>one<a>yes is known; only the new turn is computed.
    assert model.decoder.fed[0] == list(b"<u>two<a>")
    assert talk.last.reused_tokens == len("<s>S<u>one<a>yes")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    talk.reset()
    assert [m["role"] for m in talk.messages] == ["system"]
    model.decoder.fed.clear()
    "".join(talk.send("one", say))
    assert talk.last.reused_tokens == len("<s>S<u>one<a>") - 1


def test_conversation_beyond_context_keeps_its_state(scripted):
    talk = Conversation(scripted("yes", context=20))
    say = SamplingParameters(max_tokens=4)
    "".join(talk.send("hi", say))
    before = list(talk.messages)
    with pytest.raises(RequestError, match="context"):
        "".join(talk.send("much too long for this", say))
    assert talk.messages == before


def test_logits_that_are_not_finite_are_a_clear_error(scripted):
    model = scripted("abc")

    def overflow(*arguments):
        raise RuntimeError("Decoder.sample: logits are not finite")

    model.decoder.sample = overflow
    with pytest.raises(UnsupportedError, match=r"not finite.*int16"):
        model.generate("x")
