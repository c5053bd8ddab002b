"""Apps written for Flask-Multiprocess-Controller, with only their import lines changed, and what is better here."""

from __future__ import annotations

import http.client
import http.server
import json
import logging
import os
import runpy
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request
from flask.testing import FlaskClient
from flask_restful import Api
from processes import family
from web_servers import gunicorn, serving
from werkzeug.exceptions import Unauthorized

from flask_executor import MissingExtra, WorkerLost
from flask_executor.compat import flask_multiprocess_controller as compat
from flask_executor.compat.flask_multiprocess_controller import (
    AbortException,
    MetaMPController,
    MetaMPLoggerConfigurator,
    MetaMPResource,
    MetaMPTask,
    TemplateFactory,
)
from flask_executor.testing.contract.fixtures import run_in_threads, wait_until

# The two examples of its documentation, with a body in place of "[...]".

BODY = """
    def execute(self, *args, **kwargs) -> None:
        # some actions to do when receiving HTTP requests
        folder = pathlib.Path(kwargs["folder"])
        # upload status to the controller
        self.upload_status('some_msg')
        while not (folder / "go on").exists():
            # check the stop signal, if flagged raise to the exception catcher
            self.checkpoint()
            time.sleep(0.01)
        (folder / "done").touch()
        return
"""
FIRST = f"""
import logging
import pathlib
import time

from flask import Flask
from flask_restful import Api
from flask_executor.compat.flask_multiprocess_controller import MetaMPController, MetaMPResource, MetaMPTask

class SampleTask(MetaMPTask):
{BODY}
class SampleController(MetaMPController, controller_name='Sample', logger=logging.getLogger('SomeHierachy.Sample'),
                       decorator=None):
    pass

class SampleResource(MetaMPResource):
    pass

sample_api = Api()
sample_controller = SampleController(target_task=SampleTask, max_num_process=2)
sample_api.add_resource(SampleResource, '/sample', resource_class_args=(sample_controller,))
app = Flask('Sample')
sample_api.init_app(app)
app.run()
"""
SECOND = f"""
import pathlib
import time

from flask import Flask
from flask_restful import Api
from flask_executor.compat.flask_multiprocess_controller import TemplateFactory, MetaMPTask

class SampleTask(MetaMPTask):
{BODY}
sample_api = Api()
sample_controller = TemplateFactory.MPController(name='Sample')(target_task=SampleTask, max_num_process=2)
sample_api.add_resource(TemplateFactory.MPResource(), '/sample', resource_class_args=(sample_controller,))
app = Flask('Sample')
sample_api.init_app(app)
app.run()
"""
RUN = "app.run()\n"

Ask = Callable[..., Any]


def use_as_documented(ask: Ask, folder: Path) -> None:
    """Start a task, look at it until it has ended; and stop another one."""
    started = ask("POST", folder=str(folder))
    uuid = started["uuid"]
    assert started == {
        "msg": f"Internal UUID {uuid} for Sample task put in the queue.",
        "uuid": uuid,
        "requestParams": str({"folder": str(folder)}),
        "taskCounter": "1",
    }
    assert wait_until(lambda: ask("GET", uuid=uuid)["progressNum"] == "some_msg")
    assert ask("GET", uuid=uuid)["msg"] == f"Process is running with uuid {uuid}."

    other = ask("POST", folder=str(folder))["uuid"]
    assert wait_until(lambda: ask("GET", uuid=other)["progressNum"] == "some_msg")
    assert ask("DELETE", uuid=other) == {"msg": f"Stop signal sent to this uuid {other}."}
    assert ends(ask, other, "stopped")

    assert not (folder / "done").exists()
    (folder / "go on").touch()
    assert wait_until(lambda: "progressNum" not in ask("GET", uuid=uuid))
    assert (folder / "done").exists()
    ended = ask("GET", uuid=uuid)
    assert ended["msg"].startswith(f"No process linked to this uuid {uuid}")
    assert ended["status"] == "succeeded"
    assert ask("DELETE", uuid="nonsense")["msg"] == "No process linked to this uuid nonsense."
    assert ask("GET") == {"msg": "Invalid request: {}"}


def asking(client: FlaskClient, path: str = "/sample") -> Ask:
    def ask(method: str, /, **arguments: Any) -> Any:
        answer = client.open(path, method=method, json=arguments)
        assert answer.status_code == 200, answer.text
        return answer.json

    return ask


def ends(ask: Ask, uuid: str, status: str) -> bool:
    """Whether a task comes to this status."""
    return wait_until(lambda: ask("GET", uuid=uuid)["status"] == status)


def asking_at(port: int) -> Ask:
    def ask(method: str, /, **arguments: Any) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, "/sample", json.dumps(arguments), {"Content-Type": "application/json"})
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, (response.status, body)
            return json.loads(body)
        finally:
            connection.close()

    return ask


def shut_down(app: Flask) -> None:
    for executor in [value for name, value in app.extensions.items() if name.endswith("executor")]:
        for future in executor.unfinished():
            future.stop(grace=0)
        executor.shutdown()


@pytest.mark.parametrize("code", [FIRST, SECOND], ids=["first", "second"])
def test_the_documented_examples(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sample_app")
    monkeypatch.setitem(sys.modules, "sample_app", module)
    exec(code.removesuffix(RUN), module.__dict__)
    try:
        use_as_documented(asking(module.app.test_client()), tmp_path)
    finally:
        shut_down(module.app)


class Both(MetaMPTask):
    def execute(self, *args: Any, **kwargs: Any) -> None:
        pass


def make_several() -> tuple[Flask, list[str]]:
    """An app with several controllers of the same name and task, one for each path."""
    api, app = Api(), Flask("Sample")
    declared = types.new_class("SampleController", (MetaMPController,), {"controller_name": "Sample"})
    controllers = [
        declared(target_task=Both),
        TemplateFactory.MPController(name="Sample")(target_task=Both),
        TemplateFactory.MPController(name="Sample")(target_task=Both, max_num_process=2),
    ]
    for number, controller in enumerate(controllers):
        api.add_resource(TemplateFactory.MPResource(), f"/{number}", resource_class_args=(controller,))
    api.init_app(app)
    with app.app_context():
        return app, [controller.executor.name for controller in controllers]


def test_controllers_of_the_same_name_in_one_app() -> None:
    apps, found = zip(*(make_several() for _ in range(2)), strict=True)
    try:
        assert len(set(found[0])) == 3
        assert found[0] == found[1], "an app factory that is called again makes the same ones"
        for app in apps:
            for number in range(3):
                ask = asking(app.test_client(), f"/{number}")
                assert ends(ask, ask("POST")["uuid"], "succeeded")
    finally:
        for app in apps:
            shut_down(app)


def test_the_first_example_as_a_script(tmp_path: Path) -> None:
    code = FIRST.replace(RUN, "app.run(port=0)\n")  # any that is free
    with serving(tmp_path, code, ["served"], "Running on http://127.0.0.1:") as (server, port):
        use_as_documented(asking_at(port), tmp_path)
        members = family(server.pid)
    assert wait_until(lambda: not any(map(alive, members)))


def test_the_second_example_under_gunicorn(tmp_path: Path) -> None:
    with gunicorn(tmp_path, SECOND.removesuffix(RUN), "--threads", "4") as (_, port):
        use_as_documented(asking_at(port), tmp_path)


def test_several_web_workers_with_a_shared_store(tmp_path: Path) -> None:
    store = 'app.config.update(SAMPLE_EXECUTOR_STORE="sqlite", SECRET_KEY="x", SAMPLE_EXECUTOR_TRACK="stored")\n'
    (tmp_path / "instance").mkdir()
    code = SECOND.removesuffix(RUN).replace("Flask('Sample')", "Flask(__name__)") + store
    with gunicorn(tmp_path, code, "--workers", "3") as (_, port):
        ask = asking_at(port)
        uuid = ask("POST", folder=str(tmp_path))["uuid"]
        for _ in range(20):
            assert ask("GET", uuid=uuid)["status"] in ("queued", "running")
        assert wait_until(lambda: ask("GET", uuid=uuid)["progressNum"] == "some_msg")
        assert ask("DELETE", uuid=uuid)["msg"].startswith("Stop signal sent")
        # The process that has the task knows a little before the others.
        assert wait_until(lambda: all(ask("GET", uuid=uuid)["status"] == "stopped" for _ in range(20)))


def test_nothing_is_left_behind_at_exit(tmp_path: Path) -> None:
    with receiving() as (url, received):
        code = SECOND.removesuffix(RUN).replace("max_num_process=2", f"callback_url={url!r}")
        code += 'app.config["SAMPLE_EXECUTOR_SHUTDOWN_TIMEOUT"] = 0.1\n'
        with gunicorn(tmp_path, code, "--threads", "2") as (server, port):
            ask = asking_at(port)
            uuid = ask("POST", folder=str(tmp_path))["uuid"]
            assert ends(ask, uuid, "running")
            members = family(server.pid)
            assert len(members) >= 2
        assert not any(map(alive, members))
        assert [(message["uuid"], message["status"]) for message in received] == [(uuid, "running"), (uuid, "stopped")]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# What follows is in one process, but for the tasks.

SHARED = {"value": "at import"}


class Gate(MetaMPTask):
    """Waits until a file is there, and then says that it was here."""

    def execute(self, *args: Any, until: str, name: str = "", **kwargs: Any) -> str:
        begin = time.monotonic()
        self.upload_status("waiting")
        while not Path(until).exists():
            self.checkpoint()
            time.sleep(0.002)
        time.sleep(kwargs.get("work", 0))
        with Path(f"{until}.log").open("a") as log:
            log.write(json.dumps([name, begin, time.monotonic()]) + "\n")
        return name


class Chatty(MetaMPTask):
    def execute(self, *args: Any, **kwargs: Any) -> None:
        for number in range(20_000):
            self.upload_status(number)
        while not Path(kwargs["until"]).exists():
            time.sleep(0.002)


class Short(MetaMPTask, task_name="a short one", logger=logging.getLogger("shop.short")):
    """Does what it is told."""

    def execute(self, do: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, do)()

    def fail(self) -> None:
        raise ValueError("no paper")

    def log(self) -> None:
        self.logger.info("number %d", self.counter)
        logging.getLogger("MAIN_WORKER.more").warning("from %d", os.getpid())

    def name(self) -> str:
        return self.task_name

    def a_set(self) -> set[int]:
        return {1}

    def seen(self) -> list[Any]:
        return [os.getpid(), SHARED["value"]]

    def request(self) -> str:
        return request.path

    def deaf(self) -> None:
        time.sleep(60)

    def clean_up(self) -> str:
        try:
            while True:
                self.set_checkpoint()
                time.sleep(0.002)
        except AbortException:
            return "cleaned up"


class Named(MetaMPTask):
    def execute(self, *args: Any, **kwargs: Any) -> None:
        raise KeyError("b")


@pytest.fixture
def serve(app: Flask, no_leaks: None) -> Iterator[Callable[..., FlaskClient]]:
    """``serve(controller, STORE="sqlite")``: a client of ``app`` with this controller at ``/sample``."""

    def serve(controller: MetaMPController, **config: Any) -> FlaskClient:
        app.config.update({f"{controller._name.upper()}_EXECUTOR_{key}": value for key, value in config.items()})
        Api(app).add_resource(TemplateFactory.MPResource(), "/sample", resource_class_args=(controller,))
        return app.test_client()

    yield serve
    shut_down(app)


Serve = Callable[..., FlaskClient]


class Sample(MetaMPController):
    pass


def test_unread_reports_never_block(serve: Serve, tmp_path: Path) -> None:
    ask = asking(serve(Sample(Chatty)))
    uuid = ask("POST", until=str(tmp_path / "go"))["uuid"]
    assert wait_until(lambda: ask("GET", uuid=uuid)["progressNum"] == "19999")
    (tmp_path / "go").touch()
    assert ends(ask, uuid, "succeeded")


def logged(path: Path) -> list[tuple[str, float, float]]:
    log = Path(f"{path}.log")
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_a_burst_never_runs_more_than_max_num_process(serve: Serve, app: Flask, tmp_path: Path) -> None:
    controller = Sample(Gate, max_num_process=3)
    serve(controller)
    gate = tmp_path / "go"
    with app.app_context():
        controller.health()  # binds the executor, which Flask allows before the first request only

    def open_when_all_are_busy() -> None:  # in the middle of the burst
        with app.app_context():
            if wait_until(lambda: controller.health().busy == 3):
                gate.touch()

    opening = threading.Thread(target=open_when_all_are_busy)
    opening.start()
    run_in_threads(30, lambda: asking(app.test_client())("POST", until=str(gate), work=0.02))
    opening.join()
    assert wait_until(lambda: len(logged(gate)) == 30, timeout=60)
    times = [(begin, 1) for _, begin, _ in logged(gate)] + [(end, -1) for _, _, end in logged(gate)]
    running = most = 0
    for _, change in sorted(times):
        running += change
        most = max(most, running)
    assert most == 3


def test_all_processes_are_used(serve: Serve, app: Flask, tmp_path: Path) -> None:
    controller = Sample(Gate, max_num_process=3)
    ask = asking(serve(controller))
    uuids = [ask("POST", until=str(tmp_path / "go"))["uuid"] for _ in range(5)]

    def statuses() -> list[str]:
        return sorted(ask("GET", uuid=uuid)["status"] for uuid in uuids)

    assert wait_until(lambda: statuses() == ["queued"] * 2 + ["running"] * 3)
    with app.app_context():
        health = controller.health()
    assert (health.busy, health.waiting, health.accepting) == (3, 2, True)
    (tmp_path / "go").touch()
    assert wait_until(lambda: statuses() == ["succeeded"] * 5)


def test_a_full_queue_is_refused(serve: Serve, tmp_path: Path) -> None:
    client = serve(Sample(Gate, max_num_process=1, max_num_queue=2))
    arguments = {"until": str(tmp_path / "go")}
    uuids = [asking(client)("POST", **arguments)["uuid"] for _ in range(3)]
    refused = client.post("/sample", json=arguments)
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "2"
    assert refused.json is not None
    assert refused.json["detail"] == "As many tasks wait as are allowed. Try again later."
    (tmp_path / "go").touch()
    for uuid in uuids:
        assert ends(asking(client), uuid, "succeeded")
    assert client.post("/sample", json=arguments).status_code == 200


def test_unknown_and_ended_are_told_apart(serve: Serve) -> None:
    ask = asking(serve(Sample(Short)))
    assert ask("GET", uuid="nonsense")["status"] == "unknown"
    assert ask("GET", uuid=["non", "sense"])["status"] == "unknown"
    uuid = ask("POST", do="name")["uuid"]
    assert wait_until(lambda: "result" in ask("GET", uuid=uuid))
    assert ask("GET", uuid=uuid) == {
        "msg": f"No process linked to this uuid {uuid} any more: its task has ended.",
        "uuid": uuid,
        "status": "succeeded",
        "result": "a short one",
    }
    assert ask("DELETE", uuid=uuid)["status"] == "succeeded"


def test_a_task_that_is_not_kept_any_more(serve: Serve) -> None:
    ask = asking(serve(Sample(Short), RESULT_TTL=0.1))
    uuid = ask("POST", do="name")["uuid"]
    assert ends(ask, uuid, "expired")
    assert ask("GET", uuid=uuid)["msg"] == f"No process linked to this uuid {uuid} any more."
    assert ask("DELETE", uuid=uuid)["status"] == "expired"


def test_a_result_that_json_does_not_have_is_kept(serve: Serve, app: Flask) -> None:
    controller = Sample(Short)
    ask = asking(serve(controller))
    uuid = ask("POST", do="a_set")["uuid"]
    assert ends(ask, uuid, "succeeded")
    assert "result" not in ask("GET", uuid=uuid)
    with app.app_context():
        assert controller.executor.futures.result(uuid) == {1}


@pytest.mark.parametrize("exposed", [False, True])
def test_failures_are_kept_and_logged(
    serve: Serve, app: Flask, caplog: pytest.LogCaptureFixture, exposed: bool
) -> None:
    controller = Sample(Short)
    ask = asking(serve(controller, EXPOSE_ERRORS=exposed))
    uuid = ask("POST", do="fail")["uuid"]
    assert ends(ask, uuid, "failed")
    assert ask("GET", uuid=uuid).get("error") == ("ValueError: no paper" if exposed else None)
    with app.app_context():
        assert repr(controller.executor.futures.exception(uuid)) == repr(ValueError("no paper"))
    assert wait_until(lambda: "no paper" in caplog.text)
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.name == app.name
    assert record.exc_info is not None
    assert "in fail" in str(record.exc_info[1].__cause__)  # type: ignore[union-attr]


def test_what_a_task_logs_arrives_at_the_handlers_of_the_app(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ask = asking(serve(Sample(Short)))
    ask("POST", do="log")
    ask("POST", do="log")
    assert wait_until(lambda: len([name for name, _, _ in caplog.record_tuples if name == "MAIN_WORKER.more"]) == 2)
    assert [text for name, _, text in caplog.record_tuples if name == "shop.short"] == ["number 1", "number 2"]
    assert str(os.getpid()) not in [text.split()[-1] for name, _, text in caplog.record_tuples if "WORKER" in name]


def test_calls_are_written_down(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    class Named(MetaMPController, controller_name="Sample", logger=logging.getLogger("shop.calls")):
        pass

    class Heir(Named, controller_name="Sample", logger=logging.getLogger("shop.calls")):
        pass

    asking(serve(Heir(Short)))("GET", uuid="nonsense")
    [text] = [text for name, _, text in caplog.record_tuples if name == "shop.calls"]
    assert text.startswith("get of Sample: called with {'uuid': 'nonsense'}, answers {'msg': ")


def test_delete(serve: Serve, tmp_path: Path) -> None:
    ask = asking(serve(Sample(Gate)))
    first, second = (ask("POST", until=str(tmp_path / "never"))["uuid"] for _ in range(2))
    assert wait_until(lambda: ask("GET", uuid=first)["progressNum"] == "waiting")
    assert ask("GET", uuid=second)["msg"] == f"Process is waiting with uuid {second}."
    assert ask("GET", uuid=second)["progressNum"] == "0"
    ask("DELETE", uuid=second)
    assert ask("GET", uuid=second)["status"] == "cancelled"
    ask("DELETE", uuid=first)
    assert ends(ask, first, "stopped")
    assert ask("DELETE", uuid=first)["msg"] == f"No process linked to this uuid {first} any more: its task has ended."
    assert ask("DELETE", uuid="nonsense")["status"] == "unknown"
    assert ask("DELETE") == {"msg": "Invalid request: {}"}


def test_a_task_without_checkpoints_is_stopped_for_certain(serve: Serve) -> None:
    ask = asking(serve(Sample(Short), STOP_GRACE=0.1))
    uuid = ask("POST", do="deaf")["uuid"]
    assert ends(ask, uuid, "running")
    ask("DELETE", uuid=uuid)
    assert ends(ask, uuid, "killed")


def test_a_task_can_clean_up_when_it_is_stopped(serve: Serve) -> None:
    ask = asking(serve(Sample(Short)))
    uuid = ask("POST", do="clean_up")["uuid"]
    assert ends(ask, uuid, "running")
    ask("DELETE", uuid=uuid)
    assert wait_until(lambda: ask("GET", uuid=uuid).get("result") == "cleaned up")


def test_a_worker_that_is_killed_costs_one_task(serve: Serve, app: Flask, tmp_path: Path) -> None:
    controller = Sample(Gate, max_num_process=2)
    ask = asking(serve(controller, EXPOSE_ERRORS=True))
    first, second, third = (ask("POST", until=str(tmp_path / "go"))["uuid"] for _ in range(3))
    assert wait_until(lambda: ask("GET", uuid=second)["progressNum"] == "waiting")
    assert wait_until(lambda: ask("GET", uuid=first)["progressNum"] == "waiting")
    with app.app_context():
        executor = controller.executor
        [victim] = [worker.pid for worker in crew(controller) if worker.job == executor.futures.job_id(first)]
        os.kill(victim, signal.SIGKILL)
        assert ends(ask, first, "lost")
        assert isinstance(executor.futures.exception(first), WorkerLost)
    assert "was killed by SIGKILL" in ask("GET", uuid=first)["error"]
    assert wait_until(lambda: ask("GET", uuid=third)["progressNum"] == "waiting")
    (tmp_path / "go").touch()
    for uuid in (second, third):
        assert ends(ask, uuid, "succeeded")


def crew(controller: MetaMPController) -> Any:
    return controller.executor._self.worker_states()


def test_each_task_has_a_process_of_its_own_which_knows_what_the_web_worker_knows_now(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = asking(serve(Sample(Short)))
    seen = []
    for value in ("first", "second"):
        monkeypatch.setitem(SHARED, "value", value)
        uuid = ask("POST", do="seen")["uuid"]
        assert ends(ask, uuid, "succeeded")
        seen.append(ask("GET", uuid=uuid)["result"])
    assert [value for _, value in seen] == ["first", "second"]
    assert seen[0][0] != seen[1][0]


def test_priority(serve: Serve, tmp_path: Path) -> None:
    client = serve(Sample(Gate))
    ask, gate = asking(client), tmp_path / "go"
    first = ask("POST", until=str(gate), name="first")["uuid"]
    assert wait_until(lambda: ask("GET", uuid=first)["progressNum"] == "waiting")
    for name, priority in [("e", 7), ("b", 0), ("d", 3), ("a", -1)]:
        ask("POST", until=str(gate), name=name, priority=priority)
    ask("POST", until=str(gate), name="c")  # 0, in order
    gate.touch()
    assert wait_until(lambda: len(logged(gate)) == 6)
    assert [name for name, _, _ in logged(gate)] == ["first", "a", "b", "c", "d", "e"]
    assert client.post("/sample", json={"until": "", "priority": "high"}).status_code == 400


def test_methods_can_be_overridden_and_others_are_refused(serve: Serve) -> None:
    class Own(MetaMPController, controller_name="Sample"):
        def get(self, *args: Any, **kwargs: Any) -> Any:
            return {**super().get(**kwargs), "by": "me"}

        def put(self, *args: Any, **kwargs: Any) -> Any:
            return {"put": kwargs}, 201

    client = serve(Own(Short))
    assert asking(client)("GET", uuid="nonsense")["by"] == "me"
    put = client.put("/sample", json={"a": 1})
    assert (put.status_code, put.json) == (201, {"put": {"a": 1}})
    for method in ("HEAD", "OPTIONS", "PATCH", "TRACE"):
        refused = client.open("/sample", method=method)
        assert refused.status_code == 405
        assert refused.headers["Allow"] == "DELETE, GET, POST, PUT"


def test_a_resource_can_be_overridden(app: Flask) -> None:
    class Own(MetaMPResource):
        def get(self) -> Any:
            return {"controller": type(self._controller).__name__, **super().get()}

    Api(app).add_resource(Own, "/sample", resource_class_args=(Sample(Short),))
    assert app.test_client().get("/sample").json == {"controller": "Sample", "msg": "Invalid request: {}"}


def test_a_decorator_guards_all_methods_also_those_of_subclasses(serve: Serve) -> None:
    def guard(method: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(self: MetaMPController, *args: Any, **kwargs: Any) -> Any:
            if request.headers.get("Authorization") != "me":
                raise Unauthorized
            calls.append(method.__name__)
            return method(self, *args, **kwargs)

        return guarded

    class Guarded(MetaMPController, decorator=guard):
        def put(self, *args: Any, **kwargs: Any) -> Any:
            return "put"

    class Mixin:
        def trace(self, *args: Any, **kwargs: Any) -> Any:
            return "trace"

    class Heir(Mixin, Guarded, controller_name="Sample"):
        def patch(self, *args: Any, **kwargs: Any) -> Any:
            return "patch"

    calls: list[str] = []
    client = serve(Heir(Short))
    for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH", "TRACE"):
        assert client.open("/sample", method=method).status_code == 401
    assert calls == []
    me = {"Authorization": "me"}
    assert client.put("/sample", headers=me).json == "put"
    assert client.patch("/sample", headers=me).json == "patch"
    assert client.trace("/sample", headers=me).json == "trace"
    assert client.get("/sample", headers=me).status_code == 200
    assert calls == ["put", "patch", "trace", "get"]


def test_a_decorator_is_for_its_own_controllers_only(app: Flask) -> None:
    class Unchanged(MetaMPController, decorator=lambda method: method):
        pass

    class Refusing(MetaMPController, decorator=lambda method: lambda self, **kwargs: ("no", 403)):
        pass

    api = Api(app)
    for path, controller in {"/a": Unchanged(Short), "/b": Refusing(Short), "/c": Sample(Short)}.items():
        api.add_resource(TemplateFactory.MPResource(), path, resource_class_args=(controller,))
    client = app.test_client()
    assert [client.get(path).status_code for path in ("/a", "/b", "/c")] == [200, 403, 200]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"{", "The body cannot be read as JSON."),
        (b"\xff\xff", "The body cannot be read as JSON."),
        (b"[" * 100_000, "The body cannot be read as JSON."),
        (b"[1]", "The body must be a JSON object, with the arguments by name."),
    ],
)
def test_a_body_that_cannot_be_used_is_refused(serve: Serve, body: bytes, detail: str) -> None:
    answer = serve(Sample(Short)).post("/sample", data=body)
    assert answer.status_code == 400
    assert answer.json is not None
    assert answer.json["detail"] == detail


def test_arguments_that_execute_does_not_take_fail_the_task(serve: Serve) -> None:
    ask = asking(serve(Sample(Short), EXPOSE_ERRORS=True))
    uuid = ask("POST", self="x")["uuid"]
    assert ends(ask, uuid, "failed")
    assert ask("GET", uuid=uuid)["error"].startswith("TypeError: ")


def test_tasks_have_the_request(serve: Serve) -> None:
    ask = asking(serve(Sample(Short)))
    uuid = ask("POST", do="request")["uuid"]
    assert wait_until(lambda: ask("GET", uuid=uuid).get("result") == "/sample")


def test_a_controller_serves_apps_that_have_begun_and_several(tmp_path: Path) -> None:
    controller = Sample(Short)
    apps = [Flask("first"), Flask("second")]
    try:
        for app in apps:
            Api(app).add_resource(TemplateFactory.MPResource(), "/sample", resource_class_args=(controller,))
            assert app.test_client().get("/elsewhere").status_code == 404
        asks = [asking(app.test_client()) for app in apps]
        uuid = asks[0]("POST", do="name")["uuid"]
        assert wait_until(lambda: asks[0]("GET", uuid=uuid).get("result") == "a short one")
        assert asks[1]("GET", uuid=uuid)["status"] == "unknown"
    finally:
        shut_down(apps[0])


def test_controllers_of_one_name(app: Flask) -> None:
    app.config["SAMPLE_EXECUTOR_EXPOSE_ERRORS"] = True
    api = Api(app)
    controllers = {"/a": Sample(Short, max_num_process=2), "/b": Sample(Named)}
    for path, controller in controllers.items():
        api.add_resource(TemplateFactory.MPResource(), path, resource_class_args=(controller,))
    client = app.test_client()
    try:
        for path, error in {"/b": "KeyError: 'b'", "/a": "ValueError: no paper"}.items():
            ask = asking(client, path)
            uuid = ask("POST", do="fail")["uuid"]
            assert ends(ask, uuid, "failed")
            assert ask("GET", uuid=uuid)["error"] == error
        with app.app_context():
            assert [controller.executor._max_workers for controller in controllers.values()] == [2, 1]
    finally:
        shut_down(app)


def test_first_requests_that_come_at_once(serve: Serve, app: Flask, tmp_path: Path) -> None:
    serve(Sample(Gate, max_num_process=2))
    uuids: list[str] = []
    until = str(tmp_path / "go")
    run_in_threads(8, lambda: uuids.append(asking(app.test_client())("POST", until=until)["uuid"]))
    ask = asking(app.test_client())
    assert {ask("GET", uuid=uuid)["status"] for uuid in uuids} <= {"queued", "running"}
    (tmp_path / "go").touch()
    assert all(ends(ask, uuid, "succeeded") for uuid in uuids)


def test_what_cannot_be_a_controller_is_refused(tmp_path: Path) -> None:
    class Local(MetaMPTask):
        def execute(self, *args: Any, **kwargs: Any) -> None:
            """Nothing."""

    with pytest.raises(TypeError, match=r"Local must stand at the top of a module"):
        Sample(Local)
    with pytest.raises(TypeError, match=r"must be a subclass of MetaMPTask"):
        Sample(Short.execute)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"MetaMPTask has no execute"):
        Sample(MetaMPTask)  # type: ignore[type-abstract]
    with pytest.raises(ValueError, match=r"max_num_process is 0"):
        Sample(Short, max_num_process=0)
    for url in ("/done", "ftp://host/done", "file:///etc/passwd", "http:///done", "http://me:secret@host/", "done"):
        with pytest.raises(ValueError, match=r"callback_url must be absolute") as raised:
            Sample(Short, callback_url=url)
        assert "secret" not in str(raised.value)


def test_logging_is_set_up_once() -> None:
    class Configurator(MetaMPLoggerConfigurator):
        @staticmethod
        def listener_log_setup() -> None:
            calls.append("set up")

    calls: list[str] = []
    for _ in range(2):
        Sample(Short, logger_configurator_cls=Configurator)
    assert calls == ["set up"]


def test_flask_restful_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flask_restful", None)
    with pytest.raises(MissingExtra, match=r"flask_restful is not installed: pip install flask-executor\[restful\]"):
        runpy.run_path(str(compat.__file__))


# ---- callbacks ----


class receiving:  # used as contextlib.contextmanager makes them
    """A server that takes callbacks: its url, and what has come. Its first answers may be others than 200."""

    def __init__(self, *statuses: int) -> None:
        received: list[Any] = []
        answers = list(statuses)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = answers.pop(0) if answers else 200
                if status == 200:
                    received.append(json.loads(body))
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._received = received

    def __enter__(self) -> tuple[str, list[Any]]:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}/done?job=1", self._received

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def test_callbacks(serve: Serve) -> None:
    with receiving() as (url, received):
        ask = asking(serve(Sample(Short, callback_url=url), EXPOSE_ERRORS=True))
        uuid = ask("POST", do="fail")["uuid"]
        assert wait_until(lambda: len(received) == 2)
    begin = {"msg": f"Task with internal uuid {uuid} begin to process", "status": "running", "progressNum": "0"}
    end = {"msg": f"Task with internal uuid {uuid} ended", "status": "failed", "error": "ValueError: no paper"}
    assert received == [{"uuid": uuid, **begin}, {"uuid": uuid, **end}]


@pytest.mark.parametrize("status", [500, 302])
def test_the_callback_of_the_end_is_tried_again(serve: Serve, status: int) -> None:
    with receiving(status, status, status) as (url, received):
        uuid = asking(serve(Sample(Short, callback_url=url)))("POST", do="name")["uuid"]
        assert wait_until(lambda: received)
    assert received == [{"msg": f"Task with internal uuid {uuid} ended", "uuid": uuid, "status": "succeeded"}]


def test_a_callback_that_fails_is_logged_and_holds_up_nothing(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with receiving() as (url, _):
        pass
    ask = asking(serve(Sample(Short, callback_url=url)))
    uuid = ask("POST", do="name")["uuid"]
    assert ends(ask, uuid, "succeeded")
    assert wait_until(lambda: caplog.text.count("Job Sample callback") == 2, timeout=20)
    assert "Connection refused" in caplog.text
