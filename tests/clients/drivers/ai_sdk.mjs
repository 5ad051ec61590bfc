// Asks a model with Vercel's AI SDK.  Usage: node ai_sdk.mjs BASE_URL MODEL LONG_PROMPT
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, streamText } from 'ai';

const [baseURL, model, long] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: 'loadstone', baseURL, includeUsage: true });
const request = { model: provider(model), prompt: 'Hello', maxOutputTokens: 8, temperature: 0, maxRetries: 0 };
const failure = (error) => ({ name: error.name, code: error.data?.error.code });

const whole = await generateText(request);
const stream = streamText(request);
let streamed = '';
for await (const text of stream.textStream) streamed += text;

console.log(
  JSON.stringify({
    answers: [whole.text, streamed],
    tokens: [whole.usage.outputTokens, (await stream.usage).outputTokens],
    finish: await stream.finishReason,
    refused: await generateText({ ...request, model: provider('no/such-model') }).catch(failure),
    overflow: await generateText({ ...request, prompt: long }).catch(failure),
  }),
);
