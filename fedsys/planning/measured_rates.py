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

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.contention import Indices
from fedsys.planning.resources import Measured
from fedsys.planning.workload import Array, Workload
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
        links = [device.network for device in load.devices]
        configured = [(link.up_bits_s, link.down_bits_s) for link in links]
        after, alone = after_round(
            np.array([self.rates.get(c, own) for c, own in zip(clients, configured, strict=True)]),
            np.array(configured),
            np.array([(seen[c].up_bit_s, seen[c].down_bit_s) for c in clients]),
            np.array([self.alone.get(client, 0) for client in clients]),
            np.array([offloaded.get(client, True) for client in clients]),
            drift=drift,
            forget=forget,
        )
        fresh = dict(zip(clients, after.tolist(), strict=True))
        counts = dict(self.alone) | dict(zip(clients, alone.tolist(), strict=True))
        return Links(
            dict(self.rates)
            | {
                client: fresh[client]
                for client, own in zip(clients, configured, strict=True)
                if client in self.rates or fresh[client] != list(own)
            },
            {client: count for client, count in counts.items() if count},
        )


def after_round(
    rates: Array,
    configured: Array,
    bit_s: Array,
    alone: Indices,
    offloaded: NDArray[np.bool_],
    *,
    drift: float,
    forget: int,
) -> tuple[Array, Indices]:
    """Return the rates that are believed after a round, and for how many no link was measured.

    Args:
        rates: What was believed before, bits per second up and down, ``(K, 2)``.
        configured: What is believed without measurements.
        bit_s: Seconds of a bit as measured; 0 where none was.
        alone: Rounds since each device measured its link, ``(K,)``.
        offloaded: Who trained with an edge server.
        drift: Relative change from which on a rate is believed.
        forget: Rounds alone after which the configuration is believed again.
    """
    measured = bit_s > 0
    now = 1.0 / np.clip(bit_s, 1 / BOUNDS[1], 1 / BOUNDS[0])
    after = np.where(measured & (np.abs(now / rates - 1) > drift), now, rates)
    told = offloaded | measured.any(axis=1) | (after == configured).all(axis=1)
    rounds = np.where(told, 0, alone + 1)
    over = rounds > forget
    return np.where(over[:, None], configured, after), np.where(over, 0, rounds)
