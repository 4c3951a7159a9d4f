// Talks to the API in RESULTITY_API with OpenAI's own client, plain and
// streamed, and compares with what it is told to expect (JSON on stdin:
// {"model", "prompt", "answer"}). Prints "ok".
import OpenAI from "openai";
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

const want = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({
  baseURL: process.env.RESULTITY_API + "/v1",
  apiKey: process.env.RESULTITY_API_KEY,
  maxRetries: 0,
});
const request = {
  model: want.model,
  messages: [{ role: "user", content: want.prompt }],
  temperature: 0,
  max_tokens: 400,
};

const plain = await client.chat.completions.create(request);
assert.equal(plain.object, "chat.completion");
assert.equal(plain.choices[0].message.role, "assistant");
assert.equal(plain.choices[0].message.content, want.answer);
assert.equal(plain.choices[0].finish_reason, "stop");
assert.equal(plain.usage.total_tokens, plain.usage.prompt_tokens + plain.usage.completion_tokens);

const { data: stream, response } = await client.chat.completions
  .create({ ...request, stream: true, stream_options: { include_usage: true } })
  .withResponse();
let text = "";
let finish = null;
let usage = null;
for await (const chunk of stream) {
  assert.equal(chunk.object, "chat.completion.chunk");
  text += chunk.choices[0]?.delta?.content ?? "";
  finish = chunk.choices[0]?.finish_reason ?? finish;
  usage = chunk.usage ?? usage;
}
assert.equal(text, want.answer);
assert.equal(finish, "stop");
assert.deepEqual(usage, plain.usage);
assert.match(response.headers.get("resultity-receipt"), /^[0-9a-f]{32}$/);

// The client's own helper, which is picky about the order of events.
const final = await client.chat.completions.stream(request).finalChatCompletion();
assert.equal(final.choices[0].message.content, want.answer);

const models = [];
for await (const m of client.models.list()) models.push(m.id);
assert.deepEqual(models, [want.model]);

const completion = await client.completions.create({ model: want.model, prompt: "Hello", max_tokens: 4, temperature: 0 });
assert.equal(completion.object, "text_completion");
assert.equal(typeof completion.choices[0].text, "string");

// Errors arrive as the classes that its users catch.
await assert.rejects(client.chat.completions.create({ ...request, model: "no-such-model" }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ ...request, messages: [] }), OpenAI.BadRequestError);
await assert.rejects(client.chat.completions.create({ ...request, temperature: 9 }), OpenAI.BadRequestError);
const stranger = new OpenAI({ baseURL: client.baseURL, apiKey: "wrong", maxRetries: 0 });
await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);

console.log("ok");
