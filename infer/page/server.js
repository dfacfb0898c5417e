// What the page says to the server, and what it understands of the answers.
"use strict";

let asking = null; // the promise of an API key, while the dialog is open

function askKey(reason) {
  asking ??= new Promise((resolve) => {
    $("key-reason").textContent = reason;
    $("ask-key").addEventListener("close", () => resolve((asking = null)), { once: true });
    $("ask-key").showModal();
  });
  return asking;
}

/** Fetches `path`; asks for the API key as often as the server wants one. `sent` is when the last try was sent. */
async function request(path, options = {}) {
  for (;;) {
    const key = tab.get("key");
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const sent = performance.now();
    const response = await fetch(path, { ...options, headers }).catch(lost("The server cannot be reached."));
    if (response.ok) return { response, sent };
    if (response.status !== 401) throw new Error(await problem(response));
    const reason = key ? "The server did not accept this key." : "This server asks for a key.";
    if (tab.get("key") === key) await askKey(reason);
    if (tab.get("key") === key) throw new Error("The server asks for an API key.");
  }
}

/** Browsers describe a lost connection each in their own words; `text` takes their place. */
const lost = (text) => (error) => {
  throw error.name === "AbortError" ? error : new Error(text);
};

async function problem(response) {
  const body = await response.json().catch(() => null);
  const wait = response.headers.get("retry-after");
  const text = body?.error?.message ?? `The server answered with status ${response.status}.`;
  return /^\d+$/.test(wait) ? `${text} Try again in ${wait} s.` : text;
}

/** The data of server-sent events. Who stops reading them closes the connection. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(lost("The connection to the server was lost."));
      const lines = (rest + (done ? "\n" : value)).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // already closed
  }
}

/** What is sent: empty replies are left out, and messages of one role in a row are one, as templates want it. */
function payload(some, reply) {
  const messages = some.system.trim() ? [{ role: "system", content: some.system }] : [];
  for (const { role, content } of some.messages.slice(0, some.messages.indexOf(reply))) {
    if (!content) continue;
    if (messages.at(-1)?.role === role) messages.at(-1).content += "\n\n" + content;
    else messages.push({ role, content });
  }
  const chosen = FIELDS.filter(([name]) => name in settings).map(([name]) => [name, settings[name]]);
  const stream = { stream: true, stream_options: { include_usage: true } };
  return { model: $("model").value, messages, ...stream, ...Object.fromEntries(chosen) };
}

async function loadModels() {
  const { response } = await request("/v1/models");
  models = (await response.json()).data ?? [];
  $("model").replaceChildren(...models.map((model) => make("option", { value: model.id }, model.id)));
  if (models.some((model) => model.id === settings.model)) $("model").value = settings.model;
}

const tryModels = () =>
  loadModels().catch((error) => notice(`The models could not be listed. ${error.message}`, "Retry", tryModels));
