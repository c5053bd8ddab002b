"""The backends and stores that what is promised of all of them is tested with."""

from __future__ import annotations

from typing import Any

import pytest
from redis_server import redis_client

#: What every shared store promises is tested with each of these. A new one joins by a line here and one below.
SHARED_STORES = ["sqlite", "redis"]

#: What every backend promises is tested with each of these. A new one joins by a line here.
TYPES: dict[str, dict[str, Any]] = {
    "thread": {},
    "process": {"start_method": "fork"},
    "process forkserver": {"type": "process", "start_method": "forkserver"},
    "process spawn": {"type": "process", "start_method": "spawn"},
    "process as on macOS": {"type": "process", "start_method": "fork"},
    "immediate": {},
    "rq": {},
    "celery": {},
    "dask": {},
}


def store_url(store: str, request: pytest.FixtureRequest) -> str:
    if store != "redis":
        return store
    url: str = request.getfixturevalue("redis_url")
    with redis_client(url) as client:
        client.flushall()
    return url
