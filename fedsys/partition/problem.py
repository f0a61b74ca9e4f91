"""What is to be divided among which hosts: the costs of a request on a chain of hosts, as values.

A model of L units is divided among hosts in their order: device, edges, cloud. The first host has
the input and wants the answer. Of the others those take part that compute something; a tensor goes
from one that takes part to the next that does, and the answer back the same way::

    device  units [0, c1) ──tensor at c1──▶ edge  units [c1, c2) ──tensor at c2──▶ cloud  [c2, L)
       ▲                                     │  ▲                                    │
       └───────────────answer────────────────┘  └───────────────answer───────────────┘

Hosts that are not neighbours are joined by what lies between: the least rate, all latencies. What
`Problem.costs` counts: computing, CPU time of messages at both of their ends, transfers there and
back, latencies, work that waits at a host already, and where requests arrive at random the waiting
for each other (M/D/1) at each host and in each direction of each link.

Scission (Lockhart et al., UCC 2020) counts blocks, latency and bandwidth, one way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel
from fedsys.planning.costs import (
    FRAME_BYTES,
    Crossing,
    MachineCosts,
    crossings,
    state_bytes,
    tensor_bytes,
)
from fedsys.transport.network import Network

Array = NDArray[np.float64]

RAW = "fp32"
"""Codec of inputs and answers, which are sent as they are."""


@dataclass(frozen=True)
class Host:
    """One machine of a chain.

    Attributes:
        name: Its name.
        costs: What it takes for the model.
        memory_bytes: For weights and the activations of a request.
        power_w: Watts that it takes more while it computes; None: not known.
        radio_w: Watts that it takes more while it sends or receives.
        waiting_s: Seconds of work that wait there before a request.
    """

    name: str
    costs: MachineCosts
    memory_bytes: float = math.inf
    power_w: float | None = None
    radio_w: float = 0.0
    waiting_s: float = 0.0


@dataclass(frozen=True)
class Constraints:
    """What a partition must obey.

    Attributes:
        must: Host of a unit, both by index.
        must_not: Units and hosts that do not go together, by index.
        upload_bytes: Largest number of bytes that a host sends for a request, by index.
        time_limit_s: Longest time of a request.
    """

    must: Mapping[int, int] = field(default_factory=dict)
    must_not: frozenset[tuple[int, int]] = frozenset()
    upload_bytes: Mapping[int, float] = field(default_factory=dict)
    time_limit_s: float = math.inf


@dataclass(frozen=True)
class Partition:
    """Who computes what.

    Attributes:
        cuts: For each host but the first the unit that it begins with; ascending, 0 … L. A host
            whose cut is that of the next one (or L) computes nothing.
        codecs: For each of them how the tensor that it receives is written.
    """

    cuts: tuple[int, ...]
    codecs: tuple[str, ...]

    def units_of(self, host: int, units: int) -> tuple[int, int]:
        """Return the units ``[first, last)`` of a host, of a model of so many units."""
        bounds = (0, *self.cuts, units)
        return bounds[host], bounds[host + 1]


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, hosts, what joins them, and what is asked.

    Attributes:
        units: Names of the units.
        cuts: Where it may be cut, ascending from 0 to L with both.
        crossing: What crosses each cut, by its index 0 … L; the first is the input, the last the
            answer.
        state_bytes: Parameters and buffers of each unit.
        hosts: In order; the first has the input.
        networks: Between neighbours; ``up`` leads away from the first host.
        rows: Examples of a request.
        codecs: In which tensors at cuts may be written.
        requests_per_s: Requests that arrive at random; 0: one at a time.
        constraints: What a partition must obey.
    """

    units: tuple[str, ...]
    cuts: tuple[int, ...]
    crossing: tuple[Crossing, ...]
    state_bytes: tuple[int, ...]
    hosts: tuple[Host, ...]
    networks: tuple[Network, ...]
    rows: int = 1
    codecs: tuple[str, ...] = (RAW,)
    requests_per_s: float = 0.0
    constraints: Constraints = Constraints()

    def __post_init__(self) -> None:
        if len(self.networks) != len(self.hosts) - 1:
            raise ConfigError.of(
                "hosts.links", len(self.networks), f"must be {len(self.hosts) - 1}: one between "
                f"each two of the {len(self.hosts)} hosts",
            )  # fmt: skip

    @classmethod
    def of(
        cls,
        layers: LayeredModel,
        input_shape: Sequence[int],
        hosts: Sequence[Host],
        networks: Sequence[Network],
        **more: object,
    ) -> Problem:
        """Return the problem of a model; `more` are further attributes."""
        out = crossings(layers)
        elements = math.prod(input_shape)
        given = Crossing(elements, input_shape[0] if input_shape else 1)
        return cls(
            tuple(unit.name for unit in layers.units),
            (0, *layers.cuts, len(layers)),
            (given, *out),
            state_bytes(layers),
            tuple(hosts),
            tuple(networks),
            **more,  # type: ignore[arg-type]  # attributes by name
        )

    def __len__(self) -> int:
        return len(self.units)

    def bytes_at(self, cut: int, codec: str) -> int:
        """Return the bytes of the frame with the tensor at a cut."""
        raw = cut in (0, len(self))
        written = tensor_bytes(self.crossing[cut], self.rows, RAW if raw else codec)
        return written + FRAME_BYTES

    @property
    def answer_bytes(self) -> int:
        """Bytes of the frame with the answer."""
        return self.bytes_at(len(self), RAW)

    def path(self, first: int, last: int) -> Network:
        """Return the network from one host to a later one."""
        between = self.networks[first:last]
        return Network(
            min(n.up_bits_s for n in between),
            min(n.down_bits_s for n in between),
            sum(n.latency_s for n in between),
        )

    def memory_bytes(self, first: int, last: int) -> float:
        """Return what units ``[first, last)`` take: weights, and what one unit takes and makes."""
        weights = sum(self.state_bytes[first:last])
        held = [
            (self.crossing[c].elements * self.crossing[c].itemsize) * self.rows
            for c in range(first, last + 1)
        ]
        return weights + max((a + b for a, b in pairwise(held)), default=0)

    def wait_s(self, service: Array) -> Array:
        """Return how long a request waits for those before it: M/D/1; infinite when overloaded."""
        if not self.requests_per_s:
            return service * 0.0
        busy = self.requests_per_s * service
        with np.errstate(divide="ignore", invalid="ignore"):
            wait = busy * service / (2 * (1 - busy))
        return np.where(busy < 1, wait, np.inf)

    def forward_s(self, host: int) -> Array:
        """Return the seconds of units ``[0, c)`` on a host for each c, ``(L + 1,)``."""
        done: Array = self.hosts[host].costs.done_after(np.array([float(self.rows)]))[0][0]
        return done


def host_index(hosts: Sequence[Host], name: str, path: str) -> int:
    """Return the index of a host.

    Raises:
        ConfigError: There is none of that name.
    """
    names = [host.name for host in hosts]
    if name not in names:
        raise ConfigError.of(path, name, f"must be one of the hosts {', '.join(names)}")
    return names.index(name)


def taking_part(cuts: Sequence[int], units: int) -> Iterable[int]:
    """Yield the hosts that take part: the first, and those that compute something."""
    bounds = (0, *cuts, units)
    for host in range(len(bounds) - 1):
        if host == 0 or bounds[host + 1] > bounds[host]:
            yield host
