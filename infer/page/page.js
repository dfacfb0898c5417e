// The chat page: conversations are kept in localStorage, replies come from /v1/chat/completions of the same server.
// A reply is text that nobody has checked. It becomes DOM nodes by textContent and append alone, never by innerHTML.
"use strict";

// ---- What is kept in the browser -------------------------------------------------------------------------------

const store = {
  get(key) {
    try {
      return JSON.parse(localStorage.getItem("puna." + key));
    } catch {
      return null; // not allowed, or not ours
    }
  },
  set(key, value) {
    try {
      if (value === null) localStorage.removeItem("puna." + key);
      else localStorage.setItem("puna." + key, JSON.stringify(value));
    } catch {
      notice("The browser could not store this: its storage is full or turned off. Export what you want to keep.");
    }
  },
  ids: () => Object.keys(localStorage).filter((k) => k.startsWith("puna.chat.")).map((k) => k.slice(10)),
};

const THEMES = { system: "follows the system", light: "light", dark: "dark" };
document.documentElement.dataset.theme = Object.hasOwn(THEMES, store.get("theme")) ? store.get("theme") : "system";

// name, label, attributes of the input, help
const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: "any" },
    "0 always takes the likeliest token. Higher values give more varied text."],
  ["top_p", "Top p", { min: 0.01, max: 1, step: "any" },
    "Keeps the likeliest tokens whose probabilities sum to this. 1 keeps all."],
  ["top_k", "Top k", { min: 0, max: 2 ** 31 - 1, step: 1 }, "Keeps this many of the likeliest tokens. 0 keeps all."],
  ["min_p", "Min p", { min: 0, max: 1, step: "any" },
    "Keeps the tokens with at least this fraction of the likeliest one's probability. 0 keeps all."],
  ["repetition_penalty", "Repetition penalty", { min: 0.01, max: 10, step: "any" },
    "Above 1, tokens that the conversation already holds become less likely. 1 changes nothing."],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: "any" },
    "Above 0, tokens that the reply already holds become less likely. 0 changes nothing."],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: "any" },
    "The same, once for each time that the token was used."],
  ["max_tokens", "Most tokens in a reply", { min: 1, max: 2 ** 31 - 1, step: 1 }, "The reply ends there."],
  ["seed", "Seed", { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
    "The same seed, settings and conversation give the same reply."],
];

const chats = new Map(); // id -> {id, title, named, system, updated, editing, messages: [{role, content, end, error, note}]}
const running = new Map(); // id of a chat -> {controller, reply}, while a reply is written
const views = new WeakMap(); // message -> its element
let chat = null; // the one that is shown
let models = []; // as /v1/models lists them
let settings = store.get("settings") ?? {}; // {model, temperature, ...}

function cleanChat(raw, id) {
  const text = (value) => (typeof value === "string" ? value : "");
  const list = Array.isArray(raw?.messages) ? raw.messages : [];
  const messages = list.filter((m) => ["user", "assistant"].includes(m?.role)).map((m) => ({
    role: m.role, content: text(m.content), end: text(m.end) || "stopped", error: text(m.error), note: text(m.note),
  }));
  const editing = messages[raw?.editing?.index]?.role === "user" ? raw.editing : null;
  const updated = Number(raw?.updated) || 0;
  return { id, title: text(raw?.title), named: !!raw?.named, system: text(raw?.system), updated, editing, messages };
}

const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2); // randomUUID needs https

const save = (some) => chats.has(some.id) && store.set("chat." + some.id, some);

function blankChat() {
  const empty = [...chats.values()].find((c) => !c.messages.length && !c.named && !store.get("draft." + c.id));
  if (empty) return empty;
  const made = { ...cleanChat({}, newId()), system: chat?.system ?? "", updated: Date.now() };
  chats.set(made.id, made);
  save(made);
  return made;
}

const newest = () => [...chats.values()].sort((a, b) => b.updated - a.updated);

// ---- Elements --------------------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);

function make(tag, { on = {}, data = {}, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  svg.appendChild(document.createElementNS(svg.namespaceURI, "use")).setAttribute("href", "#i-" + name);
  return svg;
}

function button(name, label, click, { iconOnly = false, ...attributes } = {}) {
  const more = iconOnly ? { "aria-label": label, title: label, class: "icon" } : { class: "quiet" };
  const children = [...(name ? [icon(name)] : []), ...(iconOnly ? [] : [make("span", {}, label)])];
  return make("button", { type: "button", ...more, ...attributes, on: { click } }, ...children);
}

/** Replaces the children of `parent`; the focus stays on the element with the same data-key. */
function rebuild(parent, children) {
  const key = parent.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  parent.replaceChildren(...children);
  if (key) parent.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

function notice(text, label, action) {
  const close = button("close", "Close this notice", () => notice(""), { iconOnly: true });
  const act = () => (notice(""), action());
  $("notice").replaceChildren(...(text ? [make("p", {}, text), ...(label ? [button(null, label, act)] : []), close] : []));
}

function copyButton(text) {
  const self = button("copy", "Copy", async () => {
    await copy(text());
    self.lastChild.textContent = "Copied";
    setTimeout(() => (self.lastChild.textContent = "Copy"), 1500);
  }, { class: "quiet copy" });
  return self;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { class: "visually-hidden" }, text); // plain http has no clipboard
  document.body.append(area);
  const before = document.activeElement;
  area.select();
  document.execCommand("copy");
  area.remove();
  before?.focus();
}

// ---- Markdown --------------------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}|~{3,}) *([^\s`]*)/;
const HEADING = /^(#{1,6}) +(.*)/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const DEEPEST = 8; // lists in lists; deeper ones are shown as text
// Code, bold, italic, a link, an escaped mark. Each part stops at the next mark of its kind, so none takes long.
const INLINE =
  /(`+)(?!`)(.+?)(?<!`)\1(?!`)|\*\*(?!\s)((?:[^*]|\*[^*]+\*)+)(?<!\s)\*\*|\*(?![\s*])([^*]+)(?<!\s)\*|\[([^[\]]+)\]\(([^()\s]+)\)|\\([*`\\[\]])/s;

/** The blocks of a text: {kind: "code" | "heading" | "list" | "text", lines}. A block never changes once another follows. */
function blocks(text) {
  const found = [];
  let open = null; // the block that the next line may belong to
  const start = (kind, line) => found.push((open = { kind, lines: [line] }));
  for (const line of text.split("\n")) {
    const fence = FENCE.exec(line);
    const inList = open?.kind === "list" && (/^( {2,}|\t)/.test(line) || ITEM.test(line));
    if (open?.kind === "code") {
      open.lines.push(line);
      if (fence?.[1].startsWith(FENCE.exec(open.lines[0])[1]) && !fence[2]) open = null;
    } else if (inList) open.lines.push(line);
    else if (fence) start("code", line);
    else if (HEADING.test(line)) start("heading", line), (open = null);
    else if (ITEM.test(line)) start("list", line);
    else if (!line.trim()) open?.kind === "list" ? open.lines.push("") : (open = null);
    else if (open?.kind === "text") open.lines.push(line);
    else start("text", line);
  }
  return found;
}

function blockNode({ kind, lines }, depth = 0) {
  if (kind === "code") return codeNode(lines);
  if (kind === "list" && depth < DEEPEST) return listNode(lines, depth);
  const heading = kind === "heading" ? HEADING.exec(lines[0]) : null;
  if (!heading) return make("p", {}, ...inline(lines.join("\n")));
  return make("h" + Math.min(heading[1].length + 2, 6), {}, ...inline(heading[2])); // h1 and h2 are the page's own
}

function codeNode([first, ...lines]) {
  const [, mark, language] = FENCE.exec(first);
  if (lines.length && lines.at(-1).trim().startsWith(mark)) lines.pop();
  const code = lines.join("\n");
  const bar = make("div", { class: "bar" }, make("span", {}, language || "Code"), copyButton(() => code));
  return make("div", { class: "code" }, bar, make("pre", { tabindex: 0 }, make("code", {}, code)));
}

function listNode(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push([line.slice(item[0].length)]);
    else items.at(-1).push(line.replace(/^(\t| {1,4})/, (space) => space.slice(Math.min(space.length, mark.length + 1))));
  }
  const ordered = /\d/.test(mark);
  const list = make(ordered ? "ol" : "ul", ordered ? { start: parseInt(mark) } : {});
  for (const item of items) {
    const parts = blocks(item.join("\n"));
    const inside = parts.map((b, i) => (i === 0 && b.kind === "text" ? inline(b.lines.join("\n")) : [blockNode(b, depth + 1)]));
    list.append(make("li", {}, ...inside.flat()));
  }
  return list;
}

function inline(text) {
  const nodes = [];
  for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
    const [all, , code, bold, italic, label, url, escaped] = found;
    nodes.push(text.slice(0, found.index));
    if (code) nodes.push(make("code", {}, code));
    else if (bold) nodes.push(make("strong", {}, ...inline(bold)));
    else if (italic) nodes.push(make("em", {}, ...inline(italic)));
    else if (label) nodes.push(link(all, label, url));
    else nodes.push(escaped);
  }
  return [...nodes, text].filter((node) => node !== "");
}

function link(all, label, url) {
  if (!/^https?:\/\//i.test(url) || !URL.canParse(url)) return all;
  return make("a", { href: url, title: url, target: "_blank", rel: "noopener noreferrer" }, ...inline(label));
}

/** Shows `text` in `body`, and keeps the elements of blocks that have not changed since the last time. */
function showMarkdown(body, text) {
  const wanted = blocks(text);
  const sources = wanted.map((block) => block.lines.join("\n"));
  const before = body.sources ?? [];
  let same = 0;
  while (same < sources.length && sources[same] === before[same]) same++;
  while (body.childNodes.length > same) body.lastChild.remove();
  body.append(...wanted.slice(same).map((block) => blockNode(block)));
  body.sources = sources;
}

// ---- The server ------------------------------------------------------------------------------------------------

let asking = null; // the promise of an API key, while the dialog is open

function askKey(reason) {
  asking ??= new Promise((resolve) => {
    $("key-reason").textContent = reason;
    $("ask-key").addEventListener("close", () => resolve((asking = null)), { once: true });
    $("ask-key").showModal();
  });
  return asking;
}

const readKey = () => sessionStorage.getItem("puna.key");

/** Fetches `path`; asks for the API key as often as the server wants one. `sent` is when the last try was sent. */
async function request(path, options = {}) {
  for (;;) {
    const key = readKey();
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const sent = performance.now();
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
    });
    if (response.ok) return { response, sent };
    if (response.status !== 401) throw new Error(await problem(response));
    if (readKey() === key) await askKey(key ? "The server did not accept this key." : "This server asks for an API key.");
    if (readKey() === key) throw new Error("The server asks for an API key.");
  }
}

async function problem(response) {
  const body = await response.json().catch(() => null);
  const wait = response.headers.get("retry-after");
  const text = body?.error?.message ?? `The server answered with status ${response.status}.`;
  return /^\d+$/.test(wait) ? `${text} Try again in ${wait} s.` : text;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (done ? "\n" : value)).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    if (done) return;
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
  const numbers = Object.fromEntries(FIELDS.filter(([name]) => name in settings).map(([name]) => [name, settings[name]]));
  return { model: $("model").value, messages, stream: true, stream_options: { include_usage: true }, ...numbers };
}

async function loadModels() {
  try {
    const { response } = await request("/v1/models");
    models = (await response.json()).data ?? [];
    $("model").replaceChildren(...models.map((model) => make("option", { value: model.id }, model.id)));
    if (models.some((model) => model.id === settings.model)) $("model").value = settings.model;
    limitTokens();
  } catch (error) {
    notice(`The models could not be listed. ${error.message}`, "Retry", loadModels);
  }
}

// ---- Replies ---------------------------------------------------------------------------------------------------

const blankReply = () => ({ role: "assistant", content: "", end: "", error: "", note: "" });

/** Streams `reply`, the last message of `some`. If nothing comes and there was a reply `before`, that one stays. */
async function write(some, reply, before) {
  const controller = new AbortController();
  const clock = {};
  running.set(some.id, { controller, reply });
  some.updated = Date.now();
  save(some);
  $("spoken").replaceChildren();
  refresh(some);
  try {
    if (!models.length) await loadModels();
    const body = JSON.stringify(payload(some, reply));
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body, signal: controller.signal };
    const { response, sent } = await request("/v1/chat/completions", options);
    clock.sent = sent;
    for await (const event of events(response.body)) take(some, reply, event, clock);
    if (!reply.end) throw new Error("The connection closed before the reply was complete.");
  } catch (error) {
    if (!reply.content && before) Object.assign(reply, before);
    reply.end = "stopped";
    reply.error = controller.signal.aborted ? "" : error.message;
  }
  running.delete(some.id);
  reply.note ||= describe(reply, clock);
  save(some);
  refresh(some);
  if (some === chat) speak(reply, true);
}

function take(some, reply, event, clock) {
  if (event === "[DONE]") return;
  const { error, usage, choices } = JSON.parse(event);
  if (error) throw new Error(error.message);
  if (usage) clock.usage = usage;
  if (choices?.[0]?.finish_reason) reply.end = choices[0].finish_reason;
  const text = choices?.[0]?.delta?.content;
  if (!text) return;
  clock.last = performance.now();
  clock.first ??= clock.last;
  reply.content += text;
  if (clock.last - (clock.saved ?? 0) > 1000) save(some), (clock.saved = clock.last);
  clock.frame ??= requestAnimationFrame(() => {
    clock.frame = null;
    if (running.get(some.id)?.reply === reply) update(some, reply);
  });
}

/** One line on a reply: its tokens, tokens per second after the first, the time to the first, and how it ended. */
function describe(reply, { usage, sent, first, last }) {
  const made = usage?.completion_tokens;
  const parts = [];
  if (made !== undefined) parts.push(`${made} tokens`);
  if (made > 1 && last > first) parts.push(`${(((made - 1) * 1000) / (last - first)).toFixed(1)} tokens/s`);
  if (first !== undefined) parts.push(`first token after ${((first - sent) / 1000).toFixed(2)} s`);
  if (usage?.prompt_tokens !== undefined) parts.push(`prompt of ${usage.prompt_tokens} tokens`);
  if (reply.end === "length") parts.push("ended at the token limit");
  if (reply.end === "stopped") parts.push(reply.error ? "incomplete" : "stopped");
  return parts.join(" · ");
}

function send() {
  const text = $("box").value;
  if (running.has(chat.id) || !text.trim()) return;
  if (!chat.named && !chat.messages.length) chat.title = text.trim().split("\n")[0].slice(0, 60);
  chat.messages.push({ role: "user", content: text, end: "stop", error: "", note: "" });
  $("box").value = "";
  store.set("draft." + chat.id, null);
  answer();
}

/** Asks for a new last message of the shown chat. */
function answer() {
  const reply = blankReply();
  chat.messages.push(reply);
  stuck = true;
  const done = write(chat, reply);
  showMessages();
  $("box").focus();
  return done;
}

function again() {
  const reply = chat.messages.at(-1);
  const before = { ...reply };
  if (running.has(chat.id) || reply?.role !== "assistant") return;
  write(chat, Object.assign(reply, blankReply()), before);
  $("box").focus();
}

const stop = () => running.get(chat.id)?.controller.abort();

// ---- The conversation ------------------------------------------------------------------------------------------

let stuck = true; // whether the reader is at the end, so that new text scrolls
let lastTop = 0;

function onScroll() {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  const atEnd = scrollHeight - scrollTop - clientHeight < 40;
  if (atEnd) stuck = true;
  else if (scrollTop < lastTop) stuck = false; // only the reader scrolls up
  lastTop = scrollTop;
  $("to-end").hidden = atEnd || stuck;
}

function keepEnd() {
  if (stuck) $("scroll").scrollTop = $("scroll").scrollHeight;
  onScroll();
}

function showMessages() {
  $("empty").hidden = chat.messages.length > 0;
  $("messages").replaceChildren(...chat.messages.map((message, index) => view(message, index)));
  keepEnd();
}

function view(message, index) {
  if (message.role === "user") return chat.editing?.index === index ? editor(index) : question(message, index);
  const parts = [make("div", { class: "body" }), make("div", { class: "error" }), make("div", { class: "tools" })];
  const element = make("article", { class: "reply", "aria-label": "Reply" }, ...parts);
  views.set(message, element);
  fill(message, element);
  return element;
}

function question(message, index) {
  const edit = () => startEdit(index, message.content);
  const tools = make("div", { class: "tools" }, button("edit", "Edit", edit, { data: { key: "edit-" + index } }));
  return make("article", { class: "question", "aria-label": "You" }, make("p", { class: "body" }, message.content), tools);
}

function fill(reply, element) {
  const [body, error, tools] = element.children;
  const busy = running.get(chat.id)?.reply === reply;
  element.classList.toggle("busy", busy);
  element.setAttribute("aria-busy", busy);
  showMarkdown(body, reply.content);
  if (busy && !reply.content) body.replaceChildren(make("p", { class: "waiting" }, "Waiting for the first token"));
  const retry = button("again", "Retry", again, { data: { key: "retry" } });
  const last = reply === chat.messages.at(-1);
  rebuild(error, reply.error ? [make("p", { role: "alert" }, reply.error), ...(last ? [retry] : [])] : []);
  if (busy) return tools.replaceChildren(make("span", { class: "note" }, "Writing"));
  const redo = button("again", "Regenerate", again, { data: { key: "again" } });
  const shown = [...(reply.content ? [copyButton(() => reply.content)] : []), ...(last && !reply.error ? [redo] : [])];
  rebuild(tools, [...shown, make("span", { class: "note" }, reply.note)]);
}

/** Shows the new text of a reply, if its conversation is the shown one. */
function update(some, reply) {
  if (some !== chat || !views.get(reply)?.isConnected) return;
  fill(reply, views.get(reply));
  speak(reply, false);
}

/** Gives finished blocks, and at the end the last one, to screen readers. */
function speak(reply, ended) {
  const sources = views.get(reply)?.firstChild.sources ?? [];
  const count = ended ? sources.length : sources.length - 1;
  for (let i = $("spoken").childElementCount; i < count; i++) $("spoken").append(make("p", {}, sources[i]));
  if (ended) $("spoken").append(make("p", {}, reply.error || (reply.end === "stopped" ? "Stopped." : "Reply complete.")));
}

/** Shows what depends on whether a reply is being written. */
function refresh(some) {
  showList();
  if (some !== chat) return;
  const busy = running.has(chat.id);
  const hadFocus = [$("stop"), $("send")].includes(document.activeElement);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (hadFocus) $("box").focus();
  $("title").textContent = chat.title || "New conversation";
  document.title = chat.title ? `${chat.title} – Puna chat` : "Puna chat";
  if (chat.messages.length && chat.messages.at(-1).role === "assistant") update(chat, chat.messages.at(-1));
}

function startEdit(index, text) {
  chat.editing = { index, text };
  save(chat);
  showMessages();
  const box = $("messages").querySelector(".editor textarea");
  box.focus();
  box.setSelectionRange(text.length, text.length);
}

function endEdit(index) {
  chat.editing = null;
  save(chat);
  showMessages();
  $("messages").querySelector(`[data-key="edit-${index}"]`)?.focus();
}

function resend(index) {
  const { text } = chat.editing;
  if (running.has(chat.id) || !text.trim()) return;
  chat.editing = null;
  chat.messages.splice(index, Infinity, { role: "user", content: text, end: "stop", error: "", note: "" });
  answer();
}

function editor(index) {
  const box = make("textarea", { "aria-label": "Your message", rows: 2 });
  box.value = String(chat.editing.text);
  box.addEventListener("input", () => ((chat.editing = { index, text: box.value }), save(chat)));
  box.addEventListener("keydown", (event) => {
    if (plainEnter(event)) event.preventDefault(), resend(index);
    else if (event.key === "Escape" && !running.has(chat.id)) event.stopPropagation(), endEdit(index);
  });
  const buttons = [button(null, "Cancel", () => endEdit(index)), button(null, "Send", () => resend(index), { class: "main" })];
  const help = make("span", { class: "note" }, "The messages after this one are removed.");
  return make("article", { class: "editor", "aria-label": "You" }, box, make("div", { class: "tools" }, help, ...buttons));
}

const plainEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

// ---- The list of conversations ---------------------------------------------------------------------------------

const isPhone = () => matchMedia("(max-width: 760px)").matches;

function open(some) {
  chat = some;
  sessionStorage.setItem("puna.current", chat.id);
  $("box").value = store.get("draft." + chat.id) ?? "";
  $("system").value = chat.system;
  $("spoken").replaceChildren();
  stuck = true;
  showMessages();
  refresh(chat);
}

function showList() {
  if ($("list").querySelector("input")) return; // a name is being typed
  rebuild($("list"), newest().map(row));
}

function row(some) {
  const shown = some === chat;
  const pick = () => (open(some), showSide(false), $("box").focus());
  const title = some.title || "New conversation";
  const dot = running.has(some.id) ? [make("span", { class: "dot", role: "img", "aria-label": "A reply is being written" })] : [];
  const attributes = { class: "pick", type: "button", "aria-current": shown ? "true" : null };
  const main = make("button", { ...attributes, data: { key: some.id }, on: { click: pick } }, make("span", {}, title), ...dot);
  if (!shown) return make("li", {}, main);
  const tool = (name, label, act) => button(name, label, act, { iconOnly: true, data: { key: name } });
  return make("li", { class: "shown" }, main, tool("edit", "Rename", () => rename(some)),
    tool("save", "Export", () => exportChats([some])), tool("delete", "Delete", () => remove(some)));
}

function rename(some) {
  const input = make("input", { "aria-label": "Name of the conversation", maxlength: 100 });
  input.value = some.title;
  let done = false;
  const finish = (keep) => {
    if (done) return;
    done = true;
    const name = input.value.trim();
    if (keep && name) Object.assign(some, { title: name, named: true });
    save(some);
    const hadFocus = input === document.activeElement;
    input.remove();
    refresh(chat);
    if (hadFocus) $("list").querySelector("[data-key=edit]")?.focus();
  };
  input.addEventListener("keydown", (event) => {
    if (plainEnter(event)) finish(true);
    else if (event.key === "Escape") event.stopPropagation(), finish(false);
  });
  input.addEventListener("blur", () => finish(true));
  $("list").querySelector(".shown").replaceChildren(input);
  input.select();
}

function remove(some) {
  running.get(some.id)?.controller.abort();
  const draft = store.get("draft." + some.id);
  chats.delete(some.id);
  for (const kind of ["chat.", "draft."]) store.set(kind + some.id, null);
  open(newest()[0] ?? blankChat());
  $("new").focus();
  notice(`Deleted: ${some.title || "New conversation"}`, "Undo", () => {
    chats.set(some.id, some);
    save(some);
    store.set("draft." + some.id, draft);
    open(some);
    $("box").focus();
  });
}

function exportChats(some) {
  const conversations = some.map(({ title, system, updated, messages }) => ({ title, system, updated, messages }));
  const text = JSON.stringify({ format: "puna-chat", conversations }, null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  make("a", { href: url, download: some.length === 1 ? "conversation.json" : "conversations.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

async function importChats(file) {
  try {
    const { conversations } = JSON.parse(await file.text());
    const made = conversations.map((raw) => cleanChat({ ...raw, named: true }, newId()));
    for (const some of made) chats.set(some.id, some), save(some);
    if (made.length) open(made[0]);
    notice(`Imported conversations: ${made.length}`);
  } catch {
    notice(`${file.name} is not a file of conversations: choose one that "Export" of this page wrote.`);
  }
}

function showSide(shown) {
  if (document.body.classList.contains("side") === shown) return;
  document.body.classList.toggle("side", shown);
  $("column").inert = shown;
  $("open-side").setAttribute("aria-expanded", shown);
  (shown ? $("new") : $("open-side")).focus();
}

// ---- Settings and start ----------------------------------------------------------------------------------------

function showFields() {
  $("fields").replaceChildren(...FIELDS.map(([name, label, limits, help]) => {
    const input = make("input", { type: "number", id: name, ...limits, inputmode: "decimal", "aria-describedby": name + "-help" });
    input.value = settings[name] ?? "";
    input.addEventListener("change", () => setField(input));
    const text = make("p", { class: "help", id: name + "-help" }, help);
    return make("div", { class: "field" }, make("label", { for: name }, label), input, text);
  }));
  limitTokens();
}

/** Keeps a valid value. One that is not is shown as such, and not sent. */
function setField(input) {
  delete settings[input.id];
  if (input.reportValidity() && input.value !== "") settings[input.id] = input.valueAsNumber;
  store.set("settings", settings);
}

function limitTokens() {
  const length = models.find((model) => model.id === $("model").value)?.max_model_len;
  const help = $("max_tokens-help");
  if (help && length) help.textContent = `The reply ends there. This model holds ${length} tokens, the conversation included.`;
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  const label = `Theme: ${THEMES[name]}`;
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
  $("theme").replaceChildren(icon(name));
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const name = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  store.set("theme", name);
  setTheme(name);
}

/** Escape closes the list of conversations, or else stops the reply. Dialogs close by themselves. */
function onEscape(event) {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("side")) showSide(false);
  else stop();
}

/** Another tab wrote a conversation. */
function onStorage({ key, newValue }) {
  const id = key?.startsWith("puna.chat.") ? key.slice(10) : null;
  if (!id || running.has(id)) return;
  const some = newValue ? cleanChat(JSON.parse(newValue), id) : null;
  if (some) chats.set(id, some);
  else if (id !== chat.id) chats.delete(id);
  if (some && id === chat.id) (chat = some), showMessages();
  refresh(chat);
}

function listen() {
  const on = (id, event, listener) => $(id).addEventListener(event, listener);
  on("composer", "submit", (event) => (event.preventDefault(), send()));
  on("box", "keydown", (event) => plainEnter(event) && (event.preventDefault(), send()));
  on("box", "input", () => store.set("draft." + chat.id, $("box").value || null));
  on("stop", "click", stop);
  on("new", "click", () => (open(blankChat()), showSide(false), $("box").focus()));
  on("open-side", "click", () => showSide(true));
  on("close-side", "click", () => showSide(false));
  on("shade", "click", () => showSide(false));
  on("export-all", "click", () => exportChats(newest().filter((some) => some.messages.length)));
  on("import", "click", () => $("file").click());
  on("file", "change", () => $("file").files[0] && importChats($("file").files[0]).then(() => ($("file").value = "")));
  on("to-end", "click", () => ((stuck = true), keepEnd(), $("box").focus()));
  on("scroll", "scroll", onScroll);
  on("theme", "click", nextTheme);
  on("model", "change", () => ((settings.model = $("model").value), store.set("settings", settings), limitTokens()));
  on("open-settings", "click", () => (showFields(), $("settings").showModal()));
  on("settings-form", "submit", (event) => (event.preventDefault(), $("settings").close()));
  on("system", "input", () => ((chat.system = $("system").value), save(chat)));
  on("reset", "click", () => ((settings = { model: settings.model }), store.set("settings", settings), showFields()));
  on("key-form", "submit", (event) => (event.preventDefault(), sessionStorage.setItem("puna.key", $("key").value), $("ask-key").close()));
  on("key-cancel", "click", () => $("ask-key").close());
  document.addEventListener("keydown", onEscape);
  addEventListener("storage", onStorage);
  addEventListener("pagehide", () => running.forEach((_, id) => save(chats.get(id))));
  matchMedia("(max-width: 760px)").addEventListener("change", () => showSide(false));
  const sizes = new ResizeObserver(keepEnd);
  sizes.observe($("messages"));
  sizes.observe($("scroll"));
}

document.addEventListener("DOMContentLoaded", () => {
  for (const id of store.ids()) chats.set(id, cleanChat(store.get("chat." + id), id));
  setTheme(document.documentElement.dataset.theme);
  listen();
  open(chats.get(sessionStorage.getItem("puna.current")) ?? newest()[0] ?? blankChat());
  if (!isPhone()) $("box").focus(); // on a phone it would open the keyboard
  loadModels();
});
