"""Rates of a network over time: measured, as packets, or drawn from a seed.

``network.trace`` names them in one of these forms, and planner, virtual clock, shaped links and
emulated devices read the same `fedsys.transport.network.Network`:

===================================  ===========================================================
``[[0, 50, 20], [60, 5, 2]]``        second, Mbit/s up, Mbit/s down: rates from then on
``FILE``                             measured throughput as CSV, or packets (below)
``{up: FILE, down: FILE}``           each way of its own
``[FILE, FILE]``                     one of these for each device, repeated if there are more
``{machines: {pi3: FILE}}``          by the machine's name in the fleet file; others have none
``{generate: random_walk, …}``       drawn from a seed (`random_walk`, `steps`), or `throttle`
===================================  ===========================================================

CSV has a line of names, of which ``seconds``, ``up`` and ``down`` are read (``network.columns``
gives others), or three columns without names; rates are in Mbit/s. A file with one whole number on
each line is a schedule of packets as the emulator Mahimahi replays it (Netravali et al., USENIX ATC
2015): each line is a millisecond at which 1,500 bytes may pass, several lines may be the same one,
and the last line is the period.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedsys.config import NetworkConfig
from fedsys.errors import ConfigError, did_you_mean
from fedsys.randomness import Address
from fedsys.transport.network import Network, Rate

COLUMNS: Final = ("seconds", "up", "down")
PACKET_BYTES: Final = 1500
FIRST_S: Final = 10.0
"""Seconds of a trace whose mean rate is believed before anything is measured, where no rate is
given beside it."""

_SORT: Final = "sort its lines by time"
_HOLE: Final = "leave the line out, and the rate before it holds, or give rates of 0 for an outage"

Row = tuple[float, float, float]


@dataclass(frozen=True)
class Trace:
    """Rates of both ways over time, in bits per second."""

    up: Rate
    down: Rate


def network_of(config: NetworkConfig, device: int = 0, machine: str = "", seed: int = 0) -> Network:
    """Return the network of a device in bits and seconds, with its trace.

    Args:
        config: What is said of the network.
        device: Partition id: it chooses among several traces, and draws its own of a seed.
        machine: Name of its machine in the fleet file.
        seed: Of the run; for traces that are drawn and name no seed of their own.

    Raises:
        ConfigError: A file cannot be read, or its rates are not usable.
    """
    up, down = (None if r is None else r * 1e6 for r in (config.up_mbit_s, config.down_mbit_s))
    trace = _trace(config, config.trace, device, machine, seed)
    by_rounds = config.trace_by == "rounds"
    if trace is not None:
        span = 1.0 if by_rounds else FIRST_S
        up = max(1.0, trace.up.mean(0.0, span)) if up is None else up
        down = max(1.0, trace.down.mean(0.0, span)) if down is None else down
    return Network(
        math.inf if up is None else up,
        math.inf if down is None else down,
        config.latency_ms / 1e3,
        up_trace=None if trace is None else trace.up,
        down_trace=None if trace is None else trace.down,
        by_rounds=by_rounds and trace is not None,
    )


def files_of(spec: Any) -> list[str]:
    """Return the files that a ``network.trace`` names."""
    if isinstance(spec, str):
        return [spec]
    if isinstance(spec, Mapping):
        inner = spec.get("machines", {key: spec[key] for key in ("up", "down") if key in spec})
        return [name for value in dict(inner).values() for name in files_of(value)]
    if _is_rows(spec):
        return []
    return [name for value in spec or () for name in files_of(value)]


def check_files(config: NetworkConfig) -> None:
    """Read all files that a ``network.trace`` names, before anybody needs them.

    Raises:
        ConfigError: A file cannot be read, or its rates are not usable.
    """
    for name in files_of(config.trace):
        _trace(config, name, 0, "", 0)


def _is_rows(spec: Any) -> bool:
    return isinstance(spec, list | tuple) and all(
        isinstance(row, list | tuple) and all(isinstance(x, int | float) for x in row)
        for row in spec
    )


def _trace(config: NetworkConfig, spec: Any, device: int, machine: str, seed: int) -> Trace | None:
    if not spec:
        return None
    if isinstance(spec, str):
        return _read(
            Path(spec).expanduser(), tuple(sorted((config.columns or {}).items())), config.period_s
        )
    if _is_rows(spec):
        return _of_rows(config, spec)
    if isinstance(spec, list | tuple):
        return _trace(config, spec[device % len(spec)], device, machine, seed)
    if not isinstance(spec, Mapping):
        raise ConfigError.of(
            "network.trace", spec, "must be a file, rows, or a group of keys",
            "for instance network.trace=rates.csv",
        )  # fmt: skip
    if "machines" in spec:
        return _trace(config, spec["machines"].get(machine), device, machine, seed)
    if "generate" in spec:
        return _generated(config, spec, device, seed)
    if set(spec) != {"up", "down"}:
        raise ConfigError.of(
            "network.trace", dict(spec), "must name generate, machines, or up and down"
        )
    ways = [_trace(config, spec[way], device, machine, seed) for way in ("up", "down")]
    if ways[0] is None or ways[1] is None:
        raise ConfigError.of("network.trace", dict(spec), "must name a file for each way")
    return Trace(ways[0].up, ways[1].down)


def _of_rows(config: NetworkConfig, rows: Sequence[Sequence[float]]) -> Trace:
    base = [math.inf if r is None else r for r in (config.up_mbit_s, config.down_mbit_s)]
    points = [(float(at), float(up), float(down)) for at, up, down in rows]
    if points[0][0] > 0:
        points.insert(0, (0.0, base[0], base[1]))
    return _rates(points, config.period_s)


def _rates(points: Sequence[Row], period_s: float | None) -> Trace:
    """Return rates of rows in seconds and Mbit/s; rows that change nothing are left out."""
    starts = tuple(at for at, _, _ in points)
    up, down = (tuple(row[way] * 1e6 for row in points) for way in (1, 2))
    return Trace(Rate(starts, up, period_s), Rate(starts, down, period_s))


# --------------------------------------------------------------------------------------------------
# Files


@functools.lru_cache(maxsize=256)
def _read(path: Path, columns: tuple[tuple[str, str], ...], period_s: float | None) -> Trace:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError.of("network.trace", path, f"must be a text file ({error})") from error
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
    lines = [(i, line) for i, line in lines if line and not line.startswith("#")]
    if not lines:
        raise ConfigError.of("network.trace", path, "must hold rates, and is empty")
    if lines[0][1].isdecimal():  # a table has three columns
        rate = packets(path, [(i, _millisecond(path, i, line)) for i, line in lines])
        return Trace(rate, rate)
    return _rates(_table(path, lines, dict(columns)), period_s)


def _millisecond(path: Path, number: int, line: str) -> int:
    if not line.isdecimal():
        rule = "must be a whole millisecond, 0 or later, as the lines of a schedule of packets are"
        raise _refused(path, number, line, rule, "a table has seconds and two rates on each line")
    return int(line)


def packets(path: Path, lines: Iterable[tuple[int, int]]) -> Rate:
    """Return the rate of a schedule of packets.

    Args:
        path: Its file, for messages.
        lines: Number of each line, and its millisecond.

    Raises:
        ConfigError: Times go back, or the schedule has no length.
    """
    counts: dict[int, int] = {}
    before = 0
    for number, at in lines:
        if at < before:
            raise _refused(
                path, number, at, f"must not go back: {before} ms stands before it", _SORT
            )
        counts[at] = counts.get(at, 0) + 1
        before = at
    period = before
    if period == 0:
        rule = "must end later: its last line is the period"
        raise _refused(path, 1, 0, rule, "end with the millisecond at which it begins anew")
    # The schedule begins anew after the period, so millisecond 0 is the end of the one before
    counts[period] = counts.get(period, 0) + counts.pop(0, 0)
    starts, bits = [0.0], [0.0]
    for at, count in sorted(counts.items()):
        speed = count * PACKET_BYTES * 8 * 1e3
        _append(starts, bits, (at - 1) / 1e3, speed)
        if at < period:
            _append(starts, bits, at / 1e3, 0.0)
    return Rate(tuple(starts), tuple(bits), period / 1e3)


def _append(starts: list[float], bits: list[float], at: float, speed: float) -> None:
    """Begin a piece; one of no length is overwritten, one that changes nothing left out."""
    if starts[-1] == at:
        starts.pop()
        bits.pop()
    if not bits or bits[-1] != speed:
        starts.append(at)
        bits.append(speed)


def _table(path: Path, lines: Sequence[tuple[int, str]], columns: Mapping[str, str]) -> list[Row]:
    dialect = ";" if lines[0][1].count(";") > lines[0][1].count(",") else ","
    rows = [
        (number, [cell.strip() for cell in next(csv.reader([line], delimiter=dialect))])
        for number, line in lines
    ]
    places: tuple[int, ...] = (0, 1, 2)
    if not _numbers(rows[0][1]):
        head = [cell.lower() for cell in rows[0][1]]
        places = tuple(_place(path, head, columns.get(name, name)) for name in COLUMNS)
        rows = rows[1:]
    elif columns:
        raise ConfigError.of("network.columns", dict(columns), f"{path} has no line of names")
    if not rows:
        raise ConfigError.of("network.trace", path, "must hold rates, and has a line of names only")
    points: list[Row] = []
    for number, cells in rows:
        if len(cells) <= max(places) or not _numbers([cells[i] for i in places]):
            raise _refused(
                path, number, cells, "must have seconds and two rates; it has a hole", _HOLE
            )
        at, up, down = (float(cells[i]) for i in places)
        if min(up, down) < 0:
            rule = "must not be a negative rate"
            raise _refused(path, number, min(up, down), rule, "0 is an outage")
        if points and at <= points[-1][0]:
            rule = f"must be later than {points[-1][0]:g} s before it"
            raise _refused(path, number, at, rule, _SORT)
        points.append((at, up, down))
    first = points[0][0]  # measurements begin whenever their clock did
    return [(at - first, up, down) for at, up, down in points]


def _place(path: Path, head: Sequence[str], name: str) -> int:
    if name.lower() not in head:
        hint = did_you_mean(name, head)
        raise ConfigError.of(
            "network.columns", name, f"must be a column of {path}", f"{hint}{', '.join(head)}"
        )
    return list(head).index(name.lower())


def _numbers(cells: Sequence[str]) -> bool:
    try:
        return bool(cells) and all(math.isfinite(float(cell)) for cell in cells)
    except ValueError:
        return False


def _refused(path: Path, number: int, value: object, rule: str, way_out: str) -> ConfigError:
    return ConfigError.of(f"network.trace={path}, line {number}", value, rule, way_out)


# --------------------------------------------------------------------------------------------------
# Traces of a seed


def random_walk(
    address: Address,
    *,
    low_mbit_s: float = 2.0,
    high_mbit_s: float = 75.0,
    every: float = 20.0,
    change: float = 0.3,
    length: float = 3600.0,
) -> list[Row]:
    """Return a walk of the logarithm of both rates between two bounds, at which it turns back.

    Args:
        address: Of the draw.
        low_mbit_s: Lowest rate.
        high_mbit_s: Highest rate; the walk begins at the geometric mean.
        every: Time between two changes, in seconds (or rounds).
        change: Standard deviation of a change of the natural logarithm.
        length: How long the walk is; it repeats after that.
    """
    low, high = math.log(low_mbit_s), math.log(high_mbit_s)
    draws = address.numpy("random_walk").normal(0.0, change, (math.ceil(length / every), 2))
    at = [(low + high) / 2] * 2
    rows = []
    for i, steps in enumerate(draws.tolist()):
        at = [_reflected(x + step, low, high) for x, step in zip(at, steps, strict=True)]
        rows.append((i * every, math.exp(at[0]), math.exp(at[1])))
    return rows


def _reflected(x: float, low: float, high: float) -> float:
    if high <= low:
        return low
    away = (x - low) % (2 * (high - low))
    return low + min(away, 2 * (high - low) - away)


def steps(
    address: Address,
    *,
    levels_mbit_s: Sequence[float] = (75.0, 50.0, 25.0, 10.0),
    every: float = 60.0,
    length: float = 3600.0,
) -> list[Row]:
    """Return rates, the same both ways, that jump to another level each time.

    Args:
        address: Of the draw.
        levels_mbit_s: The levels.
        every: Time between two jumps, in seconds (or rounds).
        length: How long the trace is; it repeats after that.
    """
    draw = address.numpy("steps")
    rows: list[Row] = []
    for i in range(math.ceil(length / every)):
        others = [x for x in levels_mbit_s if not rows or x != rows[-1][1]] or levels_mbit_s
        level = float(others[int(draw.integers(len(others)))])
        rows.append((i * every, level, level))
    return rows


def throttle(
    device: int,
    base: tuple[float, float],
    *,
    mbit_s: float = 5.0,
    first: float = 50.0,
    length: float = 10.0,
    order: Sequence[int] = (),
) -> list[Row]:
    """Return rates that are throttled once, one device after the other.

    The experiment on changing bandwidth of FedAdapt (Wu et al., IEEE IoT-J 9(21), 2022) in its
    published code: 5 Mbit/s for ten rounds each, from round 50 on.

    Args:
        device: Partition id.
        base: Its rates at other times, in Mbit/s.
        mbit_s: Its rates then.
        first: When the first device is throttled.
        length: For how long each is.
        order: Partition ids in the order in which they are throttled; empty: ascending, all.
    """
    turn = list(order).index(device) if device in order else (device if not order else None)
    if turn is None:
        return [(0.0, *base)]
    begin = first + turn * length
    rows = [(begin, mbit_s, mbit_s), (begin + length, *base)]
    return [(0.0, *base), *rows] if begin > 0 else rows


_DRAWN: dict[str, Callable[..., list[Row]]] = {"random_walk": random_walk, "steps": steps}


def _generated(config: NetworkConfig, spec: Mapping[str, Any], device: int, seed: int) -> Trace:
    name = spec["generate"]
    given = {key: value for key, value in spec.items() if key not in ("generate", "seed")}
    try:
        if name == "throttle":
            base = config.up_mbit_s, config.down_mbit_s
            if base[0] is None or base[1] is None:
                raise ConfigError.of(
                    "network.up_mbit_s", None, "must be given with a throttle",
                    "choose a network: network=wifi_75",
                )  # fmt: skip
            return _rates(throttle(device, (base[0], base[1]), **given), None)
        if name not in _DRAWN:
            known = ("throttle", *_DRAWN)
            raise ConfigError.of(
                "network.trace.generate", name, f"must be one of {', '.join(known)}",
                did_you_mean(str(name), known).strip(),
            )  # fmt: skip
        rows = _DRAWN[name](Address(int(spec.get("seed", seed)), device), **given)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ConfigError.of("network.trace", dict(spec), f"is not usable: {error}") from error
    return _rates(rows, rows[-1][0] + (rows[1][0] if len(rows) > 1 else 1.0))
