"""The option ``dashboard``: where the live page of a run is served, and who may look at it."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from fedsys.errors import ConfigError

HERE: Final = "127.0.0.1:0"
"""Where the page is for ``dashboard=true``: on this machine, at any port that is free."""


def address_of(dashboard: bool | str) -> str | None:
    """Return ``HOST:PORT`` of the option; None for no page.

    Raises:
        ConfigError: It has another form.
    """
    if isinstance(dashboard, bool):
        return HERE if dashboard else None
    place_of(dashboard)
    return dashboard


def place_of(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``.

    >>> place_of("127.0.0.1:8000"), place_of("[::1]:0")
    (('127.0.0.1', 8000), ('::1', 0))

    Raises:
        ConfigError: It has another form.
    """
    try:
        parts = urlsplit(f"//{address}")
        if parts.hostname and parts.port is not None and not parts.path:
            return parts.hostname, parts.port
    except ValueError:  # no port, or one that is none
        pass
    rule, way_out = "must be true, false or HOST:PORT", f"true is {HERE}, any port that is free"
    raise ConfigError.of("dashboard", address, rule, way_out)


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_token(address: str, token: str) -> None:
    """Refuse an address that other machines reach if there is no token.

    Raises:
        ConfigError: Says how to give one.
    """
    if not is_loopback(place_of(address)[0]) and not token:
        raise ConfigError.of(
            "dashboard", address, "must be on loopback, or have a token",
            "FEDSYS_CONTROL_TOKEN in the environment is one",
        )  # fmt: skip
