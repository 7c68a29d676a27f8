"""The installed unit in a real systemd: what contrib/systemd, contrib/install.sh and the daemon promise together.

One box is booted for the file, and localaid is installed into it by contrib/install.sh; each test starts from an
installed service without models, configs and drop-ins.  Where no box can be booted the tests say why and are skipped.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import pytest

from models import find_smollm2, write_tiny_llama
from systemd_box import Bind, BoxFailed, SystemdBox, why_no_box

REPO = Path(__file__).parent.parent
UNITS = REPO / "contrib" / "systemd"
TCP = ("127.0.0.1", 8080)
CONTROL = "/run/localaid/control.sock"
MODELS, CONFIGS = "/var/lib/localaid/models", "/etc/localaid/configs"
SETTINGS = "/etc/localaid/localaid.yaml"
DROP_INS = "/etc/systemd/system/localaid.service.d"
LIMIT_S = 60.0  # for what takes a second on a machine that has nothing else to do
SMALL = "load: {ctx_size: 2048, parallel: 4, threads: 1}\n"
LONG = 1500  # tokens of an answer that others can watch
PYTHON_ENVIRONMENT = "PYTHONUNBUFFERED=1 LD_LIBRARY_PATH=/opt/box/python/lib"  # a Python that finds its library there


FIND_OURS = "find /etc /usr /var /opt/localaid /run -name '*localaid*' 2>/dev/null || true"


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    body: str
    headers: dict[str, str]

    @property
    def text(self) -> str:
        """What the model said."""
        choices = json.loads(self.body)["choices"]
        return str(choices[0].get("text") or choices[0]["message"]["content"])


class Service:
    """The service in its box, as administrators and clients see it."""

    def __init__(self, box: SystemdBox) -> None:
        """Look at the service of `box`."""
        self.box = box
        self._cursor = ""

    # -- the administrator --

    def reset(self) -> None:
        """Make it a service that was just installed."""
        self.box.sh(
            f"""systemctl stop localaid.socket localaid-control.socket localaid.service
            rm -rf {MODELS}/* {CONFIGS}/* {DROP_INS} /var/cache/localaid/* /etc/credstore /etc/systemd/system/localaid*
            rm -rf /srv/kept /srv/none /srv/state /srv/staged /home/ann
            cp /opt/localaid/share/localaid/localaid.yaml {SETTINGS}"""
        )
        self.drop_in("python.conf", f"Environment={PYTHON_ENVIRONMENT}")
        self.box.run("systemctl", "reset-failed")
        self.settings("")
        self._cursor = re.findall(r"-- cursor: (.*)", self.box.run("journalctl", "-n1", "-o", "cat", "--show-cursor"))[
            0
        ]

    def drop_in(self, name: str, text: str) -> None:
        """Change the unit as `systemctl edit` does."""
        self.box.write(f"{DROP_INS}/{name}", f"[Service]\n{text}\n")
        self.box.run("systemctl", "daemon-reload")

    def settings(self, text: str) -> None:
        """Write localaid.yaml; small contexts, so that models load at once."""
        self.box.write(SETTINGS, SMALL + text)

    def config(self, name: str, text: str) -> None:
        """Write a config as an editor does: complete, by one rename."""
        self.box.write(f"{CONFIGS}/.{name}.partial", text)
        self.box.path(f"{CONFIGS}/.{name}.partial").rename(self.box.path(f"{CONFIGS}/{name}"))

    def place(self, source: str, name: str = "") -> None:
        """Drop a model."""
        self.box.run("cp", source, f"{MODELS}/{name}")

    def start(self) -> None:
        """Start it; returns when systemd says that it is there."""
        try:
            self.box.run("systemctl", "start", "localaid")
        except BoxFailed as error:
            raise BoxFailed(f"{error}\n{self.journal()}") from None

    @property
    def pid(self) -> int:
        """The daemon's process id inside the box."""
        return int(self.box.show("localaid", "MainPID"))

    @property
    def workers(self) -> list[int]:
        """The workers' process ids inside the box."""
        found = self.box.run("pgrep", "-P", str(self.pid), "-f", "localaid worker", check=False)
        return list(map(int, found.split()))

    @property
    def status(self) -> str:
        """What `systemctl status` shows behind "Status:"."""
        return self.box.show("localaid", "StatusText")

    def journal(self) -> str:
        """What the service, and systemd about it, have logged since `reset`."""
        return self.box.run("journalctl", "-o", "cat", f"--after-cursor={self._cursor}", "_PID=1", "+", "_UID=0", "+",
                            "_COMM=localaid", "+", "_SYSTEMD_UNIT=localaid.service")  # fmt: skip

    def until(self, holds: Callable[[], object], what: str = "") -> None:
        """Look again until something holds: systemd tells nobody outside of the box."""
        end = time.monotonic() + LIMIT_S
        while not holds():
            assert time.monotonic() < end, f"{what or holds}: {self.status}\n{self.journal()}"

    # -- a client --

    def ask(
        self,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        at: tuple[str, int] | str = TCP,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one request over a connection of its own."""
        with contextlib.closing(self.box.http(at)) as connection:
            data = None if body is None else json.dumps(body).encode()
            connection.request("GET" if data is None else "POST", path, data, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, answer.read().decode(), dict(answer.headers))

    def complete(self, model: str = "tiny", tokens: int = 4, **more: object) -> Answer:
        """Ask for a completion."""
        body = {"model": model, "prompt": "x", "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
        return self.ask("/v1/completions", body)

    def stream(self, model: str = "tiny", tokens: int = LONG) -> Stream:
        """Ask for a long answer and return when its first token is there."""
        return Stream(self.box, {"model": model, "prompt": "x", "max_tokens": tokens, "ignore_eos": True})

    def names(self) -> set[str]:
        """Return the names on /v1/models."""
        return {card["id"] for card in json.loads(self.ask("/v1/models").body)["data"]}


class Stream:
    """A streamed answer on its way."""

    def __init__(self, box: SystemdBox, body: dict[str, object], at: tuple[str, int] | str = TCP) -> None:
        """Ask, and wait for the first event."""
        self._connection = box.http(at)
        self._connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}).encode())
        self._answer = self._connection.getresponse()
        self.status = self._answer.status
        self._first = self._answer.readline()

    def rest(self) -> str:
        """Return the whole answer."""
        with contextlib.closing(self._connection):
            return (self._first + self._answer.read()).decode()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel of this source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    try:
        subprocess.run([*pip, "--no-build-isolation", f"--wheel-dir={folder}", REPO], check=True, capture_output=True)
    except subprocess.CalledProcessError:  # without hatchling here, pip fetches it
        subprocess.run([*pip, f"--wheel-dir={folder}", REPO], check=True)
    return next(folder.glob("*.whl"))


INSTALL = (
    "/srv/box/localaid/share/localaid/install.sh --python={python} --wheel=/srv/box/wheel/{wheel} "
    "--pip-option=--no-index --pip-option=--no-deps"
)


class Installed(NamedTuple):
    """A box with localaid in it."""

    box: SystemdBox
    install: str  # the command
    first: str  # what it said when it was first run, without starting anything
    before: frozenset[str]  # files of the machine that have its name


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """Boot a box and install localaid with what is in its wheel; its libraries are those of the tests."""
    reason = why_no_box()
    if reason is not None:
        pytest.skip(reason)
    unpacked, models = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("models")
    shutil.unpack_archive(wheel, unpacked, "zip")
    write_tiny_llama(models / "tiny.gguf")
    models.chmod(0o755)  # for other users of the box
    python = Path(sys.base_prefix)
    binds = [
        Bind(Path(sysconfig.get_path("purelib")), "/opt/box/site-packages"),
        Bind(python, "/opt/box/python"),  # a Python below a home could not be seen under ProtectHome=
        Bind(wheel.parent, "/srv/box/wheel"),
        Bind(next(unpacked.glob("*.data")) / "data", "/srv/box/localaid"),
        Bind(models, "/srv/box/models"),
        Bind(find_smollm2().parent, "/srv/box/smollm2"),
    ]
    box = SystemdBox(binds, dict(pair.split("=") for pair in PYTHON_ENVIRONMENT.split()))
    try:
        box.start()
    except BoxFailed as error:
        pytest.skip(f"no box can be booted here: {error}")
    try:
        version = f"python3.{sys.version_info.minor}"
        install = "sh " + INSTALL.format(python=f"/opt/box/python/bin/{version}", wheel=wheel.name)
        before = box.sh(FIND_OURS).split()
        first = box.sh(f"{install} --no-start")
        box.write(f"/opt/localaid/lib/{version}/site-packages/box.pth", "/opt/box/site-packages\n")
        yield Installed(box, install, first, frozenset(before))
        assert box.stop(), box.console
    finally:
        box.stop(force=True)


@pytest.fixture
def service(installed: Installed) -> Iterator[Service]:
    """Return the service, just installed and not started, with one model."""
    one = Service(installed.box)
    one.reset()
    one.place("/srv/box/models/tiny.gguf")
    yield one
    one.box.sh("systemctl stop localaid.socket localaid-control.socket localaid.service")
    assert one.box.run("pgrep", "-u", "localaid", check=False) == "", one.journal()


# -- start, and what it is told --


def test_start_returns_when_clients_can_ask(service: Service) -> None:
    """A real chat is answered at once; STATUS= says what is there."""
    service.place(f"/srv/box/smollm2/{find_smollm2().name}", "SmolLM2-135M-Instruct.gguf")
    service.start()
    question = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
    body = {"model": "smollm2-135m-instruct", "messages": [question], "temperature": 0}
    answer = service.ask("/v1/chat/completions", body)
    assert answer.status == HTTPStatus.OK, answer.body
    assert "Paris" in answer.text
    service.until(lambda: service.status == "2 models, SmolLM2-135M-Instruct loaded, 0 running, 0 waiting")


def test_what_another_user_drops_is_served(service: Service) -> None:
    """Who is in the group needs neither sudo nor a umask of 022, for models and configs; nobody else may."""
    service.box.sh("id ann || useradd --groups=localaid ann; id eve || useradd eve")
    service.start()
    service.box.sh(f"umask 077; cat /srv/box/models/tiny.gguf > {MODELS}/anns.gguf", user="ann")
    service.until(lambda: "anns" in service.names())
    service.box.sh(f"umask 077; echo 'name: by-ann\nshas: [anns.gguf]' > {CONFIGS}/ann.yaml", user="ann")
    service.until(lambda: "by-ann" in service.names())
    assert service.complete("by-ann").status == HTTPStatus.OK
    for folder in (MODELS, CONFIGS):
        with pytest.raises(BoxFailed, match="Permission denied"):
            service.box.sh(f"echo x > {folder}/eves.gguf", user="eve")


def test_status_follows_a_broken_and_a_mended_config(service: Service) -> None:
    """The last good one stays in force meanwhile."""
    service.config("a.yaml", "name: a\nshas: ['*']\n")
    service.start()
    service.config("a.yaml", "name: a2\nshas: ['*']\ntop_q: 1\n")
    error = f"config error in {CONFIGS}/a.yaml, using the last good one"
    service.until(lambda: error in service.status)
    assert service.complete("a").status == HTTPStatus.OK
    service.config("a.yaml", "name: a3\nshas: ['*']\n")
    service.until(lambda: "error" not in service.status)
    assert service.complete("a3").status == HTTPStatus.OK


def test_what_is_closed_for_a_while(service: Service) -> None:
    """Configs that may not be listed stay as they were; a model that may not be read is not offered."""
    service.config("a.yaml", "name: a\nshas: ['*']\n")
    service.start()
    service.box.run("chmod", "0", CONFIGS)
    service.until(lambda: f"cannot use {CONFIGS}" in service.status)
    assert service.complete("a").status == HTTPStatus.OK
    service.box.run("chmod", "2775", CONFIGS)
    service.until(lambda: "cannot use" not in service.status)
    service.config("a.yaml", "name: a2\nshas: ['*']\n")
    service.until(lambda: "a" not in service.names())
    model = service.box.run("sh", "-c", f"ls {MODELS}/*.gguf").strip()
    service.box.run("chmod", "0", model)
    service.until(lambda: "a2" not in service.names())
    assert "it cannot be read: Permission denied for user localaid" in service.ask("/localaid/status").body
    service.box.run("chmod", "644", model)
    service.until(lambda: "a2" in service.names())


def test_reload_takes_settings_and_loses_nothing(service: Service) -> None:
    """The process and its answers stay; a broken file changes nothing and is told of."""
    service.start()
    pid = service.pid
    running = service.stream()
    service.settings("queue_size: 7\n")
    service.box.run("systemctl", "reload", "localaid")
    service.until(lambda: "settings: queue_size: 64 -> 7" in service.journal())
    service.until(lambda: service.box.show("localaid", "SubState") == "running")
    service.settings("queue_sise: 7\n")
    service.box.run("systemctl", "reload", "localaid")
    service.until(lambda: f"error in {SETTINGS}, using the last good settings" in service.status)
    assert running.rest().endswith("data: [DONE]\n\n")
    assert service.pid == pid


def test_reload_waits_where_systemd_can(service: Service) -> None:
    """With the drop-in for 253 and newer."""
    version = int(service.box.run("systemctl", "--version").split()[1])
    if version < 253:
        pytest.skip(f"Type=notify-reload needs systemd 253, this is {version}")
    service.box.write(f"{DROP_INS}/notify-reload.conf", (UNITS / "notify-reload.conf").read_text())
    service.box.run("systemctl", "daemon-reload")
    service.start()
    service.settings("queue_size: 7\n")
    service.box.run("systemctl", "reload", "localaid")
    assert "settings: queue_size: 64 -> 7" in service.journal()


def test_folders_that_cannot_be_used_are_told_of_with_the_fix(service: Service) -> None:
    """The mode; the directive that hides; the directive that makes read-only; and each fix works."""
    service.box.sh("mkdir -p /home/ann/models /srv/kept /srv/state; chmod 755 /home/ann; chmod 700 /srv/kept")
    service.settings("models: [/home/ann/models, /srv/kept, /srv/none]\nstate: /srv/state\n")
    service.start()
    journal = service.journal()
    assert re.search(r"/home/ann/models: .*ProtectHome= of localaid.service hides it: .*ProtectHome=read-only", journal)
    assert re.search(r"/srv/kept: .*may not list it \(.* mode 0700.*\); chgrp localaid /srv/kept && chmod", journal)
    assert re.search(r"/srv/none: .*finds no such folder; make it: install -d", journal)
    assert re.search(r"/srv/state: .*ProtectSystem= of localaid.service: add ReadWritePaths=/srv/state", journal)
    assert "cannot use /srv/kept" in service.status
    service.drop_in("folders.conf", "ProtectHome=read-only\nReadWritePaths=/srv/state")
    service.box.sh("chgrp localaid /srv/kept /srv/state; chmod g+rwx /srv/kept /srv/state; mkdir /srv/none")
    service.box.run("systemctl", "restart", "localaid")
    assert "cannot use" not in service.status


def test_the_journal_has_priorities_and_the_doctor_looks_at_the_service(service: Service) -> None:
    """Errors are errors to journalctl; root's `localaid doctor` takes the unit's folders, as the unit's user."""

    def doctor() -> dict[str, dict[str, str]]:
        command = "/opt/localaid/bin/localaid doctor --json || true"
        return {one["check"]: one for one in json.loads(service.box.sh(command))}

    found = doctor()
    assert (found["service"]["state"], found["daemon"]["state"]) == ("warning", "warning")
    service.start()
    service.config("a.yaml", "name: a\nshas: ['*']\ntop_q: 1\n")
    service.until(lambda: "config error" in service.status)
    errors = service.box.run("journalctl", "-u", "localaid", "-p", "err", "-o", "cat")
    assert "top_q: unknown key" in errors
    assert "ready on" not in errors
    found = doctor()
    assert found["service"]["what"] == "localaid.service is active"
    assert found["models"]["state"] == found["settings"]["state"] == "ok"
    assert found["configs"]["what"].startswith("/etc/localaid/configs/a.yaml: top_q: unknown key")
    assert found["daemon"]["what"].startswith("/etc/localaid/configs/a.yaml: top_q: unknown key")
    service.box.sh("chmod 700 /var/lib/localaid/models; chown root:root /var/lib/localaid/models")
    command = "/opt/localaid/bin/localaid doctor || true"
    told = service.box.sh(command)
    service.box.sh("chmod 2775 /var/lib/localaid/models; chown localaid:localaid /var/lib/localaid/models")
    assert "/var/lib/localaid/models: user localaid may not list it" in told


# -- when something hangs or dies --


def test_a_stopped_daemon_is_restarted(service: Service) -> None:
    """By the watchdog: no answer, no signal handler, only SIGKILL helps."""
    service.drop_in("watchdog.conf", "WatchdogSec=2\nTimeoutAbortSec=1")
    service.start()
    assert service.complete().status == HTTPStatus.OK
    pid = service.pid
    service.box.run("kill", "-STOP", str(pid))
    service.until(lambda: service.pid not in {0, pid} and service.box.show("localaid", "ActiveState") == "active")
    assert "Watchdog timeout" in service.journal()
    assert service.complete().status == HTTPStatus.OK


def test_a_daemon_that_only_works_is_left_alone(service: Service) -> None:
    """The watchdog is fed while it loads, answers, and waits."""
    service.drop_in("watchdog.conf", "WatchdogSec=2")
    service.start()
    fed: set[str] = set()
    while len(fed) < 4:
        assert service.complete().status == HTTPStatus.OK
        fed.add(service.box.show("localaid", "WatchdogTimestampMonotonic"))
    assert service.box.show("localaid", "NRestarts") == "0"


def test_a_hung_worker_is_replaced_alone(service: Service) -> None:
    """Its request gets a clear error; the daemon, and the other model, go on."""
    service.place("/srv/box/models/tiny.gguf", "other.gguf")
    service.config("other.yaml", "name: other\nshas: [other.gguf]\nload: {ctx_size: 1024}\n")
    service.settings("stall: 1s\n")
    service.start()
    pid = service.pid
    assert service.complete("other").status == HTTPStatus.OK
    others = service.workers
    hanging = service.stream()
    (worker,) = set(service.workers) - set(others)
    service.box.run("kill", "-STOP", str(worker))
    assert "said nothing of its 1 requests for 1 s" in hanging.rest()
    assert service.complete().status == HTTPStatus.OK
    assert service.pid == pid
    assert set(others) < set(service.workers)
    assert worker not in service.workers


def test_a_killed_worker_is_not_the_end(service: Service) -> None:
    """As when the kernel's OOM killer chose it: the error says so, the next request gets a new worker."""
    service.start()
    pid = service.pid
    running = service.stream()
    service.box.run("kill", "-KILL", *map(str, service.workers))
    assert "was killed by SIGKILL" in running.rest()
    assert service.complete().status == HTTPStatus.OK
    assert (service.pid, service.box.show("localaid", "NRestarts")) == (pid, "0")
    assert service.box.show("localaid", "OOMPolicy") == "continue"


def test_a_killed_daemon_comes_back_as_it_was(service: Service) -> None:
    """Folders and caches are all the state; no worker of the old one is left."""
    service.config("a.yaml", "name: a\nshas: ['*']\n")
    service.start()
    assert service.complete("a").status == HTTPStatus.OK
    before, pid, workers = service.ask("/v1/models").body.replace('"loaded"', '"ready"'), service.pid, service.workers
    service.box.run("kill", "-KILL", str(pid))
    service.until(lambda: service.pid not in {0, pid} and service.box.show("localaid", "ActiveState") == "active")
    assert service.ask("/v1/models").body == before
    assert not set(workers) & set(service.workers)
    assert service.complete("a").status == HTTPStatus.OK


# -- sockets --


def test_the_first_connection_starts_it(service: Service) -> None:
    """A client that connects before there is a daemon just waits; `listen` is not used then, and that is said."""
    service.box.run("systemctl", "start", "localaid.socket", "localaid-control.socket")
    assert service.box.show("localaid", "ActiveState") == "inactive"
    assert service.complete().status == HTTPStatus.OK
    assert "the setting `listen` (127.0.0.1:8080) is not used" in service.journal()
    status = json.loads(service.ask("/localaid/status", at=CONTROL).body)
    assert status["listen"] == ["http://127.0.0.1:8080"]


def test_the_control_socket_starts_it_and_outlives_it(service: Service) -> None:
    """Its path stays when the service stops, and the next question starts it again."""
    service.box.run("systemctl", "start", "localaid-control.socket")
    for _ in range(2):
        assert json.loads(service.ask("/localaid/status", at=CONTROL).body)["models"] == 1
        service.box.run("systemctl", "stop", "localaid.service")
    service.box.run("systemctl", "stop", "localaid-control.socket")
    assert not service.box.path(CONTROL).exists()


def test_several_sockets_of_each_name(service: Service) -> None:
    """Addresses of a drop-in are served as those of the unit are."""
    more = "[Socket]\nListenStream=127.0.0.1:8081\nListenStream=/run/localaid-http\n"
    service.box.write("/etc/systemd/system/localaid.socket.d/more.conf", more)
    service.box.sh("systemctl daemon-reload; systemctl start localaid.socket")
    for address in (TCP, ("127.0.0.1", 8081), "/run/localaid-http"):
        assert service.ask("/healthz", at=address).body == "ok\n"


@pytest.mark.parametrize(
    ("socket", "message"),
    [
        ("ListenStream=0.0.0.0:8080", "will not listen on 0.0.0.0:8080, which others can reach, without API keys"),
        ("FileDescriptorName=web", "cannot use the socket 'web' that systemd has passed: it has an unknown name"),
        ("ListenDatagram=/run/localaid-datagrams", "cannot use the socket 'http' that systemd has passed: it does not"),
    ],
)
def test_sockets_that_it_does_not_take(service: Service, socket: str, message: str) -> None:
    """It says why, and what to do."""
    service.box.write("/etc/systemd/system/localaid.socket.d/wrong.conf", f"[Socket]\nListenStream=\n{socket}\n")
    if socket.startswith("File"):
        service.box.write("/etc/systemd/system/localaid.socket.d/wrong.conf", f"[Socket]\n{socket}\n")
    service.drop_in("once.conf", "Restart=no")
    service.box.sh("systemctl daemon-reload; systemctl start localaid.socket")
    with pytest.raises(BoxFailed):
        service.start()
    assert message in service.journal()


def test_no_connection_is_refused_over_fifty_restarts_under_load(service: Service) -> None:
    """With a socket of systemd's every request is answered: with what it asked for, or with 503 and when to come."""
    service.drop_in("limit.conf", "StartLimitIntervalSec=0")
    service.box.write("/etc/systemd/system/localaid.service.d/limit.conf", "[Unit]\nStartLimitIntervalSec=0\n")
    service.box.sh("systemctl daemon-reload; systemctl start localaid.socket localaid.service")
    done = threading.Event()
    served = threading.Event()  # since the last restart
    answers: list[Answer] = []
    failures: list[Exception] = []

    def ask() -> None:
        while not done.is_set():
            try:
                answers.append(service.complete(tokens=8))
                if answers[-1].status == HTTPStatus.OK:
                    served.set()
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                failures.append(error)

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        for _ in range(50):
            served.clear()
            service.box.run("systemctl", "restart", "localaid.service")
            assert served.wait(LIMIT_S)
    finally:
        done.set()
        for client in clients:
            client.join()
    assert failures == []
    assert {answer.status for answer in answers} <= {HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE}
    refused = [answer for answer in answers if answer.status != HTTPStatus.OK]
    assert all(answer.headers["Retry-After"] for answer in refused)
    assert len(answers) - len(refused) >= 50


# -- the end --


def test_stop_under_load_loses_no_started_answer(service: Service) -> None:
    """Answers that have begun come to their end; who asks meanwhile is told to come again; exit status 0."""
    service.start()
    running = [service.stream() for _ in range(4)]
    stopping = threading.Thread(target=service.box.run, args=("systemctl", "stop", "localaid"))
    stopping.start()
    service.until(lambda: service.status.startswith("stopping"))
    refused = service.complete()
    assert refused.status == HTTPStatus.SERVICE_UNAVAILABLE, refused.body
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.headers["Connection"] == "close"
    assert service.ask("/readyz").status == HTTPStatus.SERVICE_UNAVAILABLE
    for stream in running:
        answer = stream.rest()
        assert answer.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in answer
    stopping.join()
    assert service.box.show("localaid", "Result") == "success"
    assert service.box.show("localaid", "ExecMainStatus") == "0"


def test_a_drain_is_bounded(service: Service) -> None:
    """By the setting, also where that is more than the unit's TimeoutStopSec."""
    service.settings("drain: 1s\n")
    service.drop_in("stop.conf", "TimeoutStopSec=500ms")
    service.start()
    running = service.stream(tokens=2000)
    worker = service.workers
    service.box.run("kill", "-STOP", *map(str, worker))
    service.box.run("systemctl", "stop", "localaid")
    running.rest()
    assert service.box.show("localaid", "Result") == "success", service.journal()


def test_nothing_is_left_behind(service: Service) -> None:
    """No process, socket, temporary file or cgroup."""
    service.start()
    assert service.complete().status == HTTPStatus.OK
    service.box.run("systemctl", "stop", "localaid")
    assert service.box.run("pgrep", "-u", "localaid", check=False) == ""
    left = service.box.sh("find /etc /var /usr/local /opt/localaid /home /run /tmp /dev/shm -user localaid")
    made = {"/var/lib/localaid", MODELS, "/var/cache/localaid", "/run/localaid"}
    assert {path for path in left.split() if not path.startswith("/var/cache/localaid/")} <= made
    assert not service.box.path("/sys/fs/cgroup/system.slice/localaid.service").exists()


# -- credentials --


def test_api_keys_come_as_a_credential(service: Service) -> None:
    """From /etc/credstore, readable by root only; the group asks over the control socket without one."""
    service.box.sh("id ann || useradd --groups=localaid ann; id eve || useradd eve")
    service.box.sh("install -d -m 700 /etc/credstore; install -m 600 /dev/null /etc/credstore/api-keys")
    service.box.path("/etc/credstore/api-keys").write_text("app:sk-secret-of-the-app\n")
    service.start()
    assert service.complete().status == HTTPStatus.UNAUTHORIZED
    assert service.ask("/localaid/status").status == HTTPStatus.UNAUTHORIZED
    key = {"Authorization": "Bearer sk-secret-of-the-app"}
    assert service.ask("/v1/models", headers=key).status == HTTPStatus.OK
    script = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('" + CONTROL + "');"
        "s.sendall(b'GET /localaid/explain?path=v1/chat&name=tiny HTTP/1.0\\r\\n\\r\\n'); print(s.recv(99).decode())"
    )
    python = f"/opt/box/python/bin/python3.{sys.version_info.minor}"
    assert "200 OK" in service.box.run(python, "-c", script, user="ann")
    with pytest.raises(BoxFailed, match="PermissionError"):
        service.box.run(python, "-c", script, user="eve")
    models = script.replace("/localaid/explain?path=v1/chat&name=tiny", "/v1/models")
    assert "401" in service.box.run(python, "-c", models, user="ann")
    program = ("env", "HOME=/tmp", "/opt/localaid/bin/localaid")
    for command, told in (("status", "1 model"), ("list", "tiny.gguf"), ("explain v1/chat tiny", "tiny.gguf")):
        assert told in service.box.run(*program, *command.split(), user="ann")
    with pytest.raises(BoxFailed, match="usermod -aG localaid eve"):
        service.box.run(*program, "status", user="eve")


# -- the sandbox --

PROBE = r"""
import ctypes, errno, json, mmap, os, socket
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
def tried(act):
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
def call(name, *arguments):
    def act():
        if getattr(libc, name)(*arguments) == -1:
            raise OSError(ctypes.get_errno(), name)
    return tried(act)
def writes(path):
    return tried(lambda: Path(path, "localaid-probe").touch())
status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
Path("/var/cache/localaid/probe.set").touch()
limits = {line[:26].strip(): line[26:47].strip() for line in Path("/proc/self/limits").read_text().splitlines()}
found = {
    "writes": {path: writes(path) for path in ("/usr", "/etc/localaid", "/srv", "/var/lib/localaid/models",
        "/var/cache/localaid", "/run/localaid", "/tmp")},
    "home": tried(lambda: os.listdir("/home")),
    "root": tried(lambda: os.listdir("/root")),
    "tmp": sorted(name for name in os.listdir("/tmp") if name != "localaid-probe"),
    "capabilities": [status[name] for name in ("CapEff", "CapBnd", "CapAmb", "CapPrm")],
    "no_new_privileges": status["NoNewPrivs"],
    "seccomp": status["Seccomp"],
    "umask": status["Umask"],
    "user": [os.getuid(), os.getgid()],
    "users": Path("/proc/self/uid_map").read_text().split(),
    "processes": tried(lambda: os.listdir("/proc/1")),
    "meminfo": Path("/proc/meminfo").exists(),
    "suid": tried(lambda: os.chmod("/var/cache/localaid/probe.set", 0o4755)),
    "device": os.path.exists("/dev/kmsg") or os.path.exists("/dev/tty0") or os.path.exists("/dev/kvm"),
    "mknod": tried(lambda: os.mknod("/var/cache/localaid/null", 0o020666, os.makedev(1, 8))),
    "cgroup": tried(lambda: Path("/sys/fs/cgroup/probe").mkdir()),
    "tunable": tried(lambda: Path("/proc/sys/kernel/core_pattern").write_text("x")),
    "hostname": call("sethostname", b"x", 1),
    "clock": call("settimeofday", (ctypes.c_long * 2)(0, 0), None),
    "log": call("klogctl", 3, ctypes.create_string_buffer(9), 9),
    "module": call("syscall", 313, -1, b"", 0),
    "namespace": call("unshare", 0x10000000),
    "mount": call("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    "realtime": tried(lambda: os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))),
    "personality": call("personality", 0x0004000),
    "executable": tried(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)),
    "affinity": tried(lambda: os.sched_setaffinity(0, {0})),
    "netlink": tried(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)),
    "inet": tried(lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM)),
    "files": limits["Max open files"],
    "locked": limits["Max locked memory"],
    "credential": os.environ.get("CREDENTIALS_DIRECTORY", ""),
}
Path("/var/cache/localaid/probe.json").write_text(json.dumps(found))
"""
DENIED = {"EPERM", "EACCES", "EROFS"}


def test_the_sandbox_holds(service: Service) -> None:
    """What a program in the place of the daemon may, and may not."""
    service.box.write("/srv/probe.py", PROBE)
    service.box.sh("touch /tmp/of-another; install -D /dev/null /etc/credstore/api-keys")
    service.drop_in("probe.conf", f"ExecStartPre=/opt/box/python/bin/python3.{sys.version_info.minor} /srv/probe.py")
    service.box.path("/etc/credstore/api-keys").write_text("app:sk-1234567890123456\n")
    service.start()
    found = json.loads(service.box.path("/var/cache/localaid/probe.json").read_text())
    places = found["writes"]
    assert {path for path, outcome in places.items() if outcome == "done"} == {
        *("/var/lib/localaid/models", "/var/cache/localaid", "/run/localaid", "/tmp"),  # noqa: S108 - of its own
    }
    for name in (
        *("home", "root", "suid", "mknod", "cgroup", "tunable", "hostname", "clock", "log", "module", "namespace"),
        *("mount", "realtime", "personality", "executable", "affinity"),
    ):
        assert found[name] in DENIED, name
    assert found["netlink"] == "EAFNOSUPPORT"
    assert found["inet"] == "done"
    assert found["processes"] == "ENOENT"
    assert found["meminfo"]
    assert found["tmp"] == []
    assert not found["device"]
    assert {int(mask, 16) for mask in found["capabilities"]} == {0}
    assert (found["no_new_privileges"], found["seccomp"], found["umask"]) == ("1", "2", "0027")
    assert found["user"] == [int(service.box.run("id", "-u", "localaid")), int(service.box.run("id", "-g", "localaid"))]
    assert found["users"][2] == "1"  # this user alone, not the machine's four thousand million
    assert found["credential"].endswith("/localaid.service")
    ours = service.box.sh("grep locked /proc/self/limits").split()[4]
    assert found["locked"] in {"unlimited", ours}  # no more than the box itself has


# directive -> the test that sees it work, or why there is none
DIRECTIVES = {
    "Description": "shown by systemctl",
    "Documentation": "shown by systemctl",
    "Wants": "test_units_are_what_is_installed",
    "After": "test_units_are_what_is_installed",
    "Type": "test_start_returns_when_clients_can_ask",
    "NotifyAccess": "test_start_returns_when_clients_can_ask",
    "ExecStart": "test_start_returns_when_clients_can_ask",
    "ExecReload": "test_reload_takes_settings_and_loses_nothing",
    "TimeoutStartSec": "a limit that is reached by no test: it would take its time",
    "TimeoutStopSec": "test_a_drain_is_bounded",
    "WatchdogSec": "test_a_stopped_daemon_is_restarted",
    "TimeoutAbortSec": "test_a_stopped_daemon_is_restarted",
    "Restart": "test_a_killed_daemon_comes_back_as_it_was",
    "RestartSec": "test_a_killed_daemon_comes_back_as_it_was",
    "KillMode": "test_stop_under_load_loses_no_started_answer",
    "OOMPolicy": "test_a_killed_worker_is_not_the_end",
    "OOMScoreAdjust": "test_units_are_what_is_installed",
    "User": "test_the_sandbox_holds",
    "Group": "test_the_sandbox_holds",
    "StateDirectory": "test_the_sandbox_holds",
    "StateDirectoryMode": "test_what_another_user_drops_is_served",
    "ConfigurationDirectory": "test_the_sandbox_holds",
    "CacheDirectory": "test_the_sandbox_holds",
    "CacheDirectoryMode": "test_units_are_what_is_installed",
    "RuntimeDirectory": "test_the_sandbox_holds",
    "RuntimeDirectoryPreserve": "test_the_control_socket_starts_it_and_outlives_it",
    "LoadCredential": "test_api_keys_come_as_a_credential",
    "LimitNOFILE": "test_units_are_what_is_installed",
    "LimitMEMLOCK": "test_the_sandbox_holds",
    **dict.fromkeys(
        """ProtectSystem ProtectHome PrivateTmp UMask RestrictSUIDSGID CapabilityBoundingSet AmbientCapabilities
        NoNewPrivileges PrivateUsers ProtectProc PrivateDevices DevicePolicy ProtectClock ProtectControlGroups
        ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables RestrictNamespaces RestrictRealtime
        LockPersonality MemoryDenyWriteExecute SystemCallFilter SystemCallErrorNumber
        RestrictAddressFamilies""".split(),
        "test_the_sandbox_holds",
    ),
    "PrivateMounts": "says what ProtectSystem= does anyway",
    "RemoveIPC": "localaid makes no SysV IPC that could be left",
    "SystemCallArchitectures": "needs a program for another processor to be seen",
    "WantedBy": "test_install_is_idempotent_and_uninstall_keeps_what_is_yours",
    "ListenStream": "test_the_first_connection_starts_it",
    "FileDescriptorName": "test_the_first_connection_starts_it",
    "Backlog": "test_no_connection_is_refused_over_fifty_restarts_under_load",
    "NoDelay": "only time would show it",
    "Service": "test_the_control_socket_starts_it_and_outlives_it",
    "SocketGroup": "test_units_are_what_is_installed",
    "SocketMode": "test_units_are_what_is_installed",
    "DirectoryMode": "the folder is there before the socket",
    "RemoveOnStop": "test_the_control_socket_starts_it_and_outlives_it",
    "DeviceAllow": "test_the_gpu_drop_in_starts_and_opens_just_that",
    "SupplementaryGroups": "test_the_gpu_drop_in_starts_and_opens_just_that",
    "Environment": "test_the_gpu_drop_in_starts_and_opens_just_that",
}


def test_every_directive_is_exercised_or_justified() -> None:
    """A directive that is added needs a test, or a reason."""
    used = {key for file in UNITS.iterdir() for key in re.findall(r"^(\w+)=", file.read_text(), re.MULTILINE)}
    assert used == DIRECTIVES.keys()
    assert [name for name in DIRECTIVES.values() if name.startswith("test_") and name not in globals()] == []


def test_units_are_what_is_installed(service: Service) -> None:
    """Nothing to complain of for systemd-analyze, exposure 1.5 at most, and values that only a look can check."""
    units = "localaid.service localaid.socket localaid-control.socket"
    assert service.box.sh(f"systemd-analyze verify --recursive-errors=yes {units}") == ""
    service.box.sh(
        "systemd-analyze security --offline=yes --threshold=15 /usr/local/lib/systemd/system/localaid.service"
    )
    shown = {
        "OOMScoreAdjust": "-200",
        "LimitNOFILE": "65536",
        "LimitMEMLOCK": "infinity",
        "StateDirectoryMode": "2775",
        "CacheDirectoryMode": "0750",
    }
    assert {name: service.box.show("localaid", name) for name in shown} == shown
    assert {"network-online.target", "remote-fs.target"} <= set(service.box.show("localaid", "After").split())
    service.start()
    stat = "stat -c '%a %U:%G' /var/lib/localaid /var/cache/localaid /run/localaid/control.sock"
    assert service.box.sh(stat).splitlines() == [
        "2775 localaid:localaid",
        "750 localaid:localaid",
        "660 localaid:localaid",
    ]
    assert service.complete().status == HTTPStatus.OK
    scores = [
        int(service.box.path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (service.pid, *service.workers)
    ]
    assert scores[0] <= 0 < scores[1] == 500
    service.box.run("systemctl", "stop", "localaid")
    service.box.run("systemctl", "start", "localaid-control.socket")
    assert service.box.sh(f"stat -c '%a %U:%G' {CONTROL}") == "660 root:localaid\n"


def test_the_gpu_drop_in_starts_and_opens_just_that(service: Service) -> None:
    """Without a card here it is a service like any other; its devices, groups and memory are as the drop-in says."""
    service.box.sh("groupadd -f --system render; groupadd -f --system video")
    service.box.write(f"{DROP_INS}/gpu.conf", (UNITS / "gpu.conf").read_text())
    service.box.run("systemctl", "daemon-reload")
    service.start()
    assert service.complete().status == HTTPStatus.OK
    groups = service.box.run("ps", "-o", "supgrp=", "-p", str(service.pid)).strip().split(",")
    assert {"render", "video"} <= set(groups)
    assert "char-kfd rw" in service.box.show("localaid", "DeviceAllow")
    assert service.box.show("localaid", "DevicePolicy") == "closed"
    assert "CUDA_CACHE_PATH=/var/cache/localaid/cuda" in service.box.show("localaid", "Environment")
    assert service.box.sh("systemd-analyze verify --recursive-errors=yes localaid.service") == ""


# -- the installer --


def test_install_is_idempotent_and_uninstall_keeps_what_is_yours(installed: Installed, service: Service) -> None:
    """Run again it changes nothing of yours and starts the service; taken away, only models and configs stay."""
    assert "systemctl enable --now localaid" in installed.first
    service.settings("queue_size: 9\n")
    service.config("mine.yaml", "name: mine\nshas: ['*']\n")
    again = service.box.sh(installed.install)
    assert re.search(r"localaid runs: 1 model, .*0 running, 0 waiting", again)
    once = service.box.sh("find /opt/localaid /usr/local/lib/systemd /etc/localaid -printf '%p %m %l\n' | sort")
    assert service.box.show("localaid", "UnitFileState") == "enabled"
    assert "mine" in service.names()
    assert "localaid runs: " in service.box.sh(f"{installed.install} --socket")
    assert service.box.sh("find /opt/localaid /usr/local/lib/systemd /etc/localaid -printf '%p %m %l\n' | sort") == once
    assert service.box.show("localaid.socket", "UnitFileState") == "enabled"
    assert service.complete("mine").status == HTTPStatus.OK
    assert service.box.run("localaid", "--version").startswith("localaid ")
    gone = service.box.sh(f"{installed.install} --uninstall")
    assert "models" in gone
    try:
        assert service.box.run("systemctl", "cat", "localaid", check=False).startswith("No files found")
        left = set(service.box.sh(FIND_OURS).split())
        kept = {"/var/lib/localaid", "/etc/localaid", SETTINGS}
        assert left - {DROP_INS} - installed.before == kept
        assert "queue_size: 9" in service.box.path(SETTINGS).read_text()
        assert service.box.path(f"{CONFIGS}/mine.yaml").exists()
        assert service.box.path(f"{MODELS}/tiny.gguf").exists()
    finally:
        service.box.sh(f"{installed.install} --no-start")
        site_packages = f"/opt/localaid/lib/python3.{sys.version_info.minor}/site-packages"
        service.box.write(f"{site_packages}/box.pth", "/opt/box/site-packages\n")


@pytest.mark.parametrize(
    "arguments", ["--frobnicate", "--wheel", "--prefix=relative", "--prefix=/usr", "--python=/bin/false"]
)
def test_install_says_what_it_does_not_take(installed: Installed, arguments: str) -> None:
    """Before it has changed anything."""
    said = installed.box.sh(f"{installed.install} {arguments}; true", check=False)
    assert said.startswith("install.sh: "), said
    assert "installing" not in said
    assert not installed.box.path("/usr/pyvenv.cfg").exists()


def test_install_lays_out_a_package(installed: Installed) -> None:
    """--destdir: everything below it, nothing of the machine, and scripts that run from where they will be."""
    installed.box.sh(f"{installed.install} --destdir=/srv/staged --prefix=/usr/lib/localaid")
    staged = installed.box.path("/srv/staged")
    unit = (staged / "usr/local/lib/systemd/system/localaid.service").read_text()
    assert "ExecStart=/usr/lib/localaid/bin/localaid serve" in unit
    assert "/srv/staged" not in (staged / "usr/lib/localaid/bin/localaid").read_text()
    assert not installed.box.path("/usr/lib/localaid").exists()
