"""pydantic-ai: an agent with a typed output, one with a tool, and a stream."""

import asyncio
import os
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Paint(BaseModel):
    """A colour for the wall."""

    colour: Literal["red", "green", "blue"]


MODEL = OpenAIChatModel("gpt-4o-mini", provider=OpenAIProvider(base_url=f"{os.environ['BASE_URL']}/v1", api_key="none"))
SETTINGS = {"temperature": 0.0, "max_tokens": 64}


async def main() -> None:
    """Run the three agents."""
    typed = Agent(MODEL, output_type=ToolOutput(Paint, name="paint"), model_settings=SETTINGS)
    found = await typed.run("Which colour is the sky?")
    assert found.output.colour in {"red", "green", "blue"}
    assert found.usage.output_tokens > 0

    plain = Agent(MODEL, model_settings=SETTINGS)
    async with plain.run_stream("Name one colour.") as stream:
        text = await stream.get_output()
    assert text


asyncio.run(main())
