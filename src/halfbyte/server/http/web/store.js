// Conversations, kept by the browser (IndexedDB) and nowhere else.

const opening = new Promise((resolve, reject) => {
  const request = indexedDB.open("halfbyte", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

async function within(mode, action) {
  const store = (await opening).transaction("conversations", mode).objectStore("conversations");
  const request = action(store);
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export async function list() {
  const all = await within("readonly", (store) => store.getAll());
  return all.sort((a, b) => b.updated - a.updated);
}

export const load = (id) => within("readonly", (store) => store.get(id));
export const save = (conversation) => within("readwrite", (store) => store.put(conversation));
export const remove = (id) => within("readwrite", (store) => store.delete(id));

export function fresh() {
  return { id: crypto.getRandomValues(new Uint32Array(3)).join("-"), title: "", updated: Date.now(), turns: [] };
}

// A turn is what the user said, an answer with its former versions, or the result of a call.
const isText = (value) => typeof value === "string";
const isTurn = (turn) =>
  turn !== null &&
  typeof turn === "object" &&
  ((turn.role === "user" && isText(turn.text) && Array.isArray(turn.images) &&
    turn.images.every((url) => isText(url) && /^data:image\/(png|jpeg|webp|gif);base64,/.test(url))) ||
    (turn.role === "tool" && isText(turn.tool_call_id) && isText(turn.content)) ||
    (turn.role === "assistant" && Array.isArray(turn.answers) && turn.answers.length > 0 &&
      turn.answers[turn.chosen] !== undefined && turn.answers.every(isAnswer)));
const isAnswer = (answer) =>
  answer !== null && typeof answer === "object" && isText(answer.content) && isText(answer.thought) &&
  isText(answer.meta) && Array.isArray(answer.calls) &&
  answer.calls.every((call) => isText(call?.id) && isText(call.function?.name) && isText(call.function.arguments));

// Conversations of an exported file; an Error that says what is wrong with it.
export function readExport(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch (error) {
    throw new Error(`This file is no JSON: ${error.message}`);
  }
  const found = data?.conversations;
  if (data?.format !== "halfbyte-conversations-1" || !Array.isArray(found)) {
    throw new Error("This file holds no conversations of this page.");
  }
  found.forEach((conversation, index) => {
    const isWhole = isText(conversation?.id) && isText(conversation.title) && Array.isArray(conversation.turns);
    if (!isWhole || !conversation.turns.every(isTurn)) {
      throw new Error(`Conversation ${index + 1} of this file is not whole.`);
    }
  });
  return found.map(({ id, title, updated, turns }) => ({ id, title, updated: Number(updated) || Date.now(), turns }));
}

export const exportText = (conversations) =>
  JSON.stringify({ format: "halfbyte-conversations-1", conversations }, null, 1);
