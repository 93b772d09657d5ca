// Small helpers of the page.

export const $ = (id) => document.getElementById(id);

export function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

export function button(text, title, action, className = "") {
  const node = element("button", className, text);
  node.type = "button";
  node.title = title;
  if (!/[a-z]/i.test(text)) node.setAttribute("aria-label", title);
  node.onclick = action;
  return node;
}

// Copying works on plain http, too, where browsers have no clipboard interface.
export async function copy(text, from) {
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    const area = element("textarea", "offscreen");
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    from.focus();
  }
  const before = from.textContent;
  from.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => (from.textContent = before), 1500);
}

// HTML that the server has made of Markdown; it holds listed tags only.
export function fromHtml(html) {
  const parsed = new DOMParser().parseFromString(html, "text/html");
  for (const node of parsed.querySelectorAll("p, li, h1, h2, h3, h4, h5, h6, th, td, blockquote")) {
    node.dir = "auto";
  }
  for (const box of parsed.querySelectorAll("input")) {
    box.setAttribute("aria-label", box.closest("li")?.textContent.trim() || "task");
  }
  for (const link of parsed.querySelectorAll("a")) link.target = "_blank";
  for (const box of parsed.querySelectorAll(".code")) {
    const text = box.querySelector("pre").textContent;
    const node = button("Copy", "Copy this code", () => copy(text, node));
    box.querySelector(".bar").append(node);
  }
  for (const pre of parsed.querySelectorAll("pre, .table")) pre.tabIndex = 0;
  return [...parsed.body.childNodes];
}

// Say something below the form.
export function status(text, isError = false) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}
