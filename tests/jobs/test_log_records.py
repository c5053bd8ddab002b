"""Log records that know their job."""

from __future__ import annotations

import copy
import json
import logging
import logging.handlers
import pickle
import queue
from typing import Any

import pytest

from flask_executor import Executor, LogLine, current_job
from flask_executor.cli.console import log_line
from flask_executor.stores.codec import decode_line, encode_line
from flask_executor.testing import drain

log = logging.getLogger("shop.logs")


def test_outside_of_jobs_the_fields_are_none(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    log.warning("here")
    (record,) = caplog.records
    assert (record.job_id, record.job_key) == (None, None)  # type: ignore[attr-defined]
    assert logging.Formatter("%(job_id)s %(message)s").format(record) == "None here"
    assert not hasattr(record, "job_name")


def test_an_app_may_have_jobs_of_its_own(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    def job() -> None:
        log.warning("mine", extra={"job_id": 5})

    assert executor.submit(job).exception(10) is None
    (record,) = caplog.records
    assert record.job_id == 5  # type: ignore[attr-defined]


def test_records_can_be_copied_and_pickled(executor: Executor) -> None:
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(records)
    log.addHandler(handler)
    try:

        def job() -> str:
            log.warning("page %d", 4)
            return current_job.id

        job_id = executor.submit(job).result(10)
    finally:
        log.removeHandler(handler)
    record: Any = records.get_nowait()
    for each in (record, copy.copy(record), pickle.loads(pickle.dumps(record))):
        assert (each.getMessage(), each.job_id) == ("page 4", job_id)
        assert isinstance(each, logging.LogRecord)
        assert json.dumps(each.__dict__["job_id"]) == f'"{job_id}"'


def test_a_factory_of_the_apps_own_is_kept(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    class Record(logging.LogRecord):
        shop = "tea"

    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(Record)
    try:
        Executor(executor.app, name="other")  # looks again
        log.warning("here")
    finally:
        logging.setLogRecordFactory(before)
    (record,) = caplog.records
    assert (record.shop, record.job_id) == ("tea", None)  # type: ignore[attr-defined]


def test_arguments_that_do_not_fit_do_not_fail_the_job(
    executor: Executor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def job() -> None:
        logging.getLogger("shop.quiet").info("page %d of %d", 4)

    quiet = logging.getLogger("shop.quiet")
    quiet.setLevel(logging.INFO)
    quiet.propagate = False
    try:
        future = executor.submit(job)
        assert future.exception(10) is None
    finally:
        quiet.setLevel(logging.NOTSET)
        quiet.propagate = True
    assert [line.text for line in future.log()] == ["page %d of %d"]


def test_jobs_in_one_thread_do_not_share_their_lines(executor: Executor) -> None:
    def job(text: str) -> None:
        log.warning(text)

    futures: list[Any] = [executor.submit(job, str(number)) for number in range(20)]
    drain(executor)
    assert [[line.text for line in future.log()] for future in futures] == [[str(number)] for number in range(20)]


def test_a_line_keeps_exceptions_apart(executor: Executor) -> None:
    def job() -> None:
        log.error("failed", exc_info=ValueError("no paper"))
        log.error("", exc_info=ValueError("no ink"), stack_info=True)

    future = executor.submit(job)
    assert future.exception(10) is None
    first, second = future.log()
    assert (first.text, first.trace, first.full_text) == (
        "failed",
        "ValueError: no paper",
        "failed\nValueError: no paper",
    )
    assert second.full_text.startswith("ValueError: no ink\nStack (most recent call last):")
    assert "ValueError: no paper" in log_line(first)


def test_lines_that_were_written_before_they_kept_exceptions_apart() -> None:
    line = LogLine(time=1.0, level="INFO", logger="shop", text="page 1")
    older = json.loads(encode_line(line))
    assert older.pop("trace") is None
    assert decode_line(json.dumps(older)) == line
