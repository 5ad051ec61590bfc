// Asks a model with LangChain.  Usage: node langchain.mjs BASE_URL MODEL LONG_PROMPT
import { HumanMessage } from '@langchain/core/messages';
import { ChatOpenAI } from '@langchain/openai';

const [baseURL, model, long] = process.argv.slice(2);
const options = { apiKey: 'none', configuration: { baseURL }, maxRetries: 0, temperature: 0 };
const chat = new ChatOpenAI({ ...options, model, maxTokens: 8 });
const question = [new HumanMessage('Hello')];
const failure = (error) => ({ name: error.constructor.name, code: error.code ?? null });

const whole = await chat.invoke(question);
let streamed;
for await (const chunk of await chat.stream(question)) streamed = streamed?.concat(chunk) ?? chunk;

console.log(
  JSON.stringify({
    answers: [whole.content, streamed.content],
    tokens: [whole.usage_metadata.output_tokens, streamed.usage_metadata.output_tokens],
    finish: streamed.response_metadata.finish_reason,
    refused: await new ChatOpenAI({ ...options, model: 'no/such-model' }).invoke(question).catch(failure),
    overflow: await chat.invoke([new HumanMessage(long)]).catch(failure),
  }),
);
