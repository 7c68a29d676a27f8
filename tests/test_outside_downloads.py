"""What is downloaded: it is there when it is said to be, and nothing that was asked for is lost."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import json
import resource
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import aiohttp
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import localaid
from conftest import Daemon, StartDaemon
from mirror import Mirror
from models import write_tiny_llama

pytestmark = pytest.mark.outside
MIB = 1 << 20
SETTINGS = {"allow_http": True, "load": {"ctx_size": 512, "threads": 1}}


@pytest.fixture
async def mirror() -> AsyncIterator[Mirror]:
    """A web server."""
    async with Mirror() as served:
        yield served


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client."""
    async with aiohttp.ClientSession() as session:
        yield session


def sha256(content: bytes) -> str:
    """Return the SHA as rules name it."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def rule(name: str, sha: str, url: str) -> str:
    """Return a config that says where a file can be had."""
    return json.dumps({"name": name, "shas": [sha], "url": [url]})


async def pull(http: aiohttp.ClientSession, served: Daemon, name: str) -> localaid.DownloadStatus | None:
    """Have a model downloaded; return how that has ended; None: it was there."""
    last = None
    async with http.post(f"{served.base_url}/localaid/pull", params={"name": name, "follow": "true"}) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: "):
                last = msgspec.json.decode(line[6:], type=localaid.PullAnswer)
    assert last is not None
    return last.downloads[0] if last.downloads else None


async def downloads(http: aiohttp.ClientSession, served: Daemon) -> dict[str, str]:
    """Return name -> state of the downloads that the status shows."""
    async with http.get(f"{served.base_url}/localaid/status") as answer:
        status = msgspec.json.decode(await answer.read(), type=localaid.DaemonStatus)
    return {one.name: one.state for one in status.downloads}


async def test_what_is_done_can_be_asked_for(
    daemon: StartDaemon, mirror: Mirror, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """At once, however long its header takes to read."""
    many = {f"general.note{number}": "x" for number in range(20_000)}
    configs = {}
    for number in range(3):
        name = f"done-{number}"
        content = write_tiny_llama(tmp_path / name, seed=number, name=name, metadata=many).read_bytes()
        url = mirror.add(f"{name}.gguf", content)
        configs[f"{name}.yaml"] = rule(name, mirror[f"{name}.gguf"].sha, url)
    served = daemon((), configs, settings=SETTINGS)
    for name in ("done-0", "done-1", "done-2"):
        ended = await pull(http, served, name)
        assert ended is not None
        assert ended.state == "done"
        async with http.get(f"{served.base_url}/localaid/explain", params={"path": "v1/chat", "name": name}) as answer:
            explained = await answer.text()
        assert "cannot serve" not in explained
        body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        async with http.post(f"{served.base_url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()


async def test_a_restart_goes_on_with_those_that_wait(
    daemon: StartDaemon, mirror: Mirror, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Five are asked for, two run, and the daemon is killed."""
    names = [f"wait-{number}" for number in range(5)]
    configs = {}
    for number, name in enumerate(names):
        url = mirror.add(f"{name}.gguf", write_tiny_llama(tmp_path / name, seed=number, name=name).read_bytes())
        mirror[f"{name}.gguf"].pause_at = 0
        configs[f"{name}.yaml"] = rule(name, mirror[f"{name}.gguf"].sha, url)
    served = daemon((), configs, settings=SETTINGS)
    for name in names:
        async with http.post(f"{served.base_url}/localaid/pull", params={"name": name}) as answer:
            assert answer.status == 200, await answer.text()
    assert set(await downloads(http, served)) == set(names)
    served.process.kill()
    for name in names:
        mirror[f"{name}.gguf"].go.set()
    again = daemon(folder=served.folder, settings=SETTINGS)
    assert set(await downloads(http, again)) == set(names)  # before anybody asks once more
    for name in names:
        await pull(http, again, name)
    assert {file.stem for file in again.models.glob("*.gguf")} == set(names)


async def test_a_disk_that_takes_no_more_is_told_once(
    daemon: StartDaemon, mirror: Mirror, http: aiohttp.ClientSession
) -> None:
    """Several blocks fail then; the reason is shown, and nothing else."""
    url = mirror.add("big.gguf", bytes(64 * MIB))
    served = daemon((), {"a.yaml": rule("big", mirror["big.gguf"].sha, url)}, settings=SETTINGS)
    resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))
    ended = await pull(http, served, "big")
    assert ended is not None
    assert ended.state == "failed"
    assert "File too large" in str(ended.problem)
    assert served.process.stop() == 0
    assert "never retrieved" not in served.log


# -- huggingface.co, as a proxy shows it --


class Hub:
    """A proxy that answers for huggingface.co itself: 401 to those who show no token; `async with`."""

    def __init__(self, folder: Path, content: bytes) -> None:
        """Serve one file under each address; the certificate is in `folder`."""
        self.certificate = folder / "hub.pem"
        self.shown: list[str] = []
        self._content = content
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "huggingface.co")])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("huggingface.co")]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self.certificate.write_bytes(certificate.public_bytes(pem))
        (folder / "hub.key").write_bytes(secret)
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(self.certificate, folder / "hub.key")

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await writer.drain()
            await writer.start_tls(self._tls)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            token = next((line[15:] for line in head.split("\r\n") if line.lower().startswith("authorization: ")), "")
            self.shown.append(token)
            body = self._content if token.startswith("Bearer ") else b""
            status = "200 OK" if body else "401 Unauthorized"
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode())
            writer.write(body)
            await writer.drain()
        writer.close()


@pytest.mark.parametrize("token", ["", "hf_x"])
async def test_a_token_goes_before_netrc(
    daemon: StartDaemon, http: aiohttp.ClientSession, tiny_llama: Path, tmp_path: Path, token: str
) -> None:
    """Both may be there for one host; without a token, what is refused says what it takes."""
    (tmp_path / ".netrc").write_text("machine huggingface.co login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    content = await asyncio.to_thread(tiny_llama.read_bytes)
    config = rule("hub", sha256(content), "https://huggingface.co/a")
    async with Hub(tmp_path, content) as hub:
        env = {"HTTPS_PROXY": hub.url, "HOME": str(tmp_path), "SSL_CERT_FILE": str(hub.certificate), "HF_TOKEN": token}
        env |= {"https_proxy": hub.url, "NO_PROXY": "", "no_proxy": ""}
        served = daemon((), {"a.yaml": config}, settings={}, env=env)
        ended = await pull(http, served, "hub")
    assert ended is not None
    if token:
        assert (ended.state, ended.problem, hub.shown) == ("done", None, ["Bearer hf_x"])
    else:
        assert ended.state == "failed"
        assert "HF_TOKEN" in str(ended.problem)
        assert len(hub.shown) == 1
        assert hub.shown[0].startswith("Basic ")
