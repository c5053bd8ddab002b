"""Jobs that wait for a transaction of SQLAlchemy to be committed.

SQLAlchemy tells of the end of every transaction of a session with ``after_transaction_end``, and just before of its
commit, if that is how it ends, with ``after_commit``; savepoints and flushes have transactions of their own. Jobs are
started by the former: the latter forbids SQL, which type ``immediate`` would run right there.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from flask_executor.exceptions import MissingExtra
from flask_executor.executor.pending import DeferredCall

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session

_INFO = "flask_executor_commits"  # in session.info


class AfterCommit:
    """The calls that wait for the transactions of one session. It lives as long as the session, and listens once.

    It refers to transactions, and these to their session; so it must be found from the session only, or neither would
    ever be collected.
    """

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._waiting: list[tuple[SessionTransaction, DeferredCall]] = []  # in the order in which they came
        self._committed: SessionTransaction | None = None

    def is_of(self, session: Session) -> bool:
        """Return whether it is this session's, and was not copied with the ``info`` of another one."""
        return self._session() is session

    def add(self, deferred: DeferredCall) -> None:
        """Start a job when what the session is in the middle of now has been committed to the end."""
        session: Any = self._session()
        self._waiting.append((session.get_nested_transaction() or session.get_transaction(), deferred))

    def committed(self, session: Session) -> None:
        """A transaction was committed, or a savepoint released; its end is told next."""
        self._committed = session.get_nested_transaction() or session.get_transaction()

    def ended(self, session: Session, transaction: SessionTransaction) -> None:
        """A transaction has ended: what waits for it waits for the one around it, is started, or is dropped."""
        ours = [deferred for waited_for, deferred in self._waiting if waited_for is transaction]
        was_committed = self._committed is transaction
        if was_committed:
            self._committed = None
        if not ours:
            return
        parent = transaction.parent
        if was_committed and parent is not None:
            self._waiting = [(parent if of is transaction else of, deferred) for of, deferred in self._waiting]
            return
        # Before any is started: a job that runs here may use this session, and come here again.
        self._waiting = [(of, deferred) for of, deferred in self._waiting if of is not transaction]
        for deferred in ours:
            deferred.start() if was_committed else deferred.drop()


def commits_of(session: Session | scoped_session[Any]) -> AfterCommit:
    """Return what waits for the transactions of this session, which is in one from now on.

    Otherwise nothing would tell of a rollback, or of the session being closed, before there was any SQL.

    :raises TypeError: for what is no session.
    :raises MissingExtra: without SQLAlchemy.
    """
    try:
        from sqlalchemy import event
        from sqlalchemy.orm import Session, scoped_session
    except ImportError as error:
        raise MissingExtra("sqlalchemy", "sqlalchemy") from error
    if isinstance(session, scoped_session):
        session = session()
    if not isinstance(session, Session):
        raise TypeError(f"submit_after_commit() takes a session of SQLAlchemy, such as db.session, not {session!r}")
    if not session.in_transaction():
        if not session.autobegin:
            raise RuntimeError("the session has no transaction and begins none by itself: call session.begin() before")
        session.begin()
    commits: AfterCommit | None = session.info.get(_INFO)
    if commits is None or not commits.is_of(session):
        commits = session.info[_INFO] = AfterCommit(session)
        event.listen(session, "after_commit", commits.committed)
        event.listen(session, "after_transaction_end", commits.ended)
    return commits
