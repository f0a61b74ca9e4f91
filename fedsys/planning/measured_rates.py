"""What is believed of links: rates as measured, and those of the configuration where none was.

Links change quickly, so what is measured in a round replaces what was believed, if it differs by
more than `drift`. A device that trains alone measures no link: after some rounds the configuration
is believed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fedsys.planning.resources import Measured
from fedsys.planning.workload import Workload
from fedsys.transport.network import Network

BOUNDS: Final = (1.0, 1e15)
"""Lowest and highest rate that is believed, in bits per second."""

Beliefs = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Links:
    """What is believed of the links of clients.

    Attributes:
        rates: Bits per second up and down, by client, where they are not those of the
            configuration.
        alone: Rounds since a client measured its link, where it trains alone.
    """

    rates: Beliefs = field(default_factory=dict)
    alone: Mapping[int, int] = field(default_factory=dict)

    def applied(self, load: Workload, clients: Sequence[int]) -> Workload:
        """Return a workload of some clients with the rates that are believed."""
        devices = []
        for client, device in zip(clients, load.devices, strict=True):
            configured = (device.network.up_bits_s, device.network.down_bits_s)
            up, down = self.rates.get(client, configured)
            network = Network(up, down, device.network.latency_s)
            devices.append(dataclasses.replace(device, network=network))
        return dataclasses.replace(load, devices=tuple(devices))

    def informed(
        self,
        load: Workload,
        clients: Sequence[int],
        seen: Mapping[int, Measured],
        offloaded: Mapping[int, bool],
        *,
        drift: float,
        forget: int,
    ) -> Links:
        """Return what is believed after a round.

        Args:
            load: The workload of `clients`, with rates of the configuration.
            clients: Who is asked about.
            seen: What each of them measured.
            offloaded: Whether it trained with an edge server.
            drift: Relative change from which on a rate is believed.
            forget: Rounds alone after which the configuration is believed again.
        """
        rates, alone = dict(self.rates), dict(self.alone)
        for client, device in zip(clients, load.devices, strict=True):
            configured = [device.network.up_bits_s, device.network.down_bits_s]
            before = list(rates.get(client, configured))
            bit_s = seen[client].up_bit_s, seen[client].down_bit_s
            after = [_taken(b, s, drift) for b, s in zip(before, bit_s, strict=True)]
            measured = offloaded.get(client, True) or any(s > 0 for s in bit_s)
            if measured or after == configured:
                alone.pop(client, None)
            else:
                alone[client] = alone.get(client, 0) + 1
                if alone[client] > forget:
                    del alone[client]
                    after = configured
            if after != configured or client in rates:
                rates[client] = after
        return Links(rates, alone)


def _taken(before: float, bit_s: float, drift: float) -> float:
    if bit_s <= 0:
        return before
    now = min(max(1 / bit_s, BOUNDS[0]), BOUNDS[1])
    return now if abs(now / before - 1) > drift else before
