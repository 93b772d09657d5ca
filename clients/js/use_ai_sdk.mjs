// The AI SDK over one of its providers: openai-compatible, openai, mistral.
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import * as c from "./cases.mjs";

async function provider(kind) {
  if (kind === "mistral") {
    const { createMistral } = await import("@ai-sdk/mistral");
    return createMistral({ baseURL: c.V1, apiKey: "none" });
  }
  if (kind === "openai") {
    const { createOpenAI } = await import("@ai-sdk/openai");
    return createOpenAI({ baseURL: c.V1, apiKey: "none" });
  }
  const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
  return createOpenAICompatible({
    name: "halfbyte", baseURL: c.V1, apiKey: "none", includeUsage: true,
    supportsStructuredOutputs: true,
  });
}

const kind = process.env.AI_SDK_KIND;
const made = await provider(kind);
const model = made(c.MODEL);
const tools = {
  get_weather: tool({
    description: "The weather.", inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => (c.equal(city, "Rome"), "sunny"),
  }),
};
const schema = z.object({ name: z.string(), age: z.number() });
const quiet = { maxRetries: 0 };

await c.run({
  async tools() {
    const told = await generateText({
      model, tools, prompt: c.TOOLS_SCRIPT, stopWhen: stepCountIs(4), ...quiet,
    });
    c.equal(told.text, c.SAID);
  },
  async "tools, streamed"() {
    const told = streamText({
      model, tools, prompt: c.TOOLS_SCRIPT, stopWhen: stepCountIs(4), ...quiet,
    });
    c.equal(await told.text, c.SAID);
  },
  async "toolChoice required, seed"() {
    const told = await generateText({
      model, tools, prompt: c.CALL, toolChoice: "required", seed: 3, ...quiet,
    });
    c.equal(told.toolCalls[0].toolName, "get_weather");
  },
  async stream() {
    const told = streamText({ model, prompt: c.STREAM_SCRIPT, ...quiet });
    let text = "";
    for await (const piece of told.textStream) text += piece;
    c.equal(text, c.STREAM_SCRIPT.slice(5));
    if (!((await told.usage).outputTokens > 5)) throw new Error("no usage");
  },
  async structured() {
    const told = await generateObject({ model, schema, prompt: c.PERSON_SCRIPT, ...quiet });
    c.equal(told.object, c.ADA);
  },
  async image() {
    const content = [
      { type: "text", text: "@say Red." }, { type: "image", image: c.PNG_BASE64, mediaType: "image/png" },
    ];
    const told = await generateText({ model, messages: [{ role: "user", content }], ...quiet });
    c.equal(told.text, "Red.");
  },
  async error() {
    try {
      await generateText({ model: made("other"), prompt: "x", ...quiet });
    } catch (error) {
      c.equal(error.statusCode, 404);
      return;
    }
    throw new Error("no error");
  },
  async thoughts() {
    const providerOptions = {
      halfbyte: { reasoningEffort: "high" }, openai: { reasoningEffort: "high", forceReasoning: true },
      mistral: { reasoningEffort: "high" },
    };
    const told = streamText({ model, prompt: c.THOUGHT_SCRIPT, providerOptions, ...quiet });
    c.equal(await told.text, "Four.");
    if (kind === "mistral" || kind === "openai-compatible") {
      c.equal(await told.reasoningText, "Let me see.");
    }
  },
});
