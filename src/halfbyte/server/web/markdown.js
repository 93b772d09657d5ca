// The Markdown that models write, as DOM nodes: headings, lists, tables, quotes, code, rules, bold,
// emphasis, links. Text only ever becomes text nodes; whatever is not understood stays as written.

export function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const FENCE = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const SPAN = /(`+)(.+?)\1|\*\*(?=\S)(.+?)\*\*|(?<![\w*])\*(?=[^\s*])([^*\n]+?)\*(?![\w*])|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/gs;

export function markdown(text) {
  return blocks(text.split("\n"), 0);
}

function blocks(lines, depth) {
  const nodes = [];
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) nodes.push(withSpans("p", paragraph.join("\n")));
    paragraph = [];
  };
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const fence = line.match(FENCE);
    const heading = line.match(HEADING);
    // A few levels are plenty; deeper nesting is shown as it was written.
    const mayNest = depth < 8;
    if (fence) {
      flush();
      const end = lines.findIndex((other, at) => at > i && other.trim().startsWith(fence[1]));
      nodes.push(codeBlock(lines.slice(i + 1, end < 0 ? undefined : end).join("\n"), fence[2]));
      i = end < 0 ? lines.length : end + 1;
    } else if (heading) {
      flush();
      nodes.push(withSpans(`h${Math.min(heading[1].length + 2, 6)}`, heading[2]));
      i += 1;
    } else if (RULE.test(line)) {
      flush();
      nodes.push(element("hr"));
      i += 1;
    } else if (mayNest && /^\s{0,3}>/.test(line)) {
      flush();
      let end = i;
      while (end < lines.length && /^\s{0,3}>/.test(lines[end])) end += 1;
      const quote = element("blockquote");
      quote.append(...blocks(lines.slice(i, end).map((one) => one.replace(/^\s{0,3}> ?/, "")), depth + 1));
      nodes.push(quote);
      i = end;
    } else if (line.includes("|") && DIVIDER.test(lines[i + 1] ?? "") && lines[i + 1].includes("-")) {
      flush();
      let end = i + 2;
      while (end < lines.length && lines[end].includes("|")) end += 1;
      nodes.push(table(lines.slice(i, end)));
      i = end;
    } else if (mayNest && ITEM.test(line)) {
      flush();
      const end = endOfList(lines, i);
      nodes.push(list(lines.slice(i, end), depth));
      i = end;
    } else {
      if (line.trim()) paragraph.push(line);
      else flush();
      i += 1;
    }
  }
  flush();
  return nodes;
}

function endOfList(lines, start) {
  const [, indent, mark] = lines[start].match(ITEM);
  const ordered = /\d/.test(mark);
  let end = start + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const item = line.match(ITEM);
    if (item && item[1].length <= indent.length) {
      if (item[1].length < indent.length || /\d/.test(item[2]) !== ordered) break;
    } else if (!line.trim()) {
      const next = lines[end + 1];
      if (next === undefined || !(ITEM.test(next) || next.startsWith(`${indent}  `))) break;
    } else if (!item && !line.startsWith(`${indent}  `) && !lines[end - 1].trim()) break;
  }
  return end;
}

function list(lines, depth) {
  const [, indent, mark] = lines[0].match(ITEM);
  const ordered = /\d/.test(mark);
  const box = element(ordered ? "ol" : "ul");
  if (ordered) box.start = parseInt(mark, 10);
  let inner = [];
  const close = () => {
    if (!inner.length) return;
    const item = element("li");
    const content = blocks(inner, depth + 1);
    // The first line of an item is no paragraph of its own.
    if (content[0]?.tagName === "P") content.splice(0, 1, ...content[0].childNodes);
    item.append(...content);
    box.append(item);
  };
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= indent.length) {
      close();
      inner = [item[3]];
    } else {
      const space = line.match(/^\s*/)[0].length;
      inner.push(line.slice(Math.min(space, indent.length + mark.length + 1)));
    }
  }
  close();
  return box;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const box = element("div", "table");
  const grid = element("table");
  lines.forEach((line, index) => {
    if (index === 1) return;
    const row = element("tr");
    for (const cell of cells(line)) row.append(withSpans(index ? "td" : "th", cell));
    grid.append(row);
  });
  box.append(grid);
  return box;
}

function codeBlock(text, language) {
  const box = element("div", "code");
  const bar = element("div", "bar");
  const copy = element("button", "", "Copy");
  copy.type = "button";
  copy.onclick = () => navigator.clipboard.writeText(text);
  bar.append(element("span", "", language), copy);
  const pre = element("pre");
  pre.append(element("code", "", `${text}\n`));
  box.append(bar, pre);
  return box;
}

function withSpans(tag, text) {
  const node = element(tag);
  let at = 0;
  for (const match of text.matchAll(SPAN)) {
    node.append(text.slice(at, match.index));
    const [whole, , code, bold, emphasis, label, url] = match;
    if (code !== undefined) node.append(element("code", "", code));
    else if (bold !== undefined) node.append(withSpans("strong", bold));
    else if (emphasis !== undefined) node.append(withSpans("em", emphasis));
    else node.append(link(label, url));
    at = match.index + whole.length;
  }
  node.append(text.slice(at));
  return node;
}

function link(label, url) {
  const node = element("a", "", label);
  node.href = url;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  node.title = url;
  return node;
}
