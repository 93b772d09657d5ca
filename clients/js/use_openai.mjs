// openai for JavaScript.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import * as c from "./cases.mjs";

const client = new OpenAI({ baseURL: c.V1, apiKey: "none", maxRetries: 0 });
const user = (content) => [{ role: "user", content }];
const Person = z.object({ name: z.string(), age: z.number().int() });
const tool = {
  type: "function",
  function: {
    name: "get_weather", description: "The weather.", parameters: c.WEATHER_SCHEMA,
    parse: JSON.parse, function: ({ city }) => (c.equal(city, "Rome"), "sunny"),
  },
};

await c.run({
  async tools() {
    const runner = client.chat.completions.runTools({
      model: c.MODEL, messages: user(c.TOOLS_SCRIPT), tools: [tool],
    });
    c.equal(await runner.finalContent(), c.SAID);
  },
  async "tools, streamed"() {
    const runner = client.chat.completions.runTools({
      model: c.MODEL, messages: user(c.TOOLS_SCRIPT), tools: [tool], stream: true,
    });
    c.equal(await runner.finalContent(), c.SAID);
  },
  async stream() {
    let text = "", usage;
    const stream = await client.chat.completions.create({
      model: c.MODEL, messages: user(c.STREAM_SCRIPT), stream: true,
      stream_options: { include_usage: true },
    });
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    c.equal(text, c.STREAM_SCRIPT.slice(5));
    if (!(usage.completion_tokens > 5)) throw new Error("no usage");
  },
  async structured() {
    const answer = await client.chat.completions.parse({
      model: c.MODEL, messages: user(c.PERSON_SCRIPT),
      response_format: zodResponseFormat(Person, "person"),
    });
    c.equal(answer.choices[0].message.parsed, c.ADA);
  },
  async image() {
    const parts = [
      { type: "text", text: "@say Red." }, { type: "image_url", image_url: { url: c.PNG_URL } },
    ];
    const answer = await client.chat.completions.create({ model: c.MODEL, messages: user(parts) });
    c.equal(answer.choices[0].message.content, "Red.");
  },
  async error() {
    try {
      await client.chat.completions.create({ model: "other", messages: user("x") });
    } catch (error) {
      if (!(error instanceof OpenAI.NotFoundError)) throw error;
      return;
    }
    throw new Error("no error");
  },
  async "Responses: stream, models"() {
    const stream = client.responses.stream({ model: c.MODEL, input: c.STREAM_SCRIPT });
    c.equal((await stream.finalResponse()).output_text, c.STREAM_SCRIPT.slice(5));
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    c.equal(names, [c.MODEL]);
  },
});
