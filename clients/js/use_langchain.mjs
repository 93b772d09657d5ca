// @langchain/openai or @langchain/mistralai.
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { z } from "zod";
import * as c from "./cases.mjs";

const kind = process.env.LANGCHAIN_KIND;

async function chatOf(model) {
  if (kind === "mistralai") {
    const { ChatMistralAI } = await import("@langchain/mistralai");
    return new ChatMistralAI({ model, serverURL: c.BASE, apiKey: "none", maxRetries: 0 });
  }
  const { ChatOpenAI } = await import("@langchain/openai");
  return new ChatOpenAI({
    model, apiKey: "none", maxRetries: 0, configuration: { baseURL: c.V1 },
  });
}

const chat = await chatOf(c.MODEL);
const weather = tool(async ({ city }) => (c.equal(city, "Rome"), "sunny"), {
  name: "get_weather", description: "The weather.", schema: z.object({ city: z.string() }),
});
const Person = z.object({ name: z.string(), age: z.number() });

await c.run({
  async tools() {
    const bound = chat.bindTools([weather]);
    const messages = [new HumanMessage(c.TOOLS_SCRIPT)];
    const answer = await bound.invoke(messages);
    messages.push(answer);
    for (const call of answer.tool_calls) {
      messages.push(new ToolMessage({ content: await weather.invoke(call.args), tool_call_id: call.id }));
    }
    c.equal((await bound.invoke(messages)).text, c.SAID);
  },
  async "tools, streamed"() {
    let whole;
    for await (const chunk of await chat.bindTools([weather]).stream(c.CALL)) {
      whole = whole ? whole.concat(chunk) : chunk;
    }
    c.equal(whole.tool_calls.map((call) => [call.name, call.args]), [["get_weather", { city: "Rome" }]]);
  },
  async stream() {
    let text = "";
    for await (const chunk of await chat.stream(c.STREAM_SCRIPT)) text += chunk.text;
    c.equal(text, c.STREAM_SCRIPT.slice(5));
  },
  async structured() {
    const script = kind === "mistralai" ? "@call extract " + c.PERSON : c.PERSON_SCRIPT;
    c.equal(await chat.withStructuredOutput(Person).invoke(script), c.ADA);
  },
  async image() {
    const content = [
      { type: "text", text: "@say Red." }, { type: "image_url", image_url: { url: c.PNG_URL } },
    ];
    c.equal((await chat.invoke([new HumanMessage({ content })])).text, "Red.");
  },
  async error() {
    try {
      await (await chatOf("other")).invoke("x");
    } catch {
      return;
    }
    throw new Error("no error");
  },
});
