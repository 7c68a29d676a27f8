"""Values as programs write them: what is the same to JSON is the same here, and a torn text is no reason to refuse."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from conftest import Daemon

pytestmark = pytest.mark.outside
START = '{"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "%s"}], "max_tokens": %s%s}'


async def post(served: Daemon, path: str, body: str | bytes) -> tuple[int, Any]:
    """Return status and answer of a body as it is."""
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(served.base_url, headers=headers) as http, http.post(path, data=body) as answer:
        return answer.status, json.loads(await answer.read())


@pytest.mark.parametrize(
    ("content", "tokens", "more"),
    [
        ("hi", "4.0", ""),
        ("hi", "4e0", ', "top_k": 40.0, "n": 1.0, "seed": 5.0'),
        ("hi", "4", ', "temperature": 4.5, "min_p": 0.1'),
        ("hi", "4", ', "metadata": {"a": [1, null], "b": {"c": true}}'),
        ("hi", "4", ', "chat_template_kwargs": {"a": [1, {"b": null}]}'),
        ("\\ud83d", "4", ""),
        ("\\ude00 and \\ud83d\\ude00 and \\\\ud83d", "4", ""),
        ("hi", "4", ', "cache_prompt": false'),
    ],
)
async def test_values_that_are_taken(shared: Daemon, content: str, tokens: str, more: str) -> None:
    """A chat is answered, with so many tokens."""
    status, told = await post(shared, "/v1/chat/completions", START % (content, tokens, more))
    assert status == 200, told
    assert told["usage"]["completion_tokens"] <= 4


async def test_half_a_character_is_one_that_is_unknown(shared: Daemon) -> None:
    """U+FFFD, and whole ones and escaped backslashes stay what they are."""
    text = "a\\ud83d b\\ud83d\\ude00 c\\\\ud83d"
    body = '{"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "%s"}]}' % text  # noqa: UP031
    status, told = await post(shared, "/apply-template", body)
    assert status == 200
    assert "a\ufffd b😀 c\\ud83d" in told["prompt"]


async def test_a_byte_order_mark_is_skipped(shared: Daemon) -> None:
    """As Windows' editors write one."""
    body = "\ufeff" + START % ("hi", "4", "")
    assert (await post(shared, "/v1/chat/completions", body.encode()))[0] == 200


async def test_what_is_no_whole_number_is_told(shared: Daemon) -> None:
    """By its name."""
    status, told = await post(shared, "/v1/chat/completions", START % ("hi", "4.5", ""))
    assert (status, told["error"]["param"]) == (400, "max_tokens")
    status, told = await post(shared, "/v1/chat/completions", '{"model": "tiny-llama", "messages": []}')
    assert told["error"]["message"] == "`messages` must have at least 1 item."
