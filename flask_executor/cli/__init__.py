"""``flask executor ...``: the commands, how jobs look in a terminal, and the doctor."""

from flask_executor.cli.commands import group

__all__ = ["group"]
