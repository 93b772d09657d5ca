// Requests to the server this page came from.

let key = sessionStorage.getItem("key") ?? "";

export function setKey(value) {
  key = value.trim();
  sessionStorage.setItem("key", key);
}

export const hasKey = () => key !== "";

function headers() {
  const all = { "Content-Type": "application/json" };
  if (key) all.Authorization = `Bearer ${key}`;
  return all;
}

export async function health() {
  return (await fetch("health")).json();
}

// Markdown to HTML; null where the server does not answer, so that the text stays as it is.
export async function render(text) {
  try {
    const response = await fetch("web/render", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify({ text }),
    });
    return response.ok ? (await response.json()).html : null;
  } catch {
    return null;
  }
}

export async function* chunks(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) {
    const problem = await response.json().catch(() => null);
    const message = problem?.error?.message ?? `Status ${response.status}`;
    throw new Error(response.status === 401 ? `${message}: enter it in the settings.` : message);
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
      if (!frame.startsWith("data:")) continue; // a comment that keeps the connection alive
      const data = frame.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
