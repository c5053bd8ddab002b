"""The list of jobs, filtered and in pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flask_executor.abc import JobRecords
from flask_executor.jobs.model import Job, JobStatus
from flask_executor.web.status import key_text

MAX_PAGE_SIZE = 200
_MAX_SEARCHED = 20_000  # newest jobs; older ones are not searched


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """Which jobs to list; None for a filter that is not set."""

    status: JobStatus | None = None
    name: str | None = None
    owner: str | None = None
    #: The key as text.
    key: str | None = None
    #: A part of name, key, owner or id, in upper or lower case.
    text: str | None = None
    #: The cursor of the page before: time and id of its last job.
    before: tuple[float, str] | None = None
    #: How many jobs a page has at most.
    limit: int = 50

    @classmethod
    def parse(cls, arguments: Mapping[str, str]) -> Query:
        """Read the query of a url; a parameter that is empty counts as not given.

        :raises ValueError: saying what is wrong.
        """
        given = {name: value for name, value in arguments.items() if value}
        status, limit, before = given.get("status"), given.get("limit", "50"), given.get("before")
        if status is not None and status not in list(JobStatus):
            raise ValueError(f"status is {status[:50]!r}; it must be one of {', '.join(JobStatus)}.")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= MAX_PAGE_SIZE):
            raise ValueError(f"limit is {limit[:50]!r}; it must be a number from 1 to {MAX_PAGE_SIZE}.")
        return cls(
            status=None if status is None else JobStatus(status),
            name=given.get("name"),
            owner=given.get("owner"),
            key=given.get("key"),
            text=given.get("q"),
            before=None if before is None else _parse_cursor(before),
            limit=int(limit),
        )

    def given(self) -> dict[str, str]:
        """The query for a url, without ``before``."""
        filters = {"status": self.status, "name": self.name, "owner": self.owner, "key": self.key, "q": self.text}
        return {**{name: str(value) for name, value in filters.items() if value is not None}, "limit": str(self.limit)}

    def matches(self, job: Job) -> bool:
        """If true, key and text match; status, name and owner are matched by the store."""
        key = key_text(job.key)
        if self.key is not None and key != self.key:
            return False
        if self.text is None:
            return True
        text = self.text.casefold()
        return any(text in (field or "").casefold() for field in (job.name, key, job.owner, job.id))


def list_page(records: JobRecords, query: Query) -> tuple[Sequence[Job], str | None]:
    """The jobs of a page, and the cursor for the next page; None if this is the last one."""
    size = query.limit + 1 if query.key is None and query.text is None and query.before is None else 4 * query.limit
    while True:  # read more and more jobs: most pages that are asked for are near the beginning
        found = records.list(status=query.status, name=query.name, owner=query.owner, limit=size)
        matching = [job for job in _after(found, query.before) if query.matches(job)]
        if len(matching) > query.limit:
            return matching[: query.limit], _cursor(matching[query.limit - 1])
        if len(found) < size or size >= _MAX_SEARCHED:
            return matching, None
        size = min(4 * size, _MAX_SEARCHED)


def _cursor(job: Job) -> str:
    return f"{job.queued_at!r}-{job.id}"


def _parse_cursor(text: str) -> tuple[float, str]:
    time, _, id = text.partition("-")
    try:
        return float(time), id
    except ValueError:
        raise ValueError(f"before is {text[:50]!r}; it must be as it stands in 'next' of the page before.") from None


def _after(jobs: Sequence[Job], before: tuple[float, str] | None) -> Sequence[Job]:
    """The jobs after the one of the cursor; if its record has expired, those that were queued before it."""
    if before is None:
        return jobs
    time, id = before
    for number, job in enumerate(jobs):
        if job.id == id:
            return jobs[number + 1 :]
    return [job for job in jobs if job.queued_at < time]
