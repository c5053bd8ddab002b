from __future__ import annotations

from typing import Any

import pytest
from flask import Flask

from flask_executor import ConfigError, Executor, ExecutorError
from flask_executor.executor.config import Config
from flask_executor.testing.contract.fixtures import MakeExecutor


def read(**values: Any) -> Config:
    return Config.read({f"EXECUTOR_{key.upper()}": value for key, value in values.items()})


def test_defaults() -> None:
    config = read()
    assert config.type == "flask_executor.backends.thread:ThreadBackend"
    assert config.max_workers is None
    assert config.max_pending is None
    assert config.futures_max_length == 50
    assert config.push_app_context is True
    assert config.propagate_exceptions is False
    assert config.immediate_pickle is False
    assert config.store_max_records == 10_000
    assert (config.timeout, config.stop_grace, config.shutdown_timeout) == (None, 5.0, 30.0)
    assert (config.start_method, config.app, config.max_tasks_per_child) == (None, None, None)


def test_strings_are_coerced() -> None:
    config = read(
        max_workers="5",
        max_pending=" 7 ",
        futures_max_length="10",
        push_app_context="false",
        propagate_exceptions="true",
        immediate_pickle="on",
        type=" process ",
        timeout="2.5",
        stop_grace="0",
        shutdown_timeout="1e1",
        start_method=" spawn ",
        app=" shop:app ",
        max_tasks_per_child="3",
    )
    assert (config.timeout, config.stop_grace, config.shutdown_timeout) == (2.5, 0.0, 10.0)
    assert (config.start_method, config.app, config.max_tasks_per_child) == ("spawn", "shop:app", 3)
    assert (config.max_workers, config.max_pending, config.futures_max_length) == (5, 7, 10)
    assert (config.push_app_context, config.propagate_exceptions, config.immediate_pickle) == (False, True, True)
    assert config.type == "flask_executor.backends.process:ProcessBackend"


@pytest.mark.parametrize("nothing", [None, "", "None", " none "])
def test_none_keeps_the_default(nothing: str | None) -> None:
    config = read(max_workers=nothing, max_pending=nothing, futures_max_length=nothing)
    assert (config.max_workers, config.max_pending, config.futures_max_length) == (None, None, 50)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("TYPE", "threads", "'thread', 'process', 'immediate'"),
        ("TYPE", None, "'package.module:Class'"),
        ("TYPE", 3, "'thread'"),
        ("MAX_WORKERS", 0, "greater than 0, or None"),
        ("MAX_WORKERS", "-1", "greater than 0, or None"),
        ("MAX_WORKERS", "many", "a whole number"),
        ("MAX_WORKERS", 2.5, "a whole number"),
        ("MAX_WORKERS", True, "a whole number"),
        ("MAX_PENDING", [], "a whole number"),
        ("FUTURES_MAX_LENGTH", "0", "greater than 0"),
        ("PUSH_APP_CONTEXT", "perhaps", "True or False"),
        ("PROPAGATE_EXCEPTIONS", 2, "True or False"),
        ("IMMEDIATE_PICKLE", "yess", "True or False"),
        ("TIMEOUT", 0, "seconds greater than 0, or None"),
        ("TIMEOUT", "soon", "seconds greater than 0, or None"),
        ("STOP_GRACE", -1, "a number of seconds, 0 or more"),
        ("STOP_GRACE", None, "a number of seconds, 0 or more"),
        ("SHUTDOWN_TIMEOUT", float("inf"), "a number of seconds, 0 or more"),
        ("START_METHOD", "vfork", "'fork', 'spawn'"),
        ("APP", 3, "such as 'shop:app'"),
        ("MAX_TASKS_PER_CHILD", 0, "greater than 0, or None"),
        ("STORE", "mysql", "'memory'"),
        ("STORE_MAX_RECORDS", None, "a whole number"),
    ],
)
def test_bad_values_name_key_value_and_what_is_allowed(app: Flask, key: str, value: object, allowed: str) -> None:
    app.config[f"EXECUTOR_{key}"] = value
    with pytest.raises(ConfigError) as raised:
        Executor(app)
    message = str(raised.value)
    assert f"EXECUTOR_{key}" in message
    assert repr(value) in message
    assert allowed in message
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, ExecutorError)
    assert "executor" not in app.extensions


def test_a_named_executor_reads_prefixed_keys_only(app: Flask, make_executor: MakeExecutor) -> None:
    app.config["EXECUTOR_MAX_WORKERS"] = 5
    app.config["EXECUTOR_TYPE"] = "immediate"
    plain = make_executor()
    reports = make_executor(name="reports", max_workers=3)
    assert reports._max_workers == 3
    assert app.config["REPORTS_EXECUTOR_TYPE"] == "thread"
    assert not hasattr(plain, "_max_workers")
    with pytest.raises(ConfigError, match="REPORTS2_EXECUTOR_MAX_WORKERS is 'x'"):
        make_executor(name="reports2", max_workers="x")


def test_defaults_are_written_into_the_config(app: Flask, executor: Executor) -> None:
    assert app.config["EXECUTOR_TYPE"] == "thread"
    assert app.config["EXECUTOR_PUSH_APP_CONTEXT"] is True
    assert app.config["EXECUTOR_FUTURES_MAX_LENGTH"] is None


def test_a_backend_of_ones_own(make_executor: MakeExecutor) -> None:
    executor = make_executor(type="flask_executor.backends.immediate:ImmediateBackend")
    assert executor.submit(int, "3").result() == 3


@pytest.mark.parametrize(
    "target", ["nowhere.at.all:Backend", "flask_executor.jobs.model:Job", "flask_executor.jobs.model:missing"]
)
def test_a_backend_that_is_none(make_executor: MakeExecutor, target: str) -> None:
    with pytest.raises(ConfigError, match="EXECUTOR_TYPE"):
        make_executor(type=target)


def test_binding_again_reads_the_config_anew(app: Flask, executor: Executor) -> None:
    future = executor.submit(int, 1)
    app.config["EXECUTOR_MAX_WORKERS"] = 2
    executor.init_app(app)
    assert executor._max_workers == 2
    assert future.result() == 1
    assert executor.submit(int, 2).result() == 2


def test_a_misspelt_key_is_not_ignored_silently(make_executor: MakeExecutor, caplog: pytest.LogCaptureFixture) -> None:
    make_executor(max_worker=4, colour="blue")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "EXECUTOR_MAX_WORKER is no setting of Flask-Executor, and is ignored. Did you mean EXECUTOR_MAX_WORKERS?",
        "EXECUTOR_COLOUR is no setting of Flask-Executor, and is ignored.",
    ]


def test_keys_of_others_are_not_ours(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    app.config.update(EXECUTORS=4, SCHEDULER_EXECUTORS={}, REPORTS_EXECUTOR_TYPE="thread", EXECUTOR_TYPE="thread")
    Executor(app)
    Executor(app, name="reports")
    assert not caplog.records


def test_what_is_set_too_late_is_not_ignored_silently(
    app: Flask, make_executor: MakeExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    executor = make_executor()
    app.config["EXECUTOR_MAX_WORKERS"] = 1
    app.config["EXECUTOR_TYPE"] = "no such type"
    app.config["EXECUTOR_TIMEOUT"] = "none"  # as it was
    assert executor.submit(int).result() == 0
    assert executor.submit(int).result() == 0
    assert [record.getMessage() for record in caplog.records] == [
        "EXECUTOR_TYPE and EXECUTOR_MAX_WORKERS changed in app.config after the executor had read it, and what it was "
        "then is used. Set it before Executor(app), or call executor.init_app(app) again."
    ]
    app.config["EXECUTOR_TYPE"] = "immediate"
    executor.init_app(app)
    assert executor.submit(int).result() == 0
    assert len(caplog.records) == 1
