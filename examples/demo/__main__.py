"""Serves the demo: ``python examples/demo``."""

from __future__ import annotations

import logging
import os

from app import app
from werkzeug.serving import make_server


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line per request
    server = make_server("127.0.0.1", int(os.environ.get("PORT", "5000")), app, threaded=True)
    print(f"The bookshop is open: http://127.0.0.1:{server.port} (Ctrl+C to close)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
