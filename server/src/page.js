// The chat page: streams answers of /v1/chat/completions and shows how fast they come.
"use strict";

const element = (id) => document.getElementById(id);
let messages = [];
let controller = null;
let model = null;

// The key is kept for this tab alone.
function headers(more) {
  const key = sessionStorage.getItem("key");
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function connect() {
  try {
    const reply = await fetch("v1/models", { headers: headers({}) });
    const body = await reply.json();
    element("key-field").hidden = reply.status !== 401;
    if (!reply.ok) throw new Error(body.error.message);
    model = body.data[0];
    element("model").textContent = `${model.id} on ${model.device}, ${model.max_model_len} tokens of context`;
  } catch (error) {
    element("model").textContent = error.message;
    setTimeout(connect, 1000);
  }
}

function show(kind, text) {
  element("hint").hidden = true;
  const article = document.createElement("article");
  article.className = kind;
  const body = document.createElement("span");
  body.textContent = text;
  const note = document.createElement("small");
  article.append(body, note);
  element("messages").append(article);
  article.scrollIntoView({ block: "end" });
  return { article, body, note };
}

// The data of each event of a reply, as it arrives.
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const frames = (buffer + value).split("\n\n");
    buffer = frames.pop();
    for (const frame of frames) {
      const data = frame.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function ask() {
  const body = { model: model?.id, messages, stream: true, stream_options: { include_usage: true } };
  const temperature = element("temperature").value;
  if (temperature !== "") body.temperature = Number(temperature);
  const maxTokens = element("max-tokens").value;
  if (maxTokens !== "") body.max_completion_tokens = Number(maxTokens);
  return fetch("v1/chat/completions", {
    method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body), signal: controller.signal,
  });
}

// How fast an answer comes: tokens are counted by the server where it has said, else by events.
function speed(state) {
  const seconds = (state.last - state.first) / 1000;
  return seconds > 0 ? `${((state.tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
}

// What the line below an answer says.
function summary(state) {
  const wait = `first after ${(state.first - state.start).toFixed(0)} ms`;
  return [`${state.tokens} tokens`, speed(state), wait].filter(Boolean).join(" · ");
}

async function answer(view) {
  const state = { start: performance.now(), first: null, last: null, tokens: 0 };
  const reply = await ask();
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  for await (const event of events(reply)) {
    if (event.error) throw new Error(event.error.message);
    const text = event.choices[0]?.delta.content;
    if (text) {
      state.last = performance.now();
      state.first ??= state.last;
      state.tokens += 1;
      view.body.textContent += text;
      view.article.scrollIntoView({ block: "end" });
    }
    if (event.usage) state.tokens = event.usage.completion_tokens;
    if (state.first !== null) {
      view.note.textContent = summary(state);
      element("engine").textContent = speed(state);
    }
  }
}

async function submit(event) {
  event.preventDefault();
  if (controller) return controller.abort();
  const text = element("prompt").value.trim();
  if (!text) return;
  element("prompt").value = "";
  const chat = messages;
  chat.push({ role: "user", content: text });
  show("user", text);
  const view = show("assistant", "");
  controller = new AbortController();
  element("send").textContent = "Stop";
  try {
    await answer(view);
  } catch (error) {
    if (error.name !== "AbortError") {
      view.article.className = "error";
      view.note.textContent = error.message;
    }
  }
  if (view.body.textContent) chat.push({ role: "assistant", content: view.body.textContent });
  else chat.pop();
  controller = null;
  element("send").textContent = "Send";
}

function clear() {
  controller?.abort();
  messages = [];
  document.querySelectorAll("article").forEach((article) => article.remove());
  element("hint").hidden = false;
}

element("form").addEventListener("submit", submit);
element("clear").addEventListener("click", clear);
element("key").addEventListener("change", () => sessionStorage.setItem("key", element("key").value.trim()));
element("prompt").addEventListener("keydown", (event) => {
  // Enter also ends the composing of a word, in the scripts that need it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
connect();
