"""Holds raw JSON to OpenAI's own types: those of the openai package, and the schemas of their published document."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

OPENAPI = Path(__file__).resolve().parents[2] / "shared" / "openai-openapi-reduced.json"

TYPES: dict[str, tuple[Any, str]] = {  # name -> type of the package, schema of the document
    "ChatCompletion": (ChatCompletion, "CreateChatCompletionResponse"),
    "ChatCompletionChunk": (ChatCompletionChunk, "CreateChatCompletionStreamResponse"),
    "Completion": (Completion, "CreateCompletionResponse"),
    "CompletionChunk": (Completion, "CreateCompletionResponse"),  # one event of a completion's stream
    "CreateEmbeddingResponse": (CreateEmbeddingResponse, "CreateEmbeddingResponse"),
    "Model": (Model, "Model"),
    "ModelList": (list[Model], "ListModelsResponse"),
    "Response": (Response, "Response"),
    "ResponseStreamEvent": (ResponseStreamEvent, "ResponseStreamEvent"),
}
# What local servers add, and clients look for: what a model thought, and where a name leads.
EXTENSIONS = {
    "ChatCompletionMessage": {"reasoning_content"},
    "ChoiceDelta": {"reasoning_content"},
    "Model": {"localaid", "aliases", "context_length", "max_model_len", "abilities"},
    # OpenAI's servers and document have them, the package does not.
    "Response": {"store"},
    "ResponseFunctionCallArgumentsDoneEvent": {"name"},
    "Logprob": {"bytes"},
    "LogprobTopLogprob": {"bytes"},
}


def check_answer(type_name: str, raw: bytes | str | dict[str, Any]) -> Any:  # noqa: ANN401 - any of the types above
    """Return what OpenAI's own type makes of an answer or event.

    Fails where a value has a wrong type (strictly), a key that must be there is missing, or one is unknown.  The
    document is looked at where it lies beside the checkout; the package's types are always there.
    """
    value = copy.deepcopy(raw) if isinstance(raw, dict) else json.loads(raw)
    _, schema = TYPES[type_name]
    _undo_known_departures(type_name, value)
    typed = value["data"] if type_name == "ModelList" else value
    answer: object = _adapter(type_name).validate_python(typed, strict=True)
    unknown = sorted(set(_unknown_keys(answer)))
    assert not unknown, f"keys that OpenAI's types do not know: {unknown}"
    if OPENAPI.exists():
        problems = [f"{each.json_path}: {each.message[:300]}" for each in _validator(schema).iter_errors(value)]
        assert not problems, problems
    return answer


def check_events(type_name: str, stream: bytes) -> list[dict[str, Any]]:
    """Return the events of a whole stream of server-sent events, each checked; `[DONE]` must end it."""
    *events, done, rest = stream.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    decoded = [json.loads(event.removeprefix(b"data: ")) for event in events if not event.startswith(b":")]
    for event in decoded:
        check_answer(type_name, event)
    return decoded


def _undo_known_departures(type_name: str, value: dict[str, Any]) -> None:
    """Change what OpenAI's servers send although their types leave it out."""
    if type_name == "CompletionChunk" and value.get("usage", ...) is None:
        del value["usage"]  # null until the end, as in chats
    for choice in value.get("choices", ()):
        if type_name == "CompletionChunk" and "finish_reason" in choice:
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # null until the end
        scored = choice.get("logprobs") if type_name.startswith("Completion") else None
        if scored and scored["token_logprobs"][:1] == [None]:  # nothing leads to the first token of an echo
            scored["token_logprobs"][0], scored["top_logprobs"][0] = 0.0, {}


def _unknown_keys(answer: object) -> Iterator[str]:
    """Yield the keys of an answer that no type of the package has."""
    match answer:
        case BaseModel():
            name = type(answer).__name__
            yield from (f"{name}.{key}" for key in set(answer.model_extra or {}) - EXTENSIONS.get(name, set()))
            for _, value in answer:
                yield from _unknown_keys(value)
        case list():
            for value in answer:
                yield from _unknown_keys(value)


@functools.cache
def _adapter(type_name: str) -> TypeAdapter[Any]:
    return TypeAdapter(TYPES[type_name][0])


@functools.cache
def _validator(schema: str) -> jsonschema.Draft202012Validator:
    """Return the validator of one schema of OpenAI's document."""
    document = _with_nulls(json.loads(OPENAPI.read_bytes()))
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{schema}", **document})


def _with_nulls(schema: Any) -> Any:  # noqa: ANN401 - a part of a document
    """Return a part of the document with OpenAPI's `nullable` written as JSON Schema has it."""
    match schema:
        case {"nullable": True, **rest}:
            return {"anyOf": [_with_nulls(rest), {"type": "null"}]}
        case dict():
            return {key: _with_nulls(value) for key, value in schema.items()}
        case list():
            return [_with_nulls(value) for value in schema]
        case _:
            return schema
