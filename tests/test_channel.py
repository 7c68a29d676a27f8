"""CHANNEL: a channel's index, its keys and signatures in minisign's format."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localaid import (
    CHANNEL_FILES,
    CHANNEL_LIMIT_BYTES,
    DOCUMENT_LIMIT_BYTES,
    ChannelIndex,
    ConfigErrors,
    IndexedFile,
    PublicKey,
    SecretKey,
    Signature,
    check_channel_paths,
    is_temporary,
    open_secret_key,
    parse_index,
    parse_secret_key,
    parse_set,
    parse_signature,
    public_of,
    read_public_key,
    render_index,
    render_public_key,
    render_secret_key,
    render_signature,
    scrypt_cost,
    sign,
    verify_signature,
)

SHA = hashlib.sha256(b"").hexdigest()
MADE = dt.datetime(2026, 1, 5, 12, tzinfo=dt.UTC)


def index_of(*paths: str, **changes: object) -> bytes:
    """Return the JSON of an index with empty files."""
    files = [{"path": path, "size": 0, "sha256": SHA} for path in paths]
    index = {"format": 1, "serial": 1, "made_at": "2026-01-05T12:00:00Z", "files": files, **changes}
    return json.dumps(index).encode()


# -- index.json --

PARTS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,8}", fullmatch=True)
PATHS = st.lists(PARTS, min_size=1, max_size=6).map("/".join) | st.text(max_size=30)


def is_accepted(*paths: str) -> bool:
    """Return whether an index may have these."""
    try:
        check_channel_paths(paths)
    except ValueError:
        return False
    return True


@given(st.integers(1, 2**53 - 1), st.datetimes(timezones=st.just(dt.UTC)), st.lists(PARTS, unique_by=str.lower))
def test_an_index_is_read_as_it_was_written(serial: int, made_at: dt.datetime, names: list[str]) -> None:
    """Whatever its serial, its time and its files."""
    paths = [path for name in names if is_accepted(path := f"{name}.yaml")]
    files = tuple(IndexedFile(path=path, size=number, sha256=SHA) for number, path in enumerate(paths))
    index = ChannelIndex(format=1, serial=serial, made_at=made_at, files=files)
    assert parse_index(render_index(index)) == index


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (b"", "truncated"),
        (b"<html>not found</html>", "malformed"),
        (b"[]", "object"),
        (b'{"serial": 1}', "format"),
        (b'{"format": 2, "anything": 1}', "its format is 2, and this localaid knows 1: upgrade localaid"),
        (b'{"format": 1, "x": ' + b"[" * 100_000, "nested too deeply"),
        (index_of("a.yaml", more=1), "unknown field `more`"),
        (index_of("a.yaml", serial=0), "its serial is 0"),
        (index_of("a.yaml", serial=2**53), "its serial is"),
        (index_of("a.yaml", serial="1"), "Expected `int`"),
        (index_of("a.yaml", made_at="yesterday"), "Invalid RFC3339"),
        (index_of("a.yaml", made_at="2026-01-05T12:00:00"), "its made_at has no time zone"),
        (index_of(files=[{"path": "a.yaml", "size": 0, "sha256": SHA.upper()}]), "no 64 hex digits"),
        (index_of(files=[{"path": "a.yaml", "size": -1, "sha256": SHA}]), "has -1 bytes"),
        (index_of(files=[{"path": "a.yaml", "size": DOCUMENT_LIMIT_BYTES + 1, "sha256": SHA}]), "are the limit"),
        (index_of(*(f"{number}.yaml" for number in range(CHANNEL_FILES + 1))), "it has 2001 files, 2000 are the limit"),
        (
            index_of(
                files=[
                    {"path": f"{number}.yaml", "size": DOCUMENT_LIMIT_BYTES, "sha256": SHA}
                    for number in range(CHANNEL_LIMIT_BYTES // DOCUMENT_LIMIT_BYTES + 1)
                ]
            ),
            "its files have",
        ),
    ],
)
def test_an_index_that_is_none(document: bytes, problem: str) -> None:
    """It is refused with what is wrong."""
    with pytest.raises(ValueError, match=problem):
        parse_index(document)


@pytest.mark.parametrize(
    "paths",
    [
        ("../a.yaml",),
        ("a/../b.yaml",),
        ("/etc/a.yaml",),
        ("a//b.yaml",),
        ("./a.yaml",),
        (".a.yaml",),
        (".a/b.yaml",),
        ("a.yaml/",),
        ("a\\b.yaml",),
        ("a\0.yaml",),
        ("a\n.yaml",),
        ("C:a.yaml",),
        ("ä.yaml",),
        ("a b.yaml",),
        ("-a.yaml",),
        ("",),
        ("a",),
        ("a.py",),
        ("index.json",),
        ("a.yaml.minisig",),
        ("a.part/b.yaml",),
        ("a-partial/b.yaml",),
        ("a/b/c/d/e.yaml",),
        ("a" * 120 + ".yaml",),
        ("a.yaml", "A.yaml"),
        ("a.yaml", "a.yaml"),
        ("x/a.yaml", "X/b.yaml"),
        ("a.yaml", "a.yaml/b.yaml"),
        ("a.yaml/b.yaml", "A.yaml"),
    ],
)
def test_names_that_an_index_may_not_have(paths: tuple[str, ...]) -> None:
    """They lead out of the folder, are hidden, of no known kind, or collide."""
    assert not is_accepted(*paths)


def test_names_that_an_index_may_have() -> None:
    """Configs, and templates, in folders too."""
    assert is_accepted("a.yaml", "b.yml", "x/a.yaml", "x/b.jinja", "x/y/z/Qwen3.5+more_1-2.yaml", "c.tmpl", "d.j2")


@given(st.lists(PATHS, max_size=4))
def test_what_is_accepted_stays_in_its_folder(paths: list[str]) -> None:
    """And is seen there, each under a name of its own whatever letters' case means."""
    if is_accepted(*paths):
        for path in paths:
            parts = PurePosixPath("/state/set", path).parts
            assert os.path.normpath(f"/state/set/{path}") == f"/state/set/{path}"
            assert parts[:3] == ("/", "state", "set")
            assert not any(map(is_temporary, parts[3:]))
        assert len({path.lower() for path in paths}) == len(paths)


# -- the files --

CONFIG = b"name: x\nshas: ['*']\ntemplate: {chat: x.jinja}\n"


def test_a_set_is_read_with_its_templates() -> None:
    """Each beside its config."""
    files = {"a/x.yaml": CONFIG, "a/x.jinja": b"{{ messages }}", "b.yml": b"name: y\nshas: ['*']\n"}
    configs = parse_set(files, "/layer/01-x")
    assert set(configs) == {"/layer/01-x/a/x.yaml", "/layer/01-x/b.yml"}
    (rule,) = configs["/layer/01-x/a/x.yaml"].rules
    assert (rule.layer, rule.file, rule.prompts.chat_template) == ("fetched", "/layer/01-x/a/x.yaml", "{{ messages }}")


def test_a_set_is_read_as_a_whole_or_not_at_all() -> None:
    """Every problem of every file is told."""
    files = {
        "a.yaml": b"name: x\ntop_q: 1\n",
        "b.yaml": CONFIG,
        "c.yaml": b"name: z\nshas: ['*']\n",
        "d.jinja": b"unused",
        "e.jinja": b"\xff",
        "sub/x.jinja": b"in another folder than its config",
    }
    with pytest.raises(ConfigErrors) as caught:
        parse_set(files, "/f")
    assert [str(problem) for problem in caught.value.problems] == [
        "/f/e.jinja: is not UTF-8 text (byte 0)",
        "/f/a.yaml: top_q: unknown key, line 2 (did you mean top_p?)",
        "/f/b.yaml: template.chat: there is no readable x.jinja beside this config, line 3 (did you mean d.jinja?)",
        "/f/d.jinja: is named by no config beside it",
        "/f/sub/x.jinja: is named by no config beside it",
    ]


def test_a_set_extends_only_itself() -> None:
    """So it means the same everywhere."""
    with pytest.raises(ConfigErrors, match="no other config of this layer or a lower one is named base"):
        parse_set({"a.yaml": b"name: x\nshas: ['*']\nextends: base\n"}, "/f")
    assert parse_set({"a.yaml": b"name: x\nshas: ['*']\nextends: base\n", "b.yaml": b"name: base\ntop_p: 1\n"}, "/f")


# -- minisign --

# Published with minisign's verifiers: signatures of b"test", plain and hashed, and the key of minisign's author.
AUTHOR = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
PLAIN = b"""untrusted comment: signature from minisign secret key
RWQf6LRCGA9i59SLOFxz6NxvASXDJeRtuZykwQepbDEGt87ig1BNpWaVWuNrm73YiIiJbq71Wi+dP9eKL8OC351vwIasSSbXxwA=
trusted comment: timestamp:1555779966\tfile:test
QtKMXWyYcwdpZAlPF7tE2ENJkRd1ujvKjlj1m9RtHTBnZPa5WKU5uWRs5GoP5M/VqE81QFuMKI5k/SfNQUaOAA==
"""
HASHED = b"""untrusted comment: signature from minisign secret key
RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=
trusted comment: timestamp:1556193335\tfile:test
y/rUw2y8/hOUYjZU71eHp/Wo1KZ40fGy2VJEDl34XMJM+TX48Ss/17u3IvIfbVR1FkZZSNCisQbuQY+bHwhEBg==
"""
SEED = bytes(range(32))
KEY = SecretKey(public=public_of(b"12345678", SEED), seed=SEED)


@pytest.mark.parametrize("document", [PLAIN, HASHED, PLAIN.replace(b"\n", b"\r\n"), HASHED.rstrip()])
def test_minisigns_own_signatures_hold(document: bytes) -> None:
    """Both kinds, as published."""
    verify_signature(b"test", parse_signature(document), read_public_key(AUTHOR))


@pytest.mark.parametrize("document", [PLAIN, HASHED])
@pytest.mark.parametrize(
    ("old", "new"),
    [(b"file:test", b"file:tesT"), (b"6LRCGA9i59", b"6LRCGA9i58"), (b"QtKM", b"QtKN"), (b"y/rU", b"y/rV")],
)
def test_a_changed_signature_does_not_hold(document: bytes, old: bytes, new: bytes) -> None:
    """Nor one with another trusted comment."""
    if old in document:
        with pytest.raises(ValueError, match="does not hold"):
            verify_signature(b"test", parse_signature(document.replace(old, new)), read_public_key(AUTHOR))
    with pytest.raises(ValueError, match="does not hold"):
        verify_signature(b"Test", parse_signature(document), read_public_key(AUTHOR))


def test_a_signature_of_another_key() -> None:
    """Both keys are named."""
    with pytest.raises(ValueError, match="signed with key E7620F1842B4E81F, not 3837363534333231"):
        verify_signature(b"test", parse_signature(PLAIN), KEY.public)
    other = KEY.public._replace(key_id=read_public_key(AUTHOR).key_id)
    with pytest.raises(ValueError, match="does not hold for key E7620F1842B4E81F"):
        verify_signature(b"test", parse_signature(PLAIN), other)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\xff",
        b"x\n" * 4,
        PLAIN + b"more\n",
        b"\n".join(PLAIN.splitlines()[:3]),
        PLAIN.replace(b"RWQf", b"AAQf"),
        PLAIN.replace(b"RWQf", b"RWQ\xc3\xa4"),
        PLAIN.replace(b"RWQf6LRC", b""),
        PLAIN.replace(b"AA==", b""),
        PLAIN.replace(b"untrusted", b"trusted"),
    ],
)
def test_what_is_no_signature(document: bytes) -> None:
    """It is refused before anybody computes."""
    with pytest.raises(ValueError, match="the signature"):
        parse_signature(document)


@given(st.binary(max_size=400))
def test_no_bytes_break_the_readers(document: bytes) -> None:
    """What they cannot read is a ValueError."""
    for read in (parse_signature, parse_secret_key, parse_index):
        with pytest.raises(ValueError, match=r"."):
            read(document)


@given(st.binary(max_size=200), st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=60))
def test_what_is_signed_here_holds(document: bytes, comment: str) -> None:
    """Also after a trip through its file."""
    signature = sign(document, KEY, comment)
    again = parse_signature(render_signature(signature))
    assert again == signature
    verify_signature(document, again, KEY.public)


def test_a_public_key_is_read_as_it_was_written() -> None:
    """As its line and in its file."""
    assert read_public_key(AUTHOR).render() == AUTHOR
    assert read_public_key(AUTHOR).shown_id == "E7620F1842B4E81F"
    assert render_public_key(read_public_key(AUTHOR)).decode().splitlines() == [
        "untrusted comment: minisign public key E7620F1842B4E81F",
        AUTHOR,
    ]


@pytest.mark.parametrize("password", ["", "a secret"])
def test_a_secret_key_is_read_as_it_was_written(password: str) -> None:
    """Encrypted or not."""
    sealed = parse_secret_key(render_secret_key(KEY, password, b"s" * 32))
    assert sealed.is_encrypted == bool(password)
    assert open_secret_key(sealed, password) == KEY
    assert (SEED in sealed.sealed) == (not password)


def test_a_secret_key_that_cannot_be_opened() -> None:
    """Its password is wrong, it is damaged, it is none, or opening it would take too much."""
    sealed = parse_secret_key(render_secret_key(KEY, "a secret", b"s" * 32))
    with pytest.raises(ValueError, match="the password is wrong"):
        open_secret_key(sealed, "another")
    plain = parse_secret_key(render_secret_key(KEY, "", b"s" * 32))
    with pytest.raises(ValueError, match="damaged"):
        open_secret_key(plain._replace(sealed=b"x" + plain.sealed[1:]))
    with pytest.raises(ValueError, match="algorithms"):
        parse_secret_key(render_secret_key(KEY, "", b"s" * 32).replace(b"RWQ", b"RUQ"))
    with pytest.raises(ValueError, match="no minisign secret key"):
        parse_secret_key(render_public_key(KEY.public))
    with pytest.raises(ValueError, match="more memory or time"):
        open_secret_key(sealed._replace(opslimit=2**40, memlimit=2**40), "a secret")


@pytest.mark.parametrize(
    ("opslimit", "memlimit", "cost"),
    [
        (33554432, 1073741824, (2**20, 1)),  # libsodium's SENSITIVE, which minisign uses
        (524288, 16777216, (2**14, 1)),  # its INTERACTIVE
        (1048576, 33554432, (2**15, 1)),
        (0, 2**30, (2**10, 1)),
    ],
)
def test_the_cost_of_a_password(opslimit: int, memlimit: int, cost: tuple[int, int]) -> None:
    """N and p are those that libsodium takes for its two limits."""
    assert scrypt_cost(opslimit, memlimit) == cost


def test_a_secret_key_shows_nothing() -> None:
    """Neither as text nor in a traceback's locals."""
    assert repr(KEY) == "SecretKey(3837363534333231)"


def test_types() -> None:
    """What is read has the lengths that the format says."""
    assert isinstance(KEY.public, PublicKey)
    signature = parse_signature(PLAIN)
    assert isinstance(signature, Signature)
    assert (len(signature.key_id), len(signature.signature), len(signature.global_signature)) == (8, 64, 64)
    assert signature.comment == b"timestamp:1555779966\tfile:test"
