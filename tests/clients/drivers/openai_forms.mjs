// Uses chats, responses, completions and embeddings with OpenAI's library.
// Usage: node openai_forms.mjs URL TOKEN RECITING TINY EMBEDDING
import assert from 'node:assert';
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const [url, apiKey, reciting, tiny, embedding] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const messages = [{ role: 'user', content: 'Hello' }];
const weather = { name: 'get_weather', parameters: z.object({ city: z.string(), days: z.number().int() }) };
const person = z.object({ name: z.enum(['Ada', 'Grace']), alive: z.boolean() });
const answer = { said: [], called: [], thought: [], objects: [] };
const failure = (asking) =>
  asking.then(
    () => assert.fail('not refused'),
    (e) => [e.constructor.name, e.error.message],
  );

function chatted({ choices: [{ finish_reason, message }] }) {
  assert.equal(finish_reason, 'tool_calls');
  const [call] = message.tool_calls;
  answer.said.push(message.content);
  answer.called.push([call.function.name, JSON.parse(call.function.arguments)]);
  return message;
}

function responded(response) {
  const [reasoning, message, call] = response.output;
  assert.equal(response.status, 'completed');
  answer.thought.push(reasoning.content[0].text);
  answer.said.push(message.content[0].text, response.output_text);
  answer.called.push([call.name, JSON.parse(call.arguments)]);
  return call;
}

// Chats
const chat = { model: reciting, messages, tools: [zodFunction(weather)] };
const asked = chatted(await client.chat.completions.create(chat));
const parsed = chatted(await client.chat.completions.parse(chat));
answer.called.push(['get_weather', parsed.tool_calls[0].function.parsed_arguments]);
const stream = client.chat.completions.stream(chat);
let said = '';
stream.on('content', (delta) => (said += delta));
stream.on('tool_calls.function.arguments.done', (call) => answer.called.push([call.name, call.parsed_arguments]));
chatted(await stream.finalChatCompletion());
answer.said.push(said);
const result = { role: 'tool', tool_call_id: asked.tool_calls[0].id, content: 'Sunny.' };
chatted(await client.chat.completions.create({ ...chat, messages: [...messages, asked, result] }));
let ran;
const runnable = { name: weather.name, parse: JSON.parse, parameters: z.toJSONSchema(weather.parameters) };
const runner = client.chat.completions.runTools(
  {
    model: reciting,
    messages,
    tools: [{ type: 'function', function: { ...runnable, function: (input) => ((ran = input), 'Sunny.') } }],
  },
  { maxChatCompletions: 2 },
);
await runner.done();
answer.called.push(['get_weather', ran]);

// Responses
const ask = { model: reciting, input: 'Hello', tools: [zodResponsesFunction(weather)] };
responded(await client.responses.create(ask));
const first = await client.responses.parse(ask);
const call = responded(first);
answer.called.push([call.name, call.parsed_arguments]);
const heard = { text: '', thought: '', input: '' };
const events = client.responses.stream(ask);
events.on('response.output_text.delta', ({ delta }) => (heard.text += delta));
events.on('response.reasoning_text.delta', ({ delta }) => (heard.thought += delta));
events.on('response.function_call_arguments.delta', ({ delta }) => (heard.input += delta));
responded(await events.finalResponse());
answer.said.push(heard.text);
answer.thought.push(heard.thought);
answer.called.push(['get_weather', JSON.parse(heard.input)]);
const output = { type: 'function_call_output', call_id: call.call_id, output: 'Sunny.' };
const second = await client.responses.create({ ...ask, input: [output], previous_response_id: first.id });
responded(second);
assert(second.usage.input_tokens > first.usage.input_tokens);
assert.equal((await client.responses.retrieve(second.id)).id, second.id);
await client.responses.delete(second.id);

// Objects
const response_format = zodResponseFormat(person, 'person');
const text = { format: zodTextFormat(person, 'person') };
const whole = await client.chat.completions.parse({ model: tiny, messages, response_format });
const streamed = await client.chat.completions.stream({ model: tiny, messages, response_format }).finalChatCompletion();
const made = [whole, streamed].map((completion) => completion.choices[0].message.parsed);
const response = await client.responses.parse({ model: tiny, input: 'Hello', text });
const last = await client.responses.stream({ model: tiny, input: 'Hello', text }).finalResponse();
answer.objects.push(...made, response.output_parsed, last.output_parsed);

// Texts and vectors
const limits = { model: tiny, prompt: 'Once', max_tokens: 8, temperature: 0 };
const continued = (await client.completions.create(limits)).choices[0].text;
let pieces = '';
for await (const chunk of await client.completions.create({ ...limits, stream: true })) pieces += chunk.choices[0].text;
assert.equal(pieces, continued);
answer.continued = [continued];
const input = ['The sky', 'is blue'];
const decoded = (await client.embeddings.create({ model: embedding, input })).data;
const floats = (await client.embeddings.create({ model: embedding, input, encoding_format: 'float' })).data;
decoded.forEach((one, i) => one.embedding.forEach((x, j) => assert(Math.abs(x - floats[i].embedding[j]) < 1e-6)));
answer.vectors = decoded.map((one) => one.embedding.length);

const other = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'other', maxRetries: 0 });
answer.failures = {
  400: await failure(client.chat.completions.create({ model: tiny, messages: [] })),
  401: await failure(other.responses.create({ model: tiny, input: 'Hello' })),
  404: await failure(client.responses.create({ model: 'no/such-model', input: 'Hello' })),
};
console.log(JSON.stringify(answer));
