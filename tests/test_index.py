"""Section INDEX: real folders, real inotify, real files.  Tests wait for inventories and batches, never for time."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

import gguf
import inotify_simple
import numpy as np
import pytest

import localaid
from models import find_smollm2

SMOLLM2 = find_smollm2()
SMOLLM2_SHA256 = hashlib.sha256(SMOLLM2.read_bytes()).hexdigest()


def write_gguf(path: Path, name: str = "model", *, part: int | None = None, parts: int = 3, rows: int = 4) -> bytes:
    """Write a small GGUF file; return its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    if part is not None:
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", parts)
    writer.add_tensor(f"tensor.{part}", np.ones((rows, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def sha256(content: bytes) -> str:
    """Return the hex digest."""
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@contextlib.asynccontextmanager
async def running(
    *roots: Path, state: Path | None = None, rescan_s: float = 3600.0
) -> AsyncIterator[localaid.ModelIndex]:
    """Run an index; the periodic rescan is off unless asked for, so that it cannot hide what events miss."""
    index = localaid.ModelIndex(roots, state=state, rescan_s=rescan_s)
    await index.start()
    try:
        yield index
    finally:
        await index.stop()


def entry_of(inventory: localaid.Inventory, relative: str) -> localaid.FileEntry | None:
    """Return the entry of a path below its models folder."""
    return next((file for file in inventory.files if file.relative == relative), None)


async def known(index: localaid.ModelIndex, relative: str, digest: str | None = None) -> localaid.FileEntry:
    """Wait until a file has a SHA (this one), and return its entry."""

    def holds(inventory: localaid.Inventory) -> bool:
        entry = entry_of(inventory, relative)
        return entry is not None and entry.sha256 is not None and digest in (None, entry.sha256)

    entry = entry_of(await index.wait_until(holds), relative)
    assert entry is not None
    return entry


async def refused(index: localaid.ModelIndex, relative: str, problem: str) -> localaid.FileEntry:
    """Wait until a file is listed with a problem, and return its entry."""

    def holds(inventory: localaid.Inventory) -> bool:
        entry = entry_of(inventory, relative)
        return entry is not None and problem in (entry.problem or "")

    entry = entry_of(await index.wait_until(holds), relative)
    assert entry is not None
    assert entry.serves == frozenset()
    return entry


async def without(index: localaid.ModelIndex, relative: str) -> None:
    """Wait until a file is not listed."""
    await index.wait_until(lambda inventory: entry_of(inventory, relative) is None)


def keep_from_hashing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Let nothing be opened for reading any more; return what somebody tried to open."""
    opened: list[Path] = []

    def refuse(job: localaid.HashJob) -> None:
        opened.append(Path(job.path))
        raise OSError(errno.EIO, "reading was not expected")

    monkeypatch.setattr(localaid.HashJob, "_open", refuse)
    return opened


# -- the index --


async def test_a_dropped_file_is_listed_with_what_its_header_says(models: Path) -> None:
    """A real model, copied into the folder while the index runs, gets SHA, size, paths and header."""
    async with running(models) as index:
        assert not index.inventory.files
        await asyncio.to_thread(shutil.copy, SMOLLM2, models / "smollm2.gguf")
        entry = await known(index, "smollm2.gguf", SMOLLM2_SHA256)
        assert (entry.path, entry.size_bytes) == (str(models / "smollm2.gguf"), SMOLLM2.stat().st_size)
        assert entry.mtime == pytest.approx((models / "smollm2.gguf").stat().st_mtime)
        assert entry.serves == localaid.GENERATES
        assert entry.sha1 is None
        info = index.info(SMOLLM2_SHA256)
        assert info is not None
        assert info.architecture == "llama"
        assert index.info("0" * 64) is None


async def test_files_that_are_there_at_the_start(models: Path) -> None:
    """All are in the inventory when `start` returns, hashed or not; names do not matter."""
    first = write_gguf(models / "a.gguf")
    second = write_gguf(models / "sub" / "deep" / "blob-without-extension", "other")
    async with running(models) as index:
        assert {file.relative for file in index.inventory.files} == {"a.gguf", "sub/deep/blob-without-extension"}
        await known(index, "a.gguf", sha256(first))
        await known(index, "sub/deep/blob-without-extension", sha256(second))
        await index.wait_until(lambda _: not index.hashing)
        progress = index.progress
        assert (progress.files, progress.files_total) == (2, 2)
        assert progress.bytes == progress.bytes_total == len(first) + len(second)


async def test_delete_replace_rename(models: Path, tmp_path: Path) -> None:
    """The inventory follows; a file that is renamed over another takes its place at once."""
    write_gguf(models / "a.gguf")
    async with running(models) as index:
        await known(index, "a.gguf")
        replacement = write_gguf(tmp_path / "new.gguf", "replacement")
        (tmp_path / "new.gguf").replace(models / "a.gguf")
        await known(index, "a.gguf", sha256(replacement))
        rewritten = write_gguf(models / "a.gguf", "rewritten in place")
        await known(index, "a.gguf", sha256(rewritten))
        (models / "a.gguf").rename(models / "b.gguf")
        await known(index, "b.gguf", sha256(rewritten))
        assert entry_of(index.inventory, "a.gguf") is None
        (models / "b.gguf").unlink()
        await without(index, "b.gguf")
        assert index.info(sha256(rewritten)) is None


async def test_what_was_only_moved_or_changed_in_mode_is_not_read_again(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rename, move into a new folder, a new link, chmod: the SHA stays, without a byte read."""
    content = write_gguf(models / "a.gguf")
    async with running(models) as index:
        await known(index, "a.gguf")
        opened = keep_from_hashing(monkeypatch)
        (models / "a.gguf").rename(models / "b.gguf")
        await known(index, "b.gguf", sha256(content))
        (models / "new").mkdir()
        (models / "b.gguf").rename(models / "new" / "c.gguf")
        await known(index, "new/c.gguf", sha256(content))
        (models / "new").rename(models / "newer")
        await known(index, "newer/c.gguf", sha256(content))
        (models / "newer" / "c.gguf").chmod(0o600)
        (models / "link.gguf").symlink_to("newer/c.gguf")
        await known(index, "link.gguf", sha256(content))
        (models / "hard.gguf").hardlink_to(models / "newer" / "c.gguf")
        await known(index, "hard.gguf", sha256(content))
        await known(index, "newer/c.gguf", sha256(content))
        assert opened == []


async def test_a_rewrite_within_one_tick_of_the_clock_is_seen(models: Path) -> None:
    """Same size, same times: only the event tells that a file was written again."""
    first = write_gguf(models / "a.gguf", "one")
    stamp = (models / "a.gguf").stat()
    async with running(models) as index:
        await known(index, "a.gguf", sha256(first))
        second = first.replace(b"one", b"two")
        (models / "a.gguf").write_bytes(second)
        os.utime(models / "a.gguf", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        await known(index, "a.gguf", sha256(second))


async def test_a_copy_in_progress_is_never_served(models: Path) -> None:
    """While a writer has the file open it is not listed, or listed as cut short; closed, it is served."""
    content = write_gguf(models.parent / "source.gguf", rows=64)
    async with running(models) as index:
        offers: list[localaid.FileEntry] = []
        index.subscribe(lambda inventory: offers.extend(file for file in inventory.files if file.serves))
        with (models / "a.gguf").open("wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            write_gguf(models / "marker-1.gguf")
            await known(index, "marker-1.gguf")
            (models / "a.gguf").chmod(0o644)
            write_gguf(models / "marker-2.gguf")
            await known(index, "marker-2.gguf")
            assert not [file for file in offers if file.relative == "a.gguf"]
            file.write(content[len(content) // 2 :])
        await known(index, "a.gguf", sha256(content))


async def test_a_file_that_is_written_to_unseen_is_doubted(models: Path) -> None:
    """In place, and not closed yet: once somebody has found it changed nothing is known of it until it is whole."""
    first, second = write_gguf(models / "a.gguf", "one", rows=64), write_gguf(models.parent / "b.gguf", "two", rows=64)
    async with running(models) as index:
        await known(index, "a.gguf", sha256(first))
        problems: list[str | None] = []
        index.subscribe(lambda inventory: problems.extend(file.problem for file in inventory.files))
        with (models / "a.gguf").open("r+b") as file:
            file.truncate(100)  # its header is broken now
            index.doubt([str(models / "a.gguf"), "/never/heard/of.gguf"])
            entry = entry_of(index.inventory, "a.gguf")
            assert entry is not None
            assert entry.sha256 is None, "at once: who asks again must not find what is no more"
            write_gguf(models / "marker.gguf")
            await known(index, "marker.gguf")
            await index.wait_until(lambda _: not index.hashing)
            entry = entry_of(index.inventory, "a.gguf")
            assert entry is not None
            assert (entry.sha256, entry.problem) == (None, None)
            file.write(second)
        await known(index, "a.gguf", sha256(second))
        assert set(problems) == {None}


async def test_a_file_that_is_doubted_for_nothing(models: Path) -> None:
    """It is known again as soon as it was looked at."""
    content = write_gguf(models / "a.gguf")
    async with running(models) as index:
        await known(index, "a.gguf", sha256(content))
        index.doubt([str(models / "a.gguf")])
        assert not index._infos
        await known(index, "a.gguf", sha256(content))


async def test_a_file_that_is_being_written_at_the_start(models: Path) -> None:
    """Its full size and a whole header say nothing: it is read when its writer has closed it."""
    content = write_gguf(models / "a.gguf", rows=64)
    with (models / "a.gguf").open("r+b") as file:
        if not localaid.find_writer(str(models / "a.gguf")):
            pytest.skip("this file system tells nobody of writers")
        async with running(models) as index:
            write_gguf(models / "marker.gguf")
            await known(index, "marker.gguf")
            entry = entry_of(index.inventory, "a.gguf")
            assert entry is not None
            assert (entry.sha256, entry.problem) == (None, None)
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
            file.close()
            await known(index, "a.gguf", sha256(content[:-1] + b"x"))


async def test_a_file_cut_short_is_listed_and_served_once_it_is_whole(models: Path) -> None:
    """Also when the index starts in the middle of a copy."""
    content = write_gguf(models.parent / "source.gguf", rows=64)
    (models / "a.gguf").write_bytes(content[:-100])
    async with running(models) as index:
        entry = await refused(index, "a.gguf", "cut short")
        assert entry.sha256 is None
        with (models / "a.gguf").open("ab") as file:
            file.write(content[-100:])
        await known(index, "a.gguf", sha256(content))


async def test_files_that_cannot_be_served_are_listed_with_the_reason(models: Path) -> None:
    """Legacy, random, unreadable: each with its reason, none hashed; projectors and adapters have a SHA."""
    (models / "legacy.bin").write_bytes(b"tjgg" + bytes(100))
    (models / "notes.txt").write_text("notes")
    (models / "empty").touch()
    writer = gguf.GGUFWriter(models / "mmproj.gguf", "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    async with running(models) as index:
        assert (await refused(index, "legacy.bin", "ggjt")).sha256 is None
        assert (await refused(index, "notes.txt", "not a GGUF file")).sha256 is None
        await refused(index, "empty", "empty")
        projector = await known(index, "mmproj.gguf")
        assert "projector" in str(projector.problem)


async def test_an_unreadable_file(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed with what the system says, and read when that has changed (root may read everything: simulated)."""
    content = write_gguf(models / "a.gguf")
    with monkeypatch.context() as patch:

        def refuse(_job: localaid.HashJob) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        patch.setattr(localaid.HashJob, "_open", refuse)
        async with running(models) as index:
            await refused(index, "a.gguf", "Permission denied")
            patch.undo()
            (models / "a.gguf").chmod(0o644)
            await known(index, "a.gguf", sha256(content))


async def test_work_in_progress_and_hidden_files_are_passed_over(models: Path) -> None:
    """Names that downloaders, editors and rsync give to what is not ready; the rename makes it count."""
    names = [
        "a.gguf.part",
        "a.tmp",
        ".hidden",
        "a.incomplete",
        "a.crdownload",
        "sha256-1f-partial-3",
        "a.gguf~",
        "x.aria2",
    ]
    for name in names:
        write_gguf(models / name)
    write_gguf(models / ".locks" / "a.gguf")
    async with running(models) as index:
        assert not index.inventory.files
        (models / "a.gguf.part").rename(models / "a.gguf")
        await known(index, "a.gguf")
        assert [file.relative for file in index.inventory.files] == ["a.gguf"]


async def test_subfolders_that_come_full(models: Path, tmp_path: Path) -> None:
    """A folder that is moved in, and folders made and filled at once, lose nothing; a folder that goes takes all."""
    write_gguf(tmp_path / "full" / "x" / "y" / "a.gguf")
    async with running(models) as index:
        (tmp_path / "full").rename(models / "full")
        await known(index, "full/x/y/a.gguf")
        for number in range(30):
            write_gguf(models / f"n{number}" / "m" / "a.gguf", str(number))
        for number in range(30):
            await known(index, f"n{number}/m/a.gguf")
        write_gguf(models / "n7" / "m" / "later.gguf")
        await known(index, "n7/m/later.gguf")
        shutil.rmtree(models / "n7")
        await without(index, "n7/m/later.gguf")
        (models / "full").rename(tmp_path / "gone")
        await without(index, "full/x/y/a.gguf")
        write_gguf(tmp_path / "gone" / "x" / "unseen.gguf")
        write_gguf(models / "n8" / "end.gguf")
        await known(index, "n8/end.gguf")
        assert entry_of(index.inventory, "full/x/unseen.gguf") is None


async def test_links_to_files(models: Path, tmp_path: Path) -> None:
    """What happens to the target, outside of the folder, is seen through the link, and through a link to the link."""
    target = tmp_path / "elsewhere" / "blob"
    first = write_gguf(target)
    (models / "a.gguf").symlink_to(target)
    (models / "b.gguf").symlink_to("a.gguf")
    async with running(models) as index:
        await known(index, "a.gguf", sha256(first))
        await known(index, "b.gguf", sha256(first))
        rewritten = write_gguf(target, "rewritten")
        await known(index, "a.gguf", sha256(rewritten))
        replaced = write_gguf(tmp_path / "elsewhere" / "new", "replaced")
        (tmp_path / "elsewhere" / "new").replace(target)
        await known(index, "a.gguf", sha256(replaced))
        await known(index, "b.gguf", sha256(replaced))
        target.unlink()
        await without(index, "a.gguf")
        back = write_gguf(target, "back")
        await known(index, "a.gguf", sha256(back))
        shutil.rmtree(target.parent)
        await without(index, "b.gguf")
        again = write_gguf(target, "again")
        await known(index, "b.gguf", sha256(again))
        (models / "a.gguf").unlink()
        await without(index, "b.gguf")


async def test_hard_links(models: Path) -> None:
    """The kernel tells of a write under one name only; the others follow."""
    write_gguf(models / "a.gguf")
    (models / "sub").mkdir()
    async with running(models) as index:
        (models / "sub" / "b.gguf").hardlink_to(models / "a.gguf")
        await known(index, "sub/b.gguf")
        rewritten = write_gguf(models / "a.gguf", "rewritten")
        await known(index, "a.gguf", sha256(rewritten))
        await known(index, "sub/b.gguf", sha256(rewritten))


async def test_links_to_folders_and_loops(models: Path, tmp_path: Path) -> None:
    """Linked folders are listed and watched; loops of links end."""
    write_gguf(tmp_path / "store" / "sub" / "a.gguf")
    (tmp_path / "store" / "loop").symlink_to(models)
    (models / "store").symlink_to(tmp_path / "store")
    (models / "self").symlink_to(models)
    (models / "dangling").symlink_to(tmp_path / "later")
    (models / "knot").symlink_to("knot")
    async with running(models) as index:
        await known(index, "store/sub/a.gguf")
        assert len(index.inventory.files) == 1
        write_gguf(tmp_path / "store" / "sub" / "b.gguf")
        await known(index, "store/sub/b.gguf")
        write_gguf(tmp_path / "later" / "c.gguf")
        await known(index, "dangling/c.gguf")
        (models / "store").unlink()
        await without(index, "store/sub/a.gguf")
        (models / "store").symlink_to(tmp_path / "later")
        await known(index, "store/c.gguf")
        await known(index, "dangling/c.gguf")


async def test_a_folder_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    """Also one that was never there, and several folders above it with it."""
    root = tmp_path / "a" / "b" / "models"
    async with running(root) as index:
        assert not index.inventory.files
        write_gguf(root / "x.gguf")
        await known(index, "x.gguf")
        shutil.rmtree(tmp_path / "a")
        await without(index, "x.gguf")
        write_gguf(root / "y.gguf")
        await known(index, "y.gguf")
        (tmp_path / "a" / "b").rename(tmp_path / "a" / "c")
        await without(index, "y.gguf")
        (tmp_path / "a" / "c").rename(tmp_path / "a" / "b")
        await known(index, "y.gguf")
        write_gguf(root / "z.gguf")
        await known(index, "z.gguf")


async def test_split_models(models: Path) -> None:
    """One entry under the first part's path and SHA, served when all parts are there and belong together."""

    def name(number: int) -> str:
        return f"big-0000{number}-of-00003.gguf"

    first = write_gguf(models / name(1), part=0)
    async with running(models) as index:
        await refused(index, name(1), "part 2 of 3 is missing (big-00002-of-00003.gguf)")
        second = write_gguf(models / name(2), part=1)
        third = write_gguf(models / name(3), part=2, rows=8)
        entry = entry_of(
            await index.wait_until(lambda inventory: any(file.serves for file in inventory.files)), name(1)
        )
        assert entry is not None
        assert (entry.sha256, entry.problem) == (sha256(first), None)
        assert entry.size_bytes == len(first) + len(second) + len(third)
        assert len(index.inventory.files) == 1
        info = index.info(sha256(first))
        assert info is not None
        assert (info.parts, info.weights_bytes) == (3, 512 + 512 + 1024)
        write_gguf(models / name(3), part=1)
        await refused(index, name(1), "different models, or in the wrong order")
        (models / name(3)).write_bytes(third[:-1])
        await refused(index, name(1), "part 3: it is cut short")
        (models / name(3)).write_bytes(third)
        await index.wait_until(lambda inventory: any(file.serves for file in inventory.files))
        (models / name(1)).unlink()
        await refused(index, name(2), "part 1 of 3 is missing")


async def test_a_split_model_in_a_blob_store(models: Path, tmp_path: Path) -> None:
    """Links with the right names make one model; the blobs that they lead to are no models beside it."""
    for number in range(3):
        write_gguf(models / "blobs" / f"blob{number}", part=number)
        (models / f"big-0000{number + 1}-of-00003.gguf").symlink_to(f"blobs/blob{number}")
    write_gguf(models / "blobs" / "lonely", part=1, parts=2)
    async with running(models, tmp_path) as index:
        await index.wait_until(lambda inventory: any(file.serves for file in inventory.files))
        await refused(index, "blobs/lonely", "name-00002-of-00002.gguf")
        assert {file.relative for file in index.inventory.files} == {"big-00001-of-00003.gguf", "blobs/lonely"}


async def test_one_content_under_two_paths(models: Path) -> None:
    """Copies are two paths of one SHA; when one goes the model stays."""
    content = write_gguf(models / "a.gguf")
    (models / "b.gguf").write_bytes(content)
    async with running(models) as index:
        await known(index, "a.gguf", sha256(content))
        await known(index, "b.gguf", sha256(content))
        assert {file.relative for file in index.inventory.find(f"sha256:{sha256(content)}")} == {"a.gguf", "b.gguf"}
        (models / "a.gguf").unlink()
        await without(index, "a.gguf")
        assert index.info(sha256(content)) is not None


async def test_aliases(models: Path) -> None:
    """aliases.json gives second names by path or file name; a broken one changes nothing; gone, so are the names."""
    write_gguf(models / "some-model.gguf")
    write_gguf(models / "sub" / "other.gguf")
    aliases = models / "aliases.json"

    def aliases_of(inventory: localaid.Inventory, relative: str) -> tuple[tuple[str, str | None], ...]:
        entry = entry_of(inventory, relative)
        return entry.alias_names if entry else ()

    async with running(models) as index:
        aliases.write_text(
            '{"some-model": {"alias": "whisper", "description": "Hears."}, "sub/other.gguf": {"alias": "o"}}'
        )
        await index.wait_until(lambda inventory: aliases_of(inventory, "some-model.gguf") == (("whisper", "Hears."),))
        assert aliases_of(index.inventory, "sub/other.gguf") == (("o", None),)
        assert entry_of(index.inventory, "aliases.json") is None
        aliases.write_text("{")
        write_gguf(models / "marker.gguf")
        await known(index, "marker.gguf")
        assert aliases_of(index.inventory, "some-model.gguf") == (("whisper", "Hears."),)
        (problem,) = index.inventory.problems
        assert str(problem).startswith(f"{aliases}: is no JSON: ")
        aliases.write_text('{"some-modle": {"alias": "whisper"}, "late": {"alias": "l"}}')
        await index.wait_until(lambda inventory: bool(inventory.warnings))
        assert index.inventory.problems == ()
        assert list(map(str, index.inventory.warnings)) == [
            f"{aliases}: late: names no file of this folder, as yet",
            f"{aliases}: some-modle: names no file of this folder, as yet (did you mean some-model?)",
        ]
        write_gguf(models / "late.gguf")
        await index.wait_until(lambda inventory: len(inventory.warnings) == 1)
        aliases.write_text('{"some-model": {"alias": "whisper"}}')
        await index.wait_until(lambda inventory: aliases_of(inventory, "some-model.gguf") == (("whisper", None),))
        assert index.inventory.warnings == ()
        aliases.unlink()
        await index.wait_until(lambda inventory: aliases_of(inventory, "some-model.gguf") == ())


async def test_aliases_that_an_editor_writes_anew(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the old file away first: the names stay for that moment."""
    monkeypatch.setattr(localaid, "LEAVING_S", 3600.0)
    write_gguf(models / "some-model.gguf")
    aliases = models / "aliases.json"
    aliases.write_text('{"some-model": {"alias": "whisper"}}')
    async with running(models) as index:
        await index.wait_until(lambda inventory: any(file.alias_names for file in inventory.files))
        aliases.unlink()
        write_gguf(models / "marker.gguf")
        await known(index, "marker.gguf")
        assert [file.alias_names for file in index.inventory.files if file.alias_names] == [(("whisper", None),)]
        monkeypatch.setattr(localaid, "LEAVING_S", 0.0)
        index._watch.doubt([str(aliases)])
        await index.wait_until(lambda inventory: not any(file.alias_names for file in inventory.files))


async def test_sha1_only_where_it_is_wanted(models: Path) -> None:
    """Files that are known already get theirs when a rule asks; meanwhile they are served."""
    content = write_gguf(models / "a.gguf")
    async with running(models) as index:
        assert (await known(index, "a.gguf")).sha1 is None
        index.want_sha1(wanted=True)
        later = write_gguf(models / "b.gguf", "later")
        wanted = {hashlib.sha1(data, usedforsecurity=False).hexdigest() for data in (content, later)}
        await index.wait_until(lambda inventory: {file.sha1 for file in inventory.files} == wanted)
        assert {file.sha256 for file in index.inventory.files} == {sha256(content), sha256(later)}


async def test_short_files_overtake_long_ones(models: Path) -> None:
    """Both threads have files to hash that take a minute each; a small one is known all the same."""
    for name in ("long-1.gguf", "long-2.gguf"):
        write_gguf(models / name, name)
        os.truncate(models / name, 64 * 2**30)  # sparse
    async with running(models) as index:
        await index.wait_until(lambda inventory: all(file.serves for file in inventory.files))
        short = write_gguf(models / "short.gguf", "short")
        await known(index, "short.gguf", sha256(short))
        assert [bool(file.sha256) for file in sorted(index.inventory.files, key=lambda file: file.path)] == [
            False,
            False,
            True,
        ]
        assert index.progress.bytes_total > 2 * 64 * 2**30
        (models / "long-1.gguf").unlink()
        (models / "long-2.gguf").unlink()
        await index.wait_until(lambda _: not index.hashing)
        assert len(index.inventory.files) == 1


async def test_a_file_that_changes_while_it_is_hashed_is_hashed_anew(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest of half old and half new bytes is never shown."""
    readv = os.readv
    first_read = threading.Lock()  # taken once: two threads may be here
    new = write_gguf(models.parent / "new.gguf", "new", rows=8)

    def change_meanwhile(descriptor: int, buffers: list[memoryview]) -> int:
        size = readv(descriptor, buffers)
        if first_read.acquire(blocking=False):
            (models / "a.gguf").write_bytes(new)
        return size

    monkeypatch.setattr(os, "readv", change_meanwhile)
    shown: set[str | None] = set()
    async with running(models) as index:
        index.subscribe(lambda inventory: shown.update(file.sha256 for file in inventory.files))
        write_gguf(models / "a.gguf", "old")
        await known(index, "a.gguf")
        await index.wait_until(lambda _: not index.hashing)
        assert shown - {None} == {sha256(new)}


async def test_names_that_are_not_utf8_are_listed_as_such(models: Path) -> None:
    """JSON could not carry them as they are."""
    write_gguf(models / "a.gguf")
    shutil.copy(models / "a.gguf", models / os.fsdecode(b"b\xff.gguf"))
    async with running(models) as index:
        await known(index, "a.gguf")
        (entry,) = [file for file in index.inventory.files if file.relative != "a.gguf"]
        assert (entry.relative, entry.problem) == ("b\ufffd.gguf", "its name is not UTF-8; rename it")
        (models / os.fsdecode(b"b\xff.gguf")).rename(models / "b.gguf")
        await known(index, "b.gguf")
        assert [file.relative for file in index.inventory.files] == ["b.gguf", "a.gguf"]


async def test_a_cache_that_cannot_be_read_or_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told as what it is, and no half of it is left behind."""
    write_gguf(models / "a.gguf")
    file = tmp_path / "state" / localaid.DigestCache.FILE_NAME
    file.mkdir(parents=True)  # as good as one that may not be read: root may read everything

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    async with running(models, state=file.parent) as index:
        await known(index, "a.gguf")
        assert f"{file}: Is a directory; it is thrown away, and all models are hashed anew" in caplog.text
    assert f"{file} cannot be written, the next start hashes anew: " in caplog.text
    assert "No space left" in caplog.text
    assert list(file.parent.iterdir()) == [file]


async def test_fifos_do_not_hold_anything_up(models: Path) -> None:
    """What is no regular file is not opened."""
    os.mkfifo(models / "pipe.gguf")
    async with running(models) as index:
        write_gguf(models / "a.gguf")
        await known(index, "a.gguf")
        os.mkfifo(models / "pipe2.gguf")
        (models / "pipe2.gguf").rename(models / "pipe3.gguf")
        write_gguf(models / "b.gguf")
        await known(index, "b.gguf")
        assert {file.relative for file in index.inventory.files} == {"a.gguf", "b.gguf"}


def shuffle_folders(choices: random.Random, models: Path, outside: Path) -> None:
    """Do something to the folders, as users and their tools may."""
    names = ["a", "b", "c.gguf", "d.gguf", "a/b", "a/c.gguf", "b/d.gguf", "a/b/a.gguf"]
    places = [folder / name for folder in (models, outside) for name in names]
    one, two = choices.sample(places, 2)
    source = choices.choice([outside / "source-1", outside / "source-2"])
    with contextlib.suppress(OSError):
        match choices.randrange(8):
            case 0:
                one.mkdir(parents=True)
            case 1 | 2:
                shutil.copy(source, one)
            case 3:
                shutil.copy(source, one.with_suffix(".part"))
                one.with_suffix(".part").replace(one)
            case 4:
                one.rename(two)
            case 5:
                one.symlink_to(choices.choice([two, Path("../a"), Path("c.gguf"), models]))
            case 6:
                one.unlink()
            case 7:
                shutil.rmtree(one)


@pytest.mark.parametrize("seed", range(20))
async def test_the_index_converges_on_what_is_there(models: Path, tmp_path: Path, seed: int) -> None:
    """After any sequence of operations, links included, it shows what a new one finds."""
    outside = tmp_path / "outside"
    for number in (1, 2):
        write_gguf(outside / f"source-{number}", str(number))
    choices = random.Random(seed)
    async with running(models) as index:
        for _ in range(12):
            for _ in range(choices.randrange(1, 12)):
                shuffle_folders(choices, models, outside)
            async with running(models) as fresh:
                await fresh.wait_until(lambda _: not fresh.hashing)
                there = set(fresh.inventory.files)
            await index.wait_until(lambda inventory: set(inventory.files) == there)  # noqa: B023 - awaited here


# -- the cache --


async def test_a_restart_reads_nothing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 files, good ones, split ones and others, are all known when `start` returns, with their headers."""
    for number in range(990):
        write_gguf(models / str(number % 7) / f"{number}.gguf", str(number))
    for part in range(3):
        write_gguf(models / f"big-0000{part + 1}-of-00003.gguf", part=part)
    for number in range(7):
        (models / f"{number}.txt").write_text("text")
    state = tmp_path / "state"
    async with running(models, state=state) as index:
        await index.wait_until(lambda _: not index.hashing)
        before = index.inventory.files
        assert sum(bool(file.serves) for file in before) == 991
    opened = keep_from_hashing(monkeypatch)
    async with running(models, state=state) as index:
        assert index.inventory.files == before
        assert not index.hashing
        assert all(index.info(file.sha256) for file in before if file.sha256)
    assert opened == []


async def test_the_cache_knows_a_change_that_nobody_saw(models: Path, tmp_path: Path) -> None:
    """A file rewritten while the index was down, with its old size and mtime, is hashed anew."""
    first = write_gguf(models / "a.gguf", "one")
    async with running(models, state=tmp_path) as index:
        await known(index, "a.gguf", sha256(first))
    times = (models / "a.gguf").stat()
    second = write_gguf(models / "a.gguf", "two")
    os.utime(models / "a.gguf", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(first) == len(second)
    async with running(models, state=tmp_path) as index:
        await known(index, "a.gguf", sha256(second))


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "folder"])
async def test_a_damaged_cache_is_thrown_away(
    models: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It only saves work: a warning, everything hashed anew, and a good cache after that."""
    content = write_gguf(models / "a.gguf")
    async with running(models, state=tmp_path) as index:
        await known(index, "a.gguf", sha256(content))
    cache = tmp_path / localaid.DigestCache.FILE_NAME
    good = cache.read_bytes()
    flipped = good[:-20] + bytes([good[-20] ^ 1]) + good[-19:]
    if damage == "folder":
        cache.unlink()
        cache.mkdir()
    else:
        cache.write_bytes({"empty": b"", "cut": good[:-1], "flipped": flipped, "text": b"text"}[damage])
    async with running(models, state=tmp_path) as index:
        await known(index, "a.gguf", sha256(content))
    assert str(cache) in caplog.text
    if damage != "folder":
        assert cache.read_bytes() == good


async def test_a_newer_localaid_reads_headers_again_but_hashes_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may find more in them."""
    content = write_gguf(models / "a.gguf")
    async with running(models, state=tmp_path) as index:
        await known(index, "a.gguf", sha256(content))
    monkeypatch.setattr(localaid, "__version__", "99.0")

    def never(*_: object) -> None:
        raise AssertionError("hashing was not expected")

    monkeypatch.setattr(localaid.HashJob, "_hash", never)
    async with running(models, state=tmp_path) as index:
        entry = await known(index, "a.gguf", sha256(content))
        await index.wait_until(lambda inventory: all(file.serves for file in inventory.files))
        assert entry.sha256 == sha256(content)


def test_the_cache_keeps_what_is_away_but_not_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may come back; thousands of files that were there once do not stay for ever."""
    monkeypatch.setattr(localaid.DigestCache, "_ABSENT_LIMIT", 2)
    cache = localaid.DigestCache(tmp_path / "cache")
    stamps = [localaid.Stamp(1, number, 10, 20, 30) for number in range(6)]
    for stamp in stamps:
        cache.put(stamp, localaid.Known(sha256="0" * 64))
    cache.plan_save({stamps[0].identity})()
    again = localaid.DigestCache(tmp_path / "cache")
    again.load()
    assert [bool(again.find(stamp).sha256) for stamp in stamps] == [True, False, False, False, True, True]


def test_hash_file_agrees_with_openssl(tmp_path: Path) -> None:
    """Over several reads, with an odd rest, for both algorithms, and with progress."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3_500_001))
    seen: list[int] = []
    digests = localaid.hash_file(str(path), ("sha256", "sha1"), seen.append)
    assert sum(seen) == 3_500_001
    for algorithm in ("sha256", "sha1"):
        answer = subprocess.run(["openssl", "dgst", f"-{algorithm}", path], capture_output=True, text=True, check=True)
        assert answer.stdout.split()[-1] == digests[algorithm]
    with pytest.raises(FileNotFoundError):
        localaid.hash_file(str(tmp_path / "none"))


# -- the watch --


@contextlib.asynccontextmanager
async def watching(*roots: Path, rescan_s: float = 3600.0) -> AsyncIterator[AsyncGenerator[localaid.Snapshot, None]]:
    """Run a watch and take its first snapshot."""
    async with contextlib.aclosing(localaid.FolderWatch(roots, rescan_s=rescan_s).snapshots()) as snapshots:
        assert not (await anext(snapshots)).is_seamless
        yield snapshots


async def until(
    snapshots: AsyncGenerator[localaid.Snapshot, None], holds: Callable[[localaid.Snapshot], bool]
) -> localaid.Snapshot:
    """Return the first snapshot for which `holds`."""
    async for snapshot in snapshots:
        if holds(snapshot):
            return snapshot
    raise AssertionError("the watch ended")


async def test_snapshots_say_what_is_there(tmp_path: Path) -> None:
    """Also of single files, which need not be there yet; a name that is gone stays for a moment."""
    single = tmp_path / "later" / "keys.txt"
    (tmp_path / "configs").mkdir()
    async with watching(tmp_path / "configs", single) as snapshots:
        file = tmp_path / "configs" / "config.yaml"
        file.write_text("a: 1")
        assert (await until(snapshots, lambda snapshot: str(file) in snapshot.files)).written == {str(file)}
        file.chmod(0o600)
        mode = localaid.stamp_of(file.stat())
        assert not (await until(snapshots, lambda snapshot: snapshot.files[str(file)] == mode)).written
        file.rename(file.with_name("b.yaml"))
        both = await until(snapshots, lambda snapshot: str(file.with_name("b.yaml")) in snapshot.files)
        assert str(file) in both.files
        assert set((await until(snapshots, lambda snapshot: str(file) not in snapshot.files)).files) == {
            str(file.with_name("b.yaml"))
        }
        single.parent.mkdir()
        single.write_text("key")
        await until(snapshots, lambda snapshot: str(single) in snapshot.files)


async def test_what_is_being_written_is_as_it_was(tmp_path: Path) -> None:
    """Until it is closed, in place or anew; and while an editor has taken it away to write it anew."""
    config, marker = tmp_path / "config.yaml", tmp_path / "marker"
    config.write_text("a: 1")
    async with watching(tmp_path) as snapshots:
        for mode in ("r+", "w"):
            old = localaid.stamp_of(config.stat())
            if mode == "w":
                config.rename(tmp_path / "config.yaml~")
            with config.open(mode) as file:
                file.write("a: 12")
                file.flush()
                marker.write_text(mode)
                snapshot = await until(snapshots, lambda snapshot: str(marker) in snapshot.written)
                assert snapshot.files[str(config)] == old
                assert str(config) in snapshot.unsettled
            new = localaid.stamp_of(config.stat())
            await until(snapshots, lambda snapshot, new=new: snapshot.files[str(config)] == new)  # type: ignore[misc]


async def test_many_events_come_as_one_snapshot(tmp_path: Path) -> None:
    """What comes within a moment is told at once: 100 edits of one file are one change."""
    async with watching(tmp_path) as snapshots:
        for number in range(100):
            (tmp_path / "config.yaml").write_text(str(number))
        last = localaid.stamp_of((tmp_path / "config.yaml").stat())
        told = await until(snapshots, lambda snapshot: bool(snapshot.files))
        assert told.files == {str(tmp_path / "config.yaml"): last}


MAX_QUEUED_EVENTS = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


async def test_queue_overflow_means_looking_at_everything(models: Path) -> None:
    """More events than the kernel keeps: none is missed in the end."""
    async with watching(models) as snapshots:
        names = [models / "a", models / "b"]
        for number in range(MAX_QUEUED_EVENTS + 100):  # alternating, as equal events in a row count once
            names[number % 2].touch()
        (models / "last").touch()
        snapshot = await until(snapshots, lambda snapshot: str(models / "last") in snapshot.files)
        assert not snapshot.is_seamless
        assert {Path(path) for path in snapshot.files} == {*names, models / "last"}


async def test_no_more_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the kernel's limit there is one warning with the remedy, and folders are looked at now and then."""
    monkeypatch.setattr(localaid, "_UNWATCHED_RESCAN_S", 0.01)
    add_watch = inotify_simple.INotify.add_watch

    def refuse_subfolders(inotify: inotify_simple.INotify, path: str, mask: int) -> int:
        if Path(path).is_relative_to(tmp_path / "sub"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        watch: int = add_watch(inotify, path, mask)
        return watch

    monkeypatch.setattr(inotify_simple.INotify, "add_watch", refuse_subfolders)
    (tmp_path / "sub" / "loop").mkdir(parents=True)
    (tmp_path / "sub" / "loop" / "back").symlink_to(tmp_path / "sub")
    async with watching(tmp_path) as snapshots:
        (tmp_path / "sub" / "a.gguf").touch()
        snapshot = await until(snapshots, lambda snapshot: str(tmp_path / "sub" / "a.gguf") in snapshot.files)
        assert not snapshot.is_seamless
        assert len(snapshot.files) == 1
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "max_user_watches" in warnings[0].getMessage()


async def test_no_inotify_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an inotify instance everything still works, later."""

    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(inotify_simple, "INotify", refuse)
    monkeypatch.setattr(localaid, "_UNWATCHED_RESCAN_S", 0.01)
    content = write_gguf(tmp_path / "models" / "a.gguf")
    async with running(tmp_path / "models") as index:
        await known(index, "a.gguf", sha256(content))
        (tmp_path / "models" / "a.gguf").unlink()
        await without(index, "a.gguf")


async def test_the_periodic_scan(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that does not notify, files are found by looking."""
    monkeypatch.setattr(localaid.FolderWatch, "_read_events", lambda _: False)
    async with running(models, rescan_s=0.01) as index:
        content = write_gguf(models / "a.gguf")
        await known(index, "a.gguf", sha256(content))


# -- stores of other programs --


class HubCache:
    """A Hugging Face cache as its client lays it out: content below blobs/, links to it below snapshots/."""

    def __init__(self, hub: Path, name: str = "o/n") -> None:
        """Make the repository's folders."""
        self.folder = hub / f"models--{name.replace('/', '--')}"
        (self.folder / "refs").mkdir(parents=True)
        (self.folder / "refs" / "main").write_text("1" * 40)
        (self.folder / ".no_exist" / ("1" * 40)).mkdir(parents=True)
        (self.folder / ".no_exist" / ("1" * 40) / "config.json").touch()
        (hub / "version.txt").write_text("1")

    def add(self, file: str, content: bytes, revision: str = "1" * 40, etag: str | None = None) -> Path:
        """Store a file as a download does; return its path in the snapshot."""
        blob = self.folder / "blobs" / (etag or sha256(content))
        blob.parent.mkdir(exist_ok=True)
        incomplete = blob.with_name(f"{blob.name}.incomplete")
        incomplete.write_bytes(content)
        incomplete.rename(blob)
        link = self.folder / "snapshots" / revision / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        return link


class OllamaStore:
    """Ollama's folder: blobs without extensions, manifests that name them."""

    def __init__(self, folder: Path) -> None:
        """Make the folders."""
        self.folder = folder
        (folder / "blobs").mkdir(parents=True)

    def blob(self, content: bytes) -> str:
        """Store a blob; return its digest."""
        file = self.folder / "blobs" / f"sha256-{sha256(content)}"
        file.with_name(f"{file.name}-partial").write_bytes(content)
        file.with_name(f"{file.name}-partial").rename(file)
        return f"sha256:{sha256(content)}"

    def add(self, name: str, content: bytes) -> Path:
        """Store a model as `ollama pull` does; return its manifest, "HOST/NAMESPACE/MODEL/TAG"."""
        layers = [
            {"mediaType": "application/vnd.ollama.image.model", "digest": self.blob(content), "size": len(content)},
            {"mediaType": "application/vnd.ollama.image.template", "digest": self.blob(b"{{ .Prompt }}"), "size": 13},
            {"mediaType": "application/vnd.ollama.image.license", "digest": self.blob(b"Take it."), "size": 8},
            {"mediaType": "application/vnd.ollama.image.params", "digest": self.blob(b'{"stop": ["x"]}'), "size": 15},
        ]
        config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": self.blob(b"{}"), "size": 2}
        manifest = self.folder / "manifests" / name
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"schemaVersion": 2, "config": config, "layers": layers}))
        return manifest


def names_of(inventory: localaid.Inventory) -> dict[str, str]:
    """Return the names that clients may use, each with the SHA behind it; none while something is being hashed."""
    if any(file.sha256 is None for file in inventory.files):
        return {}
    table = localaid.build_table(localaid.auto_rules(inventory.files))
    return {one.name: one.file.sha256 or "" for one in localaid.plan_listing(table, inventory)}


async def test_a_hugging_face_cache(models: Path) -> None:
    """Its models are served under their files' names, once; nothing else of it is listed, nor its digests believed."""
    cache = HubCache(models)
    content = write_gguf(models.parent / "made.gguf")
    link = cache.add("sub/M-Q4_0.gguf", content, etag="f" * 64)  # which is not its SHA
    cache.add("tokenizer.json", b'{"a": 1}', etag="e" * 40)
    cache.add("model.safetensors", b"\x10\0\0\0\0\0\0\0{}")
    (cache.folder / "blobs" / f"{'d' * 64}.incomplete").write_bytes(content[:100])
    async with running(models) as index:
        named = {name: sha256(content) for name in ("M-Q4_0", "m")}
        await index.wait_until(lambda inventory: names_of(inventory) == named)
        listed = [file.path for file in index.inventory.files]
        assert listed == [str(link), str(cache.folder / "blobs" / ("f" * 64))]
        newer = write_gguf(models.parent / "newer.gguf", "newer")
        cache.add("sub/M-Q4_0.gguf", newer, revision="0" * 40)
        old = f"models--o--n/snapshots/{'1' * 40}/sub/M-Q4_0"
        both = {**dict.fromkeys(named, sha256(newer)), old: sha256(content)}
        await index.wait_until(lambda inventory: names_of(inventory) == both)
        shutil.rmtree(cache.folder)
        await index.wait_until(lambda inventory: inventory.files == ())


async def test_an_ollama_store(models: Path) -> None:
    """Its models are served under Ollama's names; what else its blobs are is passed over; `ollama rm` takes it away."""
    store = OllamaStore(models)
    content = write_gguf(models.parent / "a.gguf")
    other = write_gguf(models.parent / "b.gguf", "other")
    manifest = store.add("registry.ollama.ai/library/smollm2/135m", content)
    async with running(models) as index:
        named = {"smollm2:135m": sha256(content)}
        await index.wait_until(lambda inventory: names_of(inventory) == named)
        assert len(index.inventory.files) == 1
        latest = store.add("registry.ollama.ai/library/smollm2/latest", content)  # only the manifest is new
        named |= dict.fromkeys(("smollm2", "smollm2:latest"), sha256(content))
        await index.wait_until(lambda inventory: names_of(inventory) == named)
        store.add("hf.co/o/n/Q4_0", other)
        named["hf.co/o/n:Q4_0"] = sha256(other)
        await index.wait_until(lambda inventory: names_of(inventory) == named)
        shutil.rmtree(latest.parents[1])
        (models / "blobs" / f"sha256-{sha256(content)}").unlink()
        await index.wait_until(lambda inventory: names_of(inventory) == {"hf.co/o/n:Q4_0": sha256(other)})
        assert not manifest.exists()


async def test_a_lone_blob_is_called_by_its_title(models: Path) -> None:
    """Ollama's blobs without their manifests."""
    store = OllamaStore(models)
    content = write_gguf(models.parent / "a.gguf", "Smol LM")
    store.blob(content)
    store.blob(b"{}")
    async with running(models / "blobs") as index:
        await index.wait_until(lambda inventory: "smol-lm" in names_of(inventory))
        assert [file.sha256 for file in index.inventory.files] == [sha256(content)]


async def test_a_broken_model_in_a_store_is_told_of(models: Path) -> None:
    """It is one that cannot be served, not one of the other blobs."""
    content = write_gguf(models.parent / "a.gguf")
    digest = OllamaStore(models).blob(content[:-8]).replace(":", "-")
    async with running(models) as index:
        await refused(index, f"blobs/{digest}", "cut short")


DIGEST = "0" * 64
LAYER = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{DIGEST}"}


@pytest.mark.parametrize(
    ("path", "document", "names"),
    [
        ("registry.ollama.ai/library/m/7b", {"layers": [LAYER]}, ("m:7b",)),
        ("registry.ollama.ai/library/m/latest", {"layers": [LAYER]}, ("m:latest", "m")),
        ("registry.ollama.ai/ann/m/7b", {"layers": [{}, LAYER]}, ("ann/m:7b",)),
        ("example.org/library/m/7b", {"layers": [LAYER]}, ("example.org/library/m:7b",)),
        ("h/n/m/*", {"layers": [LAYER]}, None),
        ("h/n/m/a\nb", {"layers": [LAYER]}, None),
        ("h/n/m/" + "t" * 400, {"layers": [LAYER]}, None),
        ("h/n/m", {"layers": [LAYER]}, None),
        ("h/n/m/t", {"layers": [{**LAYER, "digest": "sha256:../../../etc/passwd"}]}, None),
        ("h/n/m/t", {"layers": [{"mediaType": "application/vnd.ollama.image.template"}]}, None),
        ("h/n/m/t", {"layers": 1}, None),
        ("h/n/m/t", [], None),
        ("h/n/m/t", {}, None),
    ],
)
def test_manifests(path: str, document: object, names: tuple[str, ...] | None) -> None:
    """Names as Ollama shows them; whatever is no manifest of a model is none."""
    found = localaid.parse_manifest(json.dumps(document).encode(), f"/o/manifests/{path}")
    assert found == (None if names is None else (f"/o/blobs/sha256-{DIGEST}", names))


@pytest.mark.parametrize("document", [b"", b"GGUF", b"[" * 10_000, b"\xff", b'{"layers": [' + b" " * 70_000])
def test_no_manifests(document: bytes) -> None:
    """What is no JSON, or too much of it."""
    assert localaid.parse_manifest(document, "/o/manifests/h/n/m/t") is None
