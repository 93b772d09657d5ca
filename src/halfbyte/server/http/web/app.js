// The chat page: conversations that the browser keeps, streamed answers.

import { chunks, health, setKey } from "./api.js";
import { $, button, element, status } from "./dom.js";
import { restoreSettings, settings } from "./settings.js";
import * as store from "./store.js";
import { messages, metaText } from "./turns.js";
import { AnswerView, userView } from "./view.js";

const log = $("log");
let conversation = store.fresh();
let images = []; // data URLs waiting to be sent
let running = null; // AbortController of the answer in progress
let changes = 0; // how often another conversation was gone to
let imagesTaken = false;

// --- setup ------------------------------------------------------------------------------------

async function start() {
  const told = await health();
  $("about").textContent = `${told.models[0]} · context ${told.max_model_len}`;
  for (const name of told.models) $("model").append(new Option(name));
  $("model-label").hidden = told.models.length < 2;
  for (const effort of told.reasoning_efforts) $("effort").append(new Option(effort));
  $("effort-label").hidden = told.reasoning_efforts.length < 2;
  for (const [name, value] of Object.entries(told.sampling)) {
    if ($(name)) $(name).placeholder = `${value}`;
  }
  imagesTaken = told.images;
  $("attach").hidden = !told.images;
  $("tools-label").hidden = !told.tools;
  restoreSettings();
  const last = (await store.list())[0];
  if (last && localStorage.getItem("open") === last.id) await openConversation(last.id);
  await showList();
  if (!told.ready) status("The server is not ready.", true);
}

function toggle(id) {
  const hidden = ($(id).hidden = !$(id).hidden);
  $(`${id}-toggle`).setAttribute("aria-expanded", String(!hidden));
}
$("settings-toggle").onclick = () => toggle("settings");
$("list-toggle").onclick = () => toggle("list");
$("key").onchange = () => setKey($("key").value);

// --- conversations ------------------------------------------------------------------------------

async function keep() {
  if (!conversation.turns.length) return;
  conversation.updated = Date.now();
  conversation.title ||= (conversation.turns[0].text ?? "").slice(0, 60) || "Picture";
  try {
    await store.save(conversation);
    localStorage.setItem("open", conversation.id);
  } catch (error) {
    status(`The browser does not keep this conversation: ${error.message}`, true);
  }
  await showList();
}

async function showList() {
  const found = await store.list();
  // An answer that ends while a name is typed draws the list again: the field stays.
  const typed = $("conversations").querySelector("form")?.closest("li");
  const items = found.map(({ id, title }) => {
    if (typed?.dataset.id === id) return typed;
    const item = element("li");
    item.dataset.id = id;
    const open = button(title, "Open this conversation", () => openConversation(id), "open");
    open.dir = "auto";
    if (id === conversation.id) open.setAttribute("aria-current", "true");
    const rename = button("Rename", `Rename ${title}`, () => renameIn(item, id, title));
    const remove = button("Delete", `Delete ${title}`, async () => {
      if (remove.textContent === "Delete") {
        remove.textContent = "Really?";
        return;
      }
      await store.remove(id);
      if (id === conversation.id) renew();
      await showList();
    });
    item.append(open, rename, remove);
    return item;
  });
  $("conversations").replaceChildren(...items);
}

function renameIn(item, id, title) {
  const form = element("form");
  const input = element("input");
  input.value = title;
  input.setAttribute("aria-label", "Name of the conversation");
  form.append(input, element("button", "", "Save"));
  form.onsubmit = async (event) => {
    event.preventDefault();
    const kept = await store.load(id);
    kept.title = input.value.trim() || title;
    await store.save(kept);
    if (id === conversation.id) conversation.title = kept.title;
    form.remove();
    await showList();
  };
  item.replaceChildren(form);
  input.select();
}

async function openConversation(id) {
  running?.abort();
  const change = ++changes;
  const loaded = (await store.load(id)) ?? store.fresh();
  // Whoever went elsewhere while this one loaded stays there.
  if (change !== changes) return;
  conversation = loaded;
  localStorage.setItem("open", conversation.id);
  redraw();
  await showList();
}

function renew() {
  running?.abort();
  changes += 1;
  conversation = store.fresh();
  localStorage.removeItem("open");
  images = [];
  showImages();
  redraw();
  showList();
  $("input").focus();
}

function redraw() {
  log.replaceChildren();
  const turns = conversation.turns;
  const lastAnswer = turns.findLastIndex((turn) => turn.role === "assistant");
  turns.forEach((turn, index) => {
    if (turn.role === "user") userView(turn, (text) => resend(index, text));
    if (turn.role !== "assistant") return;
    const view = new AnswerView(actionsOf(turn));
    view.show(turn, index === lastAnswer);
    if (index === turns.length - 1) askResults(view, turn);
  });
  log.scrollTop = log.scrollHeight;
}

function actionsOf(turn) {
  return {
    again: regenerate,
    choose: (index) => {
      turn.chosen = index;
      turn.beside = false;
      redraw();
      keep();
    },
    beside: (value) => {
      turn.beside = value;
      redraw();
    },
  };
}

// --- request ----------------------------------------------------------------------------------

// One answer. `turn` is the one that it is a further version of.
async function answer(turn = null) {
  const view = new AnswerView({});
  view.begin();
  const made = { content: "", thought: "", calls: [], meta: "" };
  const asked = conversation;
  let usage = null;
  let reason = null;
  let first = 0;
  let problem = null;
  const begun = performance.now();
  const control = (running = new AbortController());
  setRunning(true);
  try {
    const body = { ...settings(), messages: messages(conversation.turns, $("system").value.trim()) };
    for await (const chunk of chunks(body, control.signal)) {
      usage = chunk.usage ?? usage;
      for (const { delta, finish_reason } of chunk.choices) {
        reason = finish_reason ?? reason;
        if (delta.content || delta.reasoning_content || delta.tool_calls) first ||= performance.now();
        made.thought += delta.reasoning_content ?? "";
        made.content += delta.content ?? "";
        for (const call of delta.tool_calls ?? []) {
          made.calls[call.index] ??= { id: call.id, type: "function", function: { name: call.function.name, arguments: "" } };
          made.calls[call.index].function.arguments += call.function.arguments ?? "";
        }
        view.add(delta, made.calls);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else problem = error.message;
  }
  running = null;
  setRunning(false);
  made.meta = metaText(usage, reason, first - begun, performance.now() - first);
  // Calls that were cut off cannot be sent back.
  if (reason !== "tool_calls") made.calls = [];
  const isEmpty = !made.content && !made.thought && !made.calls.length;
  if (asked !== conversation) {
    await keepLeft(asked, turn, isEmpty ? [] : [made]);
    return;
  }
  await view.end();
  if (isEmpty && problem !== null) {
    if (turn !== null) {
      conversation.turns.push(turn);
      redraw();
      status(problem, true);
    } else {
      withdraw(view, problem);
    }
    return;
  }
  if (turn === null) turn = { role: "assistant", answers: [], chosen: 0 };
  turn.answers.push(made);
  turn.chosen = turn.answers.length - 1;
  conversation.turns.push(turn);
  for (const old of log.querySelectorAll("button.again")) old.remove();
  view.actions = actionsOf(turn);
  view.bar(turn, true);
  if (problem !== null) view.fail(problem);
  askResults(view, turn);
  status(problem === null ? "" : problem, problem !== null);
  await keep();
}

// Somebody went to another conversation in the middle of an answer: what had come of it stays.
async function keepLeft(asked, turn, made) {
  turn ??= { role: "assistant", answers: [], chosen: 0 };
  turn.answers.push(...made);
  turn.chosen = turn.answers.length - 1;
  // A conversation that was deleted meanwhile does not come back.
  if (!turn.answers.length || !(await store.load(asked.id))) return;
  await store.save({ ...asked, turns: [...asked.turns, turn] });
}

// What was refused leaves the conversation; its text goes back to where it can be changed.
function withdraw(view, problem) {
  const turns = conversation.turns;
  const refused = turns.at(-1)?.role === "user" ? turns.pop() : null;
  if (turns.length) keep();
  else store.remove(conversation.id).then(showList);
  view.fail(problem, refused === null ? null : () => send());
  status(problem, true);
  if (refused !== null && !$("input").value) {
    $("input").value = refused.text;
    images = refused.images;
    showImages();
    grow();
  }
}

function askResults(view, turn) {
  const { calls } = turn.answers[turn.chosen];
  if (!calls.length || conversation.turns.at(-1) !== turn) return;
  view.askResults(calls, (results) => {
    calls.forEach((call, index) =>
      conversation.turns.push({ role: "tool", tool_call_id: call.id, content: results[index] }),
    );
    answer();
  });
}

function setRunning(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (is) status("Answering…");
  else if ($("status").textContent === "Answering…") status("");
}

// --- actions ----------------------------------------------------------------------------------

function send() {
  const text = $("input").value.trim();
  if (running || (!text && !images.length)) return;
  // What failed before stands no longer.
  for (const failed of log.querySelectorAll("article.assistant:has(> .error:first-child)")) {
    if (!failed.querySelector(".meta span")) {
      if (failed.previousElementSibling?.classList.contains("user")) failed.previousElementSibling.remove();
      failed.remove();
    }
  }
  // A form whose calls nobody answered: they count as answered with nothing.
  for (const form of log.querySelectorAll("form.call")) form.remove();
  const turn = { role: "user", text, images };
  conversation.turns.push(turn);
  const index = conversation.turns.length - 1;
  userView(turn, (changed) => resend(index, changed));
  images = [];
  showImages();
  $("input").value = "";
  grow();
  status("");
  // A reload in the middle of the answer leaves the question.
  keep();
  answer();
}

// A changed message goes on from its place; the conversation as it was stays in the list.
async function resend(index, text) {
  if (running || !text.trim()) return;
  const former = conversation;
  const { images: kept } = former.turns[index];
  if (former.turns.length > index + 1) {
    await store.save({ ...former, title: `${former.title} (before the change)` });
  } else {
    await store.remove(former.id);
  }
  conversation = { ...store.fresh(), title: former.title, turns: former.turns.slice(0, index) };
  conversation.turns.push({ role: "user", text: text.trim(), images: kept });
  redraw();
  await keep();
  answer();
}

function regenerate() {
  if (running) return;
  const turns = conversation.turns;
  while (turns.length && turns.at(-1).role === "tool") turns.pop();
  if (turns.at(-1)?.role !== "assistant") {
    if (turns.length) answer();
    return;
  }
  const turn = turns.pop();
  turn.beside = false;
  redraw();
  answer(turn);
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

async function addImages(files) {
  const pictures = [...files].filter((file) => file.type.startsWith("image/"));
  if (pictures.length && !imagesTaken) {
    status("This model takes no images.", true);
    return;
  }
  for (const file of pictures) {
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
      const node = button("", `Remove image ${index + 1}`, () => {
        images = images.filter((_, other) => other !== index);
        showImages();
        $("input").focus();
      }, "thumbnail");
      const image = element("img");
      image.src = url;
      image.alt = "";
      node.append(image);
      return node;
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
$("attach").onclick = () => $("file").click();
$("file").onchange = async () => {
  await addImages($("file").files);
  $("file").value = "";
};
$("export").onclick = async () => {
  const blob = new Blob([store.exportText(await store.list())], { type: "application/json" });
  const link = element("a");
  link.href = URL.createObjectURL(blob);
  link.download = "conversations.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
};
$("import").onclick = () => $("import-file").click();
$("import-file").onchange = async () => {
  const [file] = $("import-file").files;
  if (!file) return;
  try {
    const found = store.readExport(await file.text());
    for (const one of found) await store.save(one);
    status(`${found.length} conversations imported.`);
  } catch (error) {
    status(error.message, true);
  }
  $("import-file").value = "";
  await showList();
};
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
  if (event.ctrlKey && event.key === ",") toggle("settings");
  if (event.ctrlKey && event.shiftKey && event.key === "O") renew();
  if (event.ctrlKey && event.shiftKey && event.key === "R") {
    event.preventDefault();
    regenerate();
  }
};

start().catch((error) => status(`The server does not answer: ${error.message}`, true));
