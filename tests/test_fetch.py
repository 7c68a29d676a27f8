"""FETCH: default configs from a real web server with real faults; what is in force is always one whole set."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import errno
import hashlib
import ipaddress
import json
import logging
import os
import random
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import cast

import aiohttp
import msgspec
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import localaid
from channel_server import (
    MADE_AT,
    ONE,
    Fault,
    WebFolder,
    answer,
    config,
    cut,
    give,
    hold,
    key_of,
    pack,
    pour,
    redirect,
    run,
    trickle,
)
from conftest import PROGRAM, Daemon, StartDaemon
from localaid import (
    INDEX_FILE,
    SIGNATURE_FILE,
    Channel,
    ChannelReport,
    ChannelStatus,
    ChannelStore,
    ConfigErrors,
    ConfigLayers,
    DaemonStatus,
    Diff,
    Explanation,
    FetchLimits,
    Folders,
    FolderWatch,
    NoChannels,
    UpdateBusy,
    Updater,
    UpdateReport,
    Updates,
    find_below,
    hold_lock,
    parse_settings,
    render_report,
)

PATIENT_S = 60.0
IMPATIENT = FetchLimits(connect_s=2.0, silent_s=0.3, patience_s=0.3, rate=1e6, total_s=10.0)
KEY = key_of()


TWO = {"a.yaml": config("a", 2), "c.yaml": config("c")}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[WebFolder]:
    """A channel whose first set is published."""
    async with WebFolder(tmp_path / "web") as one:
        one.publish(ONE)
        yield one


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no proxy of this machine stand between."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def layer_of(state: Path) -> dict[str, str]:
    """Return the fetched layer: path of each config and template -> content."""
    layer = state / "default-configs"
    files = {Path(file) for file in find_below(layer)}
    files |= {near for file in files for near in file.parent.glob("*.jinja")}
    return {str(file.relative_to(layer)): file.read_text() for file in sorted(files)}


def as_layer(files: Mapping[str, str], name: str = "01-main") -> dict[str, str]:
    """Return what the fetched layer is when a set is in force."""
    return {f"{name}/{path}": text for path, text in files.items()}


async def update(updater: Updater, *, dry_run: bool = False) -> ChannelReport:
    """Update a single channel."""
    (report,) = (await updater.update(dry_run=dry_run)).channels
    return report


def status_of(updater: Updater) -> ChannelStatus:
    """Return the status of a single channel."""
    (status,) = updater.statuses()
    return status


def left_over(state: Path, server: WebFolder) -> set[str]:
    """Return what lies in a channel's folder beside the set in force."""
    folder = ChannelStore(state, server.channel()).folder
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    return there - {"current", "checked.json", (folder / "current").resolve().name}


async def turn_until(check: Callable[[], bool]) -> None:
    """Let the event loop turn until that is so."""
    async with asyncio.timeout(PATIENT_S):
        while not check():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0)


# -- what goes well --


async def test_a_set_comes_into_force_and_the_next_one_replaces_it(server: WebFolder, tmp_path: Path) -> None:
    """Every file, in folders too; what is gone is gone."""
    updater = Updater(tmp_path, server.updates())
    assert (status_of(updater).state, status_of(updater).serial) == ("waiting", None)
    report = await update(updater)
    assert (report.result, report.serial_before, report.serial) == ("updated", None, 1)
    assert set(report.added) == set(ONE)
    assert layer_of(tmp_path) == as_layer(ONE)
    server.publish(TWO)
    report = await update(updater)
    assert (report.serial_before, report.serial, report.made_at) == (1, 2, MADE_AT)
    assert (report.added, report.changed) == (("c.yaml",), ("a.yaml",))
    assert set(report.removed) == {"b/b.yaml", "b/b.jinja"}
    assert layer_of(tmp_path) == as_layer(TWO)
    status = status_of(updater)
    assert (status.state, status.serial, status.files, status.failures) == ("ok", 2, 2, 0)
    assert status.made_at == MADE_AT.timestamp()


async def test_what_has_not_changed_is_not_fetched(server: WebFolder, tmp_path: Path) -> None:
    """An unchanged index is a 304; of a new one only those files come that no file has the SHA of."""
    updater = Updater(tmp_path, server.updates())
    await update(updater)
    assert server.paths == [INDEX_FILE, SIGNATURE_FILE, "a.yaml", "b/b.jinja", "b/b.yaml"]
    report = await update(updater)
    assert (report.result, report.serial) == ("unchanged", 1)
    assert "If-None-Match" in server.asked[0][1]
    assert "If-Modified-Since" in server.asked[0][1]
    assert (server.paths, server.statuses[-1]) == ([INDEX_FILE], 304)
    server.publish({**ONE, "moved.yaml": ONE["a.yaml"], "a.yaml": config("other")})
    report = await update(updater)
    assert (server.paths, report.changed) == ([INDEX_FILE, SIGNATURE_FILE, "a.yaml"], ("a.yaml",))
    assert layer_of(tmp_path)["01-main/moved.yaml"] == ONE["a.yaml"]


async def test_a_server_that_knows_no_conditions(server: WebFolder, tmp_path: Path) -> None:
    """An index that is the same is not verified again."""
    server.has_validators = False
    updater = Updater(tmp_path, server.updates())
    await update(updater)
    server.asked.clear()
    assert (await update(updater)).result == "unchanged"
    assert server.paths == [INDEX_FILE]


async def test_a_restart_asks_under_the_same_condition(server: WebFolder, tmp_path: Path) -> None:
    """What is in force is known from the folder."""
    await update(Updater(tmp_path, server.updates()))
    server.asked.clear()
    updater = Updater(tmp_path, server.updates())
    assert (await update(updater)).result == "unchanged"
    assert (server.paths, status_of(updater).serial) == ([INDEX_FILE], 1)


async def test_a_dry_run_changes_nothing(server: WebFolder, tmp_path: Path) -> None:
    """It says what would be."""
    updater = Updater(tmp_path / "state", server.updates())
    report = await update(updater, dry_run=True)
    assert (report.result, report.serial_before, report.serial) == ("pending", None, 1)
    assert not (tmp_path / "state").exists()
    text, counts = render_report(report, whole=True), "3 files added, 0 changed, 0 removed"
    assert text.splitlines() == [
        "channel main: would go from nothing to serial 1, made 2026-01-05 12:00 UTC: " + counts,
        "  + a.yaml",
        "  + b/b.jinja",
        "  + b/b.yaml",
    ]


async def test_a_set_that_was_damaged_on_disk_is_mended(server: WebFolder, tmp_path: Path) -> None:
    """Though the server has nothing new; only what is lost comes again."""
    updater = Updater(tmp_path, server.updates())
    await update(updater)
    (tmp_path / "default-configs" / "01-main" / "a.yaml").write_text("x")
    server.asked.clear()
    assert (await update(updater)).result == "updated"
    assert server.paths == [INDEX_FILE, SIGNATURE_FILE, "a.yaml"]
    assert layer_of(tmp_path) == as_layer(ONE)
    (tmp_path / "default-configs" / "01-main" / INDEX_FILE).write_text("x")
    assert (await update(updater)).result == "updated"
    assert layer_of(tmp_path) == as_layer(ONE)


async def test_an_empty_set_takes_everything_back(server: WebFolder, tmp_path: Path) -> None:
    """It is a set like any other."""
    updater = Updater(tmp_path, server.updates())
    await update(updater)
    document = {"format": 1, "serial": 2, "made_at": "2026-01-05T12:00:00Z", "files": []}
    server.sign(json.dumps(document).encode())
    preview = await updater.preview()
    assert list(preview.configs.values()) == [{}]
    assert (await update(updater)).serial == 2
    assert layer_of(tmp_path) == {}


# -- what goes wrong: the last good set stays, and is told of --


def signed(change: Callable[[dict[str, object]], object]) -> Callable[[WebFolder], None]:
    """Return what signs an index that differs from the one that is published."""

    def apply(server: WebFolder) -> None:
        document = json.loads((server.folder / INDEX_FILE).read_bytes())
        change(document)
        server.sign(json.dumps(document).encode())

    return apply


def faulty(path: str, fault: Fault) -> Callable[[WebFolder], None]:
    """Return what makes a server faulty."""
    return lambda server: server.faults.update({path: fault})


def sign_with_another_key(server: WebFolder) -> None:
    """Sign what is published with another key."""
    server.sign((server.folder / INDEX_FILE).read_bytes(), key_of(2))


def sign_with_another_key_of_this_id(server: WebFolder) -> None:
    """Sign what is published with a key that looks like the right one."""
    other = key_of(2)
    other = msgspec.structs.replace(other, public=other.public._replace(key_id=KEY.public.key_id))
    server.sign((server.folder / INDEX_FILE).read_bytes(), other)


def with_file(path: str, text: str) -> Callable[[WebFolder], None]:
    """Return what signs a file as it is, right or wrong."""

    def apply(server: WebFolder) -> None:
        (server.folder / path).write_text(text)
        entry = {"path": path, "size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        signed(lambda index: cast("list[object]", index["files"]).append(entry))(server)

    return apply


def with_entry(index: dict[str, object], path: str) -> None:
    """List an empty file, whatever its path."""
    cast("list[object]", index["files"]).append({"path": path, "size": 0, "sha256": hashlib.sha256().hexdigest()})


def with_wrong_template(server: WebFolder) -> None:
    """Sign a template that cannot be compiled."""
    with_file("x.jinja", "{% if %}")(server)
    with_file("x.yaml", config("x") + "template: {chat: x.jinja}\n")(server)


FAULTS: dict[str, tuple[Callable[[WebFolder], None], str]] = {
    "no index": (faulty(INDEX_FILE, answer(404)), "index.json answers with status 404; what is in force stays"),
    "server error": (faulty(INDEX_FILE, answer(500)), "answers with status 500"),
    "not modified, unasked": (faulty("a.yaml", answer(304)), "a.yaml answers with status 304"),
    "no signature": (faulty(SIGNATURE_FILE, answer(404)), "index.json.minisig answers with status 404"),
    "no file": (faulty("c.yaml", answer(404)), "c.yaml answers with status 404"),
    "cut index": (faulty(INDEX_FILE, cut(20)), "index.json: "),
    "cut index, length unknown": (faulty(INDEX_FILE, cut(20, has_length=False)), "signature does not hold"),
    "cut signature": (faulty(SIGNATURE_FILE, cut(20)), "index.json.minisig: "),
    "cut file": (faulty("a.yaml", cut(5)), "a.yaml: "),
    "cut file, length unknown": (faulty("a.yaml", cut(5, has_length=False)), "a.yaml: what its server gives is not"),
    "empty file": (faulty("a.yaml", give(b"")), "(0 bytes of "),
    "large index": (faulty(INDEX_FILE, pour(2**21, has_length=True)), "may have 1048576"),
    "large index, length unknown": (faulty(INDEX_FILE, pour(2**21, has_length=False)), "more than the 1048576 bytes"),
    "large signature": (faulty(SIGNATURE_FILE, pour(2**15, has_length=False)), "more than the 16384 bytes"),
    "large file": (faulty("a.yaml", pour(1, has_length=True)), "a.yaml has "),
    "large file, length unknown": (faulty("a.yaml", pour(2**20, has_length=False)), "a.yaml has more than the "),
    "other file of this size": (faulty("a.yaml", give(lambda right: right[::-1])), "a.yaml: what its server gives"),
    "changed index": (faulty(INDEX_FILE, give(lambda right: right.replace(b"2", b"3", 1))), "signature does not hold"),
    "garbage for a signature": (faulty(SIGNATURE_FILE, give(b"<html>")), "the signature is none of minisign's"),
    "another key": (sign_with_another_key, "it is signed with key 0202020202020202, not 0101010101010101"),
    "another key of the same id": (sign_with_another_key_of_this_id, "signature does not hold"),
    "downgrade": (signed(lambda index: index.update(serial=1)), "another index under the same serial 1"),
    "bad serial": (signed(lambda index: index.update(serial=-1)), "its serial is -1"),
    "another format": (signed(lambda index: index.update(format=2)), "upgrade localaid"),
    "no JSON": (lambda server: server.sign(b"{"), "index.json: Input data was truncated"),
    "escape": (signed(lambda index: with_entry(index, "../x.yaml")), "'../x.yaml' is no name"),
    "collision": (signed(lambda index: with_entry(index, "A.yaml")), "collides"),
    "hidden": (signed(lambda index: with_entry(index, ".x.yaml")), "'.x.yaml' is no name"),
    "another kind": (signed(lambda index: with_entry(index, "x.py")), "'x.py' is neither a config nor a template"),
    "wrong config": (with_file("x.yaml", "name: x\ntop_q: 1\n"), "x.yaml: top_q: unknown key, line 2 (did you mean"),
    "no YAML": (with_file("x.yaml", "{"), "x.yaml: "),
    "wrong template": (with_wrong_template, "x.jinja: line 1: Expected an expression"),
    "template of nobody": (with_file("x.jinja", "x"), "x.jinja: is named by no config beside it"),
    "extends nothing": (with_file("x.yaml", config("x") + "extends: y\n"), "x.yaml: extends: no other config"),
    "redirect to a file": (faulty(INDEX_FILE, redirect("file:///etc/passwd")), "redirects to file:///etc/passwd"),
    "redirect to ftp": (faulty("a.yaml", redirect("ftp://127.0.0.1/x")), "redirects to ftp://127.0.0.1/x"),
    "redirect to nowhere": (faulty(INDEX_FILE, redirect("http://[x")), "index.json: Invalid"),
    "redirects for ever": (faulty(INDEX_FILE, redirect("index.json")), "redirects more than 5 times"),
    "gzip bomb": (faulty(INDEX_FILE, pack(2**28)), "packs the file, though it was asked not to"),
    "slow index": (faulty(INDEX_FILE, trickle(0.02)), "is too slow"),
    "slow file": (faulty("a.yaml", trickle(0.02)), "a.yaml is too slow"),
    "silence": (faulty(INDEX_FILE, trickle(0, at_head=True)), "index.json is too slow"),
    "silence in mid-file": (faulty("c.yaml", hold(asyncio.Event())), "c.yaml is too slow"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
async def test_after_any_failure_the_last_good_set_is_in_force(
    name: str, server: WebFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It shows in the report, the status and the log, and once the fault is gone the next update goes well."""
    fault, problem = FAULTS[name]
    updater = Updater(tmp_path, server.updates(), limits=IMPATIENT)
    await update(updater)
    server.publish(TWO)
    fault(server)
    report = await update(updater)
    assert report.result == "failed"
    assert report.problem is not None
    assert problem in report.problem
    assert report.problem.startswith("channel main: ")
    assert (report.serial, layer_of(tmp_path)) == (1, as_layer(ONE))
    status = status_of(updater)
    assert (status.state, status.serial, status.failures, status.problem) == ("failing", 1, 1, report.problem)
    assert "updates: failing since " in next(updater.render_problems())
    assert report.problem in caplog.messages
    assert left_over(tmp_path, server) == set()
    server.faults.clear()
    (server.folder / INDEX_FILE).unlink()
    server.publish(TWO, serial=3)
    assert (await update(updater)).serial == 3
    assert (layer_of(tmp_path), status_of(updater).state) == (as_layer(TWO), "ok")
    assert list(updater.render_problems()) == []


async def test_a_channel_cannot_be_led_back(server: WebFolder, tmp_path: Path) -> None:
    """Not by what its owner has once signed either, and not after a restart."""
    old = {name: (server.folder / name).read_bytes() for name in (INDEX_FILE, SIGNATURE_FILE, "a.yaml")}
    server.publish(TWO)
    await update(Updater(tmp_path, server.updates()))
    for name, content in old.items():
        (server.folder / name).write_bytes(content)
    updater = Updater(tmp_path, server.updates())
    report = await update(updater)
    assert report.problem is not None
    assert "its serial is 1, after 2" in report.problem
    assert layer_of(tmp_path) == as_layer(TWO)
    current = tmp_path / "default-configs" / "01-main"
    (current / INDEX_FILE).write_text("damaged")
    assert "its serial is 1, after 2" in str((await update(updater)).problem)


async def test_nothing_is_listening_and_no_http(tmp_path: Path) -> None:
    """Both are failures like any other."""

    async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp.example.org ESMTP\r\n")
        writer.close()

    listening = await asyncio.start_server(babble, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    channel = Channel(name="main", url=f"http://127.0.0.1:{port}/", public_key=KEY.public.render())
    updater = Updater(tmp_path, Updates(channels=(channel,), allow_http=True), limits=IMPATIENT)
    assert (await update(updater)).result == "failed"
    listening.close()
    await listening.wait_closed()
    report = await update(updater)
    assert "Cannot connect" in str(report.problem)
    assert status_of(updater).failures == 2


async def test_an_update_has_an_end(server: WebFolder, tmp_path: Path) -> None:
    """However patient each request is."""
    server.faults["b/b.yaml"] = trickle(0.02)
    updater = Updater(tmp_path, server.updates(), limits=FetchLimits(total_s=0.2))
    assert "took longer than 0.2 s" in str((await update(updater)).problem)


async def test_plain_http_is_used_only_where_that_is_allowed(server: WebFolder, tmp_path: Path) -> None:
    """Though the settings' reader tells of it before."""
    updater = Updater(tmp_path, server.updates(allow_http=False))
    assert "is not https" in str((await update(updater)).problem)
    assert server.asked == []


async def test_interrupted_at_any_byte(tmp_path: Path) -> None:
    """The connection ends after so many bytes of an update, wherever that is: it changes nothing, or is done."""
    web_folder = WebFolder(tmp_path / "web")
    web_folder.publish(ONE)
    left = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            body = (web_folder.folder / head.split(" ")[1].lstrip("/")).read_bytes()
            whole = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            writer.write(whole[: max(0, left)])
            left -= len(whole)
            await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
    updates = Updates(channels=(web_folder.channel(base=base),), allow_http=True)
    left = size = 1 << 20
    await update(Updater(tmp_path / "state", updates))
    size -= left
    web_folder.publish(TWO)
    results = set()
    for at in (*range(1, size, 13), size):
        left = at
        report = await update(Updater(tmp_path / "state", updates))
        results.add(report.result)
        assert layer_of(tmp_path / "state") == as_layer(ONE if report.result == "failed" else TWO), at
        if report.result == "updated":
            break
    assert results == {"failed", "updated"}
    listening.close()


# -- the disk --


async def test_a_full_disk(server: WebFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whichever file, or folder: the old set stays and nothing is left behind."""
    updater = Updater(tmp_path, server.updates())
    await update(updater)
    server.publish(TWO)
    writes = localaid._write_new
    for at in range(len(TWO) + 2):  # with index and signature
        written = 0

        def write(file: Path, content: bytes, mode: int = 0o666, *, last: int = at) -> None:
            nonlocal written
            written += 1
            if written > last:
                file.write_bytes(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            writes(file, content, mode)

        monkeypatch.setattr(localaid, "_write_new", write)
        report = await update(updater)
        assert "No space left on device; what is in force stays: see that localaid may write" in str(report.problem)
        assert (layer_of(tmp_path), left_over(tmp_path, server)) == (as_layer(ONE), set())
    monkeypatch.setattr(localaid, "_write_new", writes)
    assert (await update(updater)).serial == 2
    assert layer_of(tmp_path) == as_layer(TWO)


def write_settings(folder: Path, updates: Updates, **more: object) -> Path:
    """Write the settings that have these updates, as users write them."""
    channels = [{"name": one.name, "url": one.url, "public_key": one.public_key} for one in updates.channels]
    written = {"updates": {"channels": channels, "allow_http": updates.allow_http}, "control_socket": "off", **more}
    file = folder / "localaid.yaml"
    file.write_bytes(msgspec.yaml.encode(written))
    return file


async def test_a_disk_that_is_really_full(server: WebFolder, tmp_path: Path) -> None:
    """A file system of a few pages; with room the same update goes well."""
    mount = tmp_path / "mount"
    mount.mkdir()
    server.publish({"a.yaml": config("a") + "#" * 200_000})
    settings = write_settings(tmp_path, server.updates(), listen="127.0.0.1:1")
    command = f'{sys.executable} {PROGRAM} update --settings {settings} --state "{mount}"'
    grow = f'mount -o remount,size=1m "{mount}"'
    script = f'mount -t tmpfs -o size=64k full "{mount}" || exit 77; {command}; echo $?; {grow}; {command}; echo $?'
    process = await asyncio.create_subprocess_exec(
        "unshare", "-rm", "sh", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, problems = await process.communicate()
    if process.returncode == 77 or b"unshare" in problems:
        pytest.skip("this machine lets nobody mount a file system")
    assert "No space left on device" in problems.decode()
    first, *rest = out.decode().splitlines()
    assert (first, rest[-1]) == ("1", "0")
    assert "went from nothing to serial 2" in out.decode()


async def test_a_state_folder_that_cannot_be_written(server: WebFolder, tmp_path: Path) -> None:
    """A failure like any other, also for the lock."""
    (tmp_path / "state").write_text("a file")
    updater = Updater(tmp_path / "state", server.updates())
    updater.arrange()
    report = await update(updater)
    assert "state/channels: Not a directory" in str(report.problem)
    assert status_of(updater).state == "failing"


KILLED_AT_EVERY_STEP = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import localaid
from pathlib import Path
state, channel = Path({state!r}), localaid.Channel(name="main", url="https://x/", public_key={key!r})
store = localaid.ChannelStore(state, channel)

def set_of(serial, files):
    listed = tuple(localaid.IndexedFile(path=p, size=len(c), sha256=localaid._digest(c)) for p, c in files.items())
    made_at = localaid.dt.datetime(2026, 1, 1, tzinfo=localaid.dt.UTC)
    index = localaid.ChannelIndex(format=1, serial=serial, made_at=made_at, files=listed)
    return localaid.FetchedSet(index, localaid.render_index(index), b"signature", files, 0)

first = set_of(1, {{"a.yaml": b"1", "x/b.yaml": b"same"}})
left, at = -1, 0
def count(event, arguments):
    global left
    if left >= 0 and (event.startswith(("os.", "shutil.")) or event == "open"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
store.put(first)
seen = []
while True:
    serial = 2 + at
    child = os.fork()
    if not child:
        left = at
        store.clean()
        store.put(set_of(serial, {{"a.yaml": b"%d" % serial, "x/b.yaml": b"same", "c.yaml": b"new"}}))
        store.save_mark(localaid.Mark(serial=serial))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    stored = store.load()
    assert stored is not None and stored.is_whole, at
    seen.append((stored.index.serial == serial, os.WIFSIGNALED(status)))
    a = (store.folder / "current" / "a.yaml").read_bytes()
    assert a == (b"%d" % stored.index.serial), (at, a)
    if not os.WIFSIGNALED(status):
        break
    at += 1
store.clean()
print(len(os.listdir(store.folder)), len(seen), sum(new for new, _ in seen), sum(killed for _, killed in seen))
"""


def test_killed_at_every_step_of_the_disk(tmp_path: Path) -> None:
    """SIGKILL before each system call that touches a name: the old set is in force, or the new one, whole."""
    script = KILLED_AT_EVERY_STEP.format(folder=str(PROGRAM.parent), state=str(tmp_path), key=KEY.public.render())
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    left, steps, new, killed = map(int, done.stdout.split())
    assert left == 3  # current, its set, the mark
    assert steps > 25
    assert killed == steps - 1
    assert 1 < new < steps / 2


@pytest.mark.parametrize("path", [INDEX_FILE, SIGNATURE_FILE, "a.yaml", "c.yaml"])
async def test_killed_in_the_midst_of_an_update(server: WebFolder, tmp_path: Path, path: str) -> None:
    """SIGKILL while a file is on its way: the last good set is in force, and the next update goes well."""
    state = tmp_path / "state"
    settings = write_settings(tmp_path, server.updates(), listen="127.0.0.1:1")
    await update(Updater(state, server.updates()))
    server.publish(TWO)
    reached = asyncio.Event()
    server.faults[path] = hold(reached)
    command = [sys.executable, str(PROGRAM), "update", "--settings", str(settings), "--state", str(state)]
    process = await asyncio.create_subprocess_exec(*command)
    async with asyncio.timeout(PATIENT_S):
        await reached.wait()
        process.kill()
        await process.wait()
    assert layer_of(state) == as_layer(ONE)
    server.faults.clear()
    (ChannelStore(state, server.channel()).folder / ".new-2-killed").mkdir()  # as a kill in mid-write leaves it
    assert (await update(Updater(state, server.updates()))).serial == 2
    assert (layer_of(state), len(left_over(state, server))) == (as_layer(TWO), 1)  # the set before, for its readers


async def test_left_overs_are_removed_at_the_next_start(server: WebFolder, tmp_path: Path) -> None:
    """Of unfinished sets and of old ones, also where updates are off; what is in force stays."""
    updates = server.updates(enabled=False)
    await update(Updater(tmp_path, updates))
    folder = ChannelStore(tmp_path, server.channel()).folder
    (folder / ".new-9").mkdir()
    (folder / ".new-9" / "a.yaml").write_text("half")
    (folder / ".link-9").symlink_to("set-9")
    (folder / "set-9").mkdir()
    updater = Updater(tmp_path, updates)
    updater.start()
    await turn_until(lambda: status_of(updater).serial is not None)
    await updater.stop()
    assert (left_over(tmp_path, server), layer_of(tmp_path)) == (set(), as_layer(ONE))


async def test_a_stop_in_the_midst_of_an_update(server: WebFolder, tmp_path: Path) -> None:
    """It ends at once, and nothing has happened."""
    reached = asyncio.Event()
    server.faults["a.yaml"] = hold(reached)
    updater = Updater(tmp_path, server.updates())
    updater.start()
    async with asyncio.timeout(PATIENT_S):
        await reached.wait()
        await updater.stop()
    assert (layer_of(tmp_path), left_over(tmp_path, server)) == ({}, set())


async def test_two_do_not_update_at_once(server: WebFolder, tmp_path: Path) -> None:
    """The second is told so; who only looks may."""
    updater = Updater(tmp_path, server.updates())
    with hold_lock(tmp_path / "channels" / "update.lock"):
        with pytest.raises(UpdateBusy, match=r"update.lock"):
            await updater.update()
        assert (await update(updater, dry_run=True)).result == "pending"
    reports = await asyncio.gather(update(updater), update(updater))
    assert [report.result for report in reports] == ["updated", "unchanged"]


# -- clocks --


@pytest.mark.parametrize("now", [0.0, -1e6, 4e9])
async def test_a_clock_that_is_wrong(
    server: WebFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: float
) -> None:
    """Of this machine, or of who publishes: times are only told."""
    monkeypatch.setattr(time, "time", lambda: now)
    updater = Updater(tmp_path, server.updates())
    server.publish(made_at=dt.datetime(2099, 1, 1, tzinfo=dt.UTC))
    assert (await update(updater)).serial == 2
    server.publish(TWO, made_at=dt.datetime(1970, 1, 1, tzinfo=dt.UTC))
    assert (await update(updater)).serial == 3
    server.faults[INDEX_FILE] = answer(500)
    await update(updater)
    assert status_of(updater).failing_since_at == now
    assert "failing since" in next(updater.render_problems())


async def test_failures_are_retried_later_and_later(server: WebFolder, tmp_path: Path) -> None:
    """Twice as late each time, a little at random, never later than the interval."""
    server.faults[INDEX_FILE] = answer(500)
    updater = Updater(tmp_path, server.updates(interval_s=600.0))
    for failures, most_s in enumerate((60, 120, 240, 480, 600, 600), 1):
        await update(updater)
        status = status_of(updater)
        assert status.failures == failures
        assert status.next_s is not None
        assert most_s / 2 - 1 <= status.next_s <= most_s
    server.faults.clear()
    await update(updater)
    left_s = status_of(updater).next_s
    assert left_s is not None
    assert 539 <= left_s <= 660


async def test_a_server_may_say_when_to_come_again(server: WebFolder, tmp_path: Path) -> None:
    """It is believed as far as the interval."""
    updater = Updater(tmp_path, server.updates(interval_s=3600.0))
    server.faults[INDEX_FILE] = answer(503, {"Retry-After": "1800"})
    await update(updater)
    assert 1790 <= (status_of(updater).next_s or 0) <= 1800
    server.faults[INDEX_FILE] = answer(429, {"Retry-After": "999999999"})
    await update(updater)
    assert 3590 <= (status_of(updater).next_s or 0) <= 3600
    server.faults[INDEX_FILE] = answer(503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"})
    await update(updater)
    assert (status_of(updater).next_s or 0) <= 240


async def test_the_loop_updates_again_and_again(
    server: WebFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At each interval, with a failure between, and logs the same failure once."""
    monkeypatch.setattr(localaid, "UPDATE_BACKOFF_S", 0.001)
    caplog.set_level(logging.INFO, logger="localaid")
    updater = Updater(tmp_path, server.updates(interval_s=0.01))

    async def until(check: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENT_S):
            while not check():
                await server.news.wait()

    updater.start()
    await until(lambda: status_of(updater).serial == 1)
    server.publish(TWO)
    await until(lambda: status_of(updater).serial == 2)
    server.faults[INDEX_FILE] = answer(500)
    await until(lambda: status_of(updater).failures > 3)
    server.faults.clear()
    await until(lambda: status_of(updater).state == "ok")
    await updater.stop()
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "went from serial 1 to serial 2" in caplog.text
    assert "channel main: works again, after " in caplog.text


async def test_the_first_look_after_a_start_is_at_random(server: WebFolder, tmp_path: Path) -> None:
    """Where a set is there; many machines may start at once."""
    await update(Updater(tmp_path, server.updates()))
    server.asked.clear()
    updater = Updater(tmp_path, server.updates())
    updater.start()
    await turn_until(lambda: bool(status_of(updater).serial and status_of(updater).next_s))
    assert 0 < (status_of(updater).next_s or 0) <= localaid.UPDATE_SPREAD_S
    await updater.stop()


async def test_who_has_switched_updates_off_updates_by_hand(server: WebFolder, tmp_path: Path) -> None:
    """Nothing is asked for by itself; what was fetched stays in force."""
    updater = Updater(tmp_path, server.updates(enabled=False))
    updater.start()
    await update(updater)
    server.asked.clear()
    updater.configure(server.updates(enabled=False, interval_s=0.001))
    for _ in range(100):
        await asyncio.sleep(0)
    await updater.stop()
    assert (server.asked, layer_of(tmp_path)) == ([], as_layer(ONE))
    assert (status_of(updater).state, status_of(updater).next_s) == ("off", None)


async def test_a_fault_of_ours_ends_one_update_and_no_more(
    server: WebFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes on, and tells of it."""
    monkeypatch.setattr(localaid, "check_set", lambda *_: 1 // 0)
    updater = Updater(tmp_path, server.updates())
    updater.start()
    await turn_until(lambda: status_of(updater).failures > 0)
    assert "ZeroDivisionError" in str(status_of(updater).problem)
    monkeypatch.undo()
    assert (await update(updater)).result == "updated"
    await updater.stop()


# -- a year --

WEEKLY: list[Callable[[random.Random], Fault]] = [
    lambda chance: answer(chance.choice([404, 429, 500, 503])),
    lambda chance: cut(chance.randrange(200)),
    lambda chance: cut(chance.randrange(200), has_length=False),
    lambda _: give(b"x"),
    lambda chance: give(lambda right: bytes(chance.randbytes(len(right)))),
    lambda _: pour(100, has_length=False),
    lambda _: redirect("gopher://x/"),
    lambda _: pack(1000),
]


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_year_of_weekly_updates_ends_on_the_newest_set(tmp_path: Path, seed: int) -> None:
    """With failures at random, and restarts; in each week one whole set is in force, and never an older one."""
    chance = random.Random(seed)
    files = {f"{number}.yaml": config(f"m{number}") for number in range(4)}
    published: dict[int, dict[str, str]] = {}
    newest = 0
    failures = 0
    async with WebFolder(tmp_path / "web") as server:
        updater = Updater(tmp_path / "state", server.updates(), limits=IMPATIENT)
        for week in range(1, 53):
            path = chance.choice(list(files))
            files[path] = config("m" + path.split(".")[0], week)
            if chance.random() < 0.3:
                files[f"{week}.yaml"] = config(f"m{week}")
            if chance.random() < 0.2 and len(files) > 2:
                del files[chance.choice(list(files))]
            if chance.random() < 0.9:
                published[server.publish(files).serial] = dict(files)
            server.faults = {
                path: chance.choice(WEEKLY)(chance)
                for path in (INDEX_FILE, SIGNATURE_FILE, *files)
                if chance.random() < 0.15
            }
            if chance.random() < 0.3:
                updater = Updater(tmp_path / "state", server.updates(), limits=IMPATIENT)
            report = await update(updater)
            failures += report.result == "failed"
            serial = report.serial or 0
            assert serial >= newest
            newest = serial
            assert layer_of(tmp_path / "state") == as_layer(published.get(serial, {}))
        server.faults = {}
        await update(updater)
    assert layer_of(tmp_path / "state") == as_layer(published[max(published)])
    assert 5 < failures < 47


# -- several channels --


async def test_of_two_channels_the_earlier_one_wins(server: WebFolder, tmp_path: Path) -> None:
    """Where both name the same; the order is the settings', and may change."""
    async with WebFolder(tmp_path / "web2", key_of(2)) as other:
        other.publish({"z.yaml": config("a", 7), "y.yaml": config("y")})
        first, second = server.channel("zebra"), other.channel("aardvark")
        updater = Updater(tmp_path, Updates(channels=(first, second), allow_http=True))
        assert [one.result for one in (await updater.update()).channels] == ["updated", "updated"]
        assert [rule.sampling.top_k for rule in table_of(tmp_path).named["a"]] == [1, 7]
        updater.configure(Updates(channels=(second, first), allow_http=True))
        assert [rule.sampling.top_k for rule in table_of(tmp_path).named["a"]] == [7, 1]
        assert sorted(one.name for one in (tmp_path / "default-configs").iterdir()) == ["01-aardvark", "02-zebra"]
        other.faults[INDEX_FILE] = answer(500)
        server.publish(TWO)
        results = [one.result for one in (await updater.update()).channels]
        assert results == ["failed", "updated"]  # one does not wait for the other
        updater.configure(Updates(channels=(first,), allow_http=True))
        assert layer_of(tmp_path) == as_layer(TWO, "01-zebra")


def folders_of(state: Path) -> Folders:
    """Return folders of which only the fetched layer has configs."""
    nowhere = state / "nowhere"
    return Folders(models=(nowhere,), configs=nowhere, state=state, settings=nowhere, shipped=nowhere)


def table_of(state: Path) -> localaid.Table:
    """Return the table of the fetched layer."""
    layers = ConfigLayers(folders_of(state))
    layers.read(set(find_below(state / "default-configs")))
    table, problems = layers.set.merge()
    assert not problems
    return table


async def test_a_channel_that_comes_back_is_not_led_back(server: WebFolder, tmp_path: Path) -> None:
    """Its serial is remembered while it is out of the settings; files of the user's beside it stay."""
    old = {name: (server.folder / name).read_bytes() for name in (INDEX_FILE, SIGNATURE_FILE)}
    server.publish(TWO)
    updater = Updater(tmp_path, server.updates())
    await update(updater)
    (tmp_path / "default-configs" / "mine.yaml").write_text(config("mine"))
    updater.configure(Updates())
    assert layer_of(tmp_path) == {"mine.yaml": config("mine")}
    with pytest.raises(NoChannels):
        await updater.update()
    for name, content in old.items():
        (server.folder / name).write_bytes(content)
    updater.configure(server.updates())
    assert "its serial is 1, after 2" in str((await update(updater)).problem)
    assert layer_of(tmp_path) == {**as_layer(TWO), "mine.yaml": config("mine")}


async def test_another_key_begins_anew(server: WebFolder, tmp_path: Path) -> None:
    """What the old key has signed is used no more; its serials do not bind the new one."""
    server.publish(TWO, serial=100)
    updater = Updater(tmp_path, server.updates())
    await update(updater)
    server.key = key_of(2)
    (server.folder / INDEX_FILE).unlink()
    server.publish(ONE)
    updater.configure(server.updates())
    assert layer_of(tmp_path) == {}
    assert (await update(updater)).serial == 1
    assert layer_of(tmp_path) == as_layer(ONE)


async def test_the_watch_of_the_folder_sees_one_change(server: WebFolder, tmp_path: Path) -> None:
    """Never a part of a set: what is gone and what has come are told of together."""
    updater = Updater(tmp_path, server.updates())
    updater.arrange()
    layers = ConfigLayers(folders_of(tmp_path))
    watch = FolderWatch([tmp_path / "default-configs"], rescan_s=3600)
    seen = []
    async with asyncio.timeout(PATIENT_S), contextlib.aclosing(watch.snapshots()) as snapshots:
        layers.take((await anext(snapshots)).files)
        for files in (ONE, TWO, ONE):
            server.publish(files)
            await update(updater)
            async for snapshot in snapshots:
                if layers.take(snapshot.files, snapshot.leaving):
                    break
            seen.append(sorted(Path(file).name for _, file in layers.set.files))
    assert seen == [["a.yaml", "b.yaml"], ["a.yaml", "c.yaml"], ["a.yaml", "b.yaml"]]
    assert all(not loaded.problems for loaded in layers.set.files.values())


# -- the way to the server --


async def test_proxies_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy resolves the name; hosts in $NO_PROXY are asked directly."""
    folder = WebFolder(tmp_path / "web")
    folder.publish(ONE)
    asked = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, url, _ = (await reader.readuntil(b"\r\n\r\n")).decode().split(" ", 2)
        asked.append((method, url))
        body = (folder.folder / url.removeprefix("http://channel.invalid/folder/")).read_bytes()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
    updates = Updates(channels=(folder.channel(base="http://channel.invalid/folder/"),), allow_http=True)
    updater = Updater(tmp_path / "state", updates)
    assert (await update(updater)).result == "updated"
    assert asked[0] == ("GET", "http://channel.invalid/folder/index.json")
    assert layer_of(tmp_path / "state") == as_layer(ONE)
    monkeypatch.setenv("no_proxy", "channel.invalid")
    assert "Cannot connect to host channel.invalid" in str((await update(updater)).problem)
    proxy.close()


def make_certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """Return a certificate for 127.0.0.1, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file, secret = folder / "certificate.pem", folder / "certificate.key"
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, secret)
    return file, context


async def test_https_and_no_way_out_of_it(server: WebFolder, tmp_path: Path) -> None:
    """A certificate must be trusted, and no redirect leads to http, not even where that is allowed."""
    certificate, context = make_certificate(tmp_path)
    location = ""

    async def serve(http: web.Request) -> web.StreamResponse:
        if location:
            return web.Response(status=302, headers={"Location": location + http.match_info["path"]})
        return web.FileResponse(server.folder / http.match_info["path"])

    app = web.Application()
    app.router.add_get("/x/{path:.*}", serve)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    base = "https://{}:{}/x/".format(*runner.addresses[0][:2])
    settings = write_settings(
        tmp_path, Updates(channels=(server.channel(base=base),), allow_http=True), listen="127.0.0.1:1"
    )
    command = ("update", "--settings", settings, "--state", tmp_path / "state")
    trusted = {"SSL_CERT_FILE": str(certificate)}
    try:
        done = await asyncio.to_thread(run, *command)
        assert done.returncode == 1
        assert "certificate verify failed" in done.stderr
        done = await asyncio.to_thread(run, *command, env=trusted)
        assert (done.returncode, done.stderr) == (0, "")
        assert "went from nothing to serial 1" in done.stdout
        server.publish(TWO)
        location = server.base
        done = await asyncio.to_thread(run, *command, env=trusted)
        assert done.returncode == 1
        assert f"redirects to {server.base}index.json, which is not https" in done.stderr
        assert layer_of(tmp_path / "state") == as_layer(ONE)
    finally:
        await runner.cleanup()


async def test_redirects_within_a_scheme_are_followed(server: WebFolder, tmp_path: Path) -> None:
    """A web folder may have moved."""
    for path in (INDEX_FILE, SIGNATURE_FILE, "a.yaml"):
        moved = server.folder / "moved" / path
        moved.parent.mkdir(exist_ok=True)
        moved.write_bytes((server.folder / path).read_bytes())
        server.faults[path] = redirect(f"/moved/{path}")
    assert (await update(Updater(tmp_path, server.updates()))).result == "updated"


async def test_the_shipped_defaults_can_be_a_channel(tmp_path: Path) -> None:
    """And fetched: every file of them is what a channel may have."""
    async with WebFolder(tmp_path / "web") as server:
        shutil.copytree(PROGRAM.parent / "default-configs", server.folder, dirs_exist_ok=True)
        index = server.publish()
        updater = Updater(tmp_path / "state", server.updates())
        report = await update(updater)
        assert (report.result, len(report.added)) == ("updated", len(index.files))


# -- commands and the daemon --


async def test_updating_on_the_command_line(server: WebFolder, tmp_path: Path) -> None:
    """Without a daemon the command does it itself; a failure is its exit status."""
    settings = write_settings(tmp_path, server.updates(), listen="127.0.0.1:1", state=str(tmp_path / "state"))

    async def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(run, *arguments, "--settings", settings)

    done = await command("update", "--dry-run", "--json")
    (report,) = msgspec.json.decode(done.stdout, type=UpdateReport).channels
    assert (report.result, done.returncode) == ("pending", 0)
    done = await command("update")
    assert done.stdout.startswith("channel main: went from nothing to serial 1, made 2026-01-05 12:00 UTC: 3 files")
    assert (await command("update")).stdout == "channel main: nothing new since serial 1\n"
    server.faults[INDEX_FILE] = answer(500)
    done = await command("update", "--json")
    assert (done.returncode, "answers with status 500" in done.stderr) == (1, True)
    assert msgspec.json.decode(done.stdout, type=UpdateReport).channels[0].serial == 1
    with hold_lock(tmp_path / "state" / "channels" / "update.lock"):
        done = await command("update")
    assert (done.returncode, "another localaid is updating" in done.stderr) == (1, True)
    settings.write_text("listen: '127.0.0.1:1'\ncontrol_socket: off\n")
    done = await command("update")
    assert (done.returncode, "no channel is configured" in done.stderr) == (1, True)


def sha_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


async def test_the_diff_without_a_daemon(server: WebFolder, tmp_path: Path, tiny_llama: Path) -> None:
    """What is hidden, and what the next update changes, field by field, for names in use."""
    sha = sha_of(tiny_llama)
    for folder in ("models", "configs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "models" / "tiny.gguf").symlink_to(tiny_llama)
    (tmp_path / "configs" / "mine.yaml").write_text(config("mine", 9, sha))
    server.publish({"t.yaml": config("tiny", 1, sha) + "---\n" + config("mine", 1, sha)})
    state = tmp_path / "state"
    await update(Updater(state, server.updates()))
    server.publish({"t.yaml": config("tiny", 2, sha) + "temperature: 0.5\n---\n" + config("absent", 3, "f" * 64)})
    lying = {"models": [str(tmp_path / "models")], "configs": str(tmp_path / "configs"), "state": str(state)}
    folders = ("--settings", write_settings(tmp_path, server.updates(), listen="127.0.0.1:1", **lying))
    done = await asyncio.to_thread(run, "diff", *folders)
    assert done.returncode == 0, done.stderr
    fetched = f"fetched rule mine ({state}/default-configs/01-main/t.yaml:document 2)"
    mine = f"user rule mine ({tmp_path}/configs/mine.yaml)"
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "Hidden by your configs:",
        f"  {mine} hides {fetched}",
        f"    for mine on {', '.join(path.lstrip('/') for path in localaid.API_PATHS)}: sha256:{sha}",
        "      top_k: 1 -> 9",
    ]
    assert "channel main: would go from serial 2 to serial 3" in lines[5]
    assert lines[6] == "The update changes, for names that are in use:"
    assert lines[7].startswith("  tiny on v1/chat/completions")
    assert lines[8:] == ["      top_k: 1 -> 2", "      temperature: (not set) -> 0.5"]
    assert layer_of(state)["01-main/t.yaml"].startswith(config("tiny", 1, sha))
    server.faults[INDEX_FILE] = answer(500)
    done = await asyncio.to_thread(run, "diff", *folders, "--json")
    assert (done.returncode, "status 500" in done.stderr) == (1, True)
    diff = msgspec.json.decode(done.stdout, type=Diff)
    assert (len(diff.hidden), diff.changes) == (1, ())


async def ask(served: Daemon, path: str, method: str = "GET") -> bytes:
    """Ask a daemon."""
    async with aiohttp.ClientSession(served.base_url) as http, http.request(method, path) as given:
        return await given.read()


async def until(served: Daemon, check: Callable[[Explanation], bool]) -> Explanation:
    """Ask where a name leads until that is so: nothing tells a client of it."""
    async with asyncio.timeout(PATIENT_S):
        while True:
            answered = await ask(served, "/localaid/explain?path=v1/chat&name=tiny")
            explanation = msgspec.json.decode(answered, type=Explanation)
            if check(explanation):
                return explanation


def top_k_is(top_k: int) -> Callable[[Explanation], bool]:
    """Return what tells whether a name's rule says that."""
    return lambda explanation: "top_k" in explanation.fields and explanation.fields["top_k"].value == top_k


async def test_a_daemon_takes_what_is_published(
    server: WebFolder, tmp_path: Path, tiny_llama: Path, daemon: StartDaemon
) -> None:
    """From `localaid publish` to the names of a running daemon; failures show on status and metrics."""
    sha = sha_of(tiny_llama)
    server.publish({"t.yaml": config("tiny", 1, sha)})
    written = json.loads(json.dumps(msgspec.to_builtins(server.updates())))
    settings = {"updates": {"channels": written["channels"], "allow_http": True}}
    served = await asyncio.to_thread(daemon, [tiny_llama], settings=settings)
    explanation = await until(served, top_k_is(1))  # by itself, at its start
    assert explanation.layer == "fetched"

    async def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        where = ("--settings", served.settings, "--listen", served.base_url.removeprefix("http://"))
        return await asyncio.to_thread(run, name, *arguments, *where)

    (tmp_path / "k").write_bytes(localaid.render_secret_key(server.key, "", bytes(32)))
    (server.folder / "t.yaml").write_text(config("tiny", 2, sha))
    assert (await asyncio.to_thread(run, "publish", "--key", tmp_path / "k", server.folder)).returncode == 0
    diff = await command("diff")
    assert "  tiny on v1/chat/completions" in diff.stdout
    assert "      top_k: 1 -> 2" in diff.stdout
    done = await command("update")
    assert (done.returncode, "serial 2 to serial 3" in done.stdout) == (0, True), done.stderr
    await until(served, top_k_is(2))
    server.faults[INDEX_FILE] = answer(500)
    assert (await command("update")).returncode == 1
    status = msgspec.json.decode(await ask(served, "/localaid/status"), type=DaemonStatus)
    (channel,) = status.updates
    assert (channel.state, channel.serial, channel.failures) == ("failing", 3, 1)
    assert "updates: failing since " in status.state
    assert "status 500" in (await command("status")).stdout
    metrics = (await ask(served, "/metrics")).decode()
    assert 'localaid_update_serial{channel="main"} 3.0' in metrics
    assert 'localaid_update_failures{channel="main"} 1.0' in metrics
    assert float(metrics.split('localaid_update_success_timestamp_seconds{channel="main"} ')[1].split()[0]) > 1e9
    assert "answers with status 500" in served.log
    await until(served, top_k_is(2))


async def test_a_daemon_takes_channels_at_a_reload(server: WebFolder, tiny_llama: Path, daemon: StartDaemon) -> None:
    """A new one is asked at once; without it its rules are gone, and come back with it."""
    sha = sha_of(tiny_llama)
    server.publish({"t.yaml": config("tiny", 5, sha)})
    served = await asyncio.to_thread(daemon, [tiny_llama])
    written = msgspec.to_builtins(server.updates().channels)
    with_it = msgspec.yaml.encode({"updates": {"channels": written, "allow_http": True}})
    for content, check in ((with_it, top_k_is(5)), (b"", lambda one: one.rule is None), (with_it, top_k_is(5))):
        served.settings.write_bytes(content)
        served.process.signal(signal.SIGHUP)
        await until(served, check)
    refused = await ask(served, "/localaid/update?dry_run=true", "POST")
    assert msgspec.json.decode(refused, type=UpdateReport).channels[0].result == "unchanged"


async def test_a_daemon_without_channels_says_so(daemon: StartDaemon) -> None:
    """Nothing is fetched unless somebody wants it."""
    served = await asyncio.to_thread(daemon)
    assert b"no channel is configured" in await ask(served, "/localaid/update", "POST")
    diff = msgspec.json.decode(await ask(served, "/localaid/diff"), type=Diff)
    assert diff == Diff(hidden=(), updates=(), changes=())
    mapped = await asyncio.to_thread(Path(f"/proc/{served.pid}/maps").read_text)
    assert "cryptography" not in mapped  # it is large, and has nothing to do here
    assert not {"channels", "default-configs"} & {entry.name for entry in served.state.iterdir()}


async def test_a_server_that_says_nothing_delays_no_start(server: WebFolder, daemon: StartDaemon) -> None:
    """Nor a stop, which the fixture looks at."""
    server.faults[INDEX_FILE] = trickle(0, at_head=True)
    channels = msgspec.to_builtins(server.updates().channels)
    served = await asyncio.to_thread(daemon, settings={"updates": {"channels": channels, "allow_http": True}})
    async with asyncio.timeout(PATIENT_S):
        while not server.asked:
            await server.news.wait()
    assert await ask(served, "/readyz") == b"ready\n"
    await asyncio.to_thread(served.process.stop)
    assert "failed" not in served.log


async def test_a_daemon_that_is_killed_while_it_updates(
    server: WebFolder, tiny_llama: Path, daemon: StartDaemon
) -> None:
    """Starts with the last good set, and then goes on to the new one."""
    sha = sha_of(tiny_llama)
    server.publish({"t.yaml": config("tiny", 1, sha)})
    written = msgspec.to_builtins(server.updates().channels)
    settings = {"updates": {"channels": written, "allow_http": True}}
    served = await asyncio.to_thread(daemon, [tiny_llama], settings=settings)
    await until(served, top_k_is(1))
    server.publish({"t.yaml": config("tiny", 2, sha)})
    reached = asyncio.Event()
    server.faults["t.yaml"] = hold(reached)
    asking = asyncio.create_task(ask(served, "/localaid/update", "POST"))
    async with asyncio.timeout(PATIENT_S):
        await reached.wait()
    served.process.kill()
    with pytest.raises(aiohttp.ClientError):
        await asking
    again = await asyncio.to_thread(daemon, settings=settings, folder=served.folder)
    await until(again, top_k_is(1))
    server.faults.clear()
    await ask(again, "/localaid/update", "POST")
    await until(again, top_k_is(2))


# -- settings --

URL = {"url": "https://example.org/defaults", "public_key": KEY.public.render()}


def test_updates_in_the_settings() -> None:
    """One channel, or several in their order."""
    (one,) = parse_settings(msgspec.yaml.encode({"updates": URL}), file="s").updates.channels
    assert one == Channel(name="example-org", url="https://example.org/defaults/", public_key=URL["public_key"])
    several = [{**URL, "name": "Mine"}, {**URL, "url": "https://other.example.org/"}]
    read = parse_settings(msgspec.yaml.encode({"updates": {"channels": several, "interval": "6h"}}), file="s").updates
    assert [channel.name for channel in read.channels] == ["mine", "other-example-org"]
    assert (read.interval_s, read.enabled, read.allow_http) == (21600.0, True, False)
    assert parse_settings(b"", file="s").updates == Updates()


@pytest.mark.parametrize(
    ("updates", "problem"),
    [
        ({**URL, "serial": 1}, "updates.serial: unknown key"),
        ({"url": URL["url"]}, "updates.public_key: is missing"),
        ({"public_key": URL["public_key"]}, "updates.url: is missing"),
        ({**URL, "public_key": "RWx"}, "updates.public_key: expected the 56 characters RW..."),
        ({**URL, "url": "ftp://example.org/"}, "updates.url: expected https://"),
        ({**URL, "url": "https://ann:pass@example.org/"}, "a user and a password stand in the file that $NETRC names"),
        ({**URL, "url": "https://example.org/index.json"}, "without index.json"),
        ({**URL, "url": "https://example.org/?x=1"}, "without user, ? and #"),
        ({**URL, "url": "http://example.org/"}, "allow_http: true, beside it, allows that"),
        ({**URL, "interval": "10s"}, "updates.interval: expected a duration of at least 1m"),
        ({**URL, "interval": "-1"}, "updates.interval: expected a duration"),
        ({**URL, "name": "x/../y"}, "updates.name: expected up to 40 letters"),
        ({**URL, "name": "x-partial"}, "updates.name: expected up to 40 letters"),
        ({**URL, "channels": [URL]}, "has a channel of its own beside `channels`"),
        ({"channels": [URL, URL]}, "has two channels with the name example-org"),
        ({"channels": [{"name": "x"}]}, "updates.channels.0.url: is missing"),
        ({"channels": [{**URL, "name": f"x{number}"} for number in range(17)]}, "16 are the limit"),
        ({"enabled": "maybe"}, "updates.enabled: expected true or false"),
        ("off", "updates: expected keys and values"),
    ],
)
def test_wrong_updates_in_the_settings(updates: object, problem: str) -> None:
    """Each is told with its key."""
    with pytest.raises(ConfigErrors) as caught:
        parse_settings(msgspec.yaml.encode({"updates": updates}), file="s")
    assert problem in str(caught.value)
