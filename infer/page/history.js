// The conversations, and everything else that is kept in the browser.
"use strict";

/** JSON values in `area()` by name; null for what is not there, is not ours, or may not be read. */
const kept = (area) => ({
  get(name) {
    try {
      return JSON.parse(area().getItem("puna." + name));
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      if (value === null) area().removeItem("puna." + name);
      else area().setItem("puna." + name, JSON.stringify(value));
      return true;
    } catch {
      notice("The browser could not store this: its storage is full or turned off. Export what you want to keep.");
      return false;
    }
  },
});
const store = kept(() => localStorage);
const tab = kept(() => sessionStorage);

const chats = new Map(); // id -> {id, title, system, updated, editing, messages: [{role, content, end, error, note}]}

/** A conversation with the fields and types that the page relies on, whatever was stored or imported. */
function cleanChat(raw, id) {
  const text = (value) => (typeof value === "string" ? value : "");
  const list = Array.isArray(raw?.messages) ? raw.messages : [];
  const messages = list.filter((m) => ["user", "assistant"].includes(m?.role)).map((m) => ({
    role: m.role, content: text(m.content), end: text(m.end) || "stopped", error: text(m.error), note: text(m.note),
  }));
  const { index, text: typed } = raw?.editing ?? {};
  const editing = messages[index]?.role === "user" ? { index, text: text(typed) } : null;
  const [title, system, updated] = [text(raw?.title), text(raw?.system), Number(raw?.updated) || 0];
  return { id, title, system, updated, editing, messages };
}

function loadChats() {
  try {
    for (const key of Object.keys(localStorage)) {
      const [, id] = /^puna\.chat\.(.+)$/.exec(key) ?? [];
      if (id) chats.set(id, cleanChat(store.get("chat." + id), id));
    }
  } catch {
    notice("This browser keeps nothing for this page: conversations end when it is closed.");
  }
}

const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2); // randomUUID needs https
const save = (some) => chats.has(some.id) && store.set("chat." + some.id, some);
const newest = () => [...chats.values()].sort((a, b) => b.updated - a.updated);
const firstLine = (text) => text.trim().split("\n")[0].slice(0, 60);
const titleOf = (some) => some.title || firstLine(some.messages[0]?.content ?? "") || "New conversation";
const message = (role, content) => ({ role, content, end: "", error: "", note: "" });

/** An empty conversation: the one that there is, or a new one. */
function blankChat(system = "") {
  const empty = newest().find((some) => !some.messages.length && !some.title && !store.get("draft." + some.id));
  const blank = empty ?? cleanChat({ system, updated: Date.now() }, newId());
  chats.set(blank.id, blank);
  save(blank);
  return blank;
}
