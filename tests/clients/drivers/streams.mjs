// Reads recorded streams with the libraries for Node: what each makes of a stream, by its name.
// Usage: node streams.mjs URL STREAM...
import { createOpenResponses } from '@ai-sdk/open-responses';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import Anthropic from '@anthropic-ai/sdk';
import { HumanMessage } from '@langchain/core/messages';
import { ChatOpenAI } from '@langchain/openai';
import { jsonSchema, streamText, tool } from 'ai';
import OpenAI from 'openai';

const [url, ...streams] = process.argv.slice(2);
const baseURL = `${url}/v1`;
const client = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0 });
const provider = createOpenAICompatible({ name: 'loadstone', baseURL, includeUsage: true });
const responsesProvider = createOpenResponses({ name: 'loadstone', url: `${baseURL}/responses`, apiKey: 'none' });
const request = {
  messages: [{ role: 'user', content: 'Hello' }],
  stream: true,
  stream_options: { include_usage: true },
};
const called = (calls) => calls.map(({ id, function: { name, arguments: given } }) => [id, name, JSON.parse(given)]);

async function raw(model) {
  const [texts, finishes, calls] = [[], [], []];
  let [reasoning, usage] = ['', null];
  for await (const chunk of await client.chat.completions.create({ ...request, model })) {
    usage = chunk.usage ?? usage;
    for (const { index, delta, finish_reason } of chunk.choices) {
      texts[index] = (texts[index] ?? '') + (delta.content ?? '');
      finishes[index] = (finishes[index] ?? '') + (finish_reason ?? '');
      reasoning += delta.reasoning_content ?? '';
      for (const call of delta.tool_calls ?? []) {
        const made = (calls[call.index] ??= { id: '', function: { name: '', arguments: '' } });
        made.id += call.id ?? '';
        made.function.name += call.function.name ?? '';
        made.function.arguments += call.function.arguments ?? '';
      }
    }
  }
  return { texts, finishes, tokens: [usage.prompt_tokens, usage.completion_tokens], calls: called(calls), reasoning };
}

async function helper(model) {
  const { choices, usage } = await client.chat.completions.stream({ ...request, model }).finalChatCompletion();
  return {
    texts: choices.map(({ message }) => message.content ?? ''),
    finishes: choices.map((choice) => choice.finish_reason),
    tokens: [usage.prompt_tokens, usage.completion_tokens],
    calls: called(choices.flatMap(({ message }) => message.tool_calls ?? [])),
    reasoning: '',
  };
}

async function langchain(model) {
  const chat = new ChatOpenAI({ model, apiKey: 'none', configuration: { baseURL }, maxRetries: 0 });
  let message;
  for await (const chunk of await chat.stream([new HumanMessage('Hello')])) message = message?.concat(chunk) ?? chunk;
  const { input_tokens, output_tokens } = message.usage_metadata;
  return {
    texts: [message.content],
    finishes: [message.response_metadata.finish_reason],
    tokens: [input_tokens, output_tokens],
    calls: message.tool_calls.map(({ id, name, args }) => [id, name, args]),
    reasoning: '',
  };
}

const aiSdk = (provider) => async (model) => {
  const tools = { get_weather: tool({ inputSchema: jsonSchema({ type: 'object' }) }) };
  const made = { texts: [''], finishes: [], tokens: [], calls: [], reasoning: '' };
  const stream = streamText({ model: provider(model), prompt: 'Hello', tools, maxRetries: 0, onError: () => {} });
  for await (const part of stream.fullStream) {
    if (part.type === 'text-delta') made.texts[0] += part.text;
    if (part.type === 'reasoning-delta') made.reasoning += part.text;
    if (part.type === 'tool-call') made.calls.push([part.toolCallId, part.toolName, part.input]);
    if (part.type === 'error') throw part.error;
    if (part.type === 'finish') {
      made.finishes.push(part.finishReason);
      made.tokens.push(part.totalUsage.inputTokens, part.totalUsage.outputTokens);
    }
  }
  return made;
};

async function responses(model) {
  const stream = client.responses.stream({ model, input: 'Hello' });
  stream.on('response.failed', ({ response }) => {
    throw new Error(response.error.message);
  });
  const { output, output_text, status, usage } = await stream.finalResponse();
  const of = (type) => output.filter((item) => item.type === type);
  return {
    texts: [output_text],
    finishes: [status],
    tokens: [usage.input_tokens, usage.output_tokens],
    calls: of('function_call').map((call) => [call.call_id, call.name, JSON.parse(call.arguments)]),
    reasoning: of('reasoning').flatMap(({ content }) => content.map(({ text }) => text)).join(''),
  };
}

async function messages(model) {
  const anthropic = new Anthropic({ baseURL: url, apiKey: 'none', maxRetries: 0 });
  const stream = anthropic.messages.stream({ model, messages: request.messages, max_tokens: 100 });
  const { content, stop_reason, usage } = await stream.finalMessage();
  const of = (type) => content.filter((block) => block.type === type);
  return {
    texts: [of('text').map(({ text }) => text).join('')],
    finishes: [stop_reason],
    tokens: [usage.input_tokens + usage.cache_read_input_tokens, usage.output_tokens],
    calls: of('tool_use').map(({ id, name, input }) => [id, name, input]),
    reasoning: of('thinking').map(({ thinking }) => thinking).join(''),
  };
}

const stacks = {
  openai: raw,
  'openai stream()': helper,
  langchain,
  ai_sdk: aiSdk(provider),
  'openai responses': responses,
  'ai_sdk responses': aiSdk(responsesProvider),
  anthropic: messages,
};
const read = {};
for (const [of, stack] of Object.entries(stacks)) {
  read[of] = {};
  for (const name of streams) {
    read[of][name] = await stack(name).catch((e) => ({ error: e.message ?? JSON.stringify(e) }));
  }
}
console.log(JSON.stringify(read));
