// The chat page: conversations are kept in localStorage, replies come from /v1/chat/completions of the same server.
// history.js keeps them, server.js talks to the server, elements.js makes elements; all share one scope.
"use strict";

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

const running = new Map(); // id of a chat -> {some, controller, reply}, while a reply is written to `some`
const views = new WeakMap(); // message -> its element
let chat = null; // the one that is shown
let models = []; // as /v1/models lists them
let settings = store.get("settings") ?? {}; // {model, temperature, ...}

// ---- Replies ---------------------------------------------------------------------------------------------------

/** Streams `reply`, the last message of `some`. If nothing comes and there was a reply `before`, that one stays. */
async function write(some, reply, before) {
  const controller = new AbortController();
  const clock = {};
  running.set(some.id, { some, controller, reply });
  some.updated = Date.now();
  save(some);
  $("spoken").replaceChildren();
  refresh(some);
  try {
    if (!models.length) await loadModels();
    const body = JSON.stringify(payload(some, reply));
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body, signal: controller.signal };
    const { response, sent } = await request("/v1/chat/completions", options);
    clock.sent = sent;
    for await (const event of events(response.body)) take(some, reply, event, clock);
    if (!reply.end) throw new Error("The connection closed before the reply was complete.");
  } catch (error) {
    if (!reply.content && before) Object.assign(reply, before);
    reply.end = "stopped";
    reply.error = controller.signal.aborted ? "" : error.message;
  }
  if (running.get(some.id)?.reply !== reply) return; // an edited message took its place
  running.delete(some.id);
  reply.note ||= describe(reply, clock);
  save(some);
  refresh(some);
  if (some === chat && !reply.error) speak(reply, true); // an error is an alert
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
  if (made !== undefined) parts.push(`${made} ${made === 1 ? "token" : "tokens"}`);
  const rate = ((made - 1) * 1000) / (last - first);
  if (made > 1 && last > first) parts.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
  if (first !== undefined) parts.push(`first token after ${((first - sent) / 1000).toFixed(2)} s`);
  if (usage?.prompt_tokens !== undefined) parts.push(`prompt of ${usage.prompt_tokens} tokens`);
  if (reply.end === "length") parts.push("ended at the token limit");
  if (reply.end === "stopped" && !reply.error) parts.push("stopped");
  if (reply.error && reply.content) parts.push("incomplete");
  return parts.join(" · ");
}

function send() {
  const text = $("box").value;
  if (running.has(chat.id) || !text.trim()) return;
  chat.messages.push(message("user", text));
  $("box").value = "";
  store.set("draft." + chat.id, null);
  answer();
}

/** Has a reply written to the last message. */
function answer() {
  const reply = message("assistant", "");
  chat.messages.push(reply);
  stuck = true;
  write(chat, reply);
  showMessages();
  focusBox();
}

function again() {
  const reply = chat.messages.at(-1);
  const before = { ...reply };
  if (running.has(chat.id) || reply?.role !== "assistant") return;
  write(chat, Object.assign(reply, message("assistant", "")), before);
  focusBox();
}

const stop = () => running.get(chat.id)?.controller.abort();

// ---- The conversation ------------------------------------------------------------------------------------------

/** Replaces the children of `parent`; the focus stays on the element with the same data-key. */
function rebuild(parent, children) {
  const key = parent.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  parent.replaceChildren(...children);
  if (key) parent.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

function notice(text, label, action) {
  const close = button("close", "Close this notice", () => notice(""), { iconOnly: true });
  const act = () => (notice(""), action());
  const parts = [make("p", {}, text), ...(label ? [button(null, label, act)] : []), close];
  $("notice").replaceChildren(...(text ? parts : []));
}

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
  $("messages").replaceChildren(...chat.messages.map(view));
  keepEnd();
}

function view(some, index) {
  if (some.role === "user") return chat.editing?.index === index ? editor(index) : question(some, index);
  const parts = ["body", "error", "tools"].map((name) => make("div", { class: name, dir: "auto" }));
  const element = make("article", { class: "reply", "aria-label": "Reply" }, ...parts);
  views.set(some, element);
  fill(some, element);
  return element;
}

function question({ content }, index) {
  const edit = button("edit", "Edit", () => startEdit(index, content), { data: { key: "edit-" + index } });
  const parts = [make("p", { class: "body", dir: "auto" }, content), make("div", { class: "tools" }, edit)];
  return make("article", { class: "question", "aria-label": "You" }, ...parts);
}

function fill(reply, element) {
  const [body, error, tools] = element.children;
  const busy = running.get(chat.id)?.reply === reply;
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
  if (running.get(some.id)?.reply === reply) speak(reply, false);
}

/** Gives finished blocks, and at the end the last one, to screen readers. */
function speak(reply, ended) {
  const sources = views.get(reply)?.firstChild.sources ?? [];
  const count = ended ? sources.length : sources.length - 1;
  for (let i = $("spoken").childElementCount; i < count; i++) $("spoken").append(make("p", {}, sources[i]));
  if (ended) $("spoken").append(make("p", {}, reply.end === "stopped" ? "Stopped." : "Reply complete."));
}

/** Shows what depends on whether a reply is being written. */
function refresh(some) {
  showList();
  if (some !== chat) return;
  const busy = running.has(chat.id);
  const hadFocus = [$("stop"), $("send")].includes(document.activeElement);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (hadFocus) focusBox();
  $("title").textContent = titleOf(chat);
  document.title = `${titleOf(chat)} – Puna chat`;
  if (chat.messages.length) update(chat, chat.messages.at(-1));
}

function startEdit(index, text) {
  chat.editing = { index, text };
  save(chat);
  showMessages();
  $("messages").querySelector(".editor textarea").focus();
}

function endEdit(index) {
  chat.editing = null;
  save(chat);
  showMessages();
  $("messages").querySelector(`[data-key="edit-${index}"]`).focus();
}

function resend(index) {
  const { text } = chat.editing;
  if (!text.trim()) return;
  stop();
  chat.editing = null;
  chat.messages.splice(index, Infinity, message("user", text));
  answer();
}

function editor(index) {
  const box = make("textarea", { "aria-label": "Your message", rows: 2, dir: "auto" });
  box.value = chat.editing.text;
  box.addEventListener("input", () => ((chat.editing = { index, text: box.value }), save(chat)));
  box.addEventListener("keydown", (event) => {
    if (plainEnter(event)) event.preventDefault(), resend(index);
    else if (event.key === "Escape") event.stopPropagation(), endEdit(index);
  });
  const help = make("span", { class: "note" }, "Sending removes the messages after this one.");
  const cancel = button(null, "Cancel", () => endEdit(index));
  const resendIt = button(null, "Resend", () => resend(index), { class: "main" });
  const tools = make("div", { class: "tools" }, help, cancel, resendIt);
  return make("article", { class: "editor", "aria-label": "You" }, box, tools);
}

const plainEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

// ---- The list of conversations ---------------------------------------------------------------------------------

const phone = matchMedia("(max-width: 760px)"); // as in page.css

/** The message field gets the focus; on a phone the conversation does, since the field would open the keyboard. */
function focusBox() {
  if (document.activeElement !== $("box")) $(phone.matches ? "scroll" : "box").focus();
}

function open(some) {
  chat = some;
  tab.set("current", chat.id);
  $("box").value = store.get("draft." + chat.id) ?? "";
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
  const dot = make("span", { class: "dot", role: "img", "aria-label": "A reply is being written" });
  const pick = button(null, titleOf(some), () => visit(some), { class: "pick", data: { key: some.id } });
  if (running.has(some.id)) pick.append(dot);
  if (some !== chat) return make("li", {}, pick);
  pick.setAttribute("aria-current", "true");
  const tool = (name, label, act) => button(name, label, act, { iconOnly: true, data: { key: name } });
  const tools = [tool("edit", "Rename", () => rename(some)), tool("save", "Export", () => exportChats([some]))];
  return make("li", { class: "shown" }, pick, ...tools, tool("delete", "Delete", () => remove(some)));
}

function visit(some) {
  open(some);
  showSide(false);
  focusBox();
}

function rename(some) {
  const input = make("input", { "aria-label": "Name of the conversation", maxlength: 100 });
  input.value = titleOf(some);
  const finish = (name) => {
    if (!input.isConnected) return;
    some.title = name || some.title;
    save(some);
    const hadFocus = input === document.activeElement;
    $("list").replaceChildren();
    refresh(chat);
    if (hadFocus) $("list").querySelector("[data-key=edit]").focus();
  };
  input.addEventListener("keydown", (event) => {
    if (!plainEnter(event) && event.key !== "Escape") return;
    event.preventDefault(); // or the button that gets the focus is pressed
    event.stopPropagation();
    finish(event.key === "Enter" ? input.value.trim() : "");
  });
  input.addEventListener("blur", () => finish(input.value.trim()));
  $("list").querySelector(".shown").replaceChildren(input);
  input.focus();
  input.select();
}

function remove(some) {
  running.get(some.id)?.controller.abort();
  const draft = store.get("draft." + some.id);
  chats.delete(some.id);
  for (const kind of ["chat.", "draft."]) store.set(kind + some.id, null);
  open(newest()[0] ?? blankChat());
  $("new").focus();
  notice(`Deleted: ${titleOf(some)}`, "Undo", () => {
    chats.set(some.id, some);
    save(some);
    store.set("draft." + some.id, draft);
    visit(some);
  });
}

function exportChats(list) {
  const conversations = list.map((some) => ({ ...some, title: titleOf(some), id: undefined, editing: undefined }));
  const text = JSON.stringify({ format: "puna-chat", conversations }, null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  make("a", { href: url, download: list.length === 1 ? "conversation.json" : "conversations.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function importChats(file) {
  try {
    const { conversations } = JSON.parse(await file.text());
    const made = conversations.map((raw) => cleanChat(raw, newId()));
    for (const some of made) chats.set(some.id, some);
    if (made.length) open(made[0]);
    if (made.every(save)) notice(`Imported conversations: ${made.length}`);
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

function showSettings() {
  $("system").value = chat.system;
  const length = models.find((model) => model.id === $("model").value)?.max_model_len;
  $("fields").replaceChildren(...FIELDS.map(([name, label, limits, help]) => {
    const attributes = { type: "number", id: name, ...limits, value: settings[name] ?? "", placeholder: "default" };
    const described = { ...attributes, "aria-describedby": name + "-help" };
    const input = make("input", { ...described, on: { input: () => setField(input) } });
    const more = name === "max_tokens" && length ? ` The model holds ${length}, the conversation included.` : "";
    const text = make("p", { class: "help", id: name + "-help" }, help + more);
    return make("div", {}, make("label", { for: name }, label), input, text);
  }));
  if (!$("settings").open) $("settings").showModal();
}

/** Keeps a valid value. Another one has a red border, and is not sent. */
function setField(input) {
  delete settings[input.id];
  if (input.validity.valid && input.value !== "") settings[input.id] = input.valueAsNumber;
  store.set("settings", settings);
}

function closeSettings(event) {
  event.preventDefault();
  if (event.target.reportValidity()) $("settings").close();
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

/** Another tab wrote or deleted a conversation. What is written or edited here stays. */
function onStorage({ key, newValue }) {
  const [, id] = /^puna\.chat\.(.+)$/.exec(key) ?? [];
  if (!id || running.has(id) || (id === chat.id && (chat.editing || !newValue))) return;
  if (newValue) chats.set(id, cleanChat(JSON.parse(newValue), id));
  else chats.delete(id);
  if (id === chat.id) (chat = chats.get(id)), showMessages();
  refresh(chat);
}

/** Stops what is being written and keeps what is there. */
function onLeave() {
  for (const { some, controller } of running.values()) {
    controller.abort();
    save(some);
  }
}

function listen() {
  const on = (id, event, listener) => $(id).addEventListener(event, listener);
  on("composer", "submit", (event) => (event.preventDefault(), send()));
  on("box", "keydown", (event) => plainEnter(event) && (event.preventDefault(), send()));
  on("box", "input", () => store.set("draft." + chat.id, $("box").value || null));
  on("stop", "click", stop);
  on("new", "click", () => visit(blankChat(chat.system)));
  on("open-side", "click", () => showSide(true));
  on("close-side", "click", () => showSide(false));
  on("shade", "click", () => showSide(false));
  on("export-all", "click", () => exportChats(newest().filter((some) => some.messages.length)));
  on("import", "click", () => $("file").click());
  on("file", "change", () => $("file").files[0] && importChats($("file").files[0]).then(() => ($("file").value = "")));
  on("to-end", "click", () => ((stuck = true), keepEnd(), focusBox()));
  on("scroll", "scroll", onScroll);
  on("theme", "click", nextTheme);
  on("model", "change", () => ((settings.model = $("model").value), store.set("settings", settings)));
  on("open-settings", "click", showSettings);
  on("settings-form", "submit", closeSettings);
  on("system", "input", () => ((chat.system = $("system").value), save(chat)));
  on("reset", "click", () => ((settings = { model: settings.model }), store.set("settings", settings), showSettings()));
  on("key-form", "submit", (event) => (event.preventDefault(), tab.set("key", $("key").value), $("ask-key").close()));
  on("ask-key", "close", () => ($("key").value = ""));
  on("key-cancel", "click", () => $("ask-key").close());
  document.addEventListener("keydown", onEscape);
  addEventListener("storage", onStorage);
  addEventListener("pagehide", onLeave);
  phone.addEventListener("change", () => showSide(false));
  const sizes = new ResizeObserver(keepEnd);
  sizes.observe($("messages"));
  sizes.observe($("scroll"));
}

document.addEventListener("DOMContentLoaded", () => {
  loadChats();
  setTheme(document.documentElement.dataset.theme);
  listen();
  open(chats.get(tab.get("current")) ?? newest()[0] ?? blankChat());
  if (!phone.matches) focusBox();
  tryModels();
});
