"""A page that starts background jobs, watches them and collects what they return.

.. code-block:: console

    $ python examples/quickstart.py           # PORT=5001 for another port

With ``EXECUTOR_TYPE=process`` in the environment the jobs run in worker processes instead of threads. With
``EXECUTOR_STORE=sqlite`` every process sees every job: several web workers, and the commands of ``flask executor``:

.. code-block:: console

    $ export EXECUTOR_STORE=sqlite
    $ gunicorn -w 4 --chdir examples quickstart:app
    $ flask --app examples/quickstart.py executor top
"""

from __future__ import annotations

import logging
import os
import secrets
import time

from flask import Flask, abort, current_app, flash, redirect, render_template, request, url_for
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

from flask_executor import Executor, QueueFull, current_job, track

app = Flask(__name__)
app.secret_key = os.environ.get("SECRET_KEY", "for this example only")  # the same in all processes
app.config["EXECUTOR_TYPE"] = os.environ.get("EXECUTOR_TYPE", "thread")
app.config["EXECUTOR_STORE"] = os.environ.get("EXECUTOR_STORE", "memory")
app.config["EXECUTOR_TRACK"] = "all"  # also the jobs without a key
app.config["EXECUTOR_MAX_WORKERS"] = 2  # few, so that some jobs wait
app.config["EXECUTOR_MAX_PENDING"] = 8  # one more is refused with QueueFull

executor = Executor(app)

# ---- the jobs: ordinary functions ----


@executor.job
def render_report(seconds: int) -> str:
    """Takes its time. The request that started it is there to be read, though it was answered long ago."""
    pages = range(1, seconds * 4 + 1)
    for _page in track(pages, message="rendering"):  # progress, and leaving here when asked to stop
        current_job.sleep(0.25)
    return f"{len(pages)} pages, asked for by {request.remote_addr}"


@executor.job(name="rebuild catalogue")
def rebuild_catalogue() -> str:
    for step, name in enumerate(("reading", "sorting", "writing")):
        current_job.update(progress=step / 3, message=name)
        current_job.sleep(2)
    return f"catalogue of {current_app.name} rebuilt at {time.strftime('%H:%M:%S')}"


def import_prices(filename: str) -> int:
    time.sleep(1)
    raise ValueError(f"{filename}, line 3: 'twelve' is not a price")


# ---- starting them ----


@app.post("/reports")
def start_report() -> Response:
    seconds = request.form.get("seconds", 3, type=int)
    future = render_report.submit_stored(f"report-{secrets.token_hex(2)}", min(max(seconds, 1), 60))
    flash(f"Started {future.key}.")
    return to_the_list()


@app.post("/catalogue")
def start_catalogue() -> Response:
    future = rebuild_catalogue.submit_once("catalogue")  # the job that is there, if there is one
    flash(f"The catalogue's job is {future.job_id[:6]}. However often you ask, it is this one until you collect it.")
    return to_the_list()


@app.post("/import")
def start_import() -> Response:
    executor.submit(import_prices, "prices.csv")  # nobody keeps the handle: the failure goes to the log
    flash("Started an import that will fail. Its traceback appears in the terminal.")
    return to_the_list()


@app.errorhandler(QueueFull)
def queue_is_full(error: QueueFull) -> Response:
    flash(f"Not started: {error.limit} jobs are waiting already. Try again when some are done.")
    return to_the_list()


# ---- watching and collecting ----


@app.get("/")
def index() -> str:
    jobs = executor.jobs.list(limit=30)
    return render_template(
        "quickstart.html",
        jobs=jobs,
        futures=executor.futures,
        health=executor.health(),
        type=app.config["EXECUTOR_TYPE"],
        store=app.config["EXECUTOR_STORE"],
        pid=os.getpid(),
        unfinished=any(not job.status.ended for job in jobs),
        now=time.time(),
    )


@app.post("/jobs/<id>/collect")
def collect(id: str) -> Response:
    job = executor.jobs.get(id)
    if job is None or executor.futures.job_id(job.key) != id:
        abort(404)
    if executor.futures.done(job.key):
        future = executor.futures.pop(job.key)  # frees the key and the memory of the result
        if future is not None:  # None: another click was faster
            flash(f"Collected {job.key}: {future.result()}.")
    return to_the_list()


@app.post("/jobs/<id>/stop")
def stop(id: str) -> Response:
    job = executor.jobs.get(id)
    if job is None or executor.futures.job_id(job.key) != id:
        abort(404)
    future = executor.futures.pop(job.key)
    if future is not None and future.stop():  # False when it has ended
        flash(f"Asked {job.key} to stop.")
    return to_the_list()


def to_the_list() -> Response:
    return redirect(url_for("index"), 303)


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line per request
    server = make_server("127.0.0.1", int(os.environ.get("PORT", "5000")), app, threaded=True)
    print(f"Quickstart: open http://127.0.0.1:{server.port} (Ctrl+C to stop)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        executor.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
