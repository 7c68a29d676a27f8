"""A channel for the tests of section 14: a web folder, its key, and a server with the faults that servers have."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gzip
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Self

from aiohttp import web

import localaid
from conftest import PROGRAM
from localaid import INDEX_FILE, SIGNATURE_FILE, Channel, ChannelIndex, SecretKey, Updates, public_of, publish

MADE_AT = dt.datetime(2026, 1, 5, 12, tzinfo=dt.UTC)
Fault = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]  # a request, and what it would get


def key_of(number: int = 1) -> SecretKey:
    """Return a secret key, one a number."""
    seed = bytes([number]) * 32
    return SecretKey(public=public_of(bytes([number]) * 8, seed), seed=seed)


class WebFolder:
    """A folder that is published, and a server of it on 127.0.0.1; `async with`."""

    def __init__(self, folder: Path, key: SecretKey | None = None) -> None:
        """Serve `folder`, which is made."""
        folder.mkdir(parents=True)
        self.folder = folder
        self.key = key or key_of()
        self.asked: list[tuple[str, Mapping[str, str]]] = []  # path and headers
        self.statuses: list[int] = []
        self.faults: dict[str, Fault] = {}  # path -> what happens to it
        self.has_validators = True
        self.news = asyncio.Event()  # one more request
        self._serial = 0

    async def __aenter__(self) -> Self:
        """Listen."""
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        app.on_response_prepare.append(self._note_status)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.base = "http://{}:{}/".format(*self._runner.addresses[0][:2])
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        await self._runner.cleanup()

    def write(self, files: Mapping[str, str]) -> None:
        """Make these, and no others, the folder's configs."""
        for file in [file for file in self.folder.rglob("*") if file.is_file()]:
            if file.name not in (INDEX_FILE, SIGNATURE_FILE):
                file.unlink()
        for path, text in files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(text)

    def publish(
        self, files: Mapping[str, str] | None = None, *, serial: int | None = None, made_at: dt.datetime = MADE_AT
    ) -> ChannelIndex:
        """Publish the folder, with these configs in place of what it has."""
        if files is not None:
            self.write(files)
        return publish(self.folder, self.key, made_at=made_at, serial=serial)

    def sign(self, document: bytes, key: SecretKey | None = None) -> None:
        """Put an index there as it is, with its signature."""
        signature = localaid.sign(document, key or self.key, "a comment")
        (self.folder / INDEX_FILE).write_bytes(document)
        (self.folder / SIGNATURE_FILE).write_bytes(localaid.render_signature(signature))

    def channel(self, name: str = "main", base: str = "") -> Channel:
        """Return it as the settings have it."""
        return Channel(name=name, url=base or self.base, public_key=self.key.public.render())

    def updates(self, **changes: object) -> Updates:
        """Return settings that have it alone."""
        fields = {"channels": (self.channel(),), "allow_http": True, **changes}
        return Updates(**fields)  # type: ignore[arg-type]

    @property
    def paths(self) -> list[str]:
        """Return what was asked for, in order, and forget it."""
        paths = [path for path, _ in self.asked]
        self.asked.clear()
        return paths

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        path = http.match_info["path"]
        self.asked.append((path, dict(http.headers)))
        news, self.news = self.news, asyncio.Event()
        news.set()
        file = self.folder / path
        if path in self.faults:
            return await self.faults[path](http, file.read_bytes() if file.is_file() else b"")
        if not file.is_file():
            return web.Response(status=404)
        if not self.has_validators:
            return web.Response(body=file.read_bytes())
        return web.FileResponse(file)

    async def _note_status(self, _: web.Request, response: web.StreamResponse) -> None:
        self.statuses.append(response.status)


def config(name: str, top_k: int = 1, sha: str = "*") -> str:
    """Return a config."""
    return f"name: {name}\nshas: ['{sha}']\ntop_k: {top_k}\n"


ONE = {"a.yaml": config("a"), "b/b.yaml": config("b") + "template: {chat: b.jinja}\n", "b/b.jinja": "{{ messages }}"}


# -- processes --


def run(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run localaid."""
    full = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **(env or {})}
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=full)


# -- faults --


def answer(status: int, headers: Mapping[str, str] | None = None) -> Fault:
    """Answer with a status."""

    async def fault(_: web.Request, __: bytes) -> web.StreamResponse:
        return web.Response(status=status, headers=headers)

    return fault


def redirect(location: str) -> Fault:
    """Lead elsewhere."""
    return answer(302, {"Location": location})


def give(content: bytes | Callable[[bytes], bytes]) -> Fault:
    """Give another content, whole."""

    async def fault(_: web.Request, right: bytes) -> web.StreamResponse:
        return web.Response(body=content(right) if callable(content) else content)

    return fault


def cut(at: int, *, has_length: bool = True) -> Fault:
    """End the connection at a byte; without a length nobody can tell that from the end."""

    async def fault(http: web.Request, right: bytes) -> web.StreamResponse:
        length = b"Content-Length: %d\r\n" % len(right) if has_length else b""
        assert http.transport is not None
        http.transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n%b\r\n%b" % (length, right[:at]))
        http.transport.close()
        return web.Response()

    return fault


def pour(size: int, *, has_length: bool) -> Fault:
    """Send so many bytes more, with or without saying so before."""

    async def fault(http: web.Request, right: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(right) + size)} if has_length else {})
        await response.prepare(http)
        with contextlib.suppress(ConnectionError):
            await response.write(right)
            for _ in range(size // 65536):
                await response.write(bytes(65536))
            await response.write(bytes(size % 65536))
        return response

    return fault


def pack(size: int) -> Fault:
    """Send so many zeros in a small parcel."""
    bomb = gzip.compress(bytes(size))

    async def fault(_: web.Request, __: bytes) -> web.StreamResponse:
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})

    return fault


def trickle(pause_s: float, *, at_head: bool = False) -> Fault:
    """Send a byte, and another one, and so on."""

    async def fault(http: web.Request, right: bytes) -> web.StreamResponse:
        if at_head:
            await asyncio.sleep(3600)
        response = web.StreamResponse(headers={"Content-Length": str(len(right))})
        await response.prepare(http)
        with contextlib.suppress(ConnectionError):
            for at in range(len(right)):
                await response.write(right[at : at + 1])
                await asyncio.sleep(pause_s)
        return response

    return fault


def hold(reached: asyncio.Event) -> Fault:
    """Send half, and then nothing more."""

    async def fault(http: web.Request, right: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(right))})
        await response.prepare(http)
        await response.write(right[: len(right) // 2])
        reached.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        return response

    return fault
