"""What a service is: a class whose methods handle messages, and how the app wants it to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
#: Sends a message: to the service with this name, or to the app (None); its type and body.
Send = Callable[[str | None, str, object], None]

_ON = "_flask_executor_on"  # attribute of a method: the types of messages that it handles
_EVERY = "_flask_executor_every"  # attribute of a method: the seconds between two calls of it


def on(type: str) -> Callable[[F], F]:
    """Decorator: have a method of a :class:`Service` handle the messages of a type.

    .. code-block:: python

        @on("predict")
        def predict(self, body):
            return self.model(body)

    The method gets the body of the message; what it returns or raises is the caller's.

    :param type: any name; several methods cannot have the same one.
    :raises TypeError: when that is forgotten.
    """
    if callable(type):
        raise TypeError('@on needs the type of the messages: @on("predict")')

    def decorate(fn: F) -> F:
        setattr(fn, _ON, (*getattr(fn, _ON, ()), type))
        return fn

    return decorate


def every(seconds: float) -> Callable[[F], F]:
    """Decorator: call a method of a :class:`Service` again and again, in each of its workers, between two messages.

    :param seconds: from the beginning of one call to the beginning of the next. With 0 it is called whenever there is
        no message: for a method that itself waits for something, a second or so.
        After an error of such a method there is a second's rest.
    :raises ValueError: for a negative number.
    :raises TypeError: when the seconds are forgotten.
    """
    if callable(seconds):
        raise TypeError("@every needs the seconds between two calls: @every(60)")
    if not seconds >= 0:
        raise ValueError(f"every({seconds!r}): the seconds between two calls must be 0 or more")

    def decorate(fn: F) -> F:
        setattr(fn, _EVERY, float(seconds))
        return fn

    return decorate


@dataclass(frozen=True, slots=True)
class Main:
    """The app's side, as seen from a service."""

    _send: Send

    def send(self, type: str, body: object = None) -> None:
        """Send a message to the handler that the app has for it: ``@executor.on(service, type)``.

        :param body: anything that can be pickled.
        """
        self._send(None, type, body)


class Service:
    """A long-lived worker process that answers messages; made by :meth:`Executor.service
    <flask_executor.Executor.service>`.

    .. code-block:: python

        class Model(Service):
            def setup(self):
                self.model = load()

            @on("predict")
            def predict(self, body):
                return self.model(body)

            @every(60)
            def refresh(self):
                self.model.refresh()

        model = executor.service(Model, workers=2)

        @app.post("/predictions")
        def predictions():
            return jsonify(model.call("predict", request.json, timeout=5).result())

    One message after the other is handled, each in an app context of its own. Without messages it sleeps.
    """

    #: The methods that handle messages, by type.
    handlers: ClassVar[Mapping[str, str]] = {}
    #: The methods that are called again and again, with the seconds between two calls.
    schedule: ClassVar[Mapping[str, float]] = {}
    #: The name of the service.
    name: str
    #: The app's side: ``self.main.send(type, body)``.
    main: Main
    _send: Send

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        handlers: dict[str, str] = {}
        schedule: dict[str, float] = {}
        for each in reversed(cls.__mro__):
            own: dict[str, str] = {}
            for name, value in vars(each).items():
                for type in getattr(value, _ON, ()):
                    if type in own:
                        raise TypeError(f"{each.__name__} has two handlers for {type!r}: {own[type]} and {name}")
                    own[type] = name
                if hasattr(value, _EVERY):
                    schedule[name] = getattr(value, _EVERY)
            handlers.update(own)
        cls.handlers, cls.schedule = handlers, schedule

    def setup(self) -> None:
        """Get ready: called once in each worker process, in an app context, before all else.

        When it raises, the process ends and another is started after a while.
        """

    def teardown(self) -> None:
        """Called at the end of a worker process that was not killed, in an app context."""

    def send(self, to: str, type: str, body: object = None) -> None:
        """Send a message to another service, which need not be there yet. Returns at once.

        :param to: the name of the service.
        :param type: of the message. Where nobody handles it, an error is logged.
        :param body: anything that can be pickled.
        """
        self._send(to, type, body)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceDefinition:
    """A service as :meth:`Executor.service <flask_executor.Executor.service>` was asked for it."""

    name: str
    cls: type[Service]
    args: tuple[Any, ...]
    workers: int
    #: "app" for one set of workers on a machine, "process" for one in each process of the app.
    per: str
    #: Most messages that wait for a worker.
    max_pending: int

    def check_handler(self, type: str) -> None:
        """Raise unless the service handles messages of this type.

        :raises ValueError: naming the types that it handles.
        """
        if type not in self.cls.handlers:
            known = ", ".join(map(repr, sorted(self.cls.handlers))) or "nothing"
            raise ValueError(f"service {self.name!r} has no handler for {type!r}; with @on(...) it has {known}")
