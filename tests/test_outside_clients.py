"""Clients as they really are: what Codex, Claude Code and others send, turn after turn, is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest

import conftest
from conftest import Daemon
from models import write_small_smollm2, write_tiny_llama

pytestmark = pytest.mark.outside
ROLES = ("system", "user", "assistant")
SYSTEM, USER, ASSISTANT = (cast("dict[str, object]", {"role": role, "content": role.upper()}) for role in ROLES)

# As Qwen3.5's and newer: one system message, at the start.
SYSTEM_FIRST = """{% for m in messages %}{% if m.role == 'system' and not loop.first %}
{{- raise_exception('System message must be at the beginning.') }}{% endif %}
{{- '<' + m.role + '>' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
# As Mistral's and Gemma's: the user begins, roles take turns, and there is no system message.
ALTERNATING = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}
{%- endif %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{{- '<' + m.role + '>' + m.content + '\\n' }}{% endfor %}<assistant>"""
# As GLM's and MiniMax's: arguments are gone through by name.
ITEMS = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}
{%- for key, value in c.function.arguments|items %}[{{ key }}={{ value }}]{% endfor %}{% endfor %}
{% endfor %}{% if tools %}{{ tools|length }} tools{% endif %}<assistant>"""
EFFORT = """{% for m in messages %}{{ m.content }}{% endfor %}
{{- '|' ~ reasoning_effort ~ '|' ~ enable_thinking ~ '|' ~ thinking ~ '|' ~ (extra or none)|tojson }}"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Return one daemon of small models whose templates are as strict as real ones, with a long context."""
    folder = tmp_path_factory.mktemp("clients")
    templates = {"first": SYSTEM_FIRST, "turns": ALTERNATING, "items": ITEMS, "effort": EFFORT}
    models = [write_tiny_llama(folder / f"{name}.gguf", chat_template=text) for name, text in templates.items()]
    models.append(write_small_smollm2(folder / "agent.gguf", context_length=65536))
    for start in conftest._serve(tmp_path_factory):
        yield start(models, settings={"load": {"threads": 2, "parallel": 2}})


async def ask(served: Daemon, path: str, body: dict[str, object]) -> tuple[int, Any]:
    """Return status and answer."""
    async with aiohttp.ClientSession(served.base_url) as http, http.post(path, json=body) as answer:
        raw = await answer.read()
        return answer.status, raw.decode() if body.get("stream") else json.loads(raw)


async def rendered(served: Daemon, model: str, messages: list[Any], **more: object) -> str:
    """Return a chat as the text that the model reads."""
    status, told = await ask(served, "/apply-template", {"model": model, "messages": messages, **more})
    assert status == 200, told
    return str(told["prompt"])


# -- who speaks when --


@pytest.mark.parametrize("model", ["first", "turns", "items"])
@pytest.mark.parametrize(
    "messages",
    [
        [SYSTEM, {"role": "developer", "content": "DEVELOPER"}, USER],
        [SYSTEM, SYSTEM, USER],
        [USER, ASSISTANT, SYSTEM, USER],
        [USER, USER],
        [ASSISTANT, USER],
        [SYSTEM, ASSISTANT, ASSISTANT, USER, USER],
    ],
    ids=["developer", "two", "later", "users", "greeting", "all"],
)
async def test_messages_in_any_order(served: Daemon, model: str, messages: list[Any]) -> None:
    """Whatever a template refuses, it gets in an order that it takes, and nothing of what was said is lost."""
    text = await rendered(served, model, messages)
    for message in messages:
        assert message["content"] in text
    status, told = await ask(served, "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 1})
    assert status == 200, told


async def test_instructions_and_a_developer_message(served: Daemon) -> None:
    """As Codex sends in every request; and `input: []` with instructions alone."""
    for model in ("first", "turns"):
        developer: dict[str, object] = {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "be brief"}],
        }
        user: dict[str, object] = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
        body: dict[str, object] = {"model": model, "instructions": "You are Codex.", "max_output_tokens": 16}
        assert (await ask(served, "/v1/responses", {**body, "input": [developer, user]}))[0] == 200
        assert (await ask(served, "/v1/responses", {**body, "input": []}))[0] == 200


# -- histories --


@pytest.mark.parametrize("arguments", ["", None, "[1]", "{bad", '{"a":1}{"b":2}', "null", '{"city": "Bern"}'])
async def test_arguments_of_calls_in_the_history(served: Daemon, arguments: str | None) -> None:
    """Empty means none; what is no object is told as text: the session goes on."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "ok"},
        USER,
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    text = await rendered(served, "items", messages, tools=tools)
    told = {"[1]": "[arguments=[1]]", "{bad": "[arguments={bad]", '{"city": "Bern"}': "[city=Bern]"}
    assert told.get(arguments or "", "") in text


async def test_results_that_are_no_text(served: Daemon) -> None:
    """An image that a tool gave stands as a note in every later turn; the session is not lost."""
    source = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    image: dict[str, object] = {"type": "image", "source": source}
    others: list[dict[str, object]] = [
        image,
        {"type": "tool_reference", "tool_name": "f"},
        {"type": "document", "source": {"type": "text"}, "content": {"x": 1}},
        {"type": "search_result", "source": "x", "title": "t", "content": [{"type": "text", "text": "found"}]},
    ]
    turns: list[dict[str, object]] = [
        {"role": "user", "content": "look"},
        {
            "role": "assistant",
            "content": [
                {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "seen"}, *others]},
            ],
        },
    ]
    status, told = await ask(served, "/v1/messages", {"model": "items", "messages": turns, "max_tokens": 1})
    assert status == 200, told
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [{"type": "text", "text": "seen"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    chat = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": parts}]
    text = await rendered(served, "items", chat)
    assert "seen\n[image_url left out: this model reads text only]" in text
    items = [
        {"role": "user", "content": "look"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_image", "image_url": "data:,"}]},
    ]
    assert (await ask(served, "/v1/responses", {"model": "items", "input": items, "max_output_tokens": 16}))[0] == 200


# -- Codex --


def function(name: str) -> dict[str, object]:
    """Return a function in the words of /v1/responses."""
    return {"type": "function", "name": name, "description": "d", "strict": False, "parameters": {"type": "object"}}


async def test_tools_of_codex(served: Daemon) -> None:
    """What runs on OpenAI's servers is left out, with one warning; functions inside a namespace are served."""
    tools = [
        function("shell"),
        {"type": "namespace", "name": "mcp", "description": "x", "tools": [function("inner")]},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
        *({"type": kind} for kind in ("web_search", "local_shell", "image_generation", "tool_search")),
    ]
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "go"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
        {"type": "local_shell_call", "call_id": "c2", "status": "completed", "action": {"command": ["ls"]}},
        {"type": "local_shell_call_output", "id": "c2", "output": "x"},
        {"type": "image_generation_call", "id": "ig", "result": "AA=="},
        {"type": "tool_search_call", "call_id": "c3", "arguments": {}},
    ]
    body = {"model": "agent", "input": items, "tools": tools, "tool_choice": "auto", "store": False, "stream": True}
    body |= {"instructions": "You are Codex.", "reasoning": {"effort": "xhigh", "summary": "auto"}}
    body |= {"include": ["reasoning.encrypted_content"], "parallel_tool_calls": False, "max_output_tokens": 16}
    for _ in range(2):
        status, text = await ask(served, "/v1/responses", body)
        assert status == 200, text
        assert "response.completed" in text or "response.incomplete" in text
    assert served.log.count("tool `web_search`") == 1
    status, told = await ask(
        served,
        "/v1/responses",
        {**body, "stream": False, "tool_choice": {"type": "function", "name": "inner"}, "temperature": 0},
    )
    assert status == 200
    calls = [item for item in told["output"] if item["type"] == "function_call"]
    assert {(call["name"], call["namespace"]) for call in calls} == {("inner", "mcp")}


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max"])
async def test_efforts_on_all_routes(served: Daemon, effort: str) -> None:
    """Each word is taken everywhere; the least ones do not switch thinking on."""
    text = await rendered(served, "effort", [USER], reasoning_effort=effort)
    thinks = str(effort not in ("none", "minimal"))
    assert text.split("|")[1:4] == ["xhigh" if effort == "max" else effort, thinks, thinks]
    asked: list[tuple[str, dict[str, object]]] = [
        ("/v1/chat/completions", {"messages": [USER], "reasoning_effort": effort}),
        ("/v1/responses", {"input": "hi", "reasoning": {"effort": effort}, "max_output_tokens": 16}),
    ]
    for path, body in asked:
        assert (await ask(served, path, {"model": "effort", "max_tokens": 1, **body}))[0] == 200


async def test_kwargs_of_templates_are_any_json(served: Daemon) -> None:
    """Lists, objects, null."""
    for value in ([1, {"a": None}], {"b": [True]}, 1.5, "x"):
        text = await rendered(served, "effort", [USER], chat_template_kwargs={"extra": value, "reasoning_effort": None})
        assert json.loads(text.rpartition("|")[2]) == value


# -- too much --


async def test_overflow_is_told_as_agents_look_for_it(served: Daemon) -> None:
    """First "maximum context length is N tokens"; the numbers as fields; the field as the API calls it."""
    long = "word " * 3000
    for path, body, param in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/v1/responses", {"input": long}, "input"),
    ):
        status, told = await ask(served, path, {"model": "first", **body})
        error = told["error"]
        assert (status, error["param"], error["code"]) == (400, param, "context_length_exceeded")
        assert error["message"].startswith("This model's maximum context length is 2048 tokens")
        assert error["n_ctx"] == 2048
        assert error["n_prompt_tokens"] > 2048
    schema = {"type": "json_schema", "name": "x", "schema": {"not": {"type": "string"}}}
    status, told = await ask(served, "/v1/responses", {"model": "agent", "input": "x", "text": {"format": schema}})
    assert (status, told["error"]["param"]) == (400, "text.format")


async def test_an_agents_first_request_fits(served: Daemon) -> None:
    """20,000 tokens with 24 tools, to a model that was trained on so many, without a word about the context."""
    tools = [
        {"name": f"tool{i}", "description": "word " * 300, "input_schema": {"type": "object", "properties": {}}}
        for i in range(24)
    ]
    body = {"model": "agent", "max_tokens": 4, "system": "word " * 12_000, "tools": tools}
    status, told = await ask(served, "/v1/messages", {**body, "messages": [{"role": "user", "content": "hi"}]})
    assert status == 200, told
    assert told["usage"]["input_tokens"] > 18_000
    async with aiohttp.ClientSession(served.base_url) as http, http.get("/v1/models/agent") as answer:
        card = json.loads(await answer.read())
    assert card["context_length"] == card["max_model_len"] >= 32_768
    assert Path(card["localaid"]["file"]).name == "agent.gguf"
