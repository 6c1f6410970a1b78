// What the server has told of an engine, frame by frame, and what is read off it. Knows no element.

// The server keeps as many seconds.
const KEPT_MS = 300_000;

export class History {
  constructor() {
    this.frames = [];
  }

  get newest() {
    return this.frames.at(-1)?.at_ms ?? 0;
  }

  add(frames) {
    this.frames.push(...frames.filter((frame) => frame.at_ms > this.newest));
    const oldest = this.newest - KEPT_MS;
    while (this.frames[0]?.at_ms < oldest) this.frames.shift();
  }

  // The span that is shown, in milliseconds: it grows by minutes, so that a young server's charts are not half empty.
  get span() {
    const age = this.frames.length > 0 ? this.newest - this.frames[0].at_ms : 0;
    return Math.min(Math.max(Math.ceil(age / 60_000), 1) * 60_000, KEPT_MS);
  }

  // Those of the span that is shown.
  get shown() {
    const from = this.newest - this.span;
    return this.frames.filter((frame) => frame.at_ms >= from);
  }
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

// Each frame's share of the device's time by cause. A step's time is charged when the step has ended, so frames within
// it have none of their own: they are like the one that has it, the newest like the last that had.
export function shares(frames) {
  let next = null;
  const found = frames.map((frame) => {
    const total = sum(frame.device_s);
    return total > 0 ? frame.device_s.map((seconds) => seconds / total) : null;
  });
  for (let at = found.length - 1; at >= 0; at -= 1) next = found[at] ??= next;
  let last = null;
  for (let at = 0; at < found.length; at += 1) last = found[at] ??= last;
  return found.map((share) => share ?? frames[0].device_s.map(() => 0));
}

// By cause, over frames together.
export function shareOfAll(frames) {
  const [first] = frames;
  const seconds = (first?.device_s ?? []).map((_, cause) => sum(frames.map((frame) => frame.device_s[cause])));
  const total = sum(seconds);
  return seconds.map((of) => (total > 0 ? of / total : 0));
}

// Over these frames together.
export function perSecond(frames, name) {
  const seconds = sum(frames.map((frame) => frame.period_s));
  return seconds > 0 ? sum(frames.map((frame) => frame[name])) / seconds : 0;
}

// The same of one device's generated tokens.
export function perDevice(frames, index) {
  const seconds = sum(frames.map((frame) => frame.period_s));
  return seconds > 0 ? sum(frames.map((frame) => frame.device_tokens[index] ?? 0)) / seconds : 0;
}

export const rowsPerStep = (frame) => (frame.steps > 0 ? frame.rows / frame.steps : null);
