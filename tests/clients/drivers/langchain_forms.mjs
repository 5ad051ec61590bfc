// Uses tools, objects and embeddings with LangChain, in chats and in responses.
// Usage: node langchain_forms.mjs URL TOKEN RECITING TINY EMBEDDING
import assert from 'node:assert';
import { HumanMessage } from '@langchain/core/messages';
import { tool } from '@langchain/core/tools';
import { ChatOpenAI, OpenAIEmbeddings } from '@langchain/openai';
import { z } from 'zod';

const [url, apiKey, reciting, tiny, embedding] = process.argv.slice(2);
const at = { apiKey, configuration: { baseURL: `${url}/v1` }, maxRetries: 0 };
const person = z.object({ name: z.enum(['Ada', 'Grace']), alive: z.boolean() });
const weather = tool(({ city, days }) => `Sunny in ${city} for ${days} days.`, {
  name: 'get_weather',
  description: 'Get the weather of a city.',
  schema: z.object({ city: z.string(), days: z.number().int() }),
});
const question = new HumanMessage('Hello');
const answer = { said: [], called: [], objects: [] };
const failure = (asking) =>
  asking.then(
    () => assert.fail('not refused'),
    (e) => [e.constructor.name, e.error.message],
  );

function read(message) {
  assert.equal(message.invalid_tool_calls.length, 0);
  const [call] = message.tool_calls;
  answer.said.push(message.text);
  answer.called.push([call.name, call.args]);
  assert(message.usage_metadata.output_tokens > 0);
  return call;
}

for (const more of [{}, { useResponsesApi: true }]) {
  const chat = new ChatOpenAI({ model: reciting, ...at, ...more });
  const bound = chat.bindTools([weather], { strict: true });
  const message = await bound.invoke([question]);
  const result = await weather.invoke(read(message));
  read(await bound.invoke([question, message, result]));
  let streamed;
  for await (const chunk of await bound.stream([question])) streamed = streamed?.concat(chunk) ?? chunk;
  read(streamed);
  read(await chat.bindTools([weather], { tool_choice: 'required' }).invoke([question]));
  for (const method of ['jsonSchema', 'functionCalling']) {
    const maker = new ChatOpenAI({ model: tiny, ...at, ...more }).withStructuredOutput(person, { method, name: 'p' });
    answer.objects.push(await maker.invoke('Hello'));
  }
}

const embeddings = new OpenAIEmbeddings({ model: embedding, ...at });
answer.vectors = (await embeddings.embedDocuments(['The sky', 'is blue'])).map((vector) => vector.length);
answer.failures = {
  400: await failure(new ChatOpenAI({ model: tiny, ...at }).invoke([])),
  401: await failure(new ChatOpenAI({ model: tiny, ...at, apiKey: 'other' }).invoke('Hello')),
  404: await failure(new ChatOpenAI({ model: 'no/such-model', ...at }).invoke('Hello')),
};
console.log(JSON.stringify(answer));
