"""RESPONSES: requests become chats or a 400 that names the field; streamed or not, the answer is the same Response."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import localaid
from localaid import (
    BadRequest,
    CallDelta,
    CallItem,
    CallOutputItem,
    ChatMessage,
    ContextLengthExceeded,
    FinishReason,
    InputText,
    Item,
    JsonConstraint,
    LocalaidError,
    MessageItem,
    OutputText,
    QueueFull,
    ReasoningItem,
    ReasoningText,
    ResponsePlan,
    ResponseRenderer,
    ResponseStore,
    StoredResponse,
    TokenLogprob,
    UnsupportedParameter,
    WorkerDied,
    constraint_of,
    page_items,
    parse_response_request,
    plan_response,
    render_json,
    render_messages,
    sampling_of,
    stop_words_of,
    template_kwargs_of,
    tooling_of,
    top_logprobs_of,
    usage_of,
)
from openai_shapes import check_answer

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather at a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    "strict": True,
}
CLOCK = {"type": "function", "name": "clock", "parameters": None}
USAGE = usage_of(prompt_tokens=12, completion_tokens=7, cached_tokens=8, reasoning_tokens=3)


def plan(**fields: object) -> ResponsePlan:
    """Return the plan for a request with some fields."""
    return plan_after([], **fields)


def plan_after(history: list[Item], /, **fields: object) -> ResponsePlan:
    """Return the plan for a request with some fields that continues an earlier one."""
    request = parse_response_request(json.dumps({"model": "m", "input": "hi", **fields}).encode())
    return plan_response(request, response_id="resp_abc", created_at=1_700_000_000, history=history)


def events_of(stream: bytes) -> Iterator[dict[str, Any]]:
    """Yield the events of some bytes: each has a name, which is its type."""
    *blocks, rest = stream.split(b"\n\n")
    assert rest == b""
    for block in blocks:
        name, data = block.split(b"\n")
        event = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        yield event


# -- requests --


def test_a_string_is_a_message_of_the_user() -> None:
    """Instructions come first; what is not sent stays the rule's choice."""
    chat = plan(instructions="Be brief.", input="Hello").chat
    assert chat.messages == [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Hello"),
    ]
    assert sampling_of(chat) == localaid.Sampling()
    assert tooling_of(chat) == localaid.Tooling()
    assert constraint_of(chat) is None
    assert top_logprobs_of(chat) is None


def test_every_field_arrives() -> None:
    """OpenAI's fields, and llama-server's beside them, reach the chat; the response echoes OpenAI's."""
    planned = plan(
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=64,
        top_k=40,
        min_p=0.1,
        repeat_penalty=1.1,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        seed=7,
        stop=["END"],
        top_logprobs=3,
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        reasoning={"effort": "low", "summary": "auto"},
        chat_template_kwargs={"day": "Monday"},
        metadata={"a": "b"},
        store=False,
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        parallel_tool_calls=False,
        tools=[WEATHER, CLOCK],
        tool_choice="required",
        truncation="auto",
        text={"format": {"type": "text"}, "verbosity": "low"},
        max_tool_calls=3,
    )
    assert sampling_of(planned.chat) == localaid.Sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repeat_penalty=1.1,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        seed=7,
        max_tokens=64,
    )
    assert stop_words_of(planned.chat) == ("END",)
    assert top_logprobs_of(planned.chat) == 3
    assert template_kwargs_of(planned.chat)["reasoning_effort"] == "low"
    assert template_kwargs_of(planned.chat)["day"] == "Monday"
    tooling = tooling_of(planned.chat)
    assert [tool.function.name for tool in tooling.tools] == ["weather", "clock"]
    assert tooling.tools[0].function.parameters == WEATHER["parameters"]
    assert (tooling.choice, tooling.parallel) == ("required", False)
    echoed = json.loads(render_json(planned.response))
    check_answer("Response", echoed)
    told = {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 64, "top_logprobs": 3, "metadata": {"a": "b"}}
    told |= {"store": False, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "tool_choice": "required"}
    assert {key: echoed[key] for key in told} == told
    assert echoed["truncation"] == "disabled"
    assert echoed["text"] == {"format": {"type": "text"}, "verbosity": "low"}


@pytest.mark.parametrize(
    ("choice", "names", "word", "only"),
    [
        ("auto", ["weather", "clock"], "auto", None),
        ("none", ["weather", "clock"], "none", None),
        ({"type": "function", "name": "clock"}, ["weather", "clock"], "required", "clock"),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]},
            ["clock"],
            "auto",
            None,
        ),
    ],
)
def test_tool_choices(choice: object, names: list[str], word: str, only: str | None) -> None:
    """The flat spellings of `tool_choice` mean what the chat's mean, and are echoed as they came."""
    planned = plan(tools=[WEATHER, CLOCK], tool_choice=choice)
    tooling = tooling_of(planned.chat)
    assert ([tool.function.name for tool in tooling.tools], tooling.choice, tooling.function) == (names, word, only)
    assert json.loads(render_json(planned.response))["tool_choice"] == choice
    check_answer("Response", render_json(planned.response))


def test_text_formats() -> None:
    """`json_object` and the flat `json_schema` hold the answer to JSON, and are echoed."""
    assert constraint_of(plan(text={"format": {"type": "json_object"}}).chat) == JsonConstraint(
        schema={"type": "object"}
    )
    schema: dict[str, object] = {"type": "object", "properties": {"a": {"type": "integer"}}}
    text_format = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    planned = plan(text={"format": text_format})
    assert constraint_of(planned.chat) == JsonConstraint(schema=schema)
    assert json.loads(render_json(planned.response))["text"]["format"] == text_format
    check_answer("Response", render_json(planned.response))


def test_items_become_messages() -> None:
    """Thoughts, words and calls of one turn are one message; a call's output knows the name of its function."""
    chat = plan(
        input=[
            {"role": "developer", "content": "Be kind."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
            },
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "clock", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c2", "output": "12:00"},
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "Rain."}]},
            {"role": "assistant", "content": "Rain at noon."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No more."}]},
            {"role": "user", "content": "Thanks"},
        ]
    ).chat
    assert [message.role for message in chat.messages] == [
        *("developer", "user", "assistant", "tool", "tool", "assistant", "assistant", "user"),
    ]
    turn = chat.messages[2]
    assert (turn.reasoning_content, turn.content) == ("Hm.", "I look.")
    assert [(call.id, call.function.name) for call in turn.tool_calls or ()] == [("c1", "weather"), ("c2", "clock")]
    outputs = [(message.tool_call_id, message.name, message.content) for message in chat.messages[3:5]]
    assert outputs == [("c2", "clock", "12:00"), ("c1", "weather", "Rain.")]
    assert [message.content for message in chat.messages[5:7]] == ["Rain at noon.", "No more."]


def test_reasoning_that_led_to_nothing_is_left_out() -> None:
    """A turn that was cut short while the model thought is no message."""
    thought = ReasoningItem(id="rs_1", content=[ReasoningText(text="Hm.")])
    assert render_messages(None, [thought, message("user", "Go on")]) == [ChatMessage(role="user", content="Go on")]


def test_a_response_goes_on_where_another_ended() -> None:
    """The history stands between the instructions and the new input; a call of the history may be answered."""
    call = CallItem(id="fc_1", call_id="c1", name="clock", arguments="{}")
    planned = plan_after(
        [message("user", "Time?"), call],
        instructions="New ones.",
        input=[{"type": "function_call_output", "call_id": "c1", "output": "12:00"}],
    )
    assert [each.role for each in planned.chat.messages] == ["system", "user", "assistant", "tool"]
    assert [type(item) for item in planned.inputs] == [MessageItem, CallItem, CallOutputItem]
    ids = [item.id for item in planned.inputs]
    assert len(set(ids)) == len(ids)
    nothing_new = plan_after([message("user", "Time?")], input=[])
    assert nothing_new.chat.messages == [ChatMessage(role="user", content="Time?")]


def test_references_are_looked_up() -> None:
    """An item may be sent as its id where it is known."""
    known = {"msg_1": message("user", "Earlier")}
    for reference in ({"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}):
        request = parse_response_request(json.dumps({"model": "m", "input": [reference]}).encode())
        planned = plan_response(request, response_id="resp_a", created_at=1, find_item=known.get)
        assert planned.chat.messages == [ChatMessage(role="user", content="Earlier")]


ANY_OBJECT = {"format": {"type": "json_object"}}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": None}, "model", "must be a string"),
        ({"input": 1}, "input", "must be"),
        ({"input": None}, "input", "must be"),
        ({"input": []}, "input", "is missing"),
        ({"input": ["a"]}, "input[0]", "must be an object"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content", "must be"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "user"}]}, "input[1].content", "is missing"),
        ({"input": [{"content": "a"}]}, "input[0].role", "is missing"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role", "robot"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "is missing"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0]", "`input_image`"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input", "is missing"),
        ({"input": [{"type": "item_reference", "id": "msg_9"}]}, "input[0].id", "'msg_9'"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id", "not stored"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments", "is missing"),
        ({"input": [{"type": "function_call_output", "call_id": "c9", "output": ""}]}, "input[0].call_id", "'c9'"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "is missing"),
        ({"tools": [{**WEATHER, "parameters": 3}]}, "tools[0].parameters", "must be"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "'weather'"),
        ({"tool_choice": "required"}, "tool_choice", "`tools`"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice", "'no'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice.type", "web_search"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "is missing"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
        ({"text": {"verbosity": "huge"}}, "text.verbosity", "huge"),
        ({"text": ANY_OBJECT, "tools": [WEATHER], "tool_choice": "required"}, "text.format", "`text.format`"),
        ({"reasoning": {"effort": "wild"}}, "reasoning.effort", "wild"),
        ({"temperature": 101}, "temperature", "at most 100"),
        ({"top_p": 1.5}, "top_p", "at most 1"),
        ({"top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata", "at most 16"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"background": True}, "background", "not supported"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "template"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
    ],
)
def test_wrong_requests(fields: dict[str, object], param: str, words: str) -> None:
    """What cannot be served is a 400 that names the field at fault."""
    with pytest.raises(BadRequest) as caught:
        plan(**fields)
    assert caught.value.param == param
    assert words in str(caught.value)


def test_what_openai_cannot_do_here_is_told_apart() -> None:
    """What OpenAI would serve and localaid does not is `unsupported_parameter`, wherever it stands."""
    with_image: dict[str, object] = {"input": [{"role": "user", "content": [IMAGE]}]}
    unserved: list[dict[str, object]] = [{"background": True}, with_image]
    for fields in unserved:
        with pytest.raises(UnsupportedParameter):
            plan(**fields)


@given(st.text())
def test_any_input_text_arrives(text: str) -> None:
    """Whatever its characters: a prompt is not changed."""
    assert plan(input=text).chat.messages[-1].content == text


# -- answers --


def message(role: Any, text: str) -> MessageItem:  # noqa: ANN401 - one of four words
    """Return a message of one part."""
    part = OutputText(text=text) if role == "assistant" else InputText(text=text)
    return MessageItem(id=f"msg_{text}", role=role, content=[part])


def answer(steps: list[tuple[str, str]], finish: FinishReason = "stop") -> tuple[bytes, Any]:
    """Return the stream and the response of an answer that comes in (kind, piece) steps; a new "call" has no piece."""
    planned = plan()
    renderer = ResponseRenderer(planned)
    stream = renderer.render_start()
    calls = -1
    for kind, piece in steps:
        match kind:
            case "text":
                stream += renderer.render_delta(piece)
            case "reasoning":
                stream += renderer.render_delta("", piece)
            case "call":
                calls += 1
                stream += renderer.render_delta("", calls=[CallDelta(calls, id=f"call_{calls}", name=f"f{calls}")])
            case "arguments":
                stream += renderer.render_delta("", calls=[CallDelta(calls, piece)])
    stream += renderer.render_finish(finish, USAGE, 1_700_000_009)
    return stream, json.loads(render_json(planned.response))


@st.composite
def cut_answers(draw: st.DrawFn) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return one answer twice: in as few steps as it can come, and cut anywhere."""
    whole: list[tuple[str, str]] = []
    if draw(st.booleans()):
        whole.append(("reasoning", draw(st.text(min_size=1))))
    if draw(st.booleans()):
        whole.append(("text", draw(st.text(min_size=1))))
    for _ in range(draw(st.integers(0, 2))):
        whole += [("call", ""), ("arguments", draw(st.text(min_size=1)))]
    cut = []
    for kind, text in whole:
        places = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=4))})
        pieces = [text[start:end] for start, end in itertools.pairwise(places)]
        cut += [(kind, piece) for piece in pieces or [""]]
    return whole, cut


@given(cut_answers(), st.sampled_from(["stop", "length", "tool_calls"]))
def test_an_answer_is_the_same_wherever_it_is_cut(
    answers: tuple[list[tuple[str, str]], list[tuple[str, str]]], finish: FinishReason
) -> None:
    """Every event is one of OpenAI's; numbers are consecutive; what the deltas say, joined, is what the end says."""
    whole, cut = answers
    _, expected = answer(whole, finish)
    stream, response = answer(cut, finish)
    assert response == expected
    check_answer("Response", response)
    events = list(events_of(stream))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == ("response.incomplete" if finish == "length" else "response.completed")
    assert events[-1]["response"] == response
    assert replay(events) == response["output"]
    for event in events:
        check_answer("ResponseStreamEvent", event)


def replay(events: list[dict[str, Any]]) -> list[dict[str, Any]]:  # noqa: C901 - one short case for each event
    """Return the output items that a stream's deltas build up; each event must be of the item that is open."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if "output_index" not in event:
            continue
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            continue
        assert event["output_index"] == len(items) - 1
        if kind == "output_item.done":
            items[-1]["status"] = event["item"]["status"]
            assert event["item"] == items[-1]
            continue
        assert event["item_id"] == items[-1]["id"]
        match kind:
            case "content_part.added":
                assert event["content_index"] == len(items[-1]["content"]) == 0
                items[-1]["content"].append(event["part"])
            case "output_text.delta" | "reasoning_text.delta":
                items[-1]["content"][0]["text"] += event["delta"]
                items[-1]["content"][0].get("logprobs", []).extend(event.get("logprobs", []))
            case "function_call_arguments.delta":
                items[-1]["arguments"] += event["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert event["text"] == items[-1]["content"][0]["text"]
            case "content_part.done":
                assert event["part"] == items[-1]["content"][0]
            case "function_call_arguments.done":
                assert (event["name"], event["arguments"]) == (items[-1]["name"], items[-1]["arguments"])
    return items


def test_the_order_of_events() -> None:
    """OpenAI's: a thing is added, grows, is done; then the next begins."""
    steps = [("reasoning", "Hm."), ("text", "I "), ("text", "look."), ("call", ""), ("arguments", "{}")]
    stream, response = answer(steps, "tool_calls")
    assert [event["type"].removeprefix("response.") for event in events_of(stream)] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert [(item["type"], item["status"]) for item in response["output"]] == [
        *(("reasoning", "completed"), ("message", "completed"), ("function_call", "completed")),
    ]
    assert response["usage"] == {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 19,
    }
    assert (response["status"], response["completed_at"], response["error"]) == ("completed", 1_700_000_009, None)


def test_an_answer_that_is_cut_short() -> None:
    """It is incomplete and says why, and so is its last item; what came before that is whole."""
    _, response = answer([("reasoning", "Hm."), ("text", "I lo")], "length")
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["completed_at"] is None


def test_an_empty_answer_has_a_message() -> None:
    """Clients look for one."""
    _, response = answer([])
    assert [item["content"][0]["text"] for item in response["output"]] == [""]


def test_deltas_hold_no_line_ends() -> None:
    """What Unicode takes for the end of a line is escaped: some clients cut streams by Unicode's rules."""
    stream, response = answer([("text", "a"), ("text", "\u2028\x85\n\r")])
    assert all(line.isascii() for line in stream.splitlines())
    assert len(stream.decode().splitlines()) == stream.count(b"\n")
    assert response["output"][0]["content"][0]["text"] == "a\u2028\x85\n\r"


def test_log_probabilities() -> None:
    """Asked for, they come with each delta, and all of them with the whole text; else nowhere."""
    tokens = [TokenLogprob(b"I", -0.5, [(b"I", -0.5), (b"A", -1.5)]), TokenLogprob(b" look", -0.25)]
    planned = plan(include=["message.output_text.logprobs"], top_logprobs=2)
    renderer = ResponseRenderer(planned)
    stream = renderer.render_start()
    stream += renderer.render_delta("", "Hm.", logprobs=[TokenLogprob(b"Hm.", -3.0)])
    for token in tokens:
        stream += renderer.render_delta(token.token.decode(), logprobs=[token])
    stream += renderer.render_finish("stop", USAGE, 2)
    events = list(events_of(stream))
    for event in events:
        check_answer("ResponseStreamEvent", event)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [each["token"] for event in deltas for each in event["logprobs"]] == ["I", " look"]
    output = json.loads(render_json(planned.response))["output"]
    assert [each["logprob"] for each in output[1]["content"][0]["logprobs"]] == [-0.5, -0.25]
    assert [each["token"] for each in output[1]["content"][0]["logprobs"][0]["top_logprobs"]] == ["I", "A"]
    assert replay(events) == output
    assert '"logprob"' not in answer([("text", "I look")])[0].decode()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QueueFull(file="a", waiting=1, retry_after_s=1.0), "rate_limit_exceeded"),
        (ContextLengthExceeded(prompt_tokens=9, ctx_size=8), "invalid_prompt"),
        (WorkerDied(file="a", reason="killed"), "server_error"),
    ],
)
@pytest.mark.parametrize("begun", [True, False])
def test_a_failure_ends_the_stream(error: LocalaidError, code: str, *, begun: bool) -> None:
    """The last event says what failed; before it comes the beginning, where the stream had none."""
    renderer = ResponseRenderer(plan())
    stream = renderer.render_start() + renderer.render_delta("a") if begun else b""
    events = list(events_of(stream + renderer.render_failure(error)))
    for event in events:
        check_answer("ResponseStreamEvent", event)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"] == {"code": code, "message": str(error)}


# -- what is kept --


def stored(name: str, owner: str = "a", size_bytes: int = 10) -> StoredResponse:
    """Return a response with one item of input and one of output."""
    inputs, output = (message("user", f"{name}-in"),), (message("assistant", f"{name}-out"),)
    return StoredResponse(body=b"x" * size_bytes, inputs=inputs, output=output, owner=owner)


def test_a_response_is_its_owners() -> None:
    """Another client finds neither it nor its items."""
    store = ResponseStore(keep_s=10, count=10, size_bytes=10_000)
    one = stored("one")
    store.put("resp_1", one, 0.0)
    assert store.get("resp_1", "a", 1.0) is one
    assert store.get("resp_1", "b", 1.0) is None
    assert store.get("resp_2", "a", 1.0) is None
    assert store.find_item("msg_one-out", "a", 1.0) == one.output[0]
    assert store.find_item("msg_one-in", "a", 1.0) == one.inputs[0]
    assert store.find_item("msg_one-out", "b", 1.0) is None
    store.drop("resp_1")
    assert store.get("resp_1", "a", 1.0) is None
    assert store.find_item("msg_one-out", "a", 1.0) is None


def test_what_is_used_is_kept() -> None:
    """Least recently used goes first; what nobody has used for a time goes too."""
    store = ResponseStore(keep_s=10, count=2, size_bytes=10_000)
    store.put("resp_1", stored("one"), 0.0)
    store.put("resp_2", stored("two"), 1.0)
    assert store.get("resp_1", "a", 2.0) is not None
    store.put("resp_3", stored("three"), 3.0)
    assert store.get("resp_2", "a", 3.0) is None
    assert store.get("resp_1", "a", 11.9) is not None
    assert store.get("resp_3", "a", 13.0) is None
    assert store.get("resp_1", "a", 21.8) is not None


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "get", "drop", "find"]), st.integers(0, 5), st.integers(1, 3000)), max_size=30
    )
)
def test_the_store_stays_within_its_bounds(steps: list[tuple[str, int, int]]) -> None:
    """Whatever is put, read and dropped, a store that is empty again holds nothing."""
    store = ResponseStore(keep_s=20, count=3, size_bytes=4000)
    now = 0.0
    for number, (verb, which, size) in enumerate(steps):
        now += size / 1000
        response_id = f"resp_{which}"
        match verb:
            case "put":
                response_id = f"resp_{number}"
                store.put(response_id, stored(str(number), size_bytes=size), now)
            case "get":
                store.get(response_id, "a", now)
            case "find":
                store.find_item(f"msg_{which}-out", "a", now)
            case "drop" if store.get(response_id, "a", now):
                store.drop(response_id)
        assert len(store._kept) <= 3
        assert store._used_bytes <= 4000
        assert set(store._owned_items.values()) <= set(store._kept)
    store.get("", "a", now + 1000)
    assert (store._used_bytes, store._kept, store._owned_items) == (0, {}, {})


def test_pages_of_items() -> None:
    """Newest first or oldest first, from behind any item; an unknown one is a 400."""
    items: list[Item] = [message("user", str(number)) for number in range(5)]
    page = page_items(items, after=None, limit=2, newest_first=True)
    assert ([item.id for item in page.data], page.has_more) == (["msg_4", "msg_3"], True)
    assert (page.first_id, page.last_id) == ("msg_4", "msg_3")
    page = page_items(items, after="msg_3", limit=9, newest_first=False)
    assert ([item.id for item in page.data], page.has_more) == (["msg_4"], False)
    assert page_items(items, after="msg_4", limit=9, newest_first=False).data == []
    with pytest.raises(BadRequest, match="`after`"):
        page_items(items, after="msg_9", limit=9, newest_first=True)
