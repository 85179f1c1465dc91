// OpenAI's client for JavaScript: plays a part against a server, and prints what it saw as JSON.
//
//     node client.mjs BASE_URL PART REQUEST [MORE]
//
// REQUEST and MORE are JSON: a request's fields, and what else the part needs.
import OpenAI from "openai";

const [baseURL, part, ...given] = process.argv.slice(2);
const [request, more] = given.map((it) => JSON.parse(it));
const chat = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 }).chat.completions;

const parts = {
  async stream() {
    const seen = { pieces: [], drafted: [] };
    const told = { include_usage: true, include_spans: true };
    for await (const { choices: [choice], usage } of await chat.create({ ...request, stream: true, stream_options: told })) {
      if (choice?.delta.content) seen.pieces.push(choice.delta.content);
      seen.drafted.push(...(choice?.spans ?? []).filter((span) => span.drafted));
      seen.reason ??= choice?.finish_reason;
      seen.usage ??= usage;
    }
    return seen;
  },

  async parallel() {
    const ask = (content) => chat.create({ ...request, messages: [{ role: "user", content }] });
    return (await Promise.all(more.map(ask))).map(({ choices: [{ message }] }) => message.content);
  },

  // The client puts the message together from the pieces of the stream; then the tool's answer is sent back.
  async tools() {
    const { messages, tool_choice, ...rest } = request;
    const [{ message }] = (await chat.stream({ messages, tool_choice, ...rest }).finalChatCompletion()).choices;
    const answered = message.tool_calls.map(({ id }) => ({ role: "tool", tool_call_id: id, content: "done" }));
    const [after] = (await chat.create({ messages: [...messages, message, ...answered], ...rest })).choices;
    return { calls: message.tool_calls, after: after.message.content };
  },

  // The client reads the JSON itself.
  async schema() {
    return (await chat.parse(request)).choices[0].message.parsed;
  },

  async leave() {
    for await (const { choices: [{ delta }] } of await chat.create({ ...request, stream: true })) {
      if (delta.content) return "left the stream"; // which closes the connection
    }
  },

  async abort() {
    const controller = new AbortController();
    setTimeout(() => controller.abort(), more);
    return chat.create(request, { signal: controller.signal }).catch((error) => error.constructor.name);
  },

  async error() {
    return chat.create(request).catch(({ constructor: { name }, status, message }) => ({ name, status, message }));
  },
};

console.log(JSON.stringify(await parts[part]()));
