// The official OpenAI client for JavaScript against a running server: node openai.mjs URL
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name three primary colours." }];
const parameters = { type: "object", properties: { city: { type: "string", enum: ["Rome", "Oslo"] } }, required: ["city"], additionalProperties: false };
const weather = { type: "function", function: { name: "weather", description: "The weather in a city.", parameters } };

async function chat() {
  const ask = { model: "smollm2", messages, max_tokens: 16, temperature: 0, seed: 1 };
  await client.chat.completions.create(ask);
  const whole = await client.chat.completions.create(ask);
  const stream = client.chat.completions.stream({ ...ask, stream_options: { include_usage: true } });
  const streamed = await stream.finalChatCompletion();
  assert.equal(streamed.choices[0].message.content, whole.choices[0].message.content);
  assert.equal(streamed.choices[0].finish_reason, whole.choices[0].finish_reason);
  assert.deepEqual(streamed.usage, whole.usage);
}

async function tools() {
  const ask = { model: "smollm2", messages, tools: [weather], tool_choice: "required", parallel_tool_calls: false, max_tokens: 120, temperature: 0 };
  const whole = await client.chat.completions.create(ask);
  const streamed = await client.chat.completions.stream(ask).finalChatCompletion();
  for (const { choices: [choice] } of [whole, streamed]) {
    assert.equal(choice.finish_reason, "tool_calls");
    assert.equal(choice.message.tool_calls[0].function.name, "weather");
    assert.ok(["Rome", "Oslo"].includes(JSON.parse(choice.message.tool_calls[0].function.arguments).city));
  }
}

async function responses() {
  const ask = { model: "smollm2", input: "Name three primary colours.", max_output_tokens: 16, temperature: 0, store: false };
  await client.responses.create(ask);
  const whole = await client.responses.create(ask);
  const streamed = await client.responses.stream(ask).finalResponse();
  assert.equal(streamed.output_text, whole.output_text);
  assert.deepEqual(streamed.usage, whole.usage);
  const called = await client.responses.create({ ...ask, max_output_tokens: 120, tools: [{ type: "function", name: "weather", parameters, strict: true }], tool_choice: { type: "function", name: "weather" } });
  assert.ok(["Rome", "Oslo"].includes(JSON.parse(called.output[0].arguments).city));
}

async function embeddings() {
  const { data } = await client.embeddings.create({ model: "smollm2", input: ["one", "two"] });
  assert.equal(data.length, 2);
  assert.ok(Math.abs(data[0].embedding.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-5);
}

async function errors() {
  await assert.rejects(client.chat.completions.create({ model: "nope", messages }), OpenAI.NotFoundError);
  await assert.rejects(client.responses.create({ model: "smollm2", input: "x", previous_response_id: "resp_1" }), OpenAI.BadRequestError);
}

for (const test of [chat, tools, responses, embeddings, errors]) await test();
