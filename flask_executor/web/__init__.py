"""Jobs over HTTP: mount a :class:`Controller`, and an app has urls for its jobs, and a dashboard."""

from flask_executor.web.controller import Controller

__all__ = ["Controller"]
