"""VECTORS: bodies in, structs out; vectors as base64 or numbers; documents in order."""

from __future__ import annotations

import base64
import struct

import msgspec
import openai.types
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localaid import (
    BadRequest,
    RerankRequest,
    document_texts,
    inputs_of,
    parse_detokenize_request,
    parse_embedding_request,
    parse_rerank_request,
    parse_tokenize_request,
    rank_documents,
    render_embedding,
    render_embeddings,
    render_json,
    render_tokens,
)

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9)


def body(**fields: object) -> bytes:
    """Return a request's body."""
    return msgspec.json.encode({"model": "m"} | fields)


@given(TEXT | TOKENS | st.lists(TEXT, min_size=1) | st.lists(TOKENS, min_size=1))
def test_inputs_in_every_spelling(given_input: str | list[int] | list[str] | list[list[int]]) -> None:
    """One text, texts, tokens, lists of tokens: always a list of what is to be embedded."""
    found = inputs_of(parse_embedding_request(body(input=given_input)))
    is_one = isinstance(given_input, str) or isinstance(given_input[0], int)
    assert found == ([given_input] if is_one else given_input)


@pytest.mark.parametrize(
    ("given_input", "param"),
    [
        ("", "input"),
        ([], "input"),
        ([[]], "input[0]"),
        (["a", ""], "input[1]"),
        ([[1], "a"], "input"),
        ([1, [1]], "input"),
        (None, "input"),
        ([-1], "input"),
        ([1.5], "input"),
        (["a"] * 2049, "input"),
        ([[1]] * 2049, "input"),
    ],
)
def test_bad_inputs(given_input: object, param: str) -> None:
    """What is no input is refused, and named."""
    with pytest.raises(BadRequest) as told:
        parse_embedding_request(body(input=given_input))
    assert (told.value.param or "").startswith(param)


def test_many_tokens_are_one_input() -> None:
    """The limit is on inputs, not on the tokens of one."""
    assert len(inputs_of(parse_embedding_request(body(input=[1] * 4096)))) == 1


@given(st.lists(FLOATS, min_size=1, max_size=5), TEXT)
def test_vectors_survive(vectors: list[list[float]], model: str) -> None:
    """Base64 and numbers are the same floats, in the shape of OpenAI's own types."""
    packed = [struct.pack(f"<{len(vector)}f", *vector) for vector in vectors]
    entries = [render_embedding(index, raw, "base64") for index, raw in enumerate(packed)]
    told = msgspec.json.decode(render_embeddings(entries, model=model, tokens=7))
    assert [base64.b64decode(entry["embedding"]) for entry in told["data"]] == packed
    entries = [render_embedding(index, raw, "float") for index, raw in enumerate(packed)]
    answer = openai.types.CreateEmbeddingResponse.model_validate_json(
        render_embeddings(entries, model=model, tokens=7), strict=True
    )
    assert [entry.embedding for entry in answer.data] == vectors
    assert [entry.index for entry in answer.data] == list(range(len(vectors)))
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == (model, 7, 7)


@given(st.lists(st.floats(-9, 9), min_size=1), st.integers(1, 9) | st.none(), st.booleans())
def test_ranking(scores: list[float], top_n: int | None, wanted: bool) -> None:
    """The best first, equal ones in the order of the request, top_n of them, with their own text where wanted."""
    documents = [f"d{index}" if index % 2 else {"text": f"d{index}"} for index in range(len(scores))]
    request = parse_rerank_request(body(query="q", documents=documents, top_n=top_n, return_documents=wanted))
    answer = rank_documents(request, scores, request_id="rerank-1", tokens=5)
    found = [(-result.relevance_score, result.index) for result in answer.results]
    assert found == sorted(zip([-score for score in scores], range(len(scores)), strict=True))[:top_n]
    for result in answer.results:
        assert (result.document.text if result.document else None) == (f"d{result.index}" if wanted else None)
    assert b"null" not in render_json(answer)
    assert answer.usage.total_tokens == 5


def test_documents_are_texts() -> None:
    """A document is a text or an object with one."""
    request = RerankRequest(model="m", query="q", documents=[*parse_rerank_request(
        body(query="q", documents=["a", {"text": "b", "title": "ignored"}])
    ).documents])  # fmt: skip
    assert document_texts(request) == ["a", "b"]


def test_tokens() -> None:
    """Tokens alone, or with their text; bytes that are no text stand as numbers."""
    pieces = [b"a", "ü".encode()[:1], b""]
    assert render_json(render_tokens([1, 2, 3], pieces, with_pieces=False)) == b'{"tokens":[1,2,3]}'
    assert msgspec.json.decode(render_json(render_tokens([1, 2, 3], pieces, with_pieces=True))) == {
        "tokens": [{"id": 1, "piece": "a"}, {"id": 2, "piece": [0xC3]}, {"id": 3, "piece": ""}]
    }


def test_token_requests() -> None:
    """What is left out is as llama-server has it."""
    request = parse_tokenize_request(b'{"content": "a", "model": "m"}')
    assert (request.add_special, request.parse_special, request.with_pieces) == (False, True, False)
    assert parse_detokenize_request(b'{"tokens": [1], "model": "m"}').model == "m"
    for parse, param in ((parse_tokenize_request, "content"), (parse_detokenize_request, "tokens")):
        with pytest.raises(BadRequest) as told:
            parse(b"{}")
        assert told.value.param == param
