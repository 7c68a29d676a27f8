"""Signals and reloads, as somebody at a terminal and an administrator see them."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from conftest import Daemon, StartDaemon

pytestmark = pytest.mark.outside
LOAD = {"load": {"ctx_size": 2048, "threads": 1}}


def status_of(served: Daemon) -> dict[str, Any]:
    """Return what `localaid status` shows."""
    with urllib.request.urlopen(f"{served.base_url}/localaid/status") as answer:  # noqa: S310
        return dict(json.loads(answer.read()))


def test_ctrl_c_says_what_it_waits_for_and_a_second_one_ends_it(daemon: StartDaemon, tiny_llama: Path) -> None:
    """An answer runs without end: the first Ctrl-C names it, the second one breaks it off."""
    served = daemon([tiny_llama], settings={**LOAD, "drain": "10m"})
    body = {"model": "tiny-llama", "prompt": "x", "ignore_eos": True, "stream": True, "max_tokens": 2000, "n": 8}
    request = urllib.request.Request(f"{served.base_url}/v1/completions", json.dumps(body).encode())  # noqa: S310
    answer = urllib.request.urlopen(request)  # noqa: S310
    assert answer.readline().startswith(b"data: ")
    (pid,) = served.process.workers()
    os.kill(pid, signal.SIGSTOP)  # it will never end by itself
    threading.Thread(target=answer.read, daemon=True).start()
    served.process.signal(signal.SIGINT)
    served.process.wait_for_line("stops: 1 running requests have 600 s; a second Ctrl-C ends them")
    served.process.signal(signal.SIGINT)
    served.process.wait_for_line("stops at once")
    assert served.process.process.wait(60) == 0


def test_a_reload_does_not_shrink_the_memory_budget(daemon: StartDaemon, smollm2: Path) -> None:
    """A share is of what would be free without the models that are loaded."""
    served = daemon([smollm2], settings={"memory": "50%", "load": {"ctx_size": 8192, "parallel": 8}})
    body = json.dumps({"model": "smollm2-135m-instruct", "prompt": "x", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{served.base_url}/v1/completions", body)  # noqa: S310
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        assert answer.status == 200
    before = status_of(served)["memory"]
    assert before["used_bytes"] > 2**28
    text = served.settings.read_text()
    for share in ("51%", "50%"):
        served.settings.write_text(text.replace("50%", share))
        served.process.signal(signal.SIGHUP)
        served.process.wait_for_line(rf"settings: memory.*{share}")
    after = status_of(served)["memory"]
    assert after["budget_bytes"] > before["budget_bytes"] - before["used_bytes"] / 4
