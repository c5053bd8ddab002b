"""A page of the list of jobs: those that match what somebody looks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flask_executor.abc import JobRecords
from flask_executor.jobs.model import Job, JobStatus
from flask_executor.web.status import key_text

MOST_LISTED = 200  # jobs on a page
_MOST_SEARCHED = 20_000  # newest jobs that are looked through


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What somebody looks for; None for whatever there is."""

    status: JobStatus | None = None
    name: str | None = None
    owner: str | None = None
    #: The key, as people see it.
    key: str | None = None
    #: Stands somewhere in name, key, owner or id, in capitals or not.
    text: str | None = None
    #: What the page before ended with.
    before: tuple[float, str] | None = None
    #: Most jobs on the page.
    limit: int = 50

    @classmethod
    def parse(cls, arguments: Mapping[str, str]) -> Query:
        """Read the query of a url; what is empty is not asked for.

        :raises ValueError: saying what is wrong.
        """
        given = {name: value for name, value in arguments.items() if value}
        status, limit, before = given.get("status"), given.get("limit", "50"), given.get("before")
        if status is not None and status not in list(JobStatus):
            raise ValueError(f"status is {status[:50]!r}; it must be one of {', '.join(JobStatus)}.")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= MOST_LISTED):
            raise ValueError(f"limit is {limit[:50]!r}; it must be a number from 1 to {MOST_LISTED}.")
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
        """What was asked for, as it stands in a url; without ``before``."""
        asked = {"status": self.status, "name": self.name, "owner": self.owner, "key": self.key, "q": self.text}
        return {**{name: str(value) for name, value in asked.items() if value is not None}, "limit": str(self.limit)}

    def matches(self, job: Job) -> bool:
        """Whether a job is meant, among those of this status, name and owner."""
        key = key_text(job.key)
        if self.key is not None and key != self.key:
            return False
        if self.text is None:
            return True
        text = self.text.casefold()
        return any(text in (field or "").casefold() for field in (job.name, key, job.owner, job.id))


def list_page(records: JobRecords, query: Query) -> tuple[Sequence[Job], str | None]:
    """The jobs of a page, and what the page after it is to be asked for with; None when there is none."""
    size = query.limit + 1 if query.key is None and query.text is None and query.before is None else 4 * query.limit
    while True:  # more and more of them, as most pages are near the beginning
        found = records.list(status=query.status, name=query.name, owner=query.owner, limit=size)
        matching = [job for job in _after(found, query.before) if query.matches(job)]
        if len(matching) > query.limit:
            return matching[: query.limit], _cursor(matching[query.limit - 1])
        if len(found) < size or size >= _MOST_SEARCHED:
            return matching, None
        size = min(4 * size, _MOST_SEARCHED)


def _cursor(job: Job) -> str:
    return f"{job.queued_at!r}-{job.id}"


def _parse_cursor(text: str) -> tuple[float, str]:
    time, _, id = text.partition("-")
    try:
        return float(time), id
    except ValueError:
        raise ValueError(f"before is {text[:50]!r}; it must be as it stands in 'next' of the page before.") from None


def _after(jobs: Sequence[Job], before: tuple[float, str] | None) -> Sequence[Job]:
    """Those that come behind that job; if it is not there any more, those that were queued earlier."""
    if before is None:
        return jobs
    time, id = before
    for number, job in enumerate(jobs):
        if job.id == id:
            return jobs[number + 1 :]
    return [job for job in jobs if job.queued_at < time]
