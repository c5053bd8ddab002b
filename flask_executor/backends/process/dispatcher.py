"""Who runs which call: the queue, and what each worker process was given.

Everything here happens under one lock, which is held for short and never while something is waited for. How the parts
work together stands at the top of :mod:`flask_executor.supervisor`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from flask_executor.abc import WorkerState
from flask_executor.backends.process.protocol import Broadcast, DeliverMessage
from flask_executor.backends.process.worker_process import Task, WorkerProcess
from flask_executor.exceptions import ExecutorShutdown
from flask_executor.helpers.log import logger
from flask_executor.helpers.pickling import CompactPickle
from flask_executor.helpers.priority_queue import PriorityQueue
from flask_executor.jobs.call import Call
from flask_executor.jobs.model import JobStatus

_PREFETCH = 8  # calls that a worker is given beyond the one it runs
_MAX_WAIT_BEHIND_JOB = 0.02  # seconds: behind a job that runs for longer nothing is left waiting
_MOST_MAIL = 64  # messages for a job that are kept without a look whether it has begun
_START_TIMEOUT = 60.0  # seconds that a worker may take to get ready, until its initializers run


class Dispatcher:
    """Takes in calls and hands them out to worker processes.

    :param max_workers: most worker processes.
    :param max_tasks: calls after which a worker is retired; None for never.
    :param exit_grace: seconds that a worker may take to end.
    :param wake_up: has the supervisor call :meth:`step` soon.
    :param fixed_size: whether there are always as many workers, and not just as many as there is work for.
    """

    def __init__(
        self,
        max_workers: int,
        max_tasks: int | None,
        exit_grace: float,
        wake_up: Callable[[], None],
        *,
        fixed_size: bool = False,
    ) -> None:
        self._fixed_size = fixed_size
        self._max_workers = max_workers
        self._max_tasks = max_tasks
        self._exit_grace = exit_grace
        self._wake_up = wake_up
        self._lock = threading.RLock()  # a finalizer may come here in the middle
        self._queue: PriorityQueue[Task] = PriorityQueue()
        self._tasks: dict[str, Task] = {}  # all that are queued or with a worker
        self._workers: list[WorkerProcess] = []
        self._idle: list[WorkerProcess] = []
        self._stopped_unstarted: list[
            Task
        ] = []  # were asked to leave before they began; to be settled by the supervisor
        self._early: dict[str, list[DeliverMessage]] = {}  # messages for jobs that wait for their next attempts
        self._has_priorities = False  # whether there ever was a priority other than 0
        self._may_sleep = True  # whether the supervisor may sleep until something happens
        self.closing = False
        self._ended = False
        #: Messages that were sent to all workers.
        self.broadcasts = 0

    # ---- any thread ----

    def add(self, task: Task) -> None:
        """Take in a call.

        :raises ExecutorShutdown: after :meth:`close`; for one that nobody waits for after :meth:`terminate`.
        """
        with self._lock:
            if self._ended if task.fire_and_forget else self.closing:
                raise ExecutorShutdown("cannot schedule new futures after shutdown")
            priority = task.call.priority
            waiting = len(self._queue)
            self._tasks[task.id] = task
            if self._early:
                task.mail.extend(self._early.pop(task.id, ()))
            self._queue.push(task, priority)
            if priority:
                self._has_priorities = True
            if self._has_priorities and not self._idle:
                self._recall_lower_priority(priority)
            elif waiting and not self._idle and len(self._workers) == self._max_workers:
                return  # nobody had room for those before it, and whoever gets room looks here
            self._hand_out()

    def withdraw(self, id: str) -> bool:
        """Give up a call that has not begun; False when it has, and its future is claimed then."""
        with self._lock:
            task = self._tasks.get(id)
            if task is None:
                return True
            worker = task.worker
            if worker is None and task.call.future.running():
                return False  # a plain one, that was put back
            if worker is not None:
                if not task.begun:
                    self._recall(worker)
                if task.worker is not None:
                    self._claim_all(worker)
                    return False
            self._drop(task)
            self._hand_out()
            return True

    def request_stop(self, id: str, attempt: int, reason: JobStatus) -> None:
        """Tell this attempt of a running job to leave."""
        with self._lock:
            task = self._tasks.get(id)
            if task is None or task.call.job.attempt != attempt:
                return
            if task.worker is not None:
                task.worker.request_stop(task, reason)
            else:
                self._stop_queued(task)

    def _stop_queued(self, task: Task) -> None:
        """One that was put back, claimed as it is, need not begin any more."""
        if task.call.future.running():
            self._drop(task)
            self._stopped_unstarted.append(task)
            self._wake_up()

    def deliver(self, message: DeliverMessage, *, expected: bool = False) -> None:
        """Send a message to a job; it is kept until that begins.

        :param expected: whether it is kept also if the job is not here, as it, or its next attempt, may come.
        """
        with self._lock:
            task = self._tasks.get(message.id)
            if task is None:
                if expected:
                    self._early.setdefault(message.id, []).append(message)
                    if len(self._early) > _MOST_MAIL:  # of jobs that came no more
                        del self._early[next(iter(self._early))]
                return
            if not task.taken:
                task.mail.append(message)
            if task.begun and task.worker is not None:
                self._send_message(task.worker, message)
                self._wake_up()  # to send on the rest
                if len(task.mail) > _MOST_MAIL and task.worker.calls.was_transferred(task.number):
                    task.taken = True
                    task.mail.clear()

    def kill(self, id: str, attempt: int) -> None:
        """End this attempt of a job by force, and nothing else."""
        with self._lock:
            task = self._tasks.get(id)
            if task is None or task.call.job.attempt != attempt:
                return
            worker = task.worker
            if worker is None:
                self._stop_queued(task)
                return
            # With nothing left to take, the worker cannot go on to another call between this decision and its death.
            self._recall(worker, begun_too=True)
            if worker.tasks and worker.tasks[-1] is task:  # or it has ended, and what came of it is on its way
                task.killed = worker.retired = True
                worker.kill()
            self._hand_out()

    def broadcast(self, data: bytes) -> int:
        """Send something to all workers, for them to do before any call that comes after this; to how many."""
        with self._lock:
            self.broadcasts += 1
            for worker in self._workers:
                self._send_message(worker, Broadcast(self.broadcasts, data))
            self._wake_up()  # to send on the rest
            return len(self._workers)

    def kill_all(self) -> None:
        """End all workers by force."""
        with self._lock:
            for worker in self._workers:
                worker.kill()

    def close(self, *, cancel_futures: bool) -> list[Task]:
        """Take in no more calls.

        :return: those that are given up, if ``cancel_futures`` says so.
        """
        cancelled: list[Task] = []
        with self._lock:
            self.closing = True
            if cancel_futures:
                for worker in self._workers:
                    self._recall(worker)
                cancelled = self._queue.clear()
                for task in cancelled:
                    del self._tasks[task.id]
            self._wake_up()
        return cancelled

    def processes(self) -> dict[int, Any]:
        """The worker processes by their ids."""
        with self._lock:
            return {worker.process.pid: worker.process for worker in self._workers}

    def worker_states(self) -> list[WorkerState]:
        """The worker processes, and what they do."""
        with self._lock:
            running = [(worker, worker.tasks[0].id if worker.tasks else None) for worker in self._workers]
            return [
                WorkerState(pid=worker.process.pid or 0, busy=id is not None, job=id, ready=worker.ready)
                for worker, id in running
            ]

    def call(self, id: str) -> Call | None:
        """The call of the job with this id, if it is queued or with a worker."""
        task = self._tasks.get(id)
        return None if task is None else task.call

    # ---- the supervisor ----

    def waiting(self) -> int:
        """How many calls no worker has got."""
        return len(self._queue)

    @property
    def done(self) -> bool:
        """Whether it is closed, and all calls and workers have ended."""
        return self.closing and not self._tasks and not self._workers

    def next_timeout(self) -> float | None:
        """Seconds until :meth:`step` has to be called unasked; None while there is no need."""
        with self._lock:
            self._may_sleep = all(len(worker.tasks) < 2 for worker in self._workers)
            if not self._may_sleep:
                return _MAX_WAIT_BEHIND_JOB
            return _START_TIMEOUT / 4 if any(not worker.is_up for worker in self._workers) else None

    def step(self) -> tuple[int, list[WorkerProcess], list[Task]]:
        """Do what is due.

        :return: how many workers are to be started, those that there are, and claimed calls that have left.
        """
        with self._lock:
            late = time.monotonic() - _MAX_WAIT_BEHIND_JOB
            for worker in self._workers:
                if len(worker.tasks) > 1 and worker.since < late:
                    self._recall(worker)
                if not worker.is_up and worker.since < late - _START_TIMEOUT:
                    logger.error("Worker process %s is killed: it hung while it was starting.", worker.process.pid)
                    worker.kill()
            self._hand_out(stepping=True)
            if self.closing and not self._tasks:
                for worker in self._workers:
                    if not worker.retired:
                        worker.retire(self._exit_grace)
            missing = self._max_workers - len(self._workers)
            if not self._fixed_size or self.closing:
                starting = sum(not worker.ready for worker in self._workers)
                missing = min(len(self._queue) - starting, missing)
            left, self._stopped_unstarted = self._stopped_unstarted, []
            return missing, list(self._workers), left

    def flush(self, worker: WorkerProcess) -> None:
        """Send what the worker did not take at once."""
        with self._lock, contextlib.suppress(OSError):  # it is dead; its sentinel will say so
            worker.stream.flush()
            worker.control.flush()

    def worker_started(self, worker: WorkerProcess) -> None:
        """A worker was started."""
        with self._lock:
            self._workers.append(worker)
            if self.broadcasts:
                self._send_message(worker, Broadcast(self.broadcasts, None))

    def _send_message(self, worker: WorkerProcess, message: CompactPickle) -> None:
        with contextlib.suppress(OSError):  # it is dead; its sentinel will say so
            worker.control.send_message(message)

    def worker_ready(self, worker: WorkerProcess) -> None:
        """A worker waits for its first call."""
        with self._lock:
            worker.ready = True
            self._mark_idle(worker)
            self._hand_out()

    def call_ended(self, worker: WorkerProcess, number: int) -> Task:
        """The worker has ended the first of its calls; which that is.

        :raises RuntimeError: when that has another number.
        """
        with self._lock:
            if not worker.tasks or worker.tasks[0].number != number:
                raise RuntimeError(f"call {number} has ended, which is not the first of {worker.tasks!r}")
            task = worker.tasks.popleft()
            self._tasks.pop(task.id, None)
            if worker.tasks:
                worker.since = time.monotonic()
                self._claim(worker.tasks[0])
            else:
                self._mark_idle(worker)
            self._hand_out()
            if self._idle and not self._queue:
                self._rebalance()
            return task

    def worker_exited(self, worker: WorkerProcess) -> list[Task]:
        """The worker is dead; the calls it had begun, of which nothing will come (one at most)."""
        with self._lock:
            worker.retired = True
            self._recall(worker, begun_too=True, dead=True)
            self._claim_all(worker)
            self._workers.remove(worker)
            if worker in self._idle:
                self._idle.remove(worker)
            tasks = list(worker.tasks)
            worker.tasks.clear()
            for task in tasks:
                task.worker = None
                self._tasks.pop(task.id, None)
            worker.close()
            self._hand_out()
            return [task for task in tasks if task.begun]

    def pop_oldest(self) -> list[Task]:
        """Take the first call out of the queue, claimed, if there is one."""
        with self._lock:
            while self._queue:
                task = self._queue.pop()
                del self._tasks[task.id]
                if self._claim(task):
                    return [task]
            return []

    def pop_awaited(self) -> list[Task]:
        """Take all calls out of the queue that somebody waits for, claimed."""
        with self._lock:
            awaited: list[Task] = []
            for task in self._queue.clear():
                if task.fire_and_forget:
                    self._queue.push(task, task.call.priority)
                else:
                    del self._tasks[task.id]
                    awaited.append(task)
            return [task for task in awaited if self._claim(task)]

    @property
    def has_ready_worker(self) -> bool:
        """Whether there is a worker that takes calls."""
        with self._lock:
            return any(worker.ready and not worker.retired for worker in self._workers)

    def terminate(self) -> tuple[list[Task], list[WorkerProcess]]:
        """End: all workers are killed.

        :return: the calls of which nothing will come, claimed, and the workers.
        """
        with self._lock:
            self.closing = self._ended = True
            tasks, workers = list(self._tasks.values()), list(self._workers)
            self._tasks.clear()
            self._queue.clear()
            for worker in workers:
                worker.kill()
            return [task for task in tasks if self._claim(task)], workers

    # ---- under the lock ----

    def _hand_out(self, *, stepping: bool = False) -> None:
        """Give what is in the queue to workers that have room.

        :param stepping: whether the supervisor is in :meth:`step`, and need not be woken to start workers.
        """
        queue = self._queue
        while queue:
            if self._idle:
                task = queue.pop()
                if self._claim(task):
                    worker = self._idle.pop()
                    worker.since = time.monotonic()
                    self._assign(worker, task)
                else:  # a plain future that was cancelled
                    del self._tasks[task.id]
            elif len(self._workers) < self._max_workers:
                if not stepping:
                    self._wake_up()  # to start one more
                return
            else:
                ahead = self._worker_with_room(queue.first())
                if ahead is None:
                    return
                self._assign(ahead, queue.pop())

    def _worker_with_room(self, task: Task) -> WorkerProcess | None:
        """A busy worker that can be given ``task`` ahead of time."""
        best: WorkerProcess | None = None
        brief = time.monotonic() - _MAX_WAIT_BEHIND_JOB
        for worker in self._workers:
            if (
                worker.tasks
                and len(worker.tasks) <= _PREFETCH
                and (best is None or len(worker.tasks) < len(best.tasks))
                and worker.since > brief
                and worker.calls.can_recall(task.parts)
                and worker.calls.can_recall(worker.tasks[0].parts)
                and not worker.retired
                and not self._at_task_limit(worker)
                and not worker.stream.pending
            ):
                best = worker
        return best

    def _at_task_limit(self, worker: WorkerProcess) -> bool:
        return self._max_tasks is not None and worker.assigned >= self._max_tasks

    def _assign(self, worker: WorkerProcess, task: Task) -> None:
        if task.on_assigned is not None and not task.begun:
            task.on_assigned()
        worker.assign(task)
        if task.begun:
            self._send_mail(task, worker)
        if worker.stream.pending or (self._may_sleep and len(worker.tasks) > 1):
            self._wake_up()  # to send on the rest; to look after what waits behind a job

    def _claim(self, task: Task) -> bool:
        """A worker begins with the task, or has begun; False when it was cancelled."""
        if not task.begun:
            task.begun = task.call.begin()
            if task.begun and task.worker is not None:
                self._send_mail(task, task.worker)
        return task.begun

    def _send_mail(self, task: Task, worker: WorkerProcess) -> None:
        for message in task.mail:
            self._send_message(worker, message)

    def _claim_all(self, worker: WorkerProcess) -> None:
        """What is in the worker's list has begun, or ended even, as nothing could be taken back."""
        for task in worker.tasks:
            self._claim(task)

    def _recall(self, worker: WorkerProcess, *, begun_too: bool = False, dead: bool = False) -> None:
        """Put what the worker has not begun back to the head of the queue.

        :param begun_too: also the one that is claimed for it, and so is ``running`` for all others to see.
        :param dead: whether the worker is.
        """
        back = worker.recall(dead=dead)
        if back and back[0].begun and not begun_too:
            worker.assign(back.pop(0))
        if worker.tasks:
            self._claim(worker.tasks[0])  # it may have been taken from the middle
        for task in reversed(back):
            task.worker = None
            if not task.begun or task.call.requeue():
                task.begun = False
                self._queue.push_first(task, task.call.priority)
            else:
                del self._tasks[task.id]
                self._stopped_unstarted.append(task)
                self._wake_up()
        if not worker.tasks:
            self._mark_idle(worker)

    def _drop(self, task: Task) -> None:
        """Take a task out of the queue."""
        self._queue.remove(task, task.call.priority)
        del self._tasks[task.id]

    def _mark_idle(self, worker: WorkerProcess) -> None:
        """The worker has nothing to do."""
        if worker.retired or not worker.ready or worker in self._idle:
            return
        if self._at_task_limit(worker):
            worker.retire(self._exit_grace)
            self._wake_up()
        else:
            self._idle.append(worker)

    def _recall_lower_priority(self, priority: int) -> None:
        """Take back what waits in workers and is less urgent than something that has come now."""
        for worker in self._workers:
            if len(worker.tasks) > 1 and any(task.call.priority < priority for task in worker.tasks):
                self._recall(worker)

    def _rebalance(self) -> None:
        """A worker has nothing to do while others have more than they can run."""
        busiest = max(self._workers, key=lambda worker: len(worker.tasks))
        if len(busiest.tasks) > 1:
            self._recall(busiest)
            self._hand_out()
