// Markdown to DOM nodes. What a model says is shown, never run: nodes are made by name from a fixed list and
// text only ever becomes text. No images (they would be requests); links open elsewhere, http and https only.
// Linear in practice, and nesting is bounded, so that no answer can hang or overflow the page.

import { h } from "./dom.js";

const DEPTH = 6;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}(?:(?:\* ?){3,}|(?:- ?){3,}|(?:_ ?){3,})$/;
const ITEM = /^( {0,3})([-*+]|(\d{1,9})[.)])(\s+|$)/;
const TABLE = /^ *\|?(?: *:?-+:? *\|)+ *(?::?-+:? *)?$/;
const QUOTE = /^ {0,3}> ?/;

/** Show `text` in `node`; blocks that did not change since the last call keep their elements. */
export function render(text, node) {
  const blocks = split(text.replace(/\r\n?/g, "\n").split("\n"));
  const old = node.blocks ?? [];
  let same = 0;
  while (same < blocks.length && same < old.length && blocks[same].key === old[same].key) same++;
  for (const block of old.slice(same)) block.node.remove();
  for (const block of blocks.slice(same)) node.append((block.node = block.make()));
  node.blocks = [...old.slice(0, same), ...blocks.slice(same)];
}

/** Lines to blocks: {key, make}; equal keys make equal elements. */
function split(lines, depth = 0) {
  const blocks = [];
  const add = (kind, from, to, make) => blocks.push({ key: kind + lines.slice(from, to).join("\n"), make });
  let i = 0;
  while (i < lines.length) {
    const start = i;
    const line = lines[i];
    let found;
    if (!line.trim()) {
      i++;
    } else if ((found = FENCE.exec(line))) {
      const [, fence, language] = found;
      for (i++; i < lines.length && !closes(lines[i], fence); ) i++;
      const code = lines.slice(start + 1, i).join("\n");
      i = Math.min(i + 1, lines.length);
      add("code", start, i, () => h("pre", { "data-language": language || null, tabindex: 0 }, h("code", { text: code })));
    } else if ((found = HEADING.exec(line))) {
      const [, marks, title] = found;
      i++;
      // The page has its own h1 and h2.
      add("heading", start, i, () => inline(title, h(`h${Math.min(marks.length + 2, 6)}`)));
    } else if (RULE.test(line)) {
      i++;
      add("rule", start, i, () => h("hr"));
    } else if (depth < DEPTH && QUOTE.test(line)) {
      while (i < lines.length && QUOTE.test(lines[i])) i++;
      const inner = lines.slice(start, i).map((text) => text.replace(QUOTE, ""));
      add("quote", start, i, () => h("blockquote", {}, ...nodes(inner, depth + 1)));
    } else if (depth < DEPTH && (found = ITEM.exec(line))) {
      const ordered = found[3] !== undefined;
      const items = [];
      i = readItems(lines, i, ordered, items);
      const first = found[3];
      add("list", start, i, () =>
        h(ordered ? "ol" : "ul", { start: ordered && first !== "1" ? first : null }, ...items.map((item) => listItem(item, depth))),
      );
    } else if (line.includes("|") && TABLE.test(lines[i + 1] ?? "")) {
      for (i += 2; i < lines.length && lines[i].includes("|"); ) i++;
      const rows = [line, ...lines.slice(start + 2, i)].map(cells);
      add("table", start, i, () => table(rows));
    } else {
      for (i++; i < lines.length && !breaks(lines, i, depth); ) i++;
      const paragraph = lines.slice(start, i).join("\n");
      add("paragraph", start, i, () => inline(paragraph, h("p")));
    }
  }
  return blocks;
}

const nodes = (lines, depth) => split(lines, depth).map((block) => block.make());
const closes = (line, fence) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");

function breaks(lines, i, depth) {
  const line = lines[i];
  if (!line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
  return (depth < DEPTH && (QUOTE.test(line) || ITEM.test(line))) || (line.includes("|") && TABLE.test(lines[i + 1] ?? ""));
}

/** Collect the lines of each item from line `i` on into `items`; return the line after the list. */
function readItems(lines, i, ordered, items) {
  while (i < lines.length) {
    const found = ITEM.exec(lines[i]);
    if (!found || (found[3] !== undefined) !== ordered || RULE.test(lines[i])) break;
    const indent = Math.min(found[0].length, found[1].length + found[2].length + 4);
    const item = [lines[i].slice(found[0].length)];
    for (i++; i < lines.length; i++) {
      const line = lines[i];
      const blank = !line.trim();
      const inside = /^\s/.test(line) && line.length - line.trimStart().length >= Math.min(indent, 2);
      const after = lines[i + 1] ?? "";
      if (blank ? !/^\s+\S/.test(after) : !inside && (breaks(lines, i, 0) || !lines[i - 1].trim())) break;
      item.push(inside ? line.slice(Math.min(indent, line.length - line.trimStart().length)) : line);
    }
    items.push(item);
    if (i < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1] ?? "")) i++;
  }
  return i;
}

/** A short item is text alone, without a paragraph around it. */
function listItem(lines, depth) {
  const made = nodes(lines, depth + 1);
  const content = made.flatMap((node, i) => (i === 0 && node.tagName === "P" ? [...node.childNodes] : [node]));
  return h("li", {}, ...content);
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table([head, ...rows]) {
  const row = (texts, tag) => h("tr", {}, ...head.map((_, i) => inline(texts[i] ?? "", h(tag))));
  const body = rows.map((texts) => row(texts, "td"));
  return h("div", { class: "table", tabindex: 0 }, h("table", {}, h("thead", {}, row(head, "th")), h("tbody", {}, ...body)));
}

const PAIRS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const WORD = /[\p{L}\p{N}]/u;

/** Append `text` to `node` with emphasis, code and links made into elements. */
function inline(text, node, depth = 0) {
  const absent = new Set(); // closing marks that do not come any more: looked for once
  let plain = "";
  const flush = () => {
    if (plain) node.append(plain);
    plain = "";
  };
  const element = (made) => {
    flush();
    node.append(made);
  };
  const seek = (mark, from) => {
    if (absent.has(mark)) return -1;
    const at = text.indexOf(mark, from);
    if (at < 0) absent.add(mark);
    return at;
  };
  for (let i = 0; i < text.length; ) {
    const c = text[i];
    if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
      continue;
    }
    if (c === "\n" && plain.endsWith("  ")) {
      plain = plain.trimEnd();
      element(h("br"));
      i++;
      continue;
    }
    if (c === "`") {
      let n = 1;
      while (text[i + n] === "`") n++;
      const mark = "`".repeat(n);
      const end = seek(mark, i + n);
      if (end > 0) element(h("code", { text: text.slice(i + n, end).trim() }));
      else plain += mark;
      i = end > 0 ? end + n : i + n;
      continue;
    }
    const linked = c === "[" || c === "h" ? link(text, i, seek) : null;
    if (linked) {
      element(h("a", { href: linked.url, rel: "noopener noreferrer nofollow", target: "_blank", text: linked.label }));
      i = linked.end;
      continue;
    }
    const pair = depth < DEPTH && "*_~".includes(c) ? PAIRS.find(([mark]) => text.startsWith(mark, i)) : null;
    if (pair) {
      const end = closing(text, i, pair[0], seek);
      if (end > 0) {
        element(inline(text.slice(i + pair[0].length, end), h(pair[1]), depth + 1));
        i = end + pair[0].length;
      } else {
        plain += pair[0];
        i += pair[0].length;
      }
      continue;
    }
    plain += c;
    i++;
  }
  flush();
  return node;
}

/** Where the emphasis that `mark` opens at `i` ends, or -1. */
function closing(text, i, mark, seek) {
  const from = i + mark.length;
  if (/\s|^$/.test(text[from] ?? "") || (mark[0] === "_" && WORD.test(text[i - 1] ?? ""))) return -1;
  for (let at = seek(mark, from + 1), tries = 0; at > 0 && tries < 8; at = seek(mark, at + 1), tries++) {
    const inWord = mark[0] === "_" && WORD.test(text[at + mark.length] ?? "");
    const double = mark.length === 1 && (text[at + 1] === mark || text[at - 1] === mark);
    if (!/\s/.test(text[at - 1]) && !inWord && !double) return at;
  }
  return -1;
}

/** [label](url) or a bare address at `i`. */
function link(text, i, seek) {
  if (text[i] === "h") {
    if (!/^https?:\/\//.test(text.slice(i, i + 8)) || WORD.test(text[i - 1] ?? "")) return null;
    const bare = /^[^\s<>"'`*]+/.exec(text.slice(i, i + 2000))[0].replace(/[).,;:!?\]]+$/, "");
    return web(bare) && { label: bare, url: bare, end: i + bare.length };
  }
  const middle = seek("](", i + 1);
  const end = middle > 0 && middle - i < 500 ? seek(")", middle + 2) : -1;
  if (end < 0 || end - middle > 2000) return null;
  const label = text.slice(i + 1, middle);
  const url = text.slice(middle + 2, end).trim().split(/\s/)[0];
  return web(url) && !label.includes("[") ? { label: label || url, url, end: end + 1 } : null;
}

function web(url) {
  try {
    return /^https?:\/\//i.test(url) && /^https?:$/.test(new URL(url).protocol);
  } catch {
    return false;
  }
}
