"""The group ``mobility``, and where edge servers stand: who moves between them, where and when.

Scripted moves (``halfway``, ``commuters``) are told in shares of a round. Devices that have
positions (``waypoint``, ``trace``) are at the edge server that is nearest of those in reach. With
``network`` they go on to another one when their link is poor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsys.errors import ConfigError, did_you_mean

KINDS = ("none", "halfway", "commuters", "waypoint", "trace", "network")
MODES = ("migrate", "restart")
HOWS = ("announced", "foreseen", "unannounced")
UNREACHABLE = ("wait", "alone")
COORDINATES = ("metres", "degrees")


@dataclass(frozen=True)
class EdgePlace:
    """Where an edge server stands, and how far it reaches.

    Attributes:
        x: Metres to the east, in the frame of the trace; with `y`.
        y: Metres to the north.
        lon: Degrees of longitude, instead of `x` and `y`; with `lat`.
        lat: Degrees of latitude.
        radius_m: Metres within which a device reaches it; None: anywhere.
    """

    x: float | None = None
    y: float | None = None
    lon: float | None = None
    lat: float | None = None
    radius_m: float | None = None

    @property
    def geographic(self) -> bool:
        """Whether it is given in degrees."""
        return self.lon is not None or self.lat is not None


@dataclass(frozen=True)
class EdgeLinkConfig:
    """Links between edge servers, over which sessions move.

    Attributes:
        mbit_s: Rate in Mbit/s; None: no limit.
        latency_ms: One way, in milliseconds.
    """

    mbit_s: float | None = None
    latency_ms: float = 0.0


@dataclass(frozen=True)
class MobilityConfig:
    """Who moves between edge servers, where and when.

    Attributes:
        kind: One of `KINDS`.
        mode: ``migrate`` takes a session along; ``restart`` begins the device's round anew at the
            edge server where it arrives, which is the baseline.
        devices: Partition ids of those that move; empty: all.
        share: Share of these that moves, drawn from the seed.
        at: ``halfway``, ``commuters``: the moves of a round, as shares of the device's
            mini-batches in it, ascending.
        every: ``halfway``, ``commuters``: rounds from one in which devices move to the next.
        how: How devices leave: one of `HOWS`; those with positions are ``foreseen`` in addition
            where their trend shows it, unless they are ``unannounced``.
        notice: ``halfway``, ``commuters``: share of the round between the first sign of a foreseen
            move and the move.
        piece: ``halfway``, ``commuters``: micro-batches of the mini-batch in work that are sent
            before the device moves.
        away_s: ``halfway``, ``commuters``: seconds in which it reaches neither edge server.
        cut: Cut from a move on, as in ``policy.cut``'s index; None: as before.
        file: ``trace``: FCD output of SUMO, as XML or CSV, plain or gzip.
        vehicles: ``trace``: partition id by name of the vehicle; None: in the order in which they
            appear.
        coordinates: ``trace``: ``metres`` or ``degrees``; None: as the places of the edge servers.
        begin_s: ``trace``: its second at which the first round begins; None: its first one.
        seconds_per_round: Seconds that a round lasts for devices with positions; None: as the
            virtual clock says where the fleet names machines; else a trace lasts all rounds, and a
            round of ``waypoint`` a minute.
        hysteresis_m: Metres by which another edge server must be nearer.
        mirror: Whether a session that was sent ahead is mirrored: what its device sends goes on to
            the other edge server, too, which does the same, so that next to nothing moves in the
            pause; else what changed since does.
        foresee_s: Seconds for which the trend of a position, or of a link, is followed; 0: nothing
            is foreseen.
        unreachable: Of a device that begins a round where it reaches no edge server: ``wait`` until
            it does, or train ``alone``.
        speed_m_s: ``waypoint``: least and greatest speed, in metres a second.
        pause_s: ``waypoint``: least and greatest stay at a point, in seconds.
        area_m: ``waypoint``: width and height of the area, in metres; empty: what the places of
            the edge servers cover, or 1 km each way without them.
        below_mbit_s: ``network``: rate of the slower direction, in Mbit/s, below which a link is
            poor; None: rates do not count.
        above_ms: ``network``: latency, one way, in milliseconds, above which a link is poor; None:
            latencies do not count.
        hysteresis: ``network``: share by which a link must be better than that to be good again;
            until then its device stays.
        steady_s: ``network``: seconds for which it must have been poor, or good.
    """

    kind: str = "none"
    mode: str = "migrate"
    devices: tuple[int, ...] = ()
    share: float = 1.0
    at: tuple[float, ...] = (0.5,)
    every: int = 1
    how: str = "announced"
    notice: float = 0.1
    piece: int = 0
    away_s: float = 0.0
    cut: int | None = None
    file: str | None = None
    vehicles: Mapping[str, int] | None = None
    coordinates: str | None = None
    begin_s: float | None = None
    seconds_per_round: float | None = None
    hysteresis_m: float = 20.0
    mirror: bool = False
    foresee_s: float = 5.0
    unreachable: str = "wait"
    speed_m_s: tuple[float, ...] = (5.0, 15.0)
    pause_s: tuple[float, ...] = (0.0, 30.0)
    area_m: tuple[float, ...] = ()
    below_mbit_s: float | None = None
    above_ms: float | None = None
    hysteresis: float = 0.2
    steady_s: float = 3.0

    @property
    def active(self) -> bool:
        """Whether anybody moves."""
        return self.kind != "none"


def check(
    mobility: MobilityConfig,
    places: Sequence[EdgePlace],
    *,
    edges: Sequence[str],
    num_clients: int,
    micro_batches: int = 1,
) -> None:
    """Refuse values out of range, and mobility without edge servers to move between.

    Args:
        mobility: The group.
        places: Where edge servers stand.
        edges: Names of the edge servers of the run; empty without split training.
        num_clients: Number of devices.
        micro_batches: Pieces of a mini-batch.

    Raises:
        ConfigError: Names the key, its value, the rule and the way out.
    """
    _check_places(places, len(edges))
    for key, known in (("kind", KINDS), ("mode", MODES), ("how", HOWS)):
        _one_of(key, getattr(mobility, key), known)
    _one_of("unreachable", mobility.unreachable, UNREACHABLE)
    if mobility.coordinates is not None:
        _one_of("coordinates", mobility.coordinates, COORDINATES)
    for key, holds, rule in _rules(mobility):
        if not holds:
            raise ConfigError.of(f"mobility.{key}", getattr(mobility, key), rule)
    if mobility.active:
        _check_run(mobility, len(edges), num_clients, micro_batches)


def _rules(m: MobilityConfig) -> tuple[tuple[str, bool, str], ...]:
    return (
        ("share", 0 < m.share <= 1, "must be above 0 and at most 1"),
        ("at", bool(m.at), "must name at least one share of a round"),
        ("at", all(0 <= share <= 1 for share in m.at), "must be shares of a round, from 0 to 1"),
        ("at", list(m.at) == sorted(m.at), "must be in ascending order"),
        ("every", m.every >= 1, "must be at least 1"),
        ("notice", 0 <= m.notice <= 1, "must be from 0 to 1"),
        ("piece", m.piece >= 0, "must not be negative"),
        ("away_s", m.away_s >= 0, "must not be negative"),
        ("cut", m.cut is None or m.cut >= 0, "must be the index of a cut; null leaves it"),
        (
            "seconds_per_round", m.seconds_per_round is None or m.seconds_per_round > 0,
            "must be above 0; null leaves it to the virtual clock",
        ),
        ("hysteresis_m", m.hysteresis_m >= 0, "must not be negative"),
        ("foresee_s", m.foresee_s >= 0, "must not be negative; 0 foresees nothing"),
        (
            "speed_m_s", len(m.speed_m_s) == 2 and 0 < m.speed_m_s[0] <= m.speed_m_s[1],
            "must be the least and the greatest speed, above 0",
        ),
        (
            "pause_s", len(m.pause_s) == 2 and 0 <= m.pause_s[0] <= m.pause_s[1],
            "must be the least and the greatest stay, not negative",
        ),
        (
            "area_m", len(m.area_m) in (0, 2) and all(side > 0 for side in m.area_m),
            "must be width and height in metres, above 0",
        ),
        ("below_mbit_s", m.below_mbit_s is None or m.below_mbit_s > 0, "must be above 0"),
        ("above_ms", m.above_ms is None or m.above_ms > 0, "must be above 0"),
        ("hysteresis", m.hysteresis >= 0, "must not be negative"),
        ("steady_s", m.steady_s >= 0, "must not be negative"),
        (
            "below_mbit_s", m.kind != "network" or (m.below_mbit_s, m.above_ms) != (None, None),
            "must say when a link is poor, or mobility.above_ms must",
        ),
    )  # fmt: skip


def _check_run(mobility: MobilityConfig, edges: int, clients: int, micro_batches: int) -> None:
    kind = mobility.kind
    if edges == 0:
        raise ConfigError.of(
            "mobility", kind, "must go with split training: devices that train alone are at no "
            "edge server", "policy=fixed or policy=auto trains with edge servers",
        )  # fmt: skip
    if edges == 1:
        raise ConfigError.of(
            "mobility", kind, "must have two edge servers to move between", "num_edges=2"
        )
    for client in mobility.devices:
        if not 0 <= client < clients:
            raise ConfigError.of(
                "mobility.devices", list(mobility.devices),
                f"must be partition ids, from 0 to {clients - 1}", "raise num_clients",
            )  # fmt: skip
    vehicles = mobility.vehicles or {}
    for vehicle, client in vehicles.items():
        if type(client) is not int or not 0 <= client < clients:
            raise ConfigError.of(
                f"mobility.vehicles.{vehicle}", client,
                f"must be a device of the run, a partition id from 0 to {clients - 1}",
                "raise num_clients",
            )  # fmt: skip
    if len(set(vehicles.values())) < len(vehicles):
        raise ConfigError.of("mobility.vehicles", dict(vehicles), "must name each device once")
    if mobility.piece >= micro_batches and mobility.piece:
        raise ConfigError.of(
            "mobility.piece", mobility.piece,
            f"must be below the {micro_batches} pieces of a mini-batch",
            "schedule=pipelined has several",
        )  # fmt: skip
    if kind == "trace" and not mobility.file:
        raise ConfigError.of(
            "mobility.file", mobility.file, "must name the FCD output of SUMO",
            "sumo … --fcd-output FCD.xml writes one",
        )  # fmt: skip


def _check_places(places: Sequence[EdgePlace], edges: int) -> None:
    for index, place in enumerate(places):
        path = f"fleet.places[{index}]"
        plane, globe = (place.x, place.y), (place.lon, place.lat)
        if (None in plane) == (None in globe) or (place.geographic and plane != (None, None)):
            given = {key: value for key, value in vars(place).items() if value is not None}
            raise ConfigError.of(path, given, "must have x and y in metres, or lon and lat")
        if place.geographic != places[0].geographic:
            raise ConfigError.of(path, "", "must be in metres or in degrees as the first one")
        if place.lon is not None and not abs(place.lon) <= 180:
            raise ConfigError.of(f"{path}.lon", place.lon, "must be from -180 to 180")
        if place.lat is not None and not abs(place.lat) <= 90:
            raise ConfigError.of(f"{path}.lat", place.lat, "must be from -90 to 90")
        if place.radius_m is not None and not 0 < place.radius_m < math.inf:
            raise ConfigError.of(
                f"{path}.radius_m", place.radius_m, "must be above 0", "null reaches anywhere"
            )
    if places and edges and len(places) != edges:
        raise ConfigError.of(
            "fleet.places", len(places), f"must be as many as the {edges} edge servers of the run",
            f"num_edges={len(places)}",
        )  # fmt: skip


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        rule = f"must be one of {', '.join(known)}"
        raise ConfigError.of(f"mobility.{key}", value, rule, did_you_mean(value, known).strip())
