// The chat page: one conversation, streamed. Text from the model or the user is only ever put into
// text nodes, never parsed as HTML.

import { element, markdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const log = $("log");
let turns = []; // messages as the API wants them
let images = []; // data URLs waiting to be sent
let running = null; // AbortController of the answer in progress
let model = "";

// --- setup ------------------------------------------------------------------------------------

async function start() {
  const health = await (await fetch("health")).json();
  model = health.models[0];
  $("model").textContent = `${model} · context ${health.max_model_len}`;
  if (health.reasoning_efforts.length > 1) {
    for (const effort of health.reasoning_efforts) $("effort").append(new Option(effort));
    $("effort-label").hidden = false;
  }
  $("attach").hidden = !health.images;
  $("tools-label").hidden = !health.tools;
  if (!health.ready) status("The server is not ready.", true);
}

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
$("theme").onclick = () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
};

function toggleSettings() {
  const hidden = ($("settings").hidden = !$("settings").hidden);
  $("settings-toggle").setAttribute("aria-expanded", String(!hidden));
}
$("settings-toggle").onclick = toggleSettings;

function status(text, isError = false) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}

// --- request ----------------------------------------------------------------------------------

function settings() {
  const body = {};
  for (const id of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if ($(id).value !== "") body[id] = Number($(id).value);
  }
  if (!$("effort-label").hidden) body.reasoning_effort = $("effort").value;
  if (!$("tools-label").hidden && $("tools").value.trim()) {
    try {
      body.tools = JSON.parse($("tools").value);
    } catch (error) {
      throw new Error(`The tools are not valid JSON: ${error.message}`);
    }
  }
  return body;
}

async function* chunks(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) {
    const problem = await response.json().catch(() => null);
    throw new Error(problem?.error?.message ?? `Status ${response.status}`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection was lost.");
    buffer += value;
    const frames = buffer.split("\n\n");
    buffer = frames.pop();
    for (const frame of frames) {
      const data = frame.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function answer() {
  const view = answerView();
  const message = { role: "assistant", content: "" };
  const calls = [];
  let usage = null;
  let reason = null;
  let first = 0;
  const begun = performance.now();
  running = new AbortController();
  setRunning(true);
  try {
    const system = $("system").value.trim();
    const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
    for await (const chunk of chunks({ model, messages, ...settings() }, running.signal)) {
      usage = chunk.usage ?? usage;
      for (const { delta, finish_reason } of chunk.choices) {
        reason = finish_reason ?? reason;
        if (delta.content || delta.reasoning_content || delta.tool_calls) {
          first ||= performance.now();
        }
        if (delta.reasoning_content) {
          message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
        }
        if (delta.content) message.content += delta.content;
        for (const call of delta.tool_calls ?? []) {
          calls[call.index] ??= { id: call.id, type: "function", function: { name: call.function.name, arguments: "" } };
          calls[call.index].function.arguments += call.function.arguments ?? "";
        }
      }
      view.show(message, calls);
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else view.fail(error.message);
  }
  view.flush();
  running = null;
  setRunning(false);
  $("input").focus();
  view.meta(usage, reason, first - begun, performance.now() - first);
  if (reason === "tool_calls") {
    message.tool_calls = calls;
    if (!message.content) delete message.content;
    turns.push(message);
    view.askResults(calls);
  } else if (message.content || message.reasoning_content) {
    turns.push(message);
  }
}

function setRunning(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  status(is ? "…" : "");
}

// --- views ------------------------------------------------------------------------------------

function userView(text, pictures) {
  const article = element("article", "user");
  for (const url of pictures) {
    const image = element("img");
    image.src = url;
    image.alt = "sent image";
    article.append(image);
  }
  article.append(element("div", "text", text));
  log.append(article);
  log.scrollTop = log.scrollHeight;
}

function answerView() {
  const article = element("article", "assistant");
  const thought = element("details", "thought");
  const summary = element("summary", "", "Thinking…");
  const thoughtText = element("div");
  thought.append(summary, thoughtText);
  const body = element("div", "text");
  const callBox = element("div");
  const meta = element("div", "meta");
  article.append(body, callBox, meta);
  log.append(article);
  let frame = 0;
  let latest = [{ content: "" }, []];
  let drawn = "";
  function draw() {
    frame = 0;
    const [message, calls] = latest;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    if (message.reasoning_content) {
      if (!thought.isConnected) article.prepend(thought);
      thoughtText.textContent = message.reasoning_content;
      if (message.content || calls.length) summary.textContent = "Thought";
    }
    if (message.content !== drawn) body.replaceChildren(...markdown(message.content));
    drawn = message.content;
    callBox.replaceChildren(...calls.map(callView));
    if (atEnd) log.scrollTop = log.scrollHeight;
  }
  return {
    // Once a frame of the screen, however many chunks have come.
    show(message, calls) {
      latest = [message, calls];
      frame ||= requestAnimationFrame(draw);
    },
    flush() {
      if (frame) cancelAnimationFrame(frame);
      draw();
    },
    fail(text) {
      article.append(element("p", "error", text));
    },
    meta(usage, reason, firstMs, restMs) {
      if (summary.textContent === "Thinking…") summary.textContent = "Thought";
      const parts = [];
      if (usage) {
        const { completion_tokens: made, prompt_tokens: read } = usage;
        const cached = usage.prompt_tokens_details.cached_tokens;
        const thought = usage.completion_tokens_details.reasoning_tokens;
        parts.push(`${read} in (${cached} cached), ${made} out${thought ? ` (${thought} thought)` : ""}`);
        if (made > 1 && restMs > 0) parts.push(`first after ${(firstMs / 1000).toFixed(2)} s`, `${((made - 1) / (restMs / 1000)).toFixed(1)} tokens/s`);
      }
      if (reason && reason !== "stop") parts.push(reason.replace("_", " "));
      meta.replaceChildren(element("span", "", parts.join(" · ")));
      const again = element("button", "again", "Again");
      again.type = "button";
      again.title = "Answer once more (Ctrl+Shift+R)";
      again.onclick = regenerate;
      const copy = element("button", "", "Copy");
      copy.type = "button";
      copy.onclick = () => navigator.clipboard.writeText(drawn);
      for (const old of log.querySelectorAll("button.again")) old.remove();
      meta.append(again, copy);
    },
    askResults(calls) {
      const form = element("form", "call");
      const inputs = calls.map((call) => {
        const input = element("input");
        input.placeholder = `Result of ${call.function.name}`;
        form.append(input);
        return input;
      });
      const send = element("button", "", "Send results");
      form.append(send);
      form.onsubmit = (event) => {
        event.preventDefault();
        form.remove();
        calls.forEach((call, index) => turns.push({ role: "tool", tool_call_id: call.id, content: inputs[index].value }));
        answer();
      };
      callBox.append(form);
      inputs[0].focus();
      log.scrollTop = log.scrollHeight;
    },
  };
}

function callView(call) {
  const box = element("div", "call");
  box.append(element("strong", "", call.function.name), element("pre", "", pretty(call.function.arguments)));
  return box;
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

// --- actions ----------------------------------------------------------------------------------

function send() {
  const text = $("input").value.trim();
  if (running || (!text && !images.length)) return;
  const content = images.length
    ? [...images.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text }]
    : text;
  turns.push({ role: "user", content });
  userView(text, images);
  images = [];
  showImages();
  $("input").value = "";
  grow();
  answer();
}

function regenerate() {
  if (running) return;
  while (turns.length && turns.at(-1).role !== "user") turns.pop();
  if (!turns.length) return;
  while (log.lastElementChild && !log.lastElementChild.classList.contains("user")) log.lastElementChild.remove();
  answer();
}

function renew() {
  running?.abort();
  turns = [];
  images = [];
  showImages();
  log.replaceChildren();
  $("input").focus();
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

async function addImages(files) {
  if ($("attach").hidden) {
    if (files.length) status("This model takes no images.", true);
    return;
  }
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    const done = new Promise((resolve) => (reader.onload = resolve));
    reader.readAsDataURL(file);
    await done;
    images.push(reader.result);
  }
  showImages();
}

function showImages() {
  $("images").replaceChildren(
    ...images.map((url, index) => {
      const image = element("img");
      image.src = url;
      image.title = "Click to remove";
      image.onclick = () => {
        images.splice(index, 1);
        showImages();
      };
      return image;
    }),
  );
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("stop").onclick = () => running?.abort();
$("new").onclick = renew;
$("input").oninput = grow;
$("input").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
};
$("file").onchange = () => addImages($("file").files);
document.onpaste = (event) => addImages(event.clipboardData.files);
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("drop");
};
document.ondragleave = () => document.body.classList.remove("drop");
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("drop");
  addImages(event.dataTransfer.files);
};
document.onkeydown = (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.ctrlKey && event.key === ",") toggleSettings();
  if (event.ctrlKey && event.shiftKey && event.key === "O") renew();
  if (event.ctrlKey && event.shiftKey && event.key === "R") {
    event.preventDefault();
    regenerate();
  }
};

start().catch((error) => status(`The server does not answer: ${error.message}`, true));
