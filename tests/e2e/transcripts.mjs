// The official OpenAI client for JavaScript, asked what it is told: a list of {endpoint, body} on standard input, and for
// each a line of what came, as JSON. node transcripts.mjs URL
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const create = {
  chat: (body) => client.chat.completions.create(body),
  completions: (body) => client.completions.create(body),
  responses: (body) => client.responses.create(body),
};

for (const { endpoint, body } of JSON.parse(readFileSync(0, "utf8"))) {
  const answer = await create[endpoint](body);
  const parts = [];
  if (body.stream) for await (const part of answer) parts.push(part);
  else parts.push(answer);
  console.log(JSON.stringify(parts));
}
