"""Section FILES: what is read and written whole."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

import localaid


def test_two_that_write_a_file_at_once_do_not_tear_it(tmp_path: Path) -> None:
    """Each has a draft of its own: what is read is one of the two, and no draft stays."""
    file = tmp_path / "digests"
    contents = [letter * 1_000_000 for letter in (b"a", b"b")]

    def write(content: bytes) -> None:
        for _ in range(20):
            localaid.write_files({file: content})
            assert file.read_bytes() in contents

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is met before the old file is replaced."""
    file = tmp_path / "digests"
    localaid.write_files({file: b"old"})

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        localaid.write_files({file: b"new"})
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RecursionError(), "is nested too deeply"),
        (MemoryError(), "needs more memory"),
        (ValueError("bad magic"), "is damaged (bad magic)"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (ZeroDivisionError("what"), "ZeroDivisionError: what"),
    ],
)
def test_whatever_reading_raises_is_the_files_problem(tmp_path: Path, error: Exception, told: str) -> None:
    """It names the file, and ends nobody."""
    with pytest.raises(localaid.ConfigErrors, match=r"a\.yaml: ") as raised, localaid.reading(tmp_path / "a.yaml"):
        raise error
    assert told in str(raised.value)
