/**
 * Asks a URL how a job stands, again and again, by event streams where the server has room for them.
 */

const STREAM = "text/event-stream";
const DOCUMENT = "application/vnd.flask-executor.job+json";
// A browser opens six connections to a server at most, and a page full of bars must leave some for the app.
const MOST_STREAMS = 2;
const HEADERS_WITHIN = 20_000;
// The server ends a stream after 60 s; one that is older lost its connection without a word.
const STREAM_WITHIN = 75_000;
const HIDDEN_DELAY = 10_000;
const LONGEST_DELAY = 15_000;

/** How long to wait after so many failures in a row: 1, 2, 4 ... 15 s, give or take a quarter. */
export function backoff(failures) {
  return Math.min(LONGEST_DELAY, 1000 * 2 ** (failures - 1)) * (0.75 + Math.random() / 2);
}

/** Waits; longer while nobody looks, and no longer once somebody does or the network is back. */
export function pause(milliseconds) {
  return new Promise((resolve) => {
    const wait = () => setTimeout(done, document.hidden ? Math.max(milliseconds, HIDDEN_DELAY) : milliseconds);
    let timer = wait();
    function done() {
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", turned);
      window.removeEventListener("online", done);
      resolve();
    }
    function turned() {
      clearTimeout(timer);
      if (document.hidden) timer = wait();
      else done();
    }
    document.addEventListener("visibilitychange", turned);
    window.addEventListener("online", done);
  });
}

/** Reads server-sent events, wherever the chunks are cut: {id, event, data, retry} each, as far as given. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let event = {};
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    // A carriage return at the end may be the first half of a CRLF.
    const lines = (text + value).split(/\r\n|\n|\r(?!$)/);
    text = lines.pop();
    for (const line of lines) {
      if (line === "") {
        yield event;
        event = {};
        continue;
      }
      const [, field, data] = /^([^:]*):? ?(.*)$/s.exec(line);
      event[field] = field === "data" && "data" in event ? `${event.data}\n${data}` : data;
    }
  }
}

/** Asks for one job again and again until there is nothing more to learn. */
export class Follower {
  static #streams = 0;
  #url;
  #job;
  #etag;
  #lastEvent;
  #between = 1000;
  #failures = 0;
  #end = null;

  constructor(url, job, { onUpdate, onConnection = () => {} }) {
    this.#url = url;
    this.#job = job;
    this.onUpdate = onUpdate;
    this.onConnection = onConnection;
  }

  /** Resolves with why it is over: "ended", "gone" (no such job any more) or "denied". */
  async run() {
    for (;;) {
      const delay = await this.#ask().catch((error) => this.#failed(error));
      if (this.#end) return this.#end;
      await pause(delay);
    }
  }

  #failed(error) {
    if (document.hidden) return HIDDEN_DELAY;
    this.#failures++;
    this.onConnection("lost");
    return Math.max(backoff(this.#failures), error.retryAfter ?? 0);
  }

  /** Asks once, and says how many milliseconds later to ask again. */
  async #ask() {
    const streaming = !document.hidden && Follower.#streams < MOST_STREAMS;
    const aborter = new AbortController();
    const unseen = () => document.hidden && aborter.abort();
    let timer = setTimeout(() => aborter.abort(), HEADERS_WITHIN);
    if (streaming) {
      Follower.#streams++;
      document.addEventListener("visibilitychange", unseen);
    }
    try {
      const headers = { Accept: streaming ? `${STREAM}, ${DOCUMENT};q=0.9` : DOCUMENT };
      // A view may wait for several jobs, one after the other; this is the one that it was left at.
      if (this.#job) headers["Executor-Job"] = this.#job;
      if (this.#etag) headers["If-None-Match"] = this.#etag;
      if (this.#lastEvent) headers["Last-Event-ID"] = this.#lastEvent;
      // To follow a redirect to a login page elsewhere would look like a lost connection.
      const options = { headers, cache: "no-store", redirect: "manual", signal: aborter.signal };
      const response = await fetch(this.#url, options);
      clearTimeout(timer);
      timer = setTimeout(() => aborter.abort(), STREAM_WITHIN);
      return await this.#read(response);
    } finally {
      clearTimeout(timer);
      if (streaming) {
        Follower.#streams--;
        document.removeEventListener("visibilitychange", unseen);
      }
      aborter.abort();
    }
  }

  async #read(response) {
    const { status, headers } = response;
    const type = headers.get("Content-Type") ?? "";
    const retryAfter = 1000 * (Number(headers.get("Retry-After")) || 1);
    if (status === 404 || status === 410) this.#end = "gone";
    else if (status === 401 || status === 403 || response.type === "opaqueredirect") this.#end = "denied";
    else if (status !== 304 && !response.ok) throw Object.assign(new Error(response.statusText), { retryAfter });
    else if (response.ok && !type.startsWith(STREAM) && !/\bjson\b/.test(type)) this.#end = "denied";
    if (this.#end) return 0;
    if (this.#failures) this.onConnection("back");
    this.#failures = 0;
    if (status === 304) return retryAfter;
    if (type.startsWith(STREAM)) return this.#readStream(response.body);
    this.#etag = headers.get("ETag");
    this.#update(await response.json());
    return retryAfter;
  }

  async #readStream(body) {
    try {
      for await (const { id, event, data, retry } of readEvents(body)) {
        if (retry) this.#between = Number(retry) || this.#between;
        if (id) this.#lastEvent = id;
        if (event === "status" && data) this.#update(JSON.parse(data));
        if (this.#end) break;
      }
    } catch {
      // Streams are cut by proxies, restarts and hidden tabs; whether that is bad news the next request shows.
    }
    this.#etag = undefined;
    return this.#between;
  }

  #update(job) {
    if (job.ended) this.#end = "ended";
    this.onUpdate(job);
  }
}
