"""ANTHROPIC: requests become chats or a 400 that names the field; streamed or not, the answer is the same Message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

import localaid
from anthropic_shapes import check_message_answer, check_message_events
from localaid import (
    BadRequest,
    BodyTooLarge,
    CallDelta,
    ChatMessage,
    ChatRequest,
    ContextLengthExceeded,
    FinishReason,
    FunctionCall,
    InternalFault,
    JsonConstraint,
    KeyConfined,
    KeyRefused,
    LocalaidError,
    MessageRenderer,
    MessageRequest,
    MethodNotAllowed,
    ModelCard,
    ModelExtension,
    QueueFull,
    RouteNotFound,
    SchemaUnsupported,
    ShuttingDown,
    ToolCall,
    Tooling,
    UnsupportedParameter,
    constraint_of,
    error_body_for,
    message_model_of,
    message_models_of,
    parse_count_request,
    parse_message_request,
    render_json,
    render_message_failure,
    sampling_of,
    speaks_anthropic,
    stop_words_of,
    template_kwargs_of,
    tooling_of,
    usage_of,
)

WEATHER = {
    "name": "weather",
    "description": "The weather at a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
CLOCK = {"name": "clock", "type": "custom", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"place": "Paris"}}
USAGE = usage_of(prompt_tokens=12, completion_tokens=7, cached_tokens=8, reasoning_tokens=3)


def body(**fields: object) -> bytes:
    """Return the body of a request with some fields; those that are None are left out."""
    fields = {"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}]} | fields
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


def parse(**fields: object) -> tuple[MessageRequest, ChatRequest]:
    """Return the request with some fields, and its chat."""
    return parse_message_request(body(**fields))


def messages(*turns: tuple[str, object]) -> list[ChatMessage]:
    """Return the messages of some turns."""
    return parse(messages=[{"role": role, "content": content} for role, content in turns])[1].messages


def text(words: str) -> dict[str, str]:
    """Return a block of text."""
    return {"type": "text", "text": words}


def result(**fields: object) -> dict[str, object]:
    """Return a block of what a tool gave."""
    return {"type": "tool_result", "tool_use_id": "toolu_1", **fields}


def call(arguments: str) -> ToolCall:
    """Return the one call of the chats here."""
    return ToolCall(id="toolu_1", function=FunctionCall(name="weather", arguments=arguments))


# -- Requests --


def test_what_it_asks_of_the_worker() -> None:
    """Its fields have the same effect as a chat's; those of Anthropic's servers have none."""
    request, chat = parse(
        temperature=1,
        top_p=0.5,
        top_k=7,
        stop_sequences=["a", "b"],
        stream=True,
        metadata={"user_id": "u"},
        service_tier="auto",
        speed="fast",
        cache_control={"type": "ephemeral"},
        context_management={"edits": []},
    )
    sampling = sampling_of(chat)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (1, 0.5, 7, 10)
    assert stop_words_of(chat) == ("a", "b")
    assert (request.stream, chat.stream, chat.model) == (True, True, "m")
    assert (constraint_of(chat), tooling_of(chat), template_kwargs_of(chat)) == (None, Tooling(), {})
    assert sampling_of(parse(max_tokens=0)[1]).max_tokens == 0


def test_turns() -> None:
    """Results of tools become messages of their own, in their place; the rest of a turn is one message."""
    assert messages(
        ("user", "What is the weather?"),
        ("assistant", [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, text("Let me see."), CALL]),
        ("user", [result(content=[text("Rain"), text("12 degrees")]), text("And"), text("now?")]),
    ) == [
        ChatMessage(role="user", content="What is the weather?"),
        ChatMessage(
            role="assistant", content="Let me see.", reasoning_content="Hm.", tool_calls=[call('{"place":"Paris"}')]
        ),
        ChatMessage(role="tool", content="Rain\n12 degrees", tool_call_id="toolu_1", name="weather"),
        ChatMessage(role="user", content="And\nnow?"),
    ]


def test_results_of_tools() -> None:
    """They may be empty, a string, or an error; one stands where it was told."""
    asked = ("assistant", [CALL])
    for fields, content in (
        ({}, ""),
        ({"content": "Rain", "is_error": False}, "Rain"),
        ({"content": "no such place", "is_error": True}, "Error: no such place"),
    ):
        told = messages(("user", "x"), asked, ("user", [result(**fields)]))[-1]
        assert told == ChatMessage(role="tool", content=content, tool_call_id="toolu_1", name="weather")
    mixed = messages(("user", "x"), asked, ("user", [text("before"), result(content="Rain"), text("behind")]))
    assert [(message.role, message.content) for message in mixed[2:]] == [
        ("user", "before"),
        ("tool", "Rain"),
        ("user", "behind"),
    ]


def test_turns_of_one_role_are_one() -> None:
    """As with Anthropic, where two turns of the user or of the assistant follow each other."""
    assert messages(("user", "a"), ("user", [text("b")]), ("assistant", "c"), ("assistant", [text("d"), CALL])) == [
        ChatMessage(role="user", content="a\nb"),
        ChatMessage(role="assistant", content="c\nd", tool_calls=[call('{"place":"Paris"}')]),
    ]
    silent = messages(("user", "a"), ("assistant", []), ("assistant", [{"type": "redacted_thinking", "data": "x"}]))
    assert silent == [ChatMessage(role="user", content="a")]


def test_system_prompts() -> None:
    """They come first; one amid the turns is told by the user; what changes with each request is cut off."""
    blocks = [text("x-anthropic-billing-header: cc_version=2.1; cch=0a1b2;"), text("Be brief."), text("Be kind.")]
    turns = [{"role": "system", "content": "Be wise."}, {"role": "user", "content": "a"}]
    assert parse(system=blocks, messages=turns)[1].messages == [
        ChatMessage(role="system", content="Be brief.\nBe kind.\nBe wise."),
        ChatMessage(role="user", content="a"),
    ]
    assert parse(system=blocks[:1])[1].messages == [ChatMessage(role="user", content="hi")]
    assert parse(system="Say x-anthropic-y: z")[1].messages[0].content == "Say x-anthropic-y: z"
    amid = messages(("user", "a"), ("assistant", "b"), ("system", [text("Stop.")]), ("user", "c"))
    assert [(message.role, message.content) for message in amid[1:]] == [("assistant", "b"), ("user", "Stop.\nc")]


def test_tools() -> None:
    """A tool is a function; whether it must be called is said in Anthropic's words."""
    tooling = tooling_of(parse(tools=[WEATHER, CLOCK])[1])
    assert [(tool.function.name, tool.function.parameters) for tool in tooling.tools] == [
        ("weather", WEATHER["input_schema"]),
        ("clock", {"type": "object"}),
    ]
    assert tooling.tools[0].function.description == WEATHER["description"]
    for choice, expected in (
        (None, ("auto", None, True)),
        ({"type": "auto"}, ("auto", None, True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", None, False)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("required", None, False)),
        ({"type": "any"}, ("required", None, True)),
        ({"type": "tool", "name": "clock"}, ("required", "clock", True)),
        ({"type": "none"}, ("none", None, True)),
    ):
        tooling = tooling_of(parse(tools=[WEATHER, CLOCK], tool_choice=choice)[1])
        assert (tooling.choice, tooling.function, tooling.parallel) == expected


@pytest.mark.parametrize(
    ("fields", "kwargs"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"enable_thinking": True}),
        ({"thinking": {"type": "adaptive", "display": None}}, {"enable_thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"thinking": {"type": "between_tools"}}, {}),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "max"}),
    ],
)
def test_what_templates_are_told(fields: dict[str, object], kwargs: dict[str, object]) -> None:
    """Whether to think, and how much."""
    assert template_kwargs_of(parse(**fields)[1]) == kwargs


def test_output_formats() -> None:
    """Both spellings hold the answer to a schema."""
    schema: dict[str, object] = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for fields in (
        {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        {"output_format": {"type": "json_schema", "schema": schema}},
    ):
        assert constraint_of(parse(**fields)[1]) == JsonConstraint(schema=schema)


def test_a_count_needs_no_limit() -> None:
    """The same prompt is counted as would be answered; a message needs `max_tokens`."""
    fields = {"system": "s", "tools": [WEATHER], "thinking": {"type": "disabled"}}
    counted, asked = parse_count_request(body(**fields, max_tokens=None)), parse(**fields)[1]
    assert counted.messages == asked.messages
    assert (tooling_of(counted), template_kwargs_of(counted)) == (tooling_of(asked), template_kwargs_of(asked))
    with pytest.raises(BadRequest, match="`max_tokens` is missing"):
        parse(max_tokens=None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 1}, "model"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "alone"}]}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [text("a"), {"text": "b"}]}]}, "messages.0.content.1.type"),
        ({"messages": [{"role": "user", "content": [result()]}]}, "messages.0.content.0.tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{**CALL, "input": 1}]}]}, "messages.0.content.0.input"),
        ({"messages": [{"role": "assistant", "content": [{**CALL, "input": None}]}]}, "messages.0.content.0.input"),
        ({"messages": [{"role": "assistant", "content": [{**CALL, "id": ""}]}]}, "messages.0.content.0.id"),
        ({"system": [{"type": "text", "text": 1}]}, "system.0.text"),
        ({"system": 1}, "system"),
        ({"temperature": 1.1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"tools": [{"name": "x"}]}, "tools.0.input_schema"),
        ({"tools": [WEATHER, {"input_schema": {}}]}, "tools.1.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "clock"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "any"},
                "output_format": {"type": "json_schema", "schema": {}},
            },
            "output_config.format",
        ),
    ],
)
def test_wrong_requests(fields: dict[str, object], param: str) -> None:
    """They are refused with the field at fault, in Anthropic's spelling."""
    with pytest.raises(BadRequest) as caught:
        parse(**fields)
    assert caught.value.param == param
    assert f"`{param}`" in json.loads(error_body_for("/v1/messages", {}, caught.value, "req-1"))["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type", "`image`"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "messages.0.content.0.type", "`tool_use`"),
        ({"system": [{"type": "document", "title": "x"}]}, "system.0.type", "`document`"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type", "`web_search_20250305`"),
    ],
)
def test_what_is_not_served(fields: dict[str, object], param: str, words: str) -> None:
    """Pictures, documents and the tools of Anthropic's servers are refused, never ignored."""
    with pytest.raises(UnsupportedParameter, match=words) as caught:
        parse(**fields)
    assert caught.value.param == param


# -- Answers --

Step = tuple[str, str, tuple[CallDelta, ...]]  # text, reasoning, calls

Part = tuple[str, str]  # kind, text: "text" and "thinking", else the name of a tool and its arguments
words = st.text(min_size=1, max_size=30)
arguments = st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers(-9, 9), max_size=3).map(json.dumps)
said = st.tuples(st.sampled_from(["text", "thinking"]), words)
called = st.tuples(st.sampled_from(["weather", "clock"]), arguments)


def cut(draw: st.DrawFn, whole: str) -> list[str]:
    """Return a text in pieces."""
    places = sorted(draw(st.sets(st.integers(1, max(len(whole) - 1, 1)), max_size=4)))
    ends = zip([0, *places], [*places, len(whole)], strict=True)
    return [piece for start, end in ends if (piece := whole[start:end])]


@st.composite
def steps_of(draw: st.DrawFn, answer: list[Part]) -> list[Step]:
    """Return what steps might add until an answer is whole."""
    steps: list[Step] = []
    calls = 0
    for kind, whole in answer:
        pieces = cut(draw, whole)
        if kind == "text":
            steps += [(piece, "", ()) for piece in pieces]
        elif kind == "thinking":
            steps += [("", piece, ()) for piece in pieces]
        else:
            steps.append(("", "", (CallDelta(calls, id=f"call_{calls}", name=kind),)))
            steps += [("", "", (CallDelta(calls, piece),)) for piece in pieces]
            calls += 1
    return steps


def new_renderer(**fields: Any) -> MessageRenderer:  # noqa: ANN401 - whatever it takes
    """Return a renderer whose model has the name that is hardest to cut around."""
    return MessageRenderer(message_id="msg_1", model='\0"m', **fields)


def render(
    renderer: MessageRenderer, steps: Sequence[Step], finish: FinishReason = "stop", stop_word: str | None = None
) -> bytes:
    """Return the stream of some steps."""
    stream = renderer.render_start(usage_of(12, 0, 8))
    stream += b"".join(renderer.render_delta(*step) for step in steps)
    return stream + renderer.render_finish(finish, stop_word, USAGE)


def accumulate(stream: bytes) -> Message:
    """Return what Anthropic's own client makes of a stream."""
    snapshot, buffers, adapter = None, dict[int, bytes](), TypeAdapter[Any](RawMessageStreamEvent)
    for event in check_message_events(stream):
        if event["type"] != "ping":
            typed = adapter.validate_python(event)
            snapshot = accumulate_event(event=typed, current_snapshot=snapshot, json_bufs=buffers)
    assert snapshot is not None
    return check_message_answer("Message", snapshot.to_json())  # type: ignore[no-any-return]


@given(st.data(), st.lists(said | called, max_size=5))
def test_the_cut_of_the_deltas_does_not_matter(data: st.DataObject, answer: list[Part]) -> None:
    """However an answer comes, the client puts the same message together that one which did not stream would be."""
    once, again = new_renderer(), new_renderer()
    finish: FinishReason = "tool_calls" if any(kind in ("weather", "clock") for kind, _ in answer) else "stop"
    streamed = accumulate(render(once, data.draw(steps_of(answer)), finish))
    render(again, data.draw(steps_of(answer)), finish)
    assert render_json(once.message) == render_json(again.message)
    whole = check_message_answer("Message", render_json(once.message))
    assert streamed.model_dump() == whole.model_dump()
    meant = {kind: "".join(told for one, told in answer if one == kind) for kind in ("text", "thinking")}
    assert "".join(block.text for block in whole.content if block.type == "text") == meant["text"]
    assert "".join(block.thinking for block in whole.content if block.type == "thinking") == meant["thinking"]
    calls = [(block.name, block.input) for block in whole.content if block.type == "tool_use"]
    assert calls == [(kind, json.loads(told)) for kind, told in answer if kind not in meant]


def test_a_stream() -> None:
    """Its events have Anthropic's order and names; a ping follows the first block's start."""
    calls = (CallDelta(0, id="call_a", name="weather"), CallDelta(0, '{"place"'), CallDelta(0, ': "Paris"}'))
    stream = render(new_renderer(), [("", "Hm", ()), ("Let ", "", ()), ("me", "", calls)], "tool_calls")
    events = check_message_events(stream)
    assert [(event["type"], event.get("index")) for event in events] == [
        ("message_start", None),
        ("content_block_start", 0),
        ("ping", None),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("message_delta", None),
        ("message_stop", None),
    ]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert deltas == [
        {"type": "thinking_delta", "thinking": "Hm"},
        {"type": "signature_delta", "signature": localaid.THINKING_SIGNATURE},
        {"type": "text_delta", "text": "Let "},
        {"type": "text_delta", "text": "me"},
        {"type": "input_json_delta", "partial_json": '{"place"'},
        {"type": "input_json_delta", "partial_json": ': "Paris"}'},
    ]
    assert events[10]["content_block"] == {"type": "tool_use", "id": "toolu_a", "name": "weather", "input": {}}
    assert events[0]["message"]["usage"]["input_tokens"] == 4
    assert events[-2]["usage"] == {
        "input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 8,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 3},
    }


@pytest.mark.parametrize(
    ("finish", "stop_word", "told"),
    [
        ("stop", None, ("end_turn", None)),
        ("stop", "a rule's", ("end_turn", None)),
        ("stop", "mine", ("stop_sequence", "mine")),
        ("length", None, ("max_tokens", None)),
        ("length", "mine", ("stop_sequence", "mine")),
        ("tool_calls", None, ("tool_use", None)),
    ],
)
def test_stop_reasons(finish: FinishReason, stop_word: str | None, told: tuple[str, str | None]) -> None:
    """Only the request's own stop sequences are told; a rule's word is the end of the turn."""
    renderer = new_renderer(stop_sequences=["other", "mine"])
    streamed = accumulate(render(renderer, [("x", "", ())], finish, stop_word))
    assert (streamed.stop_reason, streamed.stop_sequence) == told
    assert (renderer.message.stop_reason, renderer.message.stop_sequence) == told


def test_thoughts_that_the_client_does_not_want() -> None:
    """With `display: omitted` it is told that the model thought, and nothing of what."""
    assert parse(thinking={"type": "adaptive", "display": "omitted"})[0].hides_thinking
    assert not parse(thinking={"type": "adaptive"})[0].hides_thinking
    message = accumulate(render(new_renderer(hides_thinking=True), [("", "secret", ()), ("", "!", ()), ("x", "", ())]))
    assert [block.to_dict() for block in message.content] == [
        {"type": "thinking", "thinking": "", "signature": localaid.THINKING_SIGNATURE},
        {"type": "text", "text": "x"},
    ]


def test_a_call_that_is_cut_short() -> None:
    """Its input is an object all the same; the stop reason says why it is not whole."""
    renderer = new_renderer()
    render(renderer, [("", "", (CallDelta(0, id="call_a", name="weather"), CallDelta(0, '{"place": "Par')))], "length")
    message = check_message_answer("Message", render_json(renderer.message))
    assert (message.content[0].input, message.stop_reason) == ({}, "max_tokens")


def test_an_empty_answer() -> None:
    """It has no block."""
    renderer = new_renderer()
    assert accumulate(render(renderer, [("", "", ())])).content == []
    assert renderer.message.content == []


# -- Errors and models --


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadRequest(param="x", problem="is missing"), "invalid_request_error"),
        (KeyRefused(is_missing=True), "authentication_error"),
        (KeyConfined(key="k", path="/x"), "permission_error"),
        (RouteNotFound("GET", "/x"), "not_found_error"),
        (MethodNotAllowed("GET", "/x", ["POST"]), "invalid_request_error"),
        (QueueFull(file="m", waiting=1, retry_after_s=1), "rate_limit_error"),
        (InternalFault(request_id="r"), "api_error"),
        (ShuttingDown(), "overloaded_error"),
    ],
)
def test_errors(error: LocalaidError, kind: str) -> None:
    """They have Anthropic's envelope and types, as a body and as an event."""
    raw = error_body_for("/v1/messages", {}, error, "req-1")
    envelope = check_message_answer("ErrorResponse", raw)
    assert (envelope.error.type, envelope.error.message, envelope.request_id) == (kind, str(error), "req-1")
    (event,) = check_message_events(render_message_failure(error, "req-1"))
    assert event == json.loads(raw)


def test_a_body_that_is_too_large() -> None:
    """Its type is documented, but not in the package."""
    raw = error_body_for("/v1/messages", {}, BodyTooLarge(limit_bytes=1), "req-1")
    assert json.loads(raw)["error"]["type"] == "request_too_large"


def test_words_that_clients_look_for() -> None:
    """A prompt that is too long is told as Anthropic tells it; a schema by the name that it has here."""
    long = error_body_for("/v1/messages", {}, ContextLengthExceeded(prompt_tokens=300, ctx_size=200), "req-1")
    assert json.loads(long)["error"]["message"].startswith("prompt is too long: 300 tokens > 200 maximum")
    schema = error_body_for("/v1/messages", {}, SchemaUnsupported(problem="uses `not`"), "req-1")
    assert "`output_config.format`" in json.loads(schema)["error"]["message"]


def test_whose_envelope() -> None:
    """Anthropic's paths and clients get theirs, all others OpenAI's."""
    for path in ("/v1/messages", "/messages", "/v1/messages/count_tokens", "/messages/"):
        assert speaks_anthropic(path, {})
    assert speaks_anthropic("/v1/models", {"anthropic-version": "2023-06-01"})
    for path in ("/v1/models", "/v1/chat/completions", "/v1/messagesx", "/"):
        assert not speaks_anthropic(path, {})
        assert "param" in json.loads(error_body_for(path, {}, BadRequest(param="x", problem="y"), "req-1"))["error"]


def test_models() -> None:
    """The names that answer messages, in Anthropic's shape."""

    def card(name: str, path: str) -> ModelCard:
        extension = ModelExtension(file="m.gguf", sha256=None, layer="user", paths=[path], state="ready")
        return ModelCard(id=name, created=1_700_000_000, localaid=extension)

    one = check_message_answer("ModelInfo", render_json(message_model_of(card("a", localaid.MESSAGES))))
    assert (one.id, one.created_at.isoformat()) == ("a", "2023-11-14T22:13:20+00:00")
    cards = [card("a", localaid.MESSAGES), card("e", localaid.EMBEDDINGS), card("b", localaid.MESSAGES)]
    listed = message_models_of(cards)
    assert ([each.id for each in listed.data], listed.first_id, listed.last_id, listed.has_more) == (
        ["a", "b"],
        "a",
        "b",
        False,
    )
    assert message_models_of([]).last_id is None
