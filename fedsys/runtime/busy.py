"""A SuperLink that is short of time answers a request with an error of its own: ask again.

Its database is locked for a moment, for instance, while a starved machine writes to it. Flower's
own clients ask again where the connection fails, and give up at an answer such as 500.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import httpx

T = TypeVar("T")

WAITS_S = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds before each further attempt: a lock of a database lasts for as long as one writes."""


def asked_again(call: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """Return what a request to a SuperLink returns, which is made again where it was too busy.

    Args:
        call: Makes the request. One that was answered by an error of the server has done nothing.
        sleep: How to wait; replaced in tests.

    Raises:
        httpx.HTTPError: It failed for another reason, or each time.
    """
    for wait_s in WAITS_S:
        try:
            return call()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
                raise
        sleep(wait_s)
    return call()
