"""DAEMON: folders, live configs, reload, systemd's notifications, an ordered stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

import localaid
from conftest import PROGRAM, Daemon, StartDaemon
from localaid import ConfigErrors, Folders, Settings, check_folder, choose_folders, load_memory_bytes, load_settings
from models import place_model, write_tiny_llama, write_tiny_lora
from processes import LocalaidProcess, is_running

SMALL = "{ctx_size: 512, parallel: 2, threads: 1}"
SETTINGS = {"load": {"ctx_size": 512, "parallel": 2, "threads": 1}}


class Notified:
    """A NOTIFY_SOCKET: what the daemon tells systemd."""

    def __init__(self, path: Path) -> None:
        """Listen at `path`."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(60)
        self.heard: list[str] = []

    @classmethod
    @contextlib.contextmanager
    def at(cls, path: Path) -> Iterator[Notified]:
        """Listen at `path` for a while."""
        one = cls(path)
        try:
            yield one
        finally:
            one.socket.close()

    def until(self, text: str) -> str:
        """Wait for a line that has the text; return it."""
        while True:
            for line in self.heard:
                if text in line:
                    self.heard = self.heard[self.heard.index(line) + 1 :]
                    return line
            self.heard += self.socket.recv(65536).decode().splitlines()


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[Notified]:
    """Be systemd's ear."""
    with Notified.at(tmp_path / "notify") as one:
        yield one


def get(served: Daemon, path: str) -> object:
    """Return the JSON of a GET."""

    async def ask() -> object:
        connector, base = None, served.base_url
        if base.startswith("unix:"):
            connector, base = aiohttp.UnixConnector(base.removeprefix("unix:")), "http://localhost"
        async with aiohttp.ClientSession(connector=connector) as http, http.get(base + path) as answer:
            return json.loads(await answer.read())

    return asyncio.run(ask())


def names(served: Daemon) -> set[str]:
    """Return the names on /v1/models."""
    answer = msgspec.convert(get(served, "/v1/models"), localaid.ModelList)
    return {card.id for card in answer.data}


def until_names(served: Daemon, name: str, *, there: bool = True) -> None:
    """Ask until a name is listed, or is not any more: nothing tells a client."""
    deadline = time.monotonic() + 60
    while (name in names(served)) != there:
        assert time.monotonic() < deadline, (name, names(served), served.log)


def rendered(served: Daemon, name: str) -> str:
    """Return what a rule makes of a chat."""

    async def ask() -> str:
        body = {"model": name, "messages": [{"role": "user", "content": "x"}]}
        async with aiohttp.ClientSession(served.base_url) as http, http.post("/apply-template", json=body) as answer:
            return str(json.loads(await answer.read())["prompt"])

    return asyncio.run(ask())


def post(served: Daemon, name: str, prompt: str = "x", max_tokens: int = 2) -> tuple[int, dict[str, object]]:
    """Ask for a completion; return status and answer."""

    async def ask() -> tuple[int, dict[str, object]]:
        body = {"model": name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        async with aiohttp.ClientSession(served.base_url) as http, http.post("/v1/completions", json=body) as answer:
            return answer.status, json.loads(await answer.read())

    return asyncio.run(ask())


# -- folders and settings --


def arguments(**given: object) -> argparse.Namespace:
    """Return a parsed command line."""
    empty: dict[str, object] = {"models": [], "configs": None, "state": None, "settings": None, "listen": []}
    return argparse.Namespace(**{**empty, **given})


def test_folders_come_from_the_command_line_the_settings_systemd_or_xdg() -> None:
    """The first that says."""
    systemd = {"STATE_DIRECTORY": "/var/lib/localaid", "CONFIGURATION_DIRECTORY": "/etc/localaid:/etc/b"}
    systemd |= {"CACHE_DIRECTORY": "/var/cache/localaid", "HOME": "/home/u"}
    of_systemd = choose_folders(arguments(), Settings(), systemd)
    assert of_systemd.models == (Path("/var/lib/localaid/models"),)
    assert of_systemd.configs == Path("/etc/localaid/configs")
    assert of_systemd.state == Path("/var/cache/localaid")
    assert of_systemd.settings == Path("/etc/localaid/localaid.yaml")
    of_user = choose_folders(arguments(), Settings(), {"HOME": "/home/u", "XDG_DATA_HOME": "/data"})
    assert of_user.models == (Path("/data/localaid/models"),)
    assert of_user.configs == Path("/home/u/.config/localaid/configs")
    assert of_user.state == Path("/home/u/.local/state/localaid")
    of_settings = choose_folders(arguments(), Settings(models=("/a", "/b"), configs="/c"), systemd)
    assert (of_settings.models, of_settings.configs) == ((Path("/a"), Path("/b")), Path("/c"))
    given = choose_folders(arguments(models=["/m"], configs="/k", state="/s"), Settings(models=("/a",)), systemd)
    assert (given.models, given.configs, given.state) == ((Path("/m"),), Path("/k"), Path("/s"))


def test_settings_that_are_named_must_be_there_and_be_right(tmp_path: Path) -> None:
    """Without a name the defaults hold."""
    file = tmp_path / "localaid.yaml"
    assert load_settings(file, must_exist=False) == Settings()
    with pytest.raises(ConfigErrors, match="no such file"):
        load_settings(file, must_exist=True)
    file.write_text("queue_sise: 3\n")
    with pytest.raises(ConfigErrors, match="queue_size"):
        load_settings(file, must_exist=True)


def test_the_memory_that_is_there_is_no_more_than_the_machines() -> None:
    """MemAvailable, or less in a cgroup."""
    assert 0 < load_memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# -- what systemd hands over --


def test_sockets_and_watchdog_are_taken_out_of_the_environment(tmp_path: Path) -> None:
    """By name; of another process's nothing is taken, and the workers find nothing."""
    script = (
        "import json, os, socket, localaid\n"
        "os.environ['LISTEN_PID'] = os.environ['WATCHDOG_PID'] = str(os.getpid())\n"
        "passed = localaid.take_passed(os.environ, os.getpid())\n"
        "names = [[one.getsockname() for one in part] for part in (passed.http, passed.control)]\n"
        "left = [name for name in localaid.PASSED_VARIABLES if name in os.environ]\n"
        "print(json.dumps([names, passed.watchdog_s, left, [one.get_inheritable() for one in passed.http]]))\n"
    )
    sockets = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for number, one in enumerate(sockets):
        one.bind(str(tmp_path / f"{number}"))
        one.listen()
    environ = {"LISTEN_FDS": "3", "LISTEN_FDNAMES": "http:control:http", "WATCHDOG_USEC": "3000000"}
    environ |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "PYTHONPATH": str(PROGRAM.parent)}
    # The shell lays them out as systemd does: from 3 on.
    moved = " ".join(f"{10 + at}<&{one.fileno()}" for at, one in enumerate(sockets))
    laid = " ".join(f"{3 + at}<&{10 + at} {10 + at}<&-" for at in range(3))
    command = f'exec {moved}; exec {laid}; exec "$0" -c "$1"'
    ran = subprocess.run(
        ["bash", "-c", command, sys.executable, script],
        env={**os.environ, **environ},
        pass_fds=[one.fileno() for one in sockets],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    paths = [str(tmp_path / f"{number}") for number in range(3)]
    assert json.loads(ran.stdout) == [[[paths[0], paths[2]], [paths[1]]], 3.0, [], [False, False]]
    for one in sockets:
        one.close()


def test_what_was_meant_for_another_process_is_not_taken() -> None:
    """As sd_listen_fds(3) and sd_watchdog_enabled(3) say."""
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "WATCHDOG_PID": "1", "WATCHDOG_USEC": "3000000"}
    passed = localaid.take_passed(environ, os.getpid())
    assert (passed.http, passed.control, passed.watchdog_s, environ) == ((), (), None, {})


class Recorder:
    """Hears what systemd would."""

    def __init__(self) -> None:
        """Hear nothing yet."""
        self.heard: list[str] = []
        self.changed = asyncio.Event()

    def notify(self, text: str) -> None:
        """Keep it."""
        self.heard.append(text)
        self.changed.set()


async def test_a_start_is_extended_only_while_more_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that hangs is ended by TimeoutStartSec."""
    folders = choose_folders(arguments(state=str(tmp_path)), Settings(), {"HOME": str(tmp_path)})
    recorder = Recorder()
    found = iter([0, 3, 3, 3, 9])
    monkeypatch.setattr(localaid.ModelIndex, "folders", property(lambda _: next(found, 9)))
    daemon_ = localaid.Daemon(folders, Settings(), ("127.0.0.1:0",), localaid.Passed(recorder))
    extending = asyncio.create_task(daemon_._extend_start(every_s=0.0))
    async with asyncio.timeout(30):
        while len(recorder.heard) < 3:
            recorder.changed.clear()
            await recorder.changed.wait()
    extending.cancel()
    assert [text.partition("STATUS=")[2] for text in recorder.heard] == [
        "reading the folders, 0 so far",
        "reading the folders, 3 so far",
        "reading the folders, 9 so far",
    ]
    assert all(text.startswith("EXTEND_TIMEOUT_USEC=60000000\n") for text in recorder.heard)


async def test_systemd_is_told_in_utf8_and_in_one_line(tmp_path: Path) -> None:
    """Whatever a file is called."""
    with Notified.at(tmp_path / "notify") as notified:
        folders = choose_folders(arguments(state=str(tmp_path)), Settings(), {"HOME": str(tmp_path)})
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NOTIFY_SOCKET", environ["NOTIFY_SOCKET"])
            passed = localaid.take_passed(environ, os.getpid())
        daemon_ = localaid.Daemon(folders, Settings(), ("127.0.0.1:0",), passed)
        problem = localaid.ConfigProblem("/etc/\u043c\u043e\u0439\nREADY=1.yaml", "", "is broken")
        daemon_._problems = (problem,)
        daemon_._tell_status()
        told = "config error in /etc/\u043c\u043e\u0439 READY=1.yaml, leaving it out"
        assert notified.until("STATUS=").endswith(told)
        assert passed.notifier is not None
        passed.notifier.socket.close()


# -- folders that cannot be used --

IN_SERVICE = {"INVOCATION_ID": "1"}


def test_a_folder_that_can_be_used_is_none_of_these(tmp_path: Path) -> None:
    """Listed, and written."""
    assert check_folder(tmp_path, IN_SERVICE, writes=True) is None


def test_a_folder_that_is_missing_is_to_be_made(tmp_path: Path) -> None:
    """Or, below a home and under systemd, to be shown."""
    missing = check_folder(tmp_path / "none" / "models", {})
    assert missing is not None
    assert f"finds no {tmp_path}/none; make it: install -d -m 2775 -g " in str(missing)
    hidden = check_folder(Path("/home/nobody-has-this/models"), IN_SERVICE)
    assert hidden is not None
    assert "ProtectHome= of localaid.service hides it: systemctl edit localaid.service" in str(hidden)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """It is named."""
    (tmp_path / "models").touch()
    found = check_folder(tmp_path / "models", {})
    assert found is not None
    assert str(found).endswith(f"cannot list it; {tmp_path}/models is no folder: move it away, or name another one")


def test_modes_are_told_of_with_owner_and_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may everything: what `access` says to others is given."""
    top = tmp_path / "closed"
    (top / "models").mkdir(parents=True)
    top.chmod(0o700)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != top or not mode & os.X_OK)
    through = check_folder(top / "models", {})
    assert through is not None
    assert f"may not list it ({top} has mode 0700, owner " in str(through)
    assert str(through).endswith(f"{top} && chmod g+x {top}")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != top or not mode & os.W_OK)
    written = check_folder(top, {}, writes=True)
    assert written is not None
    assert f"may not write to it ({top} has mode 0700" in str(written)
    assert str(written).endswith(f"chmod g+rwx {top}")


def test_a_state_folder_that_is_a_file(tmp_path: Path) -> None:
    """It is told of once, with what to do, and everything is served."""
    state = tmp_path / "state"
    state.touch()
    arguments = ["serve", "--models", str(tmp_path / "models"), "--configs", str(tmp_path / "configs")]
    process = LocalaidProcess(PROGRAM, [*arguments, "--state", str(state), "--listen", "127.0.0.1:0"])
    process.wait_ready()
    told = [line for line in process.lines if str(state) in line]
    assert process.stop() == 0
    assert len(told) == 1
    user = localaid.user_name(os.geteuid())
    why = f"{state}: user {user} cannot list it; {state} is no folder: move it away, or name another one"
    assert told[0].endswith(why)


def test_folders_are_without_detours(tmp_path: Path) -> None:
    """The layer of a config is told by the folder that its name begins with."""
    detour = f"{tmp_path}/x/.."
    folders = choose_folders(
        arguments(models=[f"{detour}/m"], configs=f"{detour}/c", state=f"{detour}/s"), Settings(), {"HOME": "/"}
    )
    assert (folders.models, folders.configs, folders.state) == ((tmp_path / "m",), tmp_path / "c", tmp_path / "s")
    assert folders.layer_of(f"{tmp_path}/s/default-configs/channel/a.yaml") == "fetched"
    assert folders.layer_of(f"{detour}/c/a.yaml") == "user"
    of_systemd = choose_folders(arguments(), Settings(), {"HOME": "/", "CACHE_DIRECTORY": f"{detour}/s"})
    assert of_systemd.state == tmp_path / "s"


# -- live --


def test_pipes_hold_nothing_up(daemon: StartDaemon, tiny_llama: Path, tmp_path: Path) -> None:
    """Whatever a pipe is called, the next change is taken, and the daemon stops when it is told to."""
    served = daemon([tiny_llama], {"t.yaml": "name: t\nshas: ['*']\ntemplate: {chat: t.tmpl}\n"})
    os.mkfifo(tmp_path / "pipe")
    for place in (served.configs / "a.yaml", served.configs / "t.tmpl", served.models / "aliases.json"):
        place.symlink_to(tmp_path / "pipe")
    served.process.wait_for_line(r"configs/a\.yaml: not a regular file")
    served.process.wait_for_line(r"aliases\.json.*not a regular file|not a regular file.*aliases\.json")
    served.write_config("b.yaml", "name: b\nshas: ['*']\n")
    until_names(served, "b")
    assert served.process.stop() == 0


@pytest.mark.parametrize("part", ["configs", "models"])
def test_a_folder_that_vanishes_is_told_of(daemon: StartDaemon, tiny_llama: Path, part: str) -> None:
    """Its names are gone with it, and nobody would know why; when it is back, all is as before."""
    served = daemon([tiny_llama], {"b.yaml": "name: b\nshas: ['*']\n"})
    folder: Path = getattr(served, part)
    folder.rename(f"{folder}.away")
    served.process.wait_for_line(f"{folder}: .* finds no such folder")
    until_names(served, "b", there=False)
    status = msgspec.convert(get(served, "/localaid/status"), localaid.DaemonStatus)
    assert [problem for problem in status.problems if str(folder) in problem]
    Path(f"{folder}.away").rename(folder)
    until_names(served, "b")
    assert msgspec.convert(get(served, "/localaid/status"), localaid.DaemonStatus).problems == ()


def test_names_that_are_not_utf8_are_told_of(daemon: StartDaemon, tiny_llama: Path) -> None:
    """No answer of the control routes can carry one as it is."""
    served = daemon([tiny_llama], {"b.yaml": "name: b\nshas: ['*']\n"})
    Path(os.fsdecode(os.fsencode(served.models) + b"/mod\xe9.gguf")).symlink_to(tiny_llama)
    served.process.wait_for_line(r"mod.*its name is not UTF-8; rename it")
    Path(os.fsdecode(os.fsencode(served.configs) + b"/caf\xe9.yaml")).write_text("name: c\nshas: ['*']\n")
    served.process.wait_for_line(r"caf.*its name is not UTF-8; rename it")
    status = msgspec.convert(get(served, "/localaid/status"), localaid.DaemonStatus)
    assert [problem for problem in status.problems if "UTF-8" in problem]
    assert "b" in names(served)
    assert "c" not in names(served)
    assert get(served, "/localaid/explain?path=v1/chat&name=b")
    assert get(served, "/localaid/list?all=1")


def test_a_broken_config_keeps_its_last_good_version(
    daemon: StartDaemon, tiny_llama: Path, notified: Notified, tmp_path: Path
) -> None:
    """It is told of, everything else goes on, and a mended one is in force at once."""
    served = daemon(
        [tiny_llama],
        {"a.yaml": f"name: a\nshas: ['*']\nload: {SMALL}\n", "b.yaml": f"name: b\nshas: ['*']\nload: {SMALL}\n"},
        env={"NOTIFY_SOCKET": str(tmp_path / "notify")},
    )
    notified.until("READY=1")
    served.write_config("a.yaml", "name: a2\nshas: ['*']\ntop_q: 1\n")
    assert "STATUS=1 model, " in notified.until("a.yaml, using the last good one")
    assert {"a", "b"} <= names(served)
    assert "a2" not in names(served)
    status = msgspec.convert(get(served, "/localaid/status"), localaid.DaemonStatus)
    assert any("a.yaml: top_q: " in problem and "top_p" in problem for problem in status.problems)
    served.process.wait_for_line(r"top_q.*the last good version stays in force")
    assert post(served, "a")[0] == 200
    served.write_config("a.yaml", f"name: a3\nshas: ['*']\nload: {SMALL}\n")
    until_names(served, "a3")
    assert "a" not in names(served)
    served.write_config("c.yaml", f"name: c\nextends: b\nshas: ['*']\nload: {SMALL}\n")
    until_names(served, "c")
    served.write_config("b.yaml", f"name: renamed\nshas: ['*']\nload: {SMALL}\n")
    served.process.wait_for_line(
        r"c\.yaml: extends: no other config .* named b, line 1; the last good version stays in force"
    )
    assert {"c", "renamed"} <= names(served)
    status = msgspec.convert(get(served, "/localaid/status"), localaid.DaemonStatus)
    assert "c.yaml, using the last good one" in status.state
    (served.configs / "a.yaml").unlink()
    until_names(served, "a3", there=False)


def test_a_workers_memory_is_of_large_pages(daemon: StartDaemon, smollm2: Path) -> None:
    """Where the system leaves it to programs: of 4 KiB pages a large KV cache has too many to know where they are."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("the kernel gives no large pages")
    served = daemon([smollm2], {"a.yaml": "name: a\nshas: ['*']\nload: {parallel: 2, ctx_size: 8192}\nmax_tokens: 2\n"})
    assert post(served, "a")[0] == 200
    (worker,) = msgspec.convert(get(served, "/localaid/status"), localaid.DaemonStatus).memory.workers
    rollup = Path(f"/proc/{worker.pid}/smaps_rollup").read_text()
    large_kib = int(rollup.split("AnonHugePages:")[1].split()[0])
    assert large_kib > 100 << 10  # of 180 MiB


@pytest.mark.parametrize(("load", "mapped"), [("", False), (", mmap: false", False), (", mmap: true", True)])
def test_weights_of_a_small_file_are_copied(daemon: StartDaemon, smollm2: Path, load: str, *, mapped: bool) -> None:
    """What is written into the file while it is served then reaches nobody's answer; `mmap: true` leaves it mapped."""
    served = daemon([smollm2], {"a.yaml": f"name: a\nshas: ['*']\nload: {{ctx_size: 512{load}}}\nmax_tokens: 2\n"})
    assert post(served, "a")[0] == 200
    (worker,) = msgspec.convert(get(served, "/localaid/status"), localaid.DaemonStatus).memory.workers
    assert (".gguf" in Path(f"/proc/{worker.pid}/maps").read_text()) is mapped


def test_a_broken_template_keeps_its_last_good_version(daemon: StartDaemon, tiny_llama: Path) -> None:
    """It is compiled when it is saved, not when the first request comes."""
    config = f"name: a\nshas: ['*']\nload: {SMALL}\ntemplate: {{chat: chat.jinja}}\n"
    served = daemon([tiny_llama], {"a.yaml": config, "chat.jinja": "Good {{ messages[0].content }}"})
    for broken, why in (("Bad {% if %}", "Expected an expression"), ("{{ messages | unheard_of }}", "No filter named")):
        served.write_config("chat.jinja", broken)
        told = rf"template\.chat: chat\.jinja is no template \(line 1: {why}.*\), line 4; the last good version stays"
        served.process.wait_for_line(told)
        assert rendered(served, "a") == "Good x"
    served.write_config("chat.jinja", "Better {{ messages[0].content }}")
    deadline = time.monotonic() + 60
    while rendered(served, "a") != "Better x":
        assert time.monotonic() < deadline, served.log


def test_layers_aliases_extends_and_templates_through_real_folders(daemon: StartDaemon, tiny_llama: Path) -> None:
    """What the pure sections promise, on disk."""
    served = daemon(
        {"some-model.gguf": tiny_llama},
        {
            "base.yaml": f"name: base\nshas: ['*']\nload: {SMALL}\ntemperature: 0\nmax_tokens: 3\n",
            "child.yaml": "name: child\nextends: base\nshas: ['*']\nmax_tokens: 5\n",
            "tmpl.yaml": f"- model: shaped\n  checksum: ['sha256:{localaid.hash_file(str(tiny_llama))['sha256']}']\n"
            "  template: {completion: shape.tmpl}\n",
        },
        settings=SETTINGS,
    )
    until_problem = served.process.wait_for_line(r"shape\.tmpl")
    assert until_problem
    (served.configs / "shape.tmpl").write_text("{{ prompt }} {{ prompt }}")
    (served.models / "aliases.json").write_text(json.dumps({"some-model": {"alias": "nick", "description": "short"}}))
    until_names(served, "shaped")
    until_names(served, "nick")
    (served.models / "aliases.json").write_text(json.dumps({"some-model": {"alais": "nick"}}))
    served.process.wait_for_line(r"aliases\.json: some-model\.alais: unknown key.*the last good version stays in force")
    status = msgspec.convert(get(served, "/localaid/status"), localaid.DaemonStatus)
    assert "aliases.json, using the last good one" in status.state
    assert any("some-model.alais" in problem for problem in status.problems)
    assert "nick" in names(served)
    (served.models / "aliases.json").write_text(json.dumps({"unheard-of": {"alias": "nick"}}))
    served.process.wait_for_line("WARNING.*unheard-of: names no file of this folder")
    explained = msgspec.convert(get(served, "/localaid/explain?path=v1/completion&name=child"), localaid.Explanation)
    assert explained.fields["max_tokens"].value == 5
    assert explained.fields["temperature"].file.endswith("base.yaml")
    once = post(served, "base", "ab ab")[1]["usage"]
    twice = post(served, "shaped", "ab")[1]["usage"]
    assert isinstance(once, dict)
    assert isinstance(twice, dict)
    assert once["prompt_tokens"] == twice["prompt_tokens"]
    (served.configs / "shape.tmpl").write_text("{{ prompt }} {{ prompt }} {{ prompt }} {{ prompt }}")
    deadline = time.monotonic() + 60
    while True:
        usage = post(served, "shaped", "ab")[1]["usage"]
        assert isinstance(usage, dict)
        if usage["prompt_tokens"] > twice["prompt_tokens"]:
            break
        assert time.monotonic() < deadline


def test_a_rule_may_put_a_lora_adapter_on_a_model_by_its_sha(
    daemon: StartDaemon, tiny_llama: Path, tmp_path: Path
) -> None:
    """The adapter changes the answer, at scale 0 it does not; one that is not there is named."""
    adapter = write_tiny_lora(tmp_path / "style.gguf")
    sha = localaid.hash_file(str(adapter))["sha256"]
    rule = "name: {name}\nshas: ['sub/base.gguf', base.gguf]\nload: {{ctx_size: 512, threads: 1, lora: {lora}}}\n"
    served = daemon(
        {"base.gguf": tiny_llama},
        {
            "plain.yaml": rule.format(name="plain", lora="[]"),
            "full.yaml": rule.format(name="full", lora=f"['sha256:{sha}']"),
            "none.yaml": rule.format(name="none", lora=f"[{{'sha256:{sha}': 0.0}}]"),
        },
    )
    status, answer = post(served, "full", "Once upon a time", 12)
    assert status == 503
    assert sha in json.dumps(answer)
    place_model(adapter, served.models, "style.gguf", copy=True)
    deadline = time.monotonic() + 60
    while post(served, "full")[0] != 200:
        assert time.monotonic() < deadline
    texts = {name: post(served, name, "Once upon a time", 12)[1]["choices"] for name in ("plain", "full", "none")}
    assert texts["none"] == texts["plain"] != texts["full"]
    status_now = msgspec.convert(get(served, "/localaid/status"), localaid.DaemonStatus)
    assert any("LoRA" in why for why in status_now.unservable.values())


async def test_a_start_can_be_stopped_and_hears_no_reload_before_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SIGHUP while the folders are read says no READY=1, for nothing listens yet; SIGTERM ends it there."""
    folders = Folders(
        models=(tmp_path,), configs=tmp_path, state=tmp_path, settings=tmp_path / "x.yaml", shipped=tmp_path
    )
    one = localaid.Daemon(folders, Settings(), ("127.0.0.1:0",))
    told: list[str] = []
    monkeypatch.setattr(one, "_notify", told.append)
    reading = asyncio.Event()

    async def read_for_ever() -> None:
        reading.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(one.index, "start", read_for_ever)
    running = asyncio.create_task(one.run())
    await reading.wait()
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 60)
    assert not [line for line in told if "READY=1" in line or "RELOADING" in line]
    assert any("STOPPING=1" in line for line in told)


async def test_a_reload_that_came_too_soon_is_made_up_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the settings said when SIGHUP came is in force after the start."""
    file = tmp_path / "localaid.yaml"
    folders = Folders(models=(tmp_path,), configs=tmp_path, state=tmp_path, settings=file, shipped=tmp_path)
    one = localaid.Daemon(folders, Settings(), ("127.0.0.1:0",))
    told: list[str] = []
    ready = asyncio.Event()

    def note(text: str) -> None:
        told.extend(line for line in text.splitlines() if line.startswith(("READY", "RELOADING")))
        if len(told) == 3:
            ready.set()

    monkeypatch.setattr(one, "_notify", note)
    file.write_text("queue_size: 5\n")
    one.reload_settings()
    assert one.settings.queue_size == 64
    running = asyncio.create_task(one.run())
    await ready.wait()
    assert one.settings.queue_size == 5
    assert told == ["READY=1", "RELOADING=1", "READY=1"]
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 60)


async def test_settings_that_are_gone_at_a_reload_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a file that is being replaced would let everybody in."""
    file = tmp_path / "localaid.yaml"
    file.write_text("api_keys: ['a:sk-aaaaaaaaaaaaaaaa']\n")
    folders = Folders(models=(), configs=tmp_path, state=tmp_path, settings=file, shipped=tmp_path)
    one = localaid.Daemon(folders, load_settings(file, must_exist=True), ("127.0.0.1:0",))
    one.is_ready = True
    file.rename(tmp_path / "elsewhere")
    one.reload_settings()
    assert one.keyring.keys
    assert f"{file}: no such file; the settings in force stay" in caplog.text
    (tmp_path / "elsewhere").rename(file)
    one.reload_settings()
    assert one.keyring.keys


async def test_a_settings_step_that_fails_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its last good value stays in force, and is tried again at the next reload; the others are taken."""
    file = tmp_path / "localaid.yaml"
    folders = Folders(models=(), configs=tmp_path, state=tmp_path, settings=file, shipped=tmp_path)
    one = localaid.Daemon(folders, Settings(), ("127.0.0.1:0",))
    one.is_ready = True
    caplog.set_level("INFO")

    def fail(_daemon: localaid.Daemon, _new: Settings) -> None:
        raise OSError(5, "Input/output error")

    file.write_text("queue_size: 5\nmemory: 4GiB\ndrain: 5s\n")
    with monkeypatch.context() as broken:
        broken.setattr(localaid, "SETTINGS_STEPS", {**localaid.SETTINGS_STEPS, "memory": fail})
        one.reload_settings()
    assert (one.settings.queue_size, one.supervisor.queue_size, one.settings.drain_s) == (5, 5, 5.0)
    assert one.settings.memory == Settings().memory
    assert "settings: memory: cannot become 4GiB ([Errno 5] Input/output error); 80% stays in force" in caplog.text
    assert "error in" in one.status().state
    one.reload_settings()
    assert "settings: memory: 80% -> 4GiB" in caplog.text
    assert caplog.text.count("queue_size: 64 -> 5") == 1
    assert (one.supervisor.table.budget_bytes, one.status().problems) == (4 << 30, ())


def test_hup_takes_new_settings_and_keeps_the_old_ones_where_they_are_broken(
    daemon: StartDaemon, tiny_llama: Path, notified: Notified, tmp_path: Path
) -> None:
    """RELOADING=1 and READY=1 around it; what needs a restart says so."""
    served = daemon([tiny_llama], settings=SETTINGS, env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
    notified.until("READY=1")
    served.settings.write_text("queue_size: 5\nhash_threads: 1\n")
    served.process.signal(signal.SIGHUP)
    notified.until("RELOADING=1")
    notified.until("READY=1")
    served.process.wait_for_line("INFO localaid: settings: queue_size: 64 -> 5$")
    served.process.wait_for_line("WARNING .*settings: hash_threads: 2 -> 1 needs a restart; 2 stays in force")
    served.process.signal(signal.SIGHUP)  # once more: what waits for a restart is told again, what was taken is not
    notified.until("READY=1")
    served.settings.write_text("queue_size: 5\n")
    served.process.signal(signal.SIGHUP)
    served.process.wait_for_line("settings: nothing has changed")
    assert served.log.count("queue_size: 64 -> 5") == 1
    assert served.log.count("hash_threads: 2 -> 1 needs a restart") == 2
    served.settings.write_text("queue_size: 5\napi_keys: ['ann:SECRET']\n")
    served.process.signal(signal.SIGHUP)
    served.process.wait_for_line(r"settings: api_keys: \[\] -> \[ann\]")
    served.settings.write_text("queue_size: 5\n")
    served.process.signal(signal.SIGHUP)
    served.process.wait_for_line(r"settings: api_keys: \[ann\] -> \[\]")
    assert "SECRET" not in served.log
    served.settings.write_text("queue_sise: 7\n")
    served.process.signal(signal.SIGHUP)
    served.process.wait_for_line("queue_sise.*the settings in force stay")
    assert post(served, tiny_llama.stem)[0] == 200


def test_a_request_for_a_file_that_is_being_hashed_waits_for_it(
    daemon: StartDaemon, tiny_llama: Path, tmp_path: Path
) -> None:
    """Readiness does not: the daemon is ready while a big file is hashed."""
    served = daemon([tiny_llama], settings=SETTINGS)
    big = served.models / "big.gguf"
    write_tiny_llama(tmp_path / "other.gguf", seed=7, embedding_length=512, block_count=8)
    place_model(tmp_path / "other.gguf", served.models, "late.gguf", copy=True)
    assert not big.exists()
    until_names(served, "late")
    status, answer = post(served, "late")
    assert status == 200, answer


def test_a_unix_socket_is_served(daemon: StartDaemon, tiny_llama: Path, tmp_path: Path) -> None:
    """As `unix:PATH`."""
    served = daemon([tiny_llama], listen=f"unix:{tmp_path}/http.sock")
    assert served.base_url == f"unix:{tmp_path}/http.sock"
    assert stat.S_IMODE((tmp_path / "http.sock").stat().st_mode) == 0o660  # a proxy in the service's group may ask
    assert tiny_llama.stem in names(served)


def test_a_restart_reads_nothing_again(daemon: StartDaemon, tiny_llama: Path) -> None:
    """The digests come from the cache: a file that cannot be read any more is still known."""
    served = daemon([tiny_llama])
    before = get(served, "/v1/models")
    assert served.process.stop() == 0
    cache = served.state / localaid.DigestCache.FILE_NAME
    assert cache.stat().st_size > 64
    again = daemon(folder=served.folder)
    assert get(again, "/v1/models") == before
    cache_bytes = cache.read_bytes()
    assert again.process.stop() == 0
    cache.write_bytes(cache_bytes[:-3] + b"xxx")
    broken = daemon(folder=served.folder)
    until_names(broken, tiny_llama.stem)
    broken.process.wait_for_line("digests.msgpack: is damaged")


# -- the end --


def test_sigterm_lets_a_running_answer_come_to_its_end(
    daemon: StartDaemon, tiny_llama: Path, notified: Notified, tmp_path: Path
) -> None:
    """STOPPING=1, the whole stream, exit status 0, no worker left."""
    served = daemon(
        [tiny_llama],
        settings={"load": {"ctx_size": 4096, "threads": 1}, "drain": "10m"},
        env={"NOTIFY_SOCKET": str(tmp_path / "notify")},
    )

    async def ask() -> bytes:
        body = {"model": tiny_llama.stem, "prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        async with aiohttp.ClientSession(served.base_url) as http, http.post("/v1/completions", json=body) as answer:
            first = await answer.content.readline()
            served.process.signal(signal.SIGTERM)
            return first + await answer.read()

    raw = asyncio.run(ask())
    assert raw.endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason":"length"' in raw
    notified.until("STOPPING=1")
    assert served.process.process.wait(60) == 0


def test_a_daemon_that_is_killed_leaves_no_worker(daemon: StartDaemon, tiny_llama: Path) -> None:
    """The kernel ends them with it."""
    served = daemon([tiny_llama], settings=SETTINGS)
    assert post(served, tiny_llama.stem)[0] == 200
    workers = served.process.workers()
    assert workers
    ends = [os.pidfd_open(worker) for worker in workers]
    os.kill(served.pid, signal.SIGKILL)
    served.process.process.wait(30)
    deadline = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
    for end in ends:
        os.close(end)
