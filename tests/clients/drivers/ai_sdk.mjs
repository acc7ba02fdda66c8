// The AI SDK with its provider for servers of OpenAI's kind: node driver.mjs SERVER OUTPUT CASE ..., as drive.py.
import { writeFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText, tool as makeTool } from "ai";

const server = JSON.parse(process.argv[2]);
const schema = jsonSchema({
  $schema: "http://json-schema.org/draft-07/schema#",
  type: "object",
  properties: { colour: { type: "string", enum: ["red", "green"] } },
  required: ["colour"],
  additionalProperties: false,
});

function settings({ model = server.model, tokens = server.tokens, ...provider } = {}) {
  const lamina = createOpenAICompatible({ name: "lamina", baseURL: server.url, apiKey: server.key, ...provider });
  const given = { prompt: server.question, temperature: 0, maxOutputTokens: tokens, maxRetries: 0 };
  return { model: lamina(model), ...given };
}

// Without it, the demo model goes on for ever where it may.
const closing = { transformRequestBody: (body) => ({ ...body, logit_bias: server.closing }) };

const cases = {
  async plain() {
    const { text, usage, finishReason } = await generateText(settings());
    return {
      text,
      prompt_tokens: usage.inputTokens,
      completion_tokens: usage.outputTokens,
      finish: finishReason,
    };
  },

  async stream() {
    const answer = streamText(settings({ includeUsage: true }));
    const pieces = [];
    for await (const piece of answer.textStream) pieces.push(piece);
    const usage = await answer.usage;
    return { pieces, prompt_tokens: usage.inputTokens, completion_tokens: usage.outputTokens };
  },

  async tool() {
    const paint = makeTool({ description: "Paint it.", inputSchema: schema });
    const given = { ...settings({ tokens: server.room }), tools: { paint }, toolChoice: { type: "tool", toolName: "paint" } };
    const { toolCalls } = await generateText(given);
    return { name: toolCalls[0].toolName, arguments: toolCalls[0].input };
  },

  async streamed_tool() {
    const paint = makeTool({ description: "Paint it.", inputSchema: schema });
    const given = settings({ tokens: server.room, ...closing });
    const answer = streamText({ ...given, tools: { paint }, toolChoice: "required" });
    const calls = await answer.toolCalls;
    return { name: calls[0].toolName, arguments: calls[0].input };
  },

  async structured() {
    const given = { ...settings({ tokens: server.room, supportsStructuredOutputs: true }), schema };
    return (await generateObject(given)).object;
  },

  // Its default: a server is told of no schema, only that the answer is an object.
  async json_object() {
    const given = { ...settings({ tokens: server.room, ...closing }), schema: jsonSchema({ type: "object" }) };
    return (await generateObject(given)).object;
  },

  async wrong_model() {
    return (await generateText(settings({ model: "absent" }))).text;
  },

  async broken_stream() {
    let failure;
    const answer = streamText({ ...settings({ tokens: server.many }), onError: ({ error }) => (failure = error) });
    let pieces = 0;
    for await (const _ of answer.textStream) if (!pieces++) process.kill(server.victim, "SIGKILL");
    if (failure) throw failure;
    return pieces;
  },
};

const results = {};
for (const name of process.argv.slice(4)) {
  try {
    results[name] = { value: await cases[name]() };
  } catch (error) {
    const failure = error instanceof Error ? error : Object.assign(new Error(JSON.stringify(error)), { name: "Error" });
    results[name] = { raised: [failure.name, "Error"], message: String(failure), traceback: String(failure.stack) };
  }
}
writeFileSync(process.argv[3], JSON.stringify(results));
