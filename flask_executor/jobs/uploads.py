"""Keeping a request's body and uploads readable for jobs that outlive the request.

A request closes its uploaded files when it ends. Once a job was submitted from it, :class:`KeptUploads` owns
the closing instead: the files stay open until the request and the last of its jobs are gone. Each job
reads them through streams of its own, which begin at the start of the file, so that neither the view nor
another job moves its position.
"""

from __future__ import annotations

import io
import os
import weakref
from dataclasses import dataclass
from typing import IO, Any

from flask import Request
from werkzeug.datastructures import FileStorage, Headers, ImmutableMultiDict
from werkzeug.exceptions import HTTPException

_SMALL = 500 * 1024  # bytes; what Werkzeug keeps in memory instead of a temporary file
_LARGE = 16 * 1024 * 1024  # bytes of a body that is no form with files, and would be kept in memory
STATE_KEY = "_flask_executor_uploads"  # in a request's state once it was prepared; None where it has no files


def keep_uploads_open(request: Request) -> None:
    """See to it that the body and the files of ``request`` outlive it, as long as a copy of it exists."""
    state = request.__dict__
    if STATE_KEY in state:
        return
    _read_body(request)
    state[STATE_KEY] = None
    if state.get("files"):
        state[STATE_KEY] = KeptUploads(state["files"])
        state["close"] = _Release(state)


def _read_body(request: Request) -> None:
    """Read the body now, unless the view has begun to; later the connection is gone.

    Forms with files are parsed (large files go to disk). Anything else is kept as bytes, from which ``form``, ``json``,
    ``data`` and ``stream`` can still be had, by the view too; a body over 16 MiB is left to the view.
    """
    state = request.__dict__
    if "stream" in state or "_cached_data" in state:
        return
    length = request.content_length
    if not length and not request.environ.get("wsgi.input_terminated"):
        return
    try:
        if request.mimetype == "multipart/form-data":
            request._load_form_data()
        elif length is None or length <= _LARGE:
            state["stream"] = io.BytesIO(request.get_data())
    except HTTPException as error:
        # Too large, or the client has gone. What does not look at the body must not fail for it; the
        # view, and a job, that does look gets the error then.
        state["stream"] = io.BufferedReader(_Refused(error))


class _Refused(io.RawIOBase):
    """The stream of a body that could not be read."""

    def __init__(self, error: HTTPException) -> None:
        self._error = error

    def readable(self) -> bool:
        return True

    def readinto(self, _buffer: Any) -> int:
        raise self._error


def give_own_streams(request: Request) -> None:
    """Give ``request``, a copy made for one job, streams of its own."""
    state = request.__dict__
    if "_cached_data" in state:
        state["stream"] = io.BytesIO(state["_cached_data"])
    kept = state[STATE_KEY]
    if kept is not None:
        state.pop("close", None)
        state["files"] = kept.independent()


class _Release:
    """Takes the place of ``request.close``: lets go of the files instead of closing them."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def __call__(self) -> None:
        self._state[STATE_KEY] = None
        self._state.pop("close", None)


class KeptUploads:
    """Holds the uploaded files of one request open; they are closed when nobody holds this any more.

    :param files: ``request.files`` of the request as it was parsed.
    """

    def __init__(self, files: ImmutableMultiDict[str, FileStorage]) -> None:
        self._files = files
        opened = [file for name in files for file in files.getlist(name)]
        self._contents = {id(file): _content(file) for file in opened}
        # Not __del__(): in a cycle the files could be finalized before it, and would warn that they are open.
        weakref.finalize(self, _close, opened)

    def independent(self) -> ImmutableMultiDict[str, FileStorage]:
        """The same files with streams of their own."""
        return ImmutableMultiDict([(name, self._copy(file)) for name, file in self._files.items(multi=True)])

    def _copy(self, file: FileStorage) -> FileStorage:
        content = self._contents[id(file)]
        if content is None:
            return file
        stream: IO[bytes] = (
            io.BytesIO(content) if isinstance(content, bytes) else io.BufferedReader(_Reader(self, content))
        )
        return FileStorage(stream, file.filename, file.name, headers=file.headers)


def _close(files: list[FileStorage]) -> None:
    for file in files:
        file.close()


class _Reader(io.RawIOBase):
    """Reads a descriptor that others read as well, with a position of its own."""

    def __init__(self, owner: KeptUploads, descriptor: int) -> None:
        self._owner: KeptUploads | None = owner  # keeps the descriptor open: its number would be given to another file
        self._descriptor = descriptor
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._owner = None
        super().close()

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._descriptor, len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._descriptor).st_size}
        self._position = max(0, start[whence] + offset)
        return self._position


def _content(file: FileStorage) -> bytes | int | None:
    """Return what new streams can be made from: bytes, the descriptor of a large file, or None without either."""
    # Through the FileStorage: on Python 3.10 a SpooledTemporaryFile has no seekable() of its own.
    if not file.seekable():
        return None
    position = file.tell()
    size = file.seek(0, os.SEEK_END) or file.tell()
    try:
        if size > _SMALL and hasattr(os, "pread"):
            try:
                return int(file.fileno())
            except OSError:  # io.UnsupportedOperation: not a file
                pass
        file.seek(0)
        return bytes(file.read())
    finally:
        file.seek(position)


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadSnapshot:
    """One uploaded file as values."""

    field: str
    filename: str | None
    headers: list[tuple[str, str]]
    content: bytes


def snapshot_uploads(state: dict[str, Any]) -> list[UploadSnapshot]:
    """The files of a request that :func:`keep_uploads_open` has prepared, read from their beginning.

    :param state: what the request's ``__dict__`` was when it was captured.
    """
    kept = state[STATE_KEY]
    if kept is None:
        return []
    return [
        UploadSnapshot(field=field, filename=file.filename, headers=list(file.headers), content=file.read())
        for field, file in kept.independent().items(multi=True)
    ]


def rebuild_uploads(request: Request, sent: list[UploadSnapshot]) -> None:
    """Give ``request`` the body and the files that were sent, in another process."""
    state = request.__dict__
    if "_cached_data" in state:
        state["stream"] = io.BytesIO(state["_cached_data"])
    state[STATE_KEY] = None
    if sent:
        request.__dict__["files"] = ImmutableMultiDict(
            (
                upload.field,
                FileStorage(io.BytesIO(upload.content), upload.filename, upload.field, headers=Headers(upload.headers)),
            )
            for upload in sent
        )
