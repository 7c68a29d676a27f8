"""localaid as its users run it: a real process with real folders, for conftest.py and bench.py."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

READY = re.compile(r"ready on (http://[^\s\",]+|unix:[^\s\",]+)")
START_S = 60.0  # far more than a start takes, also on a busy machine
STOP_S = 60.0


class ProcessFailed(Exception):
    """localaid did not start or stop as it should; the message has what it wrote."""


class LocalaidProcess:
    """One `localaid serve`, with what it writes to stderr.

    `base_url` is where it answers ("http://127.0.0.1:PORT", without a slash at the end), or "unix:PATH".
    """

    def __init__(self, program: Path | str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start `python PROGRAM ARGUMENTS...` in a process group of its own; `env` comes on top of this environment.

        The name of a module, a text, is started as installed programs are: from its cached bytecode.
        """
        installed = f"import sys, {program}; sys.exit({program}.main())"  # what pip's script does
        start = ["-c", installed] if isinstance(program, str) else [str(program)]
        self.command = [sys.executable, *start, *arguments]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            start_new_session=True,  # Ctrl-C at a terminal is the tests' own
        )
        self.pid = self.process.pid
        self.lines: list[str] = []
        self.ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.base_url = ""

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                with self._changed:
                    self.lines.append(line.decode(errors="replace").rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    @property
    def log(self) -> str:
        """Return everything that it wrote to stderr so far."""
        return "\n".join(self.lines)

    def wait_for_line(self, pattern: str | re.Pattern[str], timeout_s: float = START_S) -> re.Match[str]:
        """Return the first line of the log, past or future, that has the pattern."""
        seen = 0
        end = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for line in self.lines[seen:]:
                    if found := re.search(pattern, line):
                        return found
                seen = len(self.lines)
                if self.ended or not self._changed.wait(end - time.monotonic()):
                    what = "ended" if self.ended else f"has run for {timeout_s:.0f} s"
                    raise ProcessFailed(f"{' '.join(self.command)} {what} without {pattern!r}:\n{self.log}")

    def wait_ready(self) -> None:
        """Wait for the ready line; `base_url` is known then."""
        self.base_url = self.wait_for_line(READY).group(1).rstrip("/")

    def workers(self) -> list[int]:
        """Return the process ids of its workers that run."""
        return process_tree(self.pid)[1:]

    def signal(self, number: signal.Signals) -> None:
        """Send the daemon (not its workers) a signal."""
        self.process.send_signal(number)

    def stop(self) -> int:
        """Stop it as systemd does and return its exit code; no worker may be left."""
        workers = self.workers()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ProcessFailed(f"it did not stop within {STOP_S:.0f} s of SIGTERM:\n{self.log}") from None
        left = [pid for pid in workers if is_running(pid)]
        self.kill()
        _kill_all(left)
        if left:
            raise ProcessFailed(f"it stopped and left its workers {left} behind:\n{self.log}")
        return code

    def kill(self) -> None:
        """End the daemon and its workers at once."""
        _kill_all(process_tree(self.pid))
        self.process.wait()
        self._reader.join(STOP_S)


def _kill_all(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Tell whether a process runs (a zombie does not)."""
    return _parent_of(pid) is not None


def process_tree(root: int) -> list[int]:
    """Return the ids of a process and all its descendants that run, the root first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        if (parent := _parent_of(pid)) is not None:
            children.setdefault(parent, []).append(pid)
    found = [root] if is_running(root) else []
    for pid in found:
        found += children.get(pid, ())
    return found


def _parent_of(pid: int) -> int | None:
    """Return a process's parent, None if it does not run."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
