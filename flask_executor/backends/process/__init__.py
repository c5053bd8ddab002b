"""Jobs in worker processes: a supervised pool whose workers can die without taking more than one job along."""

from flask_executor.backends.process.backend import ProcessBackend

__all__ = ["ProcessBackend"]
