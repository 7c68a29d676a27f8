"""A web server with the faults that downloads meet: cuts, no Range, other files, wrong bytes, redirects, pauses."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from aiohttp import web

PIECE_BYTES = 64 * 1024


class Asked(NamedTuple):
    """A request that a mirror got."""

    path: str
    range: str | None
    if_range: str | None
    host: str


@dataclass
class Served:
    """A file as a mirror serves it; its faults are taken one a request, in order."""

    content: bytes
    etag: str | None = '"one"'
    last_modified: str | None = None
    has_ranges: bool = True
    has_length: bool = True
    cuts: deque[int] = field(default_factory=deque)  # the connection ends before this byte
    statuses: deque[int] = field(default_factory=deque)  # what is answered instead
    location: str | None = None  # a redirect
    pause_at: int | None = None  # from here on it waits for `go`
    go: asyncio.Event = field(default_factory=asyncio.Event)
    paused: asyncio.Event = field(default_factory=asyncio.Event)
    after_cut: Callable[[Served], None] = lambda _: None

    @property
    def sha(self) -> str:
        """Return the SHA as rules name it."""
        return "sha256:" + hashlib.sha256(self.content).hexdigest()


class Mirror:
    """An HTTP server on 127.0.0.1; `async with`."""

    def __init__(self) -> None:
        """Have nothing to serve yet."""
        self.files: dict[str, Served] = {}
        self.asked: list[Asked] = []
        self.sent_bytes = 0

    async def __aenter__(self) -> Self:
        """Listen."""
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.base = "http://{}:{}".format(*self._runner.addresses[0][:2])
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        for file in self.files.values():
            file.go.set()
        await self._runner.cleanup()

    def add(self, path: str, content: bytes, *, cuts: Iterable[int] = (), statuses: Iterable[int] = ()) -> str:
        """Serve a file; return its address."""
        self.files[f"/{path}"] = Served(content, cuts=deque(cuts), statuses=deque(statuses))
        return f"{self.base}/{path}"

    def __getitem__(self, path: str) -> Served:
        """Return a file that is served."""
        return self.files[f"/{path}"]

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        asked = Asked(http.path, http.headers.get("Range"), http.headers.get("If-Range"), http.host)
        self.asked.append(asked)
        file = self.files.get(http.path)
        if file is None:
            return web.Response(status=404)
        if file.location is not None:
            return web.Response(status=302, headers={"Location": file.location})
        if file.statuses:
            return web.Response(status=file.statuses.popleft())
        content, start, headers = file.content, 0, {}
        if file.etag:
            headers["ETag"] = file.etag
        if file.last_modified:
            headers["Last-Modified"] = file.last_modified
        unchanged = asked.if_range in (None, file.etag, file.last_modified)
        if asked.range and file.has_ranges and unchanged:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked.range)[1])  # type: ignore[index]
            if start >= len(content):
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if file.has_length:
            headers["Content-Length"] = str(len(content) - start)
        response = web.StreamResponse(status=206 if "Content-Range" in headers else 200, headers=headers)
        await response.prepare(http)
        with contextlib.suppress(ConnectionError):  # the client has had enough
            await self._send(http, response, file, start)
        return response

    async def _send(self, http: web.Request, response: web.StreamResponse, file: Served, start: int) -> None:
        """Send what is left of a file, as far as its faults let it."""
        content, cut = file.content, file.cuts.popleft() if file.cuts else None
        end = len(content) if cut is None else cut
        for at in range(start, end, PIECE_BYTES):
            if file.pause_at is not None and at >= file.pause_at and not file.go.is_set():
                file.paused.set()
                await file.go.wait()
            piece = content[at : min(at + PIECE_BYTES, end)]
            await response.write(piece)
            self.sent_bytes += len(piece)
        if cut is not None:
            file.after_cut(file)
            assert http.transport is not None
            http.transport.close()  # what was written still goes out
