// The settings and the theme of the page, which the browser keeps, and what settings ask for.

import { $ } from "./dom.js";

const KEPT = ["system", "temperature", "top_p", "top_k", "max_tokens", "seed", "tools", "schema", "effort", "model"];

export function restoreSettings() {
  const kept = JSON.parse(localStorage.getItem("settings") ?? "{}");
  for (const id of KEPT) {
    const isChoice = $(id).tagName === "SELECT";
    const known = !isChoice || [...$(id).options].some((option) => option.value === kept[id]);
    if (kept[id] !== undefined && known) $(id).value = kept[id];
    $(id).addEventListener("change", keepSettings);
  }
}

function keepSettings() {
  const kept = Object.fromEntries(KEPT.map((id) => [id, $(id).value]));
  localStorage.setItem("settings", JSON.stringify(kept));
}

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
$("theme").onclick = () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
};

// The fields of a request that the settings give. Throws an Error for a field that is not JSON.
export function settings() {
  const body = { model: $("model").value };
  for (const id of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if ($(id).value !== "") body[id] = Number($(id).value);
  }
  if (!$("effort-label").hidden) body.reasoning_effort = $("effort").value;
  if (!$("tools-label").hidden && $("tools").value.trim()) body.tools = typed("tools", "The tools are");
  if ($("schema").value.trim()) {
    const schema = { name: "answer", schema: typed("schema", "The schema is"), strict: true };
    body.response_format = { type: "json_schema", json_schema: schema };
  }
  return body;
}

function typed(id, what) {
  try {
    return JSON.parse($(id).value);
  } catch (error) {
    throw new Error(`${what} not valid JSON: ${error.message}`);
  }
}
