"""What is sent to a model ends nobody's service: hostile schemas, templates, grammars and arguments are told of."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from conftest import Daemon

pytestmark = pytest.mark.outside
MODEL = "smollm2-135m-instruct"
MESSAGES = [{"role": "user", "content": "hi"}]


async def ask(served: Daemon, path: str, body: dict[str, object]) -> tuple[int, Any]:
    """Return status and answer."""
    async with aiohttp.ClientSession(served.base_url) as http, http.post(path, json=body) as answer:
        raw = await answer.read()
        return answer.status, json.loads(raw)


async def is_well(served: Daemon) -> bool:
    """Return whether the model still answers."""
    status, _ = await ask(served, "/v1/chat/completions", {"model": MODEL, "messages": MESSAGES, "max_tokens": 1})
    return status == 200


def tool(schema: object) -> dict[str, object]:
    """Return a tool with these parameters, in chat's spelling."""
    return {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}


MALFORMED: list[tuple[dict[str, object], str]] = [
    ({"type": "object", "properties": {"a": {"type": "object", "required": True}}}, "properties.a.required"),
    ({"required": 1}, "required"),
    ({"required": [{}]}, "required"),
    ({"required": [["a"]]}, "required"),
    ({"$ref": ["x"]}, "$ref"),
    ({"exclusiveMinimum": "a", "minimum": None}, "exclusiveMinimum"),
    ({"properties": {"x": {"anyOf": {}}}}, "properties.x.anyOf"),
    ({"properties": {"x": {"pattern": "(?=a)"}}}, "properties.x"),
    ({"properties": {f"p{i}": {} for i in range(8000)}}, "properties"),
    ({"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(9000)}, "$ref": "#/$defs/a0"}, "$defs"),
]


@pytest.mark.parametrize(("schema", "place"), MALFORMED, ids=lambda value: str(value)[:30])
async def test_a_malformed_schema_is_told_with_its_place(shared: Daemon, schema: dict[str, object], place: str) -> None:
    """On chat, completions, responses and messages, as answer and as tool: a 400, and the model is well after."""
    name = {"name": "f", "schema": schema, "strict": True}
    called = {"type": "function", "function": {"name": "f"}}
    asked: list[tuple[str, dict[str, object]]] = [
        ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": name}}),
        ("/v1/chat/completions", {"tools": [tool(schema)], "tool_choice": called}),
        ("/v1/completions", {"prompt": "x", "json_schema": schema}),
    ]
    for path, more in asked:
        if len(str(schema)) > 10_000 and "tools" in more:
            continue  # tools stand in the prompt, which has no room for these
        status, told = await ask(shared, path, {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, **more})
        assert status == 400, (path, told)
        assert place.rpartition(".")[2] in told["error"]["message"]
    assert await is_well(shared)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "required": None, "properties": {"a": {"type": "integer"}}},
        {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {"p": {"type": "string", "format": "password"}}},
        {"type": "array", "uniqueItems": False, "items": [{"type": "integer"}, {"type": "string"}], "maxItems": 2},
        {"properties": {"a": {"type": "number", "multipleOf": 0.01}}, "minProperties": 1},
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    ],
    ids=lambda value: str(value)[:40],
)
async def test_schemas_as_programs_write_them_are_held(shared: Daemon, schema: dict[str, object]) -> None:
    """Keywords that ask for nothing are no reason to refuse; a real model's answer is JSON of the kind."""
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
    status, told = await ask(shared, "/v1/chat/completions", body)
    assert status == 200, told
    choice = told["choices"][0]
    if choice["finish_reason"] == "stop":
        json.loads(choice["message"]["content"])


async def test_numbers_end(shared: Daemon) -> None:
    """A small model finds no end of digits by itself; the grammar does."""
    body: dict[str, object] = {"model": MODEL, "prompt": "Pi is 3.1415926535", "max_tokens": 60, "temperature": 0}
    for kind in ("number", "integer"):
        status, told = await ask(shared, "/v1/completions", {**body, "json_schema": {"type": kind}, "ignore_eos": True})
        assert status == 200
        assert told["choices"][0]["finish_reason"] == "stop"


async def test_grammars_that_are_deep_end_no_process(shared: Daemon) -> None:
    """3,000 rules in a chain; a repetition that ends before it begins is told so."""
    rules = ["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(3000)), 'r3000 ::= "x"']
    body: dict[str, object] = {"model": MODEL, "prompt": "a", "max_tokens": 4}
    status, told = await ask(shared, "/v1/completions", {**body, "grammar": "\n".join(rules)})
    assert (status, told["choices"][0]["text"]) == (200, "x")
    status, told = await ask(shared, "/v1/completions", {**body, "grammar": 'root ::= "a"{5,2}'})
    assert status == 400
    assert "ends before it begins" in told["error"]["message"]
    assert await is_well(shared)


async def test_whatever_a_message_raises_is_its_own_error(shared: Daemon) -> None:
    """Arguments of 50,000 brackets, integers beyond 64 bits, a template that prints half a character."""
    deep = "[" * 50_000
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": deep}}]
    history = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": calls}]
    asked: list[tuple[str, dict[str, object]]] = [
        ("/apply-template", {"messages": history, "tools": [tool({})]}),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": [tool({"properties": {"a": {"maximum": 2**70}}})]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}),
    ]
    for path, more in asked:
        status, told = await ask(shared, path, {"model": MODEL, "max_tokens": 2, **more})
        assert status in (200, 400, 500), told
        assert await is_well(shared)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '\\ud83d' }}"
    (shared.configs / "intake.tmpl").write_text(template)
    shared.write_config("intake.yaml", f"name: intake\nshas: ['{MODEL_FILE}']\ntemplate: {{chat: intake.tmpl}}\n")
    try:
        for _ in range(50):
            status, told = await ask(shared, "/v1/chat/completions", {"model": "intake", "messages": MESSAGES})
            if status != 404:
                break
        assert status in (200, 400, 500), told
        assert await is_well(shared)
    finally:
        (shared.configs / "intake.yaml").unlink()


MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
