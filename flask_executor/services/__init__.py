"""Long-lived workers that answer messages: the definition, their pool, one set of them for all web workers."""

from flask_executor.abc import ServiceStatus
from flask_executor.services.definition import Main, Service, every, on
from flask_executor.services.registry import ServiceHandle

__all__ = ["Main", "Service", "ServiceHandle", "ServiceStatus", "every", "on"]
