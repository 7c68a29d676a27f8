"""ROUTES: every address, how it is asked, and the document that describes them all."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import localaid
from conftest import Daemon, StartDaemon
from localaid import ROUTES, Route

NAME = "tiny-llama"
COMPLETIONS = "/v1/completions"
BODY = {"model": NAME, "prompt": "x", "max_tokens": 1}
LIMIT_BYTES = 1 << 20


@pytest.fixture(scope="module")
def served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon without keys for all tests."""
    import conftest  # noqa: PLC0415 - its factory is a function fixture; this one lives longer

    started = conftest.daemon.__wrapped__(tmp_path_factory)  # type: ignore[attr-defined]
    start: StartDaemon = next(started)
    configs = {"any.yaml": "name: any\nshas: ['*']\nmodel_names: ['*']\nmax_tokens: 2\n"}
    more = {"body_limit": LIMIT_BYTES, "body_timeout": "500ms", "load": {"ctx_size": 256, "threads": 1}}
    yield start([tiny_llama], configs, settings=more)
    next(started, None)


@pytest.fixture
async def http(served: Daemon) -> AsyncIterator[aiohttp.ClientSession]:
    """A plain client."""
    async with aiohttp.ClientSession(served.base_url) as session:
        yield session


def filled(path: str) -> str:
    """Return a route's path with something in its holes."""
    return re.sub(r"{\w+(:[^}]*)?}", "some", path)


async def error_code(answer: aiohttp.ClientResponse) -> tuple[int, str]:
    """Return status and code of an error in OpenAI's envelope."""
    error = json.loads(await answer.read())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status, error["code"]


# -- addresses --


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.label}")
async def test_every_spelling_of_every_route(http: aiohttp.ClientSession, route: Route) -> None:
    """Without /v1, with a slash at the end; OPTIONS tells the methods, another method is a 405 with the same."""
    assert len(route.spellings) == (4 if route.path.startswith("/v1") else 2 - (route.path == "/"))
    methods: set[str] = {other.method for other in ROUTES if filled(other.path) == filled(route.path)}
    methods |= {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
    for path in map(filled, route.spellings):
        async with http.options(path) as answer:
            assert answer.status == 204, path
            assert methods <= set(answer.headers["Allow"].split(", "))
        async with http.put(path) as answer:
            assert answer.status == 405
            assert methods <= set(answer.headers["Allow"].split(", "))


async def test_head_is_get_without_its_body(http: aiohttp.ClientSession) -> None:
    """The same status and length."""
    for path in ("/v1/models", "/models/", f"/v1/models/{NAME}", "/healthz", "/openapi.json", "/no/such"):
        async with http.get(path) as whole, http.head(path) as head:
            assert (head.status, await head.read()) == (whole.status, b"")
            assert head.headers["Content-Type"] == whole.headers["Content-Type"]
            if whole.status == 200:  # else the message names the method
                assert head.headers["Content-Length"] == whole.headers["Content-Length"]


async def test_short_paths_answer_as_the_full_ones(http: aiohttp.ClientSession) -> None:
    """Model names may have slashes."""
    for path in ("/v1/completions", "/completions", "/v1/completions/", "/completions/"):
        async with http.post(path, json=BODY) as answer:
            assert (answer.status, (await answer.json())["object"]) == (200, "text_completion")
    for path in ("/v1/models/org/name", "/models/org/name/"):
        async with http.get(path) as answer:
            assert (await answer.json())["id"] == "org/name"
    async with http.get("/v1/nothing%0Ahere") as answer:
        assert await error_code(answer) == (404, "unknown_url")


# -- bodies --


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_packed_and_chunked_bodies(http: aiohttp.ClientSession, encoding: str, *, is_chunked: bool) -> None:
    """As clients send them."""
    plain = json.dumps(BODY).encode()
    packed = {"gzip": gzip.compress(plain), "deflate": zlib.compress(plain), "identity": plain}[encoding]

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(packed), 7):
            yield packed[at : at + 7]

    data = pieces() if is_chunked else packed
    async with http.post(COMPLETIONS, data=data, headers={"Content-Encoding": encoding}) as answer:
        assert answer.status == 200, await answer.text()


async def test_bodies_that_are_refused(http: aiohttp.ClientSession) -> None:
    """Too large, plain or unpacked; broken; packed in a way that is not known."""
    bomb = gzip.compress(bytes(64 << 20))
    assert len(bomb) < LIMIT_BYTES

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 15)

    for data, encoding, wanted in (
        (io.BytesIO(bytes(LIMIT_BYTES + 1)), "", (413, "request_too_large")),
        (endless(), "", (413, "request_too_large")),
        (bomb, "gzip", (413, "request_too_large")),
        (b"{}", "gzip", (400, "invalid_value")),
        (gzip.compress(b"{}")[:-3], "gzip", (400, "invalid_value")),
        (b"{}", "br", (415, "unsupported_encoding")),
        (b"{}", "gzip, gzip", (415, "unsupported_encoding")),
        (b"{", "", (400, "invalid_value")),
        (b"\xff\xfe", "", (400, "invalid_value")),
        (b"", "", (400, "invalid_value")),
    ):
        headers = {"Content-Encoding": encoding} if encoding else {}
        async with http.post(COMPLETIONS, data=data, headers=headers) as answer:
            assert await error_code(answer) == wanted


async def send_body(served: Daemon, framing: str, body: bytes) -> bytes:
    """Send a request whose body comes when its handler waits for it; return the answer's head and body."""
    host, _, port = served.base_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        start = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\nExpect: 100-continue\r\n\r\n"
        writer.write(start.encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length is not None
        return head + await reader.readexactly(int(length[1]))
    finally:
        writer.close()


async def test_a_body_that_does_not_come_is_given_up(served: Daemon) -> None:
    """After `body_timeout`."""
    answer = await send_body(served, "Content-Length: 1000", b'{"model"')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer


async def test_broken_chunks_are_the_clients_error(served: Daemon) -> None:
    """Told at once where they come with their head; later ones end at `body_timeout`."""
    host, _, port = served.base_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head.encode() + b'5\r\n{"mod\r\nnonsense\r\n\r\n')
    assert b" 400 " in await reader.readline()
    writer.close()
    answer = await send_body(served, "Transfer-Encoding: chunked", b'5\r\n{"mod\r\nnonsense\r\n\r\n')
    assert answer.startswith(b"HTTP/1.1 4")


async def test_a_connection_lives_for_thousands_of_requests(served: Daemon) -> None:
    """On one connection, with errors among them; the daemon keeps nothing of them."""

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{served.pid}/fd"))  # noqa: PTH208 - only their number

    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(served.base_url, connector=connector) as one:
        async with one.get("/healthz") as answer:
            assert answer.status == 200
        before, local = descriptors(), set()
        for number in range(3000):
            path, wanted = (("/healthz", 200), ("/v1/models", 200), ("/none", 404), (COMPLETIONS, 405))[number % 4]
            async with one.get(path) as answer:
                assert answer.status == wanted
                if answer.connection is not None and answer.connection.transport is not None:
                    local.add(answer.connection.transport.get_extra_info("sockname"))
                await answer.read()
        assert len(local) <= 1
        assert descriptors() <= before


# -- the document --


async def test_the_document_is_openapi_and_complete(http: aiohttp.ClientSession) -> None:
    """Every route once, every reference leads somewhere, every schema is one; operation ids are unique."""
    async with http.get("/openapi.json") as answer:
        document: dict[str, Any] = await answer.json()
    assert document["openapi"].startswith("3.1")
    operations = {
        (method.upper(), path): one for path, methods in document["paths"].items() for method, one in methods.items()
    }
    assert set(operations) == {(route.method, route.label) for route in ROUTES}
    ids = [operation["operationId"] for operation in operations.values()]
    assert len(ids) == len(set(ids))
    schemas = document["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)):
        assert name in schemas
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    chat = operations["POST", localaid.CHAT]
    assert chat["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    assert {"messages", "model"} <= set(schemas["ChatRequest"]["required"])
    assert operations["GET", "/healthz"]["security"] == []


def test_answers_have_the_shape_of_the_document(served: Daemon) -> None:
    """What a real daemon says validates against what it says that it would."""
    schema = schemathesis.openapi.from_url(f"{served.base_url}/openapi.json")
    document = schema.raw_schema

    async def check() -> None:
        async with aiohttp.ClientSession(served.base_url) as http:
            for method, path, body in (
                ("GET", "/v1/models", None),
                ("GET", f"/v1/models/{NAME}", None),
                ("GET", "/localaid/status", None),
                ("GET", "/localaid/explain?path=v1/chat&name=x", None),
                ("POST", COMPLETIONS, BODY),
                ("POST", localaid.CHAT, {"model": NAME, "messages": [{"role": "user", "content": "x"}]}),
                ("POST", localaid.RESPONSES, {"model": NAME, "input": "x", "max_output_tokens": 16}),
                ("POST", "/tokenize", {"content": "x"}),
            ):
                async with http.request(method, path, json=body) as answer:
                    told = await answer.json()
                    assert answer.status == 200, told
                bare = path.partition("?")[0].replace(f"/{NAME}", "/{name}")
                wanted = document["paths"][bare][method.lower()]["responses"]["200"]["content"]["application/json"]
                jsonschema.validate(told, {**wanted["schema"], "components": document["components"]})

    asyncio.run(check())


MESSAGES = [{"role": "user", "content": "x"}]
GOOD_BODIES: dict[str, dict[str, object]] = {  # what is served where nothing else is said
    localaid.CHAT: {"messages": MESSAGES},
    COMPLETIONS: {"prompt": "x"},
    localaid.RESPONSES: {"input": "x", "max_output_tokens": 16},
    localaid.MESSAGES: {"messages": MESSAGES, "max_tokens": 2},
    "/tokenize": {"content": "x"},
    "/detokenize": {"tokens": [65]},
    "/apply-template": {"messages": MESSAGES},
}


def small(route: Route, body: object, place: int) -> object:
    """Return a request that costs little: a name that is served, few tokens, few answers.

    Of a good body all fields but one are good: most of what is made up fails at its first field.
    """
    if not isinstance(body, dict):
        return body
    if place >= 0 and route.path in GOOD_BODIES:
        one = dict(list(body.items())[place % max(1, len(body)) :][:1])
        body = {"model": NAME, **GOOD_BODIES[route.path], **one}
    capped = {**body, "model": NAME} if isinstance(body.get("model"), str) else dict(body)
    most_of = {"max_tokens": 2, "max_completion_tokens": 2, "n_predict": 2, "max_output_tokens": 16, "n": 2}
    for name, most in most_of.items():
        if isinstance(capped.get(name), int):
            capped[name] = most if capped[name] == -1 else min(capped[name], most)
    return capped


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.label}")
def test_no_request_is_a_fault_of_the_server(served: Daemon, route: Route) -> None:
    """Whatever schemathesis makes of the document, right or wrong: never a 5xx but where nothing can serve it."""
    schema = schemathesis.openapi.from_url(f"{served.base_url}/openapi.json")
    operation = schema[route.label][route.method]
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

    @settings(
        max_examples=25 if route.request else 5,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, place=st.integers(-1, 40))
    def ask(case: Any, place: int) -> None:  # noqa: ANN401 - a schemathesis.Case, typed in part
        if route.request is not None:
            case.body = small(route, case.body, place)
        answer = case.call(timeout=30)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    ask()
