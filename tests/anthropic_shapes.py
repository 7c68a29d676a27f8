"""Holds raw JSON to Anthropic's own types, those of the anthropic package."""

from __future__ import annotations

import functools
import json
from typing import Any

from anthropic.types import Message, MessageTokensCount, ModelInfo, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import TypeAdapter

TYPES: dict[str, Any] = {
    "ErrorResponse": ErrorResponse,
    "Message": Message,
    "MessageTokensCount": MessageTokensCount,
    "ModelInfo": ModelInfo,
    "RawMessageStreamEvent": RawMessageStreamEvent,
}
OF_NO_TYPE = ("ping", "error")  # events that the package knows by name only


def check_message_answer(type_name: str, raw: bytes | str) -> Any:  # noqa: ANN401 - any of the types above
    """Return what Anthropic's own type makes of an answer or event; fails on a wrong, missing or unknown key."""
    return _adapter(type_name).validate_json(raw, strict=True, extra="forbid")


def check_message_events(stream: bytes) -> list[dict[str, Any]]:
    """Return the events of a stream, or of a part of one, each checked; comments are left out."""
    *blocks, rest = stream.split(b"\n\n")
    assert rest == b""
    events = []
    for block in blocks:
        if block.startswith(b":"):
            continue
        name, data = block.split(b"\n")
        event = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        if event["type"] not in OF_NO_TYPE:
            check_message_answer("RawMessageStreamEvent", data.removeprefix(b"data: "))
        events.append(event)
    return events


@functools.cache
def _adapter(type_name: str) -> TypeAdapter[Any]:
    return TypeAdapter(TYPES[type_name])
