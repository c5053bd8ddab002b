"""Which worker process runs which call: the queue, and the calls that each worker was sent.

Everything here happens under one lock, which is held for short and never while something is waited for. The top of
:mod:`~flask_executor.backends.process.supervisor` shows how the parts work together, and states the invariants.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from flask_executor.abc import WorkerState
from flask_executor.backends.process.protocol import Broadcast, DeliverMessage
from flask_executor.backends.process.task import Task, TaskState
from flask_executor.backends.process.worker_process import WorkerPhase, WorkerProcess
from flask_executor.exceptions import ExecutorShutdown
from flask_executor.helpers.log import logger
from flask_executor.helpers.priority_queue import PriorityQueue
from flask_executor.jobs.call import Call
from flask_executor.jobs.model import JobStatus

_PREFETCH = 8  # calls that a worker is sent beyond the one it runs
_MAX_JOB_WITH_PREFETCH = 0.02  # seconds that a job may run before the calls behind it are recalled
_MAX_UNCONFIRMED_MESSAGES = 64  # for a job, that are kept without a look whether its worker has read the call
_START_TIMEOUT = 60.0  # seconds that a worker may take to get its app


class Dispatcher:
    """Queues calls and sends them to worker processes.

    :param max_workers: upper bound of the number of worker processes.
    :param max_tasks: number of calls after which a worker is retired; None for never.
    :param exit_grace: seconds that a retired worker may take to end.
    :param wake_up: makes the supervisor thread call :meth:`step` soon.
    :param fixed_size: if true, there are ``max_workers`` workers at all times, not only as many as there is work for.
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
        self._lock = threading.RLock()  # a finalizer may call in the middle of a method
        self._queue: PriorityQueue[Task] = PriorityQueue()
        self._tasks: dict[str, Task] = {}  # by job id: all that are queued, or in the list of a worker
        self._workers: list[WorkerProcess] = []
        self._idle: list[WorkerProcess] = []
        self._stopped_unstarted: list[Task] = []  # claimed, recalled, and asked to stop: the supervisor settles them
        self._has_priorities = False  # if true, there was a priority other than 0 once
        self._supervisor_may_sleep = True  # if true, the supervisor may sleep until something happens
        self._terminated = False
        #: If true, no more calls are accepted.
        self.closing = False
        #: Number of broadcasts that were sent.
        self.broadcasts = 0

    # ---- any thread ----

    def add(self, task: Task) -> None:
        """Accept a call.

        :raises ExecutorShutdown: after :meth:`close`; for one that is fire-and-forget after :meth:`terminate`.
        """
        with self._lock:
            if self._terminated if task.fire_and_forget else self.closing:
                raise ExecutorShutdown("cannot schedule new futures after shutdown")
            priority = task.call.priority
            waiting = len(self._queue)
            self._tasks[task.id] = task
            self._queue.push(task, priority)
            if priority:
                self._has_priorities = True
            if self._has_priorities and not self._idle:
                self._recall_lower_priority(priority)
            elif waiting and not self._idle and len(self._workers) == self._max_workers:
                return  # no worker had room for the calls before it, and whichever gets room looks into the queue
            self._hand_out()

    def withdraw(self, id: str) -> bool:
        """Give up a call that has not begun; False if it has, and then its future is claimed."""
        with self._lock:
            task = self._tasks.get(id)
            if task is None:
                return True
            worker = task.worker
            if worker is None and task.call.future.running():
                return False  # a plain future that was recalled: it stays claimed
            if worker is not None:
                if not task.is_claimed:
                    self._recall(worker)
                if task.worker is not None:
                    self._claim_all(worker)
                    return False
            self._queue.remove(task, task.call.priority)
            self._forget(task)
            self._hand_out()
            return True

    def request_stop(self, id: str, attempt: int, reason: JobStatus) -> None:
        """Ask a running job to stop, in this attempt."""
        with self._lock:
            task = self._tasks.get(id)
            if task is None or task.call.job.attempt != attempt:
                return
            if task.worker is not None:
                task.worker.request_stop(task, reason)
            else:
                self._stop_queued(task)

    def _stop_queued(self, task: Task) -> None:
        """Stop a task that was recalled, and whose future stayed claimed: it need not begin any more."""
        if task.call.future.running():
            self._queue.remove(task, task.call.priority)
            self._stop_unstarted(task)

    def deliver(self, call: Call, data: bytes) -> None:
        """Send a message to the job of a call; it is kept until the job runs.

        :param data: a JobMessage, pickled.
        """
        with self._lock:
            task = self._tasks.get(call.job.id)
            if task is None or task.state is not TaskState.TAKEN:
                call.undelivered = call.undelivered or []
                call.undelivered.append(data)
            if task is None or not task.is_claimed or task.worker is None:
                return
            task.worker.send_message(DeliverMessage(task.id, data))
            self._wake_up()  # to send the rest
            if len(call.undelivered or ()) > _MAX_UNCONFIRMED_MESSAGES and task.worker.calls.was_read(task.number):
                task.move(TaskState.TAKEN)
                call.undelivered = None

    def kill(self, id: str, attempt: int) -> None:
        """End a job by force in this attempt, and no other job."""
        with self._lock:
            task = self._tasks.get(id)
            if task is None or task.call.job.attempt != attempt:
                return
            worker = task.worker
            if worker is None:
                self._stop_queued(task)
                return
            # With nothing left to read, the worker cannot go on to another call between this decision and its death.
            self._recall_all(worker)
            if worker.tasks and worker.tasks[-1] is task:  # or it has ended, and its outcome is on the way
                task.killed = True
                worker.reach(WorkerPhase.RETIRING)
                worker.kill()
            self._hand_out()

    def broadcast(self, data: bytes) -> int:
        """Send all workers a message, to be handled before any call that is sent after it.

        :return: the number of workers.
        """
        with self._lock:
            self.broadcasts += 1
            for worker in self._workers:
                worker.send_message(Broadcast(self.broadcasts, data))
            self._wake_up()  # to send the rest
            return len(self._workers)

    def kill_all(self) -> None:
        """Kill all workers."""
        with self._lock:
            for worker in self._workers:
                worker.kill()

    def close(self, *, cancel_futures: bool) -> list[Task]:
        """Accept no more calls.

        :param cancel_futures: if true, give up the calls that have not begun.
        :return: those.
        """
        cancelled: list[Task] = []
        with self._lock:
            self.closing = True
            if cancel_futures:
                for worker in self._workers:
                    self._recall(worker)
                cancelled = self._queue.clear()
                for task in cancelled:
                    self._forget(task)
            self._wake_up()
        return cancelled

    def processes(self) -> dict[int, Any]:
        """The worker processes by their pids."""
        with self._lock:
            return {worker.process.pid: worker.process for worker in self._workers}

    def worker_states(self) -> list[WorkerState]:
        """The worker processes, and what they do."""
        with self._lock:
            return [
                WorkerState(
                    pid=worker.process.pid or 0,
                    busy=bool(worker.tasks),
                    job=worker.tasks[0].id if worker.tasks else None,
                    ready=worker.phase is WorkerPhase.READY,
                )
                for worker in self._workers
            ]

    def call(self, id: str) -> Call | None:
        """The call of the job with this id, if it is queued or with a worker."""
        task = self._tasks.get(id)
        return None if task is None else task.call

    def waiting(self) -> int:
        """Number of calls that were sent to no worker."""
        return len(self._queue)

    # ---- the supervisor thread ----

    @property
    def done(self) -> bool:
        """If true, it is closed, and all calls and workers have ended."""
        return self.closing and not self._tasks and not self._workers

    def next_timeout(self) -> float | None:
        """Seconds until :meth:`step` is to be called, if nothing happens before; None for not at all."""
        with self._lock:
            self._supervisor_may_sleep = all(len(worker.tasks) < 2 for worker in self._workers)
            if not self._supervisor_may_sleep:
                return _MAX_JOB_WITH_PREFETCH
            is_starting = any(worker.phase is WorkerPhase.STARTING for worker in self._workers)
            return _START_TIMEOUT / 4 if is_starting else None

    def step(self) -> tuple[int, list[WorkerProcess], list[Task]]:
        """Do what is due.

        :return: the number of workers that are to be started; all workers; and claimed tasks that were asked to stop
            before they began, which are to be settled.
        """
        with self._lock:
            now = time.monotonic()
            for worker in self._workers:
                if len(worker.tasks) > 1 and worker.busy_since < now - _MAX_JOB_WITH_PREFETCH:
                    self._recall(worker)
                if worker.phase is WorkerPhase.STARTING and worker.born < now - _START_TIMEOUT:
                    logger.error("Worker process %s is killed: it hung while it was starting.", worker.process.pid)
                    worker.kill()
            self._hand_out(in_step=True)
            if self.closing and not self._tasks:
                for worker in self._workers:
                    self._retire(worker)
            missing = self._max_workers - len(self._workers)
            if not self._fixed_size or self.closing:
                starting = sum(worker.is_starting for worker in self._workers)
                missing = min(len(self._queue) - starting, missing)
            stopped, self._stopped_unstarted = self._stopped_unstarted, []
            return missing, list(self._workers), stopped

    def flush(self, worker: WorkerProcess) -> None:
        """Send what the worker's sockets had no room for before."""
        with self._lock, contextlib.suppress(OSError):  # it is dead; its sentinel will say so
            worker.stream.flush()
            worker.control.flush()

    def worker_started(self, worker: WorkerProcess) -> None:
        """A worker process was started."""
        with self._lock:
            self._workers.append(worker)
            if self.broadcasts:
                worker.send_message(Broadcast(self.broadcasts, None))

    def app_loaded(self, worker: WorkerProcess) -> None:
        """A worker has its app."""
        with self._lock:
            worker.reach(WorkerPhase.INITIALIZING)

    def worker_ready(self, worker: WorkerProcess) -> None:
        """A worker waits for its first call."""
        with self._lock:
            worker.reach(WorkerPhase.READY)
            self._mark_idle(worker)
            self._hand_out()

    def worker_not_started(self, worker: WorkerProcess) -> None:
        """A worker could not start, has said why, and ends."""
        with self._lock:
            self._retire(worker)

    def call_ended(self, worker: WorkerProcess, number: int) -> Task:
        """A worker has sent the outcome of the first of its calls.

        :return: the task of that.
        :raises RuntimeError: when the first has another number.
        """
        with self._lock:
            if not worker.tasks or worker.tasks[0].number != number:
                raise RuntimeError(f"call {number} has ended, which is not the first of {worker.tasks!r}")
            task = worker.tasks.popleft()
            self._forget(task)
            if worker.tasks:
                worker.busy_since = time.monotonic()
                self._claim(worker.tasks[0])
            else:
                self._mark_idle(worker)
            self._hand_out()
            if self._idle and not self._queue:
                self._rebalance()
            return task

    def worker_exited(self, worker: WorkerProcess) -> list[Task]:
        """A worker process has ended, and everything that it has sent was read.

        :return: the tasks that it had begun, whose outcome will not come: one at most.
        """
        with self._lock:
            worker.reach(WorkerPhase.RETIRING)
            self._requeue(worker, worker.recall_from_dead())
            self._claim_all(worker)
            self._workers.remove(worker)
            if worker in self._idle:
                self._idle.remove(worker)
            tasks = list(worker.tasks)
            worker.tasks.clear()
            for task in tasks:
                task.worker = None
                self._forget(task)
            worker.close()
            self._hand_out()
            return [task for task in tasks if task.is_claimed]

    def pop_oldest(self) -> list[Task]:
        """Take the first task out of the queue, claimed, if there is one."""
        with self._lock:
            while self._queue:
                task = self._queue.pop()
                self._forget(task)
                if task.claim():
                    return [task]
            return []

    def pop_awaited(self) -> list[Task]:
        """Take all tasks out of the queue, claimed, but those that are fire-and-forget."""
        with self._lock:
            awaited: list[Task] = []
            for task in self._queue.clear():
                if task.fire_and_forget:
                    self._queue.push(task, task.call.priority)
                else:
                    self._forget(task)
                    awaited.append(task)
            return [task for task in awaited if task.claim()]

    @property
    def has_ready_worker(self) -> bool:
        """If true, there is a worker that takes calls."""
        with self._lock:
            return any(worker.phase is WorkerPhase.READY for worker in self._workers)

    def terminate(self) -> tuple[list[Task], list[WorkerProcess]]:
        """Accept nothing any more, and kill all workers.

        :return: the tasks whose outcome will not come, claimed; and the workers.
        """
        with self._lock:
            self.closing = self._terminated = True
            tasks, workers = list(self._tasks.values()), list(self._workers)
            self._tasks.clear()
            self._queue.clear()
            for worker in workers:
                worker.kill()
            return [task for task in tasks if task.claim()], workers

    # ---- under the lock ----

    def _hand_out(self, *, in_step: bool = False) -> None:
        """Send what is in the queue to workers that have room.

        :param in_step: if true, the supervisor is in :meth:`step`, and need not be woken up to start workers.
        """
        queue = self._queue
        while queue:
            if self._idle:
                task = queue.pop()
                if task.claim():
                    worker = self._idle.pop()
                    worker.busy_since = time.monotonic()
                    self._assign(worker, task)
                else:  # a plain future that was cancelled
                    self._forget(task)
            elif len(self._workers) < self._max_workers:
                if not in_step:
                    self._wake_up()  # to start one more
                return
            else:
                busy = self._worker_with_room(queue.first())
                if busy is None:
                    return
                task = queue.pop()
                task.move(TaskState.ASSIGNED)
                self._assign(busy, task)

    def _worker_with_room(self, task: Task) -> WorkerProcess | None:
        """The busy worker that is to be sent ``task`` ahead of time, if one may be."""
        best: WorkerProcess | None = None
        earliest = time.monotonic() - _MAX_JOB_WITH_PREFETCH
        for worker in self._workers:
            if (
                worker.tasks
                and len(worker.tasks) <= _PREFETCH
                and (best is None or len(worker.tasks) < len(best.tasks))
                and worker.busy_since > earliest
                and worker.calls.can_recall(task.parts)
                and worker.calls.can_recall(worker.tasks[0].parts)
                and worker.phase is WorkerPhase.READY
                and not self._at_task_limit(worker)
                and not worker.stream.pending
            ):
                best = worker
        return best

    def _at_task_limit(self, worker: WorkerProcess) -> bool:
        return self._max_tasks is not None and worker.assigned >= self._max_tasks

    def _assign(self, worker: WorkerProcess, task: Task) -> None:
        """Send a worker a task that was just taken out of the queue."""
        if task.on_assigned is not None and not task.is_claimed:
            task.on_assigned()
        worker.assign(task)
        if task.is_claimed:
            self._send_undelivered(task, worker)
        if worker.stream.pending or (self._supervisor_may_sleep and len(worker.tasks) > 1):
            self._wake_up()  # to send the rest; to recall what waits behind a job that takes long

    def _claim(self, task: Task) -> None:
        """Claim a task that its worker runs next, or has read."""
        if task.state is TaskState.ASSIGNED and task.claim() and task.worker is not None:
            self._send_undelivered(task, task.worker)

    def _claim_all(self, worker: WorkerProcess) -> None:
        """Claim all tasks of a worker: it has read them, as they could not be recalled."""
        for task in worker.tasks:
            self._claim(task)

    def _send_undelivered(self, task: Task, worker: WorkerProcess) -> None:
        for data in task.call.undelivered or ():
            worker.send_message(DeliverMessage(task.id, data))

    def _recall(self, worker: WorkerProcess) -> None:
        """Put what the worker has not read back into the queue, but the task that is claimed for it."""
        tasks = worker.recall()
        if tasks and tasks[0].is_claimed:
            worker.assign(tasks.pop(0))
        self._requeue(worker, tasks)

    def _recall_all(self, worker: WorkerProcess) -> None:
        """As :meth:`_recall`, with the claimed one: it is running for everybody else, and goes back to queued."""
        self._requeue(worker, worker.recall())

    def _requeue(self, worker: WorkerProcess, tasks: list[Task]) -> None:
        """Put tasks that were recalled from a worker back to the head of the queue."""
        if worker.tasks:
            self._claim(worker.tasks[0])  # those before it may be among the recalled
        for task in reversed(tasks):
            task.worker = None
            if task.state is TaskState.CANCELLED:
                self._forget(task)
            elif task.is_claimed and not task.call.requeue():
                self._stop_unstarted(task)
            else:
                task.move(TaskState.QUEUED)
                self._queue.push_first(task, task.call.priority)
        if not worker.tasks:
            self._mark_idle(worker)

    def _stop_unstarted(self, task: Task) -> None:
        """Have the supervisor settle a claimed task that was asked to stop before it began."""
        self._forget(task)
        self._stopped_unstarted.append(task)
        self._wake_up()

    def _forget(self, task: Task) -> None:
        """A task has ended, or will not begin. Messages that come from now on are for the job's next attempt."""
        self._tasks.pop(task.id, None)
        task.call.undelivered = None

    def _mark_idle(self, worker: WorkerProcess) -> None:
        """A worker has no calls."""
        if worker.phase is not WorkerPhase.READY or worker in self._idle:
            return
        if self._at_task_limit(worker):
            self._retire(worker)
            self._wake_up()
        else:
            self._idle.append(worker)

    def _retire(self, worker: WorkerProcess) -> None:
        if worker.phase is not WorkerPhase.RETIRING:
            worker.retire(self._exit_grace)

    def _recall_lower_priority(self, priority: int) -> None:
        """A call has come: put what waits in workers and is less urgent back behind it."""
        for worker in self._workers:
            if len(worker.tasks) > 1 and any(task.call.priority < priority for task in worker.tasks):
                self._recall(worker)

    def _rebalance(self) -> None:
        """A worker is idle: let it have what others were sent ahead of time."""
        busiest = max(self._workers, key=lambda worker: len(worker.tasks))
        if len(busiest.tasks) > 1:
            self._recall(busiest)
            self._hand_out()
