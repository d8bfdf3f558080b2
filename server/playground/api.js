// api.js - requests to the server that this page came from, its errors, and turns as streams that
// outlive a connection.

const root = new URL(".", document.baseURI); // the page may lie below a prefix of a proxy

/** What the server answered, or that it did not (status 0). */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }
}

/** The connection was lost and could not be taken up again; whether the turn counts is not known. */
export class LostError extends Error {}

/** The user stopped the turn: the server has not applied it. */
export class StoppedError extends Error {}

export const api = {
  key: "",

  headers(extra = {}) {
    return this.key ? { Authorization: `Bearer ${this.key}`, ...extra } : extra;
  },

  /** The response if it is a 2xx, else an ApiError. */
  async send(path, { method = "GET", headers = {}, body, signal } = {}) {
    let response;
    try {
      response = await fetch(new URL(path, root), {
        method, body, signal, headers: this.headers(headers), cache: "no-store", credentials: "omit",
      });
    } catch (e) {
      if (e.name === "AbortError") throw e;
      throw new ApiError("The server cannot be reached.");
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  },

  async json(path, options = {}) {
    const { json, ...rest } = options;
    if (json !== undefined) {
      rest.method ??= "POST";
      rest.body = JSON.stringify(json);
      rest.headers = { "Content-Type": "application/json", ...rest.headers };
    }
    const response = await this.send(path, rest);
    try {
      return await response.json();
    } catch {
      throw new ApiError("The connection was lost in the middle of a reply.");
    }
  },
};

async function errorOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* a proxy's page */ }
  const retry = Number(response.headers.get("Retry-After"));
  return new ApiError(error.message || `The server answered ${response.status} ${response.statusText}.`, {
    status: response.status,
    param: error.param ?? null,
    code: error.code ?? null,
    retryAfter: retry > 0 ? retry : null,
  });
}

/** The whole events of a stream of server-sent events; one that was cut off is left out. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
        const event = { id: null, data: "" };
        for (const line of text.slice(0, end).split("\n")) {
          if (line.startsWith("id: ")) event.id = line.slice(4);
          if (line.startsWith("data: ")) event.data += line.slice(6);
        }
        if (event.data) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const RETRY_MS = [250, 500, 1000, 2000, 4000, 8000, 8000];

/** One generation. It is resumable: when the connection breaks, the server goes on, and so does
 *  this, behind the last event that came whole. */
export class Generation {
  #stopping = false;
  #wake = () => {};
  #lastId = "0";
  id = null;

  /** handlers: onId(id), onEvent(object), onRetry(n), onBack(). */
  constructor(handlers) {
    this.handlers = handlers;
  }

  async start(path, body, version) {
    const response = await api.send(path, {
      method: "POST",
      body: JSON.stringify({ ...body, stream: true, resumable: true }),
      headers: { "Content-Type": "application/json", "If-Match": `"${version}"` },
    });
    this.id = response.headers.get("X-Stream-Id");
    this.handlers.onId?.(this.id);
    if (this.#stopping) this.#remove();
    await this.#follow(response);
  }

  /** A generation that an earlier page began, from its first event on. */
  async resume(id) {
    this.id = id;
    await this.#follow(null);
  }

  async #follow(response) {
    while (!(response && (await this.#read(response)))) {
      response = await this.#reconnect(response !== null);
      if (!response) return;
    }
  }

  /** True at the end of the stream, false when the connection broke. */
  async #read(response) {
    const stream = events(response.body);
    for (;;) {
      let step;
      try {
        step = await stream.next();
      } catch {
        return false;
      }
      if (step.done) return false; // without [DONE]
      if (step.value.data === "[DONE]") return true;
      const object = JSON.parse(step.value.data);
      if (object.error) throw this.#failed(object.error);
      if (step.value.id) this.#lastId = step.value.id;
      this.handlers.onEvent(object);
    }
  }

  #failed(error) {
    if (this.#stopping || error.code === "stream_deleted") return new StoppedError("Stopped.");
    return new ApiError(error.message, { status: 500, param: error.param, code: error.code });
  }

  async #reconnect(wasConnected) {
    for (let n = wasConnected ? 0 : -1; n < RETRY_MS.length; n++) {
      if (n >= 0) {
        this.handlers.onRetry?.(n + 1, RETRY_MS.length);
        await new Promise((resolve) => { this.#wake = resolve; setTimeout(resolve, RETRY_MS[n]); });
      }
      if (this.#stopping) await this.#remove();
      try {
        const response = await api.send(`v1/streams/${this.id}`, { headers: { "Last-Event-ID": this.#lastId } });
        this.handlers.onBack?.();
        return response.status === 204 ? null : response;
      } catch (e) {
        if (this.#stopping && e.status === 404) throw new StoppedError("Stopped.");
        if (e.status === 404 || e.status === 410) throw new LostError(e.message);
        if (e.status !== 0 && e.status !== 503) throw e;
      }
    }
    throw new LostError("The connection was lost and could not be taken up again.");
  }

  /** Ask the server to stop. The stream then ends with an error, which start throws as Stopped. A
   *  generation that has no id yet is stopped when it has one: hanging up would not end it. */
  stop() {
    this.#stopping = true;
    this.#wake();
    if (this.id) this.#remove();
  }

  async #remove() {
    try {
      await api.send(`v1/streams/${this.id}`, { method: "DELETE" });
    } catch { /* it is over, or reconnect asks again */ }
  }
}
