// How elements are made: buttons, and the Markdown of replies.
// A reply is text that nobody has checked. It becomes DOM nodes by textContent and append alone, never by innerHTML.
"use strict";

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
// Each part ends at the next mark of its kind, so that no text takes long to search.
const INLINE = new RegExp(
  [
    /(`+)(?!`)(?<code>.+?)(?<!`)\1(?!`)/,
    /\*\*(?!\s)(?<bold>(?:[^*]|\*[^*]+\*)+)(?<!\s)\*\*/,
    /\*(?![\s*])(?<italic>[^*]+)(?<!\s)\*/,
    /\[(?<label>[^[\]]+)\]\((?<url>[^()\s]+)\)/,
    /\\(?<escaped>[*`\\[\]])/,
  ].map((part) => part.source).join("|"), "s");

/** Whether `line` goes on in the list that starts with `first`. */
function inList(line, first) {
  const [item, start] = [ITEM.exec(line), ITEM.exec(first)];
  if (!item || item[1].length > start[1].length + 1) return /^( {2,}|\t)/.test(line);
  return /\d/.test(item[2]) === /\d/.test(start[2]);
}

/** The blocks of a text: {kind: "code", "heading", "list" or "text", lines}. Only the last changes as text is added. */
function blocks(text) {
  const found = [];
  let open = null; // the block that the next line may belong to
  const start = (kind, line) => found.push((open = { kind, lines: [line] }));
  for (const line of text.split("\n")) {
    const fence = FENCE.exec(line);
    if (open?.kind === "code") {
      open.lines.push(line);
      if (fence?.[1].startsWith(FENCE.exec(open.lines[0])[1]) && !fence[2]) open = null;
    } else if (open?.kind === "list" && inList(line, open.lines[0])) open.lines.push(line);
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
  return make("div", { class: "code", dir: "ltr" }, bar, make("pre", { tabindex: 0 }, make("code", {}, code)));
}

function listNode(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push([line.slice(item[0].length)]);
    else items.at(-1).push(dedent(line, indent.length + mark.length + 1));
  }
  const ordered = /\d/.test(mark);
  const list = make(ordered ? "ol" : "ul", ordered ? { start: parseInt(mark) } : {});
  list.append(...items.map((item) => make("li", {}, ...itemNodes(item.join("\n"), depth))));
  return list;
}

/** `line` without its indentation, of which `most` characters are taken. */
const dedent = (line, most) => line.slice(Math.min(most, /^\s*/.exec(line)[0].length));

/** The first paragraph of an item stands in it without a <p>. */
function itemNodes(text, depth) {
  return blocks(text).flatMap((block, i) =>
    i === 0 && block.kind === "text" ? inline(block.lines.join("\n")) : [blockNode(block, depth + 1)]);
}

function inline(text) {
  const nodes = [];
  for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
    const { code, bold, italic, label, url, escaped } = found.groups;
    nodes.push(text.slice(0, found.index));
    if (code) nodes.push(make("code", {}, code));
    else if (bold) nodes.push(make("strong", {}, ...inline(bold)));
    else if (italic) nodes.push(make("em", {}, ...inline(italic)));
    else if (label) nodes.push(link(found[0], label, url));
    else nodes.push(escaped);
  }
  return [...nodes, text].filter((node) => node !== "");
}

function link(source, label, url) {
  if (!/^https?:\/\//i.test(url) || !URL.canParse(url)) return source;
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
