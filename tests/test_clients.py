"""Real clients against a real daemon with real models: whoever speaks to OpenAI or Anthropic speaks to localaid."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import aiohttp
import anthropic
import openai
import pytest
from pydantic import BaseModel, Field

from client_environments import find_node_modules, find_python, run_client
from conftest import PROGRAM, Daemon
from models import place_model
from openai_shapes import check_answer
from processes import LocalaidProcess

SCRIPTS = Path(__file__).parent / "clients"
NEWEST = ("instructor", "langchain-openai", "pydantic-ai-slim[openai]")
OLDER = ("openai<3", "litellm", "llm", "mcp")  # these two want openai 2

CHAT = """
name: chat
shas: [SmolLM2-135M-Instruct.Q4_1.gguf]
model_names: [gpt-4o-mini, "claude-*"]
ctx_size: 4096
"""
VECTORS = """
name: vectors
shas: [MiniLM.gguf]
paths: [v1/embeddings]
model_names: [text-embedding-3-small, gpt-4o-mini]
"""
TOOL_SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Bern", "Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 30},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, minilm: Path) -> Iterator[Daemon]:
    """Return one daemon for all tests here: SmolLM2 chats and MiniLM embeds, one name leads to both."""
    top = tmp_path_factory.mktemp("clients")
    for part in ("configs", "state"):
        (top / part).mkdir()
    place_model(smollm2, top / "models")
    place_model(minilm, top / "models", "MiniLM.gguf")
    (top / "configs" / "chat.yaml").write_text(CHAT)
    (top / "configs" / "vectors.yaml").write_text(VECTORS)
    (top / "localaid.yaml").write_text("{}\n")
    arguments = ["serve", "--listen", "127.0.0.1:0", "--settings", str(top / "localaid.yaml")]
    for part in ("models", "configs", "state"):
        arguments += [f"--{part}", str(top / part)]
    process = LocalaidProcess(PROGRAM, arguments)
    try:
        process.wait_ready()
        yield Daemon(process, top / "models", top / "configs", top / "state", top / "localaid.yaml")
    finally:
        process.stop()


@pytest.fixture
def client(served: Daemon) -> Iterator[openai.OpenAI]:
    """Return the official client; it does not try again, so every failure is seen."""
    with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as made:
        yield made


# -- openai for Python --


def test_openai_chat_and_stream(client: openai.OpenAI) -> None:
    """A stream has the text, the finish reason and the usage of the same chat in one piece."""
    ask: Any = {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": "Name a colour."}],
        "temperature": 0,
        "max_tokens": 200,
        "stop": ["."],  # the helper takes an answer that was cut off for an error
    }
    raw = client.chat.completions.with_raw_response.create(**ask)
    check_answer("ChatCompletion", raw.content)
    whole = raw.parse()
    with client.chat.completions.stream(**ask, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens
    assert {"chunk", "content.delta", "content.done"} <= kinds


class Trip(BaseModel):
    """A journey."""

    city: Literal["Bern", "Rome", "Oslo"]
    days: int = Field(ge=1, le=30)  # a small model finds no end of a number


def test_openai_parse(client: openai.OpenAI) -> None:
    """`.parse()` gives the pydantic object of a strict schema."""
    answer = client.chat.completions.parse(
        model="gpt-4o-mini",
        messages=[{"role": "user", "content": "Three days in Rome."}],
        response_format=Trip,
        max_tokens=60,
        temperature=0,
    )
    assert isinstance(answer.choices[0].message.parsed, Trip)


def test_openai_tools_round_trip(client: openai.OpenAI) -> None:
    """A forced call has valid arguments, in one piece and streamed, and its result can be handed back."""
    messages: list[Any] = [{"role": "user", "content": "I want to go to Oslo for 3 days."}]
    ask: Any = {
        "model": "gpt-4o-mini",
        "tools": [{"type": "function", "function": {"name": "book", "parameters": TOOL_SCHEMA}}],
        "temperature": 0,
        "max_tokens": 80,
    }
    first = client.chat.completions.create(**ask, messages=messages, tool_choice="required", parallel_tool_calls=False)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls
    (call,) = message.tool_calls
    assert call.type == "function"
    Trip.model_validate_json(call.function.arguments)
    with client.chat.completions.stream(
        **ask, messages=messages, tool_choice={"type": "function", "function": {"name": "book"}}
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls
    assert final.message.tool_calls[0].function.name == "book"
    Trip.model_validate_json(final.message.tool_calls[0].function.arguments)
    messages += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"booked": true}'},
    ]
    second = client.chat.completions.create(**ask, messages=messages, tool_choice="none")
    assert second.choices[0].message.content
    assert not second.choices[0].message.tool_calls


def test_openai_embeddings(client: openai.OpenAI) -> None:
    """The client's own way (base64) gives what floats give; near texts are nearer than far ones."""
    raw = client.embeddings.with_raw_response.create(
        model="text-embedding-3-small", input=["a cat", "a kitten", "tax law"], encoding_format="float"
    )
    check_answer("CreateEmbeddingResponse", raw.content)
    floats = [item.embedding for item in raw.parse().data]
    packed = client.embeddings.create(model="text-embedding-3-small", input=["a cat", "a kitten", "tax law"]).data
    for one, other in zip(floats, packed, strict=True):
        assert one == pytest.approx(other.embedding, abs=1e-5)
    cat, kitten, law = floats
    assert sum(map(lambda a, b: a * b, cat, kitten)) > sum(map(lambda a, b: a * b, cat, law)) + 0.2


def test_one_name_many_things(client: openai.OpenAI) -> None:
    """A name chats on one path and embeds on another."""
    chat = client.chat.completions.create(
        model="gpt-4o-mini", messages=[{"role": "user", "content": "Hello."}], max_tokens=4
    )
    assert chat.choices[0].message.content
    assert len(client.embeddings.create(model="gpt-4o-mini", input="Hello.").data[0].embedding) == 384


def test_openai_responses(client: openai.OpenAI) -> None:
    """Responses: whole, streamed, parsed, and one that goes on from another."""
    ask: Any = {"model": "gpt-4o-mini", "temperature": 0, "max_output_tokens": 24}
    raw = client.responses.with_raw_response.create(**ask, input="Name a colour.")
    check_answer("Response", raw.content)
    first = raw.parse()
    assert first.output_text
    with client.responses.stream(**ask, input="Name a colour.") as stream:
        assert stream.get_final_response().output_text == first.output_text
    with client.responses.create(**ask, input="Name a colour.", stream=True) as events:
        for event in events:
            check_answer("ResponseStreamEvent", event.to_json())
    after = client.responses.create(**ask, input="Another one.", previous_response_id=first.id)
    assert after.usage is not None
    assert first.usage is not None
    assert after.usage.input_tokens > first.usage.input_tokens
    parsed = client.responses.parse(model="gpt-4o-mini", input="Three days in Rome.", text_format=Trip)
    assert isinstance(parsed.output_parsed, Trip)


def test_openai_async_and_cancellation(served: Daemon) -> None:
    """Many at once; one that is given up in its stream leaves the worker."""

    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
            ask: Any = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Count."}]}
            endless = await client.chat.completions.create(
                **ask, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
            )
            async for chunk in endless:
                if chunk.choices[0].delta.content:
                    await endless.close()
                    break
            many = await asyncio.gather(*(client.chat.completions.create(**ask, max_tokens=8) for _ in range(6)))
            return [answer.choices[0].message.content for answer in many]

    async def count_running() -> int:
        async with aiohttp.ClientSession(served.base_url) as http, http.get("/localaid/status") as answer:
            status = await answer.json()
        return sum(worker["running"] for worker in status["memory"]["workers"])

    assert all(asyncio.run(run()))
    assert asyncio.run(count_running()) == 0


def test_openai_errors(client: openai.OpenAI) -> None:
    """The client raises its own class for each kind of error, and finds code and param."""
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "Hello."}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "Hello."}], temperature=101
        )
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "word " * 9000}])
    assert long.value.code == "context_length_exceeded"


# -- anthropic --


def test_anthropic(served: Daemon) -> None:
    """Messages: whole, streamed, a forced tool, and tokens counted."""
    with anthropic.Anthropic(base_url=served.base_url, api_key="none", max_retries=0) as client:
        ask: Any = {"model": "claude-sonnet", "messages": [{"role": "user", "content": "Name a colour."}]}
        greedy: Any = {**ask, "max_tokens": 12, "extra_body": {"temperature": 0}}
        whole = client.messages.create(**greedy)
        assert whole.content[0].type == "text"
        with client.messages.stream(**greedy) as stream:
            text = "".join(stream.text_stream)
        assert text == whole.content[0].text
        counted = client.messages.count_tokens(**ask).input_tokens
        assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
        tool: Any = {"name": "book", "input_schema": TOOL_SCHEMA}
        choice: Any = {"type": "any", "disable_parallel_tool_use": True}
        called = client.messages.create(**ask, max_tokens=80, tools=[tool], tool_choice=choice)
        assert called.stop_reason == "tool_use"
        use = next(block for block in called.content if block.type == "tool_use")
        Trip.model_validate(use.input)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**ask, "model": "nobody"}, max_tokens=4)


# -- clients in environments of their own --


@pytest.mark.clients
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("script", "packages"),
    [
        ("use_instructor.py", NEWEST),
        ("use_langchain.py", NEWEST),
        ("use_pydantic_ai.py", NEWEST),
        ("use_litellm.py", OLDER),
    ],
)
def test_python_client(served: Daemon, tmp_path: Path, script: str, packages: tuple[str, ...]) -> None:
    """The library's users need a base URL and nothing else."""
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # it asks the web for prices otherwise
    run_client([find_python(*packages), SCRIPTS / script], served.base_url, tmp_path, **env)


@pytest.mark.clients
@pytest.mark.timeout(1200)
def test_node_client(served: Daemon, tmp_path: Path) -> None:
    """The official package for Node.js."""
    modules = find_node_modules("openai")
    script = shutil.copy(SCRIPTS / "use_openai.mjs", modules / "use_openai.mjs")
    run_client(["node", script], served.base_url, tmp_path)


@pytest.mark.clients
@pytest.mark.timeout(1200)
def test_llm_command(served: Daemon, tmp_path: Path) -> None:
    """The `llm` command, with a model of its extra file, streamed and whole."""
    python = find_python(*OLDER)
    chat = {
        "model_id": "mine",
        "model_name": "gpt-4o-mini",
        "api_base": f"{served.base_url}/v1",
        "supports_tools": True,
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([chat]))
    command: list[str | Path] = [python, "-m", "llm"]
    env = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    streamed = run_client(
        [*command, "-m", "mine", "-o", "max_tokens", "12", "-o", "temperature", "0", "Name a colour."],
        served.base_url,
        tmp_path,
        **env,
    )
    whole = run_client(
        [*command, "-m", "mine", "--no-stream", "-o", "max_tokens", "12", "-o", "temperature", "0", "Name a colour."],
        served.base_url,
        tmp_path,
        **env,
    )
    assert streamed.strip()
    assert streamed == whole
