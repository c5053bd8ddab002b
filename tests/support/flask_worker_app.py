"""The app that Flask-Worker documents, with its import lines changed, on a real server."""

from __future__ import annotations

import html
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from web_servers import serving

from flask_executor.testing.contract.fixtures import wait_until

FACTORY = """
# 1. Import the Manager
from flask_executor.compat.flask_worker import Manager

from flask import Flask
from flask_socketio import SocketIO
from flask_sqlalchemy import SQLAlchemy
from redis import Redis
from rq import Queue
import eventlet
import os

db = SQLAlchemy()
eventlet.monkey_patch(socket=True)
socketio = SocketIO(asynch_mode='eventlet')
# 2. Initialize a Manager with the database and socketio
manager = Manager(db=db, socketio=socketio)

def create_app():
    app = Flask(__name__)
    app.config['SQLALCHEMY_DATABASE_URI'] = (
        'sqlite:///'+os.path.join(os.getcwd(), 'data.db')
    )
    app.config['SQLALCHEMY_TRACK_MODIFICATIONS'] = False
    app.config['EXPLAIN_TEMPLATE_LOADING'] = True
    app.redis = Redis.from_url('redis://')
    app.task_queue = Queue('my-task-queue', connection=app.redis)
    db.init_app(app)
    socketio.init_app(app, message_queue='redis://')
    # 3. Initialize the manager with the application
    manager.init_app(app)
    return app
"""

MODELS = """
from factory import db

# 1. Import the worker mixin
from flask_executor.compat.flask_worker import WorkerMixin

import time


class Employer(db.Model):
    \"\"\"Employer model\"\"\"
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String)

    # 2. Add a worker to the employer
    # The worker must reference its employer by the attribute name 'employer'
    worker = db.relationship('Worker', uselist=False, backref='employer')

    def __init__(self, name):
        self.name = name
        # 3. Instantiate a worker
        self.worker = Worker(
            method_name='complex_task', kwargs={'seconds': 2}
        )

    def complex_task(self, seconds):
        print('Complex task started')
        for i in range(seconds):
            print('Progress: {}%'.format(100.0*i/seconds))
            time.sleep(1)
        print('Progress: 100.0%')
        print('Complex task finished')


# 4. Create a Worker model with the worker mixin
class Worker(WorkerMixin, db.Model):
    id = db.Column(db.Integer, primary_key=True)
    employer_id = db.Column(db.Integer, db.ForeignKey('employer.id'))


def get_model(model_class, name):
    \"\"\"Convenience method for database querying\"\"\"
    model = model_class.query.filter_by(name=name).first()
    if not model:
        model = model_class(name=name)
        db.session.add(model)
        db.session.flush([model])
    return model
"""

ROUTER_MODELS = """
from factory import db
from models import Employer, get_model

# 1. Import the router mixin and set_route decorator
from flask_executor.compat.flask_worker import RouterMixin, set_route

# 2. Create a Router class with the router mixin.
class Router4(RouterMixin, db.Model):
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String)

    def __init__(self, name):
        self.name = name
        # 3. Set `current_route` on initialization
        self.current_route = 'func1'
        self.args = ['hello world']
        super().__init__()

    def func1(self, hello_world):
        print(hello_world)
        return self.func2('hello moon')

    # 4. 'Bookmark' functions with the @set_route decorator
    @set_route
    def func2(self, hello_moon):
        print(hello_moon)
        employer = get_model(Employer, 'employer4')
        worker = employer.worker
        # 5. Run the Employer's complex task with a Worker
        return self.run_worker(
            worker=worker, next_route=self.func3, args=['hello star']
        )

    @set_route
    def func3(self, hello_star):
        print(hello_star)
        return 'Example 4 finished'


class Router5(RouterMixin, db.Model):
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String)

    def __init__(self, name):
        self.name = name
        self.reset()
        super().__init__()

    def reset(self):
        self.current_route = 'func1'
        self.args = ['hello world']
        self.kwargs = {}
        employer = get_model(Employer, 'employer5')
        employer.worker.reset()

    def func1(self, hello_world):
        print(hello_world)
        return self.func2('hello moon')

    @set_route
    def func2(self, hello_moon):
        print(hello_moon)
        employer = get_model(Employer, 'employer5')
        worker = employer.worker
        return self.run_worker(
            worker=worker, next_route=self.func3, args=['hello star']
        )

    def func3(self, hello_star):
        print(hello_star)
        # Reset the Router
        self.reset()
        return 'Example 5 finished'
"""

APP = """
from factory import create_app, db, socketio
from models import Employer
from models import get_model
from router_models import Router4
from router_models import Router5

app = create_app()

with app.app_context():
    db.create_all()

@app.route('/example1')
def example1():
    print('Request for /example1')
    employer = get_model(Employer, 'employer1')
    worker = employer.worker
    if not worker.job_finished:
        return worker()
    return 'Example 1 finished'

@app.route('/example2')
def example2():
    print('Request for /example2')
    employer = get_model(Employer, 'employer2')
    worker = employer.worker
    if not worker.job_finished:
        return worker()
    worker.reset()
    db.session.commit()
    return 'Example 2 finished'

@app.route('/example3')
def example3():
    print('Request for /example3')
    employer = get_model(Employer, 'employer3')
    worker = employer.worker
    worker.callback = 'callback_route'
    return worker()

@app.route('/callback_route')
def callback_route():
    print('Request for /callback_route')
    employer = get_model(Employer, 'employer3')
    worker = employer.worker
    if not worker.job_finished:
        return worker()
    worker.reset()
    db.session.commit()
    return 'Example 3 finished'

@app.route('/example4')
def example4():
    print('Request for /example4')
    router = get_model(Router4, 'router4')
    return router.route()

@app.route('/example5')
def example5():
    print('Request for /example5')
    router = get_model(Router5, 'router5')
    return router.route()

if __name__ == '__main__':
    socketio.run(app)
"""

# What the examples do not show. Jobs end when the test says so, or fail.
MORE = """
import os, signal, sys, time
from pathlib import Path
from flask import render_template_string, request
from werkzeug.exceptions import abort

def work(self, name):
    print(f'{name} started')
    while not Path(f'{name}.done').exists():
        time.sleep(0.01)

def fail(self, name):
    raise ValueError('a secret of ' + name)

def die(self, name):
    os.kill(os.getpid(), signal.SIGKILL)

Employer.work, Employer.fail, Employer.die = work, fail, die

@app.route('/hire/<name>')
def hire(name):
    worker = get_model(Employer, name).worker
    worker.method_name = request.args.get('method', 'work')
    worker.kwargs = {'name': name}
    worker.template = request.args.get('template')
    worker.loading_img = request.args.get('loading_img')
    db.session.commit()
    return 'hired'

@app.route('/work/<name>')
def do_work(name):
    worker = get_model(Employer, name).worker
    if worker.job_finished:
        return '<h1>The work is done</h1>'
    worker.callback = request.args.get('callback')
    return worker()

@app.route('/dismiss/<name>')
def dismiss(name):
    get_model(Employer, name).worker.reset()
    db.session.commit()
    return 'dismissed'

@app.after_request
def only_from_here(answer):
    answer.headers['Content-Security-Policy'] = "default-src 'self'"
    return answer

@app.get('/favicon.ico')
def icon():
    return '', 204
"""

OWN_TEMPLATE = """<!doctype html>
<html>
  <head>
    {{ worker.script() }}
  </head>
  <body>
    <img src="{{ url_for('static', filename=worker.loading_img) }}" alt="Loading">
  </body>
</html>
"""


class Waiting:
    """The page that waits, with what its script would do."""

    def __init__(self, office: Office, path: str) -> None:
        self.text = office.get(path)
        found = re.search(r'data-worker-url="([^"]*)" data-worker-callback="([^"]*)"', self.text)
        assert found is not None, self.text
        self.url, self.next = html.unescape(found[1]), html.unescape(found[2]) or path
        self._office = office

    @property
    def job_id(self) -> str:
        return self.url.partition("job_id=")[2]

    @property
    def status(self) -> str:
        status: str = json.loads(self._office.get(self.url))["status"]
        return status

    def end(self) -> str:
        """The status that the job ends with."""
        assert wait_until(lambda: self.status not in ("queued", "running"), timeout=60), self.status
        return self.status

    def follow(self) -> str:
        """What the page becomes."""
        assert self.end() == "succeeded"
        return self._office.get(self.next)


_WITHOUT_REDIS = ("from redis", "from rq", "    app.redis", "    app.task_queue")
_WITHOUT_EVENTLET = ("import eventlet", "eventlet.")
_GIF = bytes.fromhex("47494638396101000100800000ffffff00000021f90401000000002c00000000010001000002024401003b")


class Office:
    """The app on its server, and what it has printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str) -> tuple[int, str]:
        """The status and the text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def get(self, path: str) -> str:
        """The text of an answer that is no error."""
        status, text = self.ask(path)
        assert status == 200, (status, text)
        return text

    def wait_at(self, path: str) -> Waiting:
        """Ask for a page, which has to be the one that waits."""
        return Waiting(self, path)

    def printed(self, *texts: str) -> list[str]:
        """What was printed of these texts, by the app and then by the worker of RQ."""
        logs = (self.folder / name for name in ("log", "worker.log"))
        # Not line by line: the ends of lines that two threads print may come after both.
        wanted = re.compile("|".join(map(re.escape, texts)))
        return [text for log in logs if log.exists() for text in wanted.findall(log.read_text())]

    def finish(self, name: str) -> None:
        """Let a job end."""
        (self.folder / f"{name}.done").touch()


@contextmanager
def opened(folder: Path, redis_url: str | None, *, socketio: bool = True, eventlet: bool = False) -> Iterator[Office]:
    """An office whose jobs run in a worker of RQ, and on this package's executor without Redis.

    :param eventlet: whether the server is that of the documentation.
    """
    _write(folder, redis_url, socketio=socketio, eventlet=eventlet)
    office = Office(folder)
    with ExitStack() as stack:
        if redis_url is not None:
            stack.enter_context(_rq_worker(folder, redis_url, eventlet=eventlet))
        mark = " on http://127.0.0.1:"  # each server has another word before it
        _, office.port = stack.enter_context(serving(folder, "", ["app"], mark))
        yield office


def _write(folder: Path, redis_url: str | None, *, socketio: bool, eventlet: bool) -> None:
    factory, run = FACTORY, "socketio.run(app, port=0, log_output=True, allow_unsafe_werkzeug=True)"
    if redis_url is None:
        factory = _without(factory, _WITHOUT_REDIS).replace(", message_queue='redis://'", "")
    if eventlet:
        run = "socketio.run(app, port=0, log_output=True)"
    else:
        factory = _without(factory, _WITHOUT_EVENTLET)
        factory = factory.replace("asynch_mode='eventlet'", "async_mode='threading', namespaces='*'")
    if not socketio:
        factory = factory.replace("db=db, socketio=socketio", "db=db")
        run = "app.run(port=0)"
    for name, text in {
        "factory.py": factory.replace("redis://", redis_url or ""),
        "models.py": MODELS,
        "router_models.py": ROUTER_MODELS,
        "app.py": APP.replace("if __name__", f"{MORE}\nif __name__").replace("socketio.run(app)", run),
        "templates/own.html": OWN_TEMPLATE,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "static").mkdir()
    (folder / "static" / "worker_loading.gif").write_bytes(_GIF)
    (folder / "static" / "my-loading-img.gif").write_bytes(_GIF)


def _without(text: str, beginnings: tuple[str, ...]) -> str:
    """A text without the lines that begin so."""
    return "\n".join(line for line in text.splitlines() if not line.startswith(beginnings))


@contextmanager
def _rq_worker(folder: Path, redis_url: str, *, eventlet: bool) -> Iterator[None]:
    # The child that it forks for each job imports the app. This spares it the libraries; but eventlet has to be first.
    libraries = "rq" if eventlet else "flask_executor, flask_socketio, flask_sqlalchemy"
    rq = f"import {libraries}; from rq.cli import main; main()"
    command = [sys.executable, "-c", rq, "worker", "my-task-queue", "--url", redis_url]
    environ = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
    with (folder / "worker.log").open("wb") as output:
        worker = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environ)
    try:
        yield
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(30)
