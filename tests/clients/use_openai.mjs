// The official `openai` package for Node.js: chat, stream, structured output, tools, embeddings, responses, an error.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.BASE_URL}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name one colour." }];
const model = "gpt-4o-mini";

const answer = await client.chat.completions.create({ model, messages, max_tokens: 16, temperature: 0 });
assert.ok(answer.choices[0].message.content);
assert.ok(answer.usage.completion_tokens > 0);

let text = "";
const stream = await client.chat.completions.create({
  model, messages, max_tokens: 16, temperature: 0, stream: true, stream_options: { include_usage: true },
});
let usage = null;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, answer.choices[0].message.content);
assert.deepEqual(usage.completion_tokens, answer.usage.completion_tokens);

const helper = client.chat.completions.stream({ model, messages, max_tokens: 16, temperature: 0 });
assert.equal((await helper.finalMessage()).content, text);

const schema = {
  type: "object",
  properties: { colour: { type: "string", enum: ["red", "green", "blue"] } },
  required: ["colour"],
  additionalProperties: false,
};
const typed = await client.chat.completions.create({
  model, messages, max_tokens: 32,
  response_format: { type: "json_schema", json_schema: { name: "paint", strict: true, schema } },
});
assert.ok(schema.properties.colour.enum.includes(JSON.parse(typed.choices[0].message.content).colour));

const called = await client.chat.completions.create({
  model, messages, max_tokens: 64, tool_choice: "required", parallel_tool_calls: false,
  tools: [{ type: "function", function: { name: "paint", parameters: schema } }],
});
const [call] = called.choices[0].message.tool_calls;
assert.equal(call.function.name, "paint");
assert.ok(schema.properties.colour.enum.includes(JSON.parse(call.function.arguments).colour));

const vectors = await client.embeddings.create({ model: "text-embedding-3-small", input: ["one", "two"] });
assert.deepEqual(vectors.data.map((item) => item.embedding.length), [384, 384]);

const response = await client.responses.create({ model, input: "Name one colour.", max_output_tokens: 16, temperature: 0 });
assert.ok(response.output_text);
const kinds = [];
for await (const event of await client.responses.create({ model, input: "Hello.", max_output_tokens: 16, stream: true })) {
  kinds.push(event.type);
}
assert.equal(kinds[0], "response.created");
assert.ok(["response.completed", "response.incomplete"].includes(kinds.at(-1)), kinds.at(-1));

await assert.rejects(client.chat.completions.create({ model: "no-such-model", messages }), OpenAI.NotFoundError);

const controller = new AbortController();
const endless = await client.chat.completions.create(
  { model, messages, max_tokens: 4000, stream: true, ignore_eos: true }, { signal: controller.signal },
);
for await (const chunk of endless) {
  if (chunk.choices[0]?.delta?.content) controller.abort();
}
