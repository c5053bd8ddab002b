"""Whether a job that failed is run again, and when."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """Decides about retries; knows nothing of clocks and queues.

    The wait doubles from attempt to attempt, and a random part of it is left out, so that jobs that failed
    together do not come back together ("equal jitter" in Marc Brooker's "Exponential Backoff And Jitter", AWS
    Architecture Blog, 2015).

    :param retries: how often it is run again, at most.
    :param backoff: seconds to wait before the first retry, at most; 0 for none.
    :param max_backoff: seconds that no wait exceeds.
    :param retry_on: the exceptions after which it is run again.
    :param no_retry_on: those of them after which it is not.
    :raises ValueError: for a negative number.
    """

    retries: int
    backoff: float = 0.0
    max_backoff: float = 3600.0
    retry_on: tuple[type[Exception], ...] = (Exception,)
    no_retry_on: tuple[type[Exception], ...] = ()

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}; it must be 0 or more")
        for name in ("backoff", "max_backoff"):
            seconds = getattr(self, name)
            if not 0 <= seconds < math.inf:
                raise ValueError(f"{name} is {seconds}; it must be a number of seconds, 0 or more")

    def delay(self, attempt: int, error: BaseException, chance: float | None = None) -> float | None:
        """Seconds to wait before the next attempt; None when there is to be none.

        :param attempt: which attempt has failed, from 1.
        :param error: what it failed with.
        :param chance: a number from 0 to 1 that decides how much of the jitter is left out; random by default.
        """
        if attempt > self.retries or not isinstance(error, self.retry_on) or isinstance(error, self.no_retry_on):
            return None
        # 2 ** 64 and more would overflow, long after max_backoff is reached.
        longest = min(self.max_backoff, self.backoff * 2.0 ** min(attempt - 1, 64))
        return longest * (1 + (random.random() if chance is None else chance)) / 2  # noqa: S311  # no secret
