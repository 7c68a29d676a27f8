"""HTTP: a real daemon with a real model, asked by the official client, by aiohttp and byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import aiohttp
import msgspec
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionStreamOptionsParam, ChatCompletionToolParam

import localaid
from conftest import Daemon, StartDaemon
from models import english, place_model, write_tiny_llama
from openai_shapes import check_answer, check_events

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
NAME = "smollm2-135m-instruct"
PATIENT_S = 60.0


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon with SmolLM2 for all tests that leave it as it was."""
    import conftest  # noqa: PLC0415 - its factory is a function fixture; this one lives longer

    started = conftest.daemon.__wrapped__(tmp_path_factory)  # type: ignore[attr-defined]
    start: StartDaemon = next(started)
    configs = {
        "chat.yaml": "name: Über/chat\nshas: ['*']\nmodel_names: [small/chat, 'gpt-*']\n"
        "load: {ctx_size: 2048, threads: 2}\ndescription: what the tests talk to\n",
        "one.yaml": "name: one\nshas: ['*']\nparallel: 1\nctx_size: 4096\nthreads: 2\n",
    }
    yield start([smollm2], configs, settings={"load": {"threads": 2, "ctx_size": 2048}, "queue_size": 2})
    next(started, None)


@pytest.fixture
def client(served: Daemon) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture
async def http(served: Daemon) -> AsyncIterator[aiohttp.ClientSession]:
    """A plain client."""
    async with aiohttp.ClientSession(served.base_url) as session:
        yield session


async def until(http: aiohttp.ClientSession, holds: Callable[[localaid.DaemonStatus], bool]) -> localaid.DaemonStatus:
    """Ask for the status until something holds; the daemon tells nobody, so there is nothing to wait on."""
    deadline = time.monotonic() + PATIENT_S
    while time.monotonic() < deadline:
        async with http.get("/localaid/status") as answer:
            status = msgspec.json.decode(await answer.read(), type=localaid.DaemonStatus)
        if holds(status):
            return status
        await asyncio.sleep(0.01)
    raise AssertionError(status)


def user(text: str) -> list[ChatCompletionMessageParam]:
    """Return a chat of one message."""
    return [{"role": "user", "content": text}]


def running(status: localaid.DaemonStatus) -> int:
    """Count the requests inside workers."""
    return sum(worker.running for worker in status.memory.workers)


# -- chats --


def test_a_chat_has_openais_shape(client: openai.OpenAI) -> None:
    """Answer, usage, finish reason; the second time the prompt comes from the cache."""
    messages = user("Name three colours of the rainbow, please.")
    first = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=12)
    assert first.choices[0].message.content
    assert first.choices[0].message.role == "assistant"
    assert first.choices[0].finish_reason in ("stop", "length")
    assert first.model == NAME
    assert first.usage is not None
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    again = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=12)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    """Role first, then text, then the finish, then usage."""
    messages = user("Write a short poem about rain.")
    whole = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=24)
    with_usage: ChatCompletionStreamOptionsParam = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=messages,
            stream=True,
            stream_options=with_usage,
            temperature=0,
            max_tokens=24,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_every_event_is_whole_and_no_character_is_torn(http: aiohttp.ClientSession) -> None:
    """Each event decodes alone; without include_usage there is none; [DONE] ends it."""
    body = {
        "model": NAME, "stream": True, "temperature": 1.5, "top_k": 0, "seed": 3, "max_tokens": 60,
        "messages": [{"role": "user", "content": "Translate 'tea' into Chinese, Japanese, Korean: 茶 お茶 차 🍵"}],
        "logit_bias": {"100": 1},
    }  # fmt: skip
    async with http.post(CHAT, json=body) as answer:
        assert answer.content_type == "text/event-stream"
        raw = await answer.read()
    events = raw.split(b"\n\n")
    assert events.pop() == b""
    assert events.pop() == b"data: [DONE]"
    for event in events:
        assert event.startswith(b"data: ")
        assert "usage" not in json.loads(event[6:].decode())


def test_seed_n_and_limits(client: openai.OpenAI) -> None:
    """The same seed, the same text, cold and warm; `n` answers that differ; max_completion_tokens wins.

    Alone in the batch: with others, floating-point sums may come in another order.
    """
    messages = user("Invent a name for a cat.")
    ask = functools.partial(
        client.chat.completions.create, model=NAME, messages=messages, temperature=1.2, max_tokens=20
    )
    ask(max_tokens=1)  # whatever an earlier test gave up has left the batch then
    texts = [ask(seed=11, max_completion_tokens=9).choices[0].message.content for _ in range(3)]
    assert len(set(texts)) == 1
    answer = ask(n=3, seed=11, max_completion_tokens=9)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 27
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_stop_words_never_leak(client: openai.OpenAI) -> None:
    """Not whole, not in part, streamed or not, wherever tokens cut them."""
    messages = user("Count from one to ten in words.")
    whole = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=40)
    text = whole.choices[0].message.content or ""
    stop = text[len(text) // 3 :][:7]
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=NAME, messages=messages, temperature=0, max_tokens=40, stop=["\0never", stop], stream=stream
        )
        if isinstance(answer, openai.Stream):
            chunks = list(answer)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            said, finish = answer.choices[0].message.content or "", answer.choices[0].finish_reason
        assert (said, finish) == (text[: text.index(stop)], "stop")


def test_llama_servers_sampling_fields_are_taken(client: openai.OpenAI) -> None:
    """`top_k: 1` is greedy at any temperature; `ignore_eos` goes on to the limit."""
    messages = user("Say hi.")
    greedy = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=16)
    narrow = client.chat.completions.create(
        model=NAME, messages=messages, temperature=2, max_tokens=16, extra_body={"top_k": 1}
    )
    assert narrow.choices[0].message.content == greedy.choices[0].message.content
    on = client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=90, extra_body={"ignore_eos": True}
    )
    assert on.usage is not None
    assert (on.usage.completion_tokens, on.choices[0].finish_reason) == (90, "length")


# -- completions --


def test_completions_take_every_spelling_of_a_prompt(client: openai.OpenAI) -> None:
    """String, strings, tokens, lists of tokens: the answers come in the order of the prompts."""
    one = client.completions.create(model=NAME, prompt="Roses are red,", temperature=0, max_tokens=8)
    two = client.completions.create(
        model=NAME, prompt=["Roses are red,", "One, two, three,"], temperature=0, max_tokens=8, n=2
    )
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text == one.choices[0].text
    assert two.choices[2].text != one.choices[0].text
    tokens = client.completions.create(model=NAME, prompt=[504, 1000, 2000], temperature=0, max_tokens=4)
    several = client.completions.create(
        model=NAME, prompt=[[504, 1000, 2000], [504, 1000]], temperature=0, max_tokens=4, stream=True
    )
    texts = {0: "", 1: ""}
    for chunk in several:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts[0] == tokens.choices[0].text
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == 3


async def ask(http: aiohttp.ClientSession, path: str, **fields: object) -> dict[str, Any]:
    """Return an answer that has OpenAI's shape."""
    async with http.post(path, json={"model": NAME, "temperature": 0, **fields}) as answer:
        assert answer.status == 200, await answer.text()
        raw = await answer.read()
    check_answer("ChatCompletion" if path == CHAT else "Completion", raw)
    decoded: dict[str, Any] = json.loads(raw)
    return decoded


async def stream(http: aiohttp.ClientSession, path: str, **fields: object) -> list[dict[str, Any]]:
    """Return the choices of a stream's events, all of which have OpenAI's shape."""
    async with http.post(path, json={"model": NAME, "temperature": 0, "stream": True, **fields}) as answer:
        assert answer.status == 200, await answer.text()
        events = check_events("ChatCompletionChunk" if path == CHAT else "CompletionChunk", await answer.read())
    return [choice for event in events for choice in event["choices"]]


# -- log-probabilities --


async def test_logprobs_of_a_chat(http: aiohttp.ClientSession) -> None:
    """The tokens are the text, the likeliest come in order, a greedy answer takes the first; a stream says the same."""
    fields = {"messages": user("Name a fruit."), "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    whole = (await ask(http, CHAT, **fields))["choices"][0]
    content = whole["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == whole["message"]["content"]
    assert content
    for token in content:
        top = token["top_logprobs"]
        assert [each["logprob"] for each in top] == sorted((each["logprob"] for each in top), reverse=True)
        assert (len(top), top[0]["token"], top[0]["logprob"]) == (3, token["token"], token["logprob"])
        assert token["logprob"] <= 0
    streamed = await stream(http, CHAT, **fields)
    scored = [token for choice in streamed if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert [token["bytes"] for token in scored] == [token["bytes"] for token in content]
    assert [token["logprob"] for token in scored] == pytest.approx([token["logprob"] for token in content], abs=0.05)
    plain = (await ask(http, CHAT, **{**fields, "logprobs": False, "top_logprobs": None}))["choices"][0]
    assert plain["logprobs"] is None
    chosen = (await ask(http, CHAT, **{**fields, "top_logprobs": None}))["choices"][0]["logprobs"]["content"]
    assert all(token["top_logprobs"] == [] for token in chosen)


async def test_tokens_of_a_stop_word_are_not_told(http: aiohttp.ClientSession) -> None:
    """Whole or streamed, on both paths, the tokens end where the text does."""
    fields = {"messages": user("Count from one to ten in words."), "max_tokens": 40, "logprobs": True}
    text = (await ask(http, CHAT, **fields))["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:9]
    kept = text[: text.index(stop)]
    whole = (await ask(http, CHAT, **fields, stop=stop))["choices"][0]
    assert whole["message"]["content"] == kept
    streamed = await stream(http, CHAT, **fields, stop=stop)
    for choices in ([whole], streamed):
        tokens = [token["bytes"] for each in choices if each["logprobs"] for token in each["logprobs"]["content"]]
        told = bytes(byte for token in tokens for byte in token).decode()
        assert told.startswith(kept)  # a token may reach into the stop word
        assert len(told) - len(tokens[-1]) < len(kept)


async def test_logprobs_of_a_completion(http: aiohttp.ClientSession) -> None:
    """Parallel lists; each offset is where the token stands in the text, in a stream too; two answers do not mix."""
    fields = {"prompt": ["Roses are red,", "One, two,"], "max_tokens": 8, "logprobs": 2}
    whole = (await ask(http, COMPLETIONS, **fields))["choices"]
    streamed = await stream(http, COMPLETIONS, **fields)
    for index, choice in enumerate(whole):
        scored = choice["logprobs"]
        assert "".join(scored["tokens"]) == choice["text"]
        for token, logprob, top, offset in zip(*(scored[key] for key in (
            "tokens", "token_logprobs", "top_logprobs", "text_offset"
        )), strict=True):  # fmt: skip
            assert choice["text"][offset:].startswith(token)
            assert top[token] == logprob == max(top.values())
            assert len(top) == 2
        parts = [each["logprobs"] for each in streamed if each["index"] == index and each["logprobs"]]
        for key in ("tokens", "text_offset"):
            assert [item for part in parts for item in part[key]] == scored[key]
    none = (await ask(http, COMPLETIONS, prompt="Roses are red,", max_tokens=2, logprobs=0))["choices"][0]["logprobs"]
    assert [list(top) for top in none["top_logprobs"]] == [[token] for token in none["tokens"]]


# -- several answers, echoes, gaps --


async def test_several_answers_in_one_stream(http: aiohttp.ClientSession) -> None:
    """Each has its role first, its own text, and its reason last; whole, usage counts all."""
    fields = {"messages": user("Invent a name."), "n": 3, "temperature": 1.2, "max_tokens": 9}
    streamed = await stream(http, CHAT, **fields)
    texts = set()
    for index in range(3):
        mine = [each for each in streamed if each["index"] == index]
        assert [each["delta"].get("role") for each in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [bool(each["finish_reason"]) for each in mine] == [False] * (len(mine) - 1) + [True]
        texts.add("".join(each["delta"].get("content", "") for each in mine))
    assert len(texts) > 1
    whole = await ask(http, CHAT, **fields)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert 3 <= whole["usage"]["completion_tokens"] <= 27
    assert whole["system_fingerprint"] == "fp_b179c9523d"


async def test_best_of_n(http: aiohttp.ClientSession) -> None:
    """`best_of` is taken where it chooses nothing."""
    answer = await ask(http, COMPLETIONS, prompt="A cat is called", n=2, best_of=2, max_tokens=3, temperature=1)
    assert len(answer["choices"]) == 2


async def test_an_echo_begins_with_the_prompt(http: aiohttp.ClientSession) -> None:
    """Its tokens are told with their log-probabilities, nothing led to the first; with `max_tokens: 0` it is all."""
    fields = {"prompt": "Roses are red, violets are blue", "echo": True, "logprobs": 1}
    more = (await ask(http, COMPLETIONS, **fields, max_tokens=4))["choices"][0]
    assert more["text"].startswith(fields["prompt"])
    alone = await ask(http, COMPLETIONS, **fields, max_tokens=0)
    assert alone["choices"][0]["text"] == fields["prompt"]
    assert alone["usage"]["completion_tokens"] == 0
    scored = alone["choices"][0]["logprobs"]
    assert "".join(scored["tokens"]) == fields["prompt"]
    assert scored["token_logprobs"][0] is None
    assert all(logprob < 0 for logprob in scored["token_logprobs"][1:])
    assert more["logprobs"]["token_logprobs"][1:4] == pytest.approx(scored["token_logprobs"][1:4], abs=0.05)
    streamed = await stream(http, COMPLETIONS, **fields, max_tokens=4)
    assert "".join(each["text"] for each in streamed) == more["text"]


async def test_a_gap_needs_a_model_with_the_tokens_for_it(http: aiohttp.ClientSession) -> None:
    """SmolLM2 has none for a suffix: a 400 that names it."""
    async with http.post(COMPLETIONS, json={"model": NAME, "prompt": "def f(", "suffix": "return x"}) as answer:
        error = json.loads(await answer.read())["error"]
    assert (answer.status, error["param"]) == (400, "suffix"), error


# -- formats and tools --


class City(pydantic.BaseModel):
    """What `.parse()` is asked for."""

    name: str
    size: Literal["small", "large"]
    inhabitants: int


def test_a_schema_is_kept_and_parsed(client: openai.OpenAI) -> None:
    """The official client's `.parse()` gets its class, from a model that would not think of it."""
    answer = client.chat.completions.parse(
        model=NAME, messages=user("Tell me of Paris."), response_format=City, max_tokens=200, temperature=0
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, City)


async def test_json_and_grammars_hold_the_answer(http: aiohttp.ClientSession) -> None:
    """JSON objects, llama-server's schema on both paths, a grammar; cut short the answer says so."""
    chat = {"messages": user("Describe a cat in JSON."), "max_tokens": 100, "temperature": 1, "seed": 1}
    whole = (await ask(http, CHAT, **chat, response_format={"type": "json_object"}))["choices"][0]
    assert whole["finish_reason"] == "length" or isinstance(json.loads(whole["message"]["content"]), dict)
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}
    said = (await ask(http, COMPLETIONS, prompt="Numbers:", json_schema=schema, max_tokens=60))["choices"][0]
    assert json.loads(said["text"]) in ([1, 1], [1, 2], [2, 1], [2, 2])
    grammar = 'root ::= ("yes" | "no") "!"'
    said = (await ask(http, CHAT, **chat, grammar=grammar))["choices"][0]
    assert said["message"]["content"] in ("yes!", "no!")
    assert said["finish_reason"] == "stop"
    cut = await ask(http, CHAT, **{**chat, "max_tokens": 2}, grammar='root ::= "a cat sat on the mat all day"')
    assert cut["choices"][0]["finish_reason"] == "length"


WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_a_call_that_must_be_made_has_arguments_that_fit(http: aiohttp.ClientSession, choice: object) -> None:
    """One call, its arguments as the schema has them; a stream's pieces make the same."""
    fields = {
        "messages": user("What is the weather in Paris?"), "tools": [WEATHER], "tool_choice": choice,
        "parallel_tool_calls": False, "max_tokens": 120,
    }  # fmt: skip
    whole = (await ask(http, CHAT, **fields))["choices"][0]
    (call,) = whole["message"]["tool_calls"]
    assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", None)
    assert (call["type"], call["function"]["name"], bool(call["id"])) == ("function", "get_weather", True)
    arguments = json.loads(call["function"]["arguments"])
    assert set(arguments) == {"city", "unit"}
    pieces = [piece for each in await stream(http, CHAT, **fields) for piece in each["delta"].get("tool_calls", ())]
    assert (pieces[0]["id"] != "", pieces[0]["function"]["name"]) == (True, "get_weather")
    assert json.loads("".join(piece["function"]["arguments"] for piece in pieces)) == arguments


async def test_functions_are_answered_in_the_older_words(http: aiohttp.ClientSession) -> None:
    """Whoever sends `functions` gets a `function_call`."""
    fields = {
        "messages": user("What is the weather in Paris?"), "functions": [WEATHER["function"]], "max_tokens": 120,
        "function_call": {"name": "get_weather"},
    }  # fmt: skip
    whole = (await ask(http, CHAT, **fields))["choices"][0]
    assert whole["finish_reason"] == "function_call"
    assert whole["message"]["function_call"]["name"] == "get_weather"
    assert "tool_calls" not in whole["message"]
    streamed = [each["delta"].get("function_call", {}) for each in await stream(http, CHAT, **fields)]
    assert "".join(each.get("arguments", "") for each in streamed) == whole["message"]["function_call"]["arguments"]


# -- where a name leads --


def test_models_lists_every_name_with_where_it_leads(client: openai.OpenAI, smollm2: Path) -> None:
    """Exact names, not globs; each with file, SHA, layer, paths, state, description; one by one too."""
    client.chat.completions.create(model=NAME, messages=user("x"), max_tokens=1)
    check_answer("ModelList", client.models.with_raw_response.list().text)
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"small/chat", "one", "smollm2", NAME, smollm2.stem}
    extension = models["small/chat"].localaid  # type: ignore[attr-defined]
    assert extension["file"].endswith(smollm2.name)
    assert extension["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (extension["layer"], extension["state"]) == ("user", "loaded")
    assert extension["paths"] == ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]
    assert extension["description"] == "what the tests talk to"
    assert models[NAME].localaid["layer"] in ("auto", "shipped")  # type: ignore[attr-defined]
    assert client.models.retrieve("small/chat").id == "small/chat"
    assert client.models.retrieve("gpt-4o").id == "gpt-4o"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


async def test_headers_tell_where_a_request_went_when_asked(http: aiohttp.ClientSession) -> None:
    """And not otherwise; they are ASCII whatever the rule is called."""
    body = {"model": "small/chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    async with http.post(CHAT, json=body, headers={"X-Localaid-Explain": "1"}) as answer:
        assert answer.headers["X-Localaid-Rule"] == "%C3%9Cber/chat"
        assert answer.headers["X-Localaid-Layer"] == "user"
        assert answer.headers["X-Localaid-SHA256"].startswith("b179c952")
    async with http.post(CHAT, json=body) as answer:
        assert not [key for key in answer.headers if key.startswith("X-Localaid")]


# -- errors --


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param", "words"),
    [
        (CHAT, b"", 400, "invalid_value", None, "is empty"),
        (CHAT, b"{", 400, "invalid_value", None, "JSON"),
        (CHAT, b"[]", 400, "invalid_value", None, "object"),
        (CHAT, b'{"model": "\xff"}', 400, "invalid_value", None, "UTF-8"),
        (CHAT, {"model": NAME, "messages": []}, 400, "invalid_value", "messages", ""),
        (CHAT, {"model": NAME, "temperature": "hot"}, 400, "invalid_value", "temperature", ""),
        (CHAT, {"model": NAME, "temperature": 101}, 400, "invalid_value", "temperature", ""),
        (CHAT, {"model": NAME, "n": 0}, 400, "invalid_value", "n", ""),
        (CHAT, {"model": NAME, "stop": ["x"] * 17}, 400, "invalid_value", "stop", ""),
        (CHAT, {"model": NAME, "echo": True, "tools": [{}]}, 400, "invalid_value", "tools", ""),
        (CHAT, {"model": NAME, "modalities": ["audio"]}, 400, "unsupported_parameter", "modalities", "text only"),
        (CHAT, {"model": NAME, "tool_choice": "required"}, 400, "invalid_value", "tool_choice", "`tools`"),
        (CHAT, {"model": NAME, "top_logprobs": 3}, 400, "invalid_value", "top_logprobs", "`logprobs`"),
        (CHAT, {"model": NAME, "stream_options": {}}, 400, "invalid_value", "stream_options", "`stream`"),
        (CHAT, {"model": "smollm2-135m-instuct"}, 404, "model_not_found", "model", NAME),
        ("/v1/completions", {"model": NAME, "prompt": [10**6]}, 400, "token_unknown", "prompt", "49152"),
        ("/v1/completions", {"model": NAME, "prompt": ""}, 400, "prompt_empty", "prompt", "no tokens"),
        ("/v1/nothing", {}, 404, "unknown_url", None, "/v1/nothing"),
        ("/v1/models", {}, 405, "method_not_allowed", None, "POST"),
    ],
)  # fmt: skip
async def test_errors_are_openais_envelope(  # noqa: PLR0917 - a row of the table
    http: aiohttp.ClientSession, path: str, body: object, status: int, code: str, param: str | None, words: str
) -> None:
    """Status, code and param say what is wrong, the sentence what to do."""
    if isinstance(body, dict):
        filled = {"messages": [{"role": "user", "content": "x"}]} | body if path == CHAT else body
        body = json.dumps(filled).encode()
    async with http.post(path, data=body) as answer:
        error = json.loads(await answer.read())["error"]
    assert (answer.status, error["code"]) == (status, code), error
    assert (error["param"] or "").split("[")[0] == (param or ""), error
    assert words in error["message"]
    assert error["type"]


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(client: openai.OpenAI) -> None:
    """Never cut in silence."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=user(english(3000, 1)))
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in caught.value.message
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt=english(3000, 1))
    assert caught.value.param == "prompt"


# -- queues --


async def read_first(answer: aiohttp.ClientResponse) -> None:
    """Wait for the first event of a stream."""
    assert answer.status == 200, await answer.text()
    async for line in answer.content:
        if line.startswith(b"data: "):
            return


def endless(name: str, text: str = "Tell me everything.") -> dict[str, object]:
    """Return a stream that goes on until somebody goes."""
    messages = [{"role": "user", "content": text}]
    return {"model": name, "stream": True, "temperature": 0, "ignore_eos": True, "messages": messages}


async def test_a_client_that_goes_frees_its_place_at_once(http: aiohttp.ClientSession) -> None:
    """Streamed or not, running or waiting."""
    stream = await http.post(CHAT, json=endless(NAME))
    await read_first(stream)
    whole = asyncio.create_task(http.post(CHAT, json={**endless(NAME), "stream": False}).__aenter__())
    await until(http, lambda status: running(status) == 2)
    stream.close()
    await until(http, lambda status: running(status) == 1)
    whole.cancel()
    await until(http, lambda status: running(status) == 0)


async def test_a_full_queue_says_when_to_come_back(http: aiohttp.ClientSession) -> None:
    """429 with Retry-After; who waits is served in the end, and a waiting one can go."""
    async with Streams() as streams:
        streams.append(await http.post(CHAT, json=endless("one")))
        await read_first(streams[0])
        waiting = []
        for place in range(3):  # one more place inside the worker's look-ahead, two in the queue
            waiting.append(asyncio.create_task(http.post(CHAT, json=endless("one", str(place))).__aenter__()))
            await until(
                http,
                lambda s, n=place + 2: sum(w.running + w.waiting for w in s.memory.workers) == n,  # type: ignore[misc]
            )
        async with http.post(CHAT, json=endless("one")) as answer:
            assert answer.status == 429
            assert int(answer.headers["Retry-After"]) >= 1
            error = json.loads(await answer.read())["error"]
        assert error["code"] == "rate_limit_exceeded"
        waiting.pop().cancel()
        await until(http, lambda s: sum(w.running + w.waiting for w in s.memory.workers) == 3)
        streams.pop(0).close()
        streams.append(await waiting.pop(0))
        await read_first(streams[0])
        for task in waiting:
            task.cancel()
    await until(http, lambda status: running(status) == 0)


class Streams(list[aiohttp.ClientResponse]):
    """A list of answers that are closed at the end."""

    async def __aenter__(self) -> Self:
        """Return the list."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close them all."""
        for answer in self:
            answer.close()


async def test_a_stream_that_waits_is_kept_alive(http: aiohttp.ClientSession) -> None:
    """Its head and comments come before its turn does."""
    async with Streams() as streams:
        for _ in range(2):
            streams.append(await http.post(CHAT, json=endless("one")))
            if len(streams) == 1:
                await read_first(streams[0])
        assert streams[1].status == 200
        assert (await streams[1].content.readline()).startswith(b": ")
        streams[0].close()
        await read_first(streams[1])


async def test_a_killed_worker_is_told_of_and_replaced(http: aiohttp.ClientSession) -> None:
    """Who had begun gets a clear error in the stream; the next request gets a new worker."""
    stream = await http.post(CHAT, json=endless(NAME))
    await read_first(stream)
    status = await until(http, lambda status: running(status) == 1)
    pid = next(worker.pid for worker in status.memory.workers if worker.running)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    rest = await stream.read()
    error = json.loads(rest.split(b"data: ")[-1])["error"]
    assert error["code"] == "worker_died"
    assert "SIGKILL" in error["message"]
    body = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    async with http.post(CHAT, json=body) as answer:
        assert answer.status == 200
    new = await until(http, lambda status: running(status) == 0)
    assert pid not in [worker.pid for worker in new.memory.workers]


# -- memory --


async def test_an_idle_model_is_unloaded_after_its_keep_alive(daemon: StartDaemon, tiny_llama: Path) -> None:
    """The rule says how long; the next request loads it again."""
    served = daemon([tiny_llama], {"x.yaml": "name: brief\nshas: ['*']\nkeep_alive: 0.1s\n"})
    async with aiohttp.ClientSession(served.base_url) as http:
        for _ in range(2):
            async with http.post("/v1/completions", json={"model": "brief", "prompt": "x", "max_tokens": 1}) as answer:
                assert answer.status == 200, await answer.text()
            await until(http, lambda status: not any(worker.pid for worker in status.memory.workers))


async def test_a_model_that_can_never_fit_is_refused_with_the_numbers(daemon: StartDaemon, tiny_llama: Path) -> None:
    """503, with what it needs and what there is."""
    served = daemon([tiny_llama], settings={"memory": "1MiB"})
    async with aiohttp.ClientSession(served.base_url) as http:
        body = {"model": tiny_llama.stem, "prompt": "x", "max_tokens": 1}
        async with http.post("/v1/completions", json=body) as answer:
            error = json.loads(await answer.read())["error"]
    assert (answer.status, error["code"]) == (503, "model_too_large")
    assert re.search(r"needs about \d+ MiB of memory and the budget is 1 MiB", error["message"]), error


def estimate(model: Path, options: localaid.LoadOptions) -> int:
    """Return what the daemon thinks that a model needs."""
    info = localaid.parse_gguf(model.read_bytes(), size_bytes=model.stat().st_size, file=model.name)
    return localaid.estimate_bytes(info, options)


async def test_two_models_that_do_not_fit_together_take_turns(daemon: StartDaemon, smollm2: Path) -> None:
    """The idle one goes when the other is asked for: here one model, loaded in two ways."""
    config = "name: {name}\nshas: ['*']\nload: {{ctx_size: {ctx_size}, parallel: 1, threads: 2}}\n"
    served = daemon(
        [smollm2],
        {f"{size}.yaml": config.format(name=f"ctx{size}", ctx_size=size) for size in (2048, 2040)},
        settings={"memory": int(estimate(smollm2, localaid.LoadOptions(ctx_size=2048, parallel=1)) * 1.1)},
    )
    async with aiohttp.ClientSession(served.base_url) as http:
        for size in (2048, 2040, 2048):
            async with http.post(
                "/v1/completions", json={"model": f"ctx{size}", "prompt": "x", "max_tokens": 1}
            ) as answer:
                assert answer.status == 200, await answer.text()
            status = await until(
                http, lambda status: sum(worker.pid is not None for worker in status.memory.workers) == 1
            )
            assert [worker.options.ctx_size for worker in status.memory.workers if worker.pid] == [size]


# -- ACCESS: what a wider look at HTTP has left over --


@contextlib.asynccontextmanager
async def serve_here(
    folder: Path, models: Iterable[Path], settings: localaid.Settings, listen: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[localaid.Daemon, aiohttp.ClientSession]]:
    """Run a daemon within this process, for tests that hold or break one of its steps; its workers are processes."""
    for part in ("models", "configs", "state"):
        (folder / part).mkdir()
    for model in models:
        place_model(model, folder / "models")
    folders = localaid.Folders(
        models=(folder / "models",),
        configs=folder / "configs",
        state=folder / "state",
        settings=folder / "localaid.yaml",
        shipped=folder / "shipped",
    )
    one = localaid.Daemon(folders, settings, (listen,))
    running = asyncio.create_task(one.run())
    while not one.is_ready and not running.done():  # it tells systemd, not its own process
        await asyncio.wait((running,), timeout=0.01)
    try:
        path = listen.removeprefix("unix:")
        connector = aiohttp.UnixConnector(path) if path != listen else None
        base = "http://localhost" if connector else one.status().listen[0]
        async with aiohttp.ClientSession(base, connector=connector) as http:
            yield one, http
    finally:
        one._stop.set()
        await running


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_each_limits_name_ends_an_answer(client: openai.OpenAI, limit: str) -> None:
    """OpenAI's old and new one, llama-server's."""
    answer = client.chat.completions.create(
        model=NAME, messages=user("Count to a hundred."), extra_body={limit: 5, "ignore_eos": True}
    )
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "length")


def test_the_models_own_end_is_a_stop_and_never_text(client: openai.OpenAI) -> None:
    """Here its end token is made the only choice."""
    end_of_turn = 2
    answer = client.chat.completions.create(model=NAME, messages=user("x"), logit_bias={str(end_of_turn): 100})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")


def test_a_stream_of_several_prompts_and_answers_keeps_them_apart(client: openai.OpenAI) -> None:
    """Indices run over prompts, then answers; each is finished once; usage counts all."""
    asked = {"model": NAME, "prompt": ["Roses are red,", "One, two, three,"], "n": 2, "temperature": 0, "max_tokens": 6}
    whole = client.completions.create(**asked)  # type: ignore[call-overload]
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    texts, finished = dict.fromkeys(range(4), ""), []
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finished += [choice.index] if choice.finish_reason else []
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert sorted(finished) == [0, 1, 2, 3]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_request_of_many_prompts_takes_one_place_in_the_queue(client: openai.OpenAI) -> None:
    """More prompts than the queue has places are still one request."""
    prompts = [f"{number} and" for number in range(10)]
    answer = client.completions.create(model="one", prompt=prompts, max_tokens=1, temperature=0)
    assert [choice.index for choice in answer.choices] == list(range(10))


def test_headers_reach_the_official_client(client: openai.OpenAI, smollm2: Path) -> None:
    """By `with_raw_response`."""
    raw = client.completions.with_raw_response.create(
        model="gpt-4o", prompt="x", max_tokens=1, extra_headers={"X-Localaid-Explain": "true"}
    )
    assert raw.headers["X-Localaid-File"].endswith(smollm2.name)
    assert raw.headers["Content-Type"].startswith("application/json")
    assert raw.parse().model == "gpt-4o"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_names_the_field_of_its_path(client: openai.OpenAI, *, stream: bool) -> None:
    """Never cut in silence; a stream is refused before it begins."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=user(english(3000, 1)), stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in caught.value.message
    assert re.search(r"\b3\d{3}\b", caught.value.message), caught.value.message
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt=[100] * 2100, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert "2100" in caught.value.message


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sdnotify, without systemd
async def test_a_fault_in_mid_stream_ends_it_with_an_error_event(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not with a second HTTP head among the events; the log has the traceback under the id that the client sees."""
    render, calls = localaid.ChunkRenderer.render_delta, []

    def fail_once(renderer: localaid.ChunkRenderer, index: int, text: str) -> bytes:
        calls.append(text)
        if len(calls) == 3:
            raise RuntimeError("invented")
        return render(renderer, index, text)

    monkeypatch.setattr(localaid.ChunkRenderer, "render_delta", fail_once)
    async with serve_here(tmp_path, [tiny_llama], localaid.Settings()) as (_, http):
        body = {"model": tiny_llama.stem, "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
        async with http.post("/v1/completions", json=body) as answer:
            events = (await answer.read()).split(b"\n\n")
    assert all(event.startswith(b"data: {") for event in events[:-1])
    error = json.loads(events[-2][6:])["error"]
    found = re.search(r"req-\w+", error["message"])
    assert found
    assert found[0] in caplog.text
    assert "RuntimeError: invented" in caplog.text


def test_the_official_client_can_leave_a_stream(served: Daemon, client: openai.OpenAI) -> None:
    """`close()` after the first chunks."""
    with client.chat.completions.create(
        model=NAME, messages=user("Tell me everything."), stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break

    async def left() -> None:
        async with aiohttp.ClientSession(served.base_url) as http:
            await until(http, lambda status: running(status) == 0)

    asyncio.run(left())


async def test_a_client_that_reads_slowly_gets_every_event(tiny_llama: Path, tmp_path: Path) -> None:
    """What its connection cannot hold waits for it, and comes in order; the worker is not held up."""
    body = json.dumps({
        "model": tiny_llama.stem, "messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "ignore_eos": True,
        "seed": 1, "logprobs": True, "top_logprobs": 20, "stream": True,
    }).encode()  # fmt: skip
    at = tmp_path / "socket"  # a unix socket's buffer does not grow
    async with serve_here(tmp_path, [tiny_llama], localaid.Settings(), f"unix:{at}") as (daemon, http):
        async with http.post(CHAT, data=body) as answer:
            wanted = _read_scored(await answer.read())
        slow = socket.socket(socket.AF_UNIX)
        slow.connect(str(at))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        slow.sendall(head.encode() + body)
        while daemon.supervisor.status().workers[0].steps < 800:  # all of them, and nothing has been read
            await asyncio.wait((asyncio.create_task(asyncio.sleep(0.01)),))
        reader, writer = await asyncio.open_unix_connection(sock=slow)
        received = await reader.read()
        writer.close()
    assert len(wanted[1]) > 390
    assert _read_scored(b"".join(_unchunk(received.partition(b"\r\n\r\n")[2]))) == wanted


def _read_scored(stream: bytes) -> tuple[str, list[str]]:
    """Return the text and the tokens of a stream that came to its end."""
    events = stream.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    choices = [json.loads(event[6:])["choices"][0] for event in events[:-2]]
    assert choices[-1]["finish_reason"] == "length"
    tokens = [token["token"] for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    return "".join(choice["delta"].get("content", "") for choice in choices), tokens


def _unchunk(body: bytes) -> Iterator[bytes]:
    """Yield the chunks of a body."""
    while body:
        size, _, rest = body.partition(b"\r\n")
        yield rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]


async def test_a_model_that_cannot_be_loaded_is_listed_as_failed(daemon: StartDaemon, tmp_path: Path) -> None:
    """503 with llama.cpp's reason, streamed too; the others go on."""
    good = write_tiny_llama(tmp_path / "good.gguf")
    bad = tmp_path / "bad.gguf"  # a tensor's name has changed: a good header, and llama.cpp refuses it
    bad.write_bytes(good.read_bytes().replace(b"blk.1.attn_norm.weight", b"blk.1.attn_morn.weight"))
    served = daemon([good, bad])
    async with aiohttp.ClientSession(served.base_url) as http:
        for stream in (False, True):
            body = {"model": "bad", "prompt": "x", "stream": stream}
            async with http.post("/v1/completions", json=body) as answer:
                error = json.loads(await answer.read())["error"]
            assert (answer.status, error["code"]) == (503, "model_failed")
            assert "blk.1.attn_norm.weight" in error["message"]
        async with http.post("/v1/completions", json={"model": "good", "prompt": "x", "max_tokens": 1}) as answer:
            assert answer.status == 200
        async with http.get("/v1/models") as answer:
            cards = msgspec.json.decode(await answer.read(), type=localaid.ModelList).data
    assert {card.id: card.localaid.state for card in cards} == {"bad": "failed", "good": "loaded"}


async def test_an_answer_ends_where_its_context_is_full(daemon: StartDaemon, tiny_llama: Path) -> None:
    """With `length`, and to the last token."""
    served = daemon([tiny_llama], {"x.yaml": "name: short\nshas: ['*']\nctx_size: 64\nparallel: 1\n"})
    body = {"model": "short", "prompt": "x", "max_tokens": -1, "ignore_eos": True}
    async with aiohttp.ClientSession(served.base_url) as http, http.post("/v1/completions", json=body) as answer:
        found = msgspec.json.decode(await answer.read(), type=localaid.Completion)
    assert isinstance(found.usage, localaid.Usage)
    assert found.choices[0].finish_reason == "length"
    assert found.usage.total_tokens in range(60, 257)  # llama.cpp rounds a context up
