"""Jobs in threads of this process: the default.

Calls of priority 0 go through the queue of the standard pool. When one has another priority, all that wait move to a
priority queue, and a slot stands for each of them in the pool's queue: the thread that gets a slot runs the call which
is first in the priority queue then.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import weakref
from typing import Any

from flask_executor.abc import Backend, BackendOptions, PreparedCall
from flask_executor.exceptions import ExecutorShutdown
from flask_executor.helpers.priority_queue import PriorityQueue


class ThreadBackend(concurrent.futures.ThreadPoolExecutor, Backend):
    """A :class:`~concurrent.futures.ThreadPoolExecutor` that runs calls.

    Its threads are daemons: one that is stuck in a job must not keep the process from ending. The executor waits for
    the others at its shutdown.
    """

    chunks = True

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(max_workers=options.max_workers, thread_name_prefix="flask-executor")
        self._by_priority: PriorityQueue[PreparedCall] = PriorityQueue()  # under _shutdown_lock
        self._slot = _QueueSlot(self)

    def enqueue(self, call: PreparedCall) -> None:
        with self._shutdown_lock:
            if self._shutdown:
                raise ExecutorShutdown("cannot schedule new futures after shutdown")
            if call.priority or self._by_priority:
                self._push_by_priority(call)
            else:
                self._work_queue.put(call)  # type: ignore[arg-type]  # the workers only call run()
            if len(self._threads) < self._max_workers:  # else there is no need to count idle threads
                self._adjust_thread_count()

    def withdraw(self, call: PreparedCall) -> bool:
        if self._by_priority:
            with self._shutdown_lock:
                self._by_priority.remove(call, call.priority)  # a slot that finds no call does no harm
        return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._shutdown_lock:
            self._shutdown = True
            waiting = self._pop_all() if cancel_futures else []
            self._work_queue.put(None)  # type: ignore[arg-type]  # each thread passes it on to the next
        for item in waiting:
            item.future.cancel()
        if wait:
            for thread in list(self._threads):
                if thread is not threading.current_thread():
                    thread.join()

    @property
    def workers(self) -> int:
        return sum(thread.is_alive() for thread in list(self._threads))

    @property
    def capacity(self) -> int:
        return self._max_workers

    def _push_by_priority(self, call: PreparedCall) -> None:
        if not self._by_priority:
            for waiting in self._pop_all():
                self._by_priority.push(waiting, getattr(waiting, "priority", 0))
                self._work_queue.put(self._slot)  # type: ignore[arg-type]
        self._by_priority.push(call, call.priority)
        self._work_queue.put(self._slot)  # type: ignore[arg-type]

    def _pop_all(self) -> list[Any]:
        waiting = self._by_priority.clear()
        while True:
            try:
                item: Any = self._work_queue.get_nowait()
            except queue.Empty:
                return waiting
            if item is not None and item is not self._slot:
                waiting.append(item)

    def _adjust_thread_count(self) -> None:
        if self._idle_semaphore.acquire(blocking=False):
            return
        if len(self._threads) < self._max_workers:
            # When the backend is collected its threads end.
            work: Any = self._work_queue
            pool = weakref.ref(self, lambda _: work.put(None))
            name = f"{self._thread_name_prefix}_{len(self._threads)}"
            thread = threading.Thread(target=_work, args=(work, pool), name=name, daemon=True)
            thread.start()
            self._threads.add(thread)  # type: ignore[attr-defined]


class _QueueSlot:
    """In the pool's queue: runs the call that is first in the priority queue by then."""

    def __init__(self, pool: ThreadBackend) -> None:
        self._pool = weakref.ref(pool)

    def run(self, *_unused: object) -> None:
        pool = self._pool()
        if pool is None:
            return
        with pool._shutdown_lock:
            call = pool._by_priority.pop() if pool._by_priority else None
        del pool
        if call is not None:
            call.run()


def _work(work: queue.SimpleQueue[Any], pool: weakref.ref[ThreadBackend]) -> None:
    while True:
        try:
            item = work.get_nowait()
        except queue.Empty:
            backend = pool()
            if backend is not None:
                backend._idle_semaphore.release()
            del backend
            item = work.get()
        if item is None:
            work.put(None)
            return
        item.run()
        del item
