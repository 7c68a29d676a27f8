"""ACCESS: whose key a request shows, what it may use, and that the key itself is never seen."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gzip
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import PROGRAM, Daemon, StartDaemon
from localaid import (
    ApiKey,
    BadRequest,
    BodyTooLarge,
    ConfigErrors,
    EncodingUnsupported,
    Keyring,
    Settings,
    Unpacker,
    cors_headers,
    is_public,
    keys_shown,
    load_keyring,
    may_use,
    named_by,
    parse_key_file,
    parse_settings,
    preflight_headers,
    with_model,
)
from processes import LocalaidProcess

SECRET = "sk-SECRET"  # noqa: S105 - what must never be seen
COMPLETIONS = "/v1/completions"


def key(name: str = "alice", text: str = SECRET, **fields: Any) -> ApiKey:  # noqa: ANN401
    """Return an entry."""
    return ApiKey(name=name, digest=hashlib.sha256(text.encode()).digest(), **fields)


# -- entries --


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ("'alice:sk-SECRET'", key()),
        ("{name: alice, key: sk-SECRET}", key()),
        ("{alice: sk-SECRET}", key()),
        ("'alice:a:b'", key(text="a:b")),
        ("'alice:12345'", key(text="12345")),
        ("{name: a@b, key: 123, model: m, names: [x, 'g-*']}", key("a@b", "123", model="m", names=("x", "g-*"))),
    ],
)
def test_each_spelling_of_an_entry(entry: str, wanted: ApiKey) -> None:
    """In the settings and in a YAML file of keys."""
    assert parse_settings(f"api_keys: [{entry}]".encode(), file="x").api_keys == (wanted,)
    assert parse_key_file(f"- {entry}".encode(), file="keys.yaml") == (wanted,)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("sk-SECRET", "expected name:key (what stands there is not shown: it may be a key)"),
        ("'alice:sk-SECRET SECRET'", "a key is 1 to 512 visible ASCII characters without spaces"),
        ("'alice:'", "a key is 1 to 512"),
        ("'sk-SECRET sk:x'", "a key's name is 1 to 64"),
        ("{name: alice}", "api_keys.0.key: is missing"),
        ("{key: sk-SECRET}", "api_keys.0.name: is missing"),
        ("{name: alice, kee: sk-SECRET}", "unknown key, line 1 (did you mean key?)"),
        ("{name: alice, key: [sk-SECRET]}", "expected text, got a list"),
        ("[sk-SECRET]", "expected text, got a list"),
        ("{alice: {bob: sk-SECRET}}", "expected text, got keys and values"),
    ],
)
def test_a_broken_entry_is_told_without_the_key(entry: str, problem: str) -> None:
    """The place and the problem, never what stands there."""
    with pytest.raises(ConfigErrors) as caught:
        parse_settings(f"api_keys: [{entry}]".encode(), file="x")
    assert problem in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_lines_of_a_key_file() -> None:
    """Comments, empty lines, Windows' line ends; every broken line is told of with its number."""
    document = b"\xef\xbb\xbf# keys\r\nalice:sk-SECRET  # laptop\r\n\r\n bob:b#b \r\n"
    assert parse_key_file(document, file="keys") == (key(), key("bob", "b#b"))
    with pytest.raises(ConfigErrors) as caught:
        parse_key_file(b"alice:x\nSECRET\nbob: SECRET y\n", file="keys")
    assert [(problem.line, "SECRET" in str(problem)) for problem in caught.value.problems] == [(2, False), (3, False)]
    with pytest.raises(ConfigErrors, match="not UTF-8"):
        parse_key_file(b"alice:\xff", file="keys")


def test_an_entry_shows_its_name_only() -> None:
    """Neither the key nor its digest, in no form."""
    text = repr(Settings(api_keys=(key(),)))
    assert "ApiKey('alice')" in text
    assert key().digest.hex()[:8] not in text
    assert repr(key().digest) not in text


@given(st.binary(max_size=200))
def test_any_bytes_are_keys_or_problems(document: bytes) -> None:
    """Nothing else comes out, whatever lies in the file."""
    for file in ("keys", "keys.yaml"):
        with contextlib.suppress(ConfigErrors):
            assert all(isinstance(entry, ApiKey) for entry in parse_key_file(document, file=file))


# -- keyring --


def test_a_key_is_found_by_any_header() -> None:
    """Bearer in any case, Anthropic's, Azure's; a stale one beside a good one does no harm; Basic is none."""
    ring = Keyring([key(), key("bob", "sk-bob")])
    for headers in (
        {"Authorization": "Bearer sk-bob"},
        {"Authorization": "bearer  sk-bob "},
        {"x-api-key": "sk-bob"},
        {"api-key": "sk-bob"},
        {"Authorization": "Bearer stale", "x-api-key": "sk-bob"},
    ):
        found = ring.find(keys_shown(headers))
        assert found is not None
        assert found.name == "bob"
    for headers in ({}, {"Authorization": "Basic sk-bob"}, {"Authorization": "sk-bob"}, {"x-api-key": "sk-bo"}):
        assert ring.find(keys_shown(headers)) is None


def test_every_digest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the right one, by `hmac.compare_digest`."""
    import hmac  # noqa: PLC0415 - to be watched

    compared: list[bytes] = []
    compare = hmac.compare_digest

    def watch(known: bytes, shown: bytes) -> bool:
        compared.append(known)
        return compare(known, shown)

    monkeypatch.setattr(hmac, "compare_digest", watch)
    ring = Keyring([key(), key("bob", "sk-bob"), key("carl", "sk-carl")])
    assert ring.find([SECRET]) == key()
    assert compared == [one.digest for one in ring.keys]


def test_keys_of_all_sources(tmp_path: Path) -> None:
    """Settings, a file from the settings' folder, systemd's credential."""
    (tmp_path / "keys.yaml").write_text("- {name: bob, key: sk-bob, names: [x]}\n")
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "api-keys").write_text("carl:sk-carl\nalice:sk-SECRET\n")
    settings = Settings(api_keys=(key(),), api_keys_file="keys.yaml")
    ring = load_keyring(settings, tmp_path, {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")})
    assert [one.name for one in ring.keys] == ["alice", "bob", "carl"]
    assert load_keyring(Settings(), tmp_path, {"CREDENTIALS_DIRECTORY": str(tmp_path)}).keys == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [(None, "No such file"), ("# none\n", "has no API key"), ("x\n", "expected name:key"), ("eve:sk-SECRET\n", "same")],
)
def test_a_source_that_cannot_be_used_is_an_error(tmp_path: Path, text: str | None, problem: str) -> None:
    """Else its absence would let everybody in."""
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigErrors, match=problem) as caught:
        load_keyring(Settings(api_keys=(key(),), api_keys_file="keys"), tmp_path, {})
    assert "SECRET" not in str(caught.value)


# -- what a key may use --


def test_names_and_model_of_a_key() -> None:
    """Names and globs; its own model always; without `names` all."""
    confined = key(names=("exact", "gpt-*"), model="own")
    assert [may_use(confined, name) for name in ("exact", "gpt-4", "own", "Exact", "other")] == [True] * 3 + [False] * 2
    assert may_use(None, "x")
    assert may_use(key(), "x")
    assert named_by(confined, "x") == "own"
    assert named_by(key(), "x") == named_by(None, "x") == "x"


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b'{"a": [1, 2.50]}', {"a": [1, 2.5], "model": "m"}),
        (b'{"model": null}', {"model": "m"}),
        (b'{"model": "x"}', {"model": "x"}),
        (b'{"model": 5}', {"model": 5}),
    ],
)
def test_a_request_without_a_model_gets_the_keys(body: bytes, wanted: object) -> None:
    """Only then."""
    assert json.loads(with_model(body, "m")) == wanted


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_left_as_it_is(body: bytes) -> None:
    """Its parser says what is wrong."""
    assert with_model(body, "m") == body


# -- bodies --


def pack(encoding: str, body: bytes) -> bytes:
    """Return a body as a client sends it."""
    raw = zlib.compressobj(wbits=-15)
    return {
        "": body,
        "gzip": gzip.compress(body),
        "deflate": zlib.compress(body),
        "raw deflate": raw.compress(body) + raw.flush(),
    }[encoding]


@given(st.sampled_from(["", "gzip", "deflate", "raw deflate"]), st.binary(max_size=3000), st.integers(1, 400))
def test_a_body_is_unpacked_however_it_is_cut(encoding: str, body: bytes, step: int) -> None:
    """Up to the limit, which counts unpacked bytes; broken off it is the client's error."""
    sent = pack(encoding, body)
    pieces = [sent[at : at + step] for at in range(0, len(sent), step)]
    unpacker = Unpacker(encoding.removeprefix("raw "), 3000)
    for piece in pieces:
        unpacker.push(piece)
    assert unpacker.finish() == body
    if encoding:
        cut = Unpacker(encoding.removeprefix("raw "), 3000)
        for piece in pieces[:-1]:
            cut.push(piece)
        with pytest.raises(BadRequest, match="ends in the middle"):
            cut.finish()
    if body:
        small = Unpacker(encoding.removeprefix("raw "), len(body) - 1)
        with pytest.raises(BodyTooLarge):  # at whatever piece
            collections.deque(map(small.push, pieces), maxlen=0)


def test_gzip_in_several_parts_and_what_is_not_packed() -> None:
    """As RFC 1952 allows; an encoding that is not known is refused at once."""
    unpacker = Unpacker("gzip", 100)
    unpacker.push(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert unpacker.finish() == b"one two"
    for encoding in ("gzip", "deflate"):
        with pytest.raises(BadRequest, match="Content-Encoding"):
            Unpacker(encoding, 100).push(b'{"model": "x"}')
    with pytest.raises(EncodingUnsupported):
        Unpacker("br", 100)


def test_a_gzip_bomb_takes_no_memory() -> None:
    """A gigabyte of zeros against a limit of one mebibyte."""
    zeros = zlib.compressobj(wbits=31)
    bomb = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(1024)) + zeros.flush()
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            Unpacker("gzip", 1 << 20).push(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# -- origins, addresses --


def test_origins() -> None:
    """Only those that are listed; others get nothing, and caches are told that it depends."""
    asked = {"Origin": "https://a.example"}
    assert cors_headers((), asked) == {}
    assert cors_headers(("*",), {}) == {}
    assert cors_headers(("*",), asked)["Access-Control-Allow-Origin"] == "*"
    listed = cors_headers(("https://a.example",), asked)
    assert (listed["Access-Control-Allow-Origin"], listed["Vary"]) == ("https://a.example", "Origin")
    assert cors_headers(("https://b.example",), asked) == {"Vary": "Origin"}
    asked["Access-Control-Request-Headers"] = "authorization, anthropic-version"
    told = preflight_headers("GET", asked)
    assert told["Access-Control-Allow-Headers"] == "authorization, anthropic-version"
    assert "Access-Control-Allow-Headers" not in preflight_headers("GET", {"Access-Control-Request-Headers": "a\r\nb"})


async def test_addresses_that_others_can_reach() -> None:
    """All of 127.0.0.0/8, ::1 and names that lead there are loopback; an unspecified address is not."""
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost", "::ffff:127.0.0.1"):
        assert not await is_public(host)
    for host in ("0.0.0.0", "::", "192.0.2.1", "::ffff:0.0.0.0"):  # noqa: S104
        assert await is_public(host)


# -- a daemon with keys --


@pytest.fixture(scope="module")
def served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose keys are of every kind."""
    import conftest  # noqa: PLC0415 - its factory is a function fixture; this one lives longer

    started = conftest.daemon.__wrapped__(tmp_path_factory)  # type: ignore[attr-defined]
    start: StartDaemon = next(started)
    settings = {
        "api_keys": [
            "alice:sk-SECRET-a",
            {"name": "bob", "key": "sk-SECRET-b", "model": "tiny-llama"},
            {"name": "eve", "key": "sk-SECRET-e", "names": ["one", "gpt-*"]},
        ],
        "cors_origins": ["https://a.example"],
        "load": {"ctx_size": 512, "threads": 1},
    }
    configs = {
        "one.yaml": "name: one\nshas: ['*']\n",
        "oneself.yaml": "name: oneself\nshas: ['*']\n",
        "gpt.yaml": "name: gpt\nshas: ['*']\nmodel_names: ['gpt-*']\n",
    }
    yield start([tiny_llama], configs, settings=settings)
    next(started, None)


async def call(
    served: Daemon,
    method: str,
    path: str,
    key: str = "",
    **options: Any,  # noqa: ANN401 - what aiohttp takes
) -> tuple[int, Mapping[str, str], Any]:
    """Return status, headers and what was answered."""
    headers = {"x-api-key": key} if key else {}
    async with (
        aiohttp.ClientSession(served.base_url) as http,
        http.request(method, path, **{"headers": headers, **options}) as answer,
    ):
        raw = await answer.read()
        return answer.status, answer.headers, json.loads(raw) if answer.content_type.endswith("json") else raw


def test_the_official_clients_show_their_keys(served: Daemon) -> None:
    """OpenAI's as Bearer, Anthropic's and Azure's in headers of their own; a wrong one is their AuthenticationError."""
    with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="sk-SECRET-a", max_retries=0) as client:
        assert client.completions.create(model="one", prompt="x", max_tokens=1).model == "one"
        with pytest.raises(openai.AuthenticationError) as caught:
            client.with_options(api_key="sk-WRONG").models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.type == "invalid_request_error"
    assert caught.value.response.headers["WWW-Authenticate"] == "Bearer"
    assert caught.value.request_id
    with anthropic.Anthropic(base_url=served.base_url, api_key="sk-SECRET-a", max_retries=0) as other:
        assert other.get("/v1/models", cast_to=object)
        with pytest.raises(anthropic.AuthenticationError):
            other.with_options(api_key="sk-WRONG").get("/v1/models", cast_to=object)


async def test_without_a_key_only_the_open_paths_answer(served: Daemon) -> None:
    """401 in OpenAI's envelope elsewhere, before the body is looked at."""
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert (await call(served, "GET", path))[0] == 200
    keyed = ("GET /v1/models", "POST /v1/chat/completions", "GET /metrics", "GET /localaid/status")
    for method, path in map(str.split, keyed):
        status, headers, told = await call(served, method, path)
        assert (status, told["error"]["code"], headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
        assert "No API key" in told["error"]["message"]
        status, _, told = await call(served, method, path, "sk-WRONG")
        assert (status, told["error"]["code"], "WRONG" in told["error"]["message"]) == (401, "invalid_api_key", False)


async def test_a_keys_model_answers_whatever_is_asked_for(served: Daemon) -> None:
    """The answer has the name that was asked for, or the key's where there was none."""
    for asked, told in (({"model": "invented"}, "invented"), ({}, "tiny-llama"), ({"model": None}, "tiny-llama")):
        body = {"prompt": "x", "max_tokens": 1, **asked}
        status, headers, answer = await call(
            served, "POST", COMPLETIONS, json=body, headers={"api-key": "sk-SECRET-b", "X-Localaid-Explain": "1"}
        )
        assert (status, answer.get("model")) == (200, told), answer
        assert headers["X-Localaid-Rule"] == "tiny-llama"
    status, _, card = await call(served, "GET", "/v1/models/invented", "sk-SECRET-b")
    assert (status, card["id"]) == (200, "invented")


async def test_names_that_a_key_may_not_use_do_not_exist(served: Daemon) -> None:
    """Neither listed, nor served, nor hinted at; the error is that of a name that nobody serves."""
    _, _, told = await call(served, "GET", "/v1/models", "sk-SECRET-e")
    assert [card["id"] for card in told["data"]] == ["one"]
    for name in ("one", "gpt-4"):
        assert (await call(served, "GET", f"/v1/models/{name}", "sk-SECRET-e"))[0] == 200
        body = {"model": name, "prompt": "x", "max_tokens": 1}
        assert (await call(served, "POST", COMPLETIONS, "sk-SECRET-e", json=body))[0] == 200
    messages = []
    for name in ("oneself", "oneselv"):
        status, _, told = await call(served, "POST", COMPLETIONS, "sk-SECRET-e", json={"model": name, "prompt": "x"})
        assert (status, told["error"]["code"]) == (404, "model_not_found")
        messages.append(told["error"]["message"].replace(name, "NAME"))
        status, _, told = await call(served, "GET", f"/v1/models/{name}", "sk-SECRET-e")
        assert (status, told["error"]["code"]) == (404, "model_not_found")
        messages.append(told["error"]["message"].replace(name, "NAME"))
    assert messages[:2] == messages[2:]
    assert "did you mean 'one'?" in messages[0]
    _, _, told = await call(served, "POST", COMPLETIONS, "sk-SECRET-a", json={"model": "oneselv", "prompt": "x"})
    assert "'oneself'" in told["error"]["message"]


async def test_a_confined_key_sees_nothing_of_the_others(served: Daemon) -> None:
    """Metrics and status tell of all models."""
    for path in ("/metrics", "/localaid/status", "/localaid/explain?path=v1/chat&name=one"):
        for secret in ("sk-SECRET-b", "sk-SECRET-e"):
            status, _, told = await call(served, "GET", path, secret)
            assert (status, told["error"]["code"]) == (403, "key_confined")
        assert (await call(served, "GET", path, "sk-SECRET-a"))[0] == 200


async def test_metrics_and_log_have_names_and_no_key(served: Daemon) -> None:
    """Key, path and rule by name; never the client's model name as a label, never a key, never a prompt."""
    body = {"model": "gpt-invented-by-a-client", "prompt": "a very private prompt", "max_tokens": 2, "ignore_eos": True}
    status, headers, _ = await call(served, "POST", COMPLETIONS, "sk-SECRET-a", json=body)
    assert status == 200
    await call(served, "GET", "/no/such/path?sk-SECRET-a", "sk-SECRET-a")
    _, _, raw = await call(served, "GET", "/metrics", "sk-SECRET-a")
    told = raw.decode()
    assert 'localaid_tokens_total{key="alice",kind="completion",rule="gpt"}' in told
    assert 'localaid_requests_total{key="alice",path="/v1/completions",status="200"}' in told
    assert 'localaid_time_to_first_token_seconds_count{path="/v1/completions",rule="gpt"}' in told
    assert 'localaid_requests_total{key="",path="other",status="404"}' in told
    assert 'localaid_workers{state="loaded"} 1.0' in told
    assert "localaid_requests_waiting{" in told
    assert "invented-by-a-client" not in told
    line = served.process.wait_for_line(f"{headers['X-Request-Id']} cmpl-").string
    assert "alice POST /v1/completions 'gpt-invented-by-a-client' -> 'gpt' -> " in line
    assert "2 completion tokens" in line
    for text in (told, served.log, json.dumps((await call(served, "GET", "/localaid/status", "sk-SECRET-a"))[2])):
        assert "SECRET" not in text
        assert "private" not in text


async def test_metrics_in_both_formats(served: Daemon) -> None:
    """As Prometheus asks for them."""
    openmetrics = "application/openmetrics-text"
    for accept, kind in (("", "text/plain"), (f"{openmetrics}; version=1.0.0", openmetrics)):
        _, headers, _ = await call(served, "GET", "/metrics", headers={"x-api-key": "sk-SECRET-a", "Accept": accept})
        assert headers["Content-Type"].startswith(kind)


async def test_browsers_are_told_what_they_may(served: Daemon) -> None:
    """A preflight needs no key; errors and streams can be read too; other origins get no leave."""
    asked = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-api-key,anthropic-version",
    }
    status, headers, _ = await call(served, "OPTIONS", "/v1/messages/", headers=asked)
    assert (status, headers["Access-Control-Allow-Origin"]) == (204, "https://a.example")
    assert headers["Access-Control-Allow-Headers"] == asked["Access-Control-Request-Headers"]
    assert "POST" in headers["Access-Control-Allow-Methods"]
    origin = {"Origin": "https://a.example", "x-api-key": "sk-SECRET-a"}
    body = {"model": "one", "prompt": "x", "max_tokens": 1, "stream": True}
    for path, fields, wanted in ((COMPLETIONS, body, 200), (COMPLETIONS, {}, 400), ("/none", {}, 404)):
        status, headers, _ = await call(served, "POST", path, headers=origin, json=fields)
        assert (status, headers["Access-Control-Allow-Origin"]) == (wanted, "https://a.example")
    status, headers, _ = await call(served, "GET", "/v1/models", headers={"Origin": "https://a.example"})
    assert (status, headers["Access-Control-Allow-Origin"]) == (401, "https://a.example")
    _, headers, _ = await call(served, "OPTIONS", COMPLETIONS, headers={**asked, "Origin": "https://b.example"})
    assert "Access-Control-Allow-Origin" not in headers


def test_status_and_explain_take_a_key(served: Daemon, tmp_path: Path) -> None:
    """From the environment or the command line; without one the remedy is named."""
    listen = served.base_url.removeprefix("http://")

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        full = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **env}
        command = [sys.executable, str(PROGRAM), *arguments, "--listen", listen]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=full)

    assert run("status", LOCALAID_API_KEY="sk-SECRET-a").returncode == 0
    assert run("explain", "v1/chat", "one", "--api-key", "sk-SECRET-a").returncode == 0
    refused = run("status")
    assert (refused.returncode, "$LOCALAID_API_KEY" in refused.stderr) == (1, True)
    assert "SECRET" not in run("status", LOCALAID_API_KEY="sk-SECRET-e").stderr


# -- keys that change; addresses without keys --


def test_keys_are_taken_live_and_a_broken_file_keeps_them(
    daemon: StartDaemon, tiny_llama: Path, tmp_path: Path
) -> None:
    """When the file changes, and at SIGHUP; nobody is let in for want of a file."""
    keys = tmp_path / "keys"
    keys.write_text("alice:sk-SECRET-1\n")
    served = daemon([tiny_llama], settings={"api_keys_file": str(keys), "load": {"ctx_size": 512}})

    def status(secret: str) -> int:
        return asyncio.run(call(served, "GET", "/v1/models", secret))[0]

    assert (status("sk-SECRET-1"), status("")) == (200, 401)
    keys.write_text("alice:sk-SECRET-1\nbob:sk-SECRET-2\n")
    served.process.wait_for_line("API keys: now of alice, bob")
    assert status("sk-SECRET-2") == 200
    partial = tmp_path / "partial"
    partial.write_text("carl:sk-SECRET-3\n")
    partial.rename(keys)
    served.process.wait_for_line("API keys: now of carl")
    assert (status("sk-SECRET-3"), status("sk-SECRET-2")) == (200, 401)
    for text, problem in (("carl sk-SECRET-4\n", "expected name:key"), ("", "has no API key")):
        keys.write_text(text)
        served.process.wait_for_line(f"{problem}.*the API keys in force stay")
        assert (status("sk-SECRET-3"), status("")) == (200, 401)
    keys.unlink()
    served.process.wait_for_line("No such file.*the API keys in force stay")
    told = asyncio.run(call(served, "GET", "/localaid/status", "sk-SECRET-3"))[2]
    assert any("No such file" in problem for problem in told["problems"])
    served.settings.write_bytes(msgspec.yaml.encode({"api_keys": ["dora:sk-SECRET-5"], "control": "open"}))
    served.process.signal(signal.SIGHUP)
    served.process.wait_for_line("API keys: now of dora")
    assert (status("sk-SECRET-5"), status("sk-SECRET-3")) == (200, 401)
    assert asyncio.run(call(served, "GET", "/localaid/status"))[0] == 200
    assert "SECRET" not in served.log


def test_without_keys_only_this_machine_is_served(daemon: StartDaemon, tmp_path: Path) -> None:
    """Else it does not start, and says what to do; a key, or the setting, lets it."""
    folders = [f"--{name}={tmp_path}" for name in ("models", "configs", "state")]
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    process = LocalaidProcess(PROGRAM, ["serve", *folders, "--listen", "0.0.0.0:0"], home)
    assert process.process.wait(60) == 1
    assert "allow_without_keys: true" in process.wait_for_line("will not listen on 0.0.0.0:0").string
    allowed = daemon(settings={"allow_without_keys": True}, listen="0.0.0.0:0")
    assert allowed.process.stop() == 0
    keyed = daemon(settings={"api_keys": ["alice:sk-SECRET"]}, listen="0.0.0.0:0")
    keyed.settings.write_text("queue_size: 5\n")
    keyed.process.signal(signal.SIGHUP)
    keyed.process.wait_for_line("will not listen on .*the API keys in force stay")
    port = int(keyed.base_url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as plain:
        plain.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b" 401 " in plain.makefile("rb").readline()


def test_the_credential_of_systemd(daemon: StartDaemon, tmp_path: Path) -> None:
    """`LoadCredential=api-keys:...` is all it takes."""
    (tmp_path / "api-keys").write_text("alice:sk-SECRET\n")
    served = daemon(env={"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert asyncio.run(call(served, "GET", "/v1/models"))[0] == 401
    assert asyncio.run(call(served, "GET", "/v1/models", "sk-SECRET"))[0] == 200
