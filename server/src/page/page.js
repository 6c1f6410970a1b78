// The page: which view is shown, in which colours, and with what key.

import { startChat, useModel } from "./chat.js";
import { refresh, watch } from "./live.js";
import { get, key } from "./server.js";

const find = (id) => document.getElementById(id);
const VIEWS = ["chat", "live"];
const view = () => VIEWS.find((name) => location.hash === `#${name}`) ?? VIEWS[0];

function showView() {
  for (const name of VIEWS) {
    const isShown = name === view();
    find(name).hidden = !isShown;
    if (isShown) find(`to-${name}`).setAttribute("aria-current", "page");
    else find(`to-${name}`).removeAttribute("aria-current");
  }
  if (view() === "chat") find("prompt").focus();
  else refresh();
}

const THEMES = { auto: "light", light: "dark", dark: "auto" };

function showTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  find("theme").textContent = `Theme: ${theme}`;
  find("theme").dataset.theme = theme;
  try {
    localStorage.setItem("fullbore.theme", theme);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
}

function savedTheme() {
  try {
    return localStorage.getItem("fullbore.theme");
  } catch {
    return null;
  }
}

// Until the server has told what it serves.
async function connect() {
  try {
    const [model] = (await get("v1/models")).data;
    find("key-field").hidden = true;
    const context = model.max_model_len.toLocaleString("en");
    find("model").textContent = `${model.id} on ${model.device}, ${context} tokens of context`;
    useModel(model);
  } catch (error) {
    find("key-field").hidden = error.status !== 401;
    find("model").textContent = error.message;
    setTimeout(connect, 1000);
  }
}

addEventListener("hashchange", showView);
find("theme").addEventListener("click", () => showTheme(THEMES[find("theme").dataset.theme]));
find("key").addEventListener("change", () => key.set(find("key").value.trim()));
showTheme(savedTheme() in THEMES ? savedTheme() : "auto");
startChat();
showView();
connect();
watch(() => view() === "live");
