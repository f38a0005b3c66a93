// Vercel's AI SDK: text, stream, a typed object, a tool.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const [address, name] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "crma",
  baseURL: `${address}/v1`,
  apiKey: "none",
  supportsStructuredOutputs: true,
});
const common = {
  model: provider(name),
  temperature: 0,
  maxRetries: 0,
  prompt: "Is the sky clear?",
};

const whole = await generateText({ ...common, maxOutputTokens: 8 });
const stream = streamText({ ...common, maxOutputTokens: 8 });
let text = "";
for await (const part of stream.textStream) text += part;
assert.equal(text, whole.text);

const Sky = z.object({ state: z.enum(["clear", "cloudy"]) });
const typed = await generateText({ ...common, output: Output.object({ schema: Sky }) });
assert.ok(["clear", "cloudy"].includes(typed.output.state));

const look = tool({
  description: "Look in a direction.",
  inputSchema: z.object({ direction: z.enum(["up", "down"]) }),
  execute: async ({ direction }) => `nothing is ${direction}`,
});
const called = await generateText({
  ...common,
  tools: { look },
  toolChoice: "required",
  maxOutputTokens: 60,
});
assert.equal(called.toolResults[0].output.startsWith("nothing is"), true);
