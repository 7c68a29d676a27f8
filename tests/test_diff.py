"""DIFF: what the user's configs hide, and what an update changes for names in use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localaid import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    FieldChange,
    FileEntry,
    Inventory,
    Layer,
    Rule,
    RuleRef,
    Table,
    auto_rules,
    build_table,
    diff_rules,
    extend_rules,
    parse_config,
    plan_changes,
    plan_hidden,
    render_changes,
    render_hidden,
    resolve,
    sample_of,
)

ONE, TWO = "1" * 64, "2" * 64
CHATS = (CHAT, RESPONSES, MESSAGES)


def table(**documents: str) -> Table:
    """Return a table of configs, layer -> YAML."""
    rules: list[Rule] = []
    for layer, document in documents.items():
        rules += parse_config(document.encode(), file=f"/{layer}/c.yaml", layer=layer)  # type: ignore[arg-type]
    finished, problems = extend_rules(rules)
    assert not problems
    return build_table(finished)


def inventory(*files: tuple[str, str]) -> Inventory:
    """Return chat models, name and SHA each."""
    serves = frozenset({*CHATS, COMPLETIONS})
    return Inventory(
        FileEntry(path=f"/m/{name}", relative=name, sha256=sha, serves=serves, mtime=number)
        for number, (name, sha) in enumerate(files)
    )


THERE = inventory(("a.gguf", ONE))
SHIPPED = f"name: a\nshas: ['{ONE}', '{TWO}']\npaths: [v1/chat]\ntemperature: 0.7\ntop_p: 0.9\n"


# -- what the user's configs hide --


def test_a_rule_of_the_users_hides_one_of_the_defaults() -> None:
    """For the (path, name, SHA) that both name; told field by field."""
    (hidden,) = plan_hidden(table(shipped=SHIPPED, user=f"name: a\nshas: ['{ONE}']\ntemperature: 0\nstop: [x]\n"))
    assert hidden.by == RuleRef(rule="a", layer="user", file="/user/c.yaml")
    assert hidden.hidden == RuleRef(rule="a", layer="shipped", file="/shipped/c.yaml")
    assert (hidden.names, hidden.paths, hidden.shas) == (("a",), CHATS, (f"sha256:{ONE}",))
    assert sorted(hidden.fields, key=lambda change: change.field) == [
        FieldChange(field="paths", before=list(CHATS), after=None),
        FieldChange(field="stop", before=None, after=["x"]),
        FieldChange(field="temperature", before=0.7, after=0.0),
        FieldChange(field="top_p", before=0.9, after=None),
    ]


@pytest.mark.parametrize(
    "user",
    [
        f"name: b\nshas: ['{ONE}']\n",  # another name
        f"name: a\nshas: ['{'3' * 64}']\n",  # another SHA
        f"name: a\nshas: ['{ONE}']\npaths: [v1/completions]\n",  # another path
        "name: a\nshas: ['*']\n",  # comes first, and hides nothing: where it finds no file the other one's turn comes
    ],
)
def test_what_hides_nothing(user: str) -> None:
    """A layer replaces exactly the combination that it names."""
    assert plan_hidden(table(shipped=SHIPPED, user=user)) == ()


def test_fetched_rules_are_hidden_too_and_globs_by_globs() -> None:
    """What the fetched layer hides of the shipped one is not the user's doing."""
    glob = "name: g\nshas: ['*']\nmodel_names: ['gpt-4*']\n"
    (hidden,) = plan_hidden(table(user=glob, fetched=glob + "top_k: 1\n", shipped=SHIPPED))
    assert (hidden.hidden.layer, hidden.names) == ("fetched", ("gpt-4*",))
    assert plan_hidden(table(fetched=SHIPPED, shipped=SHIPPED)) == ()


def test_files_own_names_are_no_defaults() -> None:
    """Layer auto is made for want of a rule: nothing is lost where it is hidden."""
    rules = parse_config(f"name: a\nshas: ['{ONE}']\n".encode(), file="/c", layer="user")
    assert plan_hidden(build_table((*rules, *auto_rules(THERE.files)))) == ()


# -- what an update changes --


def test_a_field_that_changes_is_told_for_the_name_in_use() -> None:
    """Old and new; all paths and names for which the same changes stand together."""
    before = table(fetched=SHIPPED.replace("name: a", "name: a\nmodel_names: [a, other]"))
    after = table(fetched=SHIPPED.replace("name: a", "name: a\nmodel_names: [a, other]").replace("0.7", "0.6"))
    (change,) = plan_changes(before, after, THERE)
    assert (change.names, change.paths) == (("a", "other"), CHATS)
    assert change.fields == (FieldChange(field="temperature", before=0.7, after=0.6),)
    assert change.before == change.after


def test_names_that_lead_to_no_file_are_not_told() -> None:
    """They are not in use, nor is what comes new."""
    absent = f"name: a\nshas: ['{TWO}']\ntop_k: 1\n"
    assert plan_changes(table(fetched=absent), table(fetched=absent.replace("1\n", "2\n")), THERE) == ()
    assert plan_changes(table(), table(fetched=SHIPPED), THERE) == ()


def test_what_the_user_hides_does_not_change() -> None:
    """An update never touches what a user wrote."""
    user = f"name: a\nshas: ['{ONE}']\npaths: [v1/chat]\ntop_k: 5\n"
    before, after = table(user=user, fetched=SHIPPED), table(user=user, fetched=SHIPPED.replace("0.7", "0.1"))
    assert plan_changes(before, after, THERE) == ()


def test_a_rule_that_extends_what_changes_changes_too() -> None:
    """The user has taken that field over on purpose."""
    user = f"name: mine\nshas: ['{ONE}']\nextends: a\n"
    before, after = table(user=user, fetched=SHIPPED), table(user=user, fetched=SHIPPED.replace("0.7", "0.1"))
    (change,) = plan_changes(before, after, THERE)
    assert (change.names, change.before.layer) == (("a", "mine"), "user")


def test_a_name_that_is_lost_and_one_that_leads_elsewhere() -> None:
    """Both are told with what was."""
    both = inventory(("a.gguf", ONE), ("b.gguf", TWO))
    (gone,) = plan_changes(table(fetched=SHIPPED), table(), both)
    assert (gone.after, gone.file_after, gone.file_before) == (None, "", "a.gguf")
    (moved,) = plan_changes(table(fetched=SHIPPED), table(fetched=SHIPPED.replace(f"'{ONE}', ", "")), both)
    assert (moved.file_before, moved.file_after, moved.fields) == ("a.gguf", "b.gguf", ())


def test_a_glob_stands_for_the_names_that_it_matches() -> None:
    """Clients with a hard-coded name go through one."""
    glob = "name: usual\nshas: ['*']\nmodel_names: ['gpt-4*', 'o[13]-?']\ntop_k: 1\n"
    (change,) = plan_changes(table(shipped=glob), table(shipped=glob, fetched=glob.replace("1\n", "2\n")), THERE)
    assert change.names == ("gpt-4*", "o[13]-?")
    assert (change.before.layer, change.after and change.after.layer) == ("shipped", "fetched")


@pytest.mark.parametrize(
    ("pattern", "sample"), [("gpt-4*", "gpt-4"), ("o[134]-?", "o1-x"), ("*", "*"), ("[!a]b", "[!a]b"), ("*a", "a")]
)
def test_the_name_that_stands_for_a_glob(pattern: str, sample: str) -> None:
    """Where none is seen at once, it stands for itself."""
    assert sample_of(pattern) == sample


NAMES = st.sampled_from(["a", "b", "c*"])
RULES = st.lists(
    st.tuples(
        st.sampled_from(["user", "fetched", "shipped"]),
        NAMES,
        st.sampled_from([ONE, TWO, "*"]),
        st.integers(0, 2),
        st.sampled_from(["", "paths: [v1/chat]", "paths: [v1/completions]"]),
    ),
    max_size=5,
)


def table_of(rules: list[tuple[Layer, str, str, int, str]]) -> Table:
    """Return a table of generated rules."""
    documents: dict[str, list[str]] = {}
    for layer, name, sha, top_k, paths in rules:
        documents.setdefault(layer, []).append(f"model_names: ['{name}']\nshas: ['{sha}']\ntop_k: {top_k}\n{paths}\n")
    return table(**{layer: "---\n".join(texts) for layer, texts in documents.items()})


@given(RULES, RULES)
def test_what_is_told_is_what_requests_meet(
    old: list[tuple[Layer, str, str, int, str]], new: list[tuple[Layer, str, str, int, str]]
) -> None:
    """A name is told of, on a path, exactly where its answer changes."""
    before, after = table_of(old), table_of(new)
    changes_told = plan_changes(before, after, THERE)
    told = {(name, path) for change in changes_told for name in change.names for path in change.paths}
    for name in before.named:
        for path in (*CHATS, COMPLETIONS):
            was, is_now = resolve(before, THERE, path, name), resolve(after, THERE, path, name)
            changes = was.file is not None and (
                is_now.rule is None
                or was.rule is None
                or (was.rule.sampling, was.rule.paths) != (is_now.rule.sampling, is_now.rule.paths)
            )
            assert ((name, path) in told) == changes
    assert plan_changes(before, before, THERE) == ()


def test_rules_that_differ_in_whom_they_mean_are_alike() -> None:
    """Names, SHAs and addresses say who is meant, not how it is served."""
    one, other = table(user=SHIPPED).rules[0], table(fetched=SHIPPED.replace(ONE, "4" * 64)).rules[0]
    assert diff_rules(one, other) == ()


# -- as text --


def test_the_text_of_what_is_hidden() -> None:
    """Rule by rule, field by field."""
    user = f"name: a\nshas: ['{ONE}']\npaths: [v1/chat]\ntemperature: 0\n"
    assert render_hidden(plan_hidden(table(shipped=SHIPPED, user=user))).splitlines() == [
        "Hidden by your configs:",
        "  user rule a (/user/c.yaml) hides shipped rule a (/shipped/c.yaml)",
        f"    for a on v1/chat/completions, v1/responses, v1/messages: sha256:{ONE}",
        "      temperature: 0.7 -> 0.0",
        "      top_p: 0.9 -> (not set)",
    ]
    assert render_hidden(()) == "Your configs hide nothing of the default configs."


def test_the_text_of_what_changes() -> None:
    """Also of what is lost, or led elsewhere."""
    both = inventory(("a.gguf", ONE), ("b.gguf", TWO))
    gone = plan_changes(table(fetched=SHIPPED), table(), both)
    assert render_changes(gone).splitlines() == [
        "The update changes, for names that are in use:",
        "  a on v1/chat/completions, v1/responses, v1/messages",
        "      is no longer served (now by fetched rule a (/fetched/c.yaml), a.gguf)",
    ]
    other = SHIPPED.replace(f"'{ONE}', ", "").replace("0.7", "1")
    moved = plan_changes(table(shipped=SHIPPED), table(fetched=other), both)
    assert render_changes(moved).splitlines()[2:] == [
        "      rule: shipped rule a (/shipped/c.yaml) -> fetched rule a (/fetched/c.yaml)",
        "      model: a.gguf -> b.gguf",
        "      temperature: 0.7 -> 1.0",
    ]
    assert render_changes(()) == "Nothing changes for a name that is in use."
    template = f"name: a\nshas: ['{ONE}']\nchat_prompt: {'x' * 500}\n"
    long = plan_changes(table(fetched=SHIPPED), table(fetched=template), THERE)
    assert f'chat_prompt: (not set) -> "{"x" * 199}... (502 characters)' in render_changes(long)
