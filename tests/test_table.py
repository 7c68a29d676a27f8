"""Section 3, TABLE: which rule and which file a request gets, whatever happened before, and why."""

from __future__ import annotations

import fnmatch
import itertools
import sys
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localaid import (
    API_PATHS,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    LAYERS,
    ConfigSet,
    Explanation,
    FileEntry,
    Inventory,
    Layer,
    ModelNotFound,
    Resolution,
    Rule,
    Table,
    auto_rules,
    build_table,
    covers_glob,
    explain,
    extend_rules,
    find_alias_clashes,
    find_warnings,
    model_not_found,
    parse_config,
    plan_listing,
    render_explanation,
    resolve,
)

if TYPE_CHECKING:
    from types import FrameType

    from _typeshed import TraceFunction

GENERATES = frozenset({CHAT, COMPLETIONS})


def sha(letter: str) -> str:
    """Return the SHA, as rules spell it, of the file that a test calls by one hex digit."""
    return f"sha256:{letter * 64}"


def model(
    letter: str,
    relative: str = "",
    *,
    mtime: float = 0,
    serves: frozenset[str] = GENERATES,
    is_hashed: bool = True,
    sha1: str | None = None,
    problem: str | None = None,
    aliases: tuple[tuple[str, str | None], ...] = (),
) -> FileEntry:
    """Return a file whose content is called by one hex digit."""
    relative = relative or f"{letter}.gguf"
    return FileEntry(
        path=f"/models/{relative}",
        relative=relative,
        sha256=letter * 64 if is_hashed else None,
        sha1=sha1,
        mtime=mtime,
        serves=serves,
        problem=problem,
        alias_names=aliases,
    )


def table_of(*configs: str | tuple[Layer, str]) -> Table:
    """Return the table of configs; the first is the user's 0.yaml, the second 1.yaml and so on."""
    rules: list[Rule] = []
    for place, config in enumerate(configs):
        layer, text = config if isinstance(config, tuple) else ("user", config)
        rules += parse_config(text.encode(), file=f"{place}.yaml", layer=layer)
    finished, problems = extend_rules(rules)
    assert problems == ()
    return build_table(finished)


def seen(resolution: Resolution) -> tuple[str, str] | None:
    """Return the config file of the rule and the model's letter that a request gets."""
    if resolution.rule is None:
        return None
    assert resolution.file is not None
    assert resolution.file.sha256 is not None
    return resolution.rule.file, resolution.file.sha256[0]


# -- resolution --


def test_exact_name_wins_over_a_glob() -> None:
    """An exact name of a lower layer goes before a user's glob."""
    table = table_of(f"{{model_names: ['gpt-*'], shas: {sha('a')}}}", ("shipped", f"{{name: gpt-4, shas: {sha('b')}}}"))
    inventory = Inventory([model("a"), model("b")])
    assert seen(resolve(table, inventory, CHAT, "gpt-4")) == ("1.yaml", "b")
    assert seen(resolve(table, inventory, CHAT, "gpt-4o")) == ("0.yaml", "a")
    assert seen(resolve(table, inventory, CHAT, "gpt-*")) == ("0.yaml", "a")
    assert seen(resolve(table, inventory, CHAT, "GPT-4o")) is None


def test_globs_are_looked_at_only_where_no_rule_has_the_exact_name() -> None:
    """A rule for exactly (path, name) keeps globs away also when its file is absent; one for another path does not."""
    table = table_of(
        f"{{model_names: ['*'], shas: {sha('a')}}}",
        f"{{name: absent, shas: {sha('b')}}}",
        f"{{name: elsewhere, shas: {sha('b')}, paths: [v1/embeddings]}}",
    )
    inventory = Inventory([model("a")])
    assert seen(resolve(table, inventory, CHAT, "absent")) is None
    assert seen(resolve(table, inventory, CHAT, "elsewhere")) == ("0.yaml", "a")


def test_several_globs_in_order() -> None:
    """All globs that match are looked at in the order of their rules, a rule with two of them once."""
    table = table_of(
        f"{{model_names: ['gpt-4*', '*'], shas: {sha('a')}}}",
        f"{{model_names: ['*-mini', 'gpt-?o-mini'], shas: [{sha('b')}, {sha('c')}]}}",
        f"{{model_names: ['gpt-[45]o-mini'], shas: {sha('d')}}}",
    )
    passed = resolve(table, Inventory(), CHAT, "gpt-4o-mini").passed
    assert [candidate.rule.file for candidate in passed] == ["0.yaml", "1.yaml", "2.yaml"]
    assert seen(resolve(table, Inventory([model("d"), model("c")]), CHAT, "gpt-4o-mini")) == ("1.yaml", "c")


def test_layers_then_file_names_then_places() -> None:
    """Of rules with one name the order is layer, file name, place in the file."""
    places: list[tuple[Layer, str, int]] = [
        ("user", "a.yaml", 1),
        ("user", "b.yaml", 0),
        ("fetched", "a.yaml", 0),
        ("shipped", "a.yaml", 0),
        ("auto", "a.yaml", 0),
    ]
    rules = [
        Rule(name="x", layer=layer, file=file, place=place, shas=(sha(letter),), names=("x",))
        for letter, (layer, file, place) in zip("abcde", places, strict=True)
    ]
    files = [model(letter) for letter in "abcde"]
    table = build_table(reversed(rules))
    for gone in range(5):
        assert seen(resolve(table, Inventory(files[gone:]), CHAT, "x")) == (rules[gone].file, "abcde"[gone])


def test_memory_before_disk_within_a_rule() -> None:
    """A model in memory goes before an earlier one on disk, but only within its rule."""
    table = table_of(f"{{name: x, shas: [{sha('a')}, {sha('b')}]}}", f"{{name: x, shas: {sha('c')}}}")
    inventory = Inventory([model("a"), model("b"), model("c")])
    assert seen(resolve(table, inventory, CHAT, "x")) == ("0.yaml", "a")
    resolution = resolve(table, inventory, CHAT, "x", {"b" * 64, "c" * 64})
    assert seen(resolution) == ("0.yaml", "b")
    assert resolution.is_loaded
    assert seen(resolve(table, inventory, CHAT, "x", {"c" * 64})) == ("0.yaml", "a")


def test_any_model() -> None:
    """`*` is the newest file that serves the path, or the newest of those in memory."""
    table = table_of("{name: x, shas: '*'}")
    embedder = model("e", mtime=9, serves=frozenset({EMBEDDINGS}))
    inventory = Inventory([model("a", mtime=1), model("b", mtime=3), model("c", mtime=2), embedder])
    assert seen(resolve(table, inventory, CHAT, "x")) == ("0.yaml", "b")
    assert seen(resolve(table, inventory, CHAT, "x", {"a" * 64, "c" * 64})) == ("0.yaml", "c")
    assert seen(resolve(table, inventory, EMBEDDINGS, "x", {"a" * 64})) == ("0.yaml", "e")


def test_models_that_cannot_serve_the_path_are_skipped() -> None:
    """A file that is there and cannot serve the path counts as absent."""
    table = table_of(f"{{name: x, shas: [{sha('e')}, {sha('a')}]}}")
    inventory = Inventory([model("e", serves=frozenset({EMBEDDINGS})), model("a")])
    assert seen(resolve(table, inventory, CHAT, "x")) == ("0.yaml", "a")
    assert seen(resolve(table, inventory, EMBEDDINGS, "x")) == ("0.yaml", "e")


def test_sha1_and_paths() -> None:
    """A model is found by its sha1, its path below the folder, its mere file name, its full path and by globs."""
    file = model("a", "sub/Model-Q4_0.gguf", sha1="1" * 40)
    inventory = Inventory([file, model("b", "other.gguf", mtime=5)])
    for spelling in (
        "1" * 40,
        "sub/Model-Q4_0.gguf",
        "Model-Q4_0.gguf",
        "/models/sub/Model-Q4_0.gguf",
        "Model*.gguf",
        "sub/*",
        "/models/sub/*.gguf",
    ):
        resolution = resolve(table_of(f"{{name: x, shas: '{spelling}'}}"), inventory, CHAT, "x")
        assert seen(resolution) == ("0.yaml", "a"), spelling
    assert seen(resolve(table_of("{name: x, shas: 'nowhere/*'}"), inventory, CHAT, "x")) is None


def test_a_path_means_the_nearer_file() -> None:
    """Of files of one name the one in the folder itself is meant, else the newest."""
    table = table_of("{name: x, shas: m.gguf}")
    files = [model("a", "old/m.gguf", mtime=1), model("b", "new/m.gguf", mtime=2), model("c", "m.gguf")]
    assert seen(resolve(table, Inventory(files), CHAT, "x")) == ("0.yaml", "c")
    assert seen(resolve(table, Inventory(files[:2]), CHAT, "x")) == ("0.yaml", "b")


def test_a_file_name_may_look_like_a_glob() -> None:
    """A file is found under a name with brackets."""
    file = model("a", "m[1].gguf")
    assert seen(resolve(table_of("{name: x, shas: 'm[1].gguf'}"), Inventory([file]), CHAT, "x")) == ("0.yaml", "a")


# -- replacement --


def test_a_higher_layer_replaces_a_combination() -> None:
    """For the same (path, name, SHA) the lower entry comes second; its other SHAs, names and paths stay."""
    table = table_of(
        f"{{name: x, shas: {sha('a')}, paths: [v1/chat]}}",
        ("shipped", f"{{name: x, model_names: [x, y], shas: [{sha('a')}, {sha('b')}]}}"),
    )
    user, shipped = table.rules
    assert [(found.rule, found.shas) for found in table.candidates(CHAT, "x")] == [
        (user, (sha("a"),)),
        (shipped, (sha("a"), sha("b"))),  # where the user's rule does not serve the path
    ]
    assert table.candidates(CHAT, "x")[1].replaced == ((sha("a"), user),)
    assert [found.shas for found in table.candidates(COMPLETIONS, "x")] == [(sha("a"), sha("b"))]
    assert [found.shas for found in table.candidates(CHAT, "y")] == [(sha("a"), sha("b"))]
    inventory = Inventory([model("a")])
    assert seen(resolve(table, inventory, CHAT, "x")) == ("0.yaml", "a")
    assert seen(resolve(table, inventory, COMPLETIONS, "x")) == ("1.yaml", "a")


def test_rules_without_shas_are_only_for_extending() -> None:
    """A base for others answers to nothing and hides nothing."""
    table = table_of("{name: x, temperature: 1}", ("shipped", f"{{name: x, shas: {sha('a')}}}"))
    assert seen(resolve(table, Inventory([model("a")]), CHAT, "x")) == ("1.yaml", "a")


# -- still hashing --


def test_hashing_files_are_told_where_nothing_else_fits() -> None:
    """A file that is being hashed may be any SHA; it is waited for only if nothing else fits."""
    table = table_of(f"{{name: x, shas: [{sha('a')}]}}", f"{{name: x, shas: {sha('b')}}}", "{name: y, shas: new.gguf}")
    hashing = model("a", "new.gguf", is_hashed=False)
    assert resolve(table, Inventory([hashing]), CHAT, "x").hashing == (hashing,)
    assert resolve(table, Inventory([hashing]), CHAT, "y").hashing == (hashing,)
    assert resolve(table, Inventory([hashing]), EMBEDDINGS, "y").hashing == ()
    assert resolve(table, Inventory([hashing]), CHAT, "unknown").hashing == ()
    resolution = resolve(table, Inventory([hashing, model("b")]), CHAT, "x")
    assert (seen(resolution), resolution.hashing) == (("1.yaml", "b"), ())


def test_a_sha1_is_waited_for_until_it_is_known() -> None:
    """A file whose sha256 is known and whose sha1 is not may still be the one that a rule names."""
    table = table_of(f"{{name: x, shas: {'1' * 40}}}")
    assert resolve(table, Inventory([model("a")]), CHAT, "x").hashing == (model("a"),)
    assert resolve(table, Inventory([model("a", sha1="2" * 40)]), CHAT, "x").hashing == ()
    assert resolve(table, Inventory([model("a", is_hashed=False, problem="torn")]), CHAT, "x").hashing == ()


# -- layer auto --


def names_of(*files: FileEntry) -> dict[str, list[str]]:
    """Return name -> letters of the files that the rules of layer auto give it to."""
    found: dict[str, list[str]] = {}
    for rule in auto_rules(files):
        for name in rule.names:
            found.setdefault(name, []).append(rule.file.removeprefix("/models/"))
    return found


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", ["SmolLM2-135M-Instruct.Q4_1", "smollm2-135m-instruct"]),
        ("gemma-3-270m-q4_k_m.gguf", ["gemma-3-270m-q4_k_m", "gemma-3-270m"]),
        ("Qwen3-4B-Esper3.i1-Q4_K_M.gguf", ["Qwen3-4B-Esper3.i1-Q4_K_M", "qwen3-4b-esper3"]),
        ("GLM-5.2-UD-Q4_K_XL-00001-of-00011.gguf", ["GLM-5.2-UD-Q4_K_XL", "glm-5.2"]),
        ("x/all-MiniLM-L6-v2-BF16.GGUF", ["all-MiniLM-L6-v2-BF16", "all-minilm-l6-v2"]),
        ("gpt-oss-20b-mxfp4.gguf", ["gpt-oss-20b-mxfp4", "gpt-oss-20b"]),
        ("m.IQ3_XXS.gguf", ["m.IQ3_XXS", "m"]),
        ("sha256-0123abcd", ["sha256-0123abcd"]),
        ("q4_0.gguf", ["q4_0"]),
        (".gguf", [".gguf"]),
    ],
)
def test_auto_names(file: str, names: list[str]) -> None:
    """A file is served under its name without .gguf and, in lower case, without its quantisation."""
    assert names_of(model("a", file)) == {name: [file] for name in names}


def test_auto_names_that_are_ambiguous() -> None:
    """A name that could mean two contents is no short name; equal contents count once."""
    names = names_of(model("a", "M-Q4_0.gguf"), model("b", "M-Q8_0.gguf"))
    assert sorted(names) == ["M-Q4_0", "M-Q8_0"]
    names = names_of(model("a", "M-Q4_0.gguf"), model("b", "m.gguf"))
    assert names == {"M-Q4_0": ["M-Q4_0.gguf"], "m": ["m.gguf"]}
    names = names_of(model("a", "x/M-Q4_0.gguf"), model("a", "y/M-Q4_0.gguf"))
    assert sorted(names) == ["M-Q4_0", "m"]
    names = names_of(model("a", "x/M.gguf"), model("b", "y/M.gguf"))
    assert names == {"M": ["x/M.gguf", "y/M.gguf"], "x/M": ["x/M.gguf"], "y/M": ["y/M.gguf"]}


def stored(letter: str, relative: str, **fields: object) -> FileEntry:
    """Return a file as stores of other programs have it."""
    return msgspec.structs.replace(model(letter, relative), **fields)


def test_auto_names_of_stores() -> None:
    """A digest is no name where the content has a better one: another path's, its manifest's, its title."""
    blob, revision = "models--o--n/blobs/" + "a" * 64, "models--o--n/snapshots/" + "1" * 40
    names = names_of(model("a", blob), model("a", f"{revision}/M-Q4_0.gguf"))
    assert names == {name: [f"{revision}/M-Q4_0.gguf"] for name in ("M-Q4_0", "m")}
    unhashed = [model("a", blob, is_hashed=False), model("a", f"{revision}/M.gguf", is_hashed=False)]
    names = names_of(*(msgspec.structs.replace(file, content="1:2") for file in unhashed))
    assert names == {name: [f"{revision}/M.gguf"] for name in ("M", "m")}
    ollama = "blobs/sha256-" + "b" * 64
    named = stored("b", ollama, alias_names=(("smollm2:135m", None),), title="SmolLM2")
    assert names_of(named) == {"smollm2:135m": [ollama]}
    titled = stored("b", ollama, title="Smol LM2 (135M)/chat", quantisation="Q4_0")
    assert names_of(titled) == {name: [ollama] for name in ("Smol-LM2-135M-chat-Q4_0", "smol-lm2-135m-chat")}
    assert names_of(model("b", ollama)) == {"sha256-" + "b" * 64: [ollama]}
    assert names_of(stored("b", ollama, title="\u202e")) == {"sha256-" + "b" * 64: [ollama]}


def test_auto_names_of_revisions() -> None:
    """Of several revisions in a Hugging Face cache the newest has the file's name; one content counts once."""
    old, new = ("models--o--n/snapshots/" + digit * 40 + "/m.gguf" for digit in "12")
    both = [stored("a", old, path=f"/hub/{old}"), stored("b", new, path=f"/hub/{new}", mtime=1.0)]
    for files in (both, both[::-1]):
        found = {name: rule.shas for rule in auto_rules(files) for name in rule.names}
        assert found == {"m": (sha("b"),), old.removesuffix(".gguf"): (sha("a"),)}
    same = [both[0], msgspec.structs.replace(both[1], sha256="a" * 64)]
    assert [rule.names for rule in auto_rules(same)] == [("m",)]


def test_an_alias_takes_no_files_name() -> None:
    """The file keeps it, and that is told; what is nobody's, or the file's own, may be an alias."""
    files = [
        model("one", aliases=(("two", None), ("Three", None), ("free", None), ("one", "Itself."))),
        model("two"),
        model("Three-Q4_0"),
        model("Three-Q8_0"),
    ]
    named = [(rule.file, rule.names) for rule in auto_rules(files)]
    assert [names for file, names in named if file == files[0].path] == [("one",), ("Three",), ("free",)]
    assert [names for file, names in named if file == files[1].path] == [("two",)]
    (warning,) = find_alias_clashes(files)
    assert str(warning) == "/models/aliases.json: one.gguf: two is another file's own name, which keeps it"


def test_auto_rules_of_aliases() -> None:
    """aliases.json gives a file a second name, with a description; a file that cannot be served gets no name."""
    file = model("a", aliases=(("whisper", "Hears"), ("w", None)))
    table = build_table(auto_rules([file, model("b", problem="torn")]))
    assert [(rule.names, rule.description) for rule in table.rules] == [
        (("a",), None),
        (("whisper",), "Hears"),
        (("w",), None),
    ]
    assert resolve(table, Inventory([file]), CHAT, "whisper").file == file
    assert resolve(table, Inventory([file]), CHAT, "b").rule is None


def test_auto_rules_while_hashing() -> None:
    """A file has its names before its SHA is known, so that a request for it can wait."""
    file = model("a", is_hashed=False)
    table = build_table(auto_rules([file]))
    assert resolve(table, Inventory([file]), CHAT, "a").hashing == (file,)


# -- listing, errors, explanation, warnings --


def test_listing() -> None:
    """Every exact name that leads to a present file is listed once, with its paths; globs and absent files are not."""
    table = table_of(
        f"{{model_names: [a, 'a*'], shas: {sha('a')}, paths: [v1/chat], description: D}}",
        f"{{name: gone, shas: {sha('b')}}}",
        f"{{name: a, shas: {sha('e')}}}",
        "{name: new, shas: new.gguf}",
        f"{{name: maybe, shas: {sha('f')}}}",
    )
    embedder = model("e", serves=frozenset({EMBEDDINGS}))
    hashing = model("c", "new.gguf", is_hashed=False)
    listings = plan_listing(table, Inventory([model("a"), embedder, hashing]))
    assert [(listing.name, listing.file, listing.rule.file, listing.paths) for listing in listings] == [
        ("a", model("a"), "0.yaml", (CHAT, EMBEDDINGS)),
        ("new", hashing, "3.yaml", (CHAT, COMPLETIONS)),
    ]
    assert listings[0].rule.description == "D"


def not_found(table: Table, inventory: Inventory, name: str, path: str = CHAT) -> ModelNotFound:
    """Return the error for a request that finds nothing."""
    listed = [listing.name for listing in plan_listing(table, inventory)]
    return model_not_found(resolve(table, inventory, path, name), listed)


def test_model_not_found() -> None:
    """The 404 names what is near, what is missing and where to get it, what is unfit, and where the name is served."""
    table = table_of(
        f"- {{model: alpaca, checksum: ['{sha('a')}', '{sha('b')}'], url: 'https://example.org/a'}}",
        f"{{name: gpt-4, shas: {sha('e')}}}",
        f"{{name: embedder, shas: {sha('e')}, paths: [v1/embeddings]}}",
        "{name: glob, shas: 'x*.gguf'}",
    )
    inventory = Inventory([model("e", serves=frozenset({EMBEDDINGS}))])
    texts = [str(not_found(table, inventory, name)) for name in ("alpaca", "GPT-5", "embedder", "gpt-4", "glob", "zzz")]
    assert texts == [
        (
            f"The model 'alpaca' is not served on {CHAT}: no file is there for {sha('a')}, {sha('b')}; "
            "`localaid pull alpaca` fetches one, or put it into a models folder, from https://example.org/a."
        ),
        f"The model 'GPT-5' is not served on {CHAT}; did you mean 'gpt-4'? /v1/models lists every name.",
        f"The model 'embedder' is not served on {CHAT}, only on {EMBEDDINGS}; ask there, or add the path to its rule.",
        f"The model 'gpt-4' is not served on {CHAT}: e.gguf: cannot serve this path; `localaid explain` shows why.",
        f"The model 'glob' is not served on {CHAT}: no file is there for x*.gguf; put one into a models folder.",
        f"The model 'zzz' is not served on {CHAT}; /v1/models lists every name that is.",
    ]
    error = not_found(table, inventory, "alpaca")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert error.missing == [sha("a"), sha("b")]


def test_explanation() -> None:
    """An explanation tells each rule that was looked at with its reasons, and for every field where it came from."""
    table = table_of(
        f"{{name: x, shas: [{sha('a')}, gone.gguf], extends: base, temperature: 0.5}}",
        f"{{name: x, shas: {sha('d')}, paths: [v1/embeddings]}}",
        ("shipped", f"[{{model: x, checksum: [{sha('a')}, {sha('e')}], file: m.gguf}}]"),
        ("shipped", f"{{name: base, top_p: 0.9, shas: {sha('f')}}}"),
        ("shipped", f"{{model_names: ['*'], shas: {sha('b')}}}"),
    )
    inventory = Inventory([model("e", serves=frozenset({EMBEDDINGS})), model("c", "c.gguf", is_hashed=False)])
    told = explain(resolve(table, inventory, CHAT, "x"))
    assert (told.rule, told.file, told.fields) == (None, None, {})
    assert told.hashing == ("/models/c.gguf",)
    assert [(rule.file, rule.reasons) for rule in told.rules] == [
        ("0.yaml", (f"{sha('a')}: c.gguf is being hashed", "path:gone.gguf: no such file")),
        (
            "2.yaml",
            (
                f"{sha('a')}: replaced by user rule x (0.yaml)",
                f"{sha('e')}: e.gguf cannot: not a model for this path; c.gguf is being hashed",
            ),
        ),
    ]
    assert told.notes == (
        f"user rule x (1.yaml) has this name for {EMBEDDINGS} only",
        "an exact name wins over a glob, so * was not looked at",
    )
    assert "nothing serves it; being hashed: /models/c.gguf" in render_explanation(told)

    told = explain(resolve(table, Inventory([model("a")]), CHAT, "x"))
    assert told.rules[-1].is_chosen
    assert told.fields["temperature"] == msgspec.structs.replace(told.fields["temperature"], value=0.5, file="0.yaml")
    assert (told.fields["top_p"].value, told.fields["top_p"].layer, told.fields["top_p"].file) == (
        0.9,
        "shipped",
        "3.yaml",
    )
    assert told.fields["names"].value == ["x", "base"]
    text = render_explanation(told)
    assert f"=> /models/a.gguf {sha('a')}" in text
    assert "top_p" in text
    assert "[shipped: 3.yaml]" in text


def test_explanation_of_a_file_that_is_another() -> None:
    """A rule that names a file beside its SHA is told apart from the file that has its name."""
    table = table_of(f"[{{model: x, checksum: {sha('a')}, file: m.gguf}}]")
    told = explain(resolve(table, Inventory([model("a"), model("b", "m.gguf")]), CHAT, "x"))
    assert told.notes == ("the rule speaks of path:m.gguf, which has another SHA",)


@pytest.mark.parametrize(("backend", "is_told"), [("llama.cpp", False), ("gpt2", True), ("Llama", False)])
def test_explanation_of_a_backend(backend: str, is_told: bool) -> None:
    """A rule's backend is an assertion; where the header says otherwise that is told, and the header holds."""
    file = msgspec.structs.replace(model("a"), architecture="llama")
    table = table_of(f"{{name: x, shas: {sha('a')}, backend: {backend}}}")
    told = explain(resolve(table, Inventory([file]), CHAT, "x"))
    assert told.file == file.path
    assert bool(told.notes) == is_told


def test_explanation_as_json() -> None:
    """An explanation goes through JSON and back."""
    told = explain(resolve(table_of(f"{{name: x, shas: {sha('a')}}}"), Inventory([model("a")]), CHAT, "x"))
    assert msgspec.json.decode(msgspec.json.encode(told), type=Explanation) == told


def test_warnings() -> None:
    """Claims made twice in a layer, rules never reached and rules of no model are told; what a layer hides is not."""
    table = table_of(
        f"{{name: x, shas: [{sha('a')}, {sha('b')}]}}",
        f"{{name: x, shas: [{sha('b')}, {sha('c')}], paths: [v1/chat]}}",
        f"[{{model: x, checksum: {sha('a')}}}]",
        "{name: y, shas: '*'}",
        "{name: y, shas: y.gguf}",
        "{name: alone, temperature: 1}",
        "{name: base, temperature: 1}",
        f"{{name: z, extends: base, shas: {sha('a')}}}",
        f"{{model_names: ['g*'], shas: {sha('a')}}}",
        f"{{model_names: ['g*'], shas: {sha('a')}, paths: [v1/embeddings]}}",
        ("shipped", f"{{name: z, shas: {sha('a')}}}"),
    )
    assert [str(warning) for warning in find_warnings(table)] == [
        f"1.yaml: shas: user rule x (0.yaml) comes first for {CHAT}, x, {sha('b')}, line 1",
        "2.yaml: 0.name: is never reached: rules before it serve all its names and SHAs, line 1",
        f"2.yaml: 0.shas: user rule x (0.yaml) comes first for {CHAT}, x, {sha('a')}, line 1",
        "4.yaml: name: is never reached: rules before it serve all its names and SHAs, line 1",
        "5.yaml: shas: names no model: it needs shas, a checksum or a file, or a config that extends it, line 1",
        f"9.yaml: shas: user rule 8 (8.yaml) comes first for {EMBEDDINGS}, g*, {sha('a')}, line 1",
    ]


@pytest.mark.parametrize(
    ("first", "second", "is_told"),
    [
        ("{name: a, model_names: ['*'], shas: '*'}", "{name: b, model_names: ['gpt-*'], shas: '*'}", True),
        ("{name: a, model_names: ['gpt-*'], shas: '*'}", "{name: b, model_names: ['*'], shas: '*'}", False),
        ("{name: a, model_names: ['g*t-*'], shas: '*'}", "{name: b, model_names: ['gpt-?[ab]'], shas: x.gguf}", True),
        ("{name: a, model_names: ['g?t-*'], shas: '*'}", "{name: b, model_names: ['g*t-*'], shas: '*'}", False),
        ("{name: a, model_names: ['*'], shas: '*'}", "{name: b, model_names: ['gpt-4'], shas: '*'}", False),
        ("{name: a, model_names: ['*'], shas: x.gguf}", "{name: b, model_names: ['gpt-*'], shas: '*'}", False),
        ("{name: a, model_names: ['*', x], shas: '*'}", "{name: b, model_names: ['gpt-*', x], shas: '*'}", True),
        ("{name: a, model_names: ['*'], shas: '*'}", "{name: b, model_names: ['gpt-*', x], shas: '*'}", False),
        ("{name: x, shas: 'tiny*'}", "{name: x, shas: tiny0.gguf}", True),
        ("{name: x, shas: 'tiny*'}", "{name: x, shas: sub/tiny0.gguf}", True),
        ("{name: x, shas: 'sub/*'}", "{name: x, shas: ['sub/tiny*', sub/a.gguf]}", True),
        ("{name: x, shas: 'tiny*'}", "{name: x, shas: 'sub/tiny*'}", False),
        ("{name: x, shas: 'sub/*'}", "{name: x, shas: tiny0.gguf}", False),
        ("{name: x, shas: 'tiny*', paths: [v1/chat]}", "{name: x, shas: tiny0.gguf}", False),
        ("{name: x, shas: 'tiny*', paths: [v1/chat]}", "{name: x, shas: tiny0.gguf, paths: [v1/chat]}", True),
    ],
)
def test_warnings_of_wider_globs(first: str, second: str, *, is_told: bool) -> None:
    """A glob before a narrower one, of names or files, hides it; an exact name goes before any glob."""
    told = [str(warning) for warning in find_warnings(table_of(first, second)) if warning.keys == "name"]
    assert told == ["1.yaml: name: is never reached: rules before it serve all its names and SHAs, line 1"] * is_told


@pytest.mark.parametrize("name", ["llama[v2]", "what?", "a*b", "[", "*"])
def test_a_file_may_have_the_signs_of_globs_in_its_name(name: str) -> None:
    """It is known by the name as it stands, whatever a user's glob of that text means beside it."""
    files = [model("a", f"{name}.gguf"), model("b", "other.gguf")]
    auto = auto_rules(files)
    table, inventory = build_table(auto), Inventory(files)
    assert resolve(table, inventory, CHAT, name).file == files[0]
    assert resolve(table, inventory, CHAT, "llamav").rule is None
    assert {listing.name for listing in plan_listing(table, inventory)} == {name, "other"}
    user = parse_config(f"{{name: u, model_names: ['{name}'], shas: other.gguf}}".encode(), file="u", layer="user")
    both = build_table((*auto, *user))
    for _ in range(2):  # the second time as it was kept
        assert resolve(both, inventory, CHAT, name).file == files[0]
    if name == "a*b":
        assert resolve(both, inventory, CHAT, "axb").file == files[1]


# -- the config set --


def test_a_broken_file_keeps_its_last_good_rules() -> None:
    """What breaks goes on with its last good rules and is told; what was never good has none; what is mended is."""
    good = ConfigSet().put("x.yaml", "user", b"{name: x, shas: '*'}")
    broken = good.put("x.yaml", "user", b"{name: x, shas: ").put("y.yaml", "user", b"nam: y")
    table, problems = broken.merge()
    assert table == good.merge()[0]
    assert [problem.file for problem in problems] == ["x.yaml", "y.yaml"]
    mended, problems = broken.put("x.yaml", "user", b"{name: z, shas: '*'}").put("y.yaml", "user", None).merge()
    assert list(mended.named) == ["z"]
    assert problems == ()


def test_removing_what_is_not_there() -> None:
    """A file that is gone twice is gone."""
    assert ConfigSet().put("x.yaml", "user", None).merge() == (Table(()), ())


def test_extends_over_files() -> None:
    """When a base goes, the rule on it is left out and told; when it comes back, so does the rule."""
    base, rule = b"{name: base, temperature: 1}", b"{name: x, extends: base, shas: '*'}"
    whole = ConfigSet().put("x.yaml", "user", rule).put("base.yaml", "shipped", base)
    without = whole.put("base.yaml", "shipped", None)
    assert without.merge()[0].rules == ()
    assert "is named base" in str(without.merge()[1][0])
    assert without.put("base.yaml", "shipped", base).merge() == whole.merge()


BASE, ON_BASE = b"{name: base, temperature: 1}", b"{name: x, extends: base, shas: '*'}"


@pytest.mark.parametrize(
    ("file", "document"),
    [
        ("base.yaml", None),
        ("base.yaml", b"{name: renamed, temperature: 1}"),
        ("base.yaml", b"{name: base, extends: x}"),
        ("x.yaml", b"{name: x, extends: bsae, shas: '*', top_p: 0.1}"),
        ("x.yaml", b"{name: x, extends: bsae, shas: '*'}\n---\n{name: new, shas: '*'}"),
        ("x.yaml", b"{name: x, shas: '*', extends: x}"),
    ],
)
def test_a_mistake_in_extends_keeps_the_last_good_rules(file: str, document: bytes | None) -> None:
    """In whichever file it is made; it is told, as often as others change, and mended it is forgotten."""
    good = ConfigSet().put("x.yaml", "user", ON_BASE).put("base.yaml", "user", BASE).settle()
    broken = good.put(file, "user", document).settle().put("other.yaml", "user", b"{name: o, shas: '*'}").settle()
    table, problems = broken.merge()
    assert table.named["x"] == good.merge()[0].named["x"]
    assert table.named["x"][0].sampling.temperature == 1.0
    assert [problem.keys.rpartition(".")[2] for problem in problems] == ["extends"] * len(problems)
    assert problems
    assert list(table.named) == ["o", "x"]
    mended = broken.put(file, "user", BASE if file == "base.yaml" else ON_BASE).settle()
    assert mended.put("other.yaml", "user", None).merge() == good.merge()
    assert broken.put("x.yaml", "user", None).settle().merge()[0].named.keys() == {"o"}


def test_a_file_that_was_never_good_follows_its_edits() -> None:
    """What is right in it is in force, as it is now: there is nothing that could be kept."""
    configs = ConfigSet()
    for name in (b"a", b"b"):
        document = b"{name: x, extends: bsae, shas: '*'}\n---\n{name: %b, shas: '*'}" % name
        configs = configs.put("x.yaml", "user", document).settle()
    assert list(configs.merge()[0].named) == ["b"]


# -- properties --

NAMES = ["x", "y", "gpt-4", "gpt-*", "*", "g?t-4", "x*"]
SHAS = [sha("a"), sha("b"), sha("c"), "*", "path:a.gguf", "path:*.gguf", f"sha1:{'1' * 40}"]
PATHS = [CHAT, COMPLETIONS, EMBEDDINGS]
LAYER = st.sampled_from(LAYERS)
UNIQUE_SHAS = st.lists(st.sampled_from(SHAS), unique=True, max_size=3).map(tuple)
RULES = st.lists(
    st.builds(
        Rule,
        name=st.sampled_from(NAMES),
        layer=LAYER,
        file=st.sampled_from(["a.yaml", "b.yaml"]),
        place=st.integers(0, 5),
        shas=UNIQUE_SHAS,
        names=st.lists(st.sampled_from(NAMES), unique=True, min_size=1, max_size=2).map(tuple),
        paths=st.none() | st.lists(st.sampled_from(PATHS), unique=True, min_size=1).map(tuple),
    ),
    max_size=8,
    unique_by=lambda rule: (rule.layer, rule.file, rule.place),
)
FILES = st.lists(
    st.builds(
        model,
        st.sampled_from("abcd"),
        st.sampled_from(["a.gguf", "sub/a.gguf", "b.gguf", "c"]),
        mtime=st.integers(0, 2),
        serves=st.sets(st.sampled_from(PATHS)).map(frozenset),
        is_hashed=st.booleans(),
        sha1=st.none() | st.just("1" * 40),
        problem=st.none() | st.just("torn"),
    ),
    max_size=4,
)
ASKED = st.sampled_from([*NAMES, "gpt-4o", "unknown", "", "[", "\0"]) | st.text("gpt-4x*?[]", max_size=6)
LOADED = st.sets(st.sampled_from([letter * 64 for letter in "abcd"]))


def views(table: Table) -> list[object]:
    """Return what can be seen of a table: the rules of each (path, name) with what is left of them."""
    return [table.candidates(path, name) for path in PATHS for name in [*NAMES, "gpt-4o", "unknown"]]


def resolve_slowly(
    rules: list[Rule], inventory: Inventory, path: str, name: str, loaded: set[str]
) -> Resolution | None:
    """Resolve as DESIGN.md tells it, looking at every rule; return None where nothing fits."""

    def matches(pattern: str, *, exactly: bool) -> bool:
        table = build_table([Rule(name="", layer="user", file="", place=0, shas=("*",), names=(pattern,))])
        is_pattern = any(letter in pattern for letter in "*?[")
        return pattern == name if exactly and not is_pattern else (not exactly and bool(table.find_patterns(name)))

    on_path = [rule for rule in rules if rule.shas and (rule.paths is None or path in rule.paths)]
    chosen = [rule for rule in on_path if any(matches(pattern, exactly=True) for pattern in rule.names)]
    chosen = chosen or [rule for rule in on_path if any(matches(pattern, exactly=False) for pattern in rule.names)]
    for rule in sorted(chosen, key=lambda rule: (LAYERS.index(rule.layer), rule.file, rule.place)):
        found = [file for key in rule.shas for file in inventory.find(key) if file.sha256 and path in file.serves]
        found.sort(key=lambda file: file.sha256 not in loaded)
        if found:
            table = build_table(rules)
            return Resolution(path, name, rule, found[0], found[0].sha256 in loaded, (), table, inventory)
    return None


@given(RULES, FILES, st.sampled_from(PATHS), ASKED, LOADED)
def test_resolve_does_what_the_design_says(
    rules: list[Rule], files: list[FileEntry], path: str, name: str, loaded: set[str]
) -> None:
    """The indexed table gives what the plain procedure gives, the first time and the second."""
    table, inventory = build_table(rules), Inventory(files)
    expected = resolve_slowly(rules, inventory, path, name, loaded)
    for _ in range(2):
        resolution = resolve(table, inventory, path, name, loaded)
        if expected is None:
            assert resolution.rule is None
        else:
            assert (resolution.rule, resolution.file) == (expected.rule, expected.file)
            assert resolution.is_loaded == expected.is_loaded


@given(RULES, FILES, st.sampled_from(API_PATHS) | st.text(max_size=3), st.text(max_size=5) | ASKED, LOADED)
def test_nothing_raises(rules: list[Rule], files: list[FileEntry], path: str, name: str, loaded: set[str]) -> None:
    """Whatever the rules, the files and the request: resolve, explain, list and tell, without an exception."""
    table, inventory = build_table((*rules, *auto_rules(files))), Inventory(files)
    resolution = resolve(table, inventory, path, name, loaded)
    assert (resolution.rule is None) == (resolution.file is None)
    assert render_explanation(explain(resolution)).startswith(path)
    assert isinstance(str(model_not_found(resolution, ["x", "y"])), str)
    assert isinstance(find_warnings(table), tuple)
    for listing in plan_listing(table, inventory):
        served = [resolve(table, inventory, path, listing.name) for path in listing.paths]
        assert all(found.file is not None or found.hashing for found in served)
        assert listing.name in table.named


@given(st.data())
def test_the_order_of_rules_does_not_matter(data: st.DataObject) -> None:
    """A table is the same, and shows the same, from any order of its rules; merging again changes nothing."""
    rules = data.draw(RULES)
    table = build_table(rules)
    shuffled = build_table(data.draw(st.permutations(rules)))
    assert shuffled == table
    assert views(shuffled) == views(table)
    assert build_table(table.rules) == table
    assert extend_rules(table.rules) == (table.rules, ())


@given(RULES)
def test_removing_a_user_rule_restores_what_it_hid(rules: list[Rule]) -> None:
    """With a rule of the user and without it again, the table shows what it showed."""
    below = [rule for rule in rules if rule.layer != "user"]
    before = views(build_table(below))
    with_user = build_table(rules)
    views(with_user)
    without = build_table(rule for rule in with_user.rules if rule.layer != "user")
    assert without == build_table(below)
    assert views(without) == before


GLOBS = st.text("ab*?[]", min_size=1, max_size=5)


@given(GLOBS, GLOBS, st.lists(st.text("ab]", max_size=5), max_size=20))
def test_a_wider_glob_matches_all_that_the_other_does(wide: str, pattern: str, names: list[str]) -> None:
    """Where it is said to be so."""
    if covers_glob(wide, pattern):
        for name in names:
            assert not fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, wide)


@given(RULES)
def test_what_is_said_to_be_never_reached_is_not(rules: list[Rule]) -> None:
    """Whatever is asked for, and whichever files are there."""
    table = build_table(msgspec.structs.replace(rule, line=line) for line, rule in enumerate(rules, 1))
    told = {one.line for one in find_warnings(table) if "never reached" in one.problem}
    lost = [rule for rule in table.rules if rule.line in told]
    chats = msgspec.structs.replace(model("b"), serves_named=frozenset({EMBEDDINGS}))
    files = [model("a"), chats, model("c", sha1="1" * 40, serves=frozenset({EMBEDDINGS}))]
    for count in range(4):
        for there in itertools.combinations(files, count):
            for path, name in itertools.product(PATHS, ["x", "y", "gpt-4", "xyz", "gpt-", "z"]):
                assert resolve(table, Inventory(there), path, name).rule not in lost


@given(RULES)
def test_a_combination_has_one_owning_layer(rules: list[Rule]) -> None:
    """After replacement each (path, name, SHA) stands in one layer only, the highest that names it."""
    table = build_table(rules)
    for path, name in itertools.product(PATHS, ["x", "y", "gpt-4"]):
        named = [rule for rule in rules if name in rule.names and (rule.paths is None or path in rule.paths)]
        candidates = table.candidates(path, name) if any(rule.shas for rule in named) else ()
        for key in SHAS:
            claiming = {LAYERS.index(rule.layer) for rule in named if key in rule.shas}
            kept = {
                LAYERS.index(found.rule.layer)
                for found in candidates
                if key in found.shas and key not in {claimed for claimed, _ in found.replaced}
            }
            assert kept == ({min(claiming)} if claiming else set())


DOCUMENTS = [
    None,
    b"{name: x, shas: '*'}",
    b"{name: y, shas: a.gguf, extends: x, top_p: 0.5}",
    b"{name: z, extends: y}",
    b"{name: x, extends: z}",
    b"[{model: gpt-4, file: a.gguf}, {model: x, file: b.gguf}]",
    b"shas: [",
    b"unknown: 1",
    b"",
]
FILE_LAYERS: list[Layer] = ["user", "fetched", "shipped"]
EVENT = st.tuples(
    st.sampled_from(["a.yaml", "b.yaml", "c.yaml"]), st.sampled_from(FILE_LAYERS), st.sampled_from(DOCUMENTS)
)


def play(events: list[tuple[str, Layer, bytes | None]]) -> ConfigSet:
    """Return the configs after these events."""
    configs = ConfigSet()
    for file, layer, document in events:
        configs = configs.put(file, layer, document)
    return configs


@given(st.data())
def test_the_order_of_file_events_does_not_matter(data: st.DataObject) -> None:
    """However the events of different files interleave, table and problems end the same."""
    events = data.draw(st.lists(EVENT, max_size=8))
    queues: dict[tuple[str, str], list[tuple[str, Layer, bytes | None]]] = {}
    for event in events:
        queues.setdefault(event[:2], []).append(event)
    turns = data.draw(st.permutations([event[:2] for event in events]))
    shuffled = [queues[key].pop(0) for key in turns]
    assert play(shuffled).merge() == play(events).merge()


@given(st.lists(EVENT, max_size=8), st.data())
def test_what_ends_without_a_problem_has_no_history(
    events: list[tuple[str, Layer, bytes | None]], data: st.DataObject
) -> None:
    """What was kept of files meanwhile is forgotten: the table is that of the files as they are."""
    configs = ConfigSet()
    for file, layer, document in events:
        configs = configs.put(file, layer, document)
        configs = configs.settle() if data.draw(st.booleans()) else configs
    table, problems = configs.merge()
    if not problems:
        assert table == ConfigSet(configs.files).merge()[0]
    else:
        assert {rule.file for rule in table.rules} <= {file for _, file in configs.files}


@given(st.lists(EVENT, max_size=6))
def test_events_again_change_nothing(events: list[tuple[str, Layer, bytes | None]]) -> None:
    """An event that comes twice, as inotify may send it, changes nothing; nor does merging twice."""
    twice = [event for event in events for _ in range(2)]
    configs = play(twice)
    assert configs.merge() == play(events).merge() == configs.merge()


@given(st.lists(EVENT, max_size=6), st.sampled_from(DOCUMENTS[1:6]))
def test_a_user_file_that_comes_and_goes_leaves_no_trace(
    events: list[tuple[str, Layer, bytes | None]], document: bytes
) -> None:
    """Adding a user's file and removing it restores precisely what was."""
    before = play(events)
    added = before.put("new.yaml", "user", document)
    added.merge()
    after = added.put("new.yaml", "user", None)
    assert after.merge() == before.merge()
    assert views(after.merge()[0]) == views(before.merge()[0])


# -- cost --


def count_lines(table: Table, inventory: Inventory, name: str) -> Counter[str]:
    """Return how often each Python function is entered, and lines of it run, by one resolve."""
    entered: Counter[str] = Counter()

    def trace(frame: FrameType, event: str, _argument: object) -> TraceFunction:
        entered[f"{event} {frame.f_code.co_name}"] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        resolve(table, inventory, CHAT, name)
    finally:
        sys.settrace(before)
    return entered


@pytest.mark.parametrize("asked", ["name-7", "glob-00007-x", "unknown"])
def test_resolve_costs_the_same_whatever_the_number_of_rules(asked: str) -> None:
    """One resolve runs exactly the same lines with 10 rules and with 20,000."""
    counts = []
    for size in (10, 20_000):
        rules = [
            Rule(
                name=f"r{number}",
                layer="user",
                file="a.yaml",
                place=number,
                shas=(f"sha256:{number:064x}",),
                names=(f"name-{number}", f"glob-{number:05}-*"),
            )
            for number in range(size)
        ]
        files = [msgspec.structs.replace(model("a"), sha256=f"{7:064x}", sha1="1" * 40)]
        table, inventory = build_table(rules), Inventory(files)
        assert (resolve(table, inventory, CHAT, asked).rule is None) == (asked == "unknown")  # and compiles the glob
        counts.append(count_lines(table, inventory, asked))
    assert counts[0] == counts[1]
