// @anthropic-ai/sdk over /v1/messages.
import Anthropic from "@anthropic-ai/sdk";
import * as c from "./cases.mjs";

const client = new Anthropic({ baseURL: c.BASE, apiKey: "none", maxRetries: 0 });
const tools = [
  { name: "get_weather", description: "The weather.", input_schema: c.WEATHER_SCHEMA },
];
const ask = (messages, more = {}) =>
  client.messages.create({ model: c.MODEL, max_tokens: 500, messages, ...more });
const user = (content) => ({ role: "user", content });

await c.run({
  async tools() {
    const messages = [user(c.TOOLS_SCRIPT)];
    const answer = await ask(messages, { tools });
    c.equal(answer.stop_reason, "tool_use");
    messages.push({ role: "assistant", content: answer.content });
    messages.push(user([
      { type: "tool_result", tool_use_id: answer.content.at(-1).id, content: "sunny" },
    ]));
    c.equal((await ask(messages, { tools })).content[0].text, c.SAID);
  },
  async "tools, streamed"() {
    const stream = client.messages.stream({
      model: c.MODEL, max_tokens: 500, messages: [user(c.CALL)], tools,
    });
    c.equal((await stream.finalMessage()).content[0].input, { city: "Rome" });
  },
  async stream() {
    const stream = client.messages.stream({
      model: c.MODEL, max_tokens: 500, messages: [user(c.STREAM_SCRIPT)],
    });
    c.equal(await stream.finalText(), c.STREAM_SCRIPT.slice(5));
  },
  async structured() {
    const format = {
      type: "json_schema",
      schema: {
        type: "object", properties: { name: { type: "string" }, age: { type: "integer" } },
        required: ["name", "age"], additionalProperties: false,
      },
    };
    const answer = await ask([user(c.PERSON_SCRIPT)], { output_config: { format } });
    c.equal(JSON.parse(answer.content[0].text), c.ADA);
  },
  async image() {
    const source = { type: "base64", media_type: "image/png", data: c.PNG_BASE64 };
    const answer = await ask([user([{ type: "text", text: "@say Red." }, { type: "image", source }])]);
    c.equal(answer.content[0].text, "Red.");
  },
  async error() {
    try {
      await ask([user("x")], { model: "other" });
    } catch (error) {
      if (!(error instanceof Anthropic.NotFoundError)) throw error;
      return;
    }
    throw new Error("no error");
  },
  async thoughts() {
    const answer = await ask([user(c.THOUGHT_SCRIPT)], {
      max_tokens: 2000, thinking: { type: "enabled", budget_tokens: 1024 },
    });
    c.equal(answer.content.map((block) => block.type), ["thinking", "text"]);
  },
});
