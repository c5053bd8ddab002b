/**
 * Follows jobs: every element with data-executor-job="<url>" shows the job that is found there, live.
 * The waiting page is one, and so is each bar of the macro progress(). What is filled in has a data-executor-part.
 *
 *     server ── event stream or polls ──> Follower ── status documents ──> JobView ──> parts, executor:update
 */

import { Follower } from "./follower.js";

const strings = JSON.parse(document.querySelector('meta[name="executor-strings"]')?.content ?? "{}");

/** The text of that name, in the page's language. */
export function say(name, values = {}) {
  return (strings[name] ?? name).replace(/\{(\w+)\}/g, (_, value) => values[value]);
}

const count = (n, unit) => say(n === 1 ? unit : `${unit}s`, { n });

/** "2 minutes 5 seconds": a duration in its two largest units. */
export function words(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [large, small, size] = whole >= 3600 ? ["hour", "minute", 3600] : ["minute", "second", 60];
  const rest = Math.floor((whole % size) / (size / 60));
  const parts = [];
  if (whole >= size) parts.push(count(Math.floor(whole / size), large));
  if (rest || whole < size) parts.push(count(rest, small));
  return parts.join(" ");
}

/** "about 2 minutes left": an estimate, no more exact than it is. */
export function left(seconds) {
  if (seconds < 5) return say("soon");
  if (seconds <= 55) return say("left", { time: count(Math.ceil(seconds / 5) * 5, "second") });
  if (seconds < 3570) return say("left", { time: count(Math.round(seconds / 60), "minute") });
  return say("left", { time: count(Math.round(seconds / 3600), "hour") });
}

export function percent(progress) {
  // 0.29 * 100 is a little less than 29.
  return `${Math.floor(progress * 100 + 1e-6)}\u00a0%`;
}

/** What an answer that is an error has to say. */
export async function problem(response) {
  const document = await response.json().catch(() => ({}));
  return document.detail || document.title || say("refused");
}

/** An element and its parts; a part that a template leaves out is never filled. */
export class View {
  constructor(element) {
    this.element = element;
    this.parts = {};
    for (const part of element.querySelectorAll("[data-executor-part]")) this.parts[part.dataset.executorPart] = part;
  }

  fill(name, text) {
    const part = this.parts[name];
    // Setting the same text again would be read out again.
    if (part && part.textContent !== text) part.textContent = text;
  }

  show(name, shown) {
    if (this.parts[name]) this.parts[name].hidden = !shown;
  }

  /** A bar is as full as the job is done, and moves while nobody knows. */
  showBar({ status, ended, progress }) {
    const bar = this.parts.progress;
    if (!bar) return;
    if (status === "succeeded") bar.value = 1;
    else if (typeof progress === "number") bar.value = progress;
    else if (ended) bar.value = 0;
    else bar.removeAttribute("value");
  }
}

/** An element that follows its job. */
class JobView extends View {
  constructor(element) {
    super(element);
    this.page = element.dataset.executorPage;
    for (const form of element.querySelectorAll("form")) form.addEventListener("submit", (event) => this.submit(event));
  }

  async follow() {
    const clock = setInterval(() => this.showTimes(), 1000);
    const { executorJob: url, executorId: id } = this.element.dataset;
    const end = await new Follower(url, id, {
      onUpdate: (job) => this.update(job),
      onConnection: (state) => this.showConnection(state),
    }).run();
    clearInterval(clock);
    if (end === "ended") this.ended();
    else this.abandoned(end);
  }

  update(job) {
    this.job = job;
    this.received = performance.now();
    this.render(job);
    this.emit("executor:update");
  }

  ended() {
    this.emit("executor:end");
    if (this.page !== "turn" || this.job.status !== "succeeded") return;
    // A second time would be the start of an endless loop: the page we asked for is this one.
    if (remember(`turned ${this.job.id}`)) location.reload();
    else this.show("open", true);
  }

  abandoned(end) {
    if (end === "denied" && this.page && remember(`denied ${this.element.dataset.executorJob}`)) location.reload();
    this.element.dataset.executorStatus = end;
    this.say(say(end));
    for (const part of ["status", "progress", "remaining", "stop", "retry"]) this.show(part, false);
    this.show("open", this.page === "turn");
  }

  render(job) {
    const unknown = typeof job.progress !== "number";
    if (!job.ended) remember("");
    this.element.dataset.executorStatus = job.status;
    this.fill("status", say(!job.ended && this.stopping(job) ? "stopping" : job.status));
    this.fill("name", job.name);
    this.fill("message", job.message ?? "");
    this.fill("percent", unknown ? "" : percent(job.progress));
    this.fill("attempt", job.attempt > 1 ? say("attempt", { n: job.attempt }) : "");
    this.fill("error", job.failed ? job.error || say(`error_${job.status}`) : "");
    this.show("failure", job.failed);
    this.showBar(job);
    this.showTimes();
    this.showActions(job);
    if (!this.page) return;
    const lead = job.ended ? say(job.status) : unknown ? "" : percent(job.progress);
    document.title = lead ? `${lead} · ${job.name}` : job.name;
  }

  /** Counts on since the last document, by a clock that nobody sets. */
  showTimes() {
    if (!this.job) return;
    const { elapsed, remaining, ended, status } = this.job;
    const since = status === "running" ? (performance.now() - this.received) / 1000 : 0;
    const known = typeof elapsed === "number";
    this.fill("elapsed", known ? say(ended ? "took" : "elapsed", { time: words(elapsed + since) }) : "");
    this.fill("remaining", typeof remaining === "number" && !ended ? left(remaining - since) : "");
  }

  showActions(job) {
    const button = this.parts.stop?.querySelector("button");
    const focused = this.parts.stop?.contains(document.activeElement);
    // Not the attribute disabled: it would take the focus from who has just pressed it.
    button?.removeAttribute("disabled");
    button?.setAttribute("aria-disabled", String(this.stopping(job)));
    this.show("stop", !job.ended && (this.page === "turn" || Boolean(job.links?.stop)));
    this.show("retry", job.retryable && (this.page === "turn" || Boolean(job.links?.retry)));
    this.show("hint", !job.ended);
    if (focused && job.ended) (this.parts.retry?.querySelector("button") ?? this.parts.name)?.focus();
    const result = job.status === "succeeded" && this.page === "stay" && job.links?.result;
    if (result && this.parts.result) this.parts.result.href = result;
    this.show("result", Boolean(result));
  }

  showConnection(state) {
    this.element.classList.toggle("executor-offline", state === "lost");
    this.say(say(`connection_${state}`));
    clearTimeout(this.noteTimer);
    if (state === "back") this.noteTimer = setTimeout(() => this.say(""), 4000);
  }

  /** Sends the form of a button without leaving the page. */
  async submit(event) {
    event.preventDefault();
    const { target: form, submitter: button } = event;
    if (button.ariaDisabled === "true") return;
    button.ariaDisabled = "true";
    const body = new FormData(form);
    body.set(button.name, button.value);
    // form.action would be the button, which has that name.
    const request = fetch(form.getAttribute("action"), { method: "POST", body, headers: { Accept: "application/json" } });
    const response = await request.catch(() => null);
    if (!response?.ok) {
      button.ariaDisabled = "false";
      this.say(response ? await problem(response) : say("refused"));
    } else if (button.value === "retry") {
      // The controller starts another job, which has another page.
      const place = response.headers.get("Location");
      if (place) location.assign(place);
      else location.reload();
    } else {
      this.stopAccepted = true;
      if (!this.job?.ended) this.fill("status", say("stopping"));
    }
  }

  stopping(job) {
    return job.stop_requested || this.stopAccepted === true;
  }

  say(text) {
    this.fill("note", text);
  }

  emit(type) {
    this.element.dispatchEvent(new CustomEvent(type, { detail: this.job, bubbles: true }));
  }
}

/** Notes in this tab why the page is reloaded, and tells whether that is another reason than the last time. */
export function remember(reason) {
  try {
    const last = sessionStorage.getItem("executor-reloaded") ?? "";
    sessionStorage.setItem("executor-reloaded", reason);
    return last !== reason;
  } catch {
    return true; // storage is switched off
  }
}

const watched = new WeakSet();

/** Follows the jobs of all marked elements below a node; call it for what is put into the page later. */
export function watch(root = document) {
  for (const element of root.querySelectorAll("[data-executor-job]")) {
    if (watched.has(element)) continue;
    watched.add(element);
    new JobView(element).follow();
  }
}

watch();
