"""Dropping things in, live: 200 config edits and 20 file replacements under 8 streams, none of which breaks."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import aiohttp.web
import msgspec
import pytest

import localaid
from conftest import Daemon, StartDaemon
from models import place_model, write_tiny_llama

STREAMS, EDITS, REPLACEMENTS = 8, 200, 20
NAME = "smollm2-135m-instruct"


async def stream_on(http: aiohttp.ClientSession, place: int, done: asyncio.Event) -> int:
    """Ask for stream after stream until `done`; every one must end as it should.  Return how many there were."""
    count = 0
    while not done.is_set() or not count:
        messages = [{"role": "user", "content": f"Story {place}.{count}, please."}]
        body = {"model": NAME, "messages": messages, "stream": True, "max_tokens": 40, "ignore_eos": True}
        async with http.post("/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            raw = await answer.read()
        assert raw.endswith(b"data: [DONE]\n\n"), raw[-300:]
        assert b'"finish_reason":"length"' in raw
        assert b'"error"' not in raw
        count += 1
    return count


async def explained(http: aiohttp.ClientSession, name: str) -> localaid.Explanation:
    """Return where a name leads now."""
    async with http.get("/localaid/explain", params={"path": "v1/chat", "name": name}) as answer:
        return msgspec.json.decode(await answer.read(), type=localaid.Explanation)


async def until_explained(http: aiohttp.ClientSession, name: str, field: str, value: object) -> None:
    """Ask until a change is in force; nothing tells a client."""
    async with asyncio.timeout(60):
        while True:
            found = await explained(http, name)
            seen = found.sha256 if field == "sha256" else getattr(found.fields.get(field), "value", None)
            if seen == value:
                return


async def edit(http: aiohttp.ClientSession, served: Daemon) -> None:
    """Edit configs: each edit must be in force; some break a file, some take it away."""
    for number in range(EDITS):
        file = f"edit{number % 5}.yaml"
        if number % 10 == 9:
            served.write_config(file, "name: [broken\n")
            continue
        served.write_config(file, f"name: edited{number % 5}\nshas: ['*']\nmax_tokens: {number + 1}\n")
        await until_explained(http, f"edited{number % 5}", "max_tokens", number + 1)


async def replace(http: aiohttp.ClientSession, served: Daemon, variants: list[Path]) -> None:
    """Replace a model file by atomic renames: the name leads to the new content each time, and answers."""
    for number in range(REPLACEMENTS):
        draft = served.folder / "draft.gguf"
        draft.write_bytes(variants[number % 2].read_bytes())
        draft.rename(served.models / "swapped.gguf")
        sha256 = localaid.hash_file(str(variants[number % 2]))["sha256"]
        await until_explained(http, "swapped", "sha256", sha256)
        body = {"model": "swapped", "prompt": "x", "max_tokens": 2}
        async with http.post("/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()


async def test_nothing_breaks_while_everything_changes(daemon: StartDaemon, smollm2: Path, tmp_path: Path) -> None:
    """No stream breaks, every change is in force, what was removed is gone from /v1/models."""
    variants = [write_tiny_llama(tmp_path / f"v{seed}.gguf", seed=seed) for seed in (1, 2)]
    options = {"ctx_size": 512, "threads": 1}
    served = daemon([smollm2], settings={"load": options})
    done = asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(served.base_url, timeout=timeout) as http, asyncio.TaskGroup() as group:
        streams = [group.create_task(stream_on(http, place, done)) for place in range(STREAMS)]
        edits = group.create_task(edit(http, served))
        replacements = group.create_task(replace(http, served, variants))
        await asyncio.wait({edits, replacements})
        (served.models / "swapped.gguf").unlink()
        async with asyncio.timeout(60):
            while True:
                async with http.get("/v1/models") as answer:
                    if "swapped" not in {card["id"] for card in json.loads(await answer.read())["data"]}:
                        break
        done.set()
    assert all(task.result() >= 1 for task in streams)


async def test_a_file_that_is_written_over_breaks_no_request(daemon: StartDaemon, tmp_path: Path) -> None:
    """`cp new.gguf models/old.gguf`: what runs ends on what it began with, what waits goes to the new content."""
    variants = [write_tiny_llama(tmp_path / f"v{seed}.gguf", seed=seed) for seed in (1, 2)]
    served = daemon(settings={"load": {"ctx_size": 512, "threads": 1}})
    place, done = served.models / "swapped.gguf", asyncio.Event()
    place.write_bytes(variants[1].read_bytes())

    async def ask_on(http: aiohttp.ClientSession) -> int:
        count = 0
        while not done.is_set() or not count:
            body = {
                "model": "swapped",
                "prompt": f"Story {count}",
                "stream": True,
                "max_tokens": 60,
                "ignore_eos": True,
            }
            async with http.post("/v1/completions", json=body) as answer:
                raw = await answer.read()
            assert answer.status == 200, raw
            assert raw.endswith(b"data: [DONE]\n\n"), raw[-300:]
            assert b'"error"' not in raw
            count += 1
        return count

    async with aiohttp.ClientSession(served.base_url) as http, asyncio.TaskGroup() as group:
        await until_explained(http, "swapped", "sha256", localaid.hash_file(str(variants[1]))["sha256"])
        streams = [group.create_task(ask_on(http)) for _ in range(STREAMS)]
        for number in range(REPLACEMENTS):
            place.write_bytes(variants[number % 2].read_bytes())
            await until_explained(http, "swapped", "sha256", localaid.hash_file(str(variants[number % 2]))["sha256"])
            async with http.post(
                "/v1/completions", json={"model": "swapped", "prompt": "x", "max_tokens": 1}
            ) as answer:
                assert answer.status == 200, await answer.text()
        done.set()
    assert all(task.result() >= 1 for task in streams)


async def complete(http: aiohttp.ClientSession, name: str) -> tuple[int, str]:
    """Ask for a completion; return status and text, or the error's code."""
    body = {"model": name, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    async with http.post("/v1/completions", json=body) as answer:
        found = json.loads(await answer.read())
    return answer.status, found["choices"][0]["text"] if answer.status == 200 else found["error"]["code"]


@pytest.mark.parametrize("shortened", [True, False])
async def test_a_file_that_is_written_in_place_is_waited_for(
    daemon: StartDaemon, tmp_path: Path, *, shortened: bool
) -> None:
    """`rsync --inplace`: nobody gets an answer of two halves, and who asks meanwhile gets that of the new file."""
    old, new = [write_tiny_llama(tmp_path / f"v{seed}.gguf", seed=seed) for seed in (1, 2)]
    served = daemon({"new.gguf": new}, settings={"load": {"ctx_size": 512, "threads": 1}})
    place, content = place_model(old, served.models, "swapped.gguf", copy=True), new.read_bytes()
    async with aiohttp.ClientSession(served.base_url) as http:
        await until_explained(http, "swapped", "sha256", localaid.hash_file(str(old))["sha256"])
        with place.open("r+b") as file:
            if shortened:
                file.truncate(1000)
            file.write(content[: len(content) // 2])
            file.flush()
            asking = asyncio.create_task(complete(http, "swapped"))
            await asyncio.to_thread(served.process.wait_for_line, "is not loaded: it was written to")
            assert not asking.done()
            file.write(content[len(content) // 2 :])
        answered = await asking
        assert answered == await complete(http, "new")
        assert answered[0] == 200


async def test_a_part_that_is_replaced_is_served(daemon: StartDaemon, tmp_path: Path) -> None:
    """A split model is as new as its newest part, although its SHA is that of the first one."""
    served = daemon(settings={"load": {"ctx_size": 512, "threads": 1}})
    for seed in (1, 2):
        (tmp_path / f"{seed}").mkdir()
        write_tiny_llama(tmp_path / f"{seed}" / "big.gguf", seed=seed, part_tensors=12)
    names = [f"big-0000{number}-of-00002.gguf" for number in (1, 2)]
    for name in names:
        place_model(tmp_path / "1" / name, served.models, name, copy=True)
    sha256 = localaid.hash_file(str(served.models / names[0]))["sha256"]
    async with aiohttp.ClientSession(served.base_url) as http:
        await until_explained(http, "big", "sha256", sha256)
        before = await complete(http, "big")
        place_model(tmp_path / "2" / names[1], served.models, names[1], copy=True)
        await asyncio.to_thread(served.process.wait_for_line, "leaves memory: its file is gone")
        after = await complete(http, "big")
        assert (await explained(http, "big")).sha256 == sha256
    assert (before[0], after[0]) == (200, 200)
    assert before != after


async def test_a_request_follows_its_name_to_the_file_of_now() -> None:
    """However often the file is replaced before it is loaded, within reason; what is no more is told in the end."""
    left = 3

    async def answer() -> aiohttp.web.StreamResponse:
        nonlocal left
        left -= 1
        if left >= 0:
            raise localaid.ModelRemoved(file="x.gguf")
        return aiohttp.web.Response(status=204)

    assert (await localaid.retry_removed(answer)).status == 204
    left = 1000
    with pytest.raises(localaid.ModelRemoved):
        await localaid.retry_removed(answer)
    assert left > 900
