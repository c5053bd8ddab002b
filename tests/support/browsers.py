"""A real browser, an app for it to visit, and a watch for what goes wrong in its pages."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from requirements import missing
from web_servers import serving

if not os.environ.get("CI"):  # there it is an error
    pytest.importorskip("playwright")
    pytest.importorskip("axe_playwright_python")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

LIMIT = 30_000  # milliseconds: most time that anything takes on a busy machine
expect.set_options(timeout=LIMIT)

APP = '''
import json, logging, os
from pathlib import Path
from flask import Flask, render_template_string, request, session
from flask_executor import Executor, Service, current_job, on
from flask_executor.web import Controller

app = Flask("shop", root_path=".", instance_path=str(Path("instance").absolute()))
app.config.update(SECRET_KEY="the same in all processes", EXECUTOR_STORE="sqlite", EXECUTOR_TRACK="all")
app.config.from_prefixed_env()
executor = Executor(app)
controller = Controller(executor, authorize=lambda action, job: session.get("admin"))
app.register_blueprint(controller, url_prefix="/jobs")


@controller.expose
def puppet(slug: str):
    """Does what the test writes into a file, line by line."""
    note(slug, "runs")
    orders, done = Path(f"{slug}.orders"), 0
    while True:
        lines = orders.read_text().split("\\n")[:-1] if orders.exists() else []
        for line in lines[done:]:
            order, value = json.loads(line)
            if order == "update":
                current_job.update(**value)
            elif order == "log":
                logging.getLogger("shop").warning(value)
            elif order == "fail":
                raise ValueError(value)
            else:
                return value
        done = len(lines)
        current_job.sleep(0.01)


def note(slug, what):
    with open(f"{slug}.{what}", "a") as file:
        file.write(".")


@app.after_request
def only_from_here(answer):
    answer.headers["Content-Security-Policy"] = "default-src 'self'"
    return answer


@app.get("/favicon.ico")
def icon():
    return "", 204


@app.get("/login")
def login():
    session["admin"] = True
    return "hello"


@app.route("/reports/<slug>", methods=["GET", "POST"])
def report(slug):
    options = {name: request.args[name] for name in ("name", "owner") if name in request.args}
    result = executor.options(**options).result_or_202(request.args.get("key", slug), puppet, slug)
    note(slug, "views")
    return render_template_string("""<!doctype html><title>Report</title><h1>{{ result }}</h1>
        {% for number in range(99) %}<p id="part{{ number }}">Part {{ number }}</p>{% endfor %}""", result=result)


@app.get("/order/<slug>")
def order(slug):
    return render_template_string("""<!doctype html><title>Order</title>
        <form method="post" action="{{ url_for('report', slug=slug) }}"><button>Order</button></form>""", slug=slug)


@app.get("/bars")
def bars():
    jobs = [executor.submit_once(slug, puppet, slug) for slug in request.args.getlist("slug")]
    return render_template_string("""{% from "flask_executor/macros.html" import assets, progress %}
        <!doctype html><html lang="en"><head><title>Bars</title>{{ assets() }}</head>
        <body><main><h1>Bars</h1>{% for job in jobs %}{{ progress(job) }}{% endfor %}</main></body>""", jobs=jobs)


class Echo(Service):
    @on("echo")
    def echo(self, body):
        return body

    @on("die")
    def die(self, _):
        os._exit(3)


echo = executor.service(Echo)


@app.get("/echo/<type>")
def ask(type):
    return {"answer": repr(echo.call(type, 1).exception())}


@app.get("/start/<slug>")
def start(slug):
    return {"id": executor.submit_once(slug, puppet, slug).job_id}


@app.get("/fill/<int:count>")
def fill(count):
    futures = [executor.options(name=f"sum {number % 10}").submit(sum, [number]) for number in range(count)]
    return {"sum": sum(future.result() for future in futures)}
'''


class Puppet:
    """A job that does what it is told."""

    def __init__(self, shop: Shop, slug: str) -> None:
        self.slug = slug
        self.url = f"{shop.url}/reports/{slug}"
        self._folder = shop.folder

    def update(self, **what: object) -> None:
        self._order("update", what)

    def log(self, text: str) -> None:
        self._order("log", text)

    def fail(self, message: str) -> None:
        self._order("fail", message)

    def finish(self, result: str = "the report") -> None:
        self._order("finish", result)

    def forget_orders(self) -> None:
        """Before it is started again."""
        self._file("orders").unlink(missing_ok=True)

    @property
    def runs(self) -> int:
        """How often it was started."""
        return self._count("runs")

    @property
    def views(self) -> int:
        """How often the view went on with its result."""
        return self._count("views")

    def _order(self, order: str, value: object) -> None:
        with self._file("orders").open("a") as file:
            file.write(json.dumps([order, value]) + "\n")

    def _count(self, what: str) -> int:
        file = self._file(what)
        return file.stat().st_size if file.exists() else 0

    def _file(self, what: str) -> Path:
        return self._folder / f"{self.slug}.{what}"


class Shop:
    """The app, on a server of two processes that can be killed and started again."""

    def __init__(self, folder: Path, **config: object) -> None:
        self.folder = folder
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._environ = {f"FLASK_EXECUTOR_{name.upper()}": json.dumps(value) for name, value in config.items()}
        self._puppets: list[Puppet] = []
        self._server = ExitStack()
        self._pid = 0

    def start(self) -> None:
        options = ["--bind", f"127.0.0.1:{self._port}", "-w", "2", "-k", "gthread", "--threads", "8"]
        command = ["gunicorn", *options, "--graceful-timeout", "5", "served:app"]
        (self.folder / "log").unlink(missing_ok=True)
        server = serving(self.folder, APP, command, "Listening at: http://127.0.0.1:", **self._environ)
        self._pid = self._server.enter_context(server)[0].pid

    def kill(self) -> None:
        """All of its processes at once, as a power cut does."""
        os.killpg(self._pid, signal.SIGKILL)
        self._server.close()

    def puppet(self) -> Puppet:
        self._puppets.append(Puppet(self, f"job{len(self._puppets)}"))
        return self._puppets[-1]

    def finish_jobs(self) -> None:
        for puppet in self._puppets:
            puppet.finish()

    def close(self) -> None:
        self.finish_jobs()
        self._server.close()
        log = (self.folder / "log").read_text()
        assert "Exception on /" not in log, log


def free_port() -> int:
    """One that Chromium does not refuse: those that it has for dangerous are below 11,000."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("there is no free port")


class Tabs:
    """What people have open, and what went wrong there."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._troubles: list[str] = []
        self._excused: list[str] = []

    def open(self, url: str, **options: Any) -> Page:
        """A page of somebody who was never here before.

        :param options: of the browser context.
        """
        context = self._browser.new_context(**options)
        context.set_default_timeout(LIMIT)
        self._watch(context)
        page = context.new_page()
        page.goto(url)
        return page

    def excuse(self, *texts: str) -> None:
        """What the test itself brings about."""
        self._excused += texts

    def close(self) -> None:
        for context in self._browser.contexts:
            context.close()
        assert [trouble for trouble in self._troubles if not any(text in trouble for text in self._excused)] == []

    def _watch(self, context: BrowserContext) -> None:
        def on_console(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                self._troubles.append(f"{message.type}: {message.text} ({message.location['url']})")

        def on_failure(request: Request) -> None:
            if request.failure != "net::ERR_ABORTED":  # by the page itself: whoever leaves it cuts its streams off
                self._troubles.append(f"{request.method} {request.url}: {request.failure}")

        def on_dialog(dialog: Any) -> None:
            self._troubles.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        context.on("console", on_console)
        context.on("requestfailed", on_failure)
        context.on("dialog", on_dialog)
        context.on("weberror", lambda error: self._troubles.append(f"uncaught: {error.error}"))


@contextmanager
def launched() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        missing("there is no Chromium: apt install chromium")
    arguments = ["--no-sandbox", "--disable-background-networking"]
    with without_threads_for_children(), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@contextmanager
def without_threads_for_children() -> Iterator[None]:
    """Before Python 3.12 asyncio keeps a thread for each child process; a test would seem to have left it behind."""
    if sys.version_info >= (3, 12):
        yield
        return

    class Watcher(asyncio.PidfdChildWatcher):
        def is_active(self) -> bool:
            self.attach_loop(asyncio.get_running_loop())
            return True

    policy = asyncio.get_event_loop_policy()
    policy.set_child_watcher(Watcher())
    yield
    policy.set_child_watcher(asyncio.ThreadedChildWatcher())


def part(page: Page | Locator, name: str) -> Locator:
    return page.locator(f"[data-executor-part={name}]")


def expect_status(page: Page | Locator, text: str) -> None:
    expect(part(page, "status")).to_have_text(text)


#: Widths and colours of the pages that people look at, as options of a browser context.
LOOKS = [
    pytest.param(
        {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}, id=f"{width}-{scheme}", marks=marks
    )
    for width, scheme, marks in (
        (360, "dark", ()),
        (1280, "light", ()),
        (360, "light", pytest.mark.storm),
        (1280, "dark", pytest.mark.storm),
    )
]


def assert_accessible(page: Page) -> None:
    """axe finds nothing to complain about, and nobody has to scroll sideways."""
    found = Axe().run(page).response["violations"]
    assert [(rule["id"], [node["target"] for node in rule["nodes"]]) for rule in found] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


#: What would run scripts if it came into a page as it is.
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script><a href='javascript:alert(3)'>x</a>"


def assert_harmless(page: Page) -> None:
    """No element was made from :data:`HOSTILE`; it stands there as text."""
    made = page.locator("img, script:not([src]), a[href^=javascript], [onerror]")
    expect(made).to_have_count(0)
    shown = page.get_by_text("<img src=x onerror=alert(1)>").locator("visible=true")
    expect(shown).not_to_have_count(0)
