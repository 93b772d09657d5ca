// What turns of a conversation say: to the server, and to the reader below an answer.

// Turns as the API wants them. A call that nobody gave a result gets an empty one.
export function messages(turns, system) {
  const made = [];
  if (system) made.push({ role: "system", content: system });
  let waiting = [];
  const close = () => {
    made.push(...waiting.map((call) => ({ role: "tool", tool_call_id: call.id, content: "" })));
    waiting = [];
  };
  for (const turn of turns) {
    if (turn.role === "tool") {
      made.push({ role: "tool", tool_call_id: turn.tool_call_id, content: turn.content });
      waiting = waiting.filter((call) => call.id !== turn.tool_call_id);
      continue;
    }
    close();
    if (turn.role === "user") {
      const pictures = turn.images.map((url) => ({ type: "image_url", image_url: { url } }));
      const content = pictures.length ? [...pictures, { type: "text", text: turn.text }] : turn.text;
      made.push({ role: "user", content });
      continue;
    }
    const { content, thought, calls } = turn.answers[turn.chosen];
    const message = { role: "assistant" };
    if (thought) message.reasoning_content = thought;
    if (content || !calls.length) message.content = content;
    if (calls.length) message.tool_calls = calls;
    made.push(message);
    waiting = [...calls];
  }
  close();
  return made;
}

// How many tokens an answer read and made, how fast, and why it ended.
export function metaText(usage, reason, firstMs, restMs) {
  const parts = [];
  if (usage) {
    const { completion_tokens: made, prompt_tokens: read } = usage;
    const cached = usage.prompt_tokens_details.cached_tokens;
    const thought = usage.completion_tokens_details.reasoning_tokens;
    parts.push(`${read} in (${cached} cached), ${made} out${thought ? ` (${thought} thought)` : ""}`);
    if (made > 1 && restMs > 0) {
      const speed = ((made - 1) / (restMs / 1000)).toFixed(1);
      parts.push(`first after ${(firstMs / 1000).toFixed(2)} s`, `${speed} tokens/s`);
    }
  }
  if (reason && reason !== "stop") parts.push(reason.replace("_", " "));
  return parts.join(" · ");
}
