"""litellm: chat, stream, tools and embeddings through its `openai/` provider."""

import json
import os

import litellm

PLACE = {"api_base": f"{os.environ['BASE_URL']}/v1", "api_key": "none"}
ASK = [{"role": "user", "content": "Name one colour."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint the wall.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"type": "string", "enum": ["red", "green", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}

answer = litellm.completion("openai/gpt-4o-mini", messages=ASK, max_tokens=16, temperature=0, **PLACE)
assert answer.choices[0].message.content
assert answer.usage.completion_tokens > 0

chunks = list(
    litellm.completion("openai/gpt-4o-mini", messages=ASK, max_tokens=16, temperature=0, stream=True, **PLACE)
)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
assert streamed == answer.choices[0].message.content, (streamed, answer)

called = litellm.completion(
    "openai/gpt-4o-mini",
    messages=ASK,
    tools=[TOOL],
    tool_choice="required",
    parallel_tool_calls=False,
    max_tokens=64,
    **PLACE,
)
call = called.choices[0].message.tool_calls[0]
assert call.function.name == "paint"
assert json.loads(call.function.arguments)["colour"] in {"red", "green", "blue"}
assert called.choices[0].finish_reason == "tool_calls"

vectors = litellm.embedding("openai/text-embedding-3-small", input=["one", "two"], **PLACE)
assert [len(item["embedding"]) for item in vectors.data] == [384, 384]

missing = None
try:
    litellm.completion("openai/no-such-model", messages=ASK, **PLACE)
except litellm.NotFoundError as error:
    missing = str(error)
assert missing is not None
assert "no-such-model" in missing
