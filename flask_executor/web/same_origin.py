"""Refuses requests that change something and were made by a page of another site."""

from __future__ import annotations

from urllib.parse import urlsplit

from flask import Request

from flask_executor.web.problems import abort_with_problem


def is_cross_site(request: Request) -> bool:
    """If true, a browser says that a page of another origin has made this request.

    Browsers say so with `Sec-Fetch-Site <https://www.w3.org/TR/fetch-metadata/>`_, older ones with ``Origin``. Other
    clients send neither, and have no cookies that another site could misuse.
    """
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    try:
        # The scheme is not compared: behind a proxy that ends TLS the app may not know its own.
        return origin is not None and urlsplit(origin).netloc != request.host
    except ValueError:  # http://[
        return True


def require_same_origin(request: Request) -> None:
    """Leave the view if the request is a cross-site one.

    :raises HTTPException: the 403.
    """
    if is_cross_site(request):
        detail = "This was asked for by a page of another site. Only pages of this one may change something here."
        abort_with_problem(403, detail)
