"""Section 2, CONFIG: every spelling becomes the same rule; what is wrong is told with file, key, line and remedy."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

import localaid
from localaid import (
    CHAT,
    CHAT_PATHS,
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    RESPONSES,
    ConfigErrors,
    Layer,
    LoadOptions,
    Lora,
    MemoryBudget,
    Prompts,
    Rule,
    Sampling,
    Settings,
    diff_settings,
    extend_rules,
    merge_load,
    merge_sampling,
    parse_aliases,
    parse_api_path,
    parse_config,
    parse_duration,
    parse_keep_alive,
    parse_listen,
    parse_memory,
    parse_settings,
    parse_sha,
    parse_size,
    plan_sources,
    render_setting_duration,
    render_setting_size,
    template_names,
)

CONFIGS = Path(__file__).parent / "configs"
ROOT = Path(__file__).parent.parent
TEMPLATES = {"file.tmpl": "{{ messages }}"}
SHA256 = "a" * 64
SHA1 = "b" * 40


def parse(text: str, file: str = "x.yaml", layer: Layer = "user") -> tuple[Rule, ...]:
    """Return the rules of a config that is written here."""
    return parse_config(text.encode(), file=file, layer=layer, templates=TEMPLATES)


def parse_file(name: str) -> tuple[Rule, ...]:
    """Return the rules of one of the good configs."""
    path = CONFIGS / "good" / name
    return parse_config(path.read_bytes(), file=path.name, layer="user", templates=TEMPLATES)


def problems_of(text: str) -> str:
    """Return what is said of a config that cannot be used."""
    with pytest.raises(ConfigErrors) as caught:
        parse(text)
    return str(caught.value)


# -- the folder of good and bad configs --


@pytest.mark.parametrize("path", sorted((CONFIGS / "good").glob("*.yaml")), ids=lambda path: path.stem)
def test_good_config_is_accepted(path: Path) -> None:
    """Every good config gives rules in their places; only an empty one gives none."""
    rules = parse_file(path.name)
    assert [rule.place for rule in rules] == list(range(len(rules)))
    assert bool(rules) == (path.stem not in {"empty", "null", "only_a_comment"})
    assert all(rule.file == path.name and rule.layer == "user" and rule.line > 0 for rule in rules)


@pytest.mark.parametrize("path", sorted((CONFIGS / "bad").glob("*.yaml")), ids=lambda path: path.stem)
def test_bad_config_is_told_with_its_message(path: Path) -> None:
    """Every bad config is refused with exactly the message that lies beside it."""
    with pytest.raises(ConfigErrors) as caught:
        parse_config(path.read_bytes(), file=path.name, layer="user", templates=TEMPLATES)
    assert str(caught.value) + "\n" == path.with_suffix(".txt").read_text()


# -- the three spellings --


def test_one_config() -> None:
    """The main spelling: all its fields arrive, in canonical form."""
    (rule,) = parse_file("one_config.yaml")
    assert rule.name == "generic_chat"
    assert rule.shas == (f"sha256:{SHA256}", f"sha1:{SHA1}", f"sha256:{'8' * 64}", "path:sub/folder/file.gguf", "*")
    assert rule.paths == (CHAT, RESPONSES, MESSAGES, COMPLETIONS)
    assert rule.description == "Talks like the manual does"
    assert rule.backend == "llama.cpp"
    assert rule.sampling == Sampling(temperature=0.7, top_p=0.9, logit_bias={15: -100.0, 16: 2.5})
    assert rule.stop == ("<|USER|>", "<|SYSTEM|>")
    assert rule.prompts == Prompts(
        completion_prompt="Complete the following text.",
        chat_prompt="This is the discussion of an AI and a Human",
        chat_system="<|SYSTEM|>",
        chat_user="<|USER|>",
        chat_assistant="<|ASSISTANT|>",
        tool_format="hermes",
        reasoning_format="none",
    )
    loras = (Lora(sha=f"sha256:{SHA256}"), Lora(sha=f"sha1:{SHA1}", scale=0.5))
    assert rule.load == LoadOptions(ctx_size=4096, flash_attn=True, cache_type_k="q8_0", lora=loras)
    assert rule.keep_alive_s == 5400
    assert rule.extends == "another-config"
    assert rule.names == ("gpt-3.5-turbo", "gpt-4*")


def test_list_of_models() -> None:
    """Spelling A: the model's name and its aliases are names; the checksum identifies, the file does where none is."""
    alpaca, by_file = parse_file("list_of_models.yaml")
    assert alpaca.names == ("my-alpaca", "gpt3")
    assert alpaca.shas == (f"sha256:{SHA256}", f"sha1:{SHA1}")
    assert alpaca.expected_file == "path:alpaca.gguf"
    assert alpaca.urls == ("https://example.org/alpaca.gguf",)
    assert alpaca.stop == ("<SYSTEM>",)
    assert alpaca.prompts == Prompts(chat_template="{{ messages }}", completion_template="{{ messages }}")
    assert alpaca.paths is None
    assert by_file.shas == ("path:other.gguf",)
    assert (by_file.place, by_file.keys, by_file.line) == (1, "1", 9)


def test_models_key() -> None:
    """Spelling B: nested defaults and prompts are fields like any other."""
    (rule,) = parse_file("models_key.yaml")
    assert rule.names == ("ggml-gpt4all-j", "gpt-3.5-turbo", "gpt4")
    assert rule.shas == (f"sha256:{SHA256}",)
    assert rule.expected_file == "path:/models/ggml-gpt4all-j.gguf"
    assert rule.backend == "gpt2"
    assert (rule.sampling.top_p, rule.stop, rule.load.ctx_size) == (0.9, ("###",), 2048)
    assert rule.prompts == Prompts(completion_prompt="Complete:", chat_prompt="A chat.")
    assert rule.keys == "models.0"


def test_spellings_agree() -> None:
    """The same config in each spelling is the same rule, but for where it stands."""
    common = "temperature: 0.5, stop_words: [x], ctx_size: 512"
    texts = (
        f"{{name: m, shas: [{SHA256}], model_names: [m, n], {common}}}",
        f"[{{model: m, checksum: {SHA256}, alias: n, {common}}}]",
        f"models: [{{name: m, checksum: [{{sha256: {SHA256}}}], aliases: [n], defaults: {{{common}}}}}]",
    )
    rules = [parse(text)[0] for text in texts]
    facts = [(rule.name, rule.names, rule.shas, rule.sampling, rule.stop, rule.load, set(rule.given)) for rule in rules]
    assert facts[0] == facts[1] == facts[2]


def test_several_documents() -> None:
    """Documents of one file may be of different spellings; empty ones count for nothing."""
    rules = parse_file("several_documents.yaml")
    assert [(rule.name, rule.place, rule.keys) for rule in rules] == [
        ("first", 0, "document 1"),
        ("second", 1, "document 2.0"),
        ("third", 2, "document 4.models.0"),
    ]


def test_names_by_default() -> None:
    """Without a name it is the file's stem; without model names it is the name."""
    assert parse("shas: '*'", "sub/my.model.yaml")[0].names == ("my.model",)
    assert parse("{name: n, shas: '*'}")[0].names == ("n",)
    assert parse("{name: n, model_names: [a, b, a], shas: '*'}")[0].names == ("a", "b")


def test_text_keeps_its_characters() -> None:
    """What YAML would take for a number, a flag or a date stays text where text is wanted."""
    (rule,) = parse_file("text_that_looks_like_something_else.yaml")
    assert rule.name == "on"
    assert rule.shas == (f"sha1:{'1' * 40}", f"sha1:{'1e10' * 10}", "path:0x12.gguf", f"sha256:{'0' * 64}")
    assert rule.names == ("yes", "1.5", "2024-01-01", "null", "12:30")
    assert rule.stop == ("no", "3", ".nan", "~")
    assert rule.prompts.chat_user == "0o17"
    assert rule.prompts.chat_prompt == "Line one\nLine two\n"


def test_merge_keys() -> None:
    """YAML's anchors and `<<` work; what stands in the mapping itself wins."""
    one, two = parse_file("merge_keys.yaml")
    assert (one.names, one.sampling.temperature) == (("one",), 0.5)
    assert (two.names, two.sampling.temperature, two.stop, two.shas) == (("two",), 0.1, ("x",), one.shas)


def test_null_is_left_out() -> None:
    """A key without a value counts as left out; an empty list of stop words does not."""
    (rule,) = parse_file("empty_values.yaml")
    assert rule.name == "empty_values"
    assert rule.sampling == Sampling()
    assert rule.given == ("shas", "stop")


def test_top_k_off() -> None:
    """llama-server's -1 for "off" becomes 0."""
    assert parse("{shas: '*', top_k: -1}")[0].sampling.top_k == 0


@pytest.mark.parametrize("spelling", ["chat", "v1/chat", "/v1/chat/completions", "chat/completions", "V1/Chat/"])
def test_chat_paths(spelling: str) -> None:
    """Short and full spellings of a path mean the same."""
    assert parse_api_path(spelling) == CHAT


def test_other_paths() -> None:
    """The same for the other paths."""
    assert parse_api_path("v1/completion") == parse_api_path("/v1/completions") == COMPLETIONS
    assert parse_api_path("v1/embedding") == parse_api_path("embeddings") == EMBEDDINGS
    assert parse("{shas: '*', paths: [v1/embedding, embeddings]}")[0].paths == (EMBEDDINGS,)


def test_a_chat_is_a_chat_in_all_its_spellings() -> None:
    """A rule for v1/chat is for responses and messages, too; one for these alone is for no other."""
    assert parse("{shas: '*', paths: [v1/chat, chat, v1/embeddings]}")[0].paths == (*CHAT_PATHS, EMBEDDINGS)
    assert parse("{shas: '*', paths: [v1/messages, chat]}")[0].paths == (MESSAGES, CHAT, RESPONSES)
    assert parse("{shas: '*', paths: v1/messages}")[0].paths == (MESSAGES,)
    assert parse("{shas: '*', paths: [v1/responses]}")[0].paths == (RESPONSES,)
    assert parse("{shas: '*'}")[0].paths is None


def test_sha_spellings() -> None:
    """Upper case, spaces after the colon and bare hex are the same SHA; anything else is a path."""
    assert parse_sha(f"SHA256: {'A' * 64}") == parse_sha("A" * 64) == f"sha256:{SHA256}"
    assert parse_sha("B" * 40) == parse_sha(f"sha1:{SHA1}") == f"sha1:{SHA1}"
    assert parse_sha("./sub/*.gguf") == "path:sub/*.gguf"
    assert parse_sha("deadbeef") == "path:deadbeef"
    assert parse_sha("*") == "*"


def test_sizes_and_durations() -> None:
    """Units are read as they are commonly meant."""
    assert [parse_size(text) for text in ("512MiB", "1.5GiB", "2GB", "64k", "10", "0")] == [
        512 * 2**20,
        1536 * 2**20,
        2 * 10**9,
        65536,
        10,
        0,
    ]
    assert [parse_duration(text) for text in ("10m", "1h30m", "500ms", "90", "1.5", "1d")] == [
        600,
        5400,
        0.5,
        90,
        1.5,
        86400,
    ]
    assert parse_keep_alive("-1") == -1
    assert parse_memory("80%") == MemoryBudget(share=0.8)
    assert parse_memory("12GiB") == MemoryBudget(size_bytes=12 * 2**30)
    assert [parse_listen(text) for text in ("[::1]:80", "unix:/run/x")] == ["[::1]:80", "unix:/run/x"]


@pytest.mark.parametrize(
    ("parse_it", "text"),
    [
        (parse_size, "big"),
        (parse_size, "-1"),
        (parse_size, "nan"),
        (parse_duration, "1h soon"),
        (parse_duration, ""),
        (parse_duration, "-5"),
        (parse_memory, "0%"),
        (parse_memory, "101%"),
        (parse_memory, "nan%"),
        (parse_listen, "8080"),
        (parse_listen, "host:99999"),
        (parse_listen, "::1:80"),
        (parse_listen, "unix:"),
    ],
)
def test_bad_words(parse_it: object, text: str) -> None:
    """What cannot be meant is refused."""
    assert callable(parse_it)
    with pytest.raises(ValueError, match="expected"):
        parse_it(text)


# -- limits and robustness --


def parse_anything(document: bytes) -> tuple[tuple[Rule, ...], list[str]]:
    """Return the rules of a document, or what is said of it: one or the other."""
    try:
        return parse_config(document, file="x.yaml", layer="user"), []
    except ConfigErrors as errors:
        return (), str(errors).split("\n")


def test_document_limit() -> None:
    """A config of more than a MiB is refused before it is read."""
    assert "may have 1048576" in problems_of("#" * (2**20 + 1))


@pytest.mark.parametrize("text", ["[", "- ", "? ", "{a: "])
def test_deep_nesting_ends_no_process(text: str) -> None:
    """However a document nests, it is an error and not the end of the process."""
    assert re.search("nested deeper than|maximum nesting depth", problems_of(text * 200_000))  # ours, or libyaml's own


def test_problems_are_bounded() -> None:
    """Of a file full of nonsense the first problems are told."""
    assert problems_of("\n".join(f"k{n}: 1" for n in range(10_000))).count("\n") == 49


@example(b".\n\n!")
@given(st.binary(max_size=200) | st.text("ab:-*&<>[]{}|'\"#!?%~\n\t ,.019", max_size=80).map(str.encode))
def test_any_bytes_are_rules_or_problems(document: bytes) -> None:
    """No document raises anything but `ConfigErrors`, and template names never raise."""
    assert isinstance(template_names(document), frozenset)
    rules, told = parse_anything(document)
    assert all(line.startswith("x.yaml: ") for line in told)
    assert all(isinstance(rule, Rule) for rule in rules)


KEYS = sorted(localaid._SPELLINGS["C"] | localaid._SPELLINGS["A"] | localaid._SPELLINGS["B"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text("ab1.:*/é ", max_size=9)
    | st.sampled_from(["*", SHA256]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*KEYS, "models"]), VALUES, max_size=6))
def test_any_values_are_rules_or_problems(document: dict[str, object]) -> None:
    """Known keys with whatever values give finished rules or problems, never another error, never NaN."""
    rules, told = parse_anything(yaml.safe_dump(document).encode())
    assert not (rules and told)
    for rule in rules:
        assert all(isinstance(name, str) and name for name in (*rule.names, *rule.shas))
        numbers = [getattr(rule.sampling, field) for field in rule.sampling.__struct_fields__]
        assert all(math.isfinite(number) for number in numbers if isinstance(number, int | float))


# -- templates --


def test_template_names() -> None:
    """The names of template files are known before they are read, in every spelling, and only plain file names."""
    text = """
- {model: a, checksum: x, template: {chat: a.tmpl, completion: b.tmpl}}
---
models: [{name: b, template: {chat: c.tmpl}}]
---
{shas: '*', template: [{chat: ../d.tmpl}, {completion: e.tmpl}, {completion: .hidden}]}
"""
    assert template_names(text.encode()) == {"a.tmpl", "b.tmpl", "c.tmpl", "e.tmpl"}
    assert template_names(b"template: [") == frozenset()


# -- extends --


def extended(*texts: tuple[str, Layer, str]) -> dict[tuple[str, str], Rule]:
    """Return (layer, name) -> rule of configs (file, layer, text), which must be without problems."""
    rules, problems = extend_rules(rule for file, layer, text in texts for rule in parse(text, file, layer))
    assert problems == ()
    return {(rule.layer, rule.name): rule for rule in rules}


def test_extends_takes_what_is_left_out() -> None:
    """Every field that a rule leaves out comes from the other, down a chain, with where it came from."""
    rules = extended(
        ("a.yaml", "user", "{name: a, extends: b, temperature: 0.1}"),
        ("b.yaml", "user", "{name: b, extends: c, stop: [], top_p: 0.2, chat_user: U}"),
        ("c.yaml", "shipped", f"{{name: c, shas: {SHA256}, stop: [x], top_p: 0.3, temperature: 0.3, ctx_size: 64}}"),
    )
    rule = rules["user", "a"]
    assert rule.sampling == Sampling(temperature=0.1, top_p=0.2)
    assert rule.shas == (f"sha256:{SHA256}",)
    assert rule.stop == ()
    assert rule.prompts.chat_user == "U"
    assert rule.load.ctx_size == 64
    assert rule.origins["top_p"] == rule.origins["stop"] == ("user", "b.yaml")
    assert rule.origins["ctx_size"] == rule.origins["shas"] == ("shipped", "c.yaml")
    assert "temperature" not in rule.origins


def test_extends_and_names() -> None:
    """Beside one of its own layer a rule has its own name; for one of a lower layer it stands in, names and all."""
    base = f"{{name: base, model_names: [gpt-4], shas: {SHA256}}}"
    assert extended(("a.yaml", "user", "extends: base"), ("b.yaml", "user", base))["user", "a"].names == ("a",)
    rules = extended(("a.yaml", "user", "extends: base"), ("b.yaml", "shipped", base))
    assert rules["user", "a"].names == ("a", "gpt-4")
    rules = extended(("a.yaml", "user", "{extends: base, model_names: [x]}"), ("b.yaml", "shipped", base))
    assert rules["user", "a"].names == ("x",)


def test_extends_its_namesake_of_a_lower_layer() -> None:
    """A user's rule may extend the shipped one of the same name."""
    rules = extended(
        ("m.yaml", "user", "{name: m, extends: m, temperature: 0.1}"),
        ("m.yaml", "shipped", f"{{name: m, shas: {SHA256}, top_p: 0.2}}"),
    )
    assert rules["user", "m"].sampling == Sampling(temperature=0.1, top_p=0.2)
    assert rules["shipped", "m"].sampling == Sampling(top_p=0.2)


def test_extends_in_a_circle() -> None:
    """A circle is told by its names, for each rule that leads into it; the others are not touched."""
    texts = {"a": "b", "b": "c", "c": "a", "d": "a"}
    rules = [parse(f"{{name: {name}, extends: {base}}}", f"{name}.yaml")[0] for name, base in texts.items()]
    good, problems = extend_rules([*rules, *parse("{name: e, shas: '*'}", "e.yaml")])
    assert [rule.name for rule in good] == ["e"]
    assert [str(problem) for problem in problems] == [
        "a.yaml: extends: goes in a circle: a -> b -> c -> a, line 1",
        "b.yaml: extends: goes in a circle: b -> c -> a -> b, line 1",
        "c.yaml: extends: goes in a circle: c -> a -> b -> c, line 1",
        "d.yaml: extends: goes in a circle: d -> a -> b -> c -> a, line 1",
    ]


def test_extends_itself_or_nothing_known() -> None:
    """A rule that extends itself, or what is not there or only in a higher layer, is told with the nearest name."""
    _, problems = extend_rules(
        [
            *parse("{name: self, extends: self}", "self.yaml"),
            *parse("{name: typo, extends: slef}", "typo.yaml"),
            *parse("{name: low, extends: typo}", "low.yaml", "shipped"),
        ]
    )
    none = "no other config of this layer or a lower one is named"
    assert [str(problem) for problem in problems] == [
        f"self.yaml: extends: {none} self, line 1",
        f"typo.yaml: extends: {none} slef, line 1 (did you mean self?)",
        f"low.yaml: extends: {none} typo, line 1",
    ]


@given(st.permutations(range(6)))
def test_extends_does_not_depend_on_order(order: list[int]) -> None:
    """Rules come out the same in whatever order they go in."""
    texts = ("{name: a, extends: b}", "{name: b, extends: c}", "{name: c, shas: '*'}", "extends: f", "name: f")
    rules = [parse(text, f"{place}.yaml")[0] for place, text in enumerate(texts)]
    rules.append(parse("{name: b, top_p: 0.5}", "5.yaml", "shipped")[0])
    assert extend_rules([rules[place] for place in order]) == extend_rules(rules)


# -- load options, settings, aliases --


def test_merge_load() -> None:
    """Each load option comes from the first source that sets it."""
    merged = merge_load(LoadOptions(ctx_size=1), LoadOptions(ctx_size=2, mmap=False))
    assert merged == LoadOptions(ctx_size=1, mmap=False)


def test_settings() -> None:
    """Every setting is read into its unit."""
    text = """
models: [/a, /b]
configs: /c
state: /s
listen: unix:/run/localaid.sock
queue_size: 8
keep_alive: -1
memory: 4GiB
prompt_cache: 512MiB
load: {ctx_size: 2048, threads: 2}
hash_wait: 5s
hash_threads: 1
rescan: 1h
log_level: debug
"""
    assert parse_settings(text.encode(), file="localaid.yaml") == Settings(
        models=("/a", "/b"),
        configs="/c",
        state="/s",
        listen=("unix:/run/localaid.sock",),
        queue_size=8,
        keep_alive_s=-1,
        memory=MemoryBudget(size_bytes=4 * 2**30),
        prompt_cache_bytes=512 * 2**20,
        load=LoadOptions(ctx_size=2048, threads=2),
        hash_wait_s=5,
        hash_threads=1,
        rescan_s=3600,
        log_level="debug",
    )


@given(st.floats(0, 1e7), st.integers(0, 2**53))
def test_durations_and_sizes_are_told_as_they_are_read(seconds: float, size_bytes: int) -> None:
    """What a reload shows can be put into the file."""
    whole_ms = round(seconds * 1000) / 1000
    assert parse_keep_alive(render_setting_duration(whole_ms)) == pytest.approx(whole_ms, abs=1e-9)
    assert parse_size(render_setting_size(size_bytes)) == size_bytes
    assert render_setting_duration(-1.0) == "-1"
    assert (render_setting_duration(5400), render_setting_size(64 * 2**20)) == ("1h30m", "64MiB")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("", "queue_size: 8", ["queue_size: 64 -> 8"]),
        ("memory: 50%", "memory: 4GiB", ["memory: 50% -> 4GiB"]),
        ("keep_alive: -1", "drain: 90", ["keep_alive: -1 -> 10m", "drain: 1m -> 1m30s"]),
        ("load: {threads: 2}", "load: {mmap: false}", ["load: {threads: 2} -> {mmap: false}"]),
        ("", "models: [/a, /b]\nstate: /s", ["models: [] -> [/a, /b]", "state: (none) -> /s"]),
        ("", "log_prompts: true\nbody_limit: 1MiB", ["log_prompts: false -> true", "body_limit: 64MiB -> 1MiB"]),
        ("api_keys: ['a:SECRET1']", "api_keys: ['a:SECRET1', 'b:SECRET2']", ["api_keys: [a] -> [a, b]"]),
        ("api_keys: ['a:SECRET1']", "api_keys: ['a:SECRET3']", ["api_keys: [a] -> [a] (other keys, or they may use"]),
        ("queue_size: 8", "queue_size: 8", []),
    ],
)
def test_what_has_changed_between_two_settings(before: str, after: str, told: list[str]) -> None:
    """By the file's own names and spellings; API keys by name only."""
    found = diff_settings(parse_settings(before.encode(), file="x"), parse_settings(after.encode(), file="x"))
    assert len(found) == len(told)
    for change, wanted in zip(map(str, found), told, strict=True):
        assert change.startswith(wanted)
        assert "SECRET" not in change


def test_settings_by_default() -> None:
    """An empty settings file is a settings file."""
    assert parse_settings(b"", file="localaid.yaml") == parse_settings(b"load:\n", file="x") == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quue_size: 1", "s.yaml: quue_size: unknown key, line 1 (did you mean queue_size?)"),
        ("queue_size: 0", "s.yaml: queue_size: expected a whole number from 1 to 1000000, got 0, line 1"),
        ("load: {ctx: 1}", "s.yaml: load.ctx: unknown key, line 1 (did you mean n_ctx?)"),
        ("temperature: 1", "s.yaml: temperature: unknown key, line 1"),
        ("- a", "s.yaml: 0: expected keys and values, got a, line 1"),
        ("api_keyz: []", "s.yaml: api_keyz: unknown key, line 1 (did you mean api_keys?)"),
        ("metrics: no", "s.yaml: metrics: expected one of key, open, off, got no, line 1"),
        (
            "memory: 0",
            "s.yaml: memory: expected a size such as 8GiB or a share such as 80%, got 0: no model fits, line 1",
        ),
        ("body_timeout: 0", "s.yaml: body_timeout: expected a duration of more than 0, line 1"),
        ("rescan: 0", "s.yaml: rescan: expected a duration of at least 1 second, line 1"),
        ("body_limit: 0", "s.yaml: body_limit: expected a size of at least 1024 bytes, line 1"),
        ("cors_origins: [a.example]", "s.yaml: cors_origins.0: expected an origin such as https://"),
        ("allow_without_keys: maybe", "s.yaml: allow_without_keys: expected true or false, got maybe, line 1"),
        ("log_level: inof", "s.yaml: log_level: expected one of debug, info, warning, error, got inof, line 1"),
    ],
)
def test_bad_settings(text: str, message: str) -> None:
    """Settings are as strict as configs."""
    with pytest.raises(ConfigErrors) as caught:
        parse_settings(text.encode(), file="s.yaml")
    assert str(caught.value).startswith(message)


def test_contrib_settings_are_the_defaults() -> None:
    """contrib/localaid.yaml shows every key; taken out of its comments it says what holds without it."""
    lines = (ROOT / "contrib" / "localaid.yaml").read_text().splitlines()
    shown = [line[1:] for line in lines if line.startswith("#") and not line.startswith("# ")]
    document = "\n".join(shown).encode()
    assert parse_settings("\n".join(lines).encode(), file="localaid.yaml") == Settings()
    settings = parse_settings(document, file="localaid.yaml")
    assert settings == Settings(models=settings.models, configs=settings.configs, state=settings.state)
    assert set(yaml.safe_load(document)) == set(localaid._SETTINGS_KEYS)


def test_files_with_urls() -> None:
    """An entry is one rule of all its files, and one for each file that has names of its own; URLs stay with a SHA."""
    rules = {rule.name: rule for rule in extend_rules(parse_file("files_with_urls.yaml"))[0]}
    a, b, c, e, f = (f"sha256:{digit * 64}" for digit in "abcef")
    assert rules["example"].shas == (a, b, c, f"sha1:{'c' * 40}")
    assert rules["example"].names == ("example", "example-it")
    assert (rules["example-q4"].shas, rules["example-q4"].names) == ((a,), ("example-q4",))
    assert (rules["example-q8"].shas[0], rules["example-q8"].names) == (c, ("example-q8", "example-large"))
    assert {rules[name].sampling.top_k for name in ("example", "example-q4", "example-q8", "mine")} == {20}
    assert rules["example-mmproj"].names == ("example-mmproj", "example-vision")
    assert (rules["example-mmproj"].kind, rules["example-q8"].license) == ("projector", "apache-2.0")
    q4, q8 = plan_sources(rules["example"])
    assert (q4.sha, q4.urls, q4.file, q4.parts) == (a, ("https://example.org/example-q4.gguf",), None, ())
    assert (q8.sha, q8.urls) == (c, ("https://example.org/1", "https://example.net/1"))
    assert q8.file == "example-q8-00001-of-00002.gguf"
    assert [(part.sha[7], part.urls) for part in q8.parts] == [("d", ("https://example.org/2",))]
    assert plan_sources(rules["example-q8"]) == plan_sources(rules["mine"]) == (q8,)
    (single,) = plan_sources(rules["single"])
    assert (single.sha, single.urls) == (f, ("https://example.org/f.gguf", "https://example.net/f.gguf"))
    assert rules["example"].urls == (*q4.urls, *q8.urls)
    assert (rules["example-q8"].keys, rules["example-q8"].line) == ("0", 9)
    assert plan_sources(rules["example-mmproj"])[0].sha == e


@pytest.mark.parametrize("path", sorted((ROOT / "default-configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_default_configs_are_good(path: Path) -> None:
    """What is shipped has no problems and names its models by SHA, but for the names that any model may have."""
    rules = parse_config(path.read_bytes(), file=path.name, layer="shipped")
    assert rules
    usual = path.stem == "usual-names"
    assert all(sha == "*" if usual else sha.startswith("sha256:") for rule in rules for sha in rule.shas)
    assert extend_rules(rules)[1] == ()


def test_aliases() -> None:
    """aliases.json gives a model a second name."""
    document = b'{"some-model": {"alias": "whisper", "description": "Hears"}, "other": {"alias": "x"}}'
    assert parse_aliases(document, file="aliases.json") == {"some-model": ("whisper", "Hears"), "other": ("x", None)}


@pytest.mark.parametrize(
    "document", [b"", b"[]", b'{"a": "b"}', b'{"a": {"alias": ""}}', b'{"a": {"alias": 1}}', b'{"a": {"alais": "x"}}']
)
def test_bad_aliases(document: bytes) -> None:
    """A broken aliases.json is told like a broken config."""
    with pytest.raises(ConfigErrors, match=r"^aliases\.json: "):
        parse_aliases(document, file="aliases.json")


def test_what_other_servers_call_no_limit() -> None:
    """llama-server's and Ollama's spellings mean what they mean there, over what a config extends too."""
    text = "name: a\nshas: ['*']\nn_predict: -1\nseed: -1\nload: {ctx_size: 0}\nkeep_alive: -1m\n"
    (rule,) = parse(text)
    assert (rule.sampling.max_tokens, rule.sampling.seed, rule.load.ctx_size, rule.keep_alive_s) == (-1, -1, 0, -1.0)
    below = Sampling(max_tokens=5, seed=5)
    merged = merge_sampling(Sampling(), rule.sampling, below)
    assert (merged.max_tokens, merged.seed) == (None, None)
    assert merge_sampling(Sampling(), below).seed == 5
    assert merge_load(rule.load, LoadOptions(ctx_size=512)).ctx_size == 0
    assert localaid.choose_ctx_size(0, 131072) == 131072
    assert localaid.choose_ctx_size(None, 131072) == localaid.DEFAULT_CTX_SIZE
    assert localaid.choose_ctx_size(0, None) == localaid.DEFAULT_CTX_SIZE
    with pytest.raises(ValueError, match="expected a duration"):
        localaid.parse_keep_alive("-x")


def test_every_mistake_in_aliases_is_told_with_its_place() -> None:
    """As those of a config are."""
    document = json.dumps(
        {
            "good": {"alias": "g", "description": None},
            "a": {"alais": "x"},
            "b": "x",
            "c": {"description": "Nothing."},
            "d": {"alias": 1},
            "e": {"alias": ""},
        }
    ).encode()
    with pytest.raises(ConfigErrors) as raised:
        parse_aliases(document, file="aliases.json")
    told = [str(problem) for problem in raised.value.problems]
    example = '{"alias": "second-name", "description": "…"}'
    assert told[:4] == [
        "aliases.json: a.alais: unknown key (did you mean alias?)",
        f"aliases.json: b: expected {example}",
        f"aliases.json: c: has no alias: expected {example}",
        "aliases.json: d.alias: expected a text",
    ]
    assert told[4].startswith("aliases.json: e.alias: ")
    assert len(told) == 5
