"""DIALECTS: /v1/responses and /v1/messages of a real daemon with a real model, driven by the official clients."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pydantic
import pytest
from openai.types.responses import FunctionToolParam, ResponseInputParam

import conftest
from anthropic_shapes import check_message_answer, check_message_events
from conftest import Daemon, StartDaemon
from openai_shapes import check_answer

NAME = "smollm2-135m-instruct"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon with SmolLM2 for all tests that leave it as it was."""
    started = conftest.daemon.__wrapped__(tmp_path_factory)  # type: ignore[attr-defined]  # ours outlives a function
    start: StartDaemon = next(started)
    yield start([smollm2], settings={"load": {"threads": 2, "ctx_size": 2048}})
    next(started, None)


# -- /v1/responses --


@pytest.fixture
def client(served: Daemon) -> Iterator[openai.OpenAI]:
    """OpenAI's official client."""
    with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="one", max_retries=0) as one:
        yield one


WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather at a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 20}},
        "required": ["place"],
        "additionalProperties": False,
    },
    "strict": True,
}


def test_a_response(client: openai.OpenAI) -> None:
    """It says something, counts its tokens, and echoes what it was asked."""
    raw = client.responses.with_raw_response.create(
        model=NAME,
        instructions="You are a helpful assistant.",
        input="What is the capital of France?",
        temperature=0,
        max_output_tokens=24,
        metadata={"topic": "towns"},
    )
    check_answer("Response", raw.content)
    response = raw.parse()
    assert "Paris" in response.output_text
    assert (response.model, response.instructions, response.metadata) == (
        *(NAME, "You are a helpful assistant.", {"topic": "towns"}),
    )
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.output_tokens <= 24
    assert response.status in ("completed", "incomplete")


def test_a_response_that_is_cut_short(client: openai.OpenAI) -> None:
    """It is incomplete and says why; a stream ends with the event of that name."""
    response = client.responses.create(model=NAME, input="Count to a hundred.", temperature=0, max_output_tokens=4)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    stream = client.responses.create(
        model=NAME, input="Count to a hundred.", temperature=0, max_output_tokens=4, stream=True
    )
    last = list(stream)[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == response.output_text


async def test_every_event_is_openais(served: Daemon) -> None:
    """Each has a name and OpenAI's shape; no `[DONE]` follows the last one."""
    body = {"model": NAME, "input": "Say hello.", "max_output_tokens": 8, "stream": True}
    body |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "tools": [WEATHER]}
    async with aiohttp.ClientSession(served.base_url) as session, session.post(RESPONSES, json=body) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        stream = await answer.read()
    *blocks, rest = stream.split(b"\n\n")
    assert rest == b""
    events = []
    for block in blocks:
        if block.startswith(b":"):
            continue  # the model was still being loaded
        name, data = block.split(b"\n")
        events.append(json.loads(data.removeprefix(b"data: ")))
        assert name == b"event: " + events[-1]["type"].encode()
        check_answer("ResponseStreamEvent", events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] in ("response.completed", "response.incomplete")


def test_the_streaming_helper(client: openai.OpenAI) -> None:
    """What it puts together from the events is what a whole answer says."""
    asked = "Write one sentence about rain."
    with client.responses.stream(model=NAME, input=asked, temperature=0, max_output_tokens=64) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    whole = client.responses.create(model=NAME, input=asked, temperature=0, max_output_tokens=64)
    assert final.status == whole.status == "completed"
    assert text == final.output_text == whole.output_text
    assert client.responses.retrieve(final.id).output_text == text


class Person(pydantic.BaseModel):
    """What a test wants to know of somebody."""

    age: int
    is_tall: bool


def test_parse(client: openai.OpenAI) -> None:
    """A pydantic model as the text's format gives an instance of it."""
    response = client.responses.parse(
        model=NAME, input="Anna is 30 years old and tall. Describe her as JSON.", text_format=Person, temperature=0
    )
    assert response.status == "completed"
    assert isinstance(response.output_parsed, Person)


def test_a_conversation(client: openai.OpenAI) -> None:
    """`previous_response_id` goes on with all that was said, but not with the instructions."""
    first = client.responses.create(
        model=NAME, instructions="Be brief.", input="My name is Ada.", temperature=0, max_output_tokens=16
    )
    second = client.responses.create(
        model=NAME, previous_response_id=first.id, input="What is my name?", temperature=0, max_output_tokens=16
    )
    assert second.previous_response_id == first.id
    assert second.instructions is None
    third = client.responses.create(
        model=NAME, previous_response_id=second.id, input="Thanks", temperature=0, max_output_tokens=4
    )
    items = client.responses.input_items.list(third.id, order="asc", limit=100).data
    said = [part["text"] for item in items for part in item.to_dict()["content"]]  # type: ignore[attr-defined]
    assert said == ["My name is Ada.", first.output_text, "What is my name?", second.output_text, "Thanks"]
    # The same conversation, sent whole, is the same prompt.
    whole = client.responses.create(
        model=NAME,
        input=[
            {"role": "user", "content": "My name is Ada."},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "What is my name?"},
        ],
        temperature=0,
        max_output_tokens=16,
    )
    assert whole.output_text == second.output_text
    assert whole.usage is not None
    assert second.usage is not None
    assert whole.usage.input_tokens == second.usage.input_tokens


def test_pages_of_input_items(client: openai.OpenAI) -> None:
    """The client walks through the pages; wrong wishes are a 400."""
    words = ["one", "two", "three"]
    given: ResponseInputParam = [{"role": "user", "content": word} for word in words]
    response = client.responses.create(model=NAME, input=given, max_output_tokens=1)
    items = [item.to_dict() for item in client.responses.input_items.list(response.id, limit=2)]
    assert [item["content"] for item in items] == [[{"type": "input_text", "text": word}] for word in reversed(words)]
    for query in ({"limit": "0"}, {"limit": "x"}, {"order": "up"}, {"after": "msg_0"}):
        with pytest.raises(openai.BadRequestError):
            client.responses.input_items.list(response.id, extra_query=query)


@pytest.mark.parametrize("streamed", [True, False])
def test_tools_round_trip(client: openai.OpenAI, *, streamed: bool) -> None:
    """A forced call has arguments that its schema allows; its output may be answered with its id alone."""
    asked: ResponseInputParam = [{"role": "user", "content": "What is the weather in Paris?"}]
    with client.responses.stream(
        model=NAME, input=asked, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, temperature=0
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        first = stream.get_final_response()
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert call.name == "get_weather"
    assert list(json.loads(call.arguments)) == ["place"]
    assert "".join(pieces) == call.arguments
    output: ResponseInputParam = [{"type": "function_call_output", "call_id": call.call_id, "output": "Rain, 12 °C"}]
    if streamed:
        answer = client.responses.create(
            model=NAME, previous_response_id=first.id, input=output, tools=[WEATHER], max_output_tokens=16
        )
    else:
        replayed: ResponseInputParam = [*asked, *[item.to_dict() for item in first.output], *output]  # type: ignore[list-item]
        answer = client.responses.create(model=NAME, input=replayed, tools=[WEATHER], max_output_tokens=16, store=False)
    assert answer.status in ("completed", "incomplete")
    assert answer.output


def test_a_response_is_its_keys(daemon: StartDaemon, tiny_llama: Path) -> None:
    """Another API key can neither read it nor continue it nor delete it."""
    running = daemon([tiny_llama], settings={"api_keys": ["ada:key-of-ada", "bob:key-of-bob"]})
    ada, bob = (
        openai.OpenAI(base_url=f"{running.base_url}/v1", api_key=f"key-of-{name}", max_retries=0)
        for name in ("ada", "bob")
    )
    with ada, bob:
        response = ada.responses.create(model="tiny-llama", input="Hi", max_output_tokens=2)
        with pytest.raises(openai.NotFoundError):
            bob.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            bob.responses.create(model="tiny-llama", input="Hi", previous_response_id=response.id)
        with pytest.raises(openai.NotFoundError):
            bob.responses.delete(response.id)
        assert ada.responses.retrieve(response.id).id == response.id


def test_input_tokens(client: openai.OpenAI) -> None:
    """The count before is the usage after."""
    counted = client.responses.input_tokens.count(model=NAME, instructions="Be brief.", input="Hi")
    response = client.responses.create(model=NAME, instructions="Be brief.", input="Hi", max_output_tokens=1)
    assert response.usage is not None
    assert counted.input_tokens == response.usage.input_tokens


def test_retrieval_and_deletion(client: openai.OpenAI) -> None:
    """A response can be read until it is deleted; `store: false` keeps nothing."""
    response = client.responses.create(model=NAME, input="Hi", max_output_tokens=2)
    raw = client.responses.with_raw_response.retrieve(response.id)
    check_answer("Response", raw.content)
    assert raw.parse().to_dict() == response.to_dict()
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.responses.cancel(response.id)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.retrieve(response.id, stream=True)
    client.responses.delete(response.id)
    unkept = client.responses.create(model=NAME, input="Hi", max_output_tokens=2, store=False)
    for response_id in (response.id, unkept.id, "resp_0"):
        with pytest.raises(openai.NotFoundError, match="not kept"):
            client.responses.retrieve(response_id)
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(model=NAME, input="Hi", previous_response_id=response_id)
        assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_wrong_requests(client: openai.OpenAI) -> None:
    """Before a stream has begun an error is a plain one, and names the field."""
    with pytest.raises(openai.NotFoundError) as unknown:
        client.responses.create(model="no-such-model", input="Hi", stream=True)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as background:
        client.responses.create(model=NAME, input="Hi", background=True)
    assert background.value.param == "background"
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model=NAME, input="word " * 4000, stream=True)
    assert long.value.code == "context_length_exceeded"


async def test_a_stream_that_fails(daemon: StartDaemon, smollm2: Path) -> None:
    """Its last event says that it failed, and why; the response is not kept."""
    endless = "name: endless\nshas: ['*']\nignore_eos: true\nthreads: 1\nctx_size: 8192\n"
    running = daemon([smollm2], {"endless.yaml": endless})
    async with openai.AsyncOpenAI(base_url=f"{running.base_url}/v1", api_key="none", max_retries=0) as asking:
        stream = await asking.responses.create(model="endless", input="Hi", stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        async with aiohttp.ClientSession(running.base_url) as session, session.get("/localaid/status") as answer:
            (worker,) = (await answer.json())["memory"]["workers"]
        os.kill(worker["pid"], signal.SIGKILL)
        events = [event async for event in stream]
        last = events[-1]
        assert last.type == "response.failed"
        check_answer("ResponseStreamEvent", last.to_dict())
        assert last.response.error is not None
        assert last.response.error.code == "server_error"
        assert "SIGKILL" in last.response.error.message
        with pytest.raises(openai.NotFoundError):
            await asking.responses.retrieve(last.response.id)


# -- /v1/messages --


@pytest.fixture
def claude(served: Daemon) -> Iterator[anthropic.Anthropic]:
    """Anthropic's official client."""
    with anthropic.Anthropic(base_url=served.base_url, api_key="one", max_retries=0) as one:
        yield one


PLACES: anthropic.types.ToolParam = {
    "name": "get_weather",
    "description": "The weather at a place.",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 20}},
        "required": ["place"],
        "additionalProperties": False,
    },
}


GREEDY: Any = {"extra_body": {"temperature": 0}}  # the newest client has no word for it


SYSTEM: anthropic.types.TextBlockParam = {"type": "text", "text": "You are a helpful assistant."}


def from_user(content: str) -> list[anthropic.types.MessageParam]:
    """Return a chat of one turn."""
    return [{"role": "user", "content": content}]


def text_of(message: anthropic.types.Message) -> str:
    """Return all that a message says."""
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message(claude: anthropic.Anthropic) -> None:
    """It says something and counts its tokens; asked again it takes the prompt's from the cache."""
    fields: Any = {"model": NAME, "max_tokens": 24, "system": [SYSTEM], **GREEDY}
    asked = from_user("What is the capital of France?")
    raw = claude.messages.with_raw_response.create(messages=asked, **fields)
    check_message_answer("Message", raw.http_response.content)
    message = raw.parse()
    assert "Paris" in text_of(message)
    assert (message.model, message.role, message.stop_reason) == (NAME, "assistant", "end_turn")
    assert 0 < message.usage.output_tokens <= 24
    assert raw.headers["request-id"].startswith("req-")
    again = claude.messages.create(messages=asked, **fields)
    assert again.usage.cache_read_input_tokens > 0
    first, second = message.usage, again.usage
    assert first.input_tokens + first.cache_read_input_tokens == second.input_tokens + second.cache_read_input_tokens


def test_the_message_helper(claude: anthropic.Anthropic) -> None:
    """What it puts together from the events is what a whole answer says."""
    fields: Any = {"model": NAME, "max_tokens": 64, "messages": from_user("Write one sentence about rain."), **GREEDY}
    with claude.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    whole = claude.messages.create(**fields)
    assert text == text_of(final) == text_of(whole)
    assert final.stop_reason == whole.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens


async def test_every_event_is_anthropics(served: Daemon) -> None:
    """Each has a name and Anthropic's shape; nothing follows `message_stop`."""
    body = {"model": NAME, "messages": from_user("Say hello."), "max_tokens": 8, "stream": True}
    async with aiohttp.ClientSession(served.base_url) as session, session.post(MESSAGES, json=body) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        events = check_message_events(await answer.read())
    kinds = [event["type"] for event in events]
    assert kinds[:4] == ["message_start", "content_block_start", "ping", "content_block_delta"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["stop_reason"] is None
    assert events[-2]["delta"]["stop_reason"] in ("end_turn", "max_tokens")


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}]
)
def test_message_tools_round_trip(claude: anthropic.Anthropic, choice: anthropic.types.ToolChoiceParam) -> None:
    """A forced call has an input that its schema allows, streamed too; its result may be told with more text."""
    messages = from_user("What is the weather in Paris?")
    fields: Any = {"model": NAME, "max_tokens": 256, "tools": [PLACES], "tool_choice": choice, **GREEDY}
    with claude.messages.stream(messages=messages, **fields) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    call = first.content[0]
    assert call.type == "tool_use"
    assert (call.name, list(call.input)) == ("get_weather", ["place"])
    assert json.loads("".join(pieces)) == call.input
    (again,) = claude.messages.create(messages=messages, **fields).content
    assert (again.name, again.input) == ("get_weather", call.input)
    result: anthropic.types.ToolResultBlockParam = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": "Rain, 12 degrees"}],
    }
    messages += [
        {"role": "assistant", "content": [block.to_dict() for block in first.content]},  # type: ignore[list-item,misc]
        {"role": "user", "content": [result, {"type": "text", "text": "Answer in one word."}]},
    ]
    answer = claude.messages.create(model=NAME, max_tokens=16, messages=messages, tools=[PLACES], **GREEDY)
    assert answer.stop_reason in ("end_turn", "max_tokens", "tool_use")
    assert answer.content


def test_stop_sequences(daemon: StartDaemon, smollm2: Path) -> None:
    """Which of the request's was written is told, streamed too; a rule's own word is the end of the turn."""
    running = daemon([smollm2], {"x.yaml": "name: three\nshas: ['*']\nstop: ['3']\n"})
    asked = from_user("Count from 1 to 9.")
    with anthropic.Anthropic(base_url=running.base_url, api_key="none", max_retries=0) as client:
        for model, stop, expected in (
            (NAME, ["7", "4"], ("stop_sequence", "4")),
            ("three", ["4"], ("end_turn", None)),
            ("three", ["3"], ("stop_sequence", "3")),
        ):
            fields: Any = {"model": model, "max_tokens": 64, "messages": asked, "stop_sequences": stop, **GREEDY}
            whole = client.messages.create(**fields)
            with client.messages.stream(**fields) as stream:
                streamed = stream.get_final_message()
            assert (whole.stop_reason, whole.stop_sequence) == expected
            assert (streamed.stop_reason, streamed.stop_sequence) == expected
            assert text_of(streamed) == text_of(whole)
            assert not any(word in text_of(whole) for word in stop)


@pytest.mark.parametrize("tools", [[], [PLACES]])
def test_count_tokens(claude: anthropic.Anthropic, tools: list[anthropic.types.ToolParam]) -> None:
    """A prompt is counted as the same request's usage counts it."""
    fields: Any = {"model": NAME, "system": [SYSTEM], "messages": from_user("Why does it rain?"), "tools": tools}
    raw = claude.messages.with_raw_response.count_tokens(**fields)
    counted = check_message_answer("MessageTokensCount", raw.http_response.content)
    usage = claude.messages.create(max_tokens=1, **fields).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    warmed = claude.messages.create(max_tokens=0, **fields)
    assert (warmed.content, warmed.stop_reason, warmed.usage.output_tokens) == ([], "max_tokens", 0)


class Town(pydantic.BaseModel):
    """What a test wants to know of a town."""

    inhabitants: int
    is_capital: bool


def test_parsed_messages(claude: anthropic.Anthropic) -> None:
    """A pydantic model as the output's format gives an instance of it."""
    message = claude.messages.parse(
        model=NAME, max_tokens=128, messages=from_user("Describe Paris as JSON."), output_format=Town, **GREEDY
    )
    assert message.stop_reason == "end_turn"
    assert isinstance(message.parsed_output, Town)


def test_prefilled_messages(claude: anthropic.Anthropic) -> None:
    """An answer that the client has begun is gone on with."""
    messages = from_user("What is the capital of France?")
    messages.append({"role": "assistant", "content": "The capital of France is the city of"})
    message = claude.messages.create(model=NAME, max_tokens=8, messages=messages, **GREEDY)
    assert text_of(message).lstrip().startswith("Paris")


def test_wrong_messages(claude: anthropic.Anthropic) -> None:
    """The client raises what it has for each status, with Anthropic's type and a message that names the field."""
    asked = from_user("Hi")
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(model="no-such-model", max_tokens=1, messages=asked)
    assert unknown.value.type == "not_found_error"
    check_message_answer("ErrorResponse", unknown.value.response.content)
    assert unknown.value.body["request_id"] == unknown.value.request_id  # type: ignore[index]
    image: Any = [{"type": "image", "source": {"type": "url", "url": "http://example.org/x.png"}}]
    with pytest.raises(anthropic.BadRequestError, match=r"`messages\.0\.content\.0\.type` is `image`") as picture:
        claude.messages.create(model=NAME, max_tokens=1, messages=[{"role": "user", "content": image}])
    assert picture.value.type == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match="`max_tokens` must be an integer"):
        claude.messages.create(model=NAME, max_tokens=1, messages=asked, extra_body={"max_tokens": "x"})
    with pytest.raises(anthropic.BadRequestError, match=r"tools\.0\.type"):
        claude.messages.create(
            model=NAME, max_tokens=1, messages=asked, tools=[{"type": "web_search_20250305", "name": "web_search"}]
        )
    for is_streamed in (True, False):
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 2048 maximum"):
            claude.messages.create(model=NAME, max_tokens=1, messages=from_user("word " * 4000), stream=is_streamed)
    for path in ("/v1/messages/nowhere", "/messages"):
        with pytest.raises(anthropic.APIStatusError) as lost:
            claude.get(path, cast_to=object)
        check_message_answer("ErrorResponse", lost.value.response.content)


def test_keys_of_messages(daemon: StartDaemon, tiny_llama: Path) -> None:
    """A key is shown as Anthropic's client shows it; without a right one there is Anthropic's own error."""
    running = daemon([tiny_llama], settings={"api_keys": ["me:" + "k" * 32]})
    fields: Any = {"model": "tiny-llama", "max_tokens": 1, "messages": from_user("x")}
    with anthropic.Anthropic(base_url=running.base_url, api_key="k" * 32, max_retries=0) as client:
        assert client.messages.create(**fields).usage.output_tokens == 1
    with (
        anthropic.Anthropic(base_url=running.base_url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError) as refused,
    ):
        stranger.messages.create(**fields)
    assert refused.value.type == "authentication_error"


def test_models_for_anthropics_client(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    """Its list has its own shape; OpenAI's client goes on to get OpenAI's."""
    listed = list(claude.models.list())
    assert NAME in [model.id for model in listed]
    assert NAME in [model.id for model in client.models.list()]
    raw = claude.models.with_raw_response.retrieve(NAME)
    one = check_message_answer("ModelInfo", raw.http_response.content)
    assert (one.id, one.display_name) == (NAME, NAME)
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.models.retrieve("nobody")
    assert unknown.value.type == "not_found_error"


async def test_a_stream_that_waits(daemon: StartDaemon, smollm2: Path) -> None:
    """It is kept alive with comments until its turn comes; then it is as every other."""
    endless = "name: endless\nshas: ['*']\nignore_eos: true\n"
    running = daemon([smollm2], {"endless.yaml": endless}, settings={"load": {"parallel": 1, "ctx_size": 8192}})
    asked = {"messages": from_user("Hi"), "stream": True}
    async with aiohttp.ClientSession(running.base_url) as session:
        busy = await session.post(MESSAGES, json={**asked, "model": "endless", "max_tokens": 100_000})
        await busy.content.readline()  # it is being answered
        async with session.post(MESSAGES, json={**asked, "model": NAME, "max_tokens": 4}) as answer:
            assert answer.status == 200
            assert (await answer.content.readline()).startswith(b":")
            busy.close()
            events = check_message_events((await answer.read()).removeprefix(b"\n"))
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "message_stop"


async def test_a_message_that_fails(daemon: StartDaemon, smollm2: Path) -> None:
    """Its last event is an error, which the client raises."""
    endless = "name: endless\nshas: ['*']\nignore_eos: true\nthreads: 1\nctx_size: 8192\n"
    running = daemon([smollm2], {"endless.yaml": endless})
    async with anthropic.AsyncAnthropic(base_url=running.base_url, api_key="none", max_retries=0) as asking:
        fields: Any = {"model": "endless", "max_tokens": 100_000, "messages": from_user("Hi")}
        stream = await asking.messages.create(**fields, stream=True)
        async for event in stream:
            if event.type == "content_block_delta":
                break
        async with aiohttp.ClientSession(running.base_url) as session, session.get("/localaid/status") as answer:
            (worker,) = (await answer.json())["memory"]["workers"]
        os.kill(worker["pid"], signal.SIGKILL)
        with pytest.raises(anthropic.APIStatusError, match="SIGKILL") as failed:
            [event async for event in stream]
        assert failed.value.type == "api_error"
