"""Whatever processor and build: a worker that its kernels end is followed by a safer one, within the request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import localaid
from conftest import PROGRAM, Daemon, StartDaemon

pytestmark = pytest.mark.outside
LOAD = {"load": {"ctx_size": 512, "threads": 1}}

# What Python runs at its start, in each process of localaid's: llama.cpp's calls as a build has them whose fast kernels
# die.  STAND_IN: "foreseen", also the try of the kernels dies; "unforeseen", the try goes well; "both", nothing helps.
STAND_IN = """
import builtins, os, signal

real_import = builtins.__import__

def guarded(name, *args, **options):
    module = real_import(name, *args, **options)
    if name == "llama_cpp" and not getattr(module, "is_stand_in", False):
        module.is_stand_in = True
        stand_in(module)
    return module

def stand_in(llama):
    load, decode, mode, dies = llama.llama_model_load_from_file, llama.llama_decode, os.environ["STAND_IN"], [False]

    def load_model(path, params):
        is_try = path.startswith(b"/proc/self/fd/")
        dies[0] = (params.use_extra_bufts or mode == "both") and not (is_try and mode != "foreseen")
        params.use_extra_bufts = False  # the build that is here may have the fault itself
        return load(path, params)

    def decode_batch(context, batch):
        if dies[0] and batch.n_tokens > 1:
            os.kill(os.getpid(), signal.SIGILL)
        return decode(context, batch)

    llama.llama_model_load_from_file, llama.llama_decode = load_model, decode_batch

builtins.__import__ = guarded
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """Return the environment in which llama.cpp dies; STAND_IN is to be set."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STAND_IN)
    path = os.pathsep.join(filter(None, (str(tmp_path / "site"), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path}


async def ask(served: Daemon, **more: object) -> tuple[int, Any]:
    """Return status and answer of a short chat."""
    messages = [{"role": "user", "content": "Hello, who are you?"}]
    body = {"model": "tiny-llama", "messages": messages, "max_tokens": 4, **more}
    async with (
        aiohttp.ClientSession(served.base_url) as http,
        http.post("/v1/chat/completions", json=body) as answer,
    ):
        raw = await answer.read()
        return answer.status, raw.decode() if more.get("stream") else json.loads(raw)


async def worker_of(served: Daemon) -> dict[str, Any]:
    """Return what `localaid status` shows of the only worker."""
    async with aiohttp.ClientSession(served.base_url) as http, http.get("/localaid/status") as answer:
        (worker,) = json.loads(await answer.read())["memory"]["workers"]
        return dict(worker)


async def test_a_worker_that_dies_by_sigill_is_followed_by_a_safe_one(
    daemon: StartDaemon, tiny_llama: Path, stand_in: dict[str, str]
) -> None:
    """At once, within the request, streamed; it is shown, and remembered over a restart."""
    served = daemon([tiny_llama], settings=LOAD, env={**stand_in, "STAND_IN": "unforeseen"})
    status, text = await ask(served, stream=True)
    assert (status, text.endswith("data: [DONE]\n\n"), '"error"' in text) == (200, True, False)
    assert "once more without fast kernels" in served.log
    worker = await worker_of(served)
    assert (worker["fault"], worker["failures"], worker["state"]) == ("SIGILL", 0, "loaded")
    kept = json.loads((served.state / "kernels.json").read_text())
    assert list(kept["files"].values()) == ["SIGILL"]
    served.process.stop()
    again = daemon(settings=LOAD, env={**stand_in, "STAND_IN": "unforeseen"}, folder=served.folder)
    assert (await ask(again))[0] == 200
    assert "SIGILL" not in again.log
    assert (await worker_of(again))["fault"] == "SIGILL"


async def test_kernels_that_die_are_found_out_before(
    daemon: StartDaemon, tiny_llama: Path, stand_in: dict[str, str]
) -> None:
    """By a small try, once for each build: no worker dies; log and status say so."""
    served = daemon([tiny_llama], settings=LOAD, env={**stand_in, "STAND_IN": "foreseen"})
    assert (await ask(served))[0] == 200
    assert "llama.cpp's fast kernels end a process by SIGILL here" in served.log
    assert "once more" not in served.log
    assert (await worker_of(served))["fault"] == "SIGILL"


def test_doctor_says_what_the_kernels_cost(stand_in: dict[str, str], tmp_path: Path) -> None:
    """With the command that rebuilds, and nothing that builds what dies."""
    for name in ("models", "configs", "state"):
        (tmp_path / name).mkdir()
    folders = [f"--{name}={tmp_path / name}" for name in ("models", "configs", "state")]
    found = subprocess.run(
        [sys.executable, PROGRAM, "doctor", "--json", *folders],
        env={**os.environ, **stand_in, "STAND_IN": "foreseen"},
        capture_output=True,
        check=False,
    )
    (told,) = [one for one in json.loads(found.stdout) if one["check"] == "llama.cpp"]
    assert told["state"] == "warning"
    assert "die by SIGILL" in told["what"]
    assert "times as long" in told["what"]
    assert "--no-binary llama-cpp-python" in told["remedy"]
    assert "AMX_INT8" not in told["what"] + told["remedy"]
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        assert "-DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'" in told["remedy"]


async def test_where_nothing_helps_the_error_says_so(
    daemon: StartDaemon, tiny_llama: Path, stand_in: dict[str, str]
) -> None:
    """Both ways have been tried; the daemon goes on."""
    served = daemon([tiny_llama], settings=LOAD, env={**stand_in, "STAND_IN": "both"})
    status, told = await ask(served)
    assert status >= 500
    assert "by SIGILL also without llama.cpp's fast kernels" in told["error"]["message"]
    assert not json.loads((served.state / "kernels.json").read_text())["files"]


async def test_a_damaged_memory_of_kernels_is_made_anew(daemon: StartDaemon, tiny_llama: Path) -> None:
    """It only saves a try."""
    served = daemon([tiny_llama], settings=LOAD)
    served.process.stop()
    (served.state / "kernels.json").write_text('{"build": 5')
    again = daemon(settings=LOAD, folder=served.folder)
    assert (await ask(again))[0] == 200
    assert len(json.loads((served.state / "kernels.json").read_text())["build"]) == 64


def test_the_demo_answers_on_this_machine(tmp_path: Path) -> None:
    """README's first command, with the build and the processor that are here."""
    done = subprocess.run(
        [sys.executable, PROGRAM, "demo", "--once", "--folder", tmp_path / "demo"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_kernels_of_this_machine(tmp_path: Path) -> None:
    """What the try finds, the real kernels do: an engine that is told so decodes a prompt of several tokens."""
    fault = localaid.find_kernel_fault()
    code = f"import localaid; localaid.render_tiny_model.__defaults__; localaid.try_kernels(); print({fault!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode == 0) == (fault is None)


@pytest.mark.parametrize("number", [35, 11, 9])
async def test_any_signal_is_told_and_borne(daemon: StartDaemon, tiny_llama: Path, number: int) -> None:
    """One of real time has no name, and the next request finds a new worker all the same."""
    served = daemon([tiny_llama], settings=LOAD)
    assert (await ask(served))[0] == 200
    (pid,) = served.process.workers()
    os.kill(pid, number)
    served.process.wait_for_line(r"was (ended|killed) by (signal 35|SIGSEGV|SIGKILL)")
    assert (await ask(served))[0] == 200
    assert (await worker_of(served))["state"] == "loaded"
