"""Where devices are over time, in metres: the vehicles of a trace that stand for them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsys.config import EdgePlace, MobilityConfig
from fedsys.errors import ConfigError, did_you_mean
from fedsys.planning.mobility import fcd

Array = NDArray[np.float64]

EARTH_M = 6_371_008.8
"""Mean radius of the Earth, in metres (IUGG)."""


@dataclass(frozen=True, eq=False)
class Track:
    """Where one device is: at its first position before, at its last one afterwards.

    Attributes:
        times_s: Seconds, ascending; length N, at least 1.
        points: Metres to the east and to the north, ``(N, 2)``.
    """

    times_s: Array
    points: Array


@dataclass(frozen=True)
class LocalPlane:
    """What degrees are in metres, near a point: an equirectangular projection.

    Within 50 km of the point distances are off by less than 1 %, at latitudes up to 60 degrees.

    Attributes:
        lon: The point's longitude, in degrees.
        lat: Its latitude.
    """

    lon: float
    lat: float

    @classmethod
    def around(cls, degrees: Array) -> LocalPlane:
        """Return the frame in the middle of points ``(N, 2)`` of longitude and latitude."""
        away = (degrees[:, 0] - degrees[0, 0] + 180.0) % 360.0 - 180.0
        return cls(float(degrees[0, 0] + away.mean()), float(degrees[:, 1].mean()))

    def metres(self, degrees: Array) -> Array:
        """Return points ``(N, 2)`` of longitude and latitude as metres east and north."""
        away = (degrees[:, 0] - self.lon + 180.0) % 360.0 - 180.0
        east = EARTH_M * math.cos(math.radians(self.lat)) * np.radians(away)
        north = EARTH_M * np.radians(degrees[:, 1] - self.lat)
        return np.stack([east, north], axis=1)


@dataclass(frozen=True, eq=False)
class VehicleTrace:
    """The vehicles of a trace that stand for devices.

    Attributes:
        tracks: By partition id.
        begin_s: Its first time step.
        end_s: Its last one.
        vehicles: How many there are, with those that stand for no device.
    """

    tracks: Mapping[int, Track]
    begin_s: float
    end_s: float
    vehicles: int


@dataclass
class _Rows:
    """What is read of one vehicle."""

    times: array[float]
    values: array[float]


def read_trace(mobility: MobilityConfig, num_clients: int) -> tuple[VehicleTrace, list[str]]:
    """Return the vehicles of ``mobility.file``, as they stand in it: metres or degrees.

    Args:
        mobility: The group.
        num_clients: Devices of the run.

    Returns:
        The trace, and the names of its vehicles by partition id, empty where there is none.

    Raises:
        ConfigError: The file is not usable, a vehicle that is named is not in it, or there are
            fewer vehicles than devices.
    """
    path = Path(str(mobility.file))
    asked = mobility.vehicles
    rows: dict[str, _Rows] = {}
    others: set[str] = set()
    begin, end = math.inf, -math.inf
    for at, name, x, y in fcd.read(path):
        begin, end = min(begin, at), at
        own = rows.get(name)
        if own is None:
            wanted = len(rows) < num_clients if asked is None else name in asked
            if not wanted:
                others.add(name)
                continue
            own = rows[name] = _Rows(array("d"), array("d"))
        if own.times and own.times[-1] == at:
            raise ConfigError.of(
                f"mobility.file={path}, {at:g} s", name, "must stand once in a time step"
            )
        own.times.append(at)
        own.values.extend((x, y))
    _check_vehicles(path, asked, rows, others, num_clients)
    numbers = dict(zip(rows, range(num_clients), strict=False)) if asked is None else asked
    tracks = {
        numbers[name]: Track(np.array(own.times), np.array(own.values).reshape(-1, 2))
        for name, own in rows.items()
    }
    names = {client: name for name, client in numbers.items()}
    named = [names.get(client, "") for client in range(num_clients)]
    return VehicleTrace(tracks, begin, end, len(rows) + len(others)), named


def _check_vehicles(
    path: Path,
    asked: Mapping[str, int] | None,
    rows: Mapping[str, _Rows],
    others: set[str],
    num_clients: int,
) -> None:
    if not rows and not others:
        raise ConfigError.of("mobility.file", path, "must hold vehicles, and has none")
    for name in asked or ():
        if name not in rows:
            raise ConfigError.of(
                f"mobility.vehicles.{name}", (asked or {})[name],
                f"must be a vehicle of {path}, which has {len(rows) + len(others)} others",
                did_you_mean(name, sorted({*rows, *others})).strip(),
            )  # fmt: skip
    if asked is None and len(rows) < num_clients:
        raise ConfigError.of(
            "mobility.file", path,
            f"must have a vehicle for each of the {num_clients} devices, and has {len(rows)}; "
            "SUMO leaves out trips that are not sorted by their departure",
            f"num_clients={len(rows)}, or name those that stand for devices in mobility.vehicles",
        )  # fmt: skip


def in_metres(
    trace: VehicleTrace, mobility: MobilityConfig, places: Sequence[EdgePlace]
) -> tuple[dict[int, Track], Array | None]:
    """Return tracks and the points of edge servers in one frame, in metres.

    Args:
        trace: As it stands in the file.
        mobility: Says in what its coordinates are, where the places do not.
        places: Where edge servers stand; may be empty.

    Returns:
        Tracks by partition id, and points ``(E, 2)``; None without places.

    Raises:
        ConfigError: Coordinates and places do not go together.
    """
    given = mobility.coordinates
    implied = ("degrees" if places[0].geographic else "metres") if places else None
    if given and implied and given != implied:
        raise ConfigError.of("mobility.coordinates", given, f"must be {implied}, as fleet.places")
    every = np.concatenate([track.points for track in trace.tracks.values()])
    if (given or implied) != "degrees":
        _check_metres(mobility, every, given)
        points = [(place.x, place.y) for place in places]
        return dict(trace.tracks), np.array(points, dtype=float) if places else None
    _check_degrees(mobility, every)
    globe = np.array([(place.lon, place.lat) for place in places], dtype=float)
    frame = LocalPlane.around(globe if places else every[:1])
    tracks = {
        client: Track(track.times_s, frame.metres(track.points))
        for client, track in trace.tracks.items()
    }
    return tracks, frame.metres(globe) if places else None


def _check_degrees(mobility: MobilityConfig, points: Array) -> None:
    lon, lat = np.abs(points).max(axis=0)
    if lon > 180 or lat > 90:
        raise ConfigError.of(
            "mobility.file", mobility.file,
            f"must be in degrees, and has coordinates up to {max(lon, lat):.6g}: SUMO writes metres"
            " in spite of --fcd-output.geo where its net has no projection",
            "give fleet.places in x and y",
        )  # fmt: skip


def _check_metres(mobility: MobilityConfig, points: Array, given: str | None) -> None:
    """Refuse what are degrees for all that can be seen: all of it lies within a few metres."""
    low, high = points.min(axis=0), points.max(axis=0)
    possible = bool(np.abs(points).max() <= 180 and np.abs(points[:, 1]).max() <= 90)
    if given is None and len(points) > 1 and possible and 0 < (high - low).max() < 1:
        raise ConfigError.of(
            "mobility.coordinates", None,
            f"must be said: all of {mobility.file} lies within {(high - low).max():.3g} of its "
            "unit, as longitude and latitude do",
            "mobility.coordinates=degrees, or metres",
        )  # fmt: skip
