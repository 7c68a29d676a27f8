"""LOG: what lines look like, what they say of a request, and what they never say."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import localaid
from conftest import PROGRAM, Daemon, StartDaemon
from localaid import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    FIELDS,
    MESSAGES,
    RESPONSES,
    SHARED_CELLS_WARNING,
    JournalFormatter,
    JsonFormatter,
    PlainFormatter,
    RequestLine,
    choose_log_format,
    printable,
    relay_line,
    render_request_line,
)
from processes import LocalaidProcess

SECRET = "a-most-private-word"  # noqa: S105 - what a prompt says
LOAD = {"ctx_size": 512, "threads": 1}
EVIL = "m\n2026-11-23 INFO localaid: forged\x1b[31m\x9b31m\r\u202e\u2028"
LINE = RequestLine(
    request_id="req-1",
    answer_id="cmpl-1",
    key="alice",
    method="POST",
    path=COMPLETIONS,
    model="gpt-4",
    rule="generic",
    file="a.gguf",
    sha256="0123456789abcdef",
    status=200,
    prompt_tokens=12,
    cached_tokens=4,
    completion_tokens=20,
    queue_s=0.5,
    first_token_s=0.75,
    total_s=1.5,
    tokens_per_s=25.3,
)


def record_of(message: str, *, level: int = logging.INFO, error: Exception | None = None) -> logging.LogRecord:
    """Return a record as a logger makes it."""
    info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("localaid.http", level, "", 0, "%s", (message,), info)
    record.created, record.msecs = 1.25, 250.0
    return record


def raised(message: str) -> Exception:
    """Return an error with a traceback."""
    try:
        int(message)
    except ValueError as error:
        return error
    raise AssertionError


# -- what a line looks like --


def test_a_request_in_words() -> None:
    """Id, answer, key, path, name -> rule -> SHA, status, tokens, times."""
    assert render_request_line(LINE) == (
        "req-1 cmpl-1 alice POST /v1/completions 'gpt-4' -> 'generic' -> 0123456789ab: 200, 12 prompt tokens "
        "(4 cached), 20 completion tokens, 0.500 s in the queue, first after 0.750 s, 1.500 s, 25.3 tokens/s"
    )
    refused = RequestLine(request_id="req-2", method="GET", path="/x", status=499, error="e", client_gone=True)
    assert render_request_line(refused) == "req-2 - - GET /x: 499 e, 0.000 s, client gone"


@pytest.mark.parametrize(
    ("formatter", "line"),
    [
        (PlainFormatter(colours=False), " WARNING localaid.http: hello"),
        (PlainFormatter(colours=True), " \033[33mWARNING\033[0m localaid.http: hello"),
        (JournalFormatter(), "<4>localaid.http: hello"),
    ],
)
def test_a_record_as_text(formatter: logging.Formatter, line: str) -> None:
    """With its level; in the journal by its priority, and without a time of its own."""
    text = formatter.format(record_of("hello", level=logging.WARNING))
    assert text.endswith(line)
    assert ("1970" in text) is not isinstance(formatter, JournalFormatter)


def test_a_record_as_json() -> None:
    """Time in RFC 3339, and each field of the struct that goes along; what is not known is left out."""
    record = record_of("hello")
    setattr(record, FIELDS, RequestLine(request_id="req-1", path="/x", status=404, error="model_not_found"))
    assert json.loads(JsonFormatter().format(record)) == {
        "time": "1970-01-01T00:00:01.250Z",
        "level": "info",
        "logger": "localaid.http",
        "message": "hello",
        "request_id": "req-1",
        "method": "",
        "path": "/x",
        "status": 404,
        "error": "model_not_found",
        "client_gone": False,
        "total_s": 0.0,
    }


def test_a_traceback_in_each_format() -> None:
    """Indented below its line, a line that pretends to be a record too; each with its priority; one string in JSON."""
    record = record_of("failed", level=logging.ERROR, error=raised("1\n2026-11-23 INFO localaid: forged"))
    first, *rest = PlainFormatter(colours=False).format(record).split("\n")
    assert first.endswith("failed")
    assert all(line.startswith("    ") for line in rest)
    assert any("Traceback" in line for line in rest)
    journal = JournalFormatter().format(record).split("\n")
    assert all(line.startswith("<3>") for line in journal)
    assert len(journal) == len(rest) + 1
    told = JsonFormatter().format(record)
    assert "\n" not in told
    assert "forged" in json.loads(told)["exception"]


@given(st.text())
def test_no_text_can_forge_or_colour_a_line(text: str) -> None:
    """Whatever it is: one line of characters that can be seen, in every format."""
    record = record_of(text + EVIL, error=None)
    for formatter in (PlainFormatter(colours=False), JournalFormatter(), JsonFormatter()):
        line = formatter.format(record)
        assert line.isprintable()
    assert json.loads(JsonFormatter().format(record))["message"] == text + EVIL
    forged = RequestLine(request_id="r", model=text + EVIL, rule=text, path=text, prompt=text, answers=[text])
    assert printable(render_request_line(forged)).isprintable()
    assert printable("naïve ☃ 模型") == "naïve ☃ 模型"


def test_the_journal_is_known_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$JOURNAL_STREAM has to name stderr itself: programs that a service starts inherit the variable."""
    with (tmp_path / "journal").open("w") as opened:
        there = os.fstat(opened.fileno())
        monkeypatch.setattr(localaid, "_STDERR", opened.fileno())
        stream = f"{there.st_dev}:{there.st_ino}"
        assert choose_log_format("auto", {"JOURNAL_STREAM": stream}) == "journal"
        for other in (f"{there.st_dev}:{there.st_ino + 1}", "", "nonsense", "1:x"):
            assert choose_log_format("auto", {"JOURNAL_STREAM": other}) == "plain"
        assert choose_log_format("json", {"JOURNAL_STREAM": stream}) == "json"


def test_lines_of_a_worker(caplog: pytest.LogCaptureFixture) -> None:
    """A record keeps level, logger and traceback; what is none is a warning, whatever bytes it has; all have a name."""
    caplog.set_level(logging.INFO)
    record = record_of("no such tensor", level=logging.ERROR, error=raised("x"))
    raw = (b"GGML_ASSERT failed \xff\n", b"", b"[1, 2]", b'{"level": 1}')
    for line in (JsonFormatter().format(record).encode(), *raw):
        relay_line(line, "a.gguf", 7)
    relay_line(JsonFormatter().format(record_of("unseen", level=logging.DEBUG)).encode(), "a.gguf", 7)
    told = [(one.name, one.levelname, one.getMessage()) for one in caplog.records]
    assert told == [
        ("localaid.http", "ERROR", "a.gguf (7): no such tensor"),
        ("localaid.worker", "WARNING", "a.gguf (7): GGML_ASSERT failed \ufffd"),
        ("localaid.worker", "WARNING", "a.gguf (7): [1, 2]"),
        ("localaid.worker", "WARNING", 'a.gguf (7): {"level": 1}'),
    ]
    assert "Traceback" in (caplog.records[0].exc_text or "")
    shown = json.loads(JsonFormatter().format(caplog.records[0]))
    assert (shown["worker"], shown["pid"], "Traceback" in shown["exception"]) == ("a.gguf", 7, True)


# -- a daemon's log --


async def ask(
    served: Daemon, path: str, body: Mapping[str, object] | bytes | None, key: str = ""
) -> tuple[int, str, str]:
    """Return status, request id and what was answered; without a body, of a GET."""
    headers = {"x-api-key": key} if key else {}
    method, data = ("GET", None) if body is None else ("POST", body if isinstance(body, bytes) else json.dumps(body))
    async with (
        aiohttp.ClientSession(served.base_url) as http,
        http.request(method, path, data=data, headers=headers) as answer,
    ):
        return answer.status, answer.headers["X-Request-Id"], await answer.text()


def line_of(served: Daemon, request_id: str) -> dict[str, Any]:
    """Return a request's line in a log of JSON."""
    found: dict[str, Any] = json.loads(served.process.wait_for_line(f'"request_id": "{request_id}"').string)
    return found


def completion(**more: object) -> dict[str, object]:
    """Return a request that gives six tokens."""
    return {"model": "tiny-llama", "prompt": SECRET, "max_tokens": 6, "ignore_eos": True, **more}


@pytest.fixture
def start(daemon: StartDaemon, tiny_llama: Path) -> Callable[..., Daemon]:
    """Start a daemon with one model and some settings."""

    def begin(env: Mapping[str, str] | None = None, **settings: object) -> Daemon:
        return daemon([tiny_llama], settings={"load": LOAD, **settings}, env=env)

    return begin


async def test_json_has_each_field(start: Callable[..., Daemon], tiny_llama: Path) -> None:
    """Streamed or whole; all lines of the log are objects, a worker's and llama.cpp's too, with the worker's name."""
    served = start(log_format="json", log_level="debug", api_keys=["alice:sk-1"])
    for more in ({}, {"stream": True}):
        status, request_id, raw = await ask(served, COMPLETIONS, completion(**more), "sk-1")
        line = line_of(served, request_id)
        assert status == line["status"] == 200
        assert line["answer_id"] in raw
        known: dict[str, object] = {"level": "info", "logger": "localaid.http", "key": "alice", "path": COMPLETIONS}
        known |= {"model": "tiny-llama", "rule": "tiny-llama", "file": tiny_llama.name, "client_gone": False}
        assert line.items() >= known.items()
        assert len(line["sha256"]) == 64
        assert line["completion_tokens"] == 6
        assert line["prompt_tokens"] > line["cached_tokens"] >= 0
        assert 0 <= line["queue_s"] <= line["first_token_s"] <= line["total_s"]
        assert line["tokens_per_s"] > 0
        assert line["message"].startswith(f"{request_id} {line['answer_id']} alice POST {COMPLETIONS} ")
        assert time.strptime(line["time"][:19], "%Y-%m-%dT%H:%M:%S")
    told = [json.loads(line) for line in served.process.lines]
    of_llama = [one for one in told if one["logger"] == "localaid.llama.cpp"]
    assert {(one["worker"], one["pid"]) for one in of_llama} == {(tiny_llama.name, served.process.workers()[0])}
    assert any(one["level"] == "debug" for one in of_llama)
    shared = {one["level"] for one in of_llama if SHARED_CELLS_WARNING in one["message"]}
    assert shared == {"debug"}  # several sequences share the cells: no reason to worry anybody


async def test_what_is_refused_has_its_line_too(start: Callable[..., Daemon]) -> None:
    """401, 404, 400, 429, and what is no HTTP at all: with its code, and never with its text."""
    served = start(log_format="json", api_keys=["alice:sk-1"], queue_size=1)
    refused: list[tuple[str, Mapping[str, object] | bytes | None, str, int, str]] = [
        (COMPLETIONS, completion(), "", 401, "invalid_api_key"),
        (COMPLETIONS, completion(model=SECRET[:3]), "sk-1", 404, "model_not_found"),
        (COMPLETIONS, completion(temperature=SECRET), "sk-1", 400, "invalid_value"),
        (COMPLETIONS, b'{"model": "' + SECRET.encode(), "sk-1", 400, "invalid_value"),
        (f"/{'x' * 3000}", None, "sk-1", 404, "unknown_url"),
    ]
    for path, body, key, status, code in refused:
        answered, request_id, _ = await ask(served, path, body, key)
        line = line_of(served, request_id)
        assert (answered, line["status"], line["error"]) == (status, status, code)
        assert len(line["path"]) <= 200
    host, _, port = served.base_url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(f"GET / HTTP/1.1\r\nA\x01: {SECRET}\r\n\r\n".encode())
        assert b" 400 " in raw.recv(1000)
    told = json.loads(served.process.wait_for_line("is no HTTP").string)
    assert (told["level"], told["status"], "exception" in told) == ("info", 400, False)
    assert SECRET not in served.log


async def test_a_full_queue(start: Callable[..., Daemon]) -> None:
    """429 has its line, with the rule that it would have gone to."""
    served = start(log_format="json", queue_size=1, load={**LOAD, "parallel": 1})
    await ask(served, COMPLETIONS, completion())
    (worker,) = served.process.workers()
    os.kill(worker, signal.SIGSTOP)
    asked = [asyncio.create_task(ask(served, COMPLETIONS, completion())) for _ in range(4)]  # two are sent ahead
    (done,), rest = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    os.kill(worker, signal.SIGCONT)
    status, request_id, _ = done.result()
    line = line_of(served, request_id)
    assert (status, line["status"], line["error"], line["rule"]) == (429, 429, "rate_limit_exceeded", "tiny-llama")
    assert "prompt_tokens" not in line
    for one in rest:
        status, request_id, _ = await one
        assert line_of(served, request_id)["status"] == status == 200


async def test_a_client_that_goes(start: Callable[..., Daemon]) -> None:
    """What it has had of its answer is in its line."""
    served = start(log_format="json", load={"ctx_size": 32768, "threads": 1})
    async with (
        aiohttp.ClientSession(served.base_url) as http,
        http.post(COMPLETIONS, json=completion(max_tokens=32000, stream=True)) as running,
    ):
        await running.content.readline()
        request_id = running.headers["X-Request-Id"]
    line = line_of(served, request_id)
    assert (line["status"], line["client_gone"], "error" in line) == (499, True, False)
    assert 0 < line["completion_tokens"] < 32000
    assert line["prompt_tokens"] > 0


async def test_names_and_paths_cannot_forge_a_line(start: Callable[..., Daemon]) -> None:
    """Line breaks and escapes of a client are written out."""
    served = start(log_level="debug")
    _, request_id, _ = await ask(served, CHAT, {"model": EVIL, "messages": [{"role": "user", "content": "x"}]})
    served.process.wait_for_line(request_id)
    _, request_id, _ = await ask(served, "/v1/%0a2026-11-23%20INFO%20localaid:%20forged%1b[31m", None)
    served.process.wait_for_line(request_id)
    assert all(line.isprintable() for line in served.process.lines)
    assert not any(line.endswith("INFO localaid: forged") for line in served.process.lines)
    assert not any(line.startswith("2026-11-23 INFO localaid: forged") for line in served.process.lines)


# -- prompts and answers --

ASKED: list[tuple[str, dict[str, object]]] = [
    (CHAT, {"messages": [{"role": "user", "content": SECRET}], "stream": True}),
    (CHAT, {"messages": [{"role": "user", "content": SECRET}], "stream": False, "logprobs": True}),
    (COMPLETIONS, {"prompt": [SECRET, SECRET + "2"], "n": 2}),
    (RESPONSES, {"input": SECRET, "stream": True}),
    (MESSAGES, {"messages": [{"role": "user", "content": SECRET}]}),
    (EMBEDDINGS, {"input": SECRET}),
    ("/tokenize", {"content": SECRET}),
    (CHAT, {"messages": [{"role": SECRET, "content": SECRET}]}),  # from here on: refused
    (COMPLETIONS, {"prompt": SECRET, "logit_bias": {SECRET: 1}}),
    (COMPLETIONS, {"prompt": SECRET * 5000}),
    (COMPLETIONS, {"prompt": SECRET, "grammar": SECRET}),
    (COMPLETIONS, {"prompt": SECRET, "json_schema": {"type": SECRET}}),
]


async def test_prompts_are_never_logged(start: Callable[..., Daemon]) -> None:
    """On no route, streamed or whole, answered or refused, and not at the most talkative level."""
    served = start(log_level="debug")
    statuses = set()
    for path, body in ASKED:
        limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
        whole = {"model": "tiny-llama", **body}
        if path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES):
            whole |= {limit: 3}
        status, request_id, _ = await ask(served, path, whole)
        served.process.wait_for_line(request_id)
        statuses.add(status)
    assert statuses >= {200, 400}
    assert SECRET not in served.log
    assert "log_prompts" not in served.log


async def test_prompts_and_answers_are_logged_when_asked_for(start: Callable[..., Daemon]) -> None:
    """With a warning at start; cut where they are long; what a stream and a whole answer say is the same."""
    served = start(log_format="json", log_prompts=True)
    served.process.wait_for_line(r'"warning".*prompts and answers are logged \(log_prompts: true\)')
    _, request_id, raw = await ask(served, COMPLETIONS, completion(n=2, temperature=0))
    line = line_of(served, request_id)
    assert json.loads(line["prompt"])["prompt"] == SECRET
    assert line["answers"] == [choice["text"] for choice in json.loads(raw)["choices"]]
    chat = {"model": "tiny-llama", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 6, "temperature": 0}
    _, request_id, raw = await ask(served, CHAT, chat)
    _, streamed, _ = await ask(served, CHAT, {**chat, "stream": True})
    assert line_of(served, request_id)["answers"] == line_of(served, streamed)["answers"]
    _, request_id, _ = await ask(served, "/tokenize", {"model": "tiny-llama", "content": "x" * 100_000})
    assert len(line_of(served, request_id)["prompt"]) == localaid.TEXT_LIMIT
    served.settings.write_text("log_prompts: false\nlog_format: json\nload: {ctx_size: 512, threads: 1}\n")
    served.process.signal(signal.SIGHUP)
    served.process.wait_for_line("settings: log_prompts: true -> false")
    _, request_id, _ = await ask(served, COMPLETIONS, completion())
    assert "prompt" not in line_of(served, request_id)


# -- where the log goes --


def test_the_journal_gets_priorities(daemon: StartDaemon, tiny_llama: Path) -> None:
    """Where stderr is what $JOURNAL_STREAM names; known before the settings are, so that their errors have one too."""
    script = (
        "import os, sys\n"
        "there = os.fstat(2)\n"
        "os.environ['JOURNAL_STREAM'] = f'{there.st_dev}:{there.st_ino}'\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    served = daemon([tiny_llama], settings={"load": LOAD})
    assert not any(line.startswith("<") for line in served.process.lines)
    command = [sys.executable, "-c", script, str(PROGRAM), "serve", "--settings", str(served.settings)]
    command += ["--models", str(served.models), "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("<6>localaid: ready on http://")
    process.terminate()
    rest = process.communicate()[0] or ""
    assert process.returncode == 0
    assert all(line.startswith("<") for line in rest.splitlines())
    served.settings.write_text("queue_sise: 1\nlisten: nowhere\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [line.partition("localaid: ")[0] for line in done.stderr.splitlines()] == ["<2>", "<2>"]


@pytest.mark.parametrize(
    ("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)]
)
def test_colours_are_for_terminals_only(env: dict[str, str], *, coloured: bool, tmp_path: Path) -> None:
    """A real one; NO_COLOR and TERM=dumb say no."""
    ours, theirs = pty.openpty()
    full = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm", **env}
    command = [sys.executable, str(PROGRAM), "serve", "--settings", "/none.yaml"]
    assert subprocess.run(command, stderr=theirs, env=full, check=False).returncode == 1
    os.close(theirs)
    told = os.read(ours, 4096).decode()
    os.close(ours)
    assert "/none.yaml: no such file" in told
    assert ("\033[1;31mCRITICAL\033[0m" in told) is coloured
    assert ("\033" in told) is coloured


@pytest.fixture
def in_plain(daemon: StartDaemon, tiny_llama: Path) -> Iterator[LocalaidProcess]:
    """A daemon whose settings say json, and whose command line says plain."""
    served = daemon([tiny_llama], settings={"load": LOAD})
    served.settings.write_text("log_format: json\n")
    arguments = ["serve", "--log-format", "plain", "--settings", str(served.settings), "--models", str(served.models)]
    process = LocalaidProcess(PROGRAM, [*arguments, "--listen", "127.0.0.1:0"])
    yield process
    process.stop()


def test_the_command_line_goes_before_the_settings(in_plain: LocalaidProcess) -> None:
    """Also after a reload."""
    in_plain.wait_for_line(r"^\d{4}-\S+ \S+ INFO localaid: ready on ")
    settings = Path(in_plain.command[in_plain.command.index("--settings") + 1])
    settings.write_text("log_format: journal\n")
    in_plain.signal(signal.SIGHUP)
    in_plain.wait_for_line(r"^\d{4}-.* settings: log_format: json -> journal")


async def test_last_words_of_a_worker_are_in_the_log(start: Callable[..., Daemon], tiny_llama: Path) -> None:
    """Before the line that says how it ended, and each with its name; the ready line is there at any level."""
    served = start(log_format="json", log_level="warning")
    await ask(served, COMPLETIONS, completion())
    (pid,) = served.process.workers()
    os.kill(pid, signal.SIGABRT)
    served.process.wait_for_line("was ended by SIGABRT")
    lines = [json.loads(line) for line in served.process.lines]
    words = [one["message"] for one in lines if one.get("worker") == tiny_llama.name]
    assert f"{tiny_llama.name} ({pid}): Fatal Python error: Aborted" in words
    assert "was ended by SIGABRT" in lines[-1]["message"]
