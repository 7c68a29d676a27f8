"""ENCODE: embeddings, rerank and the token routes of a real daemon, through the official client where it has them."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import openai
import pytest

import localaid
from conftest import Daemon, StartDaemon
from models import english

CONFIG = """\
name: both
shas: [sub/chat.gguf]
model_names: [both]
paths: [v1/chat, v1/embeddings]
---
name: averaged
shas: [sub/chat.gguf]
model_names: [averaged]
paths: [v1/embeddings]
pooling: mean
---
name: any
shas: ["*"]
model_names: [any]
paths: [v1/chat, v1/embeddings]
"""


@pytest.fixture
def served(daemon: StartDaemon, minilm: Path, tiny_llama: Path, tiny_reranker: Path) -> Daemon:
    """A daemon with an embedder, a chat model and a reranker."""
    models = {"minilm.gguf": minilm, "chat.gguf": tiny_llama, "reranker.gguf": tiny_reranker}
    return daemon(models, {"rules.yaml": CONFIG.replace("sub/", "")}, settings={"load": {"threads": 2}})


@pytest.fixture
def client(served: Daemon) -> Iterator[openai.OpenAI]:
    """OpenAI's client for it."""
    with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(served: Daemon, path: str, body: object) -> tuple[int, dict[str, object]]:
    """POST JSON; return status and body."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(served.base_url + path, data, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


# -- embeddings --


def test_openai_client(served: Daemon, client: openai.OpenAI) -> None:
    """The client asks for base64 of itself; floats are the same numbers, token ids the same text; usage counts."""
    texts = ["one text", english(40, 1), "third"]
    packed = client.embeddings.create(model="minilm", input=texts)
    plain = client.embeddings.create(model="minilm", input=texts, encoding_format="float")
    assert [entry.index for entry in packed.data] == [0, 1, 2]
    assert [entry.embedding for entry in packed.data] == [entry.embedding for entry in plain.data]
    assert (packed.model, packed.object, packed.data[0].object) == ("minilm", "list", "embedding")
    assert len(packed.data[0].embedding) == 384
    tokens = [post(served, "/tokenize", {"content": text, "add_special": True})[1]["tokens"] for text in texts]
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == sum(map(len, tokens))  # type: ignore[arg-type]
    fed = client.embeddings.create(model="minilm", input=tokens)  # type: ignore[arg-type]
    near = np.array([entry.embedding for entry in fed.data]) - [entry.embedding for entry in packed.data]
    assert np.abs(near).max() < 2e-3
    single = client.embeddings.create(model="minilm", input="one text", dimensions=8, user="me")
    assert [len(entry.embedding) for entry in single.data] == [8]


def test_many_inputs(client: openai.OpenAI) -> None:
    """2,048 inputs are answered in order; one more is refused."""
    answer = client.embeddings.create(model="minilm", input=[f"{number % 7}" for number in range(2048)])
    vectors = np.array([entry.embedding for entry in answer.data])
    assert vectors.shape == (2048, 384)
    assert ((vectors[:7] @ vectors[7:14].T).argmax(axis=1) == np.arange(7)).all()
    with pytest.raises(openai.BadRequestError, match="at most 2048 items") as told:
        client.embeddings.create(model="minilm", input=["a"] * 2049)
    assert told.value.param == "input"


@pytest.mark.parametrize(
    ("body", "param", "code", "text"),
    [
        ({"input": ""}, "input", "invalid_value", "must not be empty"),
        ({"input": []}, "input", "invalid_value", "at least 1 item"),
        ({"input": ["a", ""]}, "input[1]", "invalid_value", "must not be empty"),
        ({"input": ["a", 3]}, "input", "invalid_value", "lists of token ids"),
        ({"input": "a", "dimensions": 385}, "dimensions", "invalid_value", "at most 384"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value", "at least 1"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value", "int8"),
        ({"input": [99999]}, "input[0]", "invalid_value", "99999"),
        ({"input": ["a", "word " * 600]}, "input", "context_length_exceeded", "takes 512 tokens.*item 1.*has 602"),
        ({}, "input", "invalid_value", "is missing"),
    ],
)
def test_bad_requests(served: Daemon, body: dict[str, object], param: str, code: str, text: str) -> None:
    """What is wrong is a 400 that names the field; nothing is cut silently."""
    status, error = post(served, "/v1/embeddings", {"model": "minilm", **body})
    assert (status, error["param"], error["code"]) == (400, param, code), error
    assert re.search(text, str(error["message"])), error


def test_a_rule_lets_a_chat_model_embed(served: Daemon, client: openai.OpenAI) -> None:
    """Only where a rule lists the path; ways of pooling share the worker; a model made for it comes before."""

    def vector(model: str) -> list[float]:
        return client.embeddings.create(model=model, input="the river and the stone").data[0].embedding

    last, mean = np.array(vector("both")), np.array(vector("averaged"))
    assert (last.shape, mean.shape) == ((64,), (64,))
    assert last @ mean < 0.999
    assert client.chat.completions.create(
        model="both", messages=[{"role": "user", "content": "hi"}], max_tokens=2
    ).usage
    assert len(vector("any")) == 384
    with pytest.raises(openai.NotFoundError, match="cannot serve this path"):
        vector("chat")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="minilm", messages=[{"role": "user", "content": "hi"}])
    assert sorted(worker.file for worker in workers_of(served)) == ["chat.gguf", "minilm.gguf"]


def workers_of(served: Daemon) -> tuple[localaid.WorkerStatus, ...]:
    """Return what the daemon says of its workers."""
    with urllib.request.urlopen(f"{served.base_url}/localaid/status", timeout=30) as answer:  # noqa: S310
        return msgspec.json.decode(answer.read(), type=localaid.DaemonStatus).memory.workers


def test_listed_paths_have_routes(served: Daemon, client: openai.OpenAI) -> None:
    """/v1/models names the paths on which each model answers, and no other."""
    client.embeddings.create(model="minilm", input="x")  # both wait until their file is known
    client.post("/rerank", body={"model": "reranker", "query": "x", "documents": ["y"]}, cast_to=object)
    paths = {card.id: card.localaid["paths"] for card in client.models.list()}  # type: ignore[attr-defined]
    assert paths["minilm"] == [localaid.EMBEDDINGS]
    assert paths["reranker"] == [localaid.RERANK]
    assert localaid.EMBEDDINGS not in paths["chat"]
    assert {localaid.CHAT, localaid.EMBEDDINGS} <= set(paths["both"])
    for path in {path for listed in paths.values() for path in listed}:
        assert post(served, path, {})[0] == 400, path


async def test_cancelled_client_leaves_the_worker_free(served: Daemon) -> None:
    """A client that goes is not served to the end: the worker is idle as soon as the daemon knows."""
    async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
        await client.embeddings.create(model="minilm", input="warm")
        texts = [english(300, number) for number in range(1500)]
        asking = asyncio.create_task(client.embeddings.create(model="minilm", input=texts))
        async with asyncio.timeout(60):
            while not any(worker.running for worker in await asyncio.to_thread(workers_of, served)):
                pass  # each look is a request: it cannot be told of it
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            answer = await client.embeddings.create(model="minilm", input="next")  # in time: not behind 1,500 texts
        assert len(answer.data) == 1


# -- rerank --


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/reranking"])
def test_rerank(served: Daemon, path: str) -> None:
    """Jina's and Cohere's shape: the best first, cut to top_n, with the documents where they are wanted."""
    documents = ["the stone", {"text": "a river"}, english(30, 1)]
    body = {"model": "reranker", "query": "the river", "documents": documents}
    status, whole = post(served, path, body)
    assert status == 200, whole
    results: list[dict[str, object]] = whole["results"]  # type: ignore[assignment]
    assert sorted(result["index"] for result in results) == [0, 1, 2]  # type: ignore[type-var]
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
    assert "document" not in results[0]
    assert whole["usage"]["prompt_tokens"] == whole["usage"]["total_tokens"] > 30  # type: ignore[index]
    _, cut = post(served, path, body | {"top_n": 2, "return_documents": True})
    texts = {0: "the stone", 1: "a river", 2: english(30, 1)}
    wanted = [result | {"document": {"text": texts[result["index"]]}} for result in results[:2]]  # type: ignore[index]
    assert cut["results"] == wanted


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": []}, "documents"),
        ({"documents": ["a", 3]}, "documents[1]"),
        ({"documents": ["a"], "query": ""}, "query"),
        ({"documents": ["a"], "top_n": 0}, "top_n"),
        ({"documents": ["fine", "the river " * 400]}, "documents"),
    ],
)
def test_bad_rerank(served: Daemon, body: dict[str, object], param: str) -> None:
    """What is wrong is a 400 that names the field."""
    status, error = post(served, "/v1/rerank", {"model": "reranker", "query": "q", **body})
    assert (status, error["param"]) == (400, param), error


# -- tokens --


def test_tokens_there_and_back(served: Daemon) -> None:
    """Any model that `model` names; pieces are text, or bytes where they are none; detokenize is the way back."""
    text = "the river: ünï"
    body = {"model": "chat", "content": text, "with_pieces": True}
    _, told = post(served, "/tokenize", body)
    pieces: list[dict[str, object]] = told["tokens"]  # type: ignore[assignment]
    assert any(isinstance(piece["piece"], list) for piece in pieces)
    assert b"".join(_bytes_of(piece["piece"]) for piece in pieces).decode() == f" {text}"
    tokens = [piece["id"] for piece in pieces]
    assert post(served, "/tokenize", {"model": "chat", "content": text})[1] == {"tokens": tokens}
    assert post(served, "/detokenize", {"model": "chat", "tokens": tokens})[1]["content"] == f" {text}"
    special = post(served, "/tokenize", {"model": "chat", "content": "</s>", "add_special": True})[1]["tokens"]
    plain = post(served, "/tokenize", {"model": "chat", "content": "</s>", "parse_special": False})[1]["tokens"]
    assert special == [1, 2]
    assert 2 not in plain  # type: ignore[operator]
    mixed = {"model": "chat", "content": [text, 2, text], "add_special": True}
    assert post(served, "/tokenize", mixed)[1] == {"tokens": [1, *tokens, 2, *tokens]}
    status, error = post(served, "/tokenize", {"model": "chat", "content": ["a", -1]})
    assert (status, error["param"]) == (400, "content[1]")
    status, error = post(served, "/detokenize", {"model": "chat", "tokens": [1, 100000]})
    assert (status, error["param"]) == (400, "tokens[1]")


def _bytes_of(piece: object) -> bytes:
    """Return a token's bytes as they were."""
    return piece.encode() if isinstance(piece, str) else bytes(msgspec.convert(piece, list[int]))


def test_model_may_be_left_out_where_there_is_one(served: Daemon, client: openai.OpenAI) -> None:
    """None in memory and several there: a 400 that names `model`; then the one in memory is meant."""
    status, error = post(served, "/tokenize", {"content": "hello"})
    assert (status, error["param"]) == (400, "model")
    assert "name one, such as `any`" in str(error["message"])
    client.embeddings.create(model="minilm", input="a")
    assert post(served, "/tokenize", {"content": "hello"})[1] == {"tokens": [7592]}
    assert post(served, "/tokenize", {"content": "hello", "model": "nobody"})[0] == 404


def test_apply_template(daemon: StartDaemon, tiny_llama: Path) -> None:
    """A chat is rendered as the rule says, and not answered; the only model is meant where none is named."""
    rule = "{name: chat, shas: ['*'], chat_user: '<U>', chat_assistant: '<A>', chat_prompt: Be kind.}"
    served = daemon([tiny_llama], {"a.yaml": rule})
    body = {"messages": [{"role": "user", "content": "hello"}]}
    status, told = post(served, "/apply-template", {**body, "model": "chat"})
    assert status == 200, told
    assert "Be kind." in str(told["prompt"])
    assert re.search(r"<U>\s*hello\s*<A>\s*$", str(told["prompt"])), told
    assert post(served, "/apply-template", body)[0] == 200
    status, error = post(served, "/apply-template", {"model": "chat"})
    assert (status, error["param"]) == (400, "messages")
