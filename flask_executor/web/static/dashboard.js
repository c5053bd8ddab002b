/**
 * The dashboard: asks for the overview and the list of jobs every two seconds, and changes on the page what is different.
 *
 *     overview ──> tiles, chart, functions, workers, services
 *     list ──> JobList ──> rows          one job, its log ──> Details
 */

import { drawChart, short } from "./chart.js";
import { backoff, pause } from "./follower.js";
import { View, percent, problem, remember, say } from "./job.js";

const POLL_DELAY = 2000;
const PAGE = 50;
const FILTERS = ["q", "status", "name", "key", "owner"];

const find = (id) => document.getElementById(`executor-${id}`);
const root = find("dashboard");
const number = new Intl.NumberFormat(document.documentElement.lang);
const moment = new Intl.DateTimeFormat(document.documentElement.lang, { dateStyle: "medium", timeStyle: "medium" });

// The server's clock, for the client's may be wrong: when it answered last, and when that was here.
const clock = { server: Date.now(), here: performance.now() };

function ago(time) {
  if (!time) return "–";
  const seconds = (clock.server + performance.now() - clock.here - Date.parse(time)) / 1000;
  return seconds < 2 ? say("now") : say("ago", { time: short(Math.floor(seconds)).split(" ")[0] });
}

/** An answer that said no, with words for people. */
class Refused extends Error {}

async function ask(url, { method = "GET", headers = {} } = {}) {
  const token = document.querySelector('meta[name="csrf-token"]')?.content;
  if (token && method !== "GET") headers["X-CSRFToken"] = token;
  headers.Accept = "application/json";
  const response = await fetch(url, { method, headers, cache: "no-store", redirect: "manual" });
  if (response.status >= 400 && response.status < 500) {
    throw Object.assign(new Refused(await problem(response)), { status: response.status });
  }
  if (response.type === "opaqueredirect") throw Object.assign(new Refused(say("denied")), { status: 401 });
  if (!response.ok && response.status !== 304) throw new Error(response.statusText);
  return response;
}

/** What a URL holds, which is sent only when it has changed. */
class Resource {
  data = null;
  #etag = null;

  constructor(url) {
    this.url = url;
  }

  async get() {
    const response = await ask(this.url, { headers: this.#etag ? { "If-None-Match": this.#etag } : {} });
    const date = Date.parse(response.headers.get("Date"));
    if (date) Object.assign(clock, { server: date, here: performance.now() });
    if (response.status !== 304) {
      this.data = await response.json();
      this.#etag = response.headers.get("ETag");
    }
    return this.data;
  }
}

/** The newest jobs that match, as many pages of them as were asked for. */
class JobList {
  known = new Map();
  #pages = [];
  #turn = 0;

  reset(url) {
    this.known.clear();
    this.#pages = [new Resource(url)];
  }

  get loaded() {
    return this.#pages[0].data !== null;
  }

  get next() {
    return this.#pages.at(-1).data?.next;
  }

  get jobs() {
    return [...this.known.values()].sort((a, b) => (a.queued_at < b.queued_at ? 1 : a.queued_at > b.queued_at ? -1 : 0));
  }

  async more() {
    this.#pages.push(new Resource(this.next));
    await this.#load(this.#pages.length - 1);
  }

  /** Asks for the first page and one of the others in turn, so that many pages cost no more than two. */
  async refresh() {
    await this.#load(0);
    if (this.#pages.length < 2) return;
    this.#turn = (this.#turn % (this.#pages.length - 1)) + 1;
    await this.#load(this.#turn);
  }

  async #load(index) {
    const pages = this.#pages;
    const before = pages[index - 1]?.data;
    if (before && !before.next) return void pages.splice(index);
    // New jobs move the border between two pages.
    if (before && pages[index].url !== before.next) pages[index] = new Resource(before.next);
    const { jobs, next } = await pages[index].get();
    if (pages !== this.#pages) return;
    const newest = before?.jobs.at(-1)?.queued_at ?? "~";
    const oldest = next ? jobs.at(-1).queued_at : "";
    for (const { id, queued_at: at } of this.known.values()) if (at < newest && at > oldest) this.known.delete(id);
    for (const job of jobs) this.known.set(job.id, job);
  }
}

/** Makes the rows of a container those of the items, touching only what is different. */
function sync(container, template, items, key, fill) {
  const views = (container.views ??= new Map());
  const wanted = new Set(items.map(key));
  for (const [name, view] of views) {
    if (wanted.has(name)) continue;
    view.element.remove();
    views.delete(name);
  }
  items.forEach((item, index) => {
    const name = key(item);
    if (!views.has(name)) views.set(name, new View(find(template).content.firstElementChild.cloneNode(true)));
    const view = views.get(name);
    fill(view, item);
    if (container.children[index] !== view.element) container.insertBefore(view.element, container.children[index] ?? null);
  });
}

/** What a row and the details of a job have in common. */
function fillJob(view, job) {
  const unknown = typeof job.progress !== "number";
  view.element.dataset.executorStatus = job.status;
  view.element.dataset.executorId = job.id;
  view.fill("status", say(job.stop_requested && !job.ended ? "stopping" : job.status));
  view.fill("key", job.key ?? "");
  view.fill("owner", job.owner ?? "");
  view.fill("message", job.message ?? "");
  view.fill("percent", unknown ? "" : percent(job.progress));
  view.fill("duration", short(job.elapsed));
  view.showBar(job);
  view.show("stop", Boolean(job.links?.stop) && !job.ended);
  view.show("retry", Boolean(job.links?.retry));
  view.parts.stop.setAttribute("aria-disabled", String(job.stop_requested));
}

function fillRow(view, job) {
  fillJob(view, job);
  view.fill("name", job.name);
  view.show("owner", Boolean(job.owner));
  view.show("progress", job.status === "running");
  if (job.ended) view.fill("percent", "");
  if (job.ended) view.fill("message", job.status === "succeeded" ? "" : (job.error ?? job.message ?? ""));
  view.parts.progress.ariaLabel = job.name;
  view.parts.stop.ariaLabel = `${view.parts.stop.textContent}: ${job.name}`;
  view.parts.retry.ariaLabel = `${view.parts.retry.textContent}: ${job.name}`;
  for (const [part, time] of [["queued", job.queued_at], ["started", job.started_at]]) {
    view.fill(part, ago(time));
    view.parts[part].title = time ? moment.format(new Date(time)) : "";
    view.parts[part].dateTime = time ?? "";
  }
}

/** One job in full, with its log, live while it is open. */
class Details extends View {
  job = null;

  open(job) {
    this.job = job;
    this.parts.log.replaceChildren();
    this.last = null;
    this.fill("note", "");
    this.render();
    this.element.showModal();
    this.follow(job.links);
  }

  async follow(links) {
    const visit = (this.visit = {});
    const [self, log] = [links?.self, links?.log].map((url) => url && new Resource(url));
    while (this.element.open && this.visit === visit) {
      try {
        // The job first: what it logged at its very end is there once it has ended.
        const job = (await self?.get()) ?? this.job;
        const lines = (await log?.get())?.lines ?? [];
        if (this.visit !== visit) return;
        this.job = job;
        this.render();
        this.append(lines);
      } catch (error) {
        this.fill("note", error instanceof Refused ? error.message : say("connection_lost"));
      }
      await pause(POLL_DELAY);
    }
  }

  render() {
    const { job } = this;
    fillJob(this, job);
    this.fill("title", job.name);
    this.fill("error", job.error ?? "");
    this.show("error", Boolean(job.error));
    for (const part of ["id", "attempt"]) this.fill(part, String(job[part]));
    for (const part of ["queued_at", "started_at", "ended_at"]) {
      this.fill(part, job[part] ? moment.format(new Date(job[part])) : "–");
    }
    const meta = Object.entries(job.meta ?? {}).map(([name, value]) => `${name}: ${JSON.stringify(value)}`);
    this.fill("meta", meta.join("\n"));
    for (const part of ["key", "owner", "meta"]) this.parts[part].parentElement.hidden = !this.parts[part].textContent;
    this.show("self", Boolean(job.links?.self));
    if (job.links?.self) this.parts.self.href = job.links.self;
  }

  append(lines) {
    const { log } = this.parts;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 8;
    const identity = (line) => line.time + line.text;
    const start = lines.findLastIndex((line) => identity(line) === this.last) + 1;
    if (!start) log.replaceChildren();
    for (const line of lines.slice(start)) {
      const view = new View(find("log-line").content.firstElementChild.cloneNode(true));
      view.element.dataset.executorLevel = line.level;
      view.fill("time", new Date(line.time).toLocaleTimeString(document.documentElement.lang));
      view.parts.time.title = line.logger;
      view.fill("level", line.level);
      view.fill("text", line.text);
      log.append(view.element);
    }
    if (lines.length) this.last = identity(lines.at(-1));
    this.show("log", lines.length > 0);
    this.show("log_empty", lines.length === 0);
    if (atEnd) log.scrollTop = log.scrollHeight;
  }
}

function showOverview({ counts, failed, sampled, functions, health, workers }) {
  const good = counts.succeeded;
  const share = (part) => (good + failed ? say("share", { percent: rate(part, good + failed) }) : "\u00a0");
  tiles.fill("running", number.format(counts.running));
  // Workers are those of the process that answers; with a shared store others may run jobs.
  const alone = health.workers && counts.running <= health.busy;
  tiles.fill("running_note", alone ? say("busy_workers", health) : "\u00a0");
  tiles.fill("queued", number.format(counts.queued));
  tiles.fill("queued_note", health.oldest_wait ? say("oldest_wait", { time: short(health.oldest_wait) }) : "\u00a0");
  tiles.fill("succeeded", number.format(good));
  tiles.fill("succeeded_note", sampled ? say("of_newest", { n: number.format(sampled) }) : "\u00a0");
  tiles.fill("failed", number.format(failed));
  tiles.fill("failed_note", share(failed));
  const state = !health.store_reachable ? "store_away" : health.accepting ? "healthy" : "not_accepting";
  find("health").dataset.executorStatus = state === "healthy" ? "succeeded" : "failed";
  if (find("health").textContent !== say(state)) find("health").textContent = say(state);
  sync(find("function-rows"), "function-row", functions, ({ name }) => name, (view, row) => {
    view.fill("name", row.name);
    view.fill("count", number.format(row.count));
    view.fill("success", row.succeeded + row.failed ? rate(row.succeeded, row.succeeded + row.failed) : "–");
    view.fill("median", short(row.median));
    view.fill("p95", short(row.p95));
  });
  sync(find("worker-rows"), "worker-row", workers, ({ pid, kind }) => `${kind} ${pid}`, (view, row) => {
    view.element.dataset.executorStatus = row.busy ? "running" : "queued";
    view.fill("state", say(row.busy ? "busy" : "idle"));
    view.fill("pid", String(row.pid));
    view.fill("memory", row.memory ? `${number.format(Math.round(row.memory / 2 ** 20))}\u00a0MiB` : "–");
    view.fill("job", row.job ? (list.known.get(row.job)?.name ?? row.job.slice(0, 8)) : "–");
  });
  find("service-table").hidden = !health.services.length;
  sync(find("service-rows"), "service-row", health.services, ({ name }) => name, (view, row) => {
    view.fill("name", row.name);
    view.fill("ready", `${number.format(row.ready)} / ${number.format(row.workers)}`);
    view.fill("busy", number.format(row.busy));
    view.fill("waiting", number.format(row.waiting));
    view.fill("failures", number.format(row.failures));
    view.fill("error", row.last_error ?? "–");
  });
}

/** Which part of the whole, never rounded up to all of it. */
function rate(part, whole) {
  return `${number.format(Math.floor((1000 * part) / whole) / 10)}\u00a0%`;
}

function showJobs() {
  const { jobs } = list;
  const filtered = FILTERS.some((name) => filters.get(name));
  sync(find("job-rows"), "job-row", jobs, ({ id }) => id, fillRow);
  find("job-table").hidden = !jobs.length;
  find("empty").hidden = jobs.length > 0 || filtered;
  find("no-match").hidden = jobs.length > 0 || !filtered;
  find("shown").textContent = jobs.length ? say("shown", { n: number.format(jobs.length) }) : "";
  find("more").hidden = !list.next;
}

function showFilters() {
  for (const { name, value } of find("filters").elements) {
    if (name && value !== (filters.get(name) ?? "")) find("filters").elements[name].value = filters.get(name) ?? "";
  }
  const chosen = ["name", "key", "owner"].filter((name) => filters.get(name));
  sync(find("chips"), "chip", chosen, (name) => name, (view, name) => {
    const label = say(`filter_${name}`, { value: filters.get(name) });
    view.element.dataset.executorFilter = name;
    view.element.ariaLabel = say("no_filter", { filter: label });
    view.fill("label", label);
  });
}

/** Shows the jobs that match these changed filters, and has them in the page's URL. */
function filter(changes) {
  for (const [name, value] of Object.entries(changes)) {
    if (value) filters.set(name, value);
    else filters.delete(name);
  }
  const search = filters.toString();
  history.replaceState(history.state, "", search ? `?${search}` : location.pathname);
  startList();
  showFilters();
  hurry();
}

function startList() {
  const url = new URL(root.dataset.executorList, location);
  for (const name of FILTERS) if (filters.get(name)) url.searchParams.set(name, filters.get(name));
  url.searchParams.set("limit", PAGE);
  list.reset(url.href);
}

function notify(text) {
  clearTimeout(notify.timer);
  find("toast").textContent = details.element.open ? "" : text;
  if (details.element.open) details.fill("note", text);
  else notify.timer = setTimeout(() => notify(""), 6000);
}

async function act(action, job, button) {
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true";
  try {
    await ask(job.links[action], { method: action === "stop" ? "DELETE" : "POST" });
    notify(say(`${action}_accepted`, { name: job.name }));
  } catch (error) {
    notify(error instanceof Refused ? error.message : say("refused"));
  }
  button.ariaDisabled = "false";
  hurry();
}

document.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-executor-action]");
  if (!button) return;
  const action = button.dataset.executorAction;
  const id = button.closest("[data-executor-id]")?.dataset.executorId;
  const job = details.element.open ? details.job : list.known.get(id);
  if (action === "more") list.more().then(showJobs, () => notify(say("refused")));
  else if (action === "clear") filter(Object.fromEntries(FILTERS.map((name) => [name, ""])));
  else if (action === "unfilter") filter({ [button.dataset.executorFilter]: "" });
  else if (action === "name" || action === "owner") filter({ [action]: button.textContent });
  else if (action === "details") details.open(job);
  else act(action, job, button);
});

find("filters").addEventListener("submit", (event) => event.preventDefault());
find("filters").addEventListener("input", ({ target: { name, value }, currentTarget }) => {
  clearTimeout(currentTarget.timer);
  currentTarget.timer = setTimeout(() => filter({ [name]: value.trim() }), name === "q" ? 300 : 0);
});

const filters = new URLSearchParams(location.search);
const tiles = new View(root);
const details = new Details(find("details"));
const overview = new Resource(root.dataset.executorOverview);
const list = new JobList();
let drawn = null;

new ResizeObserver(() => overview.data && drawChart(find("chart"), find("chart-text"), overview.data.recent)).observe(find("chart").parentElement);

async function tick() {
  await Promise.all([overview.get(), list.refresh()]);
  showOverview(overview.data);
  if (list.loaded) showJobs();
  if (drawn !== overview.data) drawChart(find("chart"), find("chart-text"), overview.data.recent);
  drawn = overview.data;
}

/** Shows what has been changed without waiting for the loop; which also tells what went wrong. */
function hurry() {
  tick().catch(() => {});
}

async function run() {
  for (let failures = 0; ; ) {
    try {
      await tick();
      failures = 0;
      remember("");
    } catch (error) {
      failures++;
      if ((error.status === 401 || error.status === 403) && remember("denied dashboard")) location.reload();
      find("health").dataset.executorStatus = "lost";
      find("health").textContent = error instanceof Refused ? error.message : say("connection_lost");
    }
    await pause(failures ? backoff(failures) : POLL_DELAY);
  }
}

root.hidden = false;
startList();
showFilters();
run();
