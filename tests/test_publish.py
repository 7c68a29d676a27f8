"""PUBLISH: a folder of configs becomes a channel, and nothing is published that a client would refuse."""

from __future__ import annotations

import contextlib
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from channel_server import MADE_AT, ONE, config, key_of, run
from conftest import PROGRAM
from localaid import (
    INDEX_FILE,
    SIGNATURE_FILE,
    CannotPublish,
    ConfigErrors,
    KeyFileUnusable,
    load_secret_key,
    make_key_pair,
    parse_secret_key,
    publish,
)

KEY = key_of()


def test_a_new_key_is_its_owners_alone_and_replaces_none(tmp_path: Path) -> None:
    """The pair is minisign's."""
    public = make_key_pair(tmp_path / "k", "")
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert (tmp_path / "k.pub").read_text().splitlines()[1] == public.render()
    before = (tmp_path / "k").read_bytes()
    for gone in ("none", "k.pub"):
        (tmp_path / gone).unlink(missing_ok=True)
        with pytest.raises(KeyFileUnusable, match="is there already; it is not overwritten"):
            make_key_pair(tmp_path / "k", "")
    (tmp_path / "j.pub").touch()
    with pytest.raises(KeyFileUnusable, match=r"j\.pub: is there already"):
        make_key_pair(tmp_path / "j", "")
    assert not (tmp_path / "j").exists()
    assert (tmp_path / "k").read_bytes() == before
    assert load_secret_key(tmp_path / "k", lambda: "unasked").public == public


def test_a_secret_key_that_cannot_be_used(tmp_path: Path) -> None:
    """It is said why."""
    make_key_pair(tmp_path / "k", "a secret")
    with pytest.raises(KeyFileUnusable, match="the password is wrong"):
        load_secret_key(tmp_path / "k", lambda: "another")
    assert load_secret_key(tmp_path / "k", lambda: "a secret")
    with pytest.raises(KeyFileUnusable, match="No such file"):
        load_secret_key(tmp_path / "none", str)
    with pytest.raises(KeyFileUnusable, match="no minisign secret key"):
        load_secret_key(tmp_path / "k.pub", str)


def test_what_is_published_can_be_verified(tmp_path: Path) -> None:
    """Configs and the templates that they name, each publication with the next serial; other files are left alone."""
    for path, text in {**ONE, "README.md": "x", ".hidden.yaml": "{", "b/other.jinja": "unused"}.items():
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_text(text)
    index = publish(tmp_path / "in", KEY, out=tmp_path / "out", made_at=MADE_AT)
    assert {file.path for file in index.files} == set(ONE)
    assert {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()} == {
        *ONE,
        INDEX_FILE,
        SIGNATURE_FILE,
    }
    (tmp_path / "in" / "a.yaml").unlink()
    assert publish(tmp_path / "in", KEY, out=tmp_path / "out", made_at=MADE_AT).serial == 2
    assert not (tmp_path / "out" / "a.yaml").exists()
    assert publish(tmp_path / "in", KEY, out=tmp_path / "out", made_at=MADE_AT, serial=9).serial == 9
    assert publish(tmp_path / "in", KEY, made_at=MADE_AT).serial == 1
    assert (tmp_path / "in" / INDEX_FILE).exists()


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "there is no config in it"),
        ({"a b.yaml": config("x")}, "'a b.yaml' is no name that a channel's file may have"),
        ({"a.yaml": config("x"), "A.yaml": config("y")}, "collides"),
        ({"a.yaml": "#" * 2**20 + "\n"}, "has more than 1048576 bytes"),
        ({"a.yaml": config("x") + "template: {chat: x.txt}", "x.txt": "x"}, "neither a config nor a template"),
    ],
)
def test_what_is_not_published(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    """Nothing is written then."""
    for path, text in files.items():
        (tmp_path / path).write_text(text)
    with pytest.raises(CannotPublish) as caught:
        publish(tmp_path, KEY, made_at=MADE_AT)
    assert problem in str(caught.value)
    assert not (tmp_path / INDEX_FILE).exists()


def test_wrong_configs_are_not_published(tmp_path: Path) -> None:
    """Each problem of each of them is told; templates are looked at, too."""
    (tmp_path / "a.yaml").write_text("name: a\ntop_q: 1\n")
    (tmp_path / "b.yaml").write_text(config("b") + "template: {chat: b.jinja}\n")
    with pytest.raises(ConfigErrors) as caught:
        publish(tmp_path, KEY, made_at=MADE_AT)
    assert len(caught.value.problems) == 2
    (tmp_path / "a.yaml").unlink()
    (tmp_path / "b.jinja").write_text("{% for %}")
    with pytest.raises(ConfigErrors, match=r"b\.jinja"):
        publish(tmp_path, KEY, made_at=MADE_AT)


def test_serials_of_who_publishes_never_go_back(tmp_path: Path) -> None:
    """Nor are they guessed where the last one cannot be read."""
    (tmp_path / "a.yaml").write_text(config("a"))
    publish(tmp_path, KEY, made_at=MADE_AT, serial=5)
    with pytest.raises(CannotPublish, match="its serial is 5 already; --serial must be more"):
        publish(tmp_path, KEY, made_at=MADE_AT, serial=5)
    (tmp_path / INDEX_FILE).write_text("x")
    with pytest.raises(CannotPublish, match="cannot be read"):
        publish(tmp_path, KEY, made_at=MADE_AT)


@pytest.mark.parametrize(
    ("typed", "made"), [(("a secret", "a secret"), True), (("", ""), False), (("a secret", "another"), None)]
)
def test_a_password_is_asked_for_at_a_terminal(tmp_path: Path, typed: tuple[str, str], made: bool | None) -> None:
    """Twice for a new key, and not shown; an empty one leaves the key as it is."""
    terminal, inside = pty.openpty()
    command = [sys.executable, str(PROGRAM), "publish", "--new-key", str(tmp_path / "k")]
    process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True)
    os.close(inside)
    shown = b""
    for word in typed:
        while not shown.endswith(b": "):
            shown += os.read(terminal, 1000)
        os.write(terminal, word.encode() + b"\n")
        shown += b"\n"
    with contextlib.suppress(OSError):  # its end
        while more := os.read(terminal, 1000):
            shown += more
    code = process.wait()
    os.close(terminal)
    assert b"a secret" not in shown
    if made is None:
        assert (code, b"the two passwords differ" in shown) == (1, True)
        assert not (tmp_path / "k").exists()
    else:
        assert code == 0
        assert parse_secret_key((tmp_path / "k").read_bytes()).is_encrypted == made


def test_publishing_on_the_command_line(tmp_path: Path) -> None:
    """A key with a password, a channel, and what is wrong."""
    password = {"LOCALAID_KEY_PASSWORD": "a secret"}
    made = run("publish", "--new-key", tmp_path / "k", env=password)
    assert made.returncode == 0
    key = made.stdout.split()[-1]
    assert run("publish", "--new-key", tmp_path / "k").returncode == 1
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.yaml").write_text(config("a"))
    done = run("publish", "--key", tmp_path / "k", "--out", tmp_path / "out", tmp_path / "in", env=password)
    assert done.stdout == f"{tmp_path}/out/index.json: serial 1, 1 files, key {key}\n"
    asked = run("publish", "--key", tmp_path / "k", tmp_path / "in")
    assert (asked.returncode, asked.stderr) == (
        1,
        f"localaid: {tmp_path}/k: is encrypted; give its password as $LOCALAID_KEY_PASSWORD.\n",
    )
    assert run("publish", "--key", tmp_path / "k").returncode == 2
    assert run("publish", tmp_path / "in").returncode == 2
    (tmp_path / "in" / "a.yaml").write_text("name: a\ntop_q: 1\n")
    wrong = run("publish", "--key", tmp_path / "k", tmp_path / "in", env=password)
    assert (wrong.returncode, f"{tmp_path}/in/a.yaml: top_q: unknown key" in wrong.stderr) == (1, True)
