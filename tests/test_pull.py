"""PULL: weights from a real server with real faults, in the process and through a real daemon."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import localaid
from conftest import PROGRAM, Daemon, StartDaemon
from localaid import (
    Download,
    Inventory,
    ModelIndex,
    NothingToPull,
    PartFile,
    PullAnswer,
    Puller,
    SourceFailed,
    Weights,
    build_table,
    check_source,
    is_temporary,
    landing_name,
    parse_config,
    plan_pull,
    read_answer_head,
    token_headers,
)
from mirror import PIECE_BYTES, Mirror, Served

MIB = 1 << 20
CONTENT = random.Random(14).randbytes(3 * MIB + 12345)
OTHER = random.Random(15).randbytes(len(CONTENT))
CHAT = "/v1/chat/completions"
PATIENT_S = 60.0
SMALL = {"load": {"ctx_size": 512, "threads": 1}, "allow_http": True}


def sha256(content: bytes) -> str:
    """Return the SHA as rules name it."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rounds follow each other at once, and small disks do."""
    monkeypatch.setattr(localaid, "PULL_BACKOFF_S", 0.001)
    monkeypatch.setattr(localaid, "PULL_ROOM_BYTES", 0)


@pytest.fixture
async def mirror() -> AsyncIterator[Mirror]:
    """A server of weights."""
    async with Mirror() as one:
        yield one


class Place(NamedTuple):
    """Folders with an index and a puller on them."""

    puller: Puller
    models: Path
    state: Path

    async def pull(self, *urls: str, sha: str = "", file: str | None = None, also: tuple[str, ...] = ()) -> Download:
        """Pull a file and wait for the end."""
        sha = sha or sha256(CONTENT)
        download = self.puller.pull("it", Weights(sha=sha, urls=urls, file=file, also=also))
        async with asyncio.timeout(PATIENT_S):
            await download.ended.wait()
        await self.puller.saved()
        return download

    @property
    def names(self) -> list[str]:
        """Return what lies in the models folder."""
        return sorted(path.name for path in self.models.iterdir())

    @property
    def journal(self) -> list[str]:
        """Return the files of the journal."""
        return sorted(path.name for path in (self.state / Puller.JOURNAL).glob("*"))


@contextlib.asynccontextmanager
async def opened(folder: Path, *, at_once: int = 2, folders: tuple[Path, ...] = ()) -> AsyncIterator[Place]:
    """Open a place in `folder`; what runs at the end is stopped as a daemon's stop does."""
    models, state = folder / "models", folder / "state"
    for path in (models, state):
        path.mkdir(exist_ok=True)
    index = ModelIndex((models,), state=state)
    puller = Puller((*folders, models), index=index, state=state, at_once=at_once, allow_http=True)
    await index.start()
    await puller.start()
    try:
        yield Place(puller, models, state)
    finally:
        await puller.stop()
        await index.stop()


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    """One place of its own."""
    async with opened(tmp_path) as one:
        yield one


async def received(download: Download, size_bytes: int) -> None:
    """Wait until so much of a file has come; nothing tells of bytes, so each turn of the loop is looked at."""
    async with asyncio.timeout(PATIENT_S):
        while download.status().bytes < size_bytes:  # noqa: ASYNC110
            await asyncio.sleep(0)


def known_sha(place: Place, sha: str) -> bool:
    """Return whether the index knows a file of that SHA."""
    return bool(place.puller.index.inventory.find(sha))


# -- names and addresses --


@given(st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape")), st.booleans())
def test_a_name_never_leads_out_of_the_folder(text: str, is_url: bool) -> None:
    """Whatever a rule or an address says."""
    url = "https://example.org/" + text.replace("[", "").replace("]", "") if is_url else "https://example.org/a.gguf"
    name = landing_name(Weights(sha=sha256(b""), file=None if is_url else text, urls=(url,)))
    assert name.endswith(".gguf")
    assert "/" not in name
    assert name.isprintable()
    assert not is_temporary(name)
    assert len(name.encode()) < 200


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a.gguf", "a.gguf"),
        ("../../etc/passwd", "passwd.gguf"),
        ("/etc/x.gguf", "x.gguf"),
        ("..\\..\\x.gguf", "x.gguf"),
        ("..", "model-e3b0c442.gguf"),
        (".hidden.gguf", "hidden.gguf"),
        ("a\0b\n.gguf", "a_b_.gguf"),
        ("aliases.json", "aliases.json.gguf"),
        ("download.part", "download.part.gguf"),
        ("y" * 5000 + ".gguf", "y" * 160 + ".gguf"),
        (None, "b c.Q4_0.gguf"),
    ],
)
def test_names_that_rules_give(file: str | None, name: str) -> None:
    """Paths, hidden ones, odd and long ones; without one the address says it."""
    url = "https://example.org/x/b%20c.Q4_0.gguf?download=true"
    assert landing_name(Weights(sha=sha256(b""), file=file, urls=(url,))) == name


@pytest.mark.parametrize(
    ("url", "came_from", "allow_http", "problem"),
    [
        ("https://a/x", "", False, ""),
        ("http://a/x", "", True, ""),
        ("http://a/x", "", False, "is not https, and allow_http is false in the settings"),
        ("file:///etc/passwd", "", True, "is no https address"),
        ("https:///x", "", True, "is no https address"),
        ("https://a/x", "http://b/x", True, ""),
        ("http://a/x", "http://b/x", True, ""),
        ("http://a/x", "https://b/x", True, "redirects to http://a/x, which is not https"),
        ("file:///x", "http://b/x", True, "redirects to file:///x, which is not https"),
        ("ftp://a/x", "https://b/x", True, "redirects to ftp://a/x, which is not https"),
        ("https://[/x", "http://b/x", True, "redirects to https://[/x, which is not https"),
    ],
)
def test_addresses_that_are_followed(url: str, came_from: str, problem: str, *, allow_http: bool) -> None:
    """https, and http where the settings allow it; a redirect never leads from one to the other's worse."""
    if not problem:
        check_source(url, came_from, allow_http=allow_http)
        return
    with pytest.raises(SourceFailed) as caught:
        check_source(url, came_from, allow_http=allow_http)
    assert caught.value.problem == problem
    assert caught.value.is_final


def test_a_token_is_for_one_host() -> None:
    """Never shown to another, nor in the clear."""
    environ = {"HF_TOKEN": "hf_x"}
    shown = {"Authorization": "Bearer hf_x"}
    assert token_headers("https://huggingface.co/a/b.gguf", environ) == shown
    for url in ("http://huggingface.co/a", "https://huggingface.co.example.org/a", "https://cdn.example.org/a"):
        assert token_headers(url, environ) == {}
    assert token_headers("https://huggingface.co/a", {}) == {}


@pytest.mark.parametrize(
    ("status", "headers", "start", "outcome"),
    [
        (200, {"Content-Length": "10"}, 0, (0, 10)),
        (200, {}, 5, (0, None)),
        (206, {"Content-Range": "bytes 5-9/10"}, 5, (5, 10)),
        (206, {"Content-Range": "bytes 5-9/*"}, 5, (5, None)),
        (206, {"Content-Range": "bytes 4-9/10"}, 5, "answers with status 206"),
        (206, {"Content-Range": "bytes 0-9/10"}, 0, "answers with status 206"),
        (206, {}, 5, "answers with status 206"),
        (416, {"Content-Range": "bytes */5"}, 5, (5, 5)),
        (416, {"Content-Range": "bytes */4"}, 5, (5, 4)),
        (416, {"Content-Range": "bytes */6"}, 5, "answers with status 416"),
        (416, {"Content-Range": "bytes */5"}, 0, "answers with status 416"),
        (200, {"Content-Encoding": "gzip"}, 0, "packs the file, though it was asked not to"),
        (404, {}, 0, "answers with status 404!"),
        (429, {"Retry-After": "7"}, 0, "answers with status 429 after 7"),
        (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0, "answers with status 503"),
    ],
)
def test_heads_of_answers(status: int, headers: dict[str, str], start: int, outcome: object) -> None:
    """What follows, and where it belongs; or that another mirror is to be asked, for ever ("!") or for now."""
    try:
        head = read_answer_head("https://a", status, headers, start)
        found: object = (head.start, head.total)
    except SourceFailed as error:
        is_lasting = error.is_final and status < 500 and status != 200
        found = error.problem + "!" * is_lasting + (f" after {error.wait_s:g}" if error.wait_s else "")
    assert found == outcome


# -- which file a name means --


def table_of(*documents: str) -> localaid.Table:
    """Return the table of some configs."""
    rules = [parse_config(text.encode(), file=f"{place}.yaml", layer="user") for place, text in enumerate(documents)]
    return build_table(rule for found in rules for rule in found)


def test_what_a_name_means() -> None:
    """A model's name, a rule's, or a SHA; the first SHA of the first rule that has an address."""
    one, two = sha256(b"1"), sha256(b"2")
    table = table_of(
        f"{{name: bare, shas: '{two}', model_names: [x]}}",
        f"{{name: rule, shas: ['{one}', '{two}'], model_names: [x, 'y-*'], url: ['https://a/1', 'https://b/1']}}",
    )
    for name in ("x", "y-7", "rule", one, one.removeprefix("sha256:")):
        plan = plan_pull(table, Inventory(), name)
        assert plan.present is None
        assert [(file.sha, file.urls) for file in plan.weights] == [(one, ("https://a/1", "https://b/1"))]
        assert plan.weights[0].also == (two,)  # the address may lead to either
    for name, words in (("bare", "says no `url`"), ("none", "no config has"), (sha256(b"3"), "no config has")):
        with pytest.raises(NothingToPull, match=words):
            plan_pull(table, Inventory(), name)


def test_the_parts_of_a_split_model_belong_together() -> None:
    """The first comes last: with it the model is there.  Without it only what is missing is fetched."""
    one, two = sha256(b"1"), sha256(b"2")
    parts = [f"https://a/m-0000{number}-of-00002.gguf" for number in (1, 2)]
    part = f"{{sha256: {two[7:]}, url: '{parts[1]}'}}"
    table = table_of(f"name: x\nshas: [{{sha256: {one[7:]}, url: '{parts[0]}', parts: [{part}]}}]\n")
    plan = plan_pull(table, Inventory(), "x")
    assert [(file.sha, file.urls) for file in plan.weights] == [(two, (parts[1],)), (one, (parts[0],))]
    assert [landing_name(file) for file in plan.weights] == ["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"]
    first = localaid.FileEntry(path="/m/x", relative="x", sha256=one[7:], problem="part 2 of 2 is missing")
    assert [file.sha for file in localaid.find_weights([(table.rules[0], (one,))], Inventory([first]))] == [two]


def test_what_is_there_is_not_fetched() -> None:
    """Neither by name nor by SHA."""
    digest = hashlib.sha256(b"1").hexdigest()
    file = localaid.FileEntry(path="/m/a.gguf", relative="a.gguf", sha256=digest, serves=frozenset({CHAT}))
    table = table_of(f"{{name: x, shas: '{digest}', url: 'https://a/1'}}")
    for name in ("x", digest):
        assert plan_pull(table, Inventory([file]), name) == (file, ())


# -- one file from one server --


async def test_a_file_lands_under_its_name(place: Place, mirror: Mirror) -> None:
    """Its bytes are those; the index knows its SHA and does not hash it again; nothing else is left."""
    download = await place.pull(mirror.add("a.gguf", CONTENT))
    assert download.status().state == "done"
    assert place.names == ["a.gguf"]
    assert (place.models / "a.gguf").read_bytes() == CONTENT
    assert known_sha(place, sha256(CONTENT))
    assert place.puller.index.progress.bytes == 0
    assert place.journal == []
    assert mirror.sent_bytes == len(CONTENT)


@pytest.mark.parametrize("cut", [0, 1, PIECE_BYTES, MIB - 1, MIB, len(CONTENT) - 1])
async def test_a_cut_is_gone_on_from(place: Place, mirror: Mirror, cut: int) -> None:
    """From the very byte: none is asked for twice."""
    url = mirror.add("a.gguf", CONTENT, cuts=[cut])
    await place.pull(url)
    assert (place.models / "a.gguf").read_bytes() == CONTENT
    assert mirror.sent_bytes == len(CONTENT)
    assert [(asked.range, asked.if_range) for asked in mirror.asked] == [
        (None, None),
        (f"bytes={cut}-", '"one"') if cut else (None, None),
    ]


async def test_many_cuts(place: Place, mirror: Mirror) -> None:
    """As long as every round brings something, it goes on."""
    cuts = range(PIECE_BYTES, len(CONTENT), PIECE_BYTES)
    await place.pull(mirror.add("a.gguf", CONTENT, cuts=cuts))
    assert (place.models / "a.gguf").read_bytes() == CONTENT
    assert mirror.sent_bytes == len(CONTENT)


async def test_a_server_without_range_starts_again(place: Place, mirror: Mirror) -> None:
    """The whole file, once more."""
    url = mirror.add("a.gguf", CONTENT, cuts=[MIB])
    mirror["a.gguf"].has_ranges = False
    await place.pull(url)
    assert (place.models / "a.gguf").read_bytes() == CONTENT
    assert mirror.sent_bytes == MIB + len(CONTENT)


async def test_a_server_that_always_breaks_off_is_given_up(place: Place, mirror: Mirror) -> None:
    """Where no round brings a new byte."""
    url = mirror.add("a.gguf", CONTENT, cuts=[MIB] * 100)
    mirror["a.gguf"].has_ranges = False
    download = await place.pull(url)
    assert download.status().state == "failed"
    assert "broke off" in (download.status().problem or "")
    assert len(mirror.asked) == localaid.PULL_ROUNDS + 1


@pytest.mark.parametrize("validator", ["etag", "date", "none"])
async def test_a_file_that_changes_on_its_server(place: Place, mirror: Mirror, validator: str) -> None:
    """If-Range brings the new one whole; without anything to hold it to, its size tells, or in the end its SHA."""
    url = mirror.add("a.gguf", OTHER + b"more", cuts=[MIB])
    file = mirror["a.gguf"]
    file.etag = '"old"' if validator == "etag" else 'W/"weak"' if validator == "date" else None
    file.last_modified = "Mon, 23 Nov 2026 06:00:00 GMT" if validator == "date" else None

    def change(file: Served) -> None:
        file.content = CONTENT
        file.etag = '"new"' if file.etag else None
        file.last_modified = "Mon, 23 Nov 2026 07:00:00 GMT" if file.last_modified else None

    file.after_cut = change
    await place.pull(url)
    assert (place.models / "a.gguf").read_bytes() == CONTENT
    wanted = {"etag": '"old"', "date": "Mon, 23 Nov 2026 06:00:00 GMT", "none": None}[validator]
    assert mirror.asked[1][1:3] == (f"bytes={MIB}-", wanted)


async def test_a_length_that_is_not_told(place: Place, mirror: Mirror) -> None:
    """Chunked."""
    url = mirror.add("a.gguf", CONTENT)
    mirror["a.gguf"].has_length = False
    download = await place.pull(url)
    assert download.status().state == "done"
    assert (place.models / "a.gguf").read_bytes() == CONTENT


async def test_a_sha1_will_do(place: Place, mirror: Mirror) -> None:
    """And one that the rule names beside the first."""
    sha1 = "sha1:" + hashlib.sha1(CONTENT).hexdigest()  # noqa: S324 - as a rule names it
    assert (await place.pull(mirror.add("a.gguf", CONTENT), sha=sha1)).status().state == "done"
    assert known_sha(place, sha1)
    also = (sha256(b""), sha256(OTHER))
    assert (await place.pull(mirror.add("b.gguf", OTHER), sha=sha256(b"x"), also=also)).status().state == "done"
    assert place.names == ["a.gguf", "b.gguf"]


# -- mirrors --


async def test_the_next_mirror_is_tried(place: Place, mirror: Mirror) -> None:
    """Nobody there, 404, 500; the last one has it."""
    bad = mirror.add("c", b"", statuses=[500])
    good = mirror.add("d", CONTENT)
    download = await place.pull("http://127.0.0.1:9/a", f"{mirror.base}/b", bad, good, file="a.gguf")
    assert download.status().state == "done"
    assert [asked.path for asked in mirror.asked] == ["/b", "/c", "/d"]


async def test_the_next_mirror_goes_on_in_mid_file(place: Place, mirror: Mirror) -> None:
    """No byte is fetched twice, and the other server's ETag is not shown to it."""
    one = mirror.add("1/a.gguf", CONTENT, cuts=[MIB])
    two = mirror.add("2/a.gguf", CONTENT)
    await place.pull(one, two)
    assert (place.models / "a.gguf").read_bytes() == CONTENT
    assert mirror.sent_bytes == len(CONTENT)
    assert mirror.asked[1][:3] == ("/2/a.gguf", f"bytes={MIB}-", None)


async def test_a_server_that_says_nothing_any_more(
    place: Place, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is left for the next one; how long a whole download may take is not limited."""
    monkeypatch.setattr(localaid, "PULL_READ_S", 0.2)
    one, two = mirror.add("1/a.gguf", CONTENT), mirror.add("2/a.gguf", CONTENT)
    mirror["1/a.gguf"].pause_at = MIB
    await place.pull(one, two)
    assert (place.models / "a.gguf").read_bytes() == CONTENT
    assert [asked.range for asked in mirror.asked] == [None, f"bytes={MIB}-"]


async def test_status_keeps_the_last_of_those_that_have_ended(
    place: Place, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does the journal, for those that have failed."""
    monkeypatch.setattr(localaid, "PULLS_KEPT", 2)
    for number in range(4):
        await place.pull(f"{mirror.base}/{number}", sha=sha256(bytes([number])))
    await place.pull(mirror.add("a.gguf", CONTENT))
    shas = [sha256(bytes([number])) for number in (2, 3)]
    assert [status.sha for status in place.puller.statuses()] == [*shas, sha256(CONTENT)]
    assert place.journal == sorted(f"sha256-{sha[7:]}.json" for sha in shas)


async def test_a_mirror_that_cannot_go_on_waits_for_its_turn(place: Place, mirror: Mirror) -> None:
    """What has come is not thrown away for it while the first one may come back."""
    one = mirror.add("1/a.gguf", CONTENT, cuts=[MIB])
    two = mirror.add("2/a.gguf", CONTENT)
    mirror["2/a.gguf"].has_ranges = False
    await place.pull(one, two)
    assert (place.models / "a.gguf").read_bytes() == CONTENT
    assert [asked.path for asked in mirror.asked] == ["/1/a.gguf", "/2/a.gguf", "/1/a.gguf"]


async def test_a_mirror_with_another_file_is_not_asked_again(place: Place, mirror: Mirror) -> None:
    """The file is set aside, both SHAs are told, it is never served; the next mirror is asked."""
    bad, good = mirror.add("1/a.gguf", OTHER), mirror.add("2/a.gguf", CONTENT)
    download = await place.pull(bad, good)
    assert download.status().state == "done"
    found = sha256(OTHER)
    kept = f"a.gguf.mismatch-{found[7:15]}"
    assert place.names == ["a.gguf", kept]
    assert (place.models / kept).read_bytes() == OTHER
    assert not known_sha(place, found)


async def test_a_mismatch_is_told(place: Place, mirror: Mirror, caplog: pytest.LogCaptureFixture) -> None:
    """On status, in the log and in the error; it comes a second time under the same name, and nothing is lost."""
    url = mirror.add("a.gguf", OTHER)
    for _ in range(2):
        download = await place.pull(url)
        status = download.status()
        assert status.state == "failed"
        for told in (status.problem or "", caplog.text):
            assert sha256(OTHER) in told
            assert sha256(CONTENT) in told
        with pytest.raises(localaid.PullFailed, match=sha256(OTHER)):
            place.puller.want("it", download.record.weights)
    digest = sha256(OTHER)[7:]
    assert place.names == [f"a.gguf.mismatch-{digest[:8]}", f"a.gguf.mismatch-{digest}"]
    assert len(place.puller.index.inventory.files) == 0


async def test_pieces_of_two_mirrors_that_do_not_fit(place: Place, mirror: Mirror) -> None:
    """Nobody knows whose bytes were wrong: each is asked for the whole file."""
    one = mirror.add("1/a.gguf", OTHER, cuts=[MIB])
    two = mirror.add("2/a.gguf", CONTENT)
    download = await place.pull(one, two)
    assert download.status().state == "done"
    assert (place.models / "a.gguf").read_bytes() == CONTENT
    mixed = sha256(OTHER[:MIB] + CONTENT[MIB:])
    assert f"a.gguf.mismatch-{mixed[7:15]}" in place.names


async def test_redirects(place: Place, mirror: Mirror) -> None:
    """Followed, also relative ones, but not for ever, and not out of the web."""
    mirror.add("a.gguf", CONTENT)
    for at in range(3):
        mirror.add(f"hop{at}", b"")
        mirror[f"hop{at}"].location = f"hop{at + 1}" if at < 2 else "/a.gguf"
    for name, location in (("loop", "/loop"), ("out", "file:///etc/passwd")):
        mirror.add(name, b"")
        mirror[name].location = location
    bad = await place.pull(f"{mirror.base}/loop", f"{mirror.base}/out", sha=sha256(b""))
    assert "redirects more than 5 times" in (bad.status().problem or "")
    assert "redirects to file:///etc/passwd, which is not https" in (bad.status().problem or "")
    assert (await place.pull(f"{mirror.base}/hop0", file="a.gguf")).status().state == "done"


async def test_proxies_are_those_of_the_environment(
    place: Place, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mirror stands for one here."""
    mirror.add("a.gguf", CONTENT)
    monkeypatch.setenv("http_proxy", mirror.base)
    assert (await place.pull("http://weights.invalid/a.gguf")).status().state == "done"
    assert mirror.asked[0].host == "weights.invalid"


# -- disks --


async def test_room_is_looked_for_first(place: Place, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a byte is written; what other downloads still take counts."""
    free = shutil.disk_usage(place.models)._replace(free=len(CONTENT) + len(OTHER) - PIECE_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    url = mirror.add("a.gguf", OTHER)
    mirror["a.gguf"].pause_at = PIECE_BYTES
    first = place.puller.pull("other", Weights(sha=sha256(OTHER), urls=(url,)))
    await received(first, PIECE_BYTES)
    second = await place.pull(mirror.add("b.gguf", CONTENT))
    assert second.status().state == "failed"
    assert "of free space and has" in (second.status().problem or "")
    assert place.names == [f".sha256-{sha256(OTHER)[7:]}.part"]
    mirror["a.gguf"].go.set()
    await first.ended.wait()
    assert (await place.pull(f"{mirror.base}/b.gguf")).status().state == "done"


async def test_a_disk_that_is_full_in_the_middle(place: Place, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the remedy; what is there is kept, and the next pull fetches only the rest."""
    write, url = os.pwritev, mirror.add("a.gguf", CONTENT)

    def full(descriptor: int, chunks: list[bytes], at: int) -> int:
        if at >= MIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, [chunks[0][:1000]], at)  # and short ones before

    monkeypatch.setattr(os, "pwritev", full)
    status = (await place.pull(url)).status()
    assert status.state == "failed"
    assert "make room, or add a models folder on another disk, and pull again" in (status.problem or "")
    monkeypatch.setattr(os, "pwritev", write)
    part = next(place.models.iterdir()).stat().st_size
    assert MIB <= part < len(CONTENT)
    assert (await place.pull(url)).status().state == "done"
    assert mirror.asked[-1].range == f"bytes={part}-"
    assert (place.models / "a.gguf").read_bytes() == CONTENT


async def test_the_next_folder_where_one_cannot_be_written(tmp_path: Path, mirror: Mirror) -> None:
    """A place that cannot be: below a file."""
    (tmp_path / "file").touch()
    async with opened(tmp_path, folders=(tmp_path / "file" / "models",)) as place:
        assert (await place.pull(mirror.add("a.gguf", CONTENT))).file == str(place.models / "a.gguf")
        puller = Puller((tmp_path / "file" / "models",), index=place.puller.index, state=place.state, allow_http=True)
        download = puller.pull("it", Weights(sha=sha256(OTHER), urls=(mirror.add("b.gguf", OTHER),)))
        await download.ended.wait()
        assert "no models folder can be written" in (download.status().problem or "")
        assert "file/models: Not a directory" in (download.status().problem or "")
        await puller.stop()


async def test_a_name_that_is_taken(place: Place, mirror: Mirror) -> None:
    """Another file keeps it; the new one has some digits of its SHA beside it."""
    (place.models / "a.gguf").write_bytes(b"mine")
    (place.models / f"a-{sha256(CONTENT)[7:15]}.gguf").symlink_to("/nowhere")
    download = await place.pull(mirror.add("a.gguf", CONTENT))
    digest = sha256(CONTENT)[7:]
    assert Path(download.file).name == f"a-{digest}.gguf"
    assert (place.models / "a.gguf").read_bytes() == b"mine"
    second = await place.pull(mirror.add("2/a.gguf", OTHER), sha=sha256(OTHER))
    assert Path(second.file).name == f"a-{sha256(OTHER)[7:15]}.gguf"


async def test_parts_of_a_split_model(place: Place, mirror: Mirror) -> None:
    """Under the names by which they find each other; none is fetched twice; a name that is taken ends it."""
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    first, second = (mirror.add(name, content) for name, content in zip(names, (CONTENT, OTHER), strict=True))
    await place.pull(first)
    assert (await place.pull(second, sha=sha256(OTHER))).status().state == "done"
    assert place.names == names
    assert (await place.pull(second, sha=sha256(OTHER))).status().state == "done"
    assert len(mirror.asked) == 2
    other = mirror.add("2/" + names[1], b"other")
    assert "every name is taken" in ((await place.pull(other, sha=sha256(b"other"))).status().problem or "")


# -- times --


async def test_so_many_at_once_first_come_first_served(place: Place, mirror: Mirror) -> None:
    """Two run, the others wait for their turn."""
    contents = [random.Random(seed).randbytes(1000) for seed in range(5)]
    for number, content in enumerate(contents):
        mirror.add(f"{number}.gguf", content)
        mirror[f"{number}.gguf"].pause_at = 0
    pulls = [
        place.puller.pull(str(number), Weights(sha=sha256(content), urls=(f"{mirror.base}/{number}.gguf",)))
        for number, content in enumerate(contents)
    ]
    for number in range(4):
        async with asyncio.timeout(PATIENT_S):
            await asyncio.gather(*(mirror[f"{one}.gguf"].paused.wait() for one in (number, number + 1)))
        assert [one.status().state for one in pulls] == ["done"] * number + ["running"] * 2 + ["waiting"] * (3 - number)
        assert len(mirror.asked) == number + 2
        mirror[f"{number}.gguf"].go.set()
        await pulls[number].ended.wait()
    mirror["4.gguf"].go.set()
    await pulls[4].ended.wait()
    assert place.names == [f"{number}.gguf" for number in range(5)]


async def test_a_pull_twice_is_one(place: Place, mirror: Mirror) -> None:
    """And one that is cancelled keeps its bytes for the next."""
    url = mirror.add("a.gguf", CONTENT)
    mirror["a.gguf"].pause_at = 2 * MIB
    weights = Weights(sha=sha256(CONTENT), urls=(url,))
    download = place.puller.pull("it", weights)
    assert place.puller.pull("it", weights) is download
    await received(download, 2 * MIB)
    await place.puller.cancel(weights.sha)
    assert download.status().state == "cancelled"
    mirror["a.gguf"].go.set()
    (part,) = place.models.iterdir()
    size = part.stat().st_size
    assert (await place.pull(url)).status().state == "done"
    assert mirror.asked[-1][1:3] == (f"bytes={size}-", '"one"')


async def test_a_restart_goes_on(tmp_path: Path, mirror: Mirror) -> None:
    """Also without its journal, and where the part was whole, or longer than the file; a broken journal is told of."""
    url = mirror.add("a.gguf", CONTENT, cuts=[])
    mirror["a.gguf"].pause_at = 2 * MIB
    async with opened(tmp_path) as place:
        await received(place.puller.pull("it", Weights(sha=sha256(CONTENT), urls=(url,))), 2 * MIB)
    mirror["a.gguf"].go.set()
    (place.state / Puller.JOURNAL / "broken.json").write_text("{")
    (part,) = place.models.iterdir()
    size = part.stat().st_size
    async with opened(tmp_path) as place:
        (download,) = place.puller.downloads.values()
        await download.ended.wait()
        await place.puller.saved()
        assert download.status().state == "done"
        assert mirror.asked[-1][1:3] == (f"bytes={size}-", '"one"')
        assert place.journal == ["broken.json"]
    for content in (CONTENT, CONTENT + b"more", CONTENT[:-9]):
        (place.models / "a.gguf").unlink()
        part.write_bytes(content)
        before = len(mirror.asked)
        async with opened(tmp_path) as place:
            assert (await place.pull(url)).status().state == "done"
        assert (place.models / "a.gguf").read_bytes() == CONTENT
        again = [None] if len(content) > len(CONTENT) else []
        assert [one.range for one in mirror.asked[before:]] == [f"bytes={len(content)}-", *again]


async def test_a_part_that_another_process_has(place: Place, mirror: Mirror) -> None:
    """It is left alone, and so is its journal."""
    other = PartFile(place.models / f".sha256-{sha256(CONTENT)[7:]}.part", ("sha256",))
    download = await place.pull(mirror.add("a.gguf", CONTENT))
    assert "another localaid is downloading it" in (download.status().problem or "")
    assert mirror.asked == []
    other.close()
    assert (await place.pull(f"{mirror.base}/a.gguf")).status().state == "done"


# -- a real daemon --


def rule(name: str, sha: str, *urls: str) -> str:
    """Return a config that says where a file can be had."""
    return json.dumps({"name": name, "shas": [sha], "url": list(urls)})


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client."""
    async with aiohttp.ClientSession() as session:
        yield session


async def follow(http: aiohttp.ClientSession, base: str, name: str) -> AsyncIterator[PullAnswer]:
    """Yield the events of a pull."""
    async with http.post(f"{base}/localaid/pull", params={"name": name, "follow": "true"}) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: "):
                yield msgspec.json.decode(line[6:], type=PullAnswer)


async def run_cli(*arguments: str) -> tuple[int, str, str]:
    """Run a command; return its exit status, output and errors."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, str(PROGRAM), *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def chat(http: aiohttp.ClientSession, served: Daemon, **more: object) -> aiohttp.ClientResponse:
    """Ask for a chat."""
    body = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **more}
    return await http.post(served.base_url + CHAT, json=body)


async def test_kill_9_in_the_middle(
    daemon: StartDaemon, mirror: Mirror, http: aiohttp.ClientSession, smollm2: Path
) -> None:
    """The next daemon goes on by itself, and the server sends hardly a byte twice."""
    content = await asyncio.to_thread(smollm2.read_bytes)
    url = mirror.add("smol.gguf", content)
    mirror["smol.gguf"].pause_at = 40 * MIB
    served = daemon((), {"a.yaml": rule("small", sha256(content), url)}, settings=SMALL)
    async for event in follow(http, served.base_url, "small"):
        if event.downloads[0].bytes >= 39 * MIB:
            break
    async with http.get(f"{served.base_url}/localaid/status") as answer:
        status = msgspec.json.decode(await answer.read(), type=localaid.DaemonStatus)
    assert [(one.name, one.total, one.state) for one in status.downloads] == [("small", len(content), "running")]
    assert "pulling small 4" in status.state
    async with http.get(f"{served.base_url}/metrics") as answer:
        assert 'localaid_downloads{state="running"} 1.0' in await answer.text()
    served.process.kill()
    mirror["smol.gguf"].go.set()
    again = daemon(folder=served.folder, settings=SMALL)
    async for event in follow(http, again.base_url, "small"):
        last = event
    assert last.present or [one.state for one in last.downloads] == ["done"]
    assert len(mirror.asked) == 2
    start = int((mirror.asked[1].range or "bytes=0-")[6:-1])
    assert 38 * MIB <= start <= 40 * MIB
    assert mirror.sent_bytes <= 41 * MIB + len(content) - start  # with what was on its way to a dead process
    async with await chat(http, again) as answer:
        assert answer.status == 200, await answer.text()


async def test_a_stream_waits_for_its_model(
    daemon: StartDaemon, mirror: Mirror, http: aiohttp.ClientSession, smollm2: Path
) -> None:
    """It is told how far that is, then answered; others get a 503 with a time; the file is downloaded once."""
    content = await asyncio.to_thread(smollm2.read_bytes)
    url = mirror.add("smol.gguf", content)
    mirror["smol.gguf"].pause_at = 40 * MIB
    config = {"a.yaml": rule("small", sha256(content), url)}
    served = daemon((), config, settings={**SMALL, "pull": "on-demand"})
    stream, whole = await asyncio.gather(chat(http, served, stream=True), chat(http, served))
    error = (await whole.json())["error"]
    assert (whole.status, error["code"]) == (503, "model_downloading")
    assert "smol.gguf: 4" in error["message"]
    assert 1 <= int(whole.headers["Retry-After"]) <= 600
    assert stream.status == 200
    comment = await stream.content.readline()
    assert comment.startswith(b": downloading smol.gguf: 4")
    mirror["smol.gguf"].go.set()
    rest = await stream.read()
    assert b'"delta"' in rest
    assert rest.endswith(b"data: [DONE]\n\n")
    async with await chat(http, served) as answer:
        assert answer.status == 200
    assert len(mirror.asked) == 1


@pytest.mark.parametrize(
    ("path", "more", "marks"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}]}, b'data: {"error":'),
        ("/v1/responses", {"input": "Hi"}, b"event: response.failed"),
        (
            "/v1/messages",
            {"max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]},
            b"event: error",
        ),
    ],
)
async def test_a_stream_that_has_waited_in_vain(  # noqa: PLR0917 - fixtures and parameters
    daemon: StartDaemon, mirror: Mirror, http: aiohttp.ClientSession, path: str, more: dict[str, object], marks: bytes
) -> None:
    """Its error comes in the stream, in its own dialect; who asks next is told at once."""
    url = mirror.add("a.gguf", OTHER)
    mirror["a.gguf"].pause_at = MIB
    served = daemon((), {"a.yaml": rule("small", sha256(CONTENT), url)}, settings={**SMALL, "pull": "on-demand"})
    body = {"model": "small", "stream": True, **more}
    async with http.post(served.base_url + path, json=body) as answer:
        assert (await answer.content.readline()).startswith(b": downloading a.gguf: ")
        mirror["a.gguf"].go.set()
        rest = await answer.read()
    assert marks in rest
    assert sha256(OTHER).encode() in rest
    async with http.post(served.base_url + path, json=body) as answer:
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) <= 60
        assert "could not be downloaded" in await answer.text()
    assert len(mirror.asked) == 1


async def test_requests_that_wait_are_counted(daemon: StartDaemon, mirror: Mirror, http: aiohttp.ClientSession) -> None:
    """As in any queue: one too many is a 429; `pull_wait` ends the wait."""
    url = mirror.add("a.gguf", CONTENT)
    mirror["a.gguf"].pause_at = MIB
    settings = {**SMALL, "pull": "on-demand", "queue_size": 1, "pull_wait": "100ms"}
    served = daemon((), {"a.yaml": rule("small", sha256(CONTENT), url)}, settings=settings)
    both = await asyncio.gather(chat(http, served), chat(http, served, stream=True))
    assert sorted(answer.status for answer in both) == [429, 503]
    for answer in both:
        assert "Retry-After" in answer.headers


async def test_keys(daemon: StartDaemon, mirror: Mirror, http: aiohttp.ClientSession) -> None:
    """The route is for keys that see everything; requests fetch only what their key may use."""
    url = mirror.add("a.gguf", CONTENT)
    keys = [{"name": "ann", "key": "sk-ann"}, {"name": "bob", "key": "sk-bob", "names": ["other"]}]
    settings = {**SMALL, "pull": "on-demand", "api_keys": keys}
    served = daemon((), {"a.yaml": rule("small", sha256(CONTENT), url)}, settings=settings)
    for key, status in (("", 401), ("sk-bob", 403)):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with http.post(f"{served.base_url}/localaid/pull?name=small", headers=headers) as answer:
            assert answer.status == status
    bob = {"Authorization": "Bearer sk-bob"}
    body = {"model": "small", "messages": [{"role": "user", "content": "Hi"}]}
    async with http.post(served.base_url + CHAT, headers=bob, json=body) as answer:
        assert answer.status == 404
    headers = {"Authorization": "Bearer sk-ann", "Origin": "https://example.org"}
    async with http.post(f"{served.base_url}/localaid/pull?name=small", headers=headers) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (403, "origin_refused")
    assert mirror.asked == []
    headers = {"Authorization": "Bearer sk-ann"}
    async with http.post(f"{served.base_url}/localaid/pull?name=small&follow=true", headers=headers) as answer:
        assert b'"state":"done"' in await answer.read()


async def test_without_on_demand_nothing_comes_by_itself(
    daemon: StartDaemon, mirror: Mirror, http: aiohttp.ClientSession
) -> None:
    """The 404 says what to do; off means off; http must be allowed."""
    url = mirror.add("a.gguf", CONTENT)
    config = {"a.yaml": rule("small", sha256(CONTENT), url)}
    served = daemon((), config, settings={})
    async with await chat(http, served) as answer:
        assert answer.status == 404
        assert "`localaid pull small` fetches one" in (await answer.json())["error"]["message"]
    async for event in follow(http, served.base_url, "small"):
        last = event
    assert "allow_http is false" in (last.downloads[0].problem or "")
    served.settings.write_text("pull: off\nallow_http: true\n")
    served.process.signal(signal.SIGHUP)
    served.process.wait_for_line("settings: .*allow_http")
    async with http.post(f"{served.base_url}/localaid/pull?name=small") as answer:
        assert answer.status == 409
    async with http.post(f"{served.base_url}/localaid/pull") as answer:
        assert answer.status == 400
    async with http.delete(f"{served.base_url}/localaid/pull?name=small") as answer:
        assert answer.status == 404
    assert mirror.asked == []


async def test_the_command_with_a_daemon(daemon: StartDaemon, mirror: Mirror) -> None:
    """It shows how far that is, and where the file is; Ctrl-C leaves it going, --cancel ends it."""
    url = mirror.add("a.gguf", CONTENT)
    served = daemon((), {"a.yaml": rule("small", sha256(CONTENT), url)}, settings=SMALL)
    mirror["a.gguf"].pause_at = 2 * MIB
    at = ["--listen", served.base_url.removeprefix("http://")]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), "pull", "small", *at, stdout=pipe, stderr=pipe
    )
    assert process.stderr is not None
    while not (await process.stderr.readline()).startswith(b"a.gguf: 6"):
        pass
    process.send_signal(signal.SIGINT)
    said = (await process.stderr.read()).decode()
    assert await process.wait() == 130
    assert "the daemon goes on with it; `localaid pull --cancel small` ends it" in said
    code, out, err = await run_cli("pull", "--cancel", "--json", "small", *at)
    assert (code, json.loads(out)["downloads"][0]["state"]) == (0, "cancelled"), err
    mirror["a.gguf"].go.set()
    code, out, err = await run_cli("pull", "small", *at)
    assert (code, out) == (0, f"{served.models}/a.gguf\n"), err
    assert "a.gguf: 100 % of 3 MB, done" in err
    code, out, _ = await run_cli("pull", sha256(CONTENT), "--json", *at)
    assert (code, json.loads(out)["present"]) == (0, f"{served.models}/a.gguf")
    code, _, err = await run_cli("pull", "nonsense", *at)
    assert code == 1
    assert "no config has a model, a rule or a SHA of this name" in err


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """The arguments of a command that finds its folders itself."""
    for name in ("models", "configs", "state"):
        (tmp_path / name).mkdir()
    (tmp_path / "localaid.yaml").write_text("allow_http: true\n")
    named = [part for name in ("models", "configs", "state") for part in (f"--{name}", str(tmp_path / name))]
    return [*named, "--settings", str(tmp_path / "localaid.yaml")]


async def test_the_command_without_a_daemon(folders: list[str], tmp_path: Path, mirror: Mirror) -> None:
    """It downloads by itself; a failure is its exit status, with both SHAs."""
    (tmp_path / "configs" / "a.yaml").write_text(rule("small", sha256(CONTENT), mirror.add("a.gguf", CONTENT)))
    (tmp_path / "configs" / "b.yaml").write_text(rule("bad", sha256(b"x"), mirror.add("b.gguf", OTHER)))
    code, out, err = await run_cli("pull", "small", *folders)
    assert (code, out) == (0, f"{tmp_path}/models/a.gguf\n"), err
    assert (tmp_path / "models" / "a.gguf").read_bytes() == CONTENT
    code, out, _ = await run_cli("hash", f"{tmp_path}/models/a.gguf", *folders)
    assert out.startswith(sha256(CONTENT))
    code, out, err = await run_cli("pull", "bad", *folders)
    assert (code, out) == (1, "")
    assert sha256(OTHER) in err
    assert sha256(b"x") in err
