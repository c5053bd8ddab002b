"""Jobs over HTTP: mount a :class:`Controller`, and an app has urls for its jobs, and a dashboard."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask_executor.web.controller import Controller

__all__ = ["Controller"]


def __getattr__(name: str) -> Any:
    """Import the controller, and so pydantic, when it is asked for: most processes never do."""
    if name == "Controller":
        from flask_executor.web.controller import Controller

        return Controller
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
