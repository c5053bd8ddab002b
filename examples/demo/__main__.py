"""Serves the demo: ``python examples/demo``."""

from __future__ import annotations

import logging
import os
import signal
import sys

import cluster
from werkzeug.serving import make_server


def main() -> None:
    wanted = cluster.missing()
    if wanted is not None:
        sys.exit(wanted)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line per request
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what was started here is to end with this
    with cluster.started():
        from app import app  # which reads where the broker is
        from jobs import executor

        server = make_server("127.0.0.1", int(os.environ.get("PORT", "5000")), app, threaded=True)
        print(f"The bookshop is open: http://127.0.0.1:{server.port} (Ctrl+C to close)", flush=True)
        try:
            server.serve_forever()
        finally:
            if executor.engine is not None:  # its workers would wait for their jobs, and the demo for the workers
                for job in executor.jobs.list(status="running"):
                    if job.key is not None:  # the others are short
                        executor.futures.stop(job.key)


if __name__ == "__main__":
    main()
