// @mistralai/mistralai, which checks every answer against its schemas.
import { Mistral } from "@mistralai/mistralai";
import { z } from "zod";
import * as c from "./cases.mjs";

const client = new Mistral({ serverURL: c.BASE, apiKey: "none" });
const user = (content) => [{ role: "user", content }];
const tools = [c.WEATHER];

await c.run({
  async tools() {
    const messages = user(c.TOOLS_SCRIPT);
    const answer = await client.chat.complete({ model: c.MODEL, messages, tools });
    const message = answer.choices[0].message;
    messages.push(message);
    for (const call of message.toolCalls) {
      messages.push({ role: "tool", toolCallId: call.id, name: "get_weather", content: "sunny" });
    }
    const last = await client.chat.complete({ model: c.MODEL, messages, tools });
    c.equal(last.choices[0].message.content, c.SAID);
  },
  async "tools, streamed"() {
    const calls = [];
    let usage;
    const stream = await client.chat.stream({ model: c.MODEL, messages: user(c.CALL), tools });
    for await (const event of stream) {
      calls.push(...(event.data.choices[0].delta.toolCalls ?? []));
      usage = event.data.usage ?? usage;
    }
    c.equal(calls.map((call) => call.function.name), ["get_weather"]);
    c.equal(JSON.parse(calls[0].function.arguments), { city: "Rome" });
    if (!(usage.completionTokens > 5)) throw new Error("no usage");
  },
  async "toolChoice any, randomSeed"() {
    const answer = await client.chat.complete({
      model: c.MODEL, messages: user(c.CALL), tools, toolChoice: "any", randomSeed: 5,
      safePrompt: false,
    });
    c.equal(answer.choices[0].message.toolCalls[0].function.name, "get_weather");
  },
  async stream() {
    let text = "";
    const stream = await client.chat.stream({ model: c.MODEL, messages: user(c.STREAM_SCRIPT) });
    for await (const event of stream) text += event.data.choices[0].delta.content ?? "";
    c.equal(text, c.STREAM_SCRIPT.slice(5));
  },
  async structured() {
    const responseFormat = z.object({ name: z.string(), age: z.number() });
    const answer = await client.chat.parse({
      model: c.MODEL, messages: user(c.PERSON_SCRIPT), responseFormat,
    });
    c.equal(answer.choices[0].message.parsed, c.ADA);
  },
  async image() {
    const parts = [
      { type: "text", text: "@say Red." }, { type: "image_url", imageUrl: c.PNG_URL },
    ];
    const answer = await client.chat.complete({ model: c.MODEL, messages: user(parts) });
    c.equal(answer.choices[0].message.content, "Red.");
  },
  async error() {
    try {
      await client.chat.complete({ model: "other", messages: user("x") });
    } catch (error) {
      c.equal(error.statusCode, 404);
      return;
    }
    throw new Error("no error");
  },
  async "thoughts, and back in the history"() {
    const messages = user(c.THOUGHT_SCRIPT);
    const answer = await client.chat.complete({
      model: c.MODEL, messages, promptMode: "reasoning",
    });
    const message = answer.choices[0].message;
    c.equal(message.content.map((part) => part.type), ["thinking", "text"]);
    messages.push(message, ...user("@say Yes."));
    const next = await client.chat.complete({ model: c.MODEL, messages });
    c.equal(next.choices[0].message.content, "Yes.");
  },
  async models() {
    const listed = await client.models.list();
    c.equal(listed.data.map((model) => model?.id), [c.MODEL]);
  },
});
