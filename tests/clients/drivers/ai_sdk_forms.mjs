// Uses tools, objects and embeddings with Vercel's AI SDK: its providers for compatible servers and for responses.
// Usage: node ai_sdk_forms.mjs URL TOKEN RECITING TINY EMBEDDING
import assert from 'node:assert';
import { createOpenResponses } from '@ai-sdk/open-responses';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { embedMany, generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from 'ai';
import { z } from 'zod';

const [url, apiKey, reciting, tiny, embedding] = process.argv.slice(2);
const at = { name: 'loadstone', baseURL: `${url}/v1`, includeUsage: true, supportsStructuredOutputs: true };
const compatible = createOpenAICompatible({ ...at, apiKey });
const responses = createOpenResponses({ name: 'loadstone', url: `${url}/v1/responses`, apiKey });
const schema = z.object({ name: z.enum(['Ada', 'Grace']), alive: z.boolean() });
const inputSchema = z.object({ city: z.string(), days: z.number().int() });
const answer = { said: [], thought: [], called: [], objects: [] };
const failure = (asking) =>
  asking.then(
    () => assert.fail('not refused'),
    (e) => [String(e.statusCode), e.data.error.message],
  );

function read({ text, reasoningText, toolCalls, finishReason }) {
  assert.equal(finishReason, 'tool-calls');
  answer.said.push(text);
  answer.thought.push(reasoningText);
  answer.called.push(...toolCalls.map((call) => [call.toolName, call.input]));
}

for (const provider of [compatible, responses]) {
  const execute = ({ city }) => `Sunny in ${city}.`;
  const tools = { get_weather: tool({ inputSchema, execute }) };
  const asked = { model: provider(reciting), prompt: 'Hello', tools, maxRetries: 0, stopWhen: stepCountIs(2) };
  const { steps } = await generateText(asked);
  assert.equal(steps.length, 2);
  steps.forEach(read);
  (await streamText(asked).steps).forEach(read);
  (await generateText({ ...asked, toolChoice: 'required' })).steps.forEach(read);
  const wanted = { model: provider(tiny), prompt: 'Hello', maxRetries: 0 };
  let streamed;
  for await (const part of streamObject({ ...wanted, schema }).partialObjectStream) streamed = part;
  answer.objects.push(
    (await generateObject({ ...wanted, schema })).object,
    streamed,
    (await generateText({ ...wanted, output: Output.object({ schema }) })).output,
  );
}

const values = ['The sky', 'is blue'];
const { embeddings } = await embedMany({ model: compatible.textEmbeddingModel(embedding), values });
answer.vectors = embeddings.map((vector) => vector.length);
const hello = { prompt: 'Hello', maxRetries: 0 };
const other = createOpenAICompatible({ ...at, apiKey: 'other' });
answer.failures = {
  401: await failure(generateText({ ...hello, model: other(tiny) })),
  404: await failure(generateText({ ...hello, model: responses('no/such-model') })),
};
console.log(JSON.stringify(answer));
