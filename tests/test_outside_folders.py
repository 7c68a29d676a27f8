"""What is saved into a folder: it never ends the daemon, is never lost, and is in force at once."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

import localaid
from conftest import PROGRAM, Daemon, StartDaemon
from models import write_tiny_llama
from processes import LocalaidProcess, cpu_seconds

pytestmark = pytest.mark.outside
NESTED = "[" * 100_000  # deeper than any reader of JSON or YAML goes
PARTS_OF_ITSELF = f"shas:\n- &p {{sha256: {'a' * 64}, url: 'https://example.org/y', parts: [*p]}}\n"


def get(served: Daemon, path: str) -> dict[str, list[dict[str, object]]]:
    """Return what a route answers."""
    with urllib.request.urlopen(served.base_url + path, timeout=30) as answer:  # noqa: S310 - our own
        return json.loads(answer.read())  # type: ignore[no-any-return]


def problems(served: Daemon) -> list[str]:
    """Return the problems that the status tells."""
    return list(map(str, get(served, "/localaid/status")["problems"]))


def names(served: Daemon) -> set[str]:
    """Return the names that can be asked for."""
    models = get(served, "/v1/models")["data"]
    aliases = (alias for model in models for alias in cast("list[str]", model.get("aliases") or []))
    return {*(str(model["id"]) for model in models), *aliases}


def until(holds: Callable[[], object], limit_s: float = 30.0) -> None:
    """Wait for something that is seen from outside only."""
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


# -- whatever is in one file --


def test_a_config_that_contains_itself_is_a_problem_of_its_own(daemon: StartDaemon, tiny_llama: Path) -> None:
    """The daemon goes on and takes the next config; it starts with the file, too, and `check` names it."""
    served = daemon([tiny_llama], {"good.yaml": "name: good\nshas: ['*']\n"})
    served.write_config("loop.yaml", PARTS_OF_ITSELF)
    until(lambda: any("loop.yaml" in problem for problem in problems(served)))
    served.write_config("next.yaml", "name: next\nshas: ['*']\n")
    until(lambda: {"good", "next"} <= names(served))
    assert served.process.stop() == 0
    again = daemon(folder=served.folder)
    assert any("loop.yaml" in problem for problem in problems(again))
    assert {"good", "next"} <= names(again)
    command = [sys.executable, str(PROGRAM), "check", str(served.configs / "loop.yaml")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 1
    assert "loop.yaml: " in checked.stdout
    assert "Traceback" not in checked.stderr


def test_what_a_broken_file_said_last_stays_in_force(daemon: StartDaemon, tiny_llama: Path) -> None:
    """A config, a template, aliases.json and the settings, each nested beyond all bounds."""
    template = {"shas": ["*"], "name": "told", "template": {"chat": "chat.jinja"}}
    served = daemon([tiny_llama], {"told.yaml": json.dumps(template), "chat.jinja": "{{ messages }}"})
    aliases = served.models / "aliases.json"
    aliases.write_text('{"tiny-llama.gguf": {"alias": "second"}}')
    until(lambda: {"told", "second"} <= names(served))
    served.write_config("chat.jinja", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")
    aliases.write_text('{"a": ' + NESTED)
    served.settings.write_text("listen: " + NESTED)
    served.process.signal(signal.SIGHUP)
    for name in ("told.yaml", "aliases.json", "localaid.yaml"):
        until(lambda: name in " ".join(problems(served)))  # noqa: B023 - called at once
    assert {"told", "second"} <= names(served)
    served.write_config("told.yaml", "name: told\nshas: " + NESTED)
    until(lambda: any("told.yaml" in problem and "template" not in problem for problem in problems(served)))
    assert "told" in names(served)


def test_files_of_the_state_folder_may_be_damaged(daemon: StartDaemon, tiny_llama: Path) -> None:
    """The pulls' journal, the digest cache and what is known of processors only save work: localaid starts."""
    served = daemon([tiny_llama])
    assert served.process.stop() == 0
    (served.state / "pulls").mkdir(exist_ok=True)
    (served.state / "pulls" / "sha256-00.json").write_text('{"zz": ' + NESTED)
    (served.state / localaid.DigestCache.FILE_NAME).write_bytes(b"\x91" * 100_000)
    for file in served.state.glob("*.json"):
        file.write_text('{"zz": ' + NESTED)
    again = daemon(folder=served.folder)
    assert "tiny-llama" in names(again)
    assert "sha256-00.json: is nested too deeply" in again.log


# -- what must not end --


@pytest.mark.parametrize("which", ["models", "configs", "updates"])
async def test_a_daemon_whose_watch_has_died_ends(tmp_path: Path, which: str) -> None:
    """It must not serve on without seeing what is saved: systemd starts it anew."""
    for folder in ("models", "configs", "state"):
        (tmp_path / folder).mkdir()
    arguments = argparse.Namespace(
        models=[str(tmp_path / "models")], configs=str(tmp_path / "configs"), state=str(tmp_path / "state"),
        settings=str(tmp_path / "localaid.yaml"),
    )  # fmt: skip
    folders = localaid.choose_folders(arguments, localaid.Settings(), {})
    served = localaid.Daemon(folders, localaid.Settings(), (f"unix:{tmp_path}/http",))
    running = asyncio.create_task(served.run())
    while not served.is_ready:
        await asyncio.sleep(0.01)
        assert not running.done()
    task = next(task for task in asyncio.all_tasks() if which in task.get_name() and "of" in task.get_name())
    task.cancel()
    with pytest.raises(RuntimeError, match=which):
        await asyncio.wait_for(running, 30)


# -- what is saved is in force --


def test_a_configs_folder_that_is_replaced(daemon: StartDaemon, tiny_llama: Path) -> None:
    """`mv configs old; mkdir configs`: what was in it is gone, without a problem, and what comes is seen."""
    served = daemon([tiny_llama], {"old.yaml": "name: old\nshas: ['*']\n"})
    served.configs.rename(served.folder / "away")
    served.configs.mkdir()
    until(lambda: "old" not in names(served))
    assert problems(served) == []
    served.write_config("new.yaml", "name: new\nshas: ['*']\n")
    until(lambda: "new" in names(served))


def test_without_inotify_folders_are_looked_at_now_and_then(tmp_path: Path) -> None:
    """The kernel's instances are used up; a config that is deleted is gone, and nothing spins."""
    refusing = tmp_path / "refusing.py"
    refusing.write_text(
        "import errno, os, inotify_simple\n"
        "def refuse(): raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))\n"
        "inotify_simple.INotify = refuse\n"
        "from localaid import main\n"
    )
    for folder in ("models", "configs", "state"):
        (tmp_path / folder).mkdir()
    write_tiny_llama(tmp_path / "models" / "tiny-llama.gguf")
    configs, settings = tmp_path / "configs", tmp_path / "localaid.yaml"
    (configs / "a.yaml").write_text("name: a\nshas: ['*']\n")
    settings.write_text("rescan: 1s\n")
    arguments = ["serve", "--listen", "127.0.0.1:0", "--settings", str(settings)]
    for folder in ("models", "configs", "state"):
        arguments += [f"--{folder}", str(tmp_path / folder)]
    process = LocalaidProcess("refusing", arguments, {"PYTHONPATH": f"{tmp_path}:{PROGRAM.parent}"})
    process.wait_ready()
    served = Daemon(process, tmp_path / "models", configs, tmp_path / "state", settings)
    try:
        assert "fs.inotify.max_user_instances" in served.log
        until(lambda: "a" in names(served))
        (configs / "a.yaml").unlink()
        until(lambda: "a" not in names(served))
        served.write_config("b.yaml", "name: b\nshas: ['*']\n")
        until(lambda: "b" in names(served))
        before = cpu_seconds(served.pid)
        time.sleep(2)
        assert cpu_seconds(served.pid) - before < 1
    finally:
        assert process.stop() == 0


def test_a_config_that_an_editor_writes_anew(daemon: StartDaemon, tiny_llama: Path) -> None:
    """It takes the old file away first: no request finds the name gone, and a broken one keeps what was good."""
    good = "name: edited\nshas: ['*']\n"
    served = daemon([tiny_llama], {"edited.yaml": good})
    file = served.configs / "edited.yaml"
    for content in (good + "temperature: 0.5\n", good + "top_q: 1\n"):
        file.rename(served.folder / "backup")
        assert "edited" in names(served)
        file.write_text(content)
        until(lambda: bool(problems(served)) == ("top_q" in content))  # noqa: B023 - called at once
        assert "edited" in names(served)
    file.unlink()
    until(lambda: "edited" not in names(served))
