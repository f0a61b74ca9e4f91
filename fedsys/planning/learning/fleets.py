"""Made-up fleets, many at a time, whose rounds are arrays: where an agent that scores cuts learns.

N fleets have R devices together. Each fleet has a model of its own (that of the run, or a chain of
units that is drawn), machines of one to three kinds, one edge server or two, and links that change
now and then. What devices truly take differs from what is believed of them in half of the fleets,
unit by unit and differently for each kind. A round is timed by the closed form of
`fedsys.planning.contention`, with those links that came after the decision.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.contention import Indices
from fedsys.planning.learning.fleet_times import Lines, Others
from fedsys.planning.learning.informed import informed
from fedsys.planning.learning.knowing import CutTable, Knowledge, Measurements, Rows
from fedsys.planning.learning.outlook import (
    Features,
    candidates,
    outlook,
    target,
)
from fedsys.planning.learning.rewards import regret_reward
from fedsys.planning.learning.staging import Forecast, Setup, stages_at
from fedsys.planning.workload import Array, StageTimes

WORKERS: Final = (1, 64)
"""Sessions that edges compute at a time, for one fleet after the other: one, or all of them.

Those have closed forms. What the others take of an edge is told agents for each session at a time.
"""


@dataclass(frozen=True)
class Draws:
    """What fleets are drawn from; ranges are gone through in equal ratios.

    Attributes:
        devices: Number of devices.
        cuts: Cuts of a model that is drawn, the whole model included.
        seconds: Of an iteration of the middling device of a fleet.
        speed: Factor of a kind of machine on that.
        unit: Factor on each unit, in fleets whose profiles are wrong.
        wrong: Share of these fleets.
        unknown: Share of the fleets of which nothing is believed.
        edge: What an edge takes for the whole model, over the middling device.
        mbit_s: Rates of links.
        change: Probabilities that a link changes in a round, for one fleet after the other.
        steps: Iterations of a round.
        rounds: Of an episode.
    """

    devices: tuple[int, int] = (2, 6)
    cuts: tuple[int, int] = (2, 8)
    seconds: tuple[float, float] = (0.05, 30.0)
    speed: tuple[float, float] = (0.1, 2.0)
    unit: tuple[float, float] = (0.5, 2.0)
    wrong: float = 0.5
    unknown: float = 0.2
    edge: tuple[float, float] = (0.002, 0.3)
    mbit_s: tuple[float, float] = (2.0, 150.0)
    change: tuple[float, ...] = (0.0, 0.1, 0.2)
    steps: tuple[int, int] = (3, 200)
    rounds: int = 12


@dataclass(frozen=True)
class World:
    """R devices as they are.

    Attributes:
        setup: The devices, each with a model of its own.
        legal: Which cuts there are, ``(R, C)``.
        truth: What they take: all cuts are known.
        change: Probability that the link of each changes in a round, ``(R,)``.
        least_s: Seconds of a round that the slowest of its fleet may hope for, ``(R,)``.
        classic_s: Seconds of a round of its fleet with all on the devices.
    """

    setup: Setup
    legal: NDArray[np.bool_]
    truth: Knowledge
    change: Array
    least_s: Array
    classic_s: Array

    @property
    def rows(self) -> Rows:
        """The devices."""
        return self.setup.rows

    def timed(self) -> World:
        """Return the same with what may be hoped for."""
        seen = outlook(self.setup, self.truth)
        hoped = target(self.rows, seen, self.legal)
        classic = np.maximum.reduceat(seen.round_s[:, -1], self.rows.starts)[self.rows.fleet]
        return dataclasses.replace(self, least_s=hoped.seconds, classic_s=classic)

    def stages(self, cut: Indices, course: Indices) -> StageTimes:
        """Return the stages of each device at a cut by a course, ``(R,)``."""
        return stages_at(self.setup, self.truth, cut, course)

    def rounds_s(self, iteration_s: Array, cut: Indices, of: Indices) -> Array:
        """Return the seconds of a round of some devices, by index, at cuts."""
        bits = self.setup.held_bits[of, cut]
        link = (self.truth.up_bit_s + self.truth.down_bit_s)[of]
        exchange = bits * link + np.where(bits > 0, 2 * self.rows.latency_s[of], 0.0)
        round_s: Array = iteration_s * self.rows.steps[of] + exchange
        return round_s

    def measured(self, s: StageTimes, iteration_s: Array) -> Measurements:
        """Return what devices measure in a round."""
        compute, edge = s.pieces * (s.forward + s.backward), s.pieces * s.edge
        return Measurements(iteration_s, compute, edge, self.truth.up_bit_s, self.truth.down_bit_s)


# --------------------------------------------------------------------------------------------------
# Drawing


def drawn(
    random: np.random.Generator, counts: Indices, own: CutTable, draws: Draws
) -> tuple[World, Knowledge]:
    """Return made-up fleets, and what is believed of them before the first round.

    Args:
        random: Where they are drawn from.
        counts: Devices of each fleet, ``(N,)``.
        own: The table of the run's model, which every other fleet trains.
        draws: From what.
    """
    fleet = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    table, legal = _tables(random, len(counts), own, draws)
    table = dataclasses.replace(
        table,
        **{n: getattr(table, n)[fleet] for n in ("share", "up_bits", "down_bits", "held_bits")},
    )
    middling = _ratios(random, draws.seconds, len(counts))
    rows = _rows(random, starts, fleet, draws, len(own.pieces))
    works, believed = _works(random, table, fleet, middling, draws)
    edge = (_ratios(random, draws.edge, len(counts)) * middling)[fleet]
    wrong = _wrong(fleet, draws)
    up, down = 1.0 / (_ratios(random, draws.mbit_s, (2, len(fleet))) * 1e6)
    down = np.where(random.random(len(fleet)) < 0.7, up, down)
    zeros, cuts = np.zeros(len(fleet)), table.share.shape[1]
    truth = Knowledge(
        zeros, works, np.zeros_like(works), up, down, zeros, edge,
        np.full(len(fleet), -1), np.zeros(len(fleet), dtype=np.int64), zeros, zeros,
    )  # fmt: skip
    unknown = random.random(len(counts))[fleet] < draws.unknown
    off = np.where(wrong, _ratios(random, draws.unit, len(fleet)), 1.0)
    known = dataclasses.replace(
        truth,
        guess_s=np.where(unknown, 0.0, believed),
        work_s=np.zeros((len(fleet), cuts)),
        edge_s=edge * off,
    )
    change = np.resize(np.array(draws.change), len(counts))[fleet]
    return World(Setup.of(table, rows), legal[fleet], truth, change, zeros, zeros).timed(), known


def _wrong(fleet: Indices, draws: Draws) -> NDArray[np.bool_]:
    wrong: NDArray[np.bool_] = (fleet // 2) % 100 < 100 * draws.wrong
    return wrong


def _ratios(random: np.random.Generator, bounds: tuple[float, float], size: Any) -> Array:
    low, high = np.log(bounds)
    made: Array = np.exp(random.uniform(low, high, size))
    return made


def _tables(
    random: np.random.Generator, count: int, own: CutTable, draws: Draws
) -> tuple[CutTable, NDArray[np.bool_]]:
    """Return the cuts of N models, ``(N, C)``, and which of them there are; the last always is."""
    most = max(draws.cuts[1], len(own.share))
    lengths = random.integers(draws.cuts[0], draws.cuts[1] + 1, count)
    lengths[::2] = len(own.share)
    first = (most - lengths)[:, None]
    legal = np.arange(most) >= first
    parts = np.where(legal, random.gamma(0.7, size=legal.shape) + 0.02, 0.0)
    share = np.cumsum(parts, axis=1) / parts.sum(axis=1, keepdims=True)
    held = np.where(legal, random.gamma(0.4, size=legal.shape), 0.0).cumsum(axis=1)
    held = held / held[:, -1:] * _ratios(random, (1e6, 3e8), (count, 1))
    halved = np.cumsum(random.choice([-2, -1, -1, 0, 1], size=legal.shape) * legal, axis=1)
    bits = _ratios(random, (1e6, 1e8), (count, 1)) * 2.0**halved
    bits[:, -1] = 0.0
    cheaper = own.up_bits[0] / own.up_bits[0, 0]
    up = bits[:, :, None] * cheaper
    down = up.copy()
    mine = np.zeros((count, most), dtype=bool)
    mine[::2] = legal[::2]
    share[::2] = own.share[0]
    for made, given in ((share, own.share), (held, own.held_bits)):
        made[::2, most - len(own.share) :] = given
    for made, given in ((up, own.up_bits), (down, own.down_bits)):
        made[::2] = given[0]
        made[::2, most - len(own.share) :] = given
    share = np.where(legal, share, share[np.arange(count), most - lengths][:, None])
    return CutTable(share, up, down, held, own.pieces), legal


def _rows(
    random: np.random.Generator, starts: Indices, fleet: Indices, draws: Draws, courses: int
) -> Rows:
    count, place = len(fleet), np.arange(len(fleet)) - starts[fleet]
    edges = 1 + (np.arange(len(starts)) // len(WORKERS)) % 2
    byte_s = _ratios(random, (1e-9, 1.5e-8), (count, 1)) / 8.0
    latency_s = _ratios(random, (0.0005, 0.03), count)
    steps = np.rint(_ratios(random, draws.steps, len(starts)))[fleet]
    fixed = _ratios(random, (5e-4, 4e-3), count)
    return Rows(
        starts,
        fleet,
        2 * fleet + place % edges[fleet],
        np.resize(np.array(WORKERS, dtype=float), len(starts))[fleet],
        latency_s,
        steps,
        fixed * 2 / 3,
        fixed / 3,
        np.repeat(byte_s, courses, axis=1),
        np.full(count, 3e-4),
        np.full((count, courses), 1e-9 / 8.0),
    )


def _works(
    random: np.random.Generator, table: CutTable, fleet: Indices, middling: Array, draws: Draws
) -> tuple[Array, Array]:
    """Return the seconds of work at each cut, ``(R, C)``, and those of all that are believed."""
    kinds, cuts = 3, table.share.shape[1]
    kind = random.integers(kinds, size=len(fleet))
    whole = middling[:, None] * _ratios(random, draws.speed, (len(middling), kinds))
    factors = _ratios(random, draws.unit, (len(middling), kinds, cuts))
    parts = np.diff(table.share, axis=1, prepend=0.0)
    wrong = _wrong(fleet, draws)[:, None]
    mine = whole[fleet, kind]
    parts = parts * np.where(wrong, factors[fleet, kind], 1.0)
    works: Array = np.cumsum(parts, axis=1) * mine[:, None]
    return works, mine


class FleetRounds:
    """Rounds of N fleets at once: each device of each fleet chooses a cut.

    Args:
        own: The table of the run's model.
        count: Number of fleets.
        draws: What fleets are drawn from.

    Attributes:
        legal: Which cuts each device may choose now, ``(R, C)``.
        seen: What is seen of the candidates, ``(R, C, F + 1)``.
    """

    def __init__(self, own: CutTable, count: int, draws: Draws | None = None) -> None:
        self._own, self._draws = own, draws or Draws()
        low, high = self._draws.devices
        self._counts = low + np.arange(count) % (high - low + 1)
        self.begin(np.random.default_rng(0))

    def begin(self, random: np.random.Generator) -> None:
        """Draw all fleets anew; their first episodes end one after the other."""
        self._random = random
        self._world, self._known = drawn(random, self._counts, self._own, self._draws)
        self._lines, self._others = Lines.of(self._world.rows), Others.among(self._world.rows)
        self._left = random.integers(1, self._draws.rounds + 1, len(self._counts))
        self._look()

    def step(self, cut: Indices) -> tuple[Array, NDArray[np.bool_]]:
        """Play a round; return what each device earns, and whether its fleet begins anew."""
        rows = self._world.rows
        cut = np.where(self.legal[np.arange(len(cut)), cut], cut, self.legal.shape[1] - 1)
        course = self._outlook.course[np.arange(len(cut)), cut]
        known = dataclasses.replace(self._known, cut=cut, course=course)
        self._move()
        s = self._world.stages(cut, course)
        iteration = self._lines.iterations_s(s)
        earned = self._earned(s, iteration, cut)
        measured = self._world.measured(s, iteration)
        self._known, made = informed(known, self._world.setup, measured)
        self._left -= 1
        over = self._left <= 0
        if over.any():
            self._renew(over[rows.fleet])
            self._left[over] = self._draws.rounds
        self._look(None if over.any() else made)
        return earned, over[rows.fleet]

    def _earned(self, s: StageTimes, iteration_s: Array, cut: Indices) -> Array:
        """Return what the round earns each device, beside what another cut of it would have.

        The other one is that which was expected to be fastest. All else is the same in both: what
        the others do, and the luck with links.
        """
        world, others, here = self._world, self._others, np.arange(len(cut))
        wished = self._hoped.wished
        instead = world.stages(wished, self._outlook.course[here, wished])
        round_s = world.rounds_s(iteration_s, cut, here)
        earned = self._reward(world.rows.starts, world.rows.fleet, round_s, here)
        at = np.where(others.other, wished[others.of], cut[others.of])
        rounds = world.rounds_s(others.iterations_s(s, instead), at, others.of)
        beside = self._reward(others.starts, others.lines.line, rounds, others.of)
        return earned - beside[others.other]

    def _reward(self, starts: Indices, fleet: Indices, round_s: Array, of: Indices) -> Array:
        world = self._world
        return regret_reward(starts, fleet, round_s, world.least_s[of], world.classic_s[of])

    def _move(self) -> None:
        """Let some links change."""
        world, random = self._world, self._random
        moved = random.random(len(world.change)) < world.change
        if not moved.any():
            return
        now = 1.0 / (_ratios(random, self._draws.mbit_s, len(world.change)) * 1e6)
        truth = dataclasses.replace(
            world.truth,
            up_bit_s=np.where(moved, now, world.truth.up_bit_s),
            down_bit_s=np.where(moved, now, world.truth.down_bit_s),
        )
        self._world = dataclasses.replace(world, truth=truth).timed()

    def _renew(self, rows: NDArray[np.bool_]) -> None:
        world, known = drawn(self._random, self._counts, self._own, self._draws)
        self._world = _replaced(self._world, world, rows)
        self._known = _replaced(self._known, known, rows)

    def _look(self, made: Forecast | None = None) -> None:
        world, known = self._world, self._known
        self._outlook = outlook(world.setup, known, made)
        alone = np.arange(world.legal.shape[1]) == world.legal.shape[1] - 1
        self.legal = world.legal & (known.ready[:, None] | alone)
        self._hoped = target(world.rows, self._outlook, self.legal)
        self.seen: Features = candidates(world.setup, known, self._outlook, self._hoped, self.legal)


def _replaced(old: Any, new: Any, rows: NDArray[np.bool_]) -> Any:
    """Return a record with some rows of another one."""
    made = {}
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(before):
            made[field.name] = _replaced(before, after, rows)
        elif isinstance(before, np.ndarray) and len(before) == len(rows):
            shape = (-1, *[1] * (before.ndim - 1))
            made[field.name] = np.where(rows.reshape(shape), after, before)
        else:
            made[field.name] = before
    return dataclasses.replace(old, **made)
