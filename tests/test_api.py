"""Section 5, API: bodies become structs or a 400 that names the field; answers have OpenAI's exact shape."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion as OpenAICompletion
from openai.types import Model as OpenAIModel
from openai.types.chat import ChatCompletion as OpenAIChatCompletion
from openai.types.chat import ChatCompletionChunk as OpenAIChatChunk
from pydantic import BaseModel

import localaid
from localaid import (
    NO_TOKEN_LIMIT,
    SSE_DONE,
    AssistantMessage,
    BadRequest,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    ChunkRenderer,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    LocalaidError,
    ModelCard,
    ModelExtension,
    ModelList,
    Sampling,
    TopLogprob,
    UnsupportedParameter,
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
    usage_of,
)

OPENAPI = Path(__file__).resolve().parents[2] / "shared" / "openai-openapi-reduced.json"

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "Once"}
USAGE = usage_of(prompt_tokens=12, completion_tokens=3, cached_tokens=8)


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
        ({"max_tokens": -1}, NO_TOKEN_LIMIT),
        ({"max_tokens": None}, None),
    ],
)
def test_token_limits(fields: dict[str, object], expected: int | None) -> None:
    """The newest name of the limit wins; -1 is no limit, which is more than to leave the choice to the rule."""
    assert sampling_of(parse_chat_request(chat(**fields))).max_tokens == expected


@given(st.integers(-(2**63), 2**63 - 1))
def test_seeds_fit_llama_cpp(seed: int) -> None:
    """Every seed but -1 becomes 32 bits, and never llama.cpp's word for "random"."""
    fitted = sampling_of(parse_chat_request(chat(seed=seed))).seed
    assert fitted is None if seed == -1 else fitted is not None and 0 <= fitted < 2**32 - 1
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
    """Unknown fields, nulls, and fields of issue 3 that ask for nothing do not stand in the way."""
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
        )
    )
    assert not request.include_usage
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert parse_chat_request(chat(tools=tools, tool_choice="none")).model == "m"
    assert parse_chat_request(chat(stream=True, stream_options={"include_usage": True})).include_usage
    assert parse_completion_request(completion(echo=False, suffix="", best_of=3, n=3, logprobs=None)).n == 3
    assert parse_completion_request(completion(best_of=0)).n is None


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"model": ""}, "model", "`model` must have at least 1 characters."),
        ({"model": None}, "model", "`model` must be a string, not null."),
        ({"messages": None}, "messages", "`messages` must be a list, not null."),
        ({"messages": []}, "messages", "`messages` must have at least 1 items."),
        ({"messages": ["hi"]}, "messages[0]", "`messages[0]` must be an object, not a string."),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "`messages[0].role` is missing."),
        ({"messages": [{"role": "boss", "content": ""}]}, "messages[0].role", None),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", None),
        ({"messages": [{"role": "user"}]}, "messages[0].content", None),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", None),
        ({"temperature": "hot"}, "temperature", "`temperature` must be a number or null, not a string."),
        ({"temperature": 2.5}, "temperature", "`temperature` must be at most 2."),
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
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs", None),
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
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"grammar": "root ::= [0-9]"}, "grammar"),
        ({"json_schema": {"type": "object"}}, "json_schema"),
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
def test_what_cannot_be_served_yet_is_refused_not_ignored(fields: dict[str, object], param: str) -> None:
    """Where ignoring a field would give a wrong answer there is a 400 with its own code."""
    with pytest.raises(UnsupportedParameter) as caught:
        parse_chat_request(chat(**fields))
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize("fields", [{"echo": True}, {"suffix": "end"}, {"logprobs": 0}, {"best_of": 2}])
def test_completions_that_cannot_be_served_yet(fields: dict[str, object]) -> None:
    """The same holds for the older path."""
    with pytest.raises(UnsupportedParameter) as caught:
        parse_completion_request(completion(**fields))
    assert [caught.value.param] == list(fields)


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
            faults = ["model"]
        assert faults[0] in {*CHAT, *COMPLETION, *fields}


@given(st.binary(max_size=60))
def test_any_bytes_are_taken_or_refused(body: bytes) -> None:
    """No body does anything but parse or raise BadRequest."""
    with pytest.raises(BadRequest):
        parse_chat_request(body)


# -- Answers, against the openai package's own types and OpenAI's published document --


ModelT = TypeVar("ModelT", bound=BaseModel)
LOGPROBS = ChatLogprobs(
    content=[
        ChatTokenLogprob(
            token="hi",  # noqa: S106  # a word, not a password
            logprob=-0.5,
            bytes=[104, 105],
            top_logprobs=[TopLogprob(token="hi", logprob=-0.5, bytes=[104, 105])],  # noqa: S106  # the same
        )
    ]
)
OLD_LOGPROBS = CompletionLogprobs(tokens=["hi"], token_logprobs=[-0.5], top_logprobs=[{"hi": -0.5}], text_offset=[0])


def check_type(kind: type[ModelT], encoded: bytes, *, extension: str | None = None) -> ModelT:
    """Return what openai's own type makes of an answer, strictly, and without a field that the type does not know."""
    answer = kind.model_validate_json(encoded, strict=True)
    todo: list[object] = [answer]
    while todo:
        match todo.pop():
            case BaseModel() as model:
                assert set(model.model_extra or {}) <= {extension}
                todo += [value for _, value in model]
            case list() as items:
                todo += items
    return answer


def chat_answer(logprobs: ChatLogprobs | None = None) -> ChatCompletion:
    """Return an answer of a chat with two choices."""
    return ChatCompletion(
        id="chatcmpl-1",
        created=1700000000,
        model="m",
        choices=[
            ChatChoice(index=0, message=AssistantMessage(content="hi"), logprobs=logprobs, finish_reason="stop"),
            ChatChoice(index=1, message=AssistantMessage(content="hö"), finish_reason="length"),
        ],
        usage=USAGE,
    )


def completion_answer(logprobs: CompletionLogprobs | None = None) -> Completion:
    """Return an answer of a completion."""
    return Completion(
        id="cmpl-1",
        created=1700000000,
        model="m",
        choices=[CompletionChoice(index=0, text="hi", logprobs=logprobs, finish_reason="stop")],
        usage=USAGE,
    )


CARD = ModelCard(
    id="m",
    created=1700000000,
    localaid=ModelExtension(file="m.gguf", sha256="ab" * 32, layer="user", paths=[localaid.CHAT], state="ready"),
)


def test_answers_have_openais_types() -> None:
    """Every answer passes the openai package's types in strict mode and has no field beside theirs."""
    answer = check_type(OpenAIChatCompletion, render_json(chat_answer(LOGPROBS)))
    assert answer.choices[1].message.content == "hö"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.total_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (15, 8)
    assert check_type(OpenAICompletion, render_json(completion_answer(OLD_LOGPROBS))).choices[0].text == "hi"
    card = check_type(OpenAIModel, render_json(CARD), extension="localaid")
    assert json.loads(render_json(ModelList(data=[CARD])))["data"] == [json.loads(render_json(CARD))]
    assert card.to_dict()["localaid"] == {
        "file": "m.gguf",
        "sha256": "ab" * 32,
        "layer": "user",
        "paths": ["/v1/chat/completions"],
        "state": "ready",
    }


def renderer(kind: Literal["chat", "completion"] = "chat", *, include_usage: bool = True) -> ChunkRenderer:
    """Return the renderer of a stream whose model's name needs escapes."""
    return ChunkRenderer(
        kind=kind, request_id="chatcmpl-1", created=1700000000, model='a "\0"\u2028', include_usage=include_usage
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
    chunks = [check_type(OpenAIChatChunk, json.dumps(event).encode()) for event in stream]
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
        for choice in event["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        check_type(OpenAICompletion, json.dumps(event).encode())


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
    assert envelope == {
        "error": {"message": str(error), "type": "invalid_request_error", "param": error.param, "code": error.code}
    }
    assert events(render_sse_error(error)) == [envelope]


def test_errors_are_plain_fields() -> None:
    """An error of this section can cross the wire: its fields make it anew."""
    error = UnsupportedParameter(param="tools", problem="is not supported")
    again = UnsupportedParameter(**dataclasses.asdict(error))
    assert (str(again), again.param, again.code) == (str(error), "tools", "unsupported_parameter")


# -- OpenAI's published document --


Schema = dict[str, Any]
KINDS: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def violations(schema: Schema, value: object, schemas: Schema, at: str = "$") -> list[str]:
    """Return where `value` departs from a schema of OpenAI's document (types, enums, required, unions, items)."""
    if value is None and schema.get("nullable"):
        return []
    if "$ref" in schema:
        return violations(schemas[schema["$ref"].rpartition("/")[2]], value, schemas, at)
    if "type" in schema and not isinstance(value, KINDS[schema["type"]]):
        return [f"{at}: is no {schema['type']}"]
    found = [each for part in schema.get("allOf", ()) for each in violations(part, value, schemas, at)]
    unions = [schema[union] for union in ("anyOf", "oneOf") if union in schema]
    if any(all(violations(part, value, schemas, at) for part in union) for union in unions):
        found.append(f"{at}: fits nothing of a union")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at}: {value!r} is none of {schema['enum']}")
    return found + violations_inside(schema, value, schemas, at)


def violations_inside(schema: Schema, value: object, schemas: Schema, at: str) -> list[str]:
    """Return the same of what an object or list holds; an object may not have more than its schema knows."""
    found: list[str] = []
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        found += [f"{at}: lacks {name}" for name in schema.get("required", ()) if name not in value]
        found += [f"{at}: {name} is unknown" for name in value if properties and name not in properties]
        found += [
            each
            for name in value
            for each in violations(properties.get(name, {}), value[name], schemas, f"{at}.{name}")
        ]
    elif isinstance(value, list):
        items = schema.get("items", {})
        for place, item in enumerate(value):
            found += violations(items, item, schemas, f"{at}[{place}]")
    return found


@pytest.mark.skipif(not OPENAPI.exists(), reason=f"OpenAI's document is not beside the checkout ({OPENAPI})")
def test_answers_follow_openais_published_document() -> None:
    """Every answer and event follows OpenAI's schemas, too, which say more than the package's types."""
    schemas = json.loads(OPENAPI.read_bytes())["components"]["schemas"]
    card = json.loads(render_json(CARD))
    del card["localaid"]  # our extension
    answers = [
        ("CreateChatCompletionResponse", json.loads(render_json(chat_answer()))),
        ("CreateChatCompletionResponse", json.loads(render_json(chat_answer(LOGPROBS)))),
        ("CreateCompletionResponse", json.loads(render_json(completion_answer(OLD_LOGPROBS)))),
        ("ListModelsResponse", {"object": "list", "data": [card]}),
        ("ErrorResponse", json.loads(render_error(BadRequest(param=None, problem="is empty")))),
        *(("CreateChatCompletionStreamResponse", event) for event in whole_stream("chat")),
    ]
    assert [(name, violations({"$ref": name}, answer, schemas)) for name, answer in answers] == [
        (name, []) for name, _ in answers
    ]
    assert violations({"$ref": "Model"}, {"id": 5, "object": "modell", "created": 1}, schemas) != []
