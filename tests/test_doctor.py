"""DOCTOR: each check finds what it looks for, and says what to do; the whole on a real machine."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import pwd
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

import localaid
from conftest import PROGRAM, StartDaemon
from localaid import (
    BuildAnswer,
    ConfigErrors,
    ConfigProblem,
    DaemonAnswer,
    DaemonUnreachable,
    Finding,
    Folders,
    KeyNotTaken,
    LoadOptions,
    MemoryBudget,
    ModelInfo,
    Settings,
    acting_as,
    check_build,
    check_clock,
    check_configs,
    check_daemon,
    check_disk,
    check_folder,
    check_folders,
    check_inotify,
    check_memory,
    check_open_files,
    check_readable,
    check_settings,
    check_unit,
    examine,
    find_holder,
    load_build,
    load_keyring,
    load_settings,
    unit_environ,
    walk_models,
)
from models import place_model

GIB = 1 << 30
NOBODY = pwd.getpwnam("nobody")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def states(findings: list[Finding]) -> list[tuple[str, str]]:
    """Return what was looked at, and how it stands; what is wrong has a remedy."""
    assert all(bool(one.remedy) or one.state == "ok" for one in findings)
    return [(one.check, one.state) for one in findings]


def folders_in(top: Path) -> Folders:
    """Return folders below one, which are made."""
    for name in ("models", "configs", "state", "shipped"):
        (top / name).mkdir()
    return Folders(
        models=(top / "models",),
        configs=top / "configs",
        state=top / "state",
        settings=top / "localaid.yaml",
        shipped=top / "shipped",
    )


def doctor(*arguments: object, home: Path) -> list[Finding]:
    """Run `localaid doctor --json`; its exit status is 1 where there is a problem."""
    command = [sys.executable, str(PROGRAM), "doctor", "--json", *map(str, arguments)]
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    done = subprocess.run(command, capture_output=True, check=False, env=env, timeout=200)
    found = msgspec.json.decode(done.stdout, type=list[Finding])
    assert done.returncode == any(one.state == "problem" for one in found), done.stderr
    return found


# -- one check each --


def test_folders(tmp_path: Path) -> None:
    """Those that are there; one that is not; one that the unit's ProtectHome= hides."""
    folders = folders_in(tmp_path)
    assert states(check_folders(folders, {}, {})) == [("models", "ok"), ("configs", "ok"), ("state", "ok")]
    (tmp_path / "configs").rmdir()
    missing = check_folders(folders, {}, {})[1]
    assert (missing.state, "install -d" in missing.remedy) == ("problem", True)
    assert str(tmp_path / "configs") in missing.what


def test_a_home_that_the_unit_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the name of the directive, and what to put into a drop-in."""
    monkeypatch.setattr(localaid, "_HIDDEN_HOMES", (str(tmp_path),))
    folders = folders_in(tmp_path)
    hidden = check_folders(folders, {}, {"ProtectHome": "yes"})
    assert [one.state for one in hidden] == ["problem"] * 3
    assert hidden[0].remedy == "systemctl edit localaid.service: [Service], ProtectHome=read-only"
    assert [one.state for one in check_folders(folders, {}, {"ProtectHome": "read-only"})] == ["ok"] * 3


@as_root
def test_root_looks_as_the_services_user(tmp_path: Path) -> None:
    """What root may read, the service may not; afterwards root is root again."""
    folders = folders_in(tmp_path)
    for folder in (tmp_path, *tmp_path.parents[:-1]):  # pytest's own are closed to others
        if folder.is_relative_to("/tmp"):  # noqa: S108
            folder.chmod(folder.stat().st_mode | 0o005)
    (tmp_path / "models").chmod(0o700)
    with acting_as("nobody"):
        found = check_folders(folders, {}, {})
        assert os.geteuid() == NOBODY.pw_uid
    assert states(found) == [("models", "problem"), ("configs", "ok"), ("state", "problem")]
    assert "user nobody may not list it" in found[0].what
    assert "chmod g+rx" in found[0].remedy
    assert (os.getuid(), os.geteuid()) == (0, 0)
    with acting_as(""):
        assert os.geteuid() == 0
    with acting_as("nobody-of-this-name"):  # told of elsewhere
        assert os.geteuid() == 0


@as_root
def test_a_file_that_may_not_be_read_is_told_with_what_to_do(tmp_path: Path) -> None:
    """Whose it is, for whom it is closed, and the commands."""
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder.is_relative_to("/tmp"):  # noqa: S108
            folder.chmod(folder.stat().st_mode | 0o005)
    file = tmp_path / "localaid.yaml"
    file.write_text("queue_size: 1\n")
    file.chmod(0o600)
    os.chown(file, 54321, 54321)
    with acting_as("nobody"), pytest.raises(ConfigErrors) as caught:
        load_settings(file, must_exist=True)
    words = str(caught.value.problems[0])
    assert "Permission denied for user nobody (mode 0600, owner 54321, group 54321)" in words
    assert f"chmod g+r {file}" in words


@as_root
def test_a_folder_whose_owner_has_no_name_is_told_of_by_number(tmp_path: Path) -> None:
    """As in containers and on NFS."""
    (tmp_path / "models").mkdir()
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder.is_relative_to("/tmp"):  # noqa: S108
            folder.chmod(folder.stat().st_mode | 0o005)
    os.chown(tmp_path / "models", 54321, 54321)
    (tmp_path / "models").chmod(0o700)
    with acting_as("nobody"):
        found = check_folder(tmp_path / "models", {})
    assert "owner 54321, group 54321" in str(found)


def test_what_systemd_makes_at_the_start_is_not_missing(tmp_path: Path) -> None:
    """The cache of a service that has never run."""
    folders = dataclasses.replace(folders_in(tmp_path), state=Path("/var/cache/localaid-none"))
    found = check_folders(folders, {}, {"CacheDirectory": "localaid-none"})
    assert found[-1].what == "/var/cache/localaid-none is made when localaid.service starts"
    assert check_folders(folders, {}, {})[-1].state == "problem"


@pytest.mark.parametrize(
    ("text", "state", "words"),
    [
        ("ann:sk-aaaaaaaaaaaaaaaa\n", "ok", "1 API keys in"),
        ("# none yet\n", "problem", "has no API key"),
        ("ann:\n", "problem", "line 1"),
    ],
)
def test_the_credential_is_looked_at(tmp_path: Path, text: str, state: str, words: str) -> None:
    """As systemd will pass it to the service."""
    file = tmp_path / "api-keys"
    file.write_text(text)
    file.chmod(0o600)
    found = check_unit({}, [file])
    assert [one.state for one in found] == [state]
    assert words in found[0].what


def test_a_credential_without_keys_names_its_source(tmp_path: Path) -> None:
    """The copy of it is not what has to be changed."""
    (tmp_path / "api-keys").write_text("# none\n")
    with pytest.raises(ConfigErrors) as caught:
        load_keyring(Settings(), tmp_path, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert "add one to /etc/credstore/api-keys" in str(caught.value.problems[0])
    (tmp_path / "api-keys").write_text("a:sk-aaaaaaaaaaaaaaaa\nb:sk-aaaaaaaaaaaaaaaa\n")
    with pytest.raises(ConfigErrors) as caught:
        load_keyring(Settings(), tmp_path, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert str(caught.value.problems[0]).startswith(f"{tmp_path / 'api-keys'}: a and b have the same key")


def test_a_unit_whose_user_is_missing_is_a_problem() -> None:
    """The unit would not start."""
    (found,) = check_unit({"User": "nobody-of-this-name", "ActiveState": "inactive"}, ())
    assert (found.state, found.remedy) == ("problem", "systemd-sysusers")


def test_settings_and_keys(tmp_path: Path) -> None:
    """Each problem of the file; keys that cannot be read."""
    folders = folders_in(tmp_path)
    broken = ConfigErrors((ConfigProblem("localaid.yaml", "queue_sise", "unknown key"),))
    (found,) = check_settings(folders, broken, {})
    assert (found.state, found.what) == ("problem", "localaid.yaml: queue_sise: unknown key")
    assert states(check_settings(folders, Settings(), {})) == [("settings", "ok"), ("keys", "ok")]
    found = check_settings(folders, Settings(api_keys_file="none"), {})[1]
    assert (found.check, found.state) == ("keys", "problem")


def test_configs(tmp_path: Path) -> None:
    """Errors are problems, and what can never be reached is a warning."""
    folders = folders_in(tmp_path)
    assert states(check_configs(folders)) == [("configs", "ok")]
    (folders.configs / "a.yaml").write_text("name: x\nshas: ['*']\ntop_q: 1\n")
    assert states(check_configs(folders)) == [("configs", "problem")]
    (folders.configs / "a.yaml").write_text("name: x\nshas: ['*']\n")
    (folders.configs / "b.yaml").write_text("name: x\nshas: ['*']\n")
    assert {state for _, state in states(check_configs(folders))} == {"warning"}


@pytest.mark.parametrize(
    ("folders", "used", "wanted"),
    [(10, 0, ["ok", "ok"]), (80, 0, ["warning", "ok"]), (101, 0, ["problem", "ok"]), (1, 14, ["ok", "problem"])],
)
def test_inotify(folders: int, used: int, wanted: list[str]) -> None:
    """Watches for each folder, and instances beside those of others; the remedy is a limit that is enough."""
    found = check_inotify(folders, 100, 16, used)
    assert [state for _, state in states(found)] == wanted
    if wanted[0] == "problem":
        assert "fs.inotify.max_user_watches=202 > /etc/sysctl.d/" in found[0].remedy


def test_folders_are_counted_once(tmp_path: Path, tiny_llama: Path) -> None:
    """Also where links lead round in circles; headers of models are read, of other files not."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "nowhere").symlink_to(tmp_path / "none")
    (tmp_path / "a" / "large.txt").write_bytes(b"x" * 10_000_000)
    place_model(tiny_llama, tmp_path / "a")
    walked = walk_models([tmp_path, tmp_path / "a"])
    assert (walked.folders, [name for name, _ in walked.largest]) == (3, [tiny_llama.name])
    assert walked.unreadable == []


def test_models_that_may_not_be_read(tmp_path: Path, tiny_llama: Path) -> None:
    """Whose they are and what to do; many are counted."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder.is_relative_to("/tmp"):  # noqa: S108
            folder.chmod(folder.stat().st_mode | 0o005)
    for number in range(7):
        place_model(tiny_llama, tmp_path, f"{number}.gguf", copy=True).chmod(0o600)
    with acting_as("nobody"):
        walked = walk_models([tmp_path])
    found = check_readable(walked.unreadable)
    assert [finding.state for finding in found] == ["problem"] * 6
    assert found[0].what == (
        f"{tmp_path}/0.gguf: Permission denied for user nobody (mode 0600, owner root, group root)"
    )
    assert found[0].remedy == f"chgrp nogroup {tmp_path}/0.gguf && chmod g+r {tmp_path}/0.gguf"
    assert found[-1].what == "2 more files may not be read"
    assert check_readable([]) == []


def test_memory(tmp_path: Path, tiny_llama: Path) -> None:
    """The budget against the largest model; what may be locked; a budget that is more than there is."""
    place_model(tiny_llama, tmp_path)
    models = walk_models([tmp_path]).largest

    def look(settings: Settings, available: int = GIB, locked: int = -1, overcommit: str = "0\n") -> list[str]:
        found = check_memory(settings, available, models, locked, overcommit)
        return [f"{check} {state}" for check, state in states(found)]

    assert look(Settings()) == ["memory ok", "models ok"]
    assert look(Settings(memory=MemoryBudget(size_bytes=1 << 20))) == ["memory ok", "models warning"]
    assert look(Settings(memory=MemoryBudget(size_bytes=2 * GIB))) == ["memory warning", "models ok"]
    mlock = Settings(load=LoadOptions(mlock=True))
    assert look(mlock, locked=1 << 16) == ["memory ok", "models ok", "mlock problem"]
    assert look(mlock) == ["memory ok", "models ok"]
    assert look(Settings(), overcommit="2\n") == ["memory ok", "models ok", "memory warning"]
    nothing: list[tuple[str, ModelInfo]] = []
    assert states(check_memory(Settings(), GIB, nothing, -1, "0"))[1] == ("models", "warning")


def test_small_checks(tmp_path: Path) -> None:
    """Room, open files, clock."""
    for free, state in ((2 * GIB, "ok"), (GIB // 2, "warning"), (1, "problem")):
        assert states([check_disk(tmp_path, free)]) == [("disk", state)]
    assert check_open_files(256, 4096).remedy == "ulimit -n 4096"
    assert check_open_files(256, 512).remedy == "LimitNOFILE=65536 in the unit"
    for unlimited in (65536, -1):
        assert check_open_files(unlimited, -1).state == "ok"
    assert check_clock(86400.0 * 10, 86400.0 * 12).state == "problem"
    assert check_clock(86400.0 * 12, 86400.0 * 12).state == "ok"


BUILD = BuildAnswer(version="1", features="CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | FMA = 0 | OPENMP = 1 | ", gpu=False)


@pytest.mark.parametrize(
    ("cpuinfo", "missing"),
    [
        ("flags\t\t: fpu avx avx2\n", ""),
        ("processor: 0\nflags\t\t: avx avx2 fma avx512f\n", "FMA, AVX512"),
        ("Features\t: fp asimd asimddp\n", "NEON, DOTPROD"),
        ("", ""),
    ],
)
def test_instructions_that_the_build_does_not_use(cpuinfo: str, missing: str, tmp_path: Path) -> None:
    """By name, and how to build it anew."""
    (found,) = check_build(BUILD, cpuinfo, tmp_path)
    assert found.state == ("warning" if missing else "ok")
    assert not missing or f"does not use {missing}, which" in found.what
    assert ("-DGGML_NATIVE=on" in found.remedy) is bool(missing)


def test_cards_that_the_build_does_not_use(tmp_path: Path) -> None:
    """A device file says that there is one."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    found = check_build(BUILD, "", tmp_path)
    assert states(found) == [("llama.cpp", "ok"), ("gpu", "warning")]
    assert "-DGGML_CUDA=on" in found[1].remedy
    assert states(check_build(msgspec.structs.replace(BUILD, gpu=True), "", tmp_path))[1] == ("gpu", "ok")


def test_this_build_is_asked(tmp_path: Path) -> None:
    """In a process of its own; this one has not loaded it for that."""
    build = load_build()
    assert isinstance(build, BuildAnswer)
    assert "CPU" in build.features
    assert check_build("no such library", "", tmp_path)[0].state == "problem"


def test_answers_of_a_daemon() -> None:
    """Another version, its own problems, none at all, and who holds its port."""
    mine = DaemonAnswer(version=localaid.__version__, state="3 models")
    assert states(check_daemon(mine, "127.0.0.1:8080", "")) == [("daemon", "ok")]
    other = DaemonAnswer(version="0", problems=("x.yaml: top_q: unknown key",))
    assert states(check_daemon(other, "127.0.0.1:8080", "")) == [("daemon", "warning"), ("daemon", "problem")]
    silent = DaemonUnreachable(tried=["127.0.0.1:8080"], join="")
    assert states(check_daemon(silent, "127.0.0.1:8080", "")) == [("daemon", "warning")]
    (held,) = check_daemon(silent, "127.0.0.1:8080", "nginx (process 7)")
    assert (held.state, "held by nginx (process 7)" in held.what) == ("problem", True)
    (keyed,) = check_daemon(KeyNotTaken(listen="127.0.0.1:8080"), "127.0.0.1:8080", "")
    assert (keyed.state, "LOCALAID_API_KEY" in keyed.remedy) == ("ok", True)


def test_who_holds_a_port() -> None:
    """By name and process; nobody where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{one.getsockname()[1]}"
        assert find_holder(listen) == ""
        one.listen()
        assert find_holder(listen).endswith(f"(process {os.getpid()})")
    assert find_holder("unix:/run/x") == ""


@pytest.mark.parametrize(
    ("unit", "state"),
    [
        ({}, []),
        ({"ActiveState": "active"}, ["ok"]),
        ({"ActiveState": "inactive"}, ["warning"]),
        ({"ActiveState": "failed", "Result": "watchdog"}, ["problem"]),
    ],
)
def test_the_service(unit: Mapping[str, str], state: list[str], tmp_path: Path) -> None:
    """As systemd has it; and a credential that others can read."""
    keys = tmp_path / "api-keys"
    keys.write_text("a:b\n")
    keys.chmod(0o600)
    found = [one for one in check_unit(unit, [keys, tmp_path / "none"]) if one.check == "service"]
    assert [one.state for one in found] == state
    keys.chmod(0o640)
    found = [one for one in check_unit(unit, [keys]) if one.check == "service"]
    assert [one.state for one in found] == [*state, "problem"]
    assert found[-1].remedy == f"chmod 600 {keys}"


def test_folders_of_the_unit() -> None:
    """As systemd passes them."""
    unit = {"StateDirectory": "localaid localaid/models", "ConfigurationDirectory": "localaid", "CacheDirectory": ""}
    assert unit_environ(unit) == {
        "STATE_DIRECTORY": "/var/lib/localaid:/var/lib/localaid/models",
        "CONFIGURATION_DIRECTORY": "/etc/localaid",
    }


# -- the command --


def test_a_daemon_that_runs(daemon: StartDaemon, tiny_llama: Path, tmp_path: Path) -> None:
    """Nothing is a problem; what is broken then is one, from the file and from the daemon."""
    served = daemon([tiny_llama])
    options = ["--models", served.models, "--configs", served.configs, "--state", served.state]
    options += ["--settings", served.settings, "--listen", served.base_url.removeprefix("http://")]
    found = doctor(*options, home=tmp_path)
    assert [one for one in found if one.state == "problem" and one.check != "disk"] == []
    (running,) = (one for one in found if one.check == "daemon")
    assert running.what.startswith(f"{localaid.__version__} runs: 1 model")
    checks = "models configs state disk settings keys inotify memory llama.cpp clock daemon".split()
    assert {one.check for one in found} >= {*checks, "open files"}
    served.write_config("x.yaml", "name: x\nshas: ['*']\ntop_q: 1\n")
    served.process.wait_for_line("top_q")
    problems = [one for one in doctor(*options, home=tmp_path) if one.state == "problem" and one.check != "disk"]
    assert {one.check for one in problems} == {"configs", "daemon"}
    assert all("top_q: unknown key" in one.what for one in problems)


def test_no_daemon_and_broken_settings(tmp_path: Path) -> None:
    """It goes on with what it can look at."""
    settings = tmp_path / "localaid.yaml"
    settings.write_text("queue_sise: 1\n")
    found = doctor("--settings", settings, home=tmp_path)
    assert any(one.check == "settings" and "queue_sise" in one.what for one in found)
    assert [one.state for one in found if one.check == "daemon"] == ["warning"]


@as_root
def test_all_of_it_as_the_services_user(tmp_path: Path, tiny_llama: Path) -> None:
    """Folders are looked at as the unit's user; the rest, such as credentials, as root."""
    folders = folders_in(tmp_path)
    place_model(tiny_llama, folders.models[0])
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder.is_relative_to("/tmp"):  # noqa: S108
            folder.chmod(folder.stat().st_mode | 0o005)
    folders.state.chmod(0o777)
    silent = DaemonUnreachable(tried=[], join="")

    def look() -> dict[str, Finding]:
        found = examine(folders, Settings(), silent, {"User": "nobody", "ActiveState": "inactive"}, {})
        return {one.check: one for one in found if one.check != "disk"}

    assert [name for name, one in look().items() if one.state == "problem"] == []
    folders.state.chmod(0o755)
    assert "user nobody may not write to it" in look()["state"].what
    (tmp_path / "models").chmod(0o700)
    assert look()["models"].state == "warning"  # the last one: of the models, of which it sees none
    assert os.geteuid() == 0


def test_a_terminal_gets_a_table(tmp_path: Path) -> None:
    """With colours; a pipe gets plain lines, the remedy below what is wrong."""
    ours, theirs = pty.openpty()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm"}
    command = [sys.executable, str(PROGRAM), "doctor"]
    with subprocess.Popen(command, stdout=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:  # EIO: the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 1
    assert b"\033[" in shown
    plain = subprocess.run(command, capture_output=True, text=True, env=env, check=False).stdout
    assert "\033" not in plain
    assert "-> make it: install -d" in plain
    assert json.loads(subprocess.run([*command, "--json"], capture_output=True, env=env, check=False).stdout)
