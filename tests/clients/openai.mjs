// Reads one chat completion from a server in three ways with OpenAI's library, and prints what it read as JSON.
// Usage: node openai.mjs LIBRARY BASE_URL MODEL
import { pathToFileURL } from 'node:url';

const [library, baseURL, model] = process.argv.slice(2);
const { default: OpenAI } = await import(pathToFileURL(library));
const client = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0 });
const request = { model, messages: [{ role: 'user', content: 'Hello' }], max_tokens: 8, temperature: 0 };
const streamed = { ...request, stream: true, stream_options: { include_usage: true } };

const whole = await client.chat.completions.create(request);

let raw = '';
const finishes = [];
let usage = null;
for await (const chunk of await client.chat.completions.create(streamed)) {
  for (const choice of chunk.choices) {
    raw += choice.delta.content ?? '';
    if (choice.finish_reason) finishes.push(choice.finish_reason);
  }
  usage = chunk.usage ?? usage;
}

const helper = client.chat.completions.stream(streamed);
let heard = '';
helper.on('content', (delta) => {
  heard += delta;
});
const final = await helper.finalChatCompletion();

let refused = null;
try {
  await client.chat.completions.create({ ...request, model: 'no/such-model' });
} catch (error) {
  refused = { name: error.constructor.name, status: error.status, code: error.code };
}

console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    raw,
    finishes,
    usage: usage?.completion_tokens ?? null,
    heard,
    final: final.choices[0].message.content,
    refused,
  }),
);
