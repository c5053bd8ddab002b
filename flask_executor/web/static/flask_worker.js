/** Leads on from the page of a worker of Flask-Worker when its job is done, and says so when it has failed. */

const { workerUrl, workerCallback } = document.querySelector("script[data-worker-url]").dataset;

document.addEventListener("executor:end", ({ target, detail: job }) => {
  if (target.dataset.executorJob !== workerUrl) return;
  // Without what is behind the hash, which would not load the page.
  if (job.status === "succeeded") location.replace(workerCallback || location.href.split("#")[0]);
  else for (const part of target.querySelectorAll("[data-executor-part=status]")) part.hidden = false;
});

const followed = [...document.querySelectorAll("[data-executor-job]")];
if (!followed.some((element) => element.dataset.executorJob === workerUrl)) {
  // The template is not ours: nothing is to be seen there until something goes wrong.
  const element = document.body.appendChild(document.createElement("p"));
  element.dataset.executorJob = workerUrl;
  for (const name of ["status", "error", "note"]) {
    const part = element.appendChild(document.createElement("span"));
    part.dataset.executorPart = name;
    part.hidden = name === "status";
    part.role = "status";
    element.append(" ");
  }
}

await import("./job.js");
