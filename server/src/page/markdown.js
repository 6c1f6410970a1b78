// Markdown as models write it, into elements.
//
// Safe by construction: what the model says becomes text nodes; elements are those named here; a link leads to http,
// https or mailto. Its time is linear in the text but for a factor of the nesting, which is bounded. There are no
// images: one becomes a link.

const MAX_DEPTH = 8;
// Longer ones are no labels or addresses, but brackets in a text.
const MAX_LINK = 2000;

// What each element of a container was made of, so that a text that grows is rendered from where it differs.
const sources = new WeakMap();

export function renderMarkdown(container, text) {
  const blocks = splitBlocks(text.replaceAll("\r\n", "\n").split("\n"), 0);
  let same = 0;
  while (same < blocks.length && sources.get(container.children[same]) === blocks[same].source) same += 1;
  while (container.children.length > same) container.lastElementChild.remove();
  for (const block of blocks.slice(same)) {
    const made = block.make();
    sources.set(made, block.source);
    container.append(made);
  }
}

const element = (name, ...children) => {
  const made = document.createElement(name);
  made.append(...children);
  return made;
};

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?! )|[ \t]+|$)/;

const isBlank = (line) => line.trim() === "";
const startsBlock = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));

// The blocks of these lines, each with its source and how to make its element.
function splitBlocks(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [end, make] = takeBlock(lines, at, depth);
    blocks.push({ source: lines.slice(at, end).join("\n"), make });
    at = end;
  }
  return blocks;
}

const makeAll = (lines, depth) => splitBlocks(lines, depth).map((block) => block.make());

// Where the block that begins at `at` ends, and its maker.
function takeBlock(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return takeCode(lines, at);
  if (HEADING.test(line)) return [at + 1, () => heading(line)];
  if (RULE.test(line)) return [at + 1, () => element("hr")];
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(line)) return takeQuote(lines, at, depth);
    if (ITEM.test(line)) return takeList(lines, at, depth);
  }
  if (isTable(lines, at)) return takeTable(lines, at);
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines[end]) && !isTable(lines, end)) end += 1;
  return [end, () => inline(element("p"), lines.slice(at, end).map((text) => text.trim()).join("\n"), depth)];
}

function takeCode(lines, at) {
  const [, fence, language] = FENCE.exec(lines[at]);
  const closes = (line) => {
    const text = line.trim();
    return text.length >= fence.length && text === fence[0].repeat(text.length);
  };
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).join("\n");
  return [Math.min(end + 1, lines.length), () => codeBlock(text, language)];
}

function codeBlock(text, language) {
  const head = element("header", element("span", language));
  // A page that came over plain HTTP from elsewhere may not write to the clipboard.
  if (navigator.clipboard) {
    const copy = element("button", "Copy");
    copy.type = "button";
    copy.addEventListener("click", () => navigator.clipboard.writeText(text));
    head.append(copy);
  }
  const made = element("div", head, element("pre", element("code", text)));
  made.className = "code";
  return made;
}

function heading(line) {
  const [, marks, text] = HEADING.exec(line);
  return inline(element(`h${marks.length}`), text.replace(/\s#+\s*$/, "").trim(), 0);
}

function takeQuote(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(/^ {0,3}> ?/, ""));
  return [end, () => element("blockquote", ...makeAll(inner, depth + 1))];
}

const isOrdered = (marker) => /\d/.test(marker);

function takeList(lines, at, depth) {
  const ordered = isOrdered(ITEM.exec(lines[at])[2]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    if (!found || isOrdered(found[2]) !== ordered || RULE.test(lines[end])) break;
    const width = found[1].length + found[2].length + (found[3]?.length ?? 1);
    const inner = [lines[end].slice(width)];
    end += 1;
    while (end < lines.length && belongsToItem(lines, end, width)) {
      inner.push(dedent(lines[end], width));
      end += 1;
    }
    items.push({ inner, number: parseInt(found[2], 10) });
    while (end + 1 < lines.length && isBlank(lines[end]) && ITEM.test(lines[end + 1])) end += 1;
  }
  return [end, () => {
    const list = element(ordered ? "ol" : "ul", ...items.map((item) => element("li", ...itemParts(item.inner, depth))));
    if (ordered && items[0].number !== 1) list.start = items[0].number;
    return list;
  }];
}

// An item of one paragraph is set without one.
function itemParts(inner, depth) {
  const parts = makeAll(inner, depth + 1);
  return parts.length > 0 && parts[0].tagName === "P" ? [...parts[0].childNodes, ...parts.slice(1)] : parts;
}

const indentOf = (line) => line.length - line.trimStart().length;
const dedent = (line, width) => line.slice(Math.min(width, indentOf(line)));

function belongsToItem(lines, at, width) {
  if (isBlank(lines[at])) return at + 1 < lines.length && !isBlank(lines[at + 1]) && indentOf(lines[at + 1]) >= width;
  // The second half: a line that goes on with the paragraph above, as models break them.
  return indentOf(lines[at]) >= Math.min(width, 2) || !(startsBlock(lines[at]) || isBlank(lines[at - 1]));
}

const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const below = cells(lines[at + 1]);
  return below.length === cells(lines[at]).length && below.every((cell) => /^:?-+:?$/.test(cell));
}

function takeTable(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const row = (line, name) => element("tr", ...cells(line).map((cell) => inline(element(name), cell, 1)));
  const rest = lines.slice(at + 2, end);
  return [end, () => element("table", element("thead", row(lines[at], "th")),
    element("tbody", ...rest.map((line) => row(line, "td"))))];
}

const MARKS = [["***", ["strong", "em"]], ["**", ["strong"]], ["__", ["strong"]], ["~~", ["del"]], ["*", ["em"]],
  ["_", ["em"]]];
const isWord = (letter) => letter !== undefined && /[\p{L}\p{N}]/u.test(letter);
const isSpace = (letter) => letter === undefined || /\s/.test(letter);

// Puts text with its emphasis, code and links into `parent`.
function inline(parent, text, depth) {
  // Marks that nothing closes any more.
  const unclosed = new Set();
  let plain = "";
  let at = 0;
  const put = (...nodes) => {
    parent.append(plain, ...nodes);
    plain = "";
  };
  while (at < text.length) {
    const found = depth < MAX_DEPTH ? span(text, at, depth, unclosed) : null;
    if (found) {
      put(found.node);
      at = found.end;
    } else if (text[at] === "\n") {
      put(element("br"));
      at += 1;
    } else if (text[at] === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else {
      // The rest of a run of marks is no mark of its own.
      let end = at + 1;
      while ("*_~`".includes(text[at]) && text[end] === text[at]) end += 1;
      plain += text.slice(at, end);
      at = end;
    }
  }
  put();
  return parent;
}

function span(text, at, depth, unclosed) {
  switch (text[at]) {
    case "`": return code(text, at, unclosed);
    case "!": return text[at + 1] === "[" ? link(text, at + 1, depth) : null;
    case "[": return link(text, at, depth);
    case "h": return isWord(text[at - 1]) ? null : address(text, at);
    case "*": case "_": case "~": return emphasis(text, at, depth, unclosed);
    default: return null;
  }
}

function code(text, at, unclosed) {
  let length = 1;
  while (text[at + length] === "`") length += 1;
  const run = "`".repeat(length);
  if (unclosed.has(run)) return null;
  for (let end = text.indexOf(run, at + length); end >= 0; end = text.indexOf(run, end)) {
    let found = length;
    while (text[end + found] === "`") found += 1;
    if (found === length) {
      const inner = text.slice(at + length, end).replaceAll("\n", " ");
      const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim() !== "";
      return { node: element("code", padded ? inner.slice(1, -1) : inner), end: end + length };
    }
    end += found;
  }
  unclosed.add(run);
  return null;
}

function emphasis(text, at, depth, unclosed) {
  const [mark, names] = MARKS.find(([mark]) => text.startsWith(mark, at)) ?? [];
  if (!mark || unclosed.has(mark) || isSpace(text[at + mark.length])) return null;
  if (mark[0] === "_" && isWord(text[at - 1])) return null;
  let end = text.indexOf(mark, at + mark.length + 1);
  while (end >= 0 && !closes(text, end, mark)) end = text.indexOf(mark, end + 1);
  if (end < 0) {
    unclosed.add(mark);
    return null;
  }
  const [outer, inner] = names.map((name) => element(name));
  if (inner) outer.append(inner);
  inline(inner ?? outer, text.slice(at + mark.length, end), depth + 1);
  return { node: outer, end: end + mark.length };
}

function closes(text, at, mark) {
  const after = text[at + mark.length];
  if (isSpace(text[at - 1]) || (mark[0] === "_" && isWord(after))) return false;
  // A single star is no half of two.
  return mark.length > 1 ? after !== mark[0] : after !== mark && text[at - 1] !== mark;
}

function link(text, at, depth) {
  const near = text.slice(at, at + MAX_LINK);
  const middle = near.indexOf("](");
  const end = near.indexOf(")", middle);
  if (middle < 0 || end < 0) return null;
  const [target] = near.slice(middle + 2, end).trim().split(/\s/);
  const made = anchor(target);
  return made && { node: inline(made, near.slice(1, middle), Math.max(depth + 1, MAX_DEPTH - 1)), end: at + end + 1 };
}

// An address in the text, without the full stop that ends its sentence.
function address(text, at) {
  const found = /^https?:\/\/[^\s<>"`]+/.exec(text.slice(at, at + MAX_LINK));
  const target = found?.[0].replace(/[.,;:!?)'*_]{1,100}$/, "");
  const made = target && anchor(target);
  return made ? { node: (made.append(target), made), end: at + target.length } : null;
}

function anchor(target) {
  if (!URL.canParse(target)) return null;
  const url = new URL(target);
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  const made = element("a");
  made.href = url.href;
  made.title = url.href;
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}
