"""Whether a request that would change something was made by a page of another site."""

from __future__ import annotations

from urllib.parse import urlsplit

from flask import Request

from flask_executor.web.problems import refuse


def is_from_elsewhere(request: Request) -> bool:
    """Whether a browser says that a page of another origin has made this request.

    Browsers say so by `Sec-Fetch-Site <https://www.w3.org/TR/fetch-metadata/>`_, older ones by ``Origin``; other
    clients, which send neither, have no cookies that somebody could misuse.
    """
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    try:
        # Not the scheme: behind a proxy that ends TLS the app may not know its own.
        return origin is not None and urlsplit(origin).netloc != request.host
    except ValueError:  # http://[
        return True


def require_same_origin(request: Request) -> None:
    """Leave the view, if it is so.

    :raises HTTPException: the 403.
    """
    if is_from_elsewhere(request):
        refuse(403, "This was asked for by a page of another site. Only pages of this one may change something here.")
