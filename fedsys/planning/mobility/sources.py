"""The mobility source that a configuration names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from fedsys.config import Config, EdgePlace
from fedsys.errors import ConfigError
from fedsys.planning.hardware import link_of, network_for
from fedsys.planning.mobility.coverage import Coverage, spread
from fedsys.planning.mobility.network_led import ModelledLinks, WatchedLinks, is_watched
from fedsys.planning.mobility.positions import EvenRounds, Positioned, Walkers
from fedsys.planning.mobility.scripted import Scripted, movers
from fedsys.planning.mobility.tracks import Array, LocalPlane, Track, in_metres, read_trace
from fedsys.planning.mobility.waypoint import RandomWaypoint
from fedsys.transport.network import Network

ROUND_S: Final = 60.0
"""Seconds of a round of random waypoints where nobody says how long it is."""

SIDE_M: Final = 1000.0
"""Metres of each side of the area of random waypoints where nothing says how large it is."""


Source = Scripted | Positioned | ModelledLinks | WatchedLinks


def source_of(config: Config, edges: int) -> Source | None:
    """Return where the devices of a run are; None where nobody moves.

    Args:
        config: The run.
        edges: Number of its edge servers.

    Raises:
        ConfigError: The trace is not usable, or does not go with the run; or nothing says what
            links carry by which devices are to move.
    """
    mobility = config.mobility
    if mobility.kind == "network":
        return _led(config)
    if mobility.kind == "trace":
        return _traced(config, edges)
    if mobility.kind == "waypoint":
        return _walking(config, edges)
    if mobility.active:
        return Scripted(mobility, config.num_clients, config.seed)
    return None


def _led(config: Config) -> ModelledLinks | WatchedLinks:
    mobility = config.mobility
    if is_watched(config):
        return WatchedLinks(mobility)
    for client in range(config.num_clients):
        link, network = link_of(config, client), network_for(config, client)
        if network.by_rounds:
            raise ConfigError.of(
                "network.trace_by", "rounds", "must be seconds for mobility=network: within a "
                "round its links do not change", "network.trace_by=seconds",
            )  # fmt: skip
        if network == Network():
            raise ConfigError.of(
                "network", link.name, "must say what links carry, by which devices move",
                "network=wifi with network.trace=rates.csv; or network.emulate=true, or "
                "runtime=deployment, where devices measure it",
            )  # fmt: skip
    times = EvenRounds(mobility.seconds_per_round or ROUND_S)
    return ModelledLinks(
        mobility, lambda c: network_for(config, c), config.num_clients, config.seed, times
    )


def _traced(config: Config, edges: int) -> Positioned:
    mobility, places = config.mobility, config.fleet.places
    trace, names = read_trace(mobility, config.num_clients)
    tracks, points = in_metres(trace, mobility, places)
    said = []
    others = trace.vehicles - len(tracks)
    if others:
        count = f"{others} of the {trace.vehicles} vehicles of the trace"
        said.append(f"{count} stand for no device")
    unnamed = names.count("")
    if unnamed:
        said.append(f"{unnamed} devices have no vehicle, and stay where the policy wants them")
    every = np.concatenate([track.points for track in tracks.values()])
    coverage, more = _coverage(places, points, every, edges)
    begin = trace.begin_s if mobility.begin_s is None else mobility.begin_s
    lasts = max(trace.end_s - begin, 1e-9) / config.rounds
    times = EvenRounds(mobility.seconds_per_round or lasts)

    def track(client: int, until_s: float) -> Track | None:
        return tracks.get(client)

    walkers = Walkers(track, coverage, begin, trace.end_s)
    return Positioned(mobility, walkers, times, [*said, *more])


def _walking(config: Config, edges: int) -> Positioned:
    mobility, places = config.mobility, config.fleet.places
    points = _plane(places)
    low, high = _area(config, points)
    corners = np.array([low, high])
    coverage, said = _coverage(places, points, corners, edges)
    speed, pause = mobility.speed_m_s, mobility.pause_s
    walk = RandomWaypoint(config.seed, low, high, (speed[0], speed[1]), (pause[0], pause[1]))
    who = movers(mobility, config.num_clients, config.seed)

    def track(client: int, until_s: float) -> Track | None:
        return walk.track(client, until_s) if client in who else None

    times = EvenRounds(mobility.seconds_per_round or ROUND_S)
    return Positioned(mobility, Walkers(track, coverage), times, said)


def _plane(places: Sequence[EdgePlace]) -> Array | None:
    """Return where edge servers stand in metres, ``(E, 2)``; None if nothing is said."""
    if not places:
        return None
    if not places[0].geographic:
        return np.array([(place.x, place.y) for place in places], dtype=float)
    globe = np.array([(place.lon, place.lat) for place in places], dtype=float)
    return LocalPlane.around(globe).metres(globe)


def _area(config: Config, points: Array | None) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return two corners of the area of random waypoints."""
    sides = config.mobility.area_m or (SIDE_M, SIDE_M)
    if points is None:
        return (0.0, 0.0), (sides[0], sides[1])
    if config.mobility.area_m:
        middle = (points.min(axis=0) + points.max(axis=0)) / 2
        low, high = middle - np.array(sides) / 2, middle + np.array(sides) / 2
    else:
        reach = np.array([[place.radius_m or SIDE_M / 2] for place in config.fleet.places])
        low, high = (points - reach).min(axis=0), (points + reach).max(axis=0)
    return (float(low[0]), float(low[1])), (float(high[0]), float(high[1]))


def _coverage(
    places: Sequence[EdgePlace], points: Array | None, every: Array, edges: int
) -> tuple[Coverage, list[str]]:
    """Return where edge servers are: as the fleet says, or spread over where devices are."""
    if points is None:
        width, height = every.max(axis=0) - every.min(axis=0)
        area = f"{width:.0f} x {height:.0f} m"
        said = f"fleet.places says nothing: {edges} edge servers are spread evenly over {area}"
        return spread(every, edges), [f"{said}, and reach all of it"]
    radius = [math.inf if place.radius_m is None else place.radius_m for place in places]
    return Coverage(points, np.array(radius)), []
