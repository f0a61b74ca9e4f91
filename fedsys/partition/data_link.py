"""Links on which tensors go from host to host, and how they are made as slow as a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedsys.errors import FrameError, LinkError
from fedsys.transport.addresses import dial
from fedsys.transport.link import Link
from fedsys.transport.network import Network, Rate
from fedsys.transport.security import Credentials
from fedsys.transport.shaping import RealClock, Shaped
from fedsys.transport.wire import Frame

CONNECT_S = 10.0
"""For the next host to accept a link, unless less is said."""


def told_shape(network: Network, origin_s: float) -> Mapping[str, Any]:
    """Return a network as plain values, for a host of this machine.

    Args:
        network: Rates over time, and the latency.
        origin_s: Moment of `time.monotonic` at which its traces begin.
    """
    ways = {"up": _told(network.up), "down": _told(network.down)}
    return {**ways, "latency_s": network.latency_s, "origin_s": origin_s}


def _told(rate: Rate) -> list[Any]:
    bits = [None if math.isinf(value) else value for value in rate.bits_s]
    return [list(rate.starts_s), bits, rate.period_s]


def shape_of(told: Any) -> tuple[Network, float]:
    """Return the network and the origin that `told_shape` told.

    Raises:
        FrameError: It tells none.
    """
    try:
        up, down = _rate(told["up"]), _rate(told["down"])
        network = Network(latency_s=float(told["latency_s"]), up_trace=up, down_trace=down)
        return network, float(told["origin_s"])
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(f"shape_link: describes no network: {error!r}") from error


def _rate(told: Sequence[Any]) -> Rate:
    starts, bits, period = told
    rates = tuple(math.inf if value is None else float(value) for value in bits)
    return Rate(tuple(map(float, starts)), rates, None if period is None else float(period))


def open_data(
    address: str,
    credentials: Credentials | None,
    opened: Mapping[str, Any],
    shape: Any = None,
    connect_s: float = CONNECT_S,
) -> Link:
    """Return a link on which a pipeline's tensors go to a host.

    Args:
        address: Of the host.
        credentials: For mutual TLS.
        opened: The pipeline and its token.
        shape: What `told_shape` told, to make the link that slow; None: as it is.
        connect_s: Longest time for the host to accept it.

    Raises:
        LinkError: The host cannot be reached or does not accept it.
    """
    network = None if shape is None else shape_of(shape)
    link = dial(address, credentials=credentials, timeout_s=connect_s, retry=False)
    try:
        link.send(Frame("data", dict(opened)))
        link.recv(connect_s)
    except LinkError:
        link.close()
        raise
    return link if network is None else Shaped(link, network[0], clock=RealClock(network[1]))
