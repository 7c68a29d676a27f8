"""instructor: a pydantic object out of a chat, by tools and by JSON schema."""

import os
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)  # a small model finds no end of a name
    age: int = Field(ge=0, le=120)
    mood: Literal["glad", "sad"]


ASK = [{"role": "user", "content": "Anna is 31 years old and glad."}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=f"{os.environ['BASE_URL']}/v1", api_key="none"), mode=mode)
    person = client.chat.completions.create(
        model="gpt-4o-mini", messages=ASK, response_model=Person, max_tokens=200, temperature=0, max_retries=3
    )
    assert isinstance(person, Person), person
