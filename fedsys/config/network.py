"""The group `network`: rates and latency of a connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NetworkConfig:
    """The network between devices and edge servers.

    Attributes:
        name: What it is called.
        source: Where its rates come from, or the word "nominal".
        up_mbit_s: From the device, in Mbit/s; None: no limit.
        down_mbit_s: To the device, in Mbit/s; None: no limit.
        latency_ms: One way, in milliseconds.
        trace: ``[second, up, down]``, ascending; rates in Mbit/s from then on. Or a file of them,
            one for each device, or how they are drawn: see `fedsys.planning.traces`.
        trace_by: What its time is: ``seconds``, or ``rounds``, of which the first is 0.
        columns: Names of the columns ``seconds``, ``up`` and ``down`` in a file that has others.
        period_s: Seconds after which the trace repeats; None: its last rates stay.
        emulate: Whether the links of this run are made as slow as this network, or as the links of
            the fleet, in real time. A trace begins anew with each message to a device.
    """

    name: str = "none"
    source: str = ""
    up_mbit_s: float | None = None
    down_mbit_s: float | None = None
    latency_ms: float = 0.0
    trace: Any = None
    trace_by: str = "seconds"
    columns: Mapping[str, str] | None = None
    period_s: float | None = None
    emulate: bool = False
