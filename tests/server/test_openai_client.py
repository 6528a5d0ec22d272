"""The `openai` package as a client: what it sends is taken, what we answer it understands."""

import asyncio
import json

import pytest

openai = pytest.importorskip("openai", reason="the openai package is not installed")

MESSAGES = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {"utc": {"type": "boolean"}}, "required": ["utc"]},
    },
}
POINT = {
    "type": "object",
    "properties": {"x": {"enum": [1, 2]}, "y": {"type": "boolean"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lowbit"
    with pytest.raises(openai.NotFoundError, match="choose one of tiny"):
        client.models.retrieve("gpt")


def test_completions(client):
    answer = client.completions.create(
        model="tiny", prompt=["A", "B"], n=2, max_tokens=5, logprobs=2, seed=3, temperature=0.7
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 2 and answer.usage.completion_tokens <= 20
    assert all(len(top) >= 2 for choice in answer.choices for top in choice.logprobs.top_logprobs)
    again = client.completions.create(model="tiny", prompt="B", max_tokens=5, seed=3, temperature=0.7)
    assert again.choices[0].text != "" and again.system_fingerprint == answer.system_fingerprint


def test_chat_with_everything(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": "Be brief."}, *MESSAGES],
        n=2,
        max_completion_tokens=6,
        logprobs=True,
        top_logprobs=3,
        logit_bias={"65": 5},
        presence_penalty=0.5,
        frequency_penalty=0.5,
        seed=1,
        temperature=0.5,
        top_p=0.9,
        user="me",
        metadata={"a": "b"},
        store=False,
        extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2},
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert 2 <= len(tokens) <= 6
        assert all(len(token.top_logprobs) == 3 for token in tokens)
        assert (
            b"".join(bytes(token.bytes) for token in tokens)
            .decode(errors="replace")
            .startswith(choice.message.content[:1])
        )
    assert answer.timings["generated_tokens"] > 0


def test_stream_sync_and_async(client, server):
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "seed": 4}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    with client.chat.completions.create(**fields, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole

    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            options = {"include_usage": True}
            texts = ["", ""]
            usage = None
            stream = await client.chat.completions.create(**fields, n=2, stream=True, stream_options=options)
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
            return texts, usage

    texts, usage = asyncio.run(talk())
    assert texts[0] == whole and texts[1] != ""
    assert usage.completion_tokens <= 24


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_tool_calls(client, choice, streaming):
    fields = {
        "model": "tiny",
        "messages": MESSAGES,
        "tools": [WEATHER, TIME],
        "tool_choice": choice,
        "temperature": 1.5,
        "seed": 2,
    }
    if streaming:
        with client.chat.completions.stream(**fields) as stream:
            answer = stream.get_final_completion()
    else:
        answer = client.chat.completions.create(**fields)
    [call] = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert not answer.choices[0].message.content
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments in ({"city": "Paris"}, {"city": "Rome"})
    else:
        assert choice == "required" and isinstance(arguments["utc"], bool)
    # The whole exchange can be sent back.
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    more = [*MESSAGES, answer.choices[0].message, result]
    again = client.chat.completions.create(model="tiny", messages=more, tools=[WEATHER, TIME], max_tokens=3)
    assert again.usage.prompt_tokens > 100


@pytest.mark.parametrize("streaming", [False, True])
def test_calls_that_the_model_decides_on(client, streaming):
    """The small model is made to say what a large one would."""
    call = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    said = f"Let me see.<tool_call>{call}</tool_call><tool_call>{call}</tool_call>"
    fields = {"model": "tiny", "messages": MESSAGES, "tools": [WEATHER], "extra_body": {"choices": [said]}}
    if streaming:
        with client.chat.completions.stream(**fields) as stream:
            answer = stream.get_final_completion()
    else:
        answer = client.chat.completions.create(**fields)
    message = answer.choices[0].message
    assert message.content == "Let me see." and answer.choices[0].finish_reason == "tool_calls"
    assert [call.function.name for call in message.tool_calls] == ["weather", "weather"]
    assert json.loads(message.tool_calls[1].function.arguments) == {"city": "Rome"}
    alone = client.chat.completions.create(**fields, parallel_tool_calls=False).choices[0]
    assert len(alone.message.tool_calls) == 1 and alone.finish_reason == "tool_calls"
    none = client.chat.completions.create(**fields, tool_choice="none").choices[0]
    assert none.message.content == said and none.finish_reason == "stop"


def test_json_schema_and_object(client):
    form = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form, seed=1)
    point = json.loads(answer.choices[0].message.content)
    assert point["x"] in (1, 2) and isinstance(point["y"], bool) and len(point) == 2
    assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        form["json_schema"]["schema"] = {"type": "nonsense"}
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form)


def test_own_constraints(client):
    def answer(**constraint):
        chat = client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=constraint, seed=6)
        return chat.choices[0].message.content

    assert answer(choices=["left", "right"]) in ("left", "right")
    assert answer(regex="[0-9]{3}-[a-f]{2}")[3] == "-"
    assert answer(grammar='start: "yes" | "no"') in ("yes", "no")
    with pytest.raises(openai.BadRequestError, match="one constraint at a time"):
        answer(regex="a", choices=["a"])


def test_responses(client):
    answer = client.responses.create(
        model="tiny", input="Hi", instructions="Be brief.", max_output_tokens=8, temperature=0
    )
    assert answer.status in ("completed", "incomplete")
    assert answer.output_text and answer.output[0].type == "message"
    assert answer.usage.output_tokens == 8 and answer.usage.input_tokens > 2
    back = [{"role": "user", "content": "Hi"}, *answer.output, {"role": "user", "content": "More"}]
    more = client.responses.create(model="tiny", input=back, max_output_tokens=8, temperature=0)
    assert more.usage.input_tokens > answer.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        client.responses.create(model="tiny", input="Hi", previous_response_id="resp_1")


def test_responses_stream(client):
    fields = {"model": "tiny", "input": "Hi", "max_output_tokens": 8, "temperature": 0}
    whole = client.responses.create(**fields)
    events = list(client.responses.create(**fields, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == f"response.{whole.status}" and whole.status == "incomplete"
    with client.responses.stream(**fields, extra_body={"choices": ["left"]}) as stream:
        assert stream.get_final_response().output_text == "left"


@pytest.mark.parametrize("streaming", [False, True])
def test_responses_tools_and_schema(client, streaming):
    tool = {"type": "function", **WEATHER["function"]}
    fields = {"model": "tiny", "input": "Hi", "tools": [tool], "tool_choice": "required"}
    if streaming:
        with client.responses.stream(**fields) as stream:
            answer = stream.get_final_response()
    else:
        answer = client.responses.create(**fields)
    [call] = [item for item in answer.output if item.type == "function_call"]
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    back = [{"role": "user", "content": "Hi"}, *answer.output, result]
    more = client.responses.create(model="tiny", input=back, tools=[tool], max_output_tokens=3)
    assert more.usage.input_tokens > answer.usage.input_tokens
    form = {"format": {"type": "json_schema", "name": "point", "schema": POINT}}
    assert set(json.loads(client.responses.create(model="tiny", input="Hi", text=form).output_text)) == {
        "x",
        "y",
    }


def test_errors_are_the_package_s(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=7)
    assert caught.value.param == "temperature" and "temperature=7" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt", prompt="x")
    assert caught.value.code == "model_not_found"
