"""langchain-openai: chat, stream, structured output, tools and embeddings."""

import os
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

PLACE = {"base_url": f"{os.environ['BASE_URL']}/v1", "api_key": "none"}


class Paint(BaseModel):
    """Paint the wall in a colour."""

    colour: Literal["red", "green", "blue"]


chat = ChatOpenAI(model="gpt-4o-mini", temperature=0, max_tokens=64, **PLACE)
ask = HumanMessage("Which colour is the sky?")
answer = chat.invoke([ask])
assert answer.content
assert answer.usage_metadata["output_tokens"] > 0
assert "".join(chunk.content for chunk in chat.stream([ask])) == answer.content

assert chat.with_structured_output(Paint, method="json_schema").invoke([ask]).colour in {"red", "green", "blue"}
assert chat.with_structured_output(Paint, method="function_calling").invoke([ask]).colour in {"red", "green", "blue"}

called = chat.bind_tools([Paint], tool_choice="any").invoke([ask])
(call,) = called.tool_calls[:1]
assert call["name"] == "Paint"
results = [ToolMessage("The wall is painted.", tool_call_id=one["id"]) for one in called.tool_calls]
done = chat.invoke([ask, called, *results])
assert done.content

embeddings = OpenAIEmbeddings(model="text-embedding-3-small", check_embedding_ctx_length=False, **PLACE)
assert len(embeddings.embed_query("one")) == 384

responses = ChatOpenAI(model="gpt-4o-mini", temperature=0, max_tokens=32, use_responses_api=True, **PLACE)
assert responses.invoke([ask]).text
