// The server's OpenAI endpoints from a browser: requests, streamed answers, and errors that say what to do.

/** status 0: no answer at all. retryAfter: seconds, or null where trying again would not help. */
export class ServerError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// What to say where the server does not.
const WAYS = {
  0: "The server does not answer. Is it running?",
  401: "The server wants an API key.",
  403: "The server refuses what this page asks.",
  404: "The server does not know this address or model.",
  429: "The server is busy.",
  503: "The model is not ready.",
};

// Codes of errors within a stream after which the same request may well succeed.
const PASSING = new Set(["engine_died", "engine_unavailable", "queue_full"]);

/** Fetch `path` (relative to the page); an answer that is not 2xx becomes a ServerError. */
export async function ask(path, { key = "", body = null, signal = null } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(WAYS[0], 0, 3);
  }
  if (response.ok) return response;
  throw failure(await response.text().catch(() => ""), response.status, response.headers.get("Retry-After"));
}

function failure(text, status, retryAfter) {
  let message = "";
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // not one of our error bodies: the status has to do
  }
  const wait = Number.parseFloat(retryAfter);
  const again = status === 429 || status === 503 ? (wait >= 0 ? wait : 2) : null;
  return new ServerError(message || WAYS[status] || `The server answered ${status}.`, status, again);
}

/** POST `body` with stream: true; yield each event's object. The answer must end with [DONE]. */
export async function* stream(path, { key, body, signal }) {
  const response = await ask(path, { key, signal, body: { ...body, stream: true, stream_options: { include_usage: true } } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let whole = false;
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        break;
      }
      if (part.done) break;
      const events = (rest + part.value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const data = event
          .split(/\r?\n/)
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart())
          .join("\n");
        if (data === "[DONE]") whole = true;
        if (!data || whole) continue; // or a comment that keeps the connection open
        const object = JSON.parse(data);
        if (object.error) {
          const again = PASSING.has(object.error.code) ? 2 : null;
          throw new ServerError(object.error.message ?? "The answer failed.", 500, again);
        }
        yield object;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!whole) throw new ServerError("The connection ended before the answer did.", 0, 2);
}
