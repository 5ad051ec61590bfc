// Uses messages with Anthropic's library.  Usage: node anthropic_forms.mjs URL TOKEN RECITING TINY EMBEDDING
import assert from 'node:assert';
import Anthropic from '@anthropic-ai/sdk';
import { zodOutputFormat } from '@anthropic-ai/sdk/helpers/zod';
import { z } from 'zod';

const [baseURL, apiKey, reciting, tiny] = process.argv.slice(2);
const client = new Anthropic({ baseURL, apiKey, maxRetries: 0 });
const hello = [{ role: 'user', content: 'Hello' }];
const properties = { city: { type: 'string' }, days: { type: 'integer' } };
const tools = [{ name: 'get_weather', input_schema: { type: 'object', properties } }];
const asked = (messages, more = {}) => ({ model: reciting, max_tokens: 100, messages, tools, ...more });
const block = (message, type) => message.content.find((one) => one.type === type);
const call = (message) => [block(message, 'tool_use').name, block(message, 'tool_use').input];
const person = z.object({ name: z.enum(['Ada', 'Grace']), alive: z.boolean() });
const failure = (asking) =>
  asking.then(
    () => assert.fail('not refused'),
    (e) => [e.constructor.name, e.error.error.message],
  );

const whole = await client.messages.create(asked(hello));
const heard = { text: '', thinking: '', input: '' };
const stream = client.messages.stream(asked(hello, { tool_choice: { type: 'any' } }));
stream.on('text', (text) => (heard.text += text));
stream.on('thinking', (text) => (heard.thinking += text));
stream.on('inputJson', (text) => (heard.input += text));
const final = await stream.finalMessage();
const use = block(whole, 'tool_use');
const result = { type: 'tool_result', tool_use_id: use.id, content: 'Sunny.' };
const after = [...hello, { role: 'assistant', content: whole.content }, { role: 'user', content: [result] }];
const second = await client.messages.create(asked(after));
const counted = [];
for (const messages of [hello, after]) {
  counted.push((await client.messages.countTokens({ model: reciting, messages, tools })).input_tokens);
}
assert(counted[0] < counted[1]);
for (const message of [whole, final, second]) assert.equal(message.stop_reason, 'tool_use');
const parsed = await client.messages.parse({
  model: tiny,
  max_tokens: 100,
  messages: hello,
  output_config: { format: zodOutputFormat(person) },
});
const other = new Anthropic({ baseURL, apiKey: 'other', maxRetries: 0 });
const question = { model: tiny, max_tokens: 8, messages: hello };

console.log(
  JSON.stringify({
    said: [whole, final, second].map((message) => block(message, 'text').text).concat(heard.text),
    thought: [whole, final].map((message) => block(message, 'thinking').thinking).concat(heard.thinking),
    called: [call(whole), call(final), call(second), ['get_weather', JSON.parse(heard.input)]],
    objects: [parsed.parsed_output],
    counted,
    failures: {
      400: await failure(client.messages.create({ ...question, messages: [] })),
      401: await failure(other.messages.create(question)),
      404: await failure(client.messages.create({ ...question, model: 'no/such-model' })),
    },
  }),
);
