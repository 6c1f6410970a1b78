// The chat: sends, shows answers as they come, stops, edits and asks again.

import { conversation, request, settings } from "./conversation.js";
import { renderMarkdown } from "./markdown.js";
import { Refused, stream } from "./server.js";

const find = (id) => document.getElementById(id);
const list = find("messages");
const prompt = find("prompt");
let model = null;
// Stops the answer that comes now.
let running = null;

export function startChat() {
  for (const [index] of conversation.messages.entries()) list.append(view(index));
  showHint();
  showContext();
  bindForm();
  bindSettings();
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
  });
  list.scrollTop = list.scrollHeight;
}

export function useModel(found) {
  model = found;
  showContext();
}

function bindForm() {
  find("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return stop();
    send(prompt.value.trim(), conversation.messages.length);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "ArrowUp" && prompt.value === "" && editLast()) event.preventDefault();
    if (isEnter(event)) {
      event.preventDefault();
      find("form").requestSubmit();
    }
  });
  find("clear").addEventListener("click", () => {
    stop();
    cutFrom(0);
    prompt.focus();
  });
}

// Enter also ends the composing of a word, in the scripts that need it.
const isEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function bindSettings() {
  const fields = [find("system"), ...document.querySelectorAll("[data-setting]")];
  for (const field of fields) {
    const name = field.dataset.setting ?? "system";
    field.value = settings.values[name] ?? "";
    field.addEventListener("change", () => {
      if (field.checkValidity()) settings.set(name, field.value.trim());
      else field.reportValidity();
    });
  }
}

function stop() {
  running?.abort();
}

function cutFrom(index) {
  conversation.cut(index);
  while (list.querySelectorAll("article").length > index) list.lastElementChild.remove();
  showHint();
  showContext();
}

// Puts the user's words in place of the message at `index` and all after it, and asks.
function send(text, index) {
  if (text === "" || running) return;
  cutFrom(index);
  conversation.messages.push({ role: "user", content: text });
  list.append(view(index));
  if (prompt.value.trim() === text) prompt.value = "";
  answer(index + 1);
}

async function answer(index) {
  cutFrom(index);
  const message = { role: "assistant", content: "" };
  const body = request(model?.id);
  conversation.messages.push(message);
  const article = view(index);
  list.append(article);
  showHint();
  list.scrollTop = list.scrollHeight;
  article.setAttribute("aria-busy", "true");
  running = new AbortController();
  find("send").textContent = "Stop";
  const pace = new Pace();
  try {
    await take(message, article, body, pace);
    say(`Answered with ${pace.numTokens} tokens.`);
  } catch (error) {
    if (error.name === "AbortError") {
      message.note = ["stopped", message.note].filter(Boolean).join(" · ");
      say("Stopped.");
    } else {
      message.failed = true;
      message.note = error instanceof Refused ? error.message : `the page met an error: ${error.message}`;
      say(message.note);
    }
  }
  running = null;
  find("send").textContent = "Send";
  article.removeAttribute("aria-busy");
  show(article, message);
  conversation.save();
}

// Reads the answer to its end, shown once a frame of the screen at most.
async function take(message, article, body, pace) {
  let shown = 0;
  for await (const event of stream("v1/chat/completions", body, running.signal)) {
    const delta = event.choices[0]?.delta;
    if (delta?.reasoning_content) message.reasoning = (message.reasoning ?? "") + delta.reasoning_content;
    if (delta?.content) message.content += delta.content;
    if (delta?.content || delta?.reasoning_content) pace.tick();
    if (event.usage) {
      pace.numTokens = event.usage.completion_tokens;
      conversation.numTokens = event.usage.prompt_tokens + event.usage.completion_tokens;
      showContext();
    }
    message.note = pace.summary();
    if (performance.now() - shown > 16) {
      show(article, message);
      shown = performance.now();
    }
  }
}

// How fast an answer comes: tokens are counted by events until the server has said.
class Pace {
  constructor() {
    this.start = performance.now();
    this.first = this.last = null;
    this.numTokens = 0;
  }

  tick() {
    this.last = performance.now();
    this.first ??= this.last;
    this.numTokens += 1;
  }

  summary() {
    if (this.first === null) return "";
    const seconds = (this.last - this.first) / 1000;
    const rate = seconds > 0 ? `${((this.numTokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    const wait = `first after ${(this.first - this.start).toFixed(0)} ms`;
    return [`${this.numTokens} tokens`, rate, wait].filter(Boolean).join(" · ");
  }
}

function make(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function button(text, action) {
  const made = make("button", "", text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

// The element of the message at `index`.
function view(index) {
  const message = conversation.messages[index];
  const article = make("article", message.role);
  article.setAttribute("aria-label", message.role === "user" ? "You" : "Model");
  const actions = make("div", "actions");
  if (message.role === "user") actions.append(button("Edit", () => edit(article, index)));
  else actions.append(button("Retry", () => running || answer(index)));
  const foot = make("footer", "");
  foot.append(make("p", "note"), actions);
  article.append(make("div", "body"), foot);
  show(article, message);
  return article;
}

function show(article, message) {
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  const body = article.querySelector(".body");
  if (message.role === "user") body.textContent = message.content;
  else renderMarkdown(body, message.content);
  showThoughts(article, message.reasoning);
  article.classList.toggle("failed", Boolean(message.failed));
  article.querySelector(".note").textContent = message.note ?? "";
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function showThoughts(article, reasoning) {
  if (!reasoning) return;
  let thoughts = article.querySelector(".thoughts");
  if (!thoughts) {
    thoughts = make("details", "thoughts");
    thoughts.append(make("summary", "", "Thoughts"), make("p", ""));
    article.querySelector(".body").before(thoughts);
  }
  thoughts.lastElementChild.textContent = reasoning;
}

function edit(article, index) {
  if (running || article.querySelector("textarea")) return;
  const body = article.querySelector(".body");
  const field = document.createElement("textarea");
  field.value = conversation.messages[index].content;
  field.rows = Math.min(12, field.value.split("\n").length + 1);
  field.setAttribute("aria-label", "Edit the message");
  const end = () => {
    field.remove();
    body.hidden = false;
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      end();
      prompt.focus();
    }
    if (isEnter(event)) {
      event.preventDefault();
      send(field.value.trim(), index);
      prompt.focus();
    }
  });
  body.hidden = true;
  body.after(field);
  field.focus();
}

function editLast() {
  const articles = [...list.querySelectorAll("article")];
  const index = conversation.messages.findLastIndex((message) => message.role === "user");
  if (index < 0 || running) return false;
  edit(articles[index], index);
  return true;
}

function showHint() {
  find("hint").hidden = conversation.messages.length > 0;
}

function showContext() {
  const most = model?.max_model_len;
  find("context").hidden = !most || conversation.numTokens === 0;
  if (find("context").hidden) return;
  const meter = find("context-meter");
  Object.assign(meter, { max: most, high: most * 0.8, optimum: 0, value: conversation.numTokens });
  const count = (number) => number.toLocaleString("en");
  find("context-text").textContent = `${count(conversation.numTokens)} of ${count(most)} tokens of context`;
}

// For those who do not see the screen: a whole answer is announced, not each token.
function say(text) {
  find("said").textContent = text;
}
