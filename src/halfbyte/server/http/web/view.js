// What stands in the log: articles of the user and of the assistant. Text from the model reaches the
// page through `GrowingText`, everything else through text nodes.

import { button, copy, element, fromHtml, $ } from "./dom.js";
import { GrowingText } from "./text.js";

const log = $("log");
const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
const toEnd = () => (log.scrollTop = log.scrollHeight);

export function userView(turn, onEdit) {
  const article = element("article", "user");
  article.setAttribute("aria-label", "You");
  for (const url of turn.images) {
    const image = element("img");
    image.src = url;
    image.alt = "sent image";
    article.append(image);
  }
  const text = element("div", "text", turn.text);
  text.dir = "auto";
  const actions = element("div", "meta");
  const edit = button("Edit", "Change this message and send it again", () => {
    const area = element("textarea");
    area.value = turn.text;
    area.dir = "auto";
    area.setAttribute("aria-label", "Changed message");
    const box = element("form", "edit");
    const send = element("button", "", "Send again");
    const cancel = button("Cancel", "Leave it as it is", () => {
      box.replaceWith(text);
      edit.focus();
    });
    box.append(area, send, cancel);
    box.onsubmit = (event) => {
      event.preventDefault();
      onEdit(area.value);
    };
    text.replaceWith(box);
    area.focus();
  });
  actions.append(edit, copyButton(() => turn.text, "Copy this message"));
  article.append(text, actions);
  log.append(article);
  toEnd();
  return article;
}

function copyButton(text, title) {
  const node = button("Copy", title, () => copy(text(), node));
  return node;
}

// One answer, growing or kept. `actions` are what its buttons do.
export class AnswerView {
  constructor(actions) {
    this.actions = actions;
    this.article = element("article", "assistant");
    this.article.setAttribute("aria-label", "Answer");
    this.article.setAttribute("aria-live", "polite");
    this.problem = element("p", "error");
    this.problem.setAttribute("role", "alert");
    this.box = element("div", "versions");
    this.meta = element("div", "meta");
    this.article.append(this.box, this.meta);
    log.append(this.article);
  }

  begin() {
    const version = element("div", "version");
    this.thought = new GrowingText("");
    this.details = element("details", "thought");
    this.summary = element("summary", "", "Thinking…");
    this.details.append(this.summary, this.thought.node);
    this.content = new GrowingText("text");
    this.calls = element("div");
    version.append(this.content.node, this.calls);
    this.box.replaceChildren(version);
    this.meta.replaceChildren();
    // A screen reader waits until the answer stands.
    this.article.setAttribute("aria-busy", "true");
    toEnd();
  }

  add(delta, calls) {
    const follow = isAtEnd();
    if (delta.reasoning_content) {
      if (!this.details.isConnected) this.content.node.before(this.details);
      this.thought.append(delta.reasoning_content);
    }
    if (delta.content) this.content.append(delta.content);
    if (delta.content || delta.tool_calls) this.summary.textContent = "Thought";
    if (delta.tool_calls) this.calls.replaceChildren(...calls.map(callView));
    if (follow) toEnd();
  }

  async end() {
    const follow = isAtEnd();
    this.summary.textContent = "Thought";
    await Promise.all([this.thought.end(), this.content.end()]);
    this.article.removeAttribute("aria-busy");
    if (follow) toEnd();
  }

  fail(message, retry) {
    this.problem.textContent = message;
    if (retry) this.problem.append(" ", button("Try again", "Send the same once more", retry));
    this.article.prepend(this.problem);
    this.article.removeAttribute("aria-busy");
    this.problem.scrollIntoView({ block: "nearest" });
  }

  // A kept turn: the chosen version, or all of them side by side.
  show(turn, isLast) {
    const shown = turn.beside ? turn.answers : [turn.answers[turn.chosen]];
    this.box.className = turn.beside ? "versions beside" : "versions";
    this.box.replaceChildren(...shown.map(versionView));
    this.bar(turn, isLast);
  }

  bar(turn, isLast) {
    const answer = turn.answers[turn.chosen];
    const count = turn.answers.length;
    const parts = [element("span", "", answer.meta)];
    if (count > 1) {
      const go = (step) => this.actions.choose((turn.chosen + step + count) % count);
      const place = element("span", "", `${turn.chosen + 1} of ${count}`);
      parts.push(button("‹", "Former version", () => go(-1)), place, button("›", "Next version", () => go(1)));
      const name = turn.beside ? "One at a time" : "Side by side";
      parts.push(button(name, "Show the versions of this answer", () => this.actions.beside(!turn.beside)));
    }
    if (isLast) parts.push(button("Again", "Answer once more (Ctrl+Shift+R)", this.actions.again, "again"));
    parts.push(copyButton(() => answer.content, "Copy this answer as Markdown"));
    this.meta.replaceChildren(...parts);
  }

  askResults(calls, onResults) {
    const form = element("form", "call");
    const inputs = calls.map((call) => {
      const label = element("label", "", `Result of ${call.function.name}`);
      const input = element("input");
      input.dir = "auto";
      label.append(input);
      form.append(label);
      return input;
    });
    form.append(element("button", "", "Send results"));
    form.onsubmit = (event) => {
      event.preventDefault();
      form.remove();
      onResults(inputs.map((input) => input.value));
    };
    this.box.append(form);
    inputs[0].focus();
    toEnd();
  }
}

function versionView(answer) {
  const version = element("div", "version");
  if (answer.thought) {
    const thought = new GrowingText("");
    const details = element("details", "thought");
    details.append(element("summary", "", "Thought"), thought.node);
    thought.append(answer.thought);
    thought.end();
    version.append(details);
  }
  const content = new GrowingText("text");
  content.append(answer.content);
  content.end();
  version.append(content.node, ...answer.calls.map(callView));
  return version;
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
