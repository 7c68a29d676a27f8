"""Who may ask, without API keys, and what answers: names of this machine, web pages, no `model`, the list of models."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from conftest import PROGRAM, Daemon, StartDaemon
from processes import LocalaidProcess

pytestmark = pytest.mark.outside
Headers = dict[str, str]
LOAD = {"load": {"ctx_size": 512, "threads": 1}}
TEXT = {"prompt": "x", "max_tokens": 1}


async def ask(served: Daemon, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Headers, Any]:
    """Return status, headers and JSON (else text) of an answer; underscores in names of headers are hyphens."""
    connector = None
    base = served.base_url
    if base.startswith("unix:"):
        connector, base = aiohttp.UnixConnector(base.removeprefix("unix:")), "http://anything"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        aiohttp.ClientSession(connector=connector, max_line_size=1 << 20, max_field_size=1 << 20) as http,
        http.request(method, base + path, data=None if body is None else json.dumps(body), headers=named) as answer,
    ):
        raw = await answer.read()
        is_json = answer.content_type == "application/json" and raw
        return answer.status, dict(answer.headers), json.loads(raw) if is_json else raw.decode()


# -- names of this machine --


async def test_a_strange_name_is_refused(shared: Daemon) -> None:
    """DNS rebinding: a page's own name that leads here reads nothing, on no route, and is told what to do."""
    for method, path in (("GET", "/localaid/status"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
        for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[::1", "192.0.2.1"):
            status, _, told = await ask(shared, method, path, {} if method == "POST" else None, Host=host)
            assert (status, told["error"]["code"]) == (403, "host_refused"), (path, host)
            assert "`hosts`" in told["error"]["message"]
    assert (await ask(shared, "GET", "/healthz", Host="evil.example"))[0] == 200  # it tells nothing


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost:1", "a.localhost", "127.0.0.1:8080", "127.8.8.8", "[::1]:8080", "[::ffff:127.0.0.1]"],
)
async def test_loopback_names_are_ours(shared: Daemon, host: str) -> None:
    """Whatever port they have: a tunnel or a container may have another one."""
    assert (await ask(shared, "GET", "/v1/models", Host=host))[0] == 200


async def test_names_of_the_settings_are_ours(daemon: StartDaemon) -> None:
    """As a proxy passes them on; with keys the key says who may, and over a unix socket comes no browser."""
    named = daemon(settings={"hosts": ["LLM.example.org."]})
    assert (await ask(named, "GET", "/v1/models", Host="llm.example.org:443"))[0] == 200
    assert (await ask(named, "GET", "/v1/models", Host="other.example.org"))[0] == 403
    keyed = daemon(settings={"api_keys": ["anna:s3cret"]})
    assert (await ask(keyed, "GET", "/v1/models", Host="x.example", x_api_key="s3cret"))[0] == 200
    socket_path = named.folder / "http.sock"
    local = daemon(listen=f"unix:{socket_path}")
    assert (await ask(local, "GET", "/v1/models", Host="x.example"))[0] == 200


async def test_the_address_that_was_reached_is_ours(daemon: StartDaemon) -> None:
    """With `allow_without_keys`, whoever asks at an address of this machine is answered under it."""
    served = daemon(settings={"allow_without_keys": True}, listen="0.0.0.0:0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only chooses an address
        own = probe.getsockname()[0]
    port = served.base_url.rpartition(":")[2]
    async with aiohttp.ClientSession() as http:
        async with http.get(f"http://{own}:{port}/v1/models") as answer:
            assert answer.status == 200
        async with http.get(f"http://{own}:{port}/v1/models", headers={"Host": "evil.example"}) as answer:
            assert answer.status == 403


# -- web pages --


async def test_a_page_elsewhere_makes_nothing_happen(shared: Daemon) -> None:
    """A form's POST needs no leave of a browser's: it is refused on every route; what the page itself serves is not."""
    document = (await ask(shared, "GET", "/openapi.json"))[2]
    routes = [
        (method.upper(), path.replace("{id}", "x"))
        for path, operations in document["paths"].items()
        for method in operations
        if method != "get"
    ]
    assert len(routes) > 15
    for origin in ("https://evil.example", "null", "http://localhost:3000"):
        for method, path in routes:
            status, _, told = await ask(shared, method, path, {}, Origin=origin, Content_Type="text/plain")
            assert status == 403, (method, path, told)
            assert "origin_refused" in json.dumps(told) or "cors_origins" in json.dumps(told)
    body = {"model": "tiny-llama", **TEXT}
    assert (await ask(shared, "POST", "/v1/completions", body, Origin=shared.base_url))[0] == 200


async def test_localhost_among_origins_means_any_port(daemon: StartDaemon, tiny_llama: Path) -> None:
    """`cors_origins: [localhost]`: pages of this machine may ask and read; others may not."""
    served = daemon([tiny_llama], settings={"cors_origins": ["localhost"], **LOAD})
    body = {"model": "tiny-llama", **TEXT}
    for origin in ("http://localhost:3000", "http://127.0.0.1:5173", "https://app.localhost", "http://[::1]:80"):
        status, headers, _ = await ask(served, "POST", "/v1/completions", body, Origin=origin)
        assert (status, headers["Access-Control-Allow-Origin"], headers["Vary"]) == (200, origin, "Origin")
    for origin in ("http://localhost.evil.example", "https://evil.example"):
        status, headers, _ = await ask(served, "POST", "/v1/completions", body, Origin=origin)
        assert status == 403
        assert "Access-Control-Allow-Origin" not in headers


# -- addresses --


async def test_several_addresses(daemon: StartDaemon, tiny_llama: Path, tmp_path: Path) -> None:
    """`listen` takes a list: each answers."""
    first = daemon([tiny_llama], settings=LOAD, listen=f"unix:{tmp_path}/a.sock")
    assert (await ask(first, "GET", "/v1/models"))[0] == 200
    first.process.stop()
    text = first.settings.read_text() + f"\nlisten: ['127.0.0.1:0', 'unix:{tmp_path}/b.sock']\n"
    first.settings.write_text(text)
    folders = ["--models", str(first.models), "--configs", str(first.configs), "--state", str(first.state)]
    process = LocalaidProcess(PROGRAM, ["serve", *folders, "--settings", str(first.settings)])
    try:
        ready = process.wait_for_line("ready on (.*)").group(1)
        tcp, unix = ready.split(", ")
        assert unix == f"unix:{tmp_path}/b.sock"
        connector = aiohttp.UnixConnector(f"{tmp_path}/b.sock")
        async with aiohttp.ClientSession() as http, http.get(f"{tcp}/v1/models") as answer:
            assert answer.status == 200
        async with aiohttp.ClientSession(connector=connector) as http, http.get("http://x/v1/models") as answer:
            assert answer.status == 200
    finally:
        assert process.stop() == 0


# -- no model --


async def test_the_only_model_needs_no_name(daemon: StartDaemon, tiny_llama: Path) -> None:
    """On every route, absent, null or empty; the answer says who it was, and one copy of it is in memory."""
    served = daemon([tiny_llama], settings=LOAD)
    for given in ({}, {"model": None}, {"model": ""}):
        status, _, told = await ask(served, "POST", "/v1/completions", {**TEXT, **given})
        assert (status, told["model"]) == (200, "tiny-llama")
    messages = [{"role": "user", "content": "hi"}]
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/apply-template"):
        assert (await ask(served, "POST", path, {"messages": messages, "max_tokens": 1}))[0] == 200, path
    assert (await ask(served, "POST", "/v1/responses", {"input": "hi", "max_output_tokens": 16}))[0] == 200
    assert (await ask(served, "POST", "/tokenize", {"content": "hi"}))[0] == 200
    assert (await ask(served, "POST", "/v1/embeddings", {"input": "hi"}))[0] in (400, 404)  # it makes none
    assert len(served.process.workers()) == 1


async def test_the_users_only_rule_needs_no_name(daemon: StartDaemon, tiny_llama: Path, smollm2: Path) -> None:
    """For its path; the token routes take the same, not the alphabetically first, which would load a second copy."""
    configs = {"zebra.yaml": "name: zebra\nshas: [tiny-llama.gguf]\nctx_size: 256\nmodel_names: [zebra, ape]\n"}
    served = daemon([tiny_llama, smollm2], configs, settings=LOAD)
    status, _, told = await ask(served, "POST", "/v1/completions", TEXT)
    assert (status, told["model"]) == (200, "zebra")
    for path, body in (
        ("/tokenize", {"content": "hi"}),
        ("/apply-template", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        assert (await ask(served, "POST", path, body))[0] == 200
    assert len(served.process.workers()) == 1


async def test_where_several_may_be_meant_they_are_named(daemon: StartDaemon, tiny_llama: Path, smollm2: Path) -> None:
    """A 400 that names `model` and some names."""
    served = daemon([tiny_llama, smollm2], settings=LOAD)
    for path in ("/v1/completions", "/tokenize", "/v1/messages"):
        status, _, told = await ask(served, "POST", path, TEXT)
        assert status == 400
        assert "`model` is missing; name one, such as `" in told["error"]["message"]


# -- the list of models --


async def test_models_and_their_aliases(daemon: StartDaemon, tiny_llama: Path, smollm2: Path) -> None:
    """Each entry names the others of its file; `list_names: few` shows the user's, and one for each other file."""
    configs = {"mine.yaml": "name: mine\nshas: [tiny-llama.gguf]\nmodel_names: [mine, also-mine]\n"}
    served = daemon([tiny_llama, smollm2], configs, settings=LOAD)
    cards = {card["id"]: card for card in (await ask(served, "GET", "/v1/models"))[2]["data"]}
    assert set(cards["mine"]["aliases"]) >= {"also-mine", "tiny-llama"}
    assert "mine" not in cards["mine"]["aliases"]
    assert set(cards["mine"]["aliases"]).isdisjoint(cards["smollm2-135m-instruct"]["aliases"])
    served.settings.write_text("list_names: few\n" + served.settings.read_text())
    served.process.signal(signal.SIGHUP)
    served.process.wait_for_line("list_names")
    few = {card["id"] for card in (await ask(served, "GET", "/v1/models"))[2]["data"]}
    assert few > {"mine", "also-mine"}
    (other,) = few - {"mine", "also-mine"}
    assert other in {"smollm2-135m-instruct", *cards["smollm2-135m-instruct"]["aliases"]}


# -- routes --


async def test_routes_that_programs_ask_first(shared: Daemon) -> None:
    """`HEAD /` of Claude Code, `/health` of llama-server's clients."""
    assert (await ask(shared, "HEAD", "/"))[0] == 200
    assert "localaid" in (await ask(shared, "GET", "/"))[2]
    for path in ("/health", "/v1/health"):
        assert (await ask(shared, "GET", path))[::2] == (200, {"status": "ok"})
        assert (await ask(shared, "HEAD", path))[0] == 200


async def test_rerank_under_all_its_names(shared: Daemon) -> None:
    """Jina's, llama-server's, Cohere's."""
    body = {"model": "tiny-reranker", "query": "a", "documents": ["a", "b"]}
    for path in ("/v1/rerank", "/rerank", "/v1/reranking", "/v2/rerank"):
        assert (await ask(shared, "POST", path, body))[0] == 200, path


async def test_counting_tokens_uses_none(daemon: StartDaemon, tiny_llama: Path) -> None:
    """In /metrics there are only those that a model has read for an answer."""
    served = daemon([tiny_llama], settings=LOAD)
    messages = [{"role": "user", "content": "hi"}]
    for path, body in (
        ("/tokenize", {"content": "hello there"}),
        ("/detokenize", {"tokens": [300, 301]}),
        ("/apply-template", {"messages": messages}),
        ("/v1/messages/count_tokens", {"messages": messages}),
        ("/v1/responses/input_tokens", {"input": "hi"}),
    ):
        assert (await ask(served, "POST", path, body))[0] == 200, path
    metrics = (await ask(served, "GET", "/metrics"))[2]
    assert 'kind="prompt"' not in metrics
    assert (await ask(served, "POST", "/v1/completions", TEXT))[0] == 200
    assert 'kind="prompt"' in (await ask(served, "GET", "/metrics"))[2]


async def test_a_wrong_method_is_told_the_right_one(shared: Daemon) -> None:
    """In words and in `Allow`."""
    for path in ("/v1/chat/completions", "/chat/completions", "/v1/messages"):
        status, headers, told = await ask(shared, "GET", path)
        assert (status, headers["Allow"]) == (405, "OPTIONS, POST")
        assert told["error"]["message"] == f"{path} takes POST, not GET."


async def test_large_heads(shared: Daemon) -> None:
    """20 kB of cookies, as a browser has them for localhost, are borne; 100 kB get the envelope as all errors do."""
    assert (await ask(shared, "GET", "/v1/models", Cookie="a" * 20_000))[0] == 200
    for headers in ({"Cookie": "a" * 100_000}, {"X-Secret\x01": "b"}):
        host, _, port = shared.base_url.removeprefix("http://").rpartition(":")
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
            answered = raw.makefile("rb").read()
        head, _, body = answered.partition(b"\r\n\r\n")
        assert b" 400 " in head.splitlines()[0]
        assert json.loads(body)["error"]["code"] == "bad_http"
