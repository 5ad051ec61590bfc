// Asks a model with OpenAI's library.  Usage: node openai.mjs BASE_URL MODEL LONG_PROMPT
import OpenAI from 'openai';

const [baseURL, model, long] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0 });
const request = { model, messages: [{ role: 'user', content: 'Hello' }], max_tokens: 8, temperature: 0 };
const streaming = { ...request, stream: true, stream_options: { include_usage: true } };
const failure = (error) => ({ name: error.constructor.name, code: error.code });

const whole = await client.chat.completions.create(request);

let streamed = '';
let finish = null;
let usage = null;
for await (const chunk of await client.chat.completions.create(streaming)) {
  for (const choice of chunk.choices) {
    streamed += choice.delta.content ?? '';
    finish ??= choice.finish_reason;
  }
  usage = chunk.usage ?? usage;
}

const helper = client.chat.completions.stream(streaming);
let heard = '';
helper.on('content', (delta) => {
  heard += delta;
});
const final = await helper.finalChatCompletion();

console.log(
  JSON.stringify({
    answers: [whole.choices[0].message.content, streamed, heard, final.choices[0].message.content],
    tokens: [whole.usage.completion_tokens, usage.completion_tokens],
    finish,
    refused: await client.chat.completions.create({ ...request, model: 'no/such-model' }).catch(failure),
    overflow: await client.chat.completions
      .create({ ...request, messages: [{ role: 'user', content: long }] })
      .catch(failure),
  }),
);
