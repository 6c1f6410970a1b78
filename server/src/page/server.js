// How the page asks the server: with the key where one is wanted, and errors as sentences.

// The key is kept for this tab alone.
export const key = {
  get: () => sessionStorage.getItem("key"),
  set: (value) => sessionStorage.setItem("key", value),
};

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server cannot be reached", 0);
  }
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => null);
  throw new Refused(body?.error?.message ?? `the server answered ${reply.status}`, reply.status);
}

export const get = async (path) => (await ask(path)).json();

// The events of a streamed answer as they come.
export async function* stream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const reply = await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      // Comments say that somebody is there.
      if (!frame.startsWith("data: ") || frame === "data: [DONE]") continue;
      const event = JSON.parse(frame.slice("data: ".length));
      if (event.error) throw new Refused(event.error.message, 200);
      yield event;
    }
  }
}
