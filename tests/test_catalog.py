"""Section CATALOG: every name and file, what is known of each, what is missing."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localaid import (
    CHAT,
    EMBEDDINGS,
    LAYERS,
    Catalog,
    FileEntry,
    Inventory,
    Layer,
    ModelState,
    Rule,
    Table,
    auto_rules,
    build_table,
    content_of,
    plan_catalog,
    plan_integrity,
    plan_listing,
    plan_missing,
    plan_unservable,
)

A, B, C = "a" * 64, "b" * 64, "c" * 64
ALL = frozenset(LAYERS)


def model(name: str, sha256: str | None = A, **fields: object) -> FileEntry:
    """Return a file of the models folder /m."""
    known = {"path": f"/m/{name}", "relative": name, "sha256": sha256, "serves": frozenset({CHAT}), **fields}
    return FileEntry(**known)  # type: ignore[arg-type]


def rule(
    name: str, *shas: str, layer: Layer = "user", file: str | None = None, place: int = 0, **fields: object
) -> Rule:
    """Return a rule; `file` is the one that its config names beside the SHAs."""
    expected = None if file is None else f"path:{file}"
    known = {"name": name, "layer": layer, "file": f"{name}.yaml", "place": place, "shas": shas, "names": (name,)}
    return Rule(**known, expected_file=expected, **fields)  # type: ignore[arg-type]


def catalog_of(table: Table, inventory: Inventory, states: dict[str, ModelState] | None = None) -> Catalog:
    """Return everything."""
    return plan_catalog(table, inventory, plan_listing(table, inventory), states or {}, ALL)


def states_of(rules: list[Rule], files: list[FileEntry]) -> dict[str, tuple[str, str | None]]:
    """Return file -> (integrity, layer)."""
    integrity = plan_integrity(build_table([*rules, *auto_rules(files)]), Inventory(files))
    return {path.removeprefix("/m/"): (one.state, one.layer) for path, one in integrity.items()}


# -- integrity --


def test_a_file_is_known_by_the_best_layer_that_names_its_sha() -> None:
    """Neither `*`, nor a path, nor a rule of layer auto makes it known."""
    files = [
        model("a"),
        model("b", B, sha1="1" * 40),
        model("c", C),
        model("d", None),
        model("e", None, problem="torn"),
    ]
    rules = [
        rule("any", "*", "path:c"),
        rule("s", f"sha256:{A}", layer="shipped"),
        rule("f", f"sha256:{A}", layer="fetched"),
        rule("t", f"sha1:{'1' * 40}", layer="shipped"),
    ]
    assert states_of(rules, files) == {
        "a": ("known", "fetched"),
        "b": ("known", "shipped"),
        "c": ("unknown", None),
        "d": ("hashing", None),
        "e": ("unknown", None),
    }


def test_a_mismatch_names_both_shas_and_what_to_do() -> None:
    """A rule speaks of the file, which has another SHA than any that it lists."""
    files = [model("x.gguf", B)]
    listed = rule("x", f"sha256:{A}", f"sha256:{C}", file="x.gguf", urls=("https://example.org/x.gguf",))
    (found,) = plan_integrity(build_table([listed]), Inventory(files)).values()
    assert (found.state, found.layer) == ("mismatch", None)
    assert found.problem == (
        f"user rule x (x.yaml) says it is sha256:{A} (or 1 more), and it is sha256:{B}: `localaid pull x`, "
        "or correct the rule"
    )
    alone = rule("x", f"sha256:{A}", file="x.gguf")
    (found,) = plan_integrity(build_table([alone]), Inventory(files)).values()
    assert "copy or download it again" in str(found.problem)
    assert states_of([alone, rule("y", f"sha256:{B}", layer="shipped")], files) == {"x.gguf": ("mismatch", "shipped")}


@pytest.mark.parametrize(
    ("rules", "files"),
    [
        ([rule("x", f"sha256:{A}", file="x")], [model("x", A)]),
        ([rule("x", f"sha256:{B}", f"sha256:{A}", file="x")], [model("x", A)]),
        ([rule("x", f"sha256:{B}", file="x")], [model("x", None)]),
        ([rule("x", f"sha1:{'1' * 40}", file="x")], [model("x", A)]),  # hashed by sha256 only, so far
        ([rule("x", f"sha256:{B}", file="x")], [model("one/x", A), model("two/x", B)]),
        ([rule("x", f"sha256:{B}", file="x")], [model("y", A)]),
        ([rule("x", "path:x", file="x")], [model("x", A)]),
        ([rule("x", f"sha256:{B}", file="x", layer="shipped"), rule("y", f"sha256:{A}")], [model("x", A)]),
    ],
    ids=["same", "either", "hashing", "sha1", "beside", "absent", "path", "better-layer"],
)
def test_no_mismatch(rules: list[Rule], files: list[FileEntry]) -> None:
    """Where one of the rule's files is there, may still turn out to be, or a better layer knows the file as it is."""
    assert {state for state, _ in states_of(rules, files).values()} <= {"known", "unknown", "hashing"}


# -- missing --


def test_what_is_missing_and_where_to_get_it() -> None:
    """Rules of which no file is there; not those that take any."""
    url = "https://example.org/x.gguf"
    rules = [
        rule("gone", f"sha256:{B}", "path:z.gguf", urls=(url,)),
        rule("lost", f"sha256:{C}", layer="shipped"),
        rule("any", f"sha256:{C}", "*"),
        rule("base"),
        rule("here", f"sha256:{C}", f"sha256:{A}"),
    ]
    table, inventory = build_table(rules), Inventory([model("a")])
    (gone,) = plan_missing(table, inventory, frozenset({"user"}))
    assert (gone.rule, gone.shas, gone.urls, gone.fix) == (
        "gone",
        (f"sha256:{B}", "z.gguf"),
        (url,),
        "localaid pull gone",
    )
    assert [one.rule for one in plan_missing(table, inventory, ALL)] == ["gone", "lost"]
    assert plan_catalog(table, inventory, (), {}, None).missing == ()


# -- the whole --


def test_a_content_counts_once_under_all_its_paths() -> None:
    """The one that people can read comes first, and the models' names are not doubled."""
    blob = "models--o--n/blobs/" + A
    files = [model(blob), model("models--o--n/snapshots/" + "1" * 40 + "/m.Q4_0.gguf"), model("n.gguf", B)]
    inventory = Inventory(files)
    table = build_table(auto_rules(files))
    catalog = catalog_of(table, inventory, {A: "loaded"})
    assert [name.name for name in catalog.names] == ["m", "m.Q4_0", "n"]
    assert [(file.relative[-9:], len(file.paths), file.state) for file in catalog.files] == [
        ("m.Q4_0.gguf"[-9:], 2, "loaded"),
        ("n.gguf", 1, "ready"),
    ]


def test_a_confined_view_has_no_more_than_its_names() -> None:
    """Neither other files nor what is missing."""
    files = [model("a"), model("b", B)]
    table, inventory = build_table([*auto_rules(files), rule("gone", f"sha256:{C}")]), Inventory(files)
    listings = [listing for listing in plan_listing(table, inventory) if listing.name == "a"]
    catalog = plan_catalog(table, inventory, listings, {}, None)
    assert ([one.name for one in catalog.names], [one.relative for one in catalog.files]) == (["a"], ["a"])
    assert catalog.missing == ()


def test_what_cannot_be_served_is_told_once() -> None:
    """With all its paths."""
    files = [
        model("a", None, problem="torn", content="1:2"),
        model("b", None, problem="torn", content="1:2"),
        model("c"),
    ]
    assert plan_unservable(Inventory(files)) == {"/m/a": "torn (also /m/b)"}


_SHAS = st.sampled_from(
    [f"sha256:{A}", f"sha256:{B}", f"sha1:{'1' * 40}", "*", "path:a", "path:d/*", "path:[", "path:/m/a"]
)
_RULES = st.lists(
    st.builds(
        rule,
        st.sampled_from(["x", "y", "gpt-*", "["]),
        layer=st.sampled_from(LAYERS[:3]),
        file=st.sampled_from([None, "a", "d/a", "*", "["]),
        urls=st.sampled_from([(), ("https://example.org",)]),
        paths=st.sampled_from([None, (CHAT,), (EMBEDDINGS,)]),
    ),
    max_size=6,
)
_FILES = st.lists(
    st.builds(
        model,
        st.sampled_from(["a", "b", "d/a", "[", "sha256-" + A, "models--a--b/snapshots/" + "1" * 40 + "/a", ".gguf"]),
        st.sampled_from([A, B, C, None]),
        sha1=st.sampled_from([None, "1" * 40]),
        problem=st.sampled_from([None, "torn"]),
        mtime=st.floats(0, 9),
        title=st.sampled_from([None, "", "A b/c", "\x1b[0m", "ü"]),
        quantisation=st.sampled_from([None, "Q4_0"]),
        content=st.sampled_from(["", "1:1"]),
        alias_names=st.sampled_from([(), (("al", None),)]),
    ),
    max_size=6,
    unique_by=lambda file: file.path,
)


@given(_RULES, st.lists(st.lists(_SHAS, max_size=3).map(tuple), min_size=6, max_size=6), _FILES)
def test_the_catalog_of_whatever_there_is(
    rules: list[Rule], shas: list[tuple[str, ...]], files: list[FileEntry]
) -> None:
    """It never raises, has every path once and every content once, and nothing that is missing is there."""
    listed = [
        msgspec.structs.replace(one, shas=shas[place], place=place, file=str(place)) for place, one in enumerate(rules)
    ]
    table, inventory = build_table([*listed, *auto_rules(files)]), Inventory(files)
    catalog = catalog_of(table, inventory)
    assert sorted(path for file in catalog.files for path in file.paths) == sorted(file.path for file in files)
    assert len(catalog.files) == len({content_of(file) for file in files})
    assert {name.name for name in catalog.names} == {listing.name for listing in plan_listing(table, inventory)}
    for one in catalog.missing:
        assert not any(inventory.find(sha if ":" in sha else f"path:{sha}") for sha in one.shas)
    for file in catalog.files:
        assert (file.integrity.problem is not None) == (file.integrity.state == "mismatch")


def test_while_files_are_hashed_nothing_is_surely_missing() -> None:
    """One of them may turn out to be it."""
    table = build_table([rule("x", f"sha256:{A}")])
    (missing,) = plan_missing(table, Inventory([model("a", None)]), ALL)
    assert missing.fix == "put the file into a models folder (unless it is one of 1 files that are still being hashed)"
