"""The stages of all devices for some choices, from which planners time many plans at once."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fedsys.planning.assignment import Assignment
from fedsys.planning.contention import Indices, alone_s, together_s
from fedsys.planning.workload import Array, Menu, StageTimes, Workload, mini_batches
from fedsys.transport.network import Network

MEAN = 1e-3  # weight of the mean beside the slowest device
_ENTRIES = 4_000_000  # numbers in one array


def score(round_s: Array) -> Array:
    """Return what is minimised: the slowest device of ``(C, K)`` and a little of the mean."""
    total: Array = round_s.max(axis=-1) + MEAN * round_s.mean(axis=-1)
    return total


class StageTable:
    """The stages of all devices for some choices.

    Devices of one kind share their stages, and so do choices that differ in the edge only, if these
    edges are of one kind: such choices are one *course*.

    Attributes:
        choices: All choices, C of them.
        course: Index of the course of each choice.
        choice_at: Index of the choice by course and edge, ``(O, E)``; -1 where there is none.
        kind: Number of the kind of each device, ``(K,)``: the same costs and network.
        like: Number of its class, ``(K,)``: of one kind, and with as many examples.
        steps: Iterations of each device in a round, ``(K,)``.
        rest: Time of the last iteration of an epoch, of one of full size, ``(K, O)``: as it is of a
            device alone.
        worth: How many iterations of full size a round is worth, ``(K, O)``.
    """

    def __init__(self, load: Workload, choices: Sequence[Assignment]) -> None:
        self.load, self.choices = load, tuple(choices)
        self.workers = [edge.workers for edge in load.edges]
        self._known: dict[bytes, tuple[Array, Array]] = {}
        self._alone: Array | None = None
        self.edge: Indices = np.array([choice.edge for choice in choices])
        self._pick_courses()
        menu = Menu(load, [self.choices[i] for i in self._first])
        kinds: dict[tuple[int, Network], int] = {}
        made: list[StageTimes] = []
        classes: dict[tuple[int, int], int] = {}
        self.kind, self.like = np.zeros((2, len(load.devices)), dtype=np.int64)
        for k, device in enumerate(load.devices):
            kind = kinds.setdefault((id(device.costs), device.network), len(kinds))
            self.kind[k] = kind
            self.like[k] = classes.setdefault((kind, device.examples), len(classes))
            if kind == len(made):
                made.append(menu.stages(device))
        names = [f.name for f in dataclasses.fields(StageTimes)]
        self._stages = {name: np.stack([getattr(s, name) for s in made]) for name in names}
        self.steps = np.array([load.iterations(device) for device in load.devices], dtype=float)
        self.rest = self._rests(menu)
        self.worth = self.steps[:, None] - load.epochs * (1.0 - self.rest)
        self.exchange = load.exchange_s()[:, menu.cut]

    def _rests(self, menu: Menu) -> Array:
        load = self.load
        full = alone_s(StageTimes(**self._stages), load.in_flight)
        last = np.array([mini_batches(d.examples, load.batch_size)[-1] for d in load.devices])
        rest = np.ones((len(load.devices), len(self._first)))
        for kind in np.unique(self.kind[last != load.batch_size]):
            mine = np.flatnonzero((self.kind == kind) & (last != load.batch_size))
            sizes, which = np.unique(last[mine], return_inverse=True)
            stages = menu.resized(sizes.tolist()).stages(load.devices[mine[0]])
            took = alone_s(stages, load.in_flight).reshape(len(sizes), -1)
            rest[mine] = np.divide(took, full[kind], out=np.ones_like(took), where=full[kind] > 0)[
                which
            ]
        return rest

    def _pick_courses(self) -> None:
        like = {id(costs): i for i, costs in reversed(list(enumerate(self.load.edges)))}
        kind = [like[id(costs)] for costs in self.load.edges]
        found: dict[tuple[int, int, tuple[str, str], int], int] = {}
        self._first: list[int] = []
        self.course = np.zeros(len(self.choices), dtype=np.int64)
        for i, c in enumerate(self.choices):
            key = (c.cut, c.pieces, c.codecs, kind[c.edge])
            self.course[i] = found.setdefault(key, len(found))
            if self.course[i] == len(self._first):
                self._first.append(i)
        self.choice_at = np.full((len(found), len(self.load.edges)), -1)
        self.choice_at[self.course, self.edge] = np.arange(len(self.choices))

    def part(self, groups: Sequence[Indices]) -> StageTable:
        """Return the table in which one device stands for each group.

        Devices that are alike send at the same moments, so what an edge takes for a piece of each,
        one after the other, is what it takes for one piece that is as much longer. An edge that
        computes as many sessions at a time takes as long as for one.

        Args:
            groups: Indices of the devices of each group; the first one stands for it.
        """
        made, mine = copy.copy(self), np.array([group[0] for group in groups])
        sizes = np.array([len(group) for group in groups])
        many = np.array(self.workers)
        fewer = np.maximum(1, np.rint(many / sizes.mean()).astype(int))
        made.workers = fewer.tolist()
        made._known, made._alone = {}, None
        made.load = dataclasses.replace(
            self.load, devices=tuple(self.load.devices[k] for k in mine)
        )
        for name in ("steps", "rest", "worth", "exchange"):
            setattr(made, name, getattr(self, name)[mine])
        made._stages = {name: table[self.kind[mine]] for name, table in self._stages.items()}
        longer = np.maximum(1.0, np.outer(sizes, (fewer / many)[self.edge[self._first]]))
        for name in ("edge", "edge_update"):
            made._stages[name] = made._stages[name] * longer
        made.kind = np.arange(len(groups))
        classes = np.stack([self.like[mine], sizes])
        made.like = np.unique(classes, axis=1, return_inverse=True)[1].ravel()
        return made

    def stages(self, picked: Indices) -> StageTimes:
        """Return the stages of plans, ``(P, K)`` indices of choices."""
        at = self.course[picked]
        return StageTimes(**{n: table[self.kind, at] for n, table in self._stages.items()})

    def pieces(self, picked: Indices) -> int:
        """Return how many pieces are timed for plans, ``(P, K)``."""
        counts = self._stages["pieces"][self.kind, self.course[picked]]
        return len(picked) * int(counts.max(axis=0).sum())

    def times(self, picked: Indices) -> tuple[Array, Array]:
        """Return the seconds of an iteration and of a round in company, ``(P, K)``."""
        iteration = together_s(
            self.stages(picked), self.edge[picked], self.workers, self.load.in_flight
        )
        at = np.arange(len(self.steps)), self.course[picked]
        return iteration, iteration * self.worth[at] + self.exchange[at]

    def score(self, picked: Indices) -> float:
        """Return the score of one plan ``(K,)``."""
        return float(score(self.times_of(picked)[1]))

    def best_of(self, plans: Sequence[Indices]) -> Indices:
        """Return the best of some plans ``(K,)``, timed at once; of equal ones the first."""
        fresh = {p.tobytes(): p for p in plans if p.tobytes() not in self._known}
        if fresh:
            times = self.times(np.stack(list(fresh.values())))
            self._known |= zip(fresh, zip(*times, strict=True), strict=True)
        return min(plans, key=self.score)

    def times_of(self, picked: Indices) -> tuple[Array, Array]:
        """Return what `times` gives for one plan ``(K,)``; known plans are not timed again."""
        key = picked.tobytes()
        if key not in self._known:
            iteration, round_ = self.times(picked[None])
            self._known[key] = iteration[0], round_[0]
        return self._known[key]

    def scores(self, picked: Indices, measure: Callable[[Array], Array] | None = None) -> Array:
        """Return the scores of plans ``(P, K)``, in parts that fit into memory.

        Args:
            picked: The plans.
            measure: Something else than `score` to be made of the times of devices.
        """
        measure = measure or score
        if not len(picked):
            return np.zeros(0)
        pieces = self._stages["pieces"].max()
        size = max(1, int(_ENTRIES / (picked.shape[1] * pieces)))
        parts = [picked[i : i + size] for i in range(0, len(picked), size)]
        return np.concatenate([measure(self.times(part)[1]) for part in parts])

    def alone(self) -> Array:
        """Return the seconds of a round of each device for each course, ``(K, O)``."""
        if self._alone is None:
            seconds = alone_s(StageTimes(**self._stages), self.load.in_flight)[self.kind]
            self._alone = seconds * self.worth + self.exchange
        return self._alone

    def loads(self) -> Array:
        """Return the seconds of an edge in a round of each device, ``(K, O)``."""
        s = self._stages
        seconds = np.where(s["offloaded"], s["pieces"] * s["edge"] + s["edge_update"], 0.0)
        total: Array = seconds[self.kind] * self.worth
        return total

    def with_edges(self, courses: Indices) -> Indices:
        """Return all choices of some courses."""
        found = self.choice_at[courses].ravel()
        return found[found >= 0]
