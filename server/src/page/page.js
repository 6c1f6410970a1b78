// The page: which view is shown, of which model, in which colours, and with what key.

import { startChat, useModel } from "./chat.js";
import { refresh, showOnly, watch } from "./live.js";
import { get, key } from "./server.js";

const find = (id) => document.getElementById(id);
const VIEWS = ["chat", "live"];
// No model is called so: a name is not empty.
const ALL = "";
const view = () => VIEWS.find((name) => location.hash === `#${name}`) ?? VIEWS[0];

function showView() {
  for (const name of VIEWS) {
    const isShown = name === view();
    find(name).hidden = !isShown;
    if (isShown) find(`to-${name}`).setAttribute("aria-current", "page");
    else find(`to-${name}`).removeAttribute("aria-current");
  }
  showChoice();
  if (view() === "chat") find("prompt").focus();
  else refresh();
}

const THEMES = { auto: "light", light: "dark", dark: "auto" };

function showTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  find("theme").textContent = `Theme: ${theme}`;
  find("theme").dataset.theme = theme;
  keep("theme", theme);
}

function keep(name, value) {
  try {
    localStorage.setItem(`fullbore.${name}`, value);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
}

function kept(name) {
  try {
    return localStorage.getItem(`fullbore.${name}`);
  } catch {
    return null;
  }
}

// As the server lists them; the first is who answers a request that names none.
let models = [];
// Which is meant, by view: the chat is with one, the live view may be of all.
const chosen = { chat: kept("model"), live: ALL };

// Of one model there is nothing to choose.
function showChoice() {
  find("choice").hidden = models.length < 2;
  const names = models.map((model) => model.id);
  const values = view() === "live" ? [ALL, ...names] : names;
  const options = values.map((value) => new Option(value === ALL ? "all" : value, value));
  find("models").replaceChildren(...options);
  find("models").value = chosen[view()];
  showModel();
}

function showModel() {
  const model = models.find(({ id }) => id === chosen[view()]);
  if (model) {
    const context = model.max_model_len.toLocaleString("en");
    find("model").textContent = `${model.id} on ${model.device}, ${context} tokens of context`;
  } else if (models.length > 0) find("model").textContent = `${models.length} models`;
}

function choose(value) {
  chosen[view()] = value;
  if (view() === "chat") {
    keep("model", value);
    useModel(models.find(({ id }) => id === value));
  } else showOnly(value === ALL ? null : value);
  showModel();
}

// Until the server has told what it serves.
async function connect() {
  try {
    models = (await get("v1/models")).data;
    find("key-field").hidden = true;
    if (!models.some(({ id }) => id === chosen.chat)) chosen.chat = models[0].id;
    if (models.length === 1) chosen.live = models[0].id;
    useModel(models.find(({ id }) => id === chosen.chat));
    showChoice();
  } catch (error) {
    find("key-field").hidden = error.status !== 401;
    find("model").textContent = error.message;
    setTimeout(connect, 1000);
  }
}

addEventListener("hashchange", showView);
find("theme").addEventListener("click", () => showTheme(THEMES[find("theme").dataset.theme]));
find("models").addEventListener("change", () => choose(find("models").value));
find("key").addEventListener("change", () => key.set(find("key").value.trim()));
showTheme(kept("theme") in THEMES ? kept("theme") : "auto");
startChat();
showView();
connect();
watch(() => view() === "live");
