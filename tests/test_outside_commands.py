"""The command line, whoever answers: nobody, somebody else, another version, a flood: one sentence each."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import PROGRAM, StartDaemon

pytestmark = pytest.mark.outside
REPO = Path(__file__).parent.parent
COMMANDS: dict[str, list[str]] = {
    "status": ["status"],
    "status json": ["status", "--json"],
    "list": ["list"],
    "explain": ["explain", "v1/chat", "x"],
    "diff": ["diff"],
    "update": ["update", "--dry-run"],
    "pull": ["pull", "x"],
    "cancel": ["pull", "--cancel", "x"],
    "doctor": ["doctor"],
}
HTML = b"<!DOCTYPE html>\n<html><body>\n<h1>It works!</h1>\n</body></html>\n"


class Stranger(http.server.BaseHTTPRequestHandler):
    """Answers every request with the same; `kind` is its server's."""

    def answer(self) -> None:
        """Send it."""
        kind = getattr(self.server, "kind")  # noqa: B009 - given below
        self.send_response({"missing": 404, "broken": 500}.get(kind, 200))
        self.send_header("Content-Type", "application/json" if kind in ("old", "deep") else "text/html")
        self.end_headers()
        if kind == "flood":
            for _ in range(80):
                self.wfile.write(b"x" * (1 << 20))
        bodies = {
            "old": b'{"version": "0.0.1", "state": 5, "downloads": 7}',
            "deep": b"[" * 100_000,
            "empty": b"",
            "flood": b"",
        }
        self.wfile.write(bodies.get(kind, HTML))

    do_GET = do_POST = do_DELETE = answer  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def handle(self) -> None:
        """Bear clients that have heard enough."""
        with contextlib.suppress(ConnectionError):
            super().handle()


@pytest.fixture(params=["foreign", "missing", "broken", "old", "deep", "empty", "flood"])
def stranger(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the address of a server that is no localaid of this version."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    setattr(server, "kind", request.param)  # noqa: B010 - its handlers read it
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def run(home: Path, *arguments: object, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command as a user whose folders are empty."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "LOCALAID"))}
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)],
        env={**known, "HOME": str(home), **env},
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stranger_on_the_port(stranger: str, command: str, tmp_path: Path) -> None:
    """Status 1 and one sentence that names the address (doctor tells of it among its findings)."""
    done = run(tmp_path, *COMMANDS[command], "--listen", stranger)
    assert b"Traceback" not in done.stdout + done.stderr, done.stderr.decode()[-2000:]
    if command == "doctor":
        assert stranger.encode() in done.stdout
        return
    assert done.returncode == 1
    (sentence,) = done.stderr.decode().strip().splitlines()
    assert sentence.startswith("localaid: ")
    assert stranger in sentence
    assert len(sentence) < 1000


@pytest.mark.parametrize("command", COMMANDS)
def test_nobody_on_the_port(command: str, tmp_path: Path) -> None:
    """What needs no daemon is done; the rest is one sentence."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{one.getsockname()[1]}"
    done = run(tmp_path, *COMMANDS[command], "--listen", listen)
    assert b"Traceback" not in done.stdout + done.stderr, done.stderr.decode()[-2000:]
    if command not in ("diff", "doctor"):
        assert done.returncode == 1
        assert len(done.stderr.decode().strip().splitlines()) == 1


def test_large_answers(daemon: StartDaemon, tmp_path: Path) -> None:
    """All of the default configs as the user's own: what they hide is a long line, and is shown."""
    configs = {file.name: file.read_text() for file in (REPO / "default-configs").glob("*.yaml")}
    served = daemon((), configs)
    listen = served.base_url.removeprefix("http://")
    for command in (["diff"], ["diff", "--json"], ["list", "--all", "--json"]):
        done = run(tmp_path, *command, "--listen", listen)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        assert len(done.stdout) > 100_000


def test_doctor_names_who_holds_the_port_that_was_asked_for(tmp_path: Path) -> None:
    """Not another one."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        listen = f"127.0.0.1:{one.getsockname()[1]}"
        threading.Thread(target=_hang_up, args=(one,), daemon=True).start()
        done = run(tmp_path, "doctor", "--listen", listen)
    assert f"{listen} is held by".encode() in done.stdout.replace(b"\n", b" ")


def _hang_up(one: socket.socket) -> None:
    """Accept and close: somebody is there who speaks no HTTP."""
    while True:
        try:
            one.accept()[0].close()
        except OSError:
            return


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_cannot_show(
    daemon: StartDaemon, tiny_llama: Path, tmp_path: Path, encoding: str
) -> None:
    """They are escaped."""
    file = tmp_path / "模型-ü.gguf"
    shutil.copyfile(tiny_llama, file)
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = run(tmp_path, "hash", file, **env)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert b"sha256:" in done.stdout
    served = daemon([file])
    done = run(tmp_path, "list", "--all", "--listen", served.base_url.removeprefix("http://"), **env)
    assert done.returncode == 0, done.stderr
    assert b"\\u6a21" in done.stdout


def test_the_demo_tells_of_an_error_in_the_answer(tmp_path: Path) -> None:
    """One sentence and status 1: here the model is a file that cannot be loaded."""
    folder = tmp_path / "demo"
    for name in ("models", "configs", "state"):
        (folder / name).mkdir(parents=True)
    config = "name: demo\nshas: ['*']\nmodel_names: [demo]\nctx_size: 2147483647\nparallel: 1\n"
    (folder / "configs" / "demo.yaml").write_text(config)
    done = run(tmp_path, "demo", "--once", "--folder", folder)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert (
        done.stderr.decode().strip().splitlines()[-1].startswith("localaid: ") or b"localaid: the daemon" in done.stderr
    )
