"""Starts the process of the live page with a run or an endpoint, and ends it with that."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fedsys.config.dashboard import address_of, check_token, is_loopback, place_of
from fedsys.config.secret import VARIABLE

logger = logging.getLogger("fedsys")

STOP_S: Final = 8.0
"""Longest time for those who look to see the end, in seconds."""


@contextmanager
def live_page(
    dashboard: bool | str,
    what: Path | str,
    say: Callable[[str], None],
    about: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[None]:
    """Serve the page of a run or an endpoint as long as the block lasts, which goes on anyway.

    Args:
        dashboard: The option.
        what: Folder of the run, or address of the endpoint.
        say: Told the address of the page, or why there is none.
        about: What does not change of the endpoint (`fedsys.runs.live.served.AboutServed`).

    Raises:
        ConfigError: The option is not usable.
    """
    address = address_of(dashboard)
    if address is None:
        yield
        return
    token = os.environ.get(VARIABLE, "").strip()
    check_token(address, token)
    kept = {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    shown = what if isinstance(what, str) else str(what.absolute())
    token = "" if is_loopback(place_of(address)[0]) else token
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fedsys.runs.live", shown, address, json.dumps(dict(about))],
        env={**os.environ, **kept, VARIABLE: token},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip
    teller = threading.Thread(target=_tell, args=(process, say), daemon=True, name="live-page")
    teller.start()
    try:
        yield
    finally:
        _end(process)
        teller.join(1.0)


def _tell(process: subprocess.Popen[str], say: Callable[[str], None]) -> None:
    """Say where the page is, as soon as it says so itself."""
    assert process.stdout is not None
    line = process.stdout.readline()
    with suppress(ValueError):
        told = json.loads(line)
        if "address" in told:
            text = f"live page at {told['address']}"
        else:
            text = f"there is no live page: {told['error']}"
        logger.info("%s", text)
        say(text)
        return
    with suppress(subprocess.TimeoutExpired):  # its output ends a little before it does
        if status := process.wait(STOP_S):
            say(f"there is no live page: its process ended with status {status}")


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
