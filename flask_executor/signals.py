"""Signals that tell what happens to jobs.

Each is sent with the :class:`~flask_executor.Executor` as sender and ``job``, the frozen
:class:`~flask_executor.Job`, inside the job's own contexts. A receiver that raises is logged and disturbs nobody.

.. code-block:: python

    from flask_executor.signals import job_failed

    @job_failed.connect_via(executor)
    def report(executor, job):
        current_app.logger.warning("%s: %s", job.name, job.error)
"""

from __future__ import annotations

from blinker import Namespace

_signals = Namespace()

#: A job was accepted; sent in the contexts of the code that submits it, before it can start.
job_queued = _signals.signal("job-queued")

#: A worker begins with a job.
job_started = _signals.signal("job-started")

#: A job has ended, whatever way: ``job.status`` tells which. The last signal of every job.
job_finished = _signals.signal("job-finished")

#: A job has ended with an error; sent just before :data:`job_finished`.
job_failed = _signals.signal("job-failed")
