// The live view: where each engine's device time goes, and how its work goes, over the last minutes.

import { Chart, roundUp } from "./chart.js";
import { History, perDevice, perSecond, rowsPerStep, shareOfAll, shares } from "./history.js";
import { get } from "./server.js";

const PERIOD_MS = 1000;
// The verdict is of so long.
const WINDOW_MS = 60_000;
const NUM_RATE_FRAMES = 5;
const NAMES = {
  computing: "computing", no_requests: "no requests", kv_memory: "waits for KV memory", slots: "waits for slots",
  latency_target: "latency target", step_budget: "step budget", shared_prefix: "shared prefix",
  grammar_memory: "grammar memory", tenant_cap: "tenant caps", host_schedule: "host: schedule",
  host_record: "host: record", host_upload: "host: upload", host_read_back: "host: read back",
  neighbour: "neighbour", device_lost: "device lost",
};

const root = document.getElementById("live");
const note = document.getElementById("live-note");
// By model.
const panels = new Map();
// The model whose panel alone is shown; `null` is all.
let only = null;

// Asks once a second while somebody looks.
export async function watch(isWatched) {
  for (;;) {
    if (isWatched() && !document.hidden) await refresh();
    await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
  }
}

export async function refresh() {
  const newest = Math.min(...[...panels.values()].map((panel) => panel.history.newest));
  try {
    const live = await get(`v1/live?after=${panels.size > 0 ? newest : 0}`);
    note.textContent = "";
    live.engines.forEach((engine) => panelOf(engine, live.causes).update(engine));
  } catch (error) {
    note.textContent = error.message;
  }
}

export function showOnly(model) {
  only = model;
  panels.forEach((panel, name) => panel.show(only === null || name === only));
}

function panelOf(engine, causes) {
  if (!panels.has(engine.model)) {
    panels.set(engine.model, new Panel(engine, causes));
    showOnly(only);
  }
  return panels.get(engine.model);
}

function make(name, className, ...children) {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children);
  return made;
}

const count = (number) => number.toLocaleString("en", { maximumFractionDigits: number < 10 ? 1 : 0 });
const milliseconds = (ms) => (ms === null ? "–" : ms < 1000 ? `${count(ms)} ms` : `${count(ms / 1000)} s`);

class Panel {
  constructor(engine, causes) {
    this.history = new History();
    this.causes = causes;
    // What there was nothing to do for is on top, as the sky over the rest.
    this.order = [...causes.keys()].sort((a, b) => (causes[a] === "no_requests") - (causes[b] === "no_requests"));
    this.verdict = make("p", "verdict");
    this.changed = make("p", "unseen");
    this.changed.setAttribute("role", "status");
    this.time = new TimeCard(this);
    const cards = CARDS.filter(({ isOf }) => !isOf || isOf(engine));
    this.cards = cards.map((about) => new Card(about, engine, (x) => this.point(x)));
    this.at = null;
    const heading = make("h2", "", `${engine.model} on ${engine.device.name}`);
    const grid = make("div", "cards", ...this.cards.map((card) => card.element));
    this.element = make("section", "panel", heading, this.verdict, this.changed, this.time.element, grid);
    root.append(this.element);
  }

  show(isShown) {
    this.element.hidden = !isShown;
  }

  update(engine) {
    this.history.add(engine.frames);
    const [what, ...rest] = engine.verdict.split(": ");
    this.verdict.replaceChildren(make("strong", `cause ${engine.limit}`, what), ` ${rest.join(": ")}`);
    // Its numbers change every second; those who listen hear when its cause does.
    if (this.changed.dataset.limit !== engine.limit) this.changed.textContent = engine.verdict;
    this.changed.dataset.limit = engine.limit;
    this.engine = engine;
    this.draw();
  }

  // All charts show the moment that one is pointed at; `null` is now.
  point(x) {
    this.at = x;
    this.draw();
  }

  draw() {
    const { newest, shown, span } = this.history;
    const xs = shown.map((frame) => 1 - (newest - frame.at_ms) / span);
    const index = this.at === null ? shown.length - 1 : nearest(xs, this.at);
    const cursor = this.at === null || index < 0 ? null : xs[index];
    const now = { frames: shown, xs, index, cursor, span };
    this.time.draw(now, this.history);
    this.cards.forEach((card) => card.draw(now, this.engine));
  }
}

function nearest(xs, x) {
  let found = -1;
  xs.forEach((other, index) => {
    if (found < 0 || Math.abs(other - x) < Math.abs(xs[found] - x)) found = index;
  });
  return found;
}

// Calls `point` with the place that is pointed at, or walked to by the arrow keys.
function pointable(chart, point) {
  const box = chart.element;
  let key = null;
  box.addEventListener("pointermove", (event) => {
    const { left, width } = box.getBoundingClientRect();
    point((event.clientX - left) / width);
  });
  box.addEventListener("pointerleave", () => point(null));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -0.01, ArrowRight: 0.01 }[event.key];
    if (!step) return;
    event.preventDefault();
    key = Math.min(1, Math.max(0, (key ?? 1) + step));
    point(key);
  });
  box.addEventListener("blur", () => {
    key = null;
    point(null);
  });
}

const ago = (now) => (now.cursor === null ? "" : `${Math.round((1 - now.cursor) * now.span / 1000)} s ago`);

// Where the device's time went.
class TimeCard {
  constructor(panel) {
    const { causes, order } = panel;
    Object.assign(this, { causes, order });
    const bands = order.map((cause) => causes[cause]);
    this.chart = new Chart("Shares of the device's time by cause", { bands });
    this.chart.element.setAttribute("tabindex", "0");
    pointable(this.chart, (x) => panel.point(x));
    this.when = make("span", "when");
    this.begin = make("span", "");
    const axis = make("p", "axis", this.begin, make("span", "", "now"));
    this.legend = make("ul", "legend");
    this.entries = order.map((cause) => {
      const name = causes[cause];
      const entry = make("li", "", make("i", `swatch ${name}`), NAMES[name] ?? name, make("b", ""));
      return entry;
    });
    const heading = make("h3", "", "Where the device's time goes ", this.when);
    this.element = make("section", "card time", heading, this.chart.element, axis, this.legend);
  }

  draw(now, history) {
    const all = shares(now.frames);
    this.chart.draw(now.xs, { bands: this.order.map((cause) => all.map((share) => share[cause])), most: 1 });
    this.chart.point(now.cursor);
    const lately = history.frames.filter((frame) => frame.at_ms > history.newest - WINDOW_MS);
    const listed = now.cursor === null ? shareOfAll(lately) : all[now.index];
    this.when.textContent = now.cursor === null ? "last minute" : ago(now);
    this.begin.textContent = `${now.span / 60_000} min ago`;
    this.entries.forEach((entry, index) => {
      entry.lastElementChild.textContent = ` ${((listed[this.order[index]] ?? 0) * 100).toFixed(1)} %`;
    });
    // Each cause that has been seen stays in its place.
    const seen = (cause) => all.some((share) => share[cause] > 0.001);
    const wanted = this.entries.filter((_, index) => seen(this.order[index]));
    if (wanted.some((entry, index) => this.legend.children[index] !== entry)) this.legend.replaceChildren(...wanted);
    if (wanted.length === 0) this.legend.replaceChildren();
  }
}

const series = (frames, of) => frames.map(of);
const most = (rows) => roundUp(Math.max(...rows.flat().map((value) => value ?? 0)));
const latency = (title, name) => ({
  title,
  lines: ["p99", "p95", "p50"],
  draw(frames) {
    const lines = ["p99", "p95", "p50"].map((p) => series(frames, (frame) => frame[name]?.[p] ?? null));
    return { lines, most: most(lines) };
  },
  words: (frame) => ["p50", "p95", "p99"].map((p) => [p, milliseconds(frame[name]?.[p] ?? null), p]),
  top: milliseconds,
});

const rate = (title, name) => ({
  title,
  bands: [name],
  draw(frames) {
    const bands = [series(frames, (frame) => perSecond([frame], `${name}_tokens`))];
    return { bands, most: most(bands) };
  },
  // Of some seconds, for a step may take more than one.
  words: (frame, engine, lately) => [[name, count(perSecond(lately, `${name}_tokens`)), "tokens a second"]],
});

// A line for each device, where there are several; as many as there are colours.
const DEVICE_LINES = [...Array(8).keys()].map((index) => `device-${index}`);
const byDevice = {
  title: "Generated by device",
  isOf: (engine) => engine.devices.length > 1,
  lines: DEVICE_LINES,
  draw(frames, engine) {
    const lines = engine.devices.slice(0, DEVICE_LINES.length).map((_, index) =>
      series(frames, (frame) => perDevice([frame], index)));
    return { lines, most: most(lines) };
  },
  words: (frame, engine, lately) => engine.devices.map(({ id }, index) =>
    [`device-${index}`, count(perDevice(lately, index)), `tokens a second on ${id}`]),
};

// A card's title, what its chart draws of frames, and what is said of one: [class of its colour, number, word].
const CARDS = [
  rate("Generated", "generated"),
  byDevice,
  rate("Prompts", "prompt"),
  {
    title: "Batch and queue",
    bands: ["running", "waiting"],
    draw(frames, engine) {
      const bands = ["running", "waiting"].map((name) => series(frames, (frame) => frame[name]));
      const all = frames.map((frame) => frame.running + frame.waiting);
      return { bands, most: Math.max(engine.max_num_seqs, roundUp(Math.max(...all))) };
    },
    words: (frame, engine) => [["running", `${count(frame.running)} of ${count(engine.max_num_seqs)}`, "run"],
      ["waiting", count(frame.waiting), "wait"],
      ["rows", frame.steps > 0 ? count(rowsPerStep(frame)) : "–", "rows a step"],
      ["preemptions", count(frame.preemptions), "preempted"]],
  },
  {
    title: "KV blocks",
    bands: ["used", "cached", "free"],
    draw(frames) {
      const bands = ["used", "cached", "free"].map((state) => series(frames, (frame) => frame.blocks[state]));
      const total = Math.max(...frames.map(({ blocks }) => blocks.used + blocks.cached + blocks.free), 1);
      return { bands, most: total };
    },
    words: (frame) => ["used", "cached", "free"].map((state) => [state, count(frame.blocks[state]), state]),
  },
  latency("Time to the first token", "ttft_ms"),
  latency("Time between tokens", "itl_ms"),
];

class Card {
  constructor(about, engine, point) {
    this.about = about;
    this.chart = new Chart(about.title, about);
    pointable(this.chart, point);
    this.top = make("span", "top");
    this.words = make("p", "words");
    this.when = make("span", "when");
    const frame = make("div", "frame", this.chart.element, this.top);
    this.element = make("section", "card", make("h3", "", `${about.title} `, this.when), this.words, frame);
  }

  draw(now, engine) {
    const drawn = this.about.draw(now.frames, engine);
    this.chart.draw(now.xs, drawn);
    this.chart.point(now.cursor);
    this.top.textContent = (this.about.top ?? count)(drawn.most);
    this.when.textContent = ago(now);
    const frame = now.frames[now.index];
    const lately = now.frames.slice(Math.max(0, now.index + 1 - NUM_RATE_FRAMES), now.index + 1);
    const words = frame ? this.about.words(frame, engine, lately) : [];
    this.words.replaceChildren(...words.map(([name, number, word]) => {
      const value = make("b", "", number);
      value.dataset.number = name;
      return make("span", "", make("i", `swatch ${name}`), value, ` ${word}`);
    }));
  }
}
