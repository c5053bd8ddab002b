/**
 * The chart of the dashboard, and durations in few characters.
 */

import { say } from "./job.js";

const number = new Intl.NumberFormat(document.documentElement.lang);

/** "340 ms", "1.2 s", "2 min 5 s", "3 d 4 h": a duration as short as can be. */
export function short(seconds) {
  if (typeof seconds !== "number") return "–";
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)}\u00a0ms`;
  if (seconds < 9.95) return `${number.format(Math.round(seconds * 10) / 10)}\u00a0s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole}\u00a0s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}\u00a0min ${whole % 60}\u00a0s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}\u00a0h ${Math.floor((whole % 3600) / 60)}\u00a0min`;
  return `${Math.floor(whole / 86400)}\u00a0d ${Math.floor((whole % 86400) / 3600)}\u00a0h`;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Seconds, each about ten times the one before, and round in its own unit.
const TICKS = [0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36_000, 86_400, 864_000, 8_640_000];

/** One mark for each job that ended: the later the further right, the longer the higher, on a logarithmic scale. */
export function drawChart(place, caption, recent) {
  const ran = recent.filter(({ seconds }) => typeof seconds === "number");
  place.hidden = !ran.length;
  const [width, height, margin, side] = [place.clientWidth, 184, 10, 56];
  if (!ran.length || !width) return;
  const sorted = ran.map(({ seconds }) => Math.max(seconds, TICKS[0])).sort((a, b) => a - b);
  const low = Math.max(0, TICKS.findLastIndex((tick) => tick <= sorted[0]));
  const high = Math.max(low + 1, TICKS.findIndex((tick) => tick >= sorted.at(-1)));
  const [bottom, top] = [Math.log(TICKS[low]), Math.log(TICKS[high])];
  const y = (seconds) => margin + ((top - Math.log(Math.max(seconds, TICKS[0]))) / (top - bottom)) * (height - 2 * margin);
  const x = (index) => side + 8 + ((index + 0.5) / ran.length) * (width - side - 16);
  const drawing = svg("svg", { width, height });
  for (const tick of TICKS.slice(low, high + 1)) {
    drawing.append(
      svg("line", { x1: side, x2: width, y1: y(tick), y2: y(tick) }),
      svg("text", { x: side - 10, y: y(tick), dy: "0.32em", "text-anchor": "end" }, short(tick).split(" ")[0]),
    );
  }
  const marks = ran.map(({ name, status, seconds }, index) => {
    const mark = document.createElement("span");
    mark.className = "executor-shape";
    mark.dataset.executorStatus = status;
    mark.title = `${name}: ${say(status)}, ${short(seconds)}`;
    mark.style.left = `${x(index)}px`;
    mark.style.top = `${y(seconds)}px`;
    return mark;
  });
  place.role = "img";
  place.setAttribute("aria-labelledby", caption.id);
  place.replaceChildren(drawing, ...marks);
  caption.textContent = say("chart", {
    n: ran.length,
    median: short(sorted[Math.floor(sorted.length / 2)]),
    longest: short(sorted.at(-1)),
    failed: ran.filter(({ failed }) => failed).length,
  });
}
