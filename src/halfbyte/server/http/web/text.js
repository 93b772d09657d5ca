// Text that grows: what is finished is drawn as Markdown, what is being written is appended.
//
// Nothing that stands is replaced while somebody has marked a part of it, so that one can copy from
// an answer that is still coming, and a screen reader hears each word once.

import { element, fromHtml } from "./dom.js";
import { render } from "./api.js";

// Where a finished block ends: an empty line outside of code and display formulas.
export function splitBlocks(text) {
  const blocks = [];
  let start = 0;
  let position = 0;
  let fence = null;
  for (const line of text.split("\n")) {
    const next = position + line.length + 1;
    const mark = /^\s{0,3}(`{3,}|~{3,})/.exec(line)?.[1];
    if (fence === null && mark) fence = mark;
    else if (fence !== null && mark && mark[0] === fence[0] && mark.length >= fence.length) {
      if (line.trim() === mark) fence = null;
    } else if (fence === null && line.trim() === "" && next <= text.length) {
      const block = text.slice(start, next);
      // What is indented after an empty line belongs to the list before it.
      const following = text.slice(next, next + 2);
      if (block.trim() && following !== "" && !/^[ \t]/.test(following) && !isOpen(block)) {
        blocks.push(block);
        start = next;
      }
    }
    position = next;
  }
  return { blocks, rest: text.slice(start) };
}

function isOpen(block) {
  const isList = /^\s{0,3}([-*+]|\d{1,9}[.)])\s/.test(block);
  const formulas = (block.match(/\$\$/g) ?? []).length % 2 === 1;
  const brackets = block.lastIndexOf("\\[") > block.lastIndexOf("\\]");
  return isList || formulas || brackets;
}

export class GrowingText {
  constructor(className) {
    this.node = element("div", className);
    this.tail = element("div", "tail");
    this.tail.dir = "auto";
    this.node.append(this.tail);
    this.text = "";
    this.drawnTo = 0; // characters that stand as Markdown
    this.shownTo = 0; // characters that stand at all
    this.ended = false;
    this.work = Promise.resolve();
    this.onSelection = () => this.draw();
  }

  append(more) {
    this.text += more;
    this.tail.append(more);
    this.shownTo = this.text.length;
    if (more.includes("\n")) this.draw();
  }

  // Draw everything; resolves when it stands, unless a marked part makes it wait.
  async end() {
    this.ended = true;
    this.draw();
    await this.work;
  }

  isMarked() {
    const marked = document.getSelection();
    return marked && !marked.isCollapsed && marked.containsNode(this.tail, true);
  }

  draw() {
    this.work = this.work.then(() => this.drawMore());
  }

  async drawMore() {
    const waiting = this.text.slice(this.drawnTo);
    const { blocks, rest } = splitBlocks(waiting);
    if (this.ended && rest) blocks.push(rest);
    for (const block of blocks) {
      const html = await render(block);
      if (this.isMarked()) {
        document.addEventListener("selectionchange", this.onSelection, { once: true });
        return;
      }
      if (html === null) return;
      this.tail.before(...fromHtml(html));
      this.drawnTo += block.length;
      this.tail.replaceChildren(this.text.slice(this.drawnTo));
    }
  }
}
