"""Section 5, API: bodies become structs or a 400 that names the field; answers have OpenAI's exact shape."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import localaid
from localaid import (
    SSE_DONE,
    AllowedTools,
    AllowedToolsChoice,
    Answer,
    BadRequest,
    CallDelta,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChatRequest,
    ChunkRenderer,
    Completion,
    CompletionChoice,
    Constraint,
    FunctionDefinition,
    FunctionName,
    GbnfConstraint,
    JsonConstraint,
    LocalaidError,
    LogprobStream,
    ModelCard,
    ModelExtension,
    ModelList,
    NamedToolChoice,
    Sampling,
    TextStream,
    TokenLogprob,
    ToolDefinition,
    Tooling,
    UnsupportedParameter,
    chat_choice_of,
    chat_logprobs_of,
    completion_choice_of,
    completion_logprobs_of,
    constraint_of,
    parse_chat_request,
    parse_completion_request,
    prompts_of,
    render_error,
    render_json,
    render_sse,
    render_sse_comment,
    render_sse_error,
    sampling_of,
    stop_words_of,
    template_kwargs_of,
    tooling_of,
    top_logprobs_of,
    usage_of,
)
from openai_shapes import OPENAPI, TYPES, check_answer

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "Once"}
USAGE = usage_of(prompt_tokens=12, completion_tokens=3, cached_tokens=8, reasoning_tokens=1)
WEATHER = {"name": "weather", "description": "Tell it.", "parameters": {"type": "object"}, "strict": True}
CLOCK = {"name": "clock"}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": CLOCK}]


def chat(**fields: object) -> bytes:
    """Return a chat's body with some fields changed."""
    return json.dumps({**CHAT, **fields}).encode()


def completion(**fields: object) -> bytes:
    """Return a completion's body with some fields changed."""
    return json.dumps({**COMPLETION, **fields}).encode()


def events(stream: bytes) -> list[Any]:
    """Return the decoded events of some SSE bytes, each one line."""
    lines = stream.split(b"\n\n")
    assert lines.pop() == b""
    assert all(line.startswith(b"data: ") and b"\n" not in line for line in lines)
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


# -- Requests --


def test_every_sampling_field_arrives() -> None:
    """OpenAI's fields and llama-server's become one Sampling; what is not sent stays None."""
    assert sampling_of(parse_chat_request(chat())) == Sampling()
    values = {
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "typical_p": 0.95,
        "repeat_penalty": 1.1,
        "repeat_last_n": -1,
        "frequency_penalty": -2,
        "presence_penalty": 2,
        "logit_bias": {"15496": -100, "7": 2.5},
        "seed": 42,
        "max_tokens": 10,
        "ignore_eos": True,
    }
    sampling = sampling_of(parse_chat_request(chat(**values)))
    assert msgspec.to_builtins(sampling, str_keys=True) == values
    assert sampling_of(parse_completion_request(completion(**values))) == sampling


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "n_predict": 7}, 5),
        ({"n_predict": 7}, 7),
        ({"max_tokens": -1}, -1),
        ({"max_tokens": None}, None),
    ],
)
def test_token_limits(fields: dict[str, object], expected: int | None) -> None:
    """The newest name of the limit wins; -1 is no limit, which is more than to leave the choice to the rule."""
    assert sampling_of(parse_chat_request(chat(**fields))).max_tokens == expected


@given(st.integers(-(2**63), 2**63 - 1))
def test_seeds_fit_llama_cpp(seed: int) -> None:
    """Every seed but -1, ours for a random one, becomes 32 bits, and never llama.cpp's word for that."""
    fitted = sampling_of(parse_chat_request(chat(seed=seed))).seed
    assert fitted is not None
    assert fitted == -1 if seed == -1 else 0 <= fitted < 2**32 - 1
    if 0 <= seed < 2**32 - 1:
        assert fitted == seed


def test_top_k_minus_one_is_off() -> None:
    """-1 and 0 both switch top_k off."""
    assert sampling_of(parse_chat_request(chat(top_k=-1))).top_k == 0


@pytest.mark.parametrize(
    ("stop", "expected"), [(None, ()), ("x", ("x",)), (["a", "", "b"], ("a", "b")), (["s"] * 16, ("s",) * 16)]
)
def test_stop_words(stop: object, expected: tuple[str, ...]) -> None:
    """`stop` is a word or up to sixteen; an empty one would end every answer at once and is left out."""
    assert stop_words_of(parse_chat_request(chat(stop=stop))) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_spellings_of_prompts(prompt: object, expected: list[object]) -> None:
    """A prompt is a text, a list of texts, token ids, or a list of them."""
    assert prompts_of(parse_completion_request(completion(prompt=prompt))) == expected


def test_messages() -> None:
    """All roles are taken, parts become one text, tool calls of the history are kept, nulls are as if absent."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "developer", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "U", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    parsed = parse_chat_request(chat(messages=messages)).messages
    assert [message.content for message in parsed] == ["S", "one\ntwo", "U", None, "42"]
    assert parsed[2] == ChatMessage(role="user", content="U", name="Ann")
    assert parsed[3].tool_calls is not None
    assert msgspec.to_builtins(parsed[3].tool_calls) == [call]
    assert parsed[4].tool_call_id == "c1"


def test_what_changes_nothing_is_accepted() -> None:
    """Unknown fields, nulls, and fields that ask for nothing do not stand in the way."""
    request = parse_chat_request(
        chat(
            whatever={"deep": [1, {}]},
            temperature=None,
            n=None,
            stop=None,
            stream_options=None,
            store=True,
            metadata={"a": "b"},
            service_tier="auto",
            parallel_tool_calls=True,
            tools=[],
            response_format={"type": "text"},
            logprobs=False,
            top_logprobs=0,
            modalities=["text"],
            audio=None,
            tool_choice="auto",
            grammar="",
            json_schema=None,
            prediction={"type": "content", "content": "x"},
            verbosity="low",
            user="u",
            safety_identifier="s",
            prompt_cache_key="k",
        )
    )
    assert not request.include_usage
    assert (constraint_of(request), tooling_of(request), top_logprobs_of(request)) == (None, Tooling(), None)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert parse_chat_request(chat(tools=tools, tool_choice="none")).model == "m"
    assert parse_chat_request(chat(stream=True, stream_options={"include_usage": True})).include_usage
    assert parse_completion_request(completion(echo=False, suffix="", best_of=3, n=3, logprobs=None)).n == 3
    assert parse_completion_request(completion(best_of=0)).n is None


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"model": ""}, "model", "`model` must have at least 1 character."),
        ({"model": None}, "model", "`model` must be a string, not null."),
        ({"messages": None}, "messages", "`messages` must be a list, not null."),
        ({"messages": []}, "messages", "`messages` must have at least 1 item."),
        ({"messages": ["hi"]}, "messages[0]", "`messages[0]` must be an object, not a string."),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "`messages[0].role` is missing."),
        ({"messages": [{"role": "boss", "content": ""}]}, "messages[0].role", None),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", None),
        ({"messages": [{"role": "user"}]}, "messages[0].content", None),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", None),
        ({"temperature": "hot"}, "temperature", "`temperature` must be a number or null, not a string."),
        ({"temperature": 101}, "temperature", "`temperature` must be at most 100."),
        ({"temperature": -0.1}, "temperature", "`temperature` must be at least 0."),
        ({"top_p": 1.5}, "top_p", None),
        ({"min_p": -1}, "min_p", None),
        ({"typical_p": 2}, "typical_p", None),
        ({"top_k": -2}, "top_k", None),
        ({"top_k": 0.5}, "top_k", "`top_k` must be an integer or null, not a number."),
        ({"top_k": 2**40}, "top_k", None),
        ({"repeat_penalty": 0}, "repeat_penalty", "`repeat_penalty` must be more than 0."),
        ({"repeat_last_n": -2}, "repeat_last_n", None),
        ({"frequency_penalty": 2.1}, "frequency_penalty", None),
        ({"presence_penalty": -2.1}, "presence_penalty", None),
        ({"logit_bias": {"hello": 1}}, "logit_bias", None),
        ({"logit_bias": {"-1": 1}}, "logit_bias", None),
        ({"logit_bias": {"1": 101}}, "logit_bias", "`logit_bias` must be at most 100."),
        ({"logit_bias": [[1, 2]]}, "logit_bias", None),
        ({"seed": 1.5}, "seed", None),
        ({"seed": True}, "seed", None),
        ({"max_tokens": 0}, "max_tokens", "`max_tokens` must be at least 1, or -1 for no limit."),
        ({"max_tokens": -2}, "max_tokens", None),
        ({"max_completion_tokens": "9"}, "max_completion_tokens", None),
        ({"n": 0}, "n", None),
        ({"n": 129}, "n", None),
        ({"stop": ["s"] * 17}, "stop", "`stop` must have at most 16 items."),
        ({"stop": 5}, "stop", "`stop` must be a string or a list or null, not an integer."),
        ({"stop": [5]}, "stop[0]", None),
        ({"stream": "yes"}, "stream", "`stream` must be true or false or null, not a string."),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", None),
        ({"ignore_eos": 1}, "ignore_eos", None),
        ({"stream_options": {}}, "stream_options", "`stream_options` is only allowed where `stream` is true."),
        (
            {"reasoning_effort": "huge"},
            "reasoning_effort",
            "`reasoning_effort` must be one of high, low, max, medium, minimal, none, xhigh, not 'huge'.",
        ),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "messages[0].role",
            "`messages[0].role` must be one of assistant, developer, function, system, tool, user, not 'wizard'.",
        ),
        ({"logprobs": 3}, "logprobs", "`logprobs` must be true or false or null, not an integer."),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "`top_logprobs` must be at most 20."),
        ({"top_logprobs": 2}, "top_logprobs", "`top_logprobs` needs `logprobs` to be true."),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type",
            "`response_format.type` must be one of text, json_object, json_schema, not 'xml'.",
        ),
        ({"response_format": {}}, "response_format.type", "`response_format.type` is missing."),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": "s"}}},
            "response_format.json_schema.schema",
            None,
        ),
        ({"json_schema": "{}"}, "json_schema", None),
        ({"grammar": {}}, "grammar", None),
        ({"response_format": {"type": "json_object"}, "grammar": "root ::= [0-9]"}, "grammar", None),
        ({"response_format": {"type": "json_object"}, "json_schema": True}, "json_schema", None),
        ({"tools": TOOLS, "grammar": "root ::= [0-9]"}, "grammar", None),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
            None,
        ),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type", None),
        ({"tools": [{"type": "function"}]}, "tools[0].function", None),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools", "`tools` has two functions of the name 'weather'."),
        ({"tools": TOOLS, "functions": [CLOCK]}, "functions", None),
        ({"tool_choice": "required"}, "tool_choice", "`tool_choice` asks for a call, but there are no `tools`."),
        ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", None),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "`tool_choice` names the function 'f', which is not among the `tools`.",
        ),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", None),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "c"}}}, "tool_choice.type", None),
        ({"functions": [CLOCK], "function_call": {"name": "f"}}, "function_call", None),
        ({"functions": [CLOCK, CLOCK]}, "functions", None),
        ({"verbosity": "mute"}, "verbosity", None),
    ],
)
def test_wrong_chats_are_a_400_that_names_the_field(
    fields: dict[str, object], param: str, sentence: str | None
) -> None:
    """Wrong types, ranges and lengths are refused with the field and what it must be."""
    with pytest.raises(BadRequest) as caught:
        parse_chat_request(chat(**fields))
    assert caught.value.param == param
    assert caught.value.status == 400
    assert sentence in (None, str(caught.value))
    assert str(caught.value).startswith(f"`{param}` ")


@pytest.mark.parametrize("name", ["model", "messages"])
def test_required_fields(name: str) -> None:
    """A field that must be there is named where it is missing."""
    body = json.dumps({key: value for key, value in CHAT.items() if key != name}).encode()
    with pytest.raises(BadRequest) as caught:
        parse_chat_request(body)
    assert (caught.value.param, str(caught.value)) == (name, f"`{name}` is missing.")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [[2**31]]}, "prompt[0][0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": ["a"] * 100, "n": 100}, "prompt"),
        ({"best_of": 200}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": "yes"}, "echo"),
        ({"suffix": "end", "prompt": [1, 2]}, "suffix"),
        ({"grammar": "root ::= [0-9]", "json_schema": {}}, "grammar"),
    ],
)
def test_wrong_completions_are_a_400_that_names_the_field(fields: dict[str, object], param: str) -> None:
    """The same holds for completions, whose prompt has four spellings and no mixtures."""
    with pytest.raises(BadRequest) as caught:
        parse_completion_request(completion(**fields))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url"}]}]},
            "messages[0].content[1]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
    ],
)
def test_what_cannot_be_served_is_refused_not_ignored(fields: dict[str, object], param: str) -> None:
    """Where ignoring a field would give a wrong answer there is a 400 with its own code."""
    with pytest.raises(UnsupportedParameter) as caught:
        parse_chat_request(chat(**fields))
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


SCHEMA: dict[str, object] = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, JsonConstraint(schema={"type": "object"})),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, JsonConstraint(schema=SCHEMA)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}}},
            JsonConstraint(schema=SCHEMA),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "description": "d"}}},
            JsonConstraint(schema={"type": "object"}),
        ),
        ({"json_schema": {}}, JsonConstraint(schema={}, param="json_schema")),
        ({"json_schema": True}, JsonConstraint(schema=True, param="json_schema")),
        ({"grammar": "root ::= [0-9]"}, GbnfConstraint(grammar="root ::= [0-9]")),
    ],
)
def test_what_the_answer_is_held_to(fields: dict[str, object], expected: Constraint | None) -> None:
    """OpenAI's formats and llama-server's become one constraint, on both paths."""
    assert constraint_of(parse_chat_request(chat(**fields))) == expected
    assert constraint_of(parse_completion_request(completion(**fields))) == expected


def test_a_format_and_tools_that_may_be_called_go_together() -> None:
    """The answer is JSON or a call; with tools that must not be called a grammar goes too."""
    schema = {"type": "json_object"}
    request = parse_chat_request(chat(tools=TOOLS, response_format=schema))
    assert (constraint_of(request), tooling_of(request).choice) == (JsonConstraint(schema={"type": "object"}), "auto")
    request = parse_chat_request(chat(tools=TOOLS, tool_choice="none", grammar="root ::= [0-9]"))
    assert constraint_of(request) == GbnfConstraint(grammar="root ::= [0-9]")


BOTH = [ToolDefinition(function=msgspec.convert(each, FunctionDefinition)) for each in (WEATHER, CLOCK)]
NAMED = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Tooling(tools=BOTH)),
        ({"tool_choice": "none"}, Tooling(tools=BOTH, choice="none")),
        ({"tool_choice": "required"}, Tooling(tools=BOTH, choice="required")),
        ({"tool_choice": NAMED}, Tooling(tools=BOTH, choice="required", function="clock")),
        ({"parallel_tool_calls": False}, Tooling(tools=BOTH, parallel=False)),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}},
            Tooling(tools=BOTH[1:], choice="required"),
        ),
        ({"tools": None, "functions": [WEATHER, CLOCK]}, Tooling(tools=BOTH, parallel=False)),
        (
            {"tools": None, "functions": [WEATHER, CLOCK], "function_call": {"name": "clock"}},
            Tooling(tools=BOTH, choice="required", function="clock", parallel=False),
        ),
    ],
)
def test_tools(fields: dict[str, object], expected: Tooling) -> None:
    """Every spelling of a choice, and the older functions, become one `Tooling`."""
    request = parse_chat_request(chat(**{"tools": TOOLS, **fields}))
    assert tooling_of(request) == expected
    assert request.legacy_functions == ("functions" in fields)


def test_a_request_that_was_built_is_checked_like_one_that_was_parsed() -> None:
    """The other APIs make a `ChatRequest` of their own; what its tools lack is said in the same words."""
    allowed = AllowedTools(mode="auto", tools=[NamedToolChoice(function=FunctionName(name="x"))])
    request = ChatRequest(
        model="m",
        messages=[ChatMessage(role="user", content="hi")],
        tools=BOTH,
        tool_choice=AllowedToolsChoice(allowed_tools=allowed),
    )
    with pytest.raises(BadRequest, match="'x'"):
        tooling_of(request)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none"}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False, "a": 1}},
            {"reasoning_effort": "high", "enable_thinking": False, "a": 1},
        ),
    ],
)
def test_what_a_template_is_told(fields: dict[str, object], expected: dict[str, object]) -> None:
    """The effort; what is said to the template itself wins."""
    assert template_kwargs_of(parse_chat_request(chat(**fields))) == expected


def test_which_logprobs_are_wanted() -> None:
    """A chat says whether and how many, a completion how many."""
    assert top_logprobs_of(parse_chat_request(chat(logprobs=True))) == 0
    assert top_logprobs_of(parse_chat_request(chat(logprobs=True, top_logprobs=20))) == 20
    assert top_logprobs_of(parse_chat_request(chat(logprobs=False))) is None
    assert top_logprobs_of(parse_completion_request(completion(logprobs=0))) == 0
    assert top_logprobs_of(parse_completion_request(completion())) is None


def test_an_echo_alone() -> None:
    """With `echo` no new token need be wanted."""
    assert sampling_of(parse_completion_request(completion(echo=True, max_tokens=0))).max_tokens == 0


def test_the_history_of_models_that_think_refuse_and_call_functions() -> None:
    """Reasoning is kept, a refusal is text, a `function_call` is a tool call."""
    call = {"name": "f", "arguments": "{}"}
    messages = [
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "f", "content": "1"},
    ]
    parsed = parse_chat_request(chat(messages=messages)).messages
    assert parsed[0].reasoning_content == "R"
    assert parsed[1].content == "No."
    assert (parsed[2].function_call, msgspec.to_builtins(parsed[2].tool_calls)) == (
        None,
        [{"id": "", "type": "function", "function": call}],
    )


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{", "is not JSON"),
        (b"model=m", "is not JSON"),
        (json.dumps({**CHAT, **COMPLETION}).encode() + b" x", "is not JSON"),
        (b'{"model": NaN}', "is not JSON"),
        (b"[]", "must be an object, not a list"),
        (b'"text"', "must be an object, not a string"),
        (b"null", "must be an object, not null"),
        (b'{"model": "\xff"}', "is not UTF-8 at byte 11"),
        (b'{"unknown": "\xff"}', "is not UTF-8 at byte 13"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests too deeply"),
    ],
)
def test_bodies_that_are_no_json_object(body: bytes, problem: str) -> None:
    """Whatever a body is, it ends in a 400 about the body as a whole, on both paths."""
    for parse in (parse_chat_request, parse_completion_request):
        with pytest.raises(BadRequest) as caught:
            parse(body)
        assert caught.value.param is None
        assert str(caught.value).startswith(f"The request body {problem}")
        assert str(caught.value).endswith("send one JSON object in UTF-8.")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
field_names = st.sampled_from(
    [name for struct in (localaid.ChatRequest, localaid.CompletionRequest) for name in struct.__struct_fields__]
)


@given(st.dictionaries(field_names, json_values, max_size=4))
def test_any_value_in_any_field_is_taken_or_refused(fields: dict[str, object]) -> None:
    """No JSON value in any field does anything but parse or raise BadRequest."""
    for parse, body in ((parse_chat_request, chat(**fields)), (parse_completion_request, completion(**fields))):
        try:
            request = parse(body)
        except BadRequest as error:
            faults = (error.param or "model").replace("[", ".").split(".")
        else:
            sampling_of(request)
            stop_words_of(request)
            constraint_of(request)
            faults = ["model"]
        assert faults[0] in {*CHAT, *COMPLETION, *fields}


@given(st.binary(max_size=60))
def test_any_bytes_are_taken_or_refused(body: bytes) -> None:
    """No body does anything but parse or raise BadRequest."""
    with pytest.raises(BadRequest):
        parse_chat_request(body)


# -- Answers, against the openai package's own types and OpenAI's published document --


HI = TokenLogprob(b"hi", -0.5, [(b"hi", -0.5), (b"\xf0\x9f", -1.5)])
NEVER = TokenLogprob(b"!", float("-inf"), [(b"?", float("-inf"))])
CALL = CallDelta(0, '{"a": 1}', "call_1", "f")


def chat_answer(*answers: Answer, legacy_functions: bool = False) -> ChatCompletion:
    """Return an answer of a chat."""
    return ChatCompletion(
        id="chatcmpl-1",
        created=1700000000,
        model="m",
        choices=[
            chat_choice_of(index, answer, legacy_functions=legacy_functions) for index, answer in enumerate(answers)
        ],
        usage=USAGE,
        system_fingerprint="fp_1",
    )


def completion_answer(answer: Answer) -> Completion:
    """Return an answer of a completion."""
    choices = [completion_choice_of(0, answer)]
    return Completion(id="cmpl-1", created=1700000000, model="m", choices=choices, usage=USAGE)


CARD = ModelCard(
    id="m",
    created=1700000000,
    localaid=ModelExtension(file="m.gguf", sha256="ab" * 32, layer="user", paths=[localaid.CHAT], state="ready"),
)


def test_answers_have_openais_types() -> None:
    """Every answer passes OpenAI's types in strict mode and has no field beside theirs."""
    scored = Answer(text="hi!", logprobs=[HI, NEVER], text_offsets=[0, 2])
    answer = check_answer("ChatCompletion", render_json(chat_answer(scored, Answer(text="hö", finish="length"))))
    assert answer.choices[1].message.content == "hö"
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert (answer.usage.total_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (15, 8)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 1
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].bytes == [0xF0, 0x9F]
    assert answer.choices[0].logprobs.content[1].logprob == -9999.0
    assert check_answer("Completion", render_json(completion_answer(scored))).choices[0].text == "hi!"
    check_answer("ModelList", render_json(ModelList(data=[CARD])))
    card = check_answer("Model", render_json(CARD))
    assert card.to_dict()["localaid"] == {
        "file": "m.gguf",
        "sha256": "ab" * 32,
        "layer": "user",
        "paths": ["/v1/chat/completions"],
        "state": "ready",
    }


def test_an_answer_of_calls_has_no_content_and_one_of_nothing_has_an_empty_one() -> None:
    """Calls come in pieces and are told whole; beside text they do not replace it; the older word has one only."""
    answer = Answer(finish="tool_calls", reasoning="hm")
    answer.add_calls([CallDelta(0, "", "call_1", "f"), CallDelta(0, '{"a"'), CallDelta(1, "{}", "call_2", "g")])
    answer.add_calls([CallDelta(0, ": 1}")])
    told = check_answer("ChatCompletion", render_json(chat_answer(answer, Answer(), Answer(text="t")))).choices
    assert [choice.message.content for choice in told] == [None, "", "t"]
    assert [(call.id, call.function.name, call.function.arguments) for call in told[0].message.tool_calls] == [
        ("call_1", "f", '{"a": 1}'),
        ("call_2", "g", "{}"),
    ]
    assert told[0].message.model_extra == {"reasoning_content": "hm"}
    assert told[0].finish_reason == "tool_calls"
    old = check_answer("ChatCompletion", render_json(chat_answer(answer, legacy_functions=True))).choices[0]
    assert (old.message.tool_calls, old.finish_reason) == (None, "function_call")
    assert (old.message.function_call.name, old.message.function_call.arguments) == ("f", '{"a": 1}')


def test_the_older_shape_of_logprobs() -> None:
    """The chosen token is among the likeliest; nothing led to an echo's first token; torn bytes stay apart."""
    chosen = TokenLogprob(b"\xf0\x9f", -2.0, [(b"hi", -0.5)])
    old = completion_logprobs_of([TokenLogprob(b"Once", None), chosen], [0, 4])
    assert old.tokens == ["Once", "\\xf0\\x9f"]
    assert old.token_logprobs == [None, -2.0]
    assert old.top_logprobs == [None, {"hi": -0.5, "\\xf0\\x9f": -2.0}]
    echo = Answer(text="Once?", logprobs=[TokenLogprob(b"Once", None), chosen], text_offsets=[0, 4])
    check_answer("Completion", render_json(completion_answer(echo)))


def deltas_of(pieces: list[bytes], stop: list[str]) -> list[tuple[str, list[TokenLogprob]]]:
    """Return the text and tokens of each delta as a worker makes them, up to a stop word or the end."""
    stream, deltas, waiting = TextStream(stop), [], []
    for place, piece in enumerate(pieces):
        waiting.append(TokenLogprob(piece, -float(place)))
        text, stopped = stream.push(piece)
        if place == len(pieces) - 1 and not stopped:
            text += stream.finish()
        if text or stopped:
            deltas.append((text, waiting))
            waiting = []
        if stopped:
            break
    return deltas


@given(st.lists(st.text("abcé🍵", min_size=1, max_size=3).map(str.encode), max_size=12), st.text("abcé", max_size=4))
def test_tokens_belong_to_the_text_that_was_delivered(words: list[bytes], stop: str) -> None:
    """However a stop word cuts the text: exactly the tokens that begin before its end, each at its offset."""
    deltas = deltas_of(words, [stop] if stop else [])
    stream, found = LogprobStream(), []
    for text, waiting in deltas:
        found += list(zip(*stream.push(text, waiting), strict=True))
    length = sum(len(text) for text, _ in deltas)
    offsets = [len(b"".join(words[:place]).decode()) for place in range(len(words))]
    expected = [(TokenLogprob(word, -float(place)), offsets[place]) for place, word in enumerate(words)]
    assert found == [(token, offset) for token, offset in expected if offset < length]


@given(st.text("aé🍵", max_size=8), st.data())
def test_torn_characters_keep_their_tokens(text: str, data: st.DataObject) -> None:
    """Every token of a text is told, also where it is a third of a character; offsets never fall back."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)))))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if raw[a:b]]
    stream, tokens, offsets = LogprobStream(), list[bytes](), list[int]()
    for part, waiting in deltas_of(pieces, []):
        told, where = stream.push(part, waiting)
        tokens += [each.token for each in told]
        offsets += where
    assert tokens == pieces
    assert offsets == sorted(offsets)


def test_tokens_of_what_no_client_sees_are_left_out() -> None:
    """The space that a template strips, the marks around reasoning, and a call's tokens."""
    stream = LogprobStream()
    assert stream.push("Hi", [TokenLogprob(b"  Hi", -1.0)]) == ([TokenLogprob(b"  Hi", -1.0)], [0])
    assert stream.push("", [TokenLogprob(b"<tool_call>", -1.0)]) == ([], [])
    marked = [TokenLogprob(b"</think>", -1.0), TokenLogprob(b"\n\n", -1.0), TokenLogprob(b"So", -2.0)]
    assert LogprobStream().push("So", marked) == (marked[2:], [0])
    bad = [TokenLogprob(b"\xff", -1.0)]
    assert LogprobStream().push("\ufffd?", bad) == (bad, [0])


def renderer(
    kind: Literal["chat", "completion"] = "chat", *, include_usage: bool = True, legacy_functions: bool = False
) -> ChunkRenderer:
    """Return the renderer of a stream whose model's name needs escapes."""
    return ChunkRenderer(
        kind=kind,
        request_id="chatcmpl-1",
        created=1700000000,
        model='a "\0"\u2028',
        include_usage=include_usage,
        legacy_functions=legacy_functions,
    )


def whole_stream(kind: Literal["chat", "completion"]) -> list[dict[str, Any]]:
    """Return the events of a stream of two answers."""
    chunks = renderer(kind)
    return events(
        chunks.render_role(0)
        + chunks.render_delta(0, "Hi")
        + chunks.render_role(1)
        + chunks.render_delta(1, "\n\nHö")
        + chunks.render_finish(1, "length")
        + chunks.render_finish(0, "stop")
        + chunks.render_usage(USAGE)
    )


def test_a_chats_stream_has_openais_types() -> None:
    """The first chunk of an answer has the role, the last one the reason, and the stream's last one the usage."""
    stream = whole_stream("chat")
    chunks = [check_answer("ChatCompletionChunk", event) for event in stream]
    assert [event["choices"][0]["delta"] for event in stream[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "Hi"},
        {"role": "assistant", "content": ""},
        {"content": "\n\nHö"},
        {},
        {},
    ]
    assert [event["choices"][0]["finish_reason"] for event in stream[:-1]] == [None] * 4 + ["length", "stop"]
    assert [event["choices"][0]["index"] for event in stream[:-1]] == [0, 0, 1, 1, 1, 0]
    assert [event["usage"] for event in stream[:-1]] == [None] * 6
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_a_completions_stream_has_openais_types() -> None:
    """It has no roles; its reason is null until the end, as OpenAI sends it, though their type leaves that out."""
    stream = whole_stream("completion")
    assert [event["choices"][0]["finish_reason"] for event in stream[:-1]] == [None, None, "length", "stop"]
    assert [event["choices"][0]["text"] for event in stream[:-1]] == ["Hi", "\n\nHö", "", ""]
    for event in stream:
        check_answer("CompletionChunk", event)


def test_a_chunk_of_reasoning_calls_and_logprobs() -> None:
    """Each has its own event; a call's first one has id, type and name, the others its arguments only."""
    chunks = renderer()
    stream = events(
        chunks.render_reasoning(0, "hm")
        + chunks.render_scored(0, "", [NEVER])
        + chunks.render_scored(0, "hi", [HI])
        + chunks.render_calls(0, [CallDelta(0, "", "call_1", "f"), CallDelta(1, "{}", "call_2", "g")])
        + chunks.render_calls(0, [CallDelta(0, '{"a": 1}')])
        + chunks.render_finish(0, "tool_calls")
    )
    for event in stream:
        check_answer("ChatCompletionChunk", event)
    choices = [event["choices"][0] for event in stream]
    assert [choice["delta"] for choice in choices] == [
        {"reasoning_content": "hm"},
        {"content": "hi"},
        {
            "tool_calls": [
                {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}},
                {"index": 1, "id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1}'}}]},
        {},
    ]
    assert choices[1]["logprobs"] == json.loads(msgspec.json.encode(chat_logprobs_of([HI])))
    assert [choice["logprobs"] for choice in choices if choice is not choices[1]] == [None] * 4
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_a_stream_in_the_older_words() -> None:
    """`functions` get a `function_call`, completions parallel lists whose offsets count from the answer's start."""
    chunks = renderer(legacy_functions=True)
    stream = events(chunks.render_calls(0, [CALL, CallDelta(1, "{}")]) + chunks.render_finish(0, "tool_calls"))
    assert [event["choices"][0]["delta"] for event in stream] == [
        {"function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {},
    ]
    assert stream[-1]["choices"][0]["finish_reason"] == "function_call"
    chunks = renderer("completion")
    stream += events(chunks.render_scored(0, "hi", [HI]) + chunks.render_scored(0, "hi", [HI]))
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in stream[2:]] == [[0], [2]]
    for event in stream:
        check_answer("CompletionChunk" if event["object"] == "text_completion" else "ChatCompletionChunk", event)


def test_usage_is_left_out_where_it_was_not_asked_for() -> None:
    """Without `include_usage` no chunk has the field, and there is no chunk for it."""
    chunks = renderer(include_usage=False)
    assert chunks.render_usage(USAGE) == b""
    for event in events(chunks.render_role(0) + chunks.render_delta(0, "x") + chunks.render_finish(0, "stop")):
        assert "usage" not in event


@given(st.text(), st.integers(0, 127), st.booleans())
def test_a_rendered_delta_is_its_structs_encoding(text: str, index: int, include_usage: bool) -> None:
    """The short cut of the hot path gives the very bytes of the struct."""
    chunks = renderer(include_usage=include_usage)
    usage = None if include_usage else msgspec.UNSET
    struct = ChatChunk(
        id="chatcmpl-1",
        created=1700000000,
        model='a "\0"\u2028',
        choices=[ChatChunkChoice(index=index, delta=ChatDelta(content=text))],
        usage=usage,
    )
    for _ in range(2):  # cut open, then kept
        assert chunks.render_delta(index, text) == render_sse(struct)
    struct.choices[0].delta = ChatDelta(reasoning_content=text)
    for _ in range(2):
        assert chunks.render_reasoning(index, text) == render_sse(struct)
    old = Completion(
        id="chatcmpl-1",
        created=1700000000,
        model='a "\0"\u2028',
        choices=[CompletionChoice(index=index, text=text)],
        usage=usage,
    )
    assert renderer("completion", include_usage=include_usage).render_delta(index, text) == render_sse(old)


@given(st.text())
def test_an_event_is_one_line_by_anybodys_rules(text: str) -> None:
    """No text, however odd, cuts an event in two, not even for clients that split lines as Python's str does."""
    encoded = renderer().render_delta(0, text)
    assert encoded.decode().splitlines() == [encoded.decode()[:-2], ""]
    assert events(encoded)[0]["choices"][0]["delta"]["content"] == text


def test_comments_and_the_end() -> None:
    """A comment is one line, the end is OpenAI's."""
    assert render_sse_comment("position 3\nof 4") == b": position 3 of 4\n\n"
    assert SSE_DONE == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "error",
    [
        BadRequest(param="n", problem="must be at most 128"),
        BadRequest(param=None, problem="is empty"),
        localaid.ContextLengthExceeded(prompt_tokens=9000, ctx_size=8192),
    ],
)
def test_errors_have_openais_envelope(error: LocalaidError) -> None:
    """An error is OpenAI's envelope, as a body and as the event that ends a stream."""
    envelope = json.loads(render_error(error))
    numbers = {"n_prompt_tokens": 9000, "n_ctx": 8192} if error.code == "context_length_exceeded" else {}
    told = {"message": str(error), "type": "invalid_request_error", "param": error.param, "code": error.code}
    assert envelope == {"error": told | numbers}
    assert events(render_sse_error(error)) == [envelope]


def test_errors_are_plain_fields() -> None:
    """An error of this section can cross the wire: its fields make it anew."""
    error = UnsupportedParameter(param="tools", problem="is not supported")
    again = UnsupportedParameter(**dataclasses.asdict(error))
    assert (str(again), again.param, again.code) == (str(error), "tools", "unsupported_parameter")


@pytest.mark.parametrize(
    ("type_name", "wrong"),
    [
        ("ModelList", {"object": "list", "data": [{"id": 5, "object": "model", "created": 1, "owned_by": "x"}]}),
        ("Model", {"id": "m", "object": "modell", "created": 1, "owned_by": "x"}),
        ("Model", {"id": "m", "object": "model", "created": 1}),
        ("Model", {"id": "m", "object": "model", "created": 1, "owned_by": "x", "more": 1}),
        ("ChatCompletion", {"id": "m"}),
    ],
)
def test_the_check_of_shapes_finds_what_is_wrong(type_name: str, wrong: dict[str, Any]) -> None:
    """A wrong type, a wrong word, a missing key, an unknown one."""
    with pytest.raises((AssertionError, ValueError)):
        check_answer(type_name, wrong)


@pytest.mark.skipif(not OPENAPI.exists(), reason=f"OpenAI's document is not beside the checkout ({OPENAPI})")
def test_errors_follow_openais_published_document() -> None:
    """The envelope has OpenAI's keys, and each type that is checked has its schema in the document."""
    schemas = json.loads(OPENAPI.read_bytes())["components"]["schemas"]
    assert {schema for _, schema in TYPES.values()} <= set(schemas)
    error = json.loads(render_error(BadRequest(param=None, problem="is empty")))
    assert set(error["error"]) == set(schemas["Error"]["required"])
