// What has been said, and how the model is asked: kept in this browser from one visit to the next.

const PLACE = "fullbore.conversation";
const SETTINGS = "fullbore.settings";

function read(place, fallback) {
  try {
    return JSON.parse(localStorage.getItem(place)) ?? fallback;
  } catch {
    return fallback;
  }
}

function keep(place, value) {
  try {
    localStorage.setItem(place, JSON.stringify(value));
  } catch {
    // Storage that is full or forbidden: the page works without, until it is closed.
  }
}

const saved = read(PLACE, {});

// A message is {role, content}; an answer may have {reasoning, note, failed} too.
export const conversation = {
  messages: Array.isArray(saved.messages) ? saved.messages : [],
  // Tokens of the last prompt and its answer.
  numTokens: saved.numTokens ?? 0,
  save() {
    keep(PLACE, { messages: this.messages, numTokens: this.numTokens });
  },
  // Forgets the message at `index` and all after it.
  cut(index) {
    this.messages.length = index;
    if (index === 0) this.numTokens = 0;
    this.save();
  },
};

// By the names of the API; `system` is the system prompt.
export const settings = {
  values: read(SETTINGS, {}),
  set(name, value) {
    if (value === "") delete this.values[name];
    else this.values[name] = value;
    keep(SETTINGS, this.values);
  },
};

// The body that asks for the next answer.
export function request(model) {
  const { system, ...sampling } = settings.values;
  const messages = [];
  for (const { role, content, failed } of conversation.messages) {
    if (content === "" || failed) continue;
    // Two of the user's, where no answer came between: many templates want turns.
    if (messages.at(-1)?.role === role) messages.at(-1).content += `\n\n${content}`;
    else messages.push({ role, content });
  }
  if (system) messages.unshift({ role: "system", content: system });
  const numbers = Object.fromEntries(Object.entries(sampling).map(([name, value]) => [name, Number(value)]));
  return { model, messages, stream: true, stream_options: { include_usage: true }, ...numbers };
}
