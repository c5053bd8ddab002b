"""The HTTP face of executors: mount a :class:`Controller` and there are urls, and a dashboard."""

from flask_executor.web.controller import Controller

__all__ = ["Controller"]
