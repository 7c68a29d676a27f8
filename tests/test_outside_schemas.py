"""Schemas as programs write them are held on every route; what is refused is refused with its place and in words."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from conftest import Daemon

pytestmark = pytest.mark.outside
MODEL = "smollm2-135m-instruct"
MESSAGES = [{"role": "user", "content": "hi"}]

Schema = dict[str, object]


async def ask(served: Daemon, path: str, body: dict[str, object]) -> tuple[int, Any]:
    """Return status and answer."""
    body = {"model": MODEL, "max_tokens": 40, "temperature": 0, **body}
    async with aiohttp.ClientSession(served.base_url) as http, http.post(path, json=body) as answer:
        return answer.status, json.loads(await answer.read())


async def complete(served: Daemon, schema: Schema, **more: object) -> tuple[int, Any]:
    """Return status and answer of a completion that is held to a schema."""
    return await ask(served, "/v1/completions", {"prompt": "The answer is", "json_schema": schema, **more})


def spell(schema: Schema) -> list[tuple[str, dict[str, object]]]:
    """Return requests that hold an answer, or a call that must come, to a schema: one a route and field."""
    named = {"name": "f", "schema": schema}
    function = {"name": "f", "parameters": schema}
    chat: dict[str, object] = {"messages": MESSAGES}
    return [
        ("/v1/completions", {"prompt": "x", "json_schema": schema}),
        ("/v1/chat/completions", {**chat, "response_format": {"type": "json_schema", "json_schema": named}}),
        (
            "/v1/chat/completions",
            {**chat, "tools": [{"type": "function", "function": function}], "tool_choice": "required"},
        ),
        ("/v1/responses", {"input": "hi", "text": {"format": {"type": "json_schema", **named}}}),
        ("/v1/messages", {**chat, "tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}}),
    ]


ROUTES = range(len(spell({})))


@pytest.mark.parametrize("route", ROUTES)
async def test_malformed_is_a_400_with_its_place_on_every_route(shared: Daemon, route: int) -> None:
    """Each of these was raised by no one's mistake but that of who wrote the schema."""
    malformed: list[tuple[object, str]] = [
        ({"type": "object", "required": True}, "properties.a.required is not a list of texts"),
        ({"required": [["a"]]}, "properties.a.required is not a list of texts"),
        ({"$ref": ["x"]}, "properties.a.$ref is not a text"),
        ({"type": "strng"}, "properties.a.type is not the name of a type"),
        ({"type": {}}, "properties.a.type is not the name of a type"),
        ({"type": "number", "exclusiveMinimum": "a"}, "properties.a.exclusiveMinimum is not a number"),
        (None, "properties.a is neither an object nor true or false"),
    ]
    for part, told in malformed:
        path, body = spell({"type": "object", "properties": {"a": part}})[route]
        status, answer = await ask(shared, path, body)
        assert status == 400, (part, answer)
        assert told in answer["error"]["message"]


@pytest.mark.parametrize("route", ROUTES)
async def test_integers_may_have_more_than_64_bits(shared: Daemon, route: int) -> None:
    """As bounds, as values, and where they ask for nothing."""
    for part in ({"maximum": 2**70}, {"minimum": -(10**400)}, {"default": 2**64}, {"examples": [-(2**63) - 1]}):
        path, body = spell({"type": "object", "properties": {"a": {"type": "integer", **part}}})[route]
        status, answer = await ask(shared, path, body)
        assert status == 200, (part, answer)


async def test_tools_that_are_only_shown_may_hold_any_number(shared: Daemon) -> None:
    """The model chooses, so nothing is held to their schemas."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"enum": [10**30]}}}}}]
    for path in ("/v1/chat/completions", "/apply-template"):
        status, answer = await ask(shared, path, {"messages": MESSAGES, "tools": tools})
        assert status == 200, answer


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_tool_that_is_not_strict_is_not_refused_because_of_another(shared: Daemon, choice: str) -> None:
    """Its schema shapes its calls as far as it can be held; a strict one's must be."""
    held = {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    parameters = {"type": "object", "properties": {"a": {"type": "array", "contains": {"type": "integer"}}}}
    for strict, expected in ((None, 200), (False, 200), (True, 400)):
        other = {"name": "g", "strict": strict, "parameters": parameters}
        tools = [{"type": "function", "function": function} for function in (held, other)]
        asked = {"messages": MESSAGES, "tools": tools, "tool_choice": choice}
        status, answer = await ask(shared, "/v1/chat/completions", asked)
        assert status == expected, (strict, answer)
    assert answer["error"]["param"] == "tools"
    assert "uses `contains`, which no grammar can enforce" in answer["error"]["message"]
    assert "compile" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"items": [{"const": 1}, {"const": "a"}], "additionalItems": False, "minItems": 2}, ['[1,"a"]']),
        ({"items": [{"const": 1}], "additionalItems": {"const": 2}, "minItems": 2, "maxItems": 2}, ["[1,2]"]),
        ({"items": {"const": 1}, "additionalItems": False, "minItems": 2, "maxItems": 2}, ["[1,1]"]),
    ],
    ids=["closed", "open", "no tuple"],
)
async def test_tuples_of_older_drafts(shared: Daemon, schema: Schema, texts: list[str]) -> None:
    """`items` as a list with `additionalItems`, as zod and pydantic 1 write them."""
    status, answer = await complete(shared, {"type": "array", **schema})
    assert status == 200, answer
    assert answer["choices"][0]["text"].replace(" ", "") in texts


@pytest.mark.parametrize(
    "bounds",
    [{}, {"exclusiveMinimum": 1, "minimum": None}, {"minimum": 10**16}, {"maximum": 10**17 - 1, "minimum": 10**16}],
    ids=str,
)
async def test_integers_have_at_most_17_digits_and_keep_their_bounds(shared: Daemon, bounds: Schema) -> None:
    """Also where a double would round a bound up to one digit more."""
    bias = {str(digit): 100 for digit in await digits(shared)}
    status, answer = await complete(shared, {"type": "integer", **bounds}, logit_bias=bias, ignore_eos=True)
    assert status == 200, answer
    text = answer["choices"][0]["text"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert len(text.lstrip("-")) <= 17
    assert int(text) <= 10**17 - 1


async def digits(served: Daemon) -> list[int]:
    """Return the tokens of the digits 0 and 9."""
    _, answer = await ask(served, "/tokenize", {"content": "09", "add_special": False})
    return [int(token) for token in answer["tokens"]]


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "nothing but itself"),
        ({"enum": [json.loads("[" * 300 + "]" * 300)]}, "is nested too deeply"),
        ({"type": "number", "minimum": 1e300}, "has a bound that is too large"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "is satisfied by no answer"),
    ],
    ids=["circle", "deep", "bound", "empty"],
)
async def test_reasons_are_in_words_and_name_the_field(shared: Daemon, schema: Schema, told: str) -> None:
    """Of llguidance's words none reach the client; `param` is the field that was sent."""
    status, answer = await complete(shared, schema)
    assert (status, answer["error"]["param"]) == (400, "json_schema"), answer
    assert told in answer["error"]["message"]


async def test_what_asks_for_nothing_is_no_reason(shared: Daemon) -> None:
    r"""`$anchor` and `\p{L}` are held; so is a `$ref` to a definition beside them."""
    schema: Schema = {
        "$anchor": "here",
        "type": "object",
        "properties": {
            "a": {"type": "string", "pattern": r"^\p{L}{1,8}$", "format": "path"},
            "b": {"$ref": "#/$defs/b"},
        },
        "required": ["a", "b"],
        "$defs": {"b": {"type": "integer", "minimum": 3, "maximum": 4}},
    }
    status, answer = await complete(shared, schema)
    assert status == 200, answer
    said = json.loads(answer["choices"][0]["text"])
    assert said["a"].isalpha()
    assert said["b"] in (3, 4)


async def test_a_grammar_that_is_nested_too_deeply_is_told_in_gbnf(shared: Daemon) -> None:
    """Not in the words of the grammar that is made of it."""
    for depth in (20, 28, 60, 5000):
        grammar = f'root ::= {"(" * depth}"x"{")" * depth}'
        status, answer = await ask(shared, "/v1/completions", {"prompt": "a", "grammar": grammar})
        if depth == 20:
            assert (status, answer["choices"][0]["text"]) == (200, "x")
        else:
            assert status == 400
            assert "nested too deeply; give the inner part a rule of its own" in answer["error"]["message"]
