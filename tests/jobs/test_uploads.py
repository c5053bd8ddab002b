"""Files that were uploaded can be read by jobs after the request has ended."""

from __future__ import annotations

import gc
import io
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from flask import Flask, Request, request
from werkzeug.datastructures import FileStorage, MultiDict
from werkzeug.test import encode_multipart

from flask_executor.testing.contract.fixtures import MakeExecutor

SMALL = b"small" * 10
LARGE = bytes(range(256)) * 4096  # 1 MiB: Werkzeug puts it into a temporary file

Start = Callable[[], Any]


class Shop:
    """An app with one view that starts jobs, on an executor that begins with them only after the request."""

    def __init__(self, app: Flask, make_executor: MakeExecutor) -> None:
        self.executor = make_executor(max_workers=3)
        self._app = app
        self._go = threading.Event()
        for _ in range(3):
            self.executor.submit(self._go.wait, 10)

    def post(self, view: Callable[[], Any], content: bytes = SMALL, **data: Any) -> Any:
        answers = []

        def endpoint() -> str:
            answers.append(view())
            return "started"

        self._app.add_url_rule("/", "endpoint", endpoint, methods=["POST"])
        # Encoded by hand: the test client would leave a temporary file of its own open.
        data = data or {"title": "T", "upload": FileStorage(io.BytesIO(content), "photo.png", content_type="image/png")}
        boundary, body = encode_multipart(MultiDict(data))
        content_type = f"multipart/form-data; boundary={boundary}"
        assert self._app.test_client().post("/", data=body, content_type=content_type).text == "started"
        self._go.set()
        return answers[0]


@pytest.fixture
def shop(app: Flask, make_executor: MakeExecutor) -> Shop:
    return Shop(app, make_executor)


def read() -> tuple[str, str, str | None, bytes]:
    upload = request.files["upload"]
    return request.form["title"], upload.mimetype, upload.filename, upload.read()


@pytest.mark.parametrize("content", [SMALL, LARGE, b""], ids=["small", "large", "empty"])
@pytest.mark.parametrize("parsed", ["by the view", "not at all", "in part"])
def test_from_the_request(shop: Shop, content: bytes, parsed: str) -> None:
    def view() -> Future[Any]:
        if parsed == "by the view":
            assert request.files["upload"].read() == content
        elif parsed == "in part":
            request.files["upload"].read(3)
        return shop.executor.submit(read)

    assert shop.post(view, content).result() == ("T", "image/png", "photo.png", content)


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_as_an_argument(shop: Shop, content: bytes) -> None:
    def view() -> Future[bytes]:
        return shop.executor.submit(lambda files: files[0].read(), [request.files["upload"]])

    assert shop.post(view, content).result() == content


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_several_jobs_read_at_the_same_time(shop: Shop, content: bytes) -> None:
    together = threading.Barrier(3, timeout=10)

    def read_slowly() -> Any:
        upload = request.files["upload"]
        first = upload.read(7)
        together.wait()
        return first + upload.read()

    jobs = shop.post(lambda: [shop.executor.submit(read_slowly) for _ in range(3)], content)
    assert [job.result() for job in jobs] == [content] * 3


def test_the_view_keeps_its_position(shop: Shop) -> None:
    def view() -> Any:
        upload = request.files["upload"]
        upload.read(5)
        shop.executor.submit(read)
        return upload.read()

    assert shop.post(view) == SMALL[5:]


def test_seek_tell_and_save(shop: Shop, tmp_path: Any) -> None:
    def use() -> tuple[bytes, int, bytes]:
        upload = request.files["upload"]
        upload.seek(-3, io.SEEK_END)
        end = upload.read()
        upload.seek(1)
        upload.seek(1, io.SEEK_CUR)
        position = upload.tell()
        upload.seek(0)
        upload.save(tmp_path / "saved")
        return end, position, (tmp_path / "saved").read_bytes()

    assert shop.post(lambda: shop.executor.submit(use), LARGE).result() == (LARGE[-3:], 2, LARGE)


def test_several_files_under_one_name(shop: Shop) -> None:
    files = [FileStorage(io.BytesIO(SMALL), "a"), FileStorage(io.BytesIO(LARGE), "b")]
    job = shop.post(
        lambda: shop.executor.submit(lambda: [file.read() for file in request.files.getlist("upload")]), upload=files
    )
    assert job.result() == [SMALL, LARGE]


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_files_are_closed_when_request_and_jobs_are_over(shop: Shop, content: bytes) -> None:
    originals: list[FileStorage] = []
    copies: list[FileStorage] = []

    def look() -> None:
        copies.append(request.files["upload"])

    def view() -> list[Future[None]]:
        originals.append(request.files["upload"])
        return [shop.executor.submit(look), shop.executor.submit(look)]

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for job in shop.post(view, content):
            job.result()
        shop.executor.shutdown()
        gc.collect()
    assert [file.stream.closed for file in originals + copies] == [True, True, True]


def test_a_body_that_is_too_large_disturbs_neither_view_nor_job(app: Flask, shop: Shop) -> None:
    app.config["MAX_CONTENT_LENGTH"] = 10

    def look() -> str:
        try:
            return request.form["title"]
        except Exception as error:
            return f"{request.path} {type(error).__name__}"

    assert shop.post(lambda: shop.executor.submit(look)).result() == "/ RequestEntityTooLarge"


def test_a_view_that_reads_the_stream_after_submit(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor()

    @app.post("/")
    def view() -> bytes:
        assert executor.submit(lambda: request.stream.read()).result() == b"abcdef"
        return request.stream.read()

    assert app.test_client().post("/", data=b"abcdef").data == b"abcdef"


def test_a_limit_is_kept_for_the_view(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor()

    class Limited(Request):
        max_form_parts = 1

    app.request_class = Limited

    @app.post("/")
    def view() -> str:
        executor.submit(int).result()
        return str(request.form)

    boundary, body = encode_multipart(MultiDict({"a": "1", "b": "2"}))
    answer = app.test_client().post("/", data=body, content_type=f"multipart/form-data; boundary={boundary}")
    assert answer.status_code == 413


def test_a_chunked_body(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor(max_workers=1)
    go = threading.Event()
    executor.submit(go.wait, 10)
    futures = []

    @app.post("/")
    def view() -> str:
        futures.append(executor.submit(lambda: request.get_data()))
        return ""

    environ = {"wsgi.input_terminated": True, "wsgi.input": io.BytesIO(b"abc"), "HTTP_TRANSFER_ENCODING": "chunked"}
    app.test_client().post("/", environ_overrides=environ)
    go.set()
    assert futures[0].result() == b"abc"


def test_a_large_body_is_left_to_the_view(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor()
    size = 17 * 1024 * 1024

    @app.post("/")
    def view() -> str:
        executor.submit(int).result()
        assert "_cached_data" not in request.__dict__
        return str(len(request.stream.read()))

    assert app.test_client().post("/", data=b"x" * size).text == str(size)


def test_a_view_that_reads_the_stream_itself(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor()

    @app.post("/")
    def view() -> bytes:
        first = request.stream.read(2)
        executor.submit(int).result()
        return first + request.stream.read()

    assert app.test_client().post("/", data=b"abcdef").data == b"abcdef"


def test_a_view_that_reads_the_body_after_submit(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor()

    @app.post("/")
    def view() -> list[Any]:
        executor.submit(int).result()
        return [request.get_data(as_text=True), request.form.get("a")]

    assert app.test_client().post("/", data={"a": "1"}).json == ["a=1", "1"]
