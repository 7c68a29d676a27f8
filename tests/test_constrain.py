"""CONSTRAIN: what completes is what was asked for; what cannot be held is refused by name; nothing hangs the worker."""

from __future__ import annotations

import ctypes
import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import jsonschema
import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from localaid import (
    Cancel,
    ChatMessage,
    ChatPrompt,
    Constrainer,
    Engine,
    GbnfConstraint,
    GrammarInvalid,
    InfillPrompt,
    JsonConstraint,
    LarkConstraint,
    LoadModel,
    LoadOptions,
    LocalaidError,
    Matcher,
    Sampling,
    SchemaUnsupported,
    Submit,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    error_from_wire,
    read_schema,
)
from models import write_tiny_llama
from test_worker import WorkerEnd, start

if TYPE_CHECKING:
    from numpy.typing import NDArray

Schema = dict[str, object]

CHAT = ChatPrompt(messages=[ChatMessage(role="user", content="Answer in JSON: who are you?")])
PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
HOT = Sampling(temperature=1.0, max_tokens=32, seed=7)
SHORT = Sampling(temperature=1.0, max_tokens=24)
OPTIONS = LoadOptions(threads=1, ctx_size=1024, parallel=8)

# -- schemas --

PATTERNS = [
    *("^[a-z]+$", r"^[A-Z]{2}-\d{1,3}$", r"^\S+@\S+$", "^(a|bc)*$", r"\d", r"^\w+$", r"^[^\d\s]+$", "ab?c", "^$"),
    *(r"^\W$", "^[^a-c]{2,4}$", r"\D", "^.{0,3}$", "^(foo|bar)-[0-9a-f]{4}$", r"[\]\-/]", "^x{2,}$", "é+", "a|^b$"),
    *(r"^[\w.-]+$", r"^\+?[1-9]\d{1,14}$"),
]
FORMATS = ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
NAMES = ["name", "age", "id", "a", "é", "two words", 'q"uote', "back\\slash", "a/b", "x~y", "$ref", "type"]
TREE: Schema = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "next": {"$ref": "#/$defs/tree"},
        "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
    },
    "required": ["value"],
    "additionalProperties": False,
}
LITTLE = st.integers(-20, 20)
FRACTIONS = st.floats(-1000, 1000, allow_nan=False).map(lambda number: round(number, 2))
TEXTS = st.text(st.characters(max_codepoint=0x7FF), max_size=6)
SCALARS = st.one_of(st.none(), st.booleans(), LITTLE, FRACTIONS, TEXTS)


@st.composite
def strings(draw: st.DrawFn) -> Schema:
    """Texts with a pattern, a format or lengths."""
    schema: Schema = {"type": "string"}
    if draw(st.booleans()):
        schema["pattern"] = draw(st.sampled_from(PATTERNS))
    elif draw(st.booleans()):
        schema["format"] = draw(st.sampled_from(FORMATS))
    else:
        schema["minLength"] = draw(st.integers(0, 4))
    if "format" not in schema:
        schema["maxLength"] = draw(st.integers(4, 16))
    return schema


@st.composite
def numbers(draw: st.DrawFn) -> Schema:
    """Numbers between bounds, of both kinds."""
    schema: Schema = {"type": draw(st.sampled_from(["integer", "number"]))}
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = draw(st.one_of(LITTLE, FRACTIONS))
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = draw(st.one_of(LITTLE, FRACTIONS))
    if draw(st.integers(0, 5)) == 0:
        schema["multipleOf"] = draw(st.sampled_from([1, 2, 3, 10, 0.5, 0.25]))
    return schema


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[object]) -> Schema:
    """Objects whose further properties are forbidden, anything, or of one kind."""
    properties = draw(st.dictionaries(st.sampled_from(NAMES), inner, max_size=3))
    schema: Schema = {"type": "object", "properties": properties}
    if properties:
        schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    match draw(st.integers(0, 4)):
        case 0 | 1 | 2:
            schema["additionalProperties"] = False
        case 3:
            schema["additionalProperties"] = draw(inner)
    if draw(st.integers(0, 7)) == 0:
        schema["patternProperties"] = {draw(st.sampled_from(PATTERNS)): draw(inner)}
    return schema


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[object]) -> Schema:
    """Arrays, some of which begin with items of their own."""
    least = draw(st.integers(0, 2))
    most = least + draw(st.integers(0, 2))
    schema: Schema = {"type": "array", "items": draw(inner), "minItems": least, "maxItems": most}
    if draw(st.integers(0, 3)) == 0:
        schema["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=2))
    return schema


LEAVES: st.SearchStrategy[object] = st.one_of(
    strings(),
    numbers(),
    st.lists(SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    SCALARS.map(lambda value: {"const": value}),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": ["string", "null"], "maxLength": 8},
            {"enum": [{"a": [1, 2.5, "x"]}, [], {}]},
            {"$ref": "#/$defs/tree"},
            {"$ref": "#/$defs/leaf"},
        ]
    ),
)


def combined(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Schemas made of others."""
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        objects(inner),
        arrays(inner),
        objects(inner),
        several.map(lambda parts: {"anyOf": parts}),
        several.map(lambda parts: {"oneOf": parts}),
        st.tuples(inner, inner).map(lambda parts: {"allOf": list(parts)}),
    )


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """A whole schema, with definitions that it may refer to."""
    body = cast("Schema", draw(st.recursive(LEAVES, combined, max_leaves=6)))
    return {**body, "$defs": {"leaf": draw(st.one_of(strings(), numbers())), "tree": TREE}}


SPACES = r"\t-\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"  # ECMA-262's `\s`


def as_ecma(schema: object) -> object:
    """Return a schema to Python's `jsonschema` as llguidance reads it: patterns of names, and `oneOf` as `anyOf`."""
    if isinstance(schema, list):
        return [as_ecma(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    read = {key: as_ecma(value) for key, value in schema.items()}
    if "oneOf" in read:
        read["allOf"] = [*cast("list[object]", read.get("allOf", [])), {"anyOf": read.pop("oneOf")}]
    if "patternProperties" in schema:
        changes = {r"\S": f"[^{SPACES}]", r"\s": SPACES, "$": r"\Z", "^.{": r"^[^\n]{"}
        named = cast("Schema", read["patternProperties"])
        for pattern in list(named):
            written = functools.reduce(lambda text, old: text.replace(old, changes[old]), changes, pattern)
            named["(?a)" + written] = named.pop(pattern)
    return read


def check_answer(text: str | bytes, schema: Schema) -> None:
    """Raise where an answer is not what a schema says."""
    jsonschema.validate(json.loads(text), cast("Schema", as_ecma(schema)))


def generate_schemas(count: int) -> list[Schema]:
    """Return schemas, always the same."""
    made: list[Schema] = []

    quiet = settings(suppress_health_check=list(HealthCheck), database=None, deadline=None)

    @settings(quiet, max_examples=count, derandomize=True, phases=[Phase.generate])
    @given(schemas())
    def take(schema: Schema) -> None:
        made.append(schema)

    take()
    return made


# -- running --


@pytest.fixture(scope="module")
def worker(smollm2: Path) -> Iterator[WorkerEnd]:
    """A worker on SmolLM2 with eight places."""
    with start() as end:
        end.load(smollm2, OPTIONS)
        yield end


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[Engine]:
    """An engine whose vocabulary is small, so that a walk through a grammar is fast."""
    loaded = Engine(LoadModel(path=str(tiny_llama), options=LoadOptions(threads=1, ctx_size=256)), lambda _: None)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def constrainer(engine: Engine) -> Constrainer:
    """What compiles constraints for it."""
    return Constrainer(engine)


_ids = iter(range(1000, 1_000_000))


def ask(end: WorkerEnd, **request: object) -> int:
    """Send a request; return its id."""
    submit = Submit(**{"id": next(_ids), "prompt": CHAT, "sampling": HOT} | request)  # type: ignore[arg-type]
    end.send(submit)
    return submit.id


def wait(end: WorkerEnd, request: int, n: int = 1) -> list[tuple[str, str | None]]:
    """Return text and finish of each sequence of a request; a refusal is raised."""
    end.until(lambda: request in end.rejected or end.finished(request, n))
    if request in end.rejected:
        raise error_from_wire(end.rejected[request].error, end.rejected[request].fields)
    last = {delta.index: delta.finish for delta in end.deltas[request]}
    return [(end.text(request, index), last[index]) for index in range(n)]


def logprobs_of(end: WorkerEnd, request: int) -> list[TokenLogprob]:
    """Return the log-probabilities that came with a request's deltas."""
    return [logprob for delta in end.deltas[request] for logprob in delta.logprobs or []]


def test_every_completed_answer_validates(worker: WorkerEnd) -> None:
    """Hundreds of schemas, a warm model that does not know what is asked: what says "stop" is what the schema says."""
    every = generate_schemas(440)
    asked = [(ask(worker, sampling=SHORT, constraint=JsonConstraint(schema=schema)), schema) for schema in every]
    worker.until(lambda: all(request in worker.rejected or worker.finished(request) for request, _ in asked))
    completed = answered = 0
    for request, schema in asked:
        if request in worker.rejected:
            assert worker.rejected[request].error == "SchemaUnsupported", schema
            continue
        answered += 1
        text, finish = worker.text(request), worker.deltas[request][-1].finish
        if finish == "stop":
            completed += 1
            check_answer(text, schema)
        else:
            assert finish == "length", schema
    assert answered >= 300
    assert completed > answered / 3  # the others were cut off at 24 tokens


def walk(engine: Engine, matcher: Matcher, choose: random.Random, tokens: int) -> tuple[bytes, bool]:
    """Take random tokens that a matcher allows; return the text, and whether it is complete."""
    text = b""
    for _ in range(tokens):
        allowed = matcher.allowed()
        if matcher.failed:
            return text, False
        if allowed[engine.end_tokens].any() and choose.random() < 0.5:
            return text, True
        liked = choose.choices(np.flatnonzero(allowed).tolist(), k=8)
        token = next((token for token in liked if engine.piece(token)[0][:1] in b'"}],'), liked[0])
        if engine.piece(token)[1]:
            return text, True
        text += engine.piece(token)[0]
        matcher.take(token)
        if matcher.ended:
            return text, True
    return text, False


def follow(engine: Engine, matcher: Matcher, text: bytes) -> bool:
    """Whether a text may come, whole."""
    pieces = [engine.piece(token)[0] for token in range(engine.n_vocab)]
    while text:
        fitting = [
            token for token in np.flatnonzero(matcher.allowed()) if pieces[token] and text.startswith(pieces[token])
        ]
        if not fitting:
            return False
        matcher.take(token := int(fitting[0]))
        text = text[len(pieces[token]) :]
    return True


def test_random_walks_validate(engine: Engine, constrainer: Constrainer) -> None:
    """What no model would write is held to the schema as well."""
    completed = 0
    for number, schema in enumerate(generate_schemas(400)):
        try:
            first = constrainer.start_constraint(JsonConstraint(schema=schema))
        except SchemaUnsupported:
            continue
        for turn in range(3):
            matcher = first.copy()
            text, complete = walk(engine, matcher, random.Random(f"{number} {turn}"), 150)
            assert not matcher.failed
            if complete:
                completed += 1
                check_answer(text, schema)
    assert completed > 500


# -- what is refused --


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "`uniqueItems`"),
        ({"not": {"type": "string"}}, "`not`"),
        ({"if": {"const": 1}, "then": {"const": 2}}, "`if`"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "`propertyNames`"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "`dependentRequired`"),
        ({"type": "array", "contains": {"const": 1}}, "`contains`"),
        ({"type": "object", "unevaluatedProperties": False}, "`unevaluatedProperties`"),
        ({"properties": {"price": {"multipleOf": 0}}}, "properties.price.multipleOf"),
        ({"properties": {"price": {"properties": {"x": {"pattern": "(?=a)"}}}}}, "properties.price.properties.x"),
        ({"type": "integer", "minimum": 1e19}, "has a bound"),
        ({"type": "integer", "exclusiveMinimum": "a"}, "exclusiveMinimum"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "string", "pattern": r"\bword"}, r"\b"),
        ({"type": "string", "pattern": "("}, "has a pattern that is wrong"),
        ({"required": True}, "required is not a list of texts"),
        ({"properties": {"a": {"required": [{}]}}}, "properties.a.required is not a list of texts"),
        ({"$ref": ["x"]}, "$ref is not a text"),
        ({"minimum": None, "exclusiveMinimum": [1]}, "exclusiveMinimum is not a number"),
        ({"$ref": "#"}, "nothing but itself"),
        ({"type": "object", "properties": {"a": 5}}, "properties.a"),
        ({"$ref": "https://example.com/schema"}, "names https://example.com/schema, and nothing is fetched"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(constrainer: Constrainer, schema: Schema, named: str) -> None:
    """Never dropped: an answer would then be no answer to the schema."""
    with pytest.raises(SchemaUnsupported) as caught:
        constrainer.start_constraint(JsonConstraint(schema=schema))
    assert named in str(caught.value)
    assert (caught.value.status, caught.value.param) == (400, "response_format")


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"enum": []},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"type": "string", "pattern": "^aaa$", "maxLength": 2},
        {"type": "object", "required": ["a"], "properties": {"a": False}},
        {"$ref": "#"},
    ],
)
def test_what_no_answer_satisfies_is_refused(constrainer: Constrainer, schema: Schema | bool) -> None:
    """Rather than an answer that is none."""
    with pytest.raises(SchemaUnsupported):
        constrainer.start_constraint(JsonConstraint(schema=schema))


def nest(depth: int) -> Schema:
    """Return objects in objects."""
    schema: Schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def options(count: int) -> list[Schema]:
    """Return objects that differ in one property."""
    return [{"type": "object", "properties": {f"p{place}": {"type": "string"}}} for place in range(count)]


@pytest.mark.parametrize(
    "constraint",
    [
        JsonConstraint(schema=nest(100)),
        JsonConstraint(schema=nest(900)),
        JsonConstraint(schema={"enum": [f"v{number}" for number in range(100_000)]}),
        JsonConstraint(schema={"type": "string", "pattern": "(" * 2000 + ")" * 2000}),
        JsonConstraint(schema={"allOf": [{"anyOf": options(4)} for _ in range(12)]}),
        JsonConstraint(schema={"type": "object", "properties": {f"k{place}": {} for place in range(30_000)}}),
        GbnfConstraint(grammar="root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
        GbnfConstraint(grammar='root ::= "' + "a" * 300_000 + '"'),
    ],
    ids=[*("deep", "deeper", "values", "groups", "choices", "properties"), "nested", "long"],
)
def test_what_is_too_large_is_refused(constrainer: Constrainer, constraint: JsonConstraint | GbnfConstraint) -> None:
    """A worker serves others too: depth, size and work have limits."""
    with pytest.raises((SchemaUnsupported, GrammarInvalid)) as caught:
        constrainer.start_constraint(constraint)
    assert len(str(caught.value)) < 600
    assert "backtrace" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 10**9},
        {"type": "array", "minItems": 10**6},
        {"type": "string", "pattern": "^(a{1000}){1000}$"},
        {"type": "string", "pattern": "(x+x+)+y"},
        {"type": "string", "pattern": "[ab]*a[ab]{30}"},
        nest(40),
    ],
)
def test_what_is_large_only_in_its_answers_is_served(engine: Engine, constrainer: Constrainer, schema: Schema) -> None:
    """It goes on until it is cut off, or until the work of a step is over the limit."""
    text, complete = walk(engine, constrainer.start_constraint(JsonConstraint(schema=schema)), random.Random(1), 60)
    assert text
    assert not complete or jsonschema.validate(json.loads(text), schema) is None


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"properties": {"a": {}}, "required": ["a"]}, True),
        ({"properties": {"a": {}}, "additionalProperties": True}, False),
        ({"properties": {"a": {}}, "required": ["b"]}, False),
        ({"properties": {"a": {}}, "patternProperties": {"^b": {}}}, False),
        ({"properties": {"a": {}}, "anyOf": [{"required": ["a"]}]}, False),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, False),
    ],
)
def test_an_object_has_what_it_names_and_no_more(schema: Schema, *, closed: bool) -> None:
    """Unless the schema says otherwise, or could not be satisfied then."""
    read = read_schema(schema, "response_format")
    assert (read.get("additionalProperties") is False) == closed
    assert "'additionalProperties': False" not in repr(read) or closed


def test_a_schema_cannot_choose_llguidances_options() -> None:
    """`x-guidance` could turn checks off."""
    hostile: Schema = {"x-guidance": {"lenient": True, "coerce_one_of": True}, "type": "object"}
    assert read_schema(hostile, "response_format") == {"type": "object"}


def test_one_of_is_any_of(engine: Engine, constrainer: Constrainer) -> None:
    """Discriminated unions, as pydantic writes them, and options that are not apart."""
    kinds = {
        kind: {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]}
        for kind in ("cat", "dog")
    }
    schema: Schema = {"$defs": kinds, "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}]}
    assert follow(engine, constrainer.start_constraint(JsonConstraint(schema=schema)), b'{"kind":"dog"}')
    schema = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    assert follow(engine, constrainer.start_constraint(JsonConstraint(schema=schema)), b"5")


@pytest.mark.parametrize(
    ("schema", "fits", "fails"),
    [
        ({"required": None, "type": "object"}, "{}", "5"),
        ({"propertyNames": {"type": "string"}, "type": "object"}, "{}", "5"),
        ({"type": "string", "format": "password"}, '"x"', "5"),
        ({"uniqueItems": False, "type": "array", "title": 5}, "[1,1]", "5"),
        ({"properties": {"a": {"type": "integer"}}}, '{"a":5}', "5"),
        ({"minProperties": 1, "properties": {"a": {"type": "integer"}}}, '{"a":5}', "{}"),
        ({"type": "number", "multipleOf": 0.01}, "1.25", "1.255"),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, "123456789012345678", "1" * 20),
        ({"type": "integer"}, "5", "1" * 18),
        ({"type": "number"}, "-1.25", "1" * 18),
        ({"type": "number", "minimum": 0, "maximum": 1}, "0.125", "0." + "3" * 10),
        ({"items": [{"type": "integer"}, {"type": "string"}]}, '[1,"a"]', '["a"]'),
        ({"type": "integer", "minimum": 5, "exclusiveMinimum": True}, "6", "5"),
        ({"type": "string", "pattern": "^\\p{L}+$"}, '"äb"', '"1"'),
        ({"type": "string", "minLength": 2.0}, '"ab"', '"a"'),
        ({"$defs": {"a": {"$anchor": "x", "type": "integer"}}, "$ref": "#x"}, "5", '"a"'),
    ],
)
def test_what_is_held_and_what_asks_for_nothing(
    engine: Engine, constrainer: Constrainer, schema: Schema, fits: str, fails: str
) -> None:
    """As programs write their schemas."""
    end = engine.end_tokens[0]

    def completes(text: str) -> bool:
        matcher = constrainer.start_constraint(JsonConstraint(schema=schema))
        return follow(engine, matcher, text.encode()) and (matcher.ended or bool(matcher.allowed()[end]))

    assert completes(fits)
    assert not completes(fails)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        *((r"^\w+$", "name1", True), (r"^\w+$", "name1\n", False), (r"^\w+$", "é", False), (r"^\W$", "é", True)),
        *((r"^\d$", "٣", False), (r"^\D$", "٣", True), (r"^[^\d]$", "٣", True)),
        *((r"^\s$", "\x1c", False), (r"^\S$", "\x1c", True), (r"^\S$", "\xa0", False)),
    ],
)
def test_names_match_as_in_ecmascript(
    engine: Engine, constrainer: Constrainer, pattern: str, name: str, matches: bool
) -> None:
    """A name that matches has the pattern's schema, another has none: neither may be left to chance."""
    schema: Schema = {"type": "object", "patternProperties": {pattern: {"type": "integer"}}}
    for value, allowed in ((5, True), ([], not matches)):
        matcher = constrainer.start_constraint(JsonConstraint(schema=schema))
        assert follow(engine, matcher, json.dumps({name: value}, ensure_ascii=False).encode()) is allowed


# -- GBNF --

GRAMMARS = [
    'root ::= item+\nitem ::= "- " [^\\r\\n\\x0b\\x0c]+ "\\n"',
    r"""root  ::= (expr "=" ws term "\n")+
         expr  ::= term ([-+*/] term)*
         term  ::= ident | num | "(" ws expr ")" ws
         ident ::= [a-z] [a-z0-9_]* ws
         num   ::= [0-9]+ ws
         ws    ::= [ \t\n]*""",
    'root ::= [a-z]* "end"',
    'root ::= "a" "ab"? | ("a" | "b"){2,3} .{0,2} "\\u00e9"  # a comment\n',
    'root ::= "" | "x" (\n  root "y" # nested\n | [\\]\\-a-] )',
]


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_gbnf_allows_what_llama_cpp_allows(engine: Engine, constrainer: Constrainer, grammar: str) -> None:
    """Token by token, over the whole vocabulary, along random walks."""
    vocab = llama_cpp.llama_model_get_vocab(engine._model)
    pieces = [engine.piece(token) for token in range(engine.n_vocab)]
    # Of whole characters: llama.cpp ends at NUL, lets bytes by that are in no text, and guesses at torn characters.
    whole = np.array([is_end or (piece.isascii() and piece > b"\0") for piece, is_end in pieces])
    for turn in range(3):
        matcher = constrainer.start_constraint(GbnfConstraint(grammar=grammar))
        theirs = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
        choose = random.Random(turn)
        for _ in range(12):
            allowed = matcher.allowed()
            both = ask_llama(engine, theirs)
            if np.count_nonzero(allowed) == 1:  # the usual token of a text that must come
                assert both[allowed].all()
            else:
                assert np.flatnonzero(allowed & whole).tolist() == np.flatnonzero(both & whole).tolist()
            token = choose.choice(np.flatnonzero(allowed & whole if (allowed & whole).any() else allowed).tolist())
            if engine.piece(token)[1]:
                break
            matcher.take(token)
            llama_cpp.llama_sampler_accept(theirs, token)
            if matcher.ended:
                break
        llama_cpp.llama_sampler_free(theirs)


def ask_llama(engine: Engine, sampler: object) -> NDArray[np.bool_]:
    """Return what llama.cpp's own grammar sampler allows."""
    data = (llama_cpp.llama_token_data * engine.n_vocab)(*((token, 0.0, 0.0) for token in range(engine.n_vocab)))
    array = llama_cpp.llama_token_data_array(data=data, size=engine.n_vocab, selected=-1, sorted=False)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    return np.array([np.isfinite(item.logit) for item in data])


@pytest.mark.parametrize(
    ("grammar", "line", "named"),
    [
        ("", None, "no rule `root`"),
        ('root ::= "a', 1, "close it"),
        ("root ::= [a", 1, "close it"),
        ("root ::= a\n\nb ::= [x]", 1, "'a'"),
        ('root ::= "a"\nb = [x]', 2, "::="),
        ('root ::= ("a"', 1, "expected )"),
        ("root ::= +", 1, "nothing to repeat"),
        ('root ::= "a"{3000}', 1, "at most 2000"),
        ('root ::= "a"{3,2}', 1, "{3,2}"),
        ('root ::= "\\q"', 1, "\\q"),
        ("root ::= [\\uD800]", 1, "no character"),
        ("root ::= [z-a]", 1, "before it begins"),
        ("root ::= []", 1, "no character"),
        ("root ::= <no such token>", 1, "not one token"),
        ('root ::= "a" ) "b"', 1, "cannot stand here"),
    ],
)
def test_a_grammar_with_a_mistake_is_refused(
    constrainer: Constrainer, grammar: str, line: int | None, named: str
) -> None:
    """With the line that it is in."""
    with pytest.raises(GrammarInvalid) as caught:
        constrainer.start_constraint(GbnfConstraint(grammar=grammar))
    assert (caught.value.status, caught.value.param, caught.value.line) == (400, "grammar", line)
    assert named in str(caught.value)


def test_lark_has_a_rule_for_each_schema(engine: Engine, constrainer: Constrainer) -> None:
    """They are held as strictly, and a refusal names where they came from."""
    grammar = 'start: "<call>" person "</call>"'
    matcher = constrainer.start_constraint(LarkConstraint(grammar=grammar, schemas={"person": PERSON}))
    text, complete = walk(engine, matcher, random.Random(2), 200)
    assert complete
    jsonschema.validate(json.loads(text.removeprefix(b"<call>").removesuffix(b"</call>")), PERSON)
    with pytest.raises(SchemaUnsupported) as caught:
        constrainer.start_constraint(LarkConstraint(grammar=grammar, schemas={"person": {"not": {}}}))
    assert caught.value.param == "tools"


# -- in the worker --


def test_constrained_and_free_sequences_share_a_batch(worker: WorkerEnd) -> None:
    """Each says what it says alone, but for what rounding does; a cancelled one takes nothing with it."""
    first = ask(worker, constraint=JsonConstraint(schema=PERSON), n=2)
    endless: Schema = {"type": "array", "minItems": 1000, "items": {"type": "integer"}}
    gone = ask(worker, constraint=JsonConstraint(schema=endless))
    free = ask(worker)
    listed = ask(worker, constraint=GbnfConstraint(grammar='root ::= "yes" | "no"'))
    worker.until(lambda: bool(worker.deltas.get(gone)))
    worker.send(Cancel(id=gone))
    answers = wait(worker, first, 2)
    for text, finish in answers:
        assert finish == "stop"
        jsonschema.validate(json.loads(text), PERSON)
    assert answers[0] != answers[1]
    assert wait(worker, listed)[0][0] in ("yes", "no")
    assert wait(worker, free)[0][1] in ("stop", "length")
    assert worker.deltas[gone][-1].finish is None


def test_a_seed_repeats_a_constrained_answer(worker: WorkerEnd) -> None:
    """The grammar is no source of chance."""
    said = [wait(worker, ask(worker, constraint=JsonConstraint(schema=PERSON), n=2), 2) for _ in range(2)]
    assert said[0] == said[1]


def test_nothing_leads_into_a_dead_end(worker: WorkerEnd) -> None:
    """Neither a ban on ending nor a bias against what is allowed; penalties neither."""
    against = dict.fromkeys(range(2000), -100.0)
    sampling = Sampling(temperature=0.0, max_tokens=64, ignore_eos=True, logit_bias=against, repeat_penalty=1.9)
    small: list[Schema] = [PERSON, {"enum": ["alpha", "beta"]}, {"const": 5}]
    for schema in small:
        text, finish = wait(worker, ask(worker, sampling=sampling, constraint=JsonConstraint(schema=schema)))[0]
        assert finish == "stop"
        jsonschema.validate(json.loads(text), schema)


def test_what_is_cut_off_says_so(worker: WorkerEnd) -> None:
    """By the number of tokens, or by a stop word in the middle of JSON."""
    constraint = JsonConstraint(schema=PERSON)
    assert wait(worker, ask(worker, sampling=Sampling(max_tokens=3), constraint=constraint))[0][1] == "length"
    assert wait(worker, ask(worker, constraint=constraint, stop=['"age"']))[0][1] == "length"


def test_an_answer_survives_making_room_for_others(smollm2: Path) -> None:
    """A sequence that goes back to the queue goes on in its grammar where it was."""
    schema: Schema = {"type": "array", "items": {"type": "integer", "maximum": 999}, "minItems": 30, "maxItems": 30}
    with start() as end:
        end.load(smollm2, LoadOptions(threads=1, ctx_size=256, parallel=4, batch_size=64))
        sampling = Sampling(temperature=1.0, seed=1, max_tokens=160)
        constraint = JsonConstraint(schema=schema)
        prompts = [TextPrompt(text=f"List {number}: ") for number in range(4)]
        asked = [ask(end, prompt=prompt, sampling=sampling, constraint=constraint) for prompt in prompts]
        for request in asked:
            text, finish = wait(end, request)[0]
            assert finish in ("stop", "length")
            assert finish == "length" or jsonschema.validate(json.loads(text), schema) is None


def test_an_error_reaches_the_daemon(worker: WorkerEnd) -> None:
    """As the error that it is."""
    with pytest.raises(SchemaUnsupported, match="uniqueItems"):
        wait(worker, ask(worker, constraint=JsonConstraint(schema={"uniqueItems": True})))
    with pytest.raises(GrammarInvalid, match="line 1"):
        wait(worker, ask(worker, constraint=GbnfConstraint(grammar="root ::= nothing")))


# -- echo and infill --

STORY = TextPrompt(text="The cat sat on the mat. The dog sat on the log. " * 12)


def test_an_echo_is_the_prompt_itself(worker: WorkerEnd) -> None:
    """Then the answer; with no answer at all, the prompt alone."""
    plain = wait(worker, ask(worker, prompt=STORY, sampling=Sampling(temperature=0.0, max_tokens=4)))[0][0]
    sampling = Sampling(temperature=0.0, max_tokens=4)
    assert wait(worker, ask(worker, prompt=STORY, sampling=sampling, echo=True))[0] == (STORY.text + plain, "length")
    nothing = ask(worker, prompt=STORY, sampling=Sampling(max_tokens=0), echo=True)
    assert wait(worker, nothing)[0] == (STORY.text, "length")
    assert worker.deltas[nothing][-1].tokens == 0
    tokens = TokenPrompt(tokens=[504, 2644])
    assert wait(worker, ask(worker, prompt=tokens, sampling=Sampling(max_tokens=0), echo=True))[0][0] == "The cat"


def test_an_echo_scores_every_token_of_the_prompt(worker: WorkerEnd) -> None:
    """The first has no probability; the others have the one that they would have been generated with."""
    said = ask(worker, prompt=STORY, sampling=Sampling(temperature=0.0, max_tokens=5), top_logprobs=2)
    answer = wait(worker, said)[0][0]
    again = TextPrompt(text=STORY.text + answer)
    scored = ask(worker, prompt=again, sampling=Sampling(max_tokens=0), top_logprobs=2, echo=True, n=2)
    assert wait(worker, scored, 2)[0] == (again.text, "length")
    for index in range(2):
        found = [one for delta in worker.deltas[scored] if delta.index == index for one in delta.logprobs or []]
        assert b"".join(one.token for one in found) == again.text.encode()
        assert found[0].logprob is None
        assert all(one.logprob is not None and one.logprob <= 0 and len(one.top) == 2 for one in found[1:])
    for one, other in zip(found[-5:], logprobs_of(worker, said), strict=True):
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=0.5)


def test_a_single_token_can_be_scored(worker: WorkerEnd) -> None:
    """Nothing leads to it."""
    request = ask(worker, prompt=TextPrompt(text="The"), sampling=Sampling(max_tokens=0), top_logprobs=1, echo=True)
    wait(worker, request)
    assert logprobs_of(worker, request) == [TokenLogprob(b"The", None)]


def test_infill_needs_the_tokens_for_it(worker: WorkerEnd, tmp_path: Path) -> None:
    """A model without them says so; one with them gets prefix, suffix and the mark for the middle."""
    prompt = InfillPrompt(prefix="def f(", suffix="):\n    return a + b\n")
    with pytest.raises(LocalaidError) as caught:
        wait(worker, ask(worker, prompt=prompt))
    assert (caught.value.status, caught.value.param) == (400, "suffix")
    marks = {"pre": 4, "suf": 5, "mid": 6}
    metadata = {f"tokenizer.ggml.fim_{name}_token_id": token for name, token in marks.items()}
    path = write_tiny_llama(tmp_path / "fim.gguf", metadata=metadata)
    model = Engine(LoadModel(path=str(path), options=LoadOptions(threads=1, ctx_size=256)), lambda _: None)
    tokens = model.join_infill("ab", "cd")
    before, behind = (model.tokenize(text, add_bos=False, parse_special=False) for text in ("ab", "cd"))
    assert tokens == [1, 4, *before, 5, *behind, 6]
    model.close()
    with start() as end:
        end.load(path, LoadOptions(threads=1, ctx_size=256))
        assert wait(end, ask(end, prompt=prompt, sampling=Sampling(temperature=0.0, max_tokens=4)))[0][1]
