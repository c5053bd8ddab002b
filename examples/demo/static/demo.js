import { watch } from "../_executor/job.js";

const form = document.querySelector("#covers");
const bars = document.querySelector("#covers-bars");
const bar = document.querySelector("#covers-bar");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { shelf, width } = Object.fromEntries(new FormData(form));
  const response = await fetch(form.action, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ shelf, width: Number(width) }),
  });
  if (!response.ok) {
    const problem = await response.json();
    bars.textContent = problem.errors?.map((error) => `${error.pointer} ${error.detail}`).join(", ") || problem.detail;
    return;
  }
  bars.replaceChildren(bar.content.cloneNode(true));
  bars.querySelector("[data-executor-job]").dataset.executorJob = response.headers.get("Location");
  watch(bars);
});

bars.addEventListener("executor:end", async ({ detail: job }) => {
  if (!job.links.result) return;
  const result = await fetch(job.links.result);
  bars.append(`It returned ${await result.text()}`);
});
