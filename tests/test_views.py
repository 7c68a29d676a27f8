"""Section 17a VIEWS: what the daemon tells, as tables; and the control socket, over which it is asked."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pty
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import localaid
from conftest import PROGRAM, Daemon, StartDaemon
from localaid import Settings, View, choose_control_socket, find_daemons, printable, render_view
from test_cli import run
from test_daemon import post
from test_daemon import until_names as until_name
from test_index import HubCache, OllamaStore

# -- tables --


def test_a_table_as_plain_text() -> None:
    """Aligned, whole, without anything at a line's end."""
    view = View("Title", ("A", "B"), [("x", "long\ntwo"), ("yyy", "")])
    assert render_view(view) == "Title\nA    B\nx    long\n     two\nyyy"
    assert render_view(View("", (), [("a", "b")])) == "a  b"


@given(st.text())
def test_no_text_of_strangers_steers_the_terminal(text: str) -> None:
    """What is not printable is shown as an escape, in ASCII; the rest stays."""
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (300 * 1024**2, "300 MiB"), (5 * 1024**5, "5120 TiB")],
)
def test_sizes(size_bytes: int, shown: str) -> None:
    """In the unit that makes the number short."""
    assert localaid.about_size(size_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59.9, "60 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90061, "1 d 1 h")]
)
def test_durations(seconds: float, shown: str) -> None:
    """In the two units that count."""
    assert localaid.about_time(seconds) == shown


class Channel(msgspec.Struct):
    """A struct of another section, as the daemon's answer may have it."""

    name: str
    fetched_at: float | None
    wait_s: float
    files: tuple[str, ...] = ()


def test_a_table_of_structs() -> None:
    """A field a column, by what its name says of it."""
    view = localaid._plan_struct_view("Updates", [Channel("a\x1b", None, 61), Channel("b", 0, 0.2, ("x", "y"))])
    assert view.columns == ("NAME", "FETCHED AT", "WAIT", "FILES")
    assert view.rows[0] == (r"a\x1b", "-", "1 min 1 s", "-")
    assert (view.rows[1][0], view.rows[1][3]) == ("b", "x\ny")
    assert localaid._plan_struct_view("Updates", ()).rows == []


# -- the commands --


@pytest.fixture
def near(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that every user may enter; a socket's path has 107 bytes at most."""
    folder = Path(tempfile.mkdtemp(prefix="la"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
    assert tmp_path.exists()


def on_terminal(*arguments: object, columns: int, home: Path) -> str:
    """Return what a command prints on a terminal."""
    ours, theirs = pty.openpty()
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "COLUMNS": str(columns), "TERM": "xterm"}
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=theirs, env=env)
    os.close(theirs)
    told = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the terminal's other side is closed
            break
        if not piece:
            break
        told += piece
    os.close(ours)
    assert process.wait() == 0
    return told.decode().replace("\r\n", "\n")


def columns_of(told: str, title: str = "") -> list[list[str]]:
    """Return the rows of a plain table, cell by cell; cells have no two spaces in them."""
    tables = told.rstrip("\n").split("\n\n")
    table = next(table for table in tables if table.startswith(title))
    return [line.split("  ") for line in map(str.strip, table.split("\n")[bool(title) + 1 :])]


def until_names(served: Daemon, *names: str) -> None:
    """Ask until all are listed."""
    for name in names:
        until_name(served, name)


CONFIGS = {
    "mine.yaml": """
name: mine
shas: ["sha256:%s"]
model_names: [gpt-4o]
---
name: away
shas: ["sha256:%s"]
urls: [https://example.org/away.gguf]
---
- model: other
  file: copy.gguf
  checksum: ["sha256:%s"]
"""
}


def start_with_copies(daemon: StartDaemon, tiny_llama: Path, tiny_reranker: Path) -> tuple[Daemon, str]:
    """Start a daemon on a model under two paths, one that is not what a rule says, and a rule without its file."""
    digest = localaid.hash_file(str(tiny_llama))["sha256"]
    configs = {name: text % (digest, "7" * 64, "8" * 64) for name, text in CONFIGS.items()}
    served = daemon({"a.gguf": tiny_llama, "copy.gguf": tiny_reranker}, configs)
    (served.models / "sub").mkdir()
    (served.models / "sub" / "b.gguf").symlink_to(tiny_llama)
    (served.models / "torn.gguf").write_bytes(b"GGUF")
    until_names(served, "b", "a", "copy", "gpt-4o")
    return served, digest


def test_list_shows_names_files_and_what_is_missing(
    daemon: StartDaemon, tiny_llama: Path, tiny_reranker: Path, tmp_path: Path
) -> None:
    """The same from the daemon and from its folders; each content once, with all its paths."""
    served, digest = start_with_copies(daemon, tiny_llama, tiny_reranker)
    listen = served.base_url.removeprefix("http://")
    folders = ["--models", served.models, "--configs", served.configs, "--state", served.state]
    online = run("list", "--json", "--listen", listen, home=tmp_path)
    catalog = json.loads(online.stdout)
    assert json.loads(run("list", "--json", *folders, home=tmp_path).stdout) == catalog
    states = {name["name"]: (name["layer"], name["state"], name["sha256"]) for name in catalog["names"]}
    assert states["gpt-4o"] == ("user", "ready", digest)
    files = {file["relative"]: file for file in catalog["files"]}
    assert sorted(files) == ["a.gguf", "copy.gguf", "torn.gguf"]
    assert files["a.gguf"]["paths"] == [str(served.models / "a.gguf"), str(served.models / "sub" / "b.gguf")]
    assert files["a.gguf"]["integrity"] == {"state": "known", "layer": "user", "problem": None}
    assert files["copy.gguf"]["integrity"]["state"] == "mismatch"
    assert files["torn.gguf"]["state"] == "unservable"
    assert [one["rule"] for one in catalog["missing"]] == ["away", "other"]
    assert all(one["urls"] or "put the file" in one["fix"] for one in catalog["missing"])
    everything = json.loads(run("list", "--all", "--json", "--listen", listen, home=tmp_path).stdout)
    assert len(everything["missing"]) > len(catalog["missing"])  # of the default configs
    told = run("list", "--listen", listen, home=tmp_path).stdout
    assert told.split("\n")[0].split() == ["NAME", "PATHS", "RULE", "FILE", "SHA", "SIZE", "TYPE", "STATE"]
    row = next(row for row in columns_of(told) if row[0] == "gpt-4o")
    assert "mine (user: mine.yaml)" in row
    assert row[-1] == "ready, known (user)"
    assert "\x1b" not in told
    for part in (str(served.models / "sub" / "b.gguf"), f"sha256:{'8' * 64}", "https://example.org/away.gguf"):
        assert part in told
    cards = model_cards(served)
    assert (cards["copy"].integrity, "8" * 64 in str(cards["copy"].problem)) == ("mismatch", True)
    assert (cards["gpt-4o"].integrity, cards["gpt-4o"].known_by) == ("known", "user")


def model_cards(served: Daemon) -> dict[str, localaid.ModelExtension]:
    """Return what /v1/models says of each name beyond OpenAI's fields."""

    async def ask() -> bytes:
        async with aiohttp.ClientSession(served.base_url) as http, http.get("/v1/models") as answer:
            return await answer.read()

    cards = msgspec.json.decode(asyncio.run(ask()), type=localaid.ModelList).data
    return {card.id: card.localaid for card in cards}


def test_tables_fit_the_terminal(daemon: StartDaemon, tiny_llama: Path, tmp_path: Path) -> None:
    """Folded to its width, with colours where it has them; nothing is cut."""
    served = daemon({"a-model-with-a-long-name.gguf": tiny_llama})
    until_names(served, "a-model-with-a-long-name")
    listen = served.base_url.removeprefix("http://")
    for command in ("list", "status"):
        told = on_terminal(command, "--listen", listen, columns=60, home=tmp_path)
        assert "\x1b[" in told
        plain = re.sub(r"\x1b\[[\d;]*m", "", told)
        assert max(map(len, plain.split("\n"))) <= 60
        assert ("…" in plain, "\x1b" in plain) == (False, False)


def test_status_shows_workers_and_problems_with_their_files(
    daemon: StartDaemon, tiny_llama: Path, tiny_reranker: Path, tmp_path: Path
) -> None:
    """As tables; --json has what /localaid/status has."""
    served, _ = start_with_copies(daemon, tiny_llama, tiny_reranker)
    served.write_config("broken.yaml", "name: [")
    served.process.wait_for_line("broken.yaml")
    listen = served.base_url.removeprefix("http://")
    assert post(served, "gpt-4o", max_tokens=5)[0] == HTTPStatus.OK
    told = run("status", "--listen", listen, home=tmp_path).stdout
    assert f"localaid {localaid.__version__}: " in told.split("\n")[0]
    assert "1 known, 1 mismatch" in told
    (worker,) = columns_of(told, "Workers")[0:1]
    assert worker[1:3] == ["a.gguf", "loaded"]
    problems = {row[0]: row[-1] for row in columns_of(told, "Problems")}
    assert "broken.yaml" in " ".join(problems)
    assert "8" * 64 in problems[str(served.models / "copy.gguf")]
    assert "cut short" in problems[str(served.models / "torn.gguf")]
    raw = run("status", "--json", "--listen", listen, home=tmp_path).stdout
    status = msgspec.json.decode(raw, type=localaid.DaemonStatus)
    assert status.integrity == {"known": 1, "mismatch": 1}
    assert status.memory.workers[0].deltas > 0


def test_a_confined_key_sees_its_own_part_of_the_list(daemon: StartDaemon, tiny_llama: Path, tmp_path: Path) -> None:
    """Not on the control socket, where there are no keys; without a key there is nothing."""
    keys = [{"name": "ann", "key": "sk-ann-0123456789", "names": ["a*"]}]
    control = Path(tempfile.mkdtemp(prefix="la"), "c.sock")
    settings = {"api_keys": keys, "control_socket": str(control)}
    configs = {"x.yaml": f"name: x\nshas: ['{'7' * 64}']\n"}
    served = daemon({"a.gguf": tiny_llama, "b.gguf": tiny_llama}, configs, settings=settings)
    listen = served.base_url.removeprefix("http://")
    mine = ["--json", "--all", "--listen", listen, "--api-key", "sk-ann-0123456789"]
    until = run("list", "--json", "--listen", f"unix:{control}", home=tmp_path)
    assert {"a", "b"} <= {one["name"] for one in json.loads(until.stdout)["names"]}
    seen = json.loads(run("list", *mine, home=tmp_path).stdout)
    assert {one["name"] for one in seen["names"]} == {"a"}
    assert (len(seen["files"]), seen["missing"]) == (1, [])
    refused = run("list", "--listen", listen, home=tmp_path)
    assert (refused.returncode, "LOCALAID_API_KEY" in refused.stderr) == (1, True)
    refused = run("status", "--listen", listen, "--api-key", "sk-ann-0123456789", home=tmp_path)
    assert (refused.returncode, "not confined" in refused.stderr) == (1, True)
    shutil.rmtree(control.parent)


def test_neither_the_daemon_nor_the_program_imports_rich() -> None:
    """It is large; only a terminal needs it."""
    script = "import sys, localaid; print(sorted(name for name in sys.modules if name.split('.')[0] == 'rich'))"
    env = {**os.environ, "PYTHONPATH": str(PROGRAM.parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "[]\n"
    source = PROGRAM.read_text()
    assert source.count("import rich") == source[source.index("# == 17a. VIEWS") :].count("import rich") > 0


# -- the control socket --


def arguments(**given_: object) -> argparse.Namespace:
    """Return the arguments of a command that asks the daemon."""
    return argparse.Namespace(**{"listen": [], "settings": None, "api_key": None, **given_})


def test_where_the_control_socket_is() -> None:
    """The setting, systemd's folder, XDG's, nowhere."""
    both = {"RUNTIME_DIRECTORY": "/run/localaid:/run/more", "XDG_RUNTIME_DIR": "/run/user/1"}
    assert choose_control_socket(Settings(), both) == Path("/run/localaid/control.sock")
    assert choose_control_socket(Settings(), {"XDG_RUNTIME_DIR": "/u"}) == Path("/u/localaid/control.sock")
    assert choose_control_socket(Settings(), {}) is None
    assert choose_control_socket(Settings(control_socket="/x"), both) == Path("/x")
    assert choose_control_socket(Settings(control_socket=""), both) is None


@pytest.mark.parametrize(("text", "path"), [("off", ""), ("''", ""), ("unix:/a/b", "/a/b"), ("/a", "/a"), ("", None)])
def test_the_setting(text: str, path: str | None) -> None:
    """A path, or off."""
    assert localaid.parse_settings(f"control_socket: {text}".encode(), file="x").control_socket == path


@pytest.mark.parametrize("text", ["a/b", "/" + "a" * 108])
def test_what_the_setting_cannot_be(text: str) -> None:
    """A relative path, or one too long for a socket."""
    with pytest.raises(localaid.ConfigErrors, match="control_socket"):
        localaid.parse_settings(f"control_socket: {text}".encode(), file="x")


def test_where_commands_ask(tmp_path: Path) -> None:
    """Control sockets first; --listen is that and nothing else; with --settings the service's own is not tried."""
    environ = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": "/u"}
    own, service = "unix:/u/localaid/control.sock", "unix:/run/localaid/control.sock"
    assert find_daemons(arguments(), environ) == ([own, service], ("127.0.0.1:8080",))
    assert find_daemons(arguments(listen=["[::1]:1"]), environ) == ([], ("[::1]:1",))
    settings = tmp_path / "s.yaml"
    settings.write_text("listen: 127.0.0.1:9\ncontrol_socket: off\n")
    assert find_daemons(arguments(settings=str(settings)), environ) == ([], ("127.0.0.1:9",))


def test_commands_ask_at_the_control_socket_without_a_key(
    daemon: StartDaemon, tiny_llama: Path, near: Path, tmp_path: Path
) -> None:
    """The user's own is found by itself; its folder and file are for the user, and the group, only."""
    served = daemon([tiny_llama], settings={"api_keys": ["ann:sk-ann-0123456789"]}, env={"XDG_RUNTIME_DIR": str(near)})
    file = near / "localaid" / "control.sock"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent)] == [0o660, 0o700]
    env = {"XDG_RUNTIME_DIR": str(near)}
    status = run("status", "--json", home=tmp_path, env=env)
    assert json.loads(status.stdout)["control"] == [str(file)]
    assert run("list", home=tmp_path, env=env).returncode == 0
    assert run("explain", "v1/chat", tiny_llama.stem, home=tmp_path, env=env).returncode == 0
    other = daemon([tiny_llama], env={"XDG_RUNTIME_DIR": str(near)})  # it goes on without one
    assert f"cannot listen on unix:{file}: Address already in use" in other.log
    assert json.loads(run("status", "--json", home=tmp_path, env=env).stdout)["listen"] == [served.base_url]
    other.process.stop()
    assert file.exists()
    served.process.stop()
    assert not file.exists()


def test_a_dead_daemons_socket_is_replaced_a_living_ones_is_not(
    daemon: StartDaemon, near: Path, tmp_path: Path
) -> None:
    """Nor is a file that is no socket; where the setting names it, that is an error."""
    control = near / "c.sock"
    first = daemon(settings={"control_socket": str(control)})
    refused = run("serve", "--settings", first.settings, "--listen", "127.0.0.1:0", home=tmp_path)
    assert (refused.returncode, f"cannot listen on unix:{control}" in refused.stderr) == (1, True)
    first.process.kill()
    assert control.is_socket()
    again = daemon(settings={"control_socket": str(control)}, folder=first.folder)
    assert json.loads(run("status", "--json", "--settings", again.settings, home=tmp_path).stdout)["models"] == 0
    again.process.stop()
    control.write_text("mine")
    refused = run("serve", "--settings", first.settings, "--listen", "127.0.0.1:0", home=tmp_path)
    assert (refused.returncode, control.read_text()) == (1, "mine")


def test_a_socket_that_another_has_made_since_is_left(daemon: StartDaemon, near: Path) -> None:
    """What a daemon removes at its end is its own."""
    control = near / "c.sock"
    served = daemon(settings={"control_socket": str(control)})
    control.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(control))
        served.process.stop()
        assert control.is_socket()


def test_a_unix_address_for_clients_is_not_stolen_either(daemon: StartDaemon, near: Path, tmp_path: Path) -> None:
    """Its file too is replaced only where nobody listens."""
    first = daemon(listen=f"unix:{near}/http")
    refused = run("serve", "--settings", first.settings, "--listen", f"unix:{near}/http", home=tmp_path)
    assert (refused.returncode, "Address already in use" in refused.stderr) == (1, True)
    first.process.signal(signal.SIGKILL)
    first.process.process.wait()
    daemon(listen=f"unix:{near}/http", folder=first.folder)


def as_nobody(call: Callable[[], object]) -> str:
    """Return the error of a call in a process of another user's."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            call()
        except localaid.LocalaidError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as told:  # noqa: PTH123 - of a pipe
        text = told.read().decode()
    os.waitpid(child, 0)
    return text


def test_who_may_not_ask_is_told_which_group_to_join(daemon: StartDaemon, near: Path, tmp_path: Path) -> None:
    """Also where the address for clients wants a key; whoever finds no daemon is told all that was tried."""
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")
    control, settings = near / "c.sock", near / "localaid.yaml"
    keys = ["ann:sk-ann-0123456789"]
    served = daemon(settings={"control_socket": str(control), "api_keys": keys})
    listen = served.base_url.removeprefix("http://")

    def ask() -> bytes:
        where = arguments(settings=str(settings))
        return asyncio.run(localaid.ask_daemon(where, "/localaid/status", localaid.DaemonStatus)).raw

    for address, parts in (
        ("127.0.0.1:1", ("no daemon answers", f"unix:{control} (Permission denied), nor on 127.0.0.1:1 (", "start it")),
        (listen, ("wants an API key", "--api-key, or join the group that needs none")),
    ):
        settings.write_text(f"control_socket: {control}\nlisten: {address}\n")
        settings.chmod(0o644)
        assert json.loads(ask())["models"] == 0  # as root
        told = as_nobody(ask)
        for part in (*parts, "usermod -aG root nobody"):
            assert part in told
    nowhere = run("status", home=tmp_path)
    tried = "no daemon answers on unix:/run/localaid/control.sock (No such file or directory), nor on 127.0.0.1:8080"
    assert tried in nowhere.stderr


# -- stores of other programs, served --


def test_stores_of_other_programs_are_served(daemon: StartDaemon, tiny_llama: Path, tmp_path: Path) -> None:
    """By one daemon on a Hugging Face cache and Ollama's folder: a content counts once, and nothing else is listed."""
    served = daemon()
    content = tiny_llama.read_bytes()
    link = HubCache(served.models / "hub").add("tiny.Q4_0.gguf", content)
    store = OllamaStore(served.models / "ollama")
    manifest = store.add("registry.ollama.ai/library/tiny/latest", content)
    until_names(served, "tiny", "tiny:latest", "tiny.Q4_0")
    listen = served.base_url.removeprefix("http://")
    (file,) = json.loads(run("list", "--json", "--listen", listen, home=tmp_path).stdout)["files"]
    assert len(file["paths"]) == 3
    assert file["paths"][0] == str(link) or "ollama" in file["paths"][0]
    assert json.loads(run("status", "--json", "--listen", listen, home=tmp_path).stdout)["unservable"] == {}
    manifest.unlink()
    shutil.rmtree(served.models / "hub")
    until_name(served, "tiny", there=False)
