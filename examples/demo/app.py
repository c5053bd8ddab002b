"""The back office of a bookshop: what Flask-Executor does, on one page.

.. code-block:: console

    $ python examples/demo                    # PORT=5001 for another port

Every ``EXECUTOR_…`` variable of the environment is configuration. With ``EXECUTOR_TYPE=process`` the jobs run in worker
processes instead of threads; with ``rq``, ``celery`` or ``dask`` in workers that could be on other machines. They are
started along, and a Redis if ``EXECUTOR_URL`` does not name one; see ``cluster.py``.

With ``EXECUTOR_STORE=sqlite`` all processes see all jobs: several web workers, and the commands of ``flask executor``:

.. code-block:: console

    $ export EXECUTOR_STORE=sqlite
    $ gunicorn -w 4 --chdir examples/demo app:app
    $ flask --app examples/demo/app.py executor top
"""

from __future__ import annotations

import inspect
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any

import jobs
from flask import Flask, abort, flash, jsonify, redirect, render_template, request, session, url_for
from jobs import executor
from werkzeug.wrappers import Response

from flask_executor import Job, QueueFull
from flask_executor.web import Controller

app = Flask(__name__)
app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY", "for this example only"),  # the same in all processes
    SESSION_COOKIE_SAMESITE="Lax",
    MAX_CONTENT_LENGTH=1024 * 1024,
    EXECUTOR_TYPE="thread",
    EXECUTOR_STORE="memory",
    EXECUTOR_MAX_WORKERS=4,  # few, so that some jobs wait
    EXECUTOR_MAX_PENDING=60,  # one more is refused with QueueFull
    EXECUTOR_TRACK="all",  # also the jobs without a key
    EXECUTOR_SHUTDOWN_TIMEOUT=2,
    EXECUTOR_EXPOSE_ERRORS=True,  # a real shop would not show visitors what went wrong inside
    EXECUTOR_WAITING_IMAGE="/static/books.svg",
)
app.config.update({key: value for key, value in os.environ.items() if key.startswith("EXECUTOR_")})
executor.init_app(app)


def visitor() -> str:
    return str(session.setdefault("visitor", secrets.token_hex(8)))


def is_at_this_computer(action: str, job: Job | None) -> bool:
    """Who may see the dashboard and the jobs of others. A real app asks its login here: ``current_user.is_admin``."""
    return request.remote_addr in ("127.0.0.1", "::1")


def mount_controller() -> None:
    controller = Controller(executor, authorize=is_at_this_computer, owner=visitor)
    controller.expose(jobs.resize_covers, name="covers")
    app.register_blueprint(controller, url_prefix="/jobs")


mount_controller()

MONTHS = ("april", "may", "june")


# ---- the page that waits ----


@app.get("/reports/<month>")
def report(month: str) -> str:
    if month not in MONTHS:
        abort(404)
    sales = jobs.add_up_sales.result_or_202(f"sales {month}", month)
    return render_template("report.html", month=month, sales=sales)


@app.post("/reports/<month>")
def report_again(month: str) -> Response:
    executor.futures.pop(f"sales {month}")  # the next one who asks starts it anew
    return redirect(url_for("report", month=month), 303)


# ---- failing, and trying again ----


@app.get("/prices")
def prices() -> str:
    call = 1 + len(executor.jobs.list(name="Prices"))
    found = jobs.fetch_prices.result_or_202("prices", call)
    return render_template("prices.html", prices=found)


@app.post("/prices")
def prices_again() -> Response:
    executor.futures.pop("prices")
    return redirect(url_for("prices"), 303)


# ---- stopping ----


@app.get("/stock")
def stock() -> str:
    books = jobs.count_stock.result_or_202("stock")
    return render_template("stock.html", books=books)


# ---- one step after the other ----


@app.get("/orders/<int:number>")
def order(number: int) -> str:
    flow = executor.flow(f"order {number}")
    order = flow.step(jobs.load_order, number)  # at the first request only
    grams = flow.result_or_202(jobs.pack, order)  # waits
    total = flow.result_or_202(jobs.write_invoice, order, grams)  # waits again
    return render_template("order.html", order=order, grams=grams, total=total)


@app.post("/orders/<int:number>")
def order_again(number: int) -> Response:
    executor.flow(f"order {number}").reset()
    return redirect(url_for("order", number=number), 303)


# ---- live bars in a page of one's own ----


@app.get("/")
def home() -> str:
    return render_template("home.html", mine=executor.jobs.list(owner=visitor(), limit=6), months=MONTHS)


@app.post("/labels")
def labels() -> Response:
    # With a key every web worker knows it at once; without one it is written down a moment later.
    jobs.print_labels.options(owner=visitor(), key=f"labels {secrets.token_hex(4)}").submit(20)
    return redirect(url_for("home", _anchor="mine"), 303)


# ---- a form with a file ----


@app.post("/manuscripts")
def manuscript() -> Response:
    if not request.files["manuscript"]:  # read here, so that one that is too large is refused at once
        abort(400)
    words = jobs.read_manuscript.result_or_202(f"manuscript {secrets.token_hex(4)}")  # leads to the job's own page
    return jsonify(words)


# ---- many jobs ----


@app.post("/parcels")
def parcels() -> Response:
    for number in range(1, 21):
        jobs.send_parcel.options(owner=visitor()).submit(number)
    return redirect(url_for("executor.index"), 303)


@app.errorhandler(QueueFull)
def queue_is_full(error: QueueFull) -> Response:
    flash(f"{error.limit} jobs are waiting, no more were started. Try again when some are done.")
    return redirect(url_for("home"), 303)


# ---- around it ----


@app.after_request
def only_from_here(response: Response) -> Response:
    """Nothing needs the network, inline scripts or inline styles."""
    response.headers["Content-Security-Policy"] = "default-src 'self'"
    return response


@app.get("/favicon.ico")
def icon() -> Response:
    return app.send_static_file("books.svg")


@app.context_processor
def for_templates() -> dict[str, Any]:
    return {"code": code, "jobs": jobs, "shop": sys.modules[__name__]}


def code(*functions: Callable[..., Any]) -> str:
    """The functions as they stand in the files."""
    return "\n\n".join(inspect.getsource(function).strip() for function in functions)
