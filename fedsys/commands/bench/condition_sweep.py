"""The measurements of `fedsys bench conditions`: conditions in random order, and raw samples.

Two host processes, one for each end, each on a processor of its own where there are two, and beside
each a `fedsys.partition.controlled.Load`. For each rate of the link and each cut a pipeline stands
ready, so a condition changes at once. A turn visits all conditions in random order, and under each
all cuts in random order; a request that is not counted comes first.
"""

from __future__ import annotations

import csv
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from torch import Tensor

from fedsys.commands.bench.partition_hosts import (
    BenchModel,
    HostProcesses,
    Laid,
    cut_at,
    host_processes,
    lay,
    model_of,
)
from fedsys.errors import DataError
from fedsys.models.layers import LayeredModel
from fedsys.partition.controlled import Load, come_first, within
from fedsys.partition.study import Levels, Sample
from fedsys.planning.costs import crossings
from fedsys.transport.network import Network

ENDS = ("edge", "cloud")
_MB = 1e6
_MEMORY_OFF = 0.05  # of memory that is held
_SAID = 20  # conditions from one word to the next
_TRIES = 5  # to find a condition as it was asked for


@dataclass(frozen=True)
class ConditionSweep:
    """What is swept.

    Attributes:
        rates: Bits per second, the fastest first.
        latency_s: One way.
        cpu: Shares of a processor.
        memory: Bytes that are held.
        repeats: Turns.
        seed: Of all orders.
        verify_s: For which loads are measured.
        tolerance: Share of a processor by which a load may be off.
    """

    rates: tuple[float, ...]
    latency_s: float
    cpu: tuple[float, ...]
    memory: tuple[int, ...]
    repeats: int
    seed: int = 0
    verify_s: float = 0.2
    tolerance: float = 0.1

    def conditions(self) -> list[Levels]:
        """Return the levels of all conditions, as `fedsys.partition.study.FACTORS` has them."""
        cpu, memory = range(len(self.cpu)), range(len(self.memory))
        return list(product(range(len(self.rates)), cpu, memory, memory, cpu))

    def loads(self, condition: Levels) -> dict[str, tuple[float, int]]:
        """Return the share of a processor and the bytes that are held, for each end."""
        _, cloud_cpu, edge_memory, cloud_memory, edge_cpu = condition
        return {
            "edge": (self.cpu[edge_cpu], self.memory[edge_memory]),
            "cloud": (self.cpu[cloud_cpu], self.memory[cloud_memory]),
        }


@dataclass(frozen=True)
class RawSample:
    """A row of the file of samples.

    Attributes:
        model: Name of the model.
        condition: Digits of the levels.
        cut: Where it was cut.
        repeat: Number of the turn.
        total_s: Seconds of the request.
        edge_s: Of computing at the near end.
        cloud_s: Of computing at the far end.
        mbit_s: Rate that the tensor had on the link; NaN for a small one.
        edge_cpu: Share of a processor that the load took before.
        cloud_cpu: Likewise.
        edge_memory_mb: That the load held.
        cloud_memory_mb: Likewise.
        verified: Whether the loads were what was asked for.
    """

    model: str
    condition: str
    cut: int
    repeat: int
    total_s: float
    edge_s: float
    cloud_s: float
    mbit_s: float
    edge_cpu: float
    cloud_cpu: float
    edge_memory_mb: float
    cloud_memory_mb: float
    verified: bool

    @property
    def sample(self) -> Sample:
        """What the study looks at."""
        levels = tuple(map(int, self.condition))
        return Sample(levels, self.cut, self.repeat, self.total_s, self.edge_s, self.cloud_s)


def read_samples(file: Path) -> list[RawSample]:
    """Return the samples of a file; none if it is not there.

    Raises:
        DataError: A row is not one; names it.
    """
    if not file.exists():
        return []
    found = []
    with file.open(newline="", encoding="utf-8") as stream:
        for number, row in enumerate(csv.DictReader(stream), 2):
            try:
                values: dict[str, Any] = {
                    f.name: _value(f.type, row[f.name]) for f in fields(RawSample)
                }
                found.append(RawSample(**values))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{file}:{number}: is no sample: {error!r}") from error
    return found


def _value(kind: object, text: str) -> object:
    if kind == "bool":
        return {"True": True, "False": False}[text]
    return {"int": int, "float": float, "str": str}[str(kind)](text)


def useful_cuts(layers: LayeredModel, every: bool) -> list[int]:
    """Return 0, L, and the legal cuts between; only those where less crosses than at all before."""
    out, least, found = crossings(layers), float("inf"), [0]
    for cut in layers.cuts:
        if every or out[cut - 1].elements < least:
            found.append(cut)
        least = min(least, out[cut - 1].elements)
    return [*found, len(layers)]


def measure(
    name: str, side: int, sweep: ConditionSweep, every: bool, threads: int, file: Path
) -> Iterator[RawSample]:
    """Yield the samples of a model: those of the file first, then new ones, which are added to it.

    Args:
        name: Of the model.
        side: Of images.
        sweep: What is swept.
        every: Whether all cuts are, or the useful ones.
        threads: Of a host.
        file: With samples of before.
    """
    known = [one for one in read_samples(file) if one.model == name]
    yield from known
    done = {(one.condition, one.repeat) for one in known}
    left = [
        (repeat, condition)
        for repeat in range(sweep.repeats)
        for condition in _shuffled(sweep.conditions(), f"{sweep.seed} {name} {repeat}")
        if ("".join(map(str, condition)), repeat) not in done
    ]
    if not left:
        return
    torch.set_num_threads(threads)
    model, cores = model_of(name, side, sweep.seed), _cores()
    with (
        host_processes(ENDS, threads, cores) as hosts,
        _Bench(model, hosts, sweep, useful_cuts(model.layers, every), cores) as bench,
        file.open("a", newline="", encoding="utf-8") as stream,
    ):
        began = time.monotonic()
        for number, (repeat, condition) in enumerate(left, 1):
            rows = bench.under(condition, repeat)
            _append(stream, rows)
            yield from rows
            if number % _SAID == 0:
                minutes = (time.monotonic() - began) / number * (len(left) - number) / 60
                told = f"{name}: {number} of {len(left)}, {minutes:.0f} minutes to go, in {file}"
                print(told, file=sys.stderr, flush=True)


def _append(stream: TextIO, rows: Sequence[RawSample]) -> None:
    """Add the rows of one condition at once, so that a file has all of its cuts or none."""
    writer = csv.DictWriter(stream, [f.name for f in fields(RawSample)], lineterminator="\n")
    if stream.tell() == 0:
        writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    stream.flush()


def _shuffled(conditions: list[Levels], seed: str) -> list[Levels]:
    random.Random(seed).shuffle(conditions)
    return conditions


def _cores() -> list[list[int]]:
    """Return the processors of the two ends: one each, if there are two."""
    own = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else []
    return [[own[0]], [own[1]]] if own and len(own) >= 2 else [[], []]


class _Bench:
    """Pipelines for every rate and cut, and a load at each end."""

    def __init__(
        self, model: BenchModel, hosts: HostProcesses, sweep: ConditionSweep, cuts: Sequence[int],
        cores: Sequence[Sequence[int]],
    ) -> None:  # fmt: skip
        self._model, self._hosts, self._sweep, self._cuts = model, hosts, sweep, cuts
        self._cores, self._stack = cores, ExitStack()
        self._laid: dict[tuple[int, int], Laid] = {}
        self._loads: dict[str, Load] = {}
        self._networks = [Network(rate, latency_s=sweep.latency_s) for rate in sweep.rates]
        self._image: Tensor = model.image()

    def __enter__(self) -> _Bench:
        with ExitStack() as stack:
            for end, own in zip(ENDS, self._cores, strict=True):
                self._loads[end] = Load(own)
                stack.callback(self._loads[end].close)
            me, before = os.getpid(), int(psutil.Process().nice())
            stack.callback(come_first, [me], before)
            come_first([me, *self._hosts.pids, *(load.pid for load in self._loads.values())])
            for level, network in enumerate(self._networks):
                chain = self._hosts.chain(self._model, (None, network))
                for cut in self._cuts:
                    laid = lay(chain, cut_at(cut))
                    stack.callback(laid.module.close)
                    self._laid[level, cut] = laid
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def under(self, condition: Levels, repeat: int) -> list[RawSample]:
        """Make a condition, look whether it is there, and time a request of each cut."""
        wanted = self._sweep.loads(condition)
        for end, load in self._loads.items():
            load.set(*wanted[end])
        shown = self._verified(wanted)
        order = list(self._cuts)
        random.Random(f"{self._sweep.seed} {condition} {repeat}").shuffle(order)
        self._ask(condition[0], order[0])
        rows = [self._timed(condition, cut, repeat, shown) for cut in order]
        for load in self._loads.values():
            load.set(0.0, 0)
        return rows

    def _verified(self, wanted: Mapping[str, tuple[float, int]]) -> dict[str, Any]:
        """Measure the loads until they are what is wanted, some times at most."""
        for _ in range(_TRIES):
            shown = self._look(wanted)
            if shown["verified"]:
                break
        return shown

    def _look(self, wanted: Mapping[str, tuple[float, int]]) -> dict[str, Any]:
        shown: dict[str, Any] = {"verified": True}
        for end, load in self._loads.items():
            cpu, memory = wanted[end]
            got = load.achieved(self._sweep.verify_s)
            shown[f"{end}_cpu"] = round(got.cpu, 4)
            shown[f"{end}_memory_mb"] = round(got.memory_bytes / _MB, 1)
            held = within(memory, got.memory_bytes, _MEMORY_OFF * max(memory, 64e6))
            shown["verified"] &= within(cpu, got.cpu, self._sweep.tolerance) and held
        return shown

    def _ask(self, level: int, cut: int) -> Laid:
        laid = self._laid[level, cut]
        with torch.inference_mode():
            laid.module(self._image)
        return laid

    def _timed(
        self, condition: Levels, cut: int, repeat: int, shown: Mapping[str, Any]
    ) -> RawSample:
        laid = self._ask(condition[0], cut)
        told, passed = laid.told(), laid.passed
        assert passed is not None
        edge, cloud = (told.get(end, {}) for end in ENDS)
        seconds, count = edge.get("link_s"), edge.get("bytes")
        if not edge:  # the input goes to the cloud
            seconds, count = passed.link_s, passed.bytes
        return RawSample(
            self._model.name, "".join(map(str, condition)), cut, repeat, laid.took_s,
            float(edge.get("compute_s", 0.0)), float(cloud.get("compute_s", 0.0)),
            _rate(seconds, count, self._sweep.latency_s), **shown,
        )  # fmt: skip


def _rate(seconds: float | None, count: int | None, latency_s: float) -> float:
    """Return the Mbit/s of a tensor whose time on the link is mostly its own."""
    if seconds is None or count is None or count < 50_000:
        return float("nan")
    return 8e-6 * count / max(1e-9, seconds - 2 * latency_s)
