"""TOOLS: formats are found, calls are read however the text was cut, and grammars force what can be read."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

import jsonschema
import llama_cpp
import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance.llamacpp import lltokenizer_from_vocab

from localaid import (
    CHOSEN_FORMATS,
    REASONING_FORMATS,
    TOOL_FORMATS,
    Arguments,
    FunctionDefinition,
    JsonConstraint,
    LarkConstraint,
    OutputParser,
    Parsed,
    ReasoningFormat,
    ToolDefinition,
    ToolFormat,
    Tooling,
    _encode_schema,
    describe_tools,
    find_reasoning_format,
    find_tool_format,
    marks_of,
    opens_reasoning,
    plan_constraint,
    write_calls,
    write_result,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TEMPLATES = Path("/tmp/dl/sdist/llama_cpp_python-0.3.36/vendor/llama.cpp/models/templates")  # noqa: S108

WEATHER: dict[str, object] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "hours": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        "place": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "high": {"type": "boolean"}},
            "required": ["high"],
        },
    },
    "required": ["city", "unit"],
}
TOOLS = [
    ToolDefinition(function=FunctionDefinition(name="get_weather", description="Now", parameters=WEATHER)),
    ToolDefinition(function=FunctionDefinition(name="get_weather_map", parameters=WEATHER)),
    ToolDefinition(function=FunctionDefinition(name="stop")),
]
FORMS = list(TOOL_FORMATS.values())
THINKING = list(REASONING_FORMATS.values())
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
each_reasoning = pytest.mark.parametrize("reasoning", THINKING, ids=lambda form: form.name)


def parse(
    form: ToolFormat | None,
    pieces: Iterable[str],
    *,
    reasoning: ReasoningFormat | None = None,
    inside: bool = False,
) -> tuple[str, str, list[tuple[str, str, str]]]:
    """Return an answer's reasoning, its content and its calls as (id, name, arguments)."""
    ids = itertools.count()
    parser = OutputParser(form, reasoning, Tooling(tools=TOOLS), inside=inside, new_id=lambda: f"id{next(ids)}")
    parsed = [parser.push(piece) for piece in pieces]
    parsed.append(parser.finish())
    return joined(parsed)


def joined(parsed: Sequence[Parsed]) -> tuple[str, str, list[tuple[str, str, str]]]:
    """Put the pieces together as a client does; the first piece of a call has its id and name, no other one has."""
    calls: list[list[str]] = []
    for delta in itertools.chain.from_iterable(each.calls for each in parsed):
        if delta.index == len(calls):
            assert delta.id
            assert delta.name
            calls.append([delta.id, delta.name, ""])
        else:
            assert not delta.id
            assert not delta.name
        assert delta.index == len(calls) - 1
        calls[delta.index][2] += delta.arguments
    made = [(call[0], call[1], call[2]) for call in calls]
    return "".join(each.reasoning for each in parsed), "".join(each.content for each in parsed), made


def named(calls: Sequence[tuple[str, str, str]]) -> list[tuple[str, object]]:
    """Return each call's name and arguments."""
    return [(name, json.loads(arguments)) for _, name, arguments in calls]


# -- finding a format --

FOUND = {
    "hermes": "{% if tools %}<tools>{{ tools }}</tools> <tool_call>{% endif %}",
    "qwen3-coder": "<tool_call>\n<function=x>\n<parameter=y>",
    "llama-3": '<|start_header_id|>{{ tools }} {"name": f, "parameters": d}',
    "mistral": "[TOOL_CALLS][",
    "mistral-args": "[TOOL_CALLS]{{ name }}[ARGS]",
    "gemma": "<start_of_turn>user",
    "gemma4": "<|tool_call>call:",
    "deepseek-r1": "<\uff5ctool\u2581calls\u2581begin\uff5c>function```json",
    "deepseek-v3.1": "<\uff5ctool\u2581calls\u2581begin\uff5c>",
    "granite": "<|start_of_role|> <|tool_call|>",
    "phi-4": "<|tool|>{{ message['tools'] }}<|/tool|>",
    "functools": "functools[",
    "command-r": "<|START_ACTION|>[",
    "harmony": "<|start|>assistant<|channel|>",
    "json": "{{ messages }}",
}


@pytest.mark.parametrize(("name", "template"), FOUND.items())
def test_find_tool_format(name: str, template: str) -> None:
    """A template's own markers show its format."""
    form = find_tool_format(template)
    assert form is not None
    assert form.name == name


def test_find_by_rule() -> None:
    """A rule's word goes before the template; "none" switches off; ChatML without tools gets Hermes' format."""
    assert find_tool_format("[TOOL_CALLS]", "hermes") is TOOL_FORMATS["hermes"]
    assert find_tool_format("[TOOL_CALLS]", "none") is None
    assert find_tool_format("<|im_start|>{{ messages }}") is TOOL_FORMATS["hermes"]
    assert find_tool_format(None) is TOOL_FORMATS["json"]
    assert find_reasoning_format("<think>", "none") is None
    assert find_reasoning_format("", "think") is REASONING_FORMATS["think"]
    assert find_reasoning_format("{{ messages }}") is None
    assert set(CHOSEN_FORMATS["tool_format"]) == {*TOOL_FORMATS, "none"}
    assert set(CHOSEN_FORMATS["reasoning_format"]) == {*REASONING_FORMATS, "none"}


REAL = {
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", None),
    "Qwen-Qwen3-0.6B": ("hermes", "think"),
    "Qwen-QwQ-32B": ("hermes", "think"),
    "Qwen3-Coder": ("qwen3-coder", None),
    "Qwen3.5-4B": ("qwen3-coder", "think"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", None),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama-3", None),
    "meta-llama-Llama-3.2-3B-Instruct": ("llama-3", None),
    "meta-llama-Llama-3.3-70B-Instruct": ("llama-3", None),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", None),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral-args", None),
    "unsloth-mistral-Devstral-Small-2507": ("mistral-args", None),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral-args", "mistral"),
    "google-gemma-2-2b-it": ("gemma", None),
    "google-gemma-4-31B-it": ("gemma4", "gemma4"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("deepseek-r1", "think"),
    "llama-cpp-deepseek-r1": ("deepseek-r1", "think"),
    "deepseek-ai-DeepSeek-V3.1": ("deepseek-v3.1", "think"),
    "ibm-granite-granite-3.3-2B-Instruct": ("granite", "granite"),
    "ibm-granite-granite-4.0": ("hermes", None),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("command-r", "command-r"),
    "openai-gpt-oss-120b": ("harmony", "harmony"),
    "fireworks-ai-llama-3-firefunction-v2": ("functools", None),
    "GLM-4.6": ("glm", "think"),
    "HuggingFaceTB-SmolLM3-3B": ("hermes", "think"),
    "ByteDance-Seed-OSS": ("json", "seed"),
}


@pytest.mark.parametrize(("file", "expected"), REAL.items(), ids=REAL)
def test_find_in_real_templates(file: str, expected: tuple[str, str | None]) -> None:
    """The formats of models that people run are found in their own templates."""
    path = TEMPLATES / f"{file}.jinja"
    if not path.exists():
        pytest.skip("llama.cpp's collection of templates is not on this machine")
    source = path.read_text()
    form, reasoning = find_tool_format(source), find_reasoning_format(source)
    assert (form and form.name, reasoning and reasoning.name) == expected


def test_opens_reasoning() -> None:
    """A prompt may end inside of the reasoning, with or without a line's end behind the mark."""
    think = REASONING_FORMATS["think"]
    assert opens_reasoning("<|im_start|>assistant\n<think>\n", think)
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n", think)
    assert not opens_reasoning("<think>", None)


# -- reading --

values = st.fixed_dictionaries(
    {
        "city": st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12).map(str.strip),
        "unit": st.sampled_from(["celsius", "fahrenheit"]),
    },
    optional={
        "days": st.integers(1, 9),
        "hours": st.lists(st.integers(), max_size=3),
        "place": st.fixed_dictionaries({"name": st.text('a"{}[],: \\n', max_size=5), "high": st.booleans()}),
    },
)
calls = st.lists(st.tuples(st.sampled_from(["get_weather", "get_weather_map"]), values), min_size=1, max_size=3)
fragments = [
    "<tool_call>", "</tool_call>", '{"name": "get_weather"', ', "arguments": {', "}", "[", "]", "```json", "hello",
    "\n",
    "get_weather", "stop", '"', ":", '"parameters": ', "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "{", ",", "\\",
    "<|channel|>", "analysis", "<|message|>", "to=functions.stop", "<|start|>", "<|end|>", "<|tool_call>call:", '<|"|>',
    "<function=", ">", "<parameter=", "</parameter>", "</function>", "<arg_key>", "</arg_key>", "<arg_value>", "x", " ",
    "<|START_ACTION|>", "functools", "<|tool_call|>", "<\uff5ctool\u2581calls\u2581begin\uff5c>",
    "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581sep\uff5c>",
]  # fmt: skip


def cut(text: str, places: list[int]) -> list[str]:
    """Cut a text at some places."""
    ends = sorted({min(place, len(text)) for place in places} | {len(text)})
    return [text[start:end] for start, end in itertools.pairwise([0, *ends])]


@each_form
@settings(max_examples=40, deadline=None)
@given(made=calls)
def test_round_trip(form: ToolFormat, made: list[tuple[str, Arguments]]) -> None:
    """What `write_calls` writes, the reader reads, character by character."""
    text = write_calls(form, made)
    reasoning, content, read = parse(form, text)
    assert (reasoning, content) == ("", "")
    assert named(read) == made
    assert [call[0] for call in read] == [f"id{place}" for place in range(len(made))]


@each_form
@pytest.mark.parametrize("thinks", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.sampled_from(fragments) | calls, max_size=12),
    places=st.lists(st.integers(0, 200), max_size=12),
    inside=st.booleans(),
)
def test_cuts_change_nothing(
    form: ToolFormat, thinks: bool, parts: list[str | list[tuple[str, Arguments]]], places: list[int], inside: bool
) -> None:
    """However a text is cut, the same comes out of it."""
    text = "".join(part if isinstance(part, str) else write_calls(form, part) for part in parts)
    reasoning = REASONING_FORMATS.get("harmony" if form.style == "harmony" else "think") if thinks else None
    whole = parse(form, [text], reasoning=reasoning, inside=inside)
    assert parse(form, cut(text, places), reasoning=reasoning, inside=inside) == whole
    assert parse(form, text, reasoning=reasoning, inside=inside) == whole


@each_form
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from(fragments), max_size=10))
def test_no_call_is_content(form: ToolFormat, parts: list[str]) -> None:
    """Where nothing is called, the text comes out whole, and once."""
    text = "".join(parts)
    if form.style == "harmony" and "<|" in text:
        return  # its headers are never content
    _, content, read = parse(form, text)
    if not read:
        assert content == text


LOOKS_LIKE_A_CALL = [
    ("hermes", 'The tag <tool_call> opens a call, as in <tool_call>{"name": "unknown", "arguments": {}}</tool_call>.'),
    ("hermes", '<tool_call>{"name": "unknown'),
    ("llama-3", '{"name": "Bob", "parameters": {"age": 4}}'),
    ("llama-3", '{"name": "get_weather", "age": 4}'),
    ("json", '{"city": "Oslo"}'),
    ("json", '[1] The "name" says it. {"name": "get_weather", "arguments": {}}'),
    ("mistral-args", "[TOOL_CALLS]get_weather is how to call"),
    ("functools", "import functools\nfunctools[0]"),
    ("gemma", '```json\n{"a": 1}\n```'),
    ("qwen3-coder", "<function=nothing>"),
    ("command-r", "<|START_ACTION|>[]<|END_ACTION|>"),
]


@pytest.mark.parametrize(("name", "text"), LOOKS_LIKE_A_CALL)
def test_looks_like_a_call(name: str, text: str) -> None:
    """A text that turns out to be no call is content."""
    assert parse(TOOL_FORMATS[name], text) == ("", text, [])


OSLO = {"city": "Oslo"}
DEEPSEEK = (
    "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>get_weather\n"
    '```json\n{"city": "Oslo"}\n```<\uff5ctool\u2581call\u2581end\uff5c>\n<\uff5ctool\u2581calls\u2581end\uff5c>'
)
COMMAND_R = (
    '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Oslo"}}\n]'
    "<|END_ACTION|>"
)
HARMONY = (
    "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary"
    ' json<|message|>{"city": "Oslo"}<|call|>'
)
CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
SWAPPED = '{"arguments": {"city": "Oslo"}, "name": "get_weather"}'
AS_MODELS_WRITE = [
    ("hermes", f"Let me see.\n<tool_call>\n{SWAPPED}\n</tool_call>\n", "Let me see."),
    ("hermes", f"<tool_call>[{CALL}]</tool_call>", ""),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>', ""),
    ("hermes", f"<tool_call>{CALL}", ""),
    ("hermes", f'<tool_call>{{"type": "function", "function": {CALL}}}', ""),
    ("llama-3", '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo"}}', ""),
    ("llama-3", '\n{"name": "get_weather", "parameters": {"city": "Oslo"}}', ""),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]', ""),
    ("mistral-args", '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Oslo"}', ""),
    ("deepseek-r1", DEEPSEEK, ""),
    ("granite", f"<|tool_call|>[{CALL}]", ""),
    ("command-r", COMMAND_R, ""),
    ("harmony", HARMONY, "Wait."),
    ("qwen3-coder", "<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>", ""),
    ("gemma", '```json\n[{"name": "get_weather", "parameters": {"city": "Oslo"}}]\n```', ""),
    ("gemma4", '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>}<tool_call|>', ""),
]


@pytest.mark.parametrize(("name", "text", "before"), AS_MODELS_WRITE)
def test_as_models_write(name: str, text: str, before: str) -> None:
    """Calls in the spellings that models are known for."""
    _, content, read = parse(TOOL_FORMATS[name], text)
    assert (content, named(read)) == (before, [("get_weather", OSLO)])


def test_streamed() -> None:
    """The name comes as soon as it is known, the arguments as they come."""
    parser = OutputParser(TOOL_FORMATS["hermes"], None, Tooling(tools=TOOLS), new_id=lambda: "call_1")
    assert parser.push('Hi <tool_call>{"name": "get_wea') == Parsed("", "Hi", [])
    assert [call.name for call in parser.push('ther", "arguments": ').calls] == ["get_weather"]
    assert [call.arguments for call in parser.push('{"city": "O').calls] == ['{"city": "O']
    assert [call.arguments for call in parser.push('slo"}}</tool').calls] == ['slo"}']
    assert parser.push("_call>") == Parsed("", "", [])
    assert parser.finish() == Parsed("", "", [])
    assert parser.calls == 1


def test_values_by_schema() -> None:
    """Between tags a number is a text where the schema says so."""
    text = "<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n12\n"
    _, _, read = parse(TOOL_FORMATS["qwen3-coder"], text + "</parameter>\n</function>\n</tool_call>")
    assert named(read) == [("get_weather", {"city": "12", "days": 12})]


def test_nesting_ends() -> None:
    """A text that nests without end is read all the same."""
    deep = "{a:" * 5000
    _, content, read = parse(TOOL_FORMATS["gemma4"], [f"<|tool_call>call:stop{deep}"])
    assert len(read) == 1
    assert content == ""
    parse(TOOL_FORMATS["json"], ["[" * 5000, '{"name": ' * 5000])


# -- reasoning --


@each_reasoning
@pytest.mark.parametrize("inside", [False, True])
def test_reasoning(reasoning: ReasoningFormat, inside: bool) -> None:
    """Thoughts, then the answer, without the marks and the white space that belongs to them."""
    if inside and reasoning.name == "harmony":
        return  # its prompts never end there
    start = "" if inside else reasoning.start
    before, behind = reasoning.answer
    text = f"{start}\nI <b>think</b>.\n{reasoning.end}{reasoning.then}{before}The answer.{behind}"
    assert parse(None, text, reasoning=reasoning, inside=inside) == ("I <b>think</b>.", "The answer.", [])


def test_reasoning_is_at_the_start() -> None:
    """A mark in the middle of an answer is content; a cut-off thought is a thought."""
    think = REASONING_FORMATS["think"]
    assert parse(None, "Use <think> here.", reasoning=think) == ("", "Use <think> here.", [])
    assert parse(None, "<think>I w", reasoning=think) == ("I w", "", [])
    assert parse(None, " \nhello \n", reasoning=think) == ("", " \nhello \n", [])


def test_reasoning_then_calls() -> None:
    """A model that thinks calls behind its thoughts."""
    form, think = TOOL_FORMATS["hermes"], REASONING_FORMATS["think"]
    text = f"<think>\nHm.\n</think>\n\n{write_calls(form, [('stop', {})])}"
    assert parse(form, text, reasoning=think) == ("Hm.", "", [("id0", "stop", "{}")])


def test_harmony_without_reasoning() -> None:
    """Switched off, thoughts are content; a call without tools is content too."""
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    assert parse(TOOL_FORMATS["harmony"], text) == ("", "Hm.Hi", [])
    assert parse(None, text, reasoning=REASONING_FORMATS["harmony"]) == ("Hm.", "Hi", [])


def test_marks() -> None:
    """The marks that may be control tokens, each once."""
    assert marks_of(TOOL_FORMATS["mistral-args"], REASONING_FORMATS["mistral"]) == (
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "[THINK]",
        "[/THINK]",
    )
    assert marks_of(TOOL_FORMATS["json"], None) == ()
    assert "<|message|>" in marks_of(None, REASONING_FORMATS["harmony"])


# -- writing --


@each_form
def test_describe_tools(form: ToolFormat) -> None:
    """The system text has each function, and a call as the format writes it."""
    text = describe_tools(form, TOOLS)
    assert all(tool.function.name in text for tool in TOOLS)
    assert write_calls(form, [("function_name", {"argument_name": "value"})]) in text
    assert "42" in write_result(form, "stop", "42")


# -- grammars --


class Acceptor:
    """Whether a grammar takes a text, as SmolLM2's tokens."""

    def __init__(self, model: Path) -> None:
        """Load the vocabulary."""
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, None)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(bytes(model), params)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # llguidance calls what llama-cpp-python has renamed
            self.tokens = lltokenizer_from_vocab(llama_cpp.llama_model_get_vocab(self._model))

    def takes(self, grammar: object, text: str | list[int]) -> bool:
        """Whether the whole text is one of the grammar's."""
        assert isinstance(grammar, LarkConstraint)
        rules = [f"{name}: %json {_encode_schema(schema, 'tools')}" for name, schema in grammar.schemas.items()]
        lark = "\n".join([grammar.grammar, *rules])
        matcher = llguidance.LLMatcher(self.tokens, llguidance.LLMatcher.grammar_from_lark(lark))
        assert matcher.get_grammar_warnings() == []
        assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar.grammar}"
        ids = self.tokens.tokenize_str(text) if isinstance(text, str) else text
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.fixture(scope="module")
def acceptor(smollm2: Path) -> Acceptor:
    """SmolLM2's vocabulary."""
    return Acceptor(smollm2)


GOOD: Arguments = {"city": "Oslo", "unit": "celsius"}
REQUIRED = Tooling(tools=TOOLS, choice="required")


@each_form
def test_required(form: ToolFormat, acceptor: Acceptor) -> None:
    """A grammar takes what the format writes, if the schema does, and nothing else."""
    grammar = plan_constraint(form, None, REQUIRED, None)

    def written(*made: tuple[str, Arguments]) -> str:
        text = write_calls(form, [(name, arguments) for name, arguments in made])
        if form.style == "harmony":
            return text.removesuffix(form.tail)
        spaced = [json.dumps(arguments, ensure_ascii=False) for _, arguments in made]
        compact = [json.dumps(arguments, ensure_ascii=False, separators=(",", ":")) for _, arguments in made]
        for tight, loose in zip(compact, spaced, strict=True):
            text = text.replace(tight, loose)
        return text

    def takes(*made: tuple[str, Arguments]) -> bool:
        text = written(*made)
        return acceptor.takes(grammar, text if form.style != "harmony" else text.replace(":", ": ").replace(",", ", "))

    assert takes(("get_weather", GOOD))
    assert takes(("stop", {}))
    assert not takes(("get_weather", {"city": "Oslo", "unit": "kelvin"}))
    assert not takes(("nothing", {}))
    assert not acceptor.takes(grammar, "hello")
    if form.style != "harmony":
        assert takes(("stop", {}), ("get_weather_map", GOOD))


def test_one_call(acceptor: Acceptor) -> None:
    """One call where one function is named, or parallel calls are not wanted."""
    form = TOOL_FORMATS["hermes"]
    stop, other = ("stop", cast("Arguments", {})), ("get_weather", GOOD)
    spaced = write_calls(form, [other]).replace('","', '", "').replace('":"', '": "')
    only = plan_constraint(form, None, Tooling(tools=TOOLS, choice="required", function="stop"), None)
    assert acceptor.takes(only, write_calls(form, [stop]))
    assert not acceptor.takes(only, spaced)
    assert not acceptor.takes(only, write_calls(form, [stop, stop]))
    one = plan_constraint(form, None, Tooling(tools=TOOLS, choice="required", parallel=False), None)
    assert acceptor.takes(one, spaced)
    assert not acceptor.takes(one, write_calls(form, [stop, stop]))


def test_strict_auto(acceptor: Acceptor) -> None:
    """Strict functions: any text, but once a call begins it is a valid one."""
    strict = [ToolDefinition(function=FunctionDefinition(name="get_weather", parameters=WEATHER, strict=True))]
    for name in ("hermes", "qwen3-coder", "gemma", "gemma4", "mistral-args", "phi-4"):
        form = TOOL_FORMATS[name]
        grammar = plan_constraint(form, None, Tooling(tools=strict), None)
        assert acceptor.takes(grammar, "Hello, <b>you</b>."), name
        call = write_calls(form, [("get_weather", GOOD)])
        call = call if form.style in ("gemma", "fields") else call.replace('","', '", "').replace('":"', '": "')
        assert acceptor.takes(grammar, f"Wait. {call}"), name
        assert not acceptor.takes(grammar, f"Wait. {form.triggers[0]} x"), name
        bad = write_calls(form, [("get_weather", {"city": "Oslo", "unit": "kelvin"})])
        assert not acceptor.takes(grammar, bad.replace('","', '", "').replace('":"', '": "')), name
    assert plan_constraint(TOOL_FORMATS["hermes"], None, Tooling(tools=TOOLS), None) is None


@each_reasoning
def test_json_behind_reasoning(reasoning: ReasoningFormat, acceptor: Acceptor) -> None:
    """A response format holds for the answer, not for the thoughts."""
    wanted = JsonConstraint(schema={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    grammar = plan_constraint(None, reasoning, Tooling(), wanted)
    thought = f"Hm {{.{reasoning.end}{reasoning.then.strip()}"
    assert acceptor.takes(grammar, f'{reasoning.start}{thought}{{"a": 1}}')
    assert acceptor.takes(grammar, f'{reasoning.answer[0]}{{"a": 1}}{reasoning.answer[1]}')
    assert not acceptor.takes(grammar, f"{reasoning.start}{thought}no")
    inside = plan_constraint(None, reasoning, Tooling(), wanted, inside=True)
    assert acceptor.takes(inside, f'{thought}{{"a": 1}}')
    assert not acceptor.takes(inside, '{"a": 1}')


def test_calls_or_json(acceptor: Acceptor) -> None:
    """With tools and a response format, an answer is calls or JSON."""
    form = TOOL_FORMATS["hermes"]
    grammar = plan_constraint(form, None, Tooling(tools=TOOLS), JsonConstraint(schema={"type": "object"}))
    assert acceptor.takes(grammar, "{}")
    assert acceptor.takes(grammar, write_calls(form, [("stop", {})]))
    assert not acceptor.takes(grammar, "hello")


def test_control_tokens(acceptor: Acceptor) -> None:
    """Marks that are control tokens of the model stand in the grammar as these."""
    form = TOOL_FORMATS["mistral-args"]
    grammar = plan_constraint(form, None, REQUIRED, None, specials={"[TOOL_CALLS]": 5, "[ARGS]": 6})
    tokens = acceptor.tokens.tokenize_str
    assert acceptor.takes(grammar, [5, *tokens("stop"), 6, *tokens("{}")])
    assert not acceptor.takes(grammar, [5, *tokens("stop[ARGS]{}")])


def test_nothing_to_constrain() -> None:
    """Without tools and reasoning a constraint stays what it is."""
    wanted = JsonConstraint(schema={"type": "object"})
    assert plan_constraint(TOOL_FORMATS["hermes"], None, Tooling(), wanted) is wanted
    assert plan_constraint(TOOL_FORMATS["hermes"], None, Tooling(tools=TOOLS, choice="none"), None) is None
    assert plan_constraint(None, None, REQUIRED, None) is None


def test_schema_of_written_calls() -> None:
    """The arguments of the tests are valid for their schema, so that the tests say something."""
    jsonschema.validate(GOOD, WEATHER)
