"""HTTP: a real daemon with a real model, asked by the official client, by aiohttp and byte by byte."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Self

import aiohttp
import msgspec
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionStreamOptionsParam

import localaid
from conftest import Daemon, StartDaemon
from models import english

CHAT = "/v1/chat/completions"
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
    """The same seed, the same texts; `n` answers that differ; max_completion_tokens wins."""
    messages = user("Invent a name for a cat.")
    texts = []
    for _ in range(2):
        answer = client.chat.completions.create(
            model=NAME, messages=messages, n=3, seed=11, temperature=1.2, max_tokens=20, max_completion_tokens=9
        )
        texts.append([choice.message.content for choice in answer.choices])
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 27
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


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


# -- where a name leads --


def test_models_lists_every_name_with_where_it_leads(client: openai.OpenAI, smollm2: Path) -> None:
    """Exact names, not globs; each with file, SHA, layer, paths, state, description; one by one too."""
    client.chat.completions.create(model=NAME, messages=user("x"), max_tokens=1)
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"small/chat", "one", "smollm2", NAME, smollm2.stem}
    extension = models["small/chat"].localaid  # type: ignore[attr-defined]
    assert extension["file"].endswith(smollm2.name)
    assert extension["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (extension["layer"], extension["state"]) == ("user", "loaded")
    assert extension["paths"] == ["/v1/chat/completions", "/v1/completions"]
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
        (CHAT, {"model": ""}, 400, "invalid_value", "model", ""),
        (CHAT, {"model": NAME, "messages": []}, 400, "invalid_value", "messages", ""),
        (CHAT, {"model": NAME, "temperature": "hot"}, 400, "invalid_value", "temperature", ""),
        (CHAT, {"model": NAME, "temperature": 3}, 400, "invalid_value", "temperature", ""),
        (CHAT, {"model": NAME, "n": 0}, 400, "invalid_value", "n", ""),
        (CHAT, {"model": NAME, "stop": ["x"] * 17}, 400, "invalid_value", "stop", ""),
        (CHAT, {"model": NAME, "echo": True, "tools": [{}]}, 400, "unsupported_parameter", "tools", ""),
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
