"""Messages to jobs that wait in the queue of an engine, and that its workers run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tasks
from flask import Flask
from requirements import require
from variants import store_url

from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until


@pytest.mark.parametrize("while_it_runs", [False, True])
def test_messages_to_a_job_in_a_queue(
    app: Flask, make_executor: MakeExecutor, request: pytest.FixtureRequest, while_it_runs: bool
) -> None:
    require("rq")
    url = store_url("redis", request)
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(type="rq", url=url)
    future = executor.submit_stored("report", tasks.echo_messages, 250 if while_it_runs else 200)
    assert future.status == "queued"
    for number in range(200):
        assert future.send("page", number)
    environ = {**os.environ, "FLASK_EXECUTOR_TYPE": "rq", "FLASK_EXECUTOR_URL": url}
    environ["PYTHONPATH"] = os.pathsep.join([str(Path(tasks.__file__).parent), *sys.path])
    command = [sys.executable, "-m", "flask", "--app", "tasks:create_app()", "executor", "worker", "--burst"]
    with subprocess.Popen(command, env=environ) as worker:
        if while_it_runs:
            assert wait_until(lambda: future.message == "receiving", 30)
            for number in range(200, 250):
                assert future.send("page", number)
        assert future.result(30) == [("page", number) for number in range(250 if while_it_runs else 200)]
        assert worker.wait(30) == 0
    assert not future.send("page", 250)
