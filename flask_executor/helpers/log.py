"""The logger of this package."""

from __future__ import annotations

import logging

#: For what concerns no app in particular.
logger = logging.getLogger("flask_executor")
