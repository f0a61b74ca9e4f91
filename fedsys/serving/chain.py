"""A chain of hosts behind the endpoint: each computes its units, and the cuts may change.

A division of the model among the hosts is a *variant* for `fedsys.serving.switch`: it is loaded
(units are sent, built, warmed up and connected), answers, is left when another one answers, drained
and freed. So the four ways to move of NEUKONFIG are those of the switchers there:

* ``pause``: stop-load-start. Requests wait while the old pipeline is taken down and the new one is
  built;
* ``beside``: the new pipeline is built beside the old one in the same host processes, which share
  the tensors of units that stay; then the pointer changes;
* ``process``: the same in host processes that are started for it (a host that starts none builds
  beside);
* ``warm``: all pipelines stand ready; the pointer changes and nothing else.

A request that began in a pipeline ends in it; or another one is asked, where it was sent from
there into one that is taken down before it has answered.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor, nn

from fedsys.errors import (
    ConfigError,
    FedsysError,
    ModelError,
    PipelineLeft,
    RequestError,
    RuntimeFailure,
)
from fedsys.partition.data_link import CONNECT_S, open_data, told_shape
from fedsys.partition.pipeline import Lost, Passed, Pipeline
from fedsys.partition.problem import Partition
from fedsys.partition.remote_host import RemoteHost
from fedsys.serving.chain_parts import UnitParts
from fedsys.serving.engine import CALM, Answer, Array, Card, Fact, Pressure
from fedsys.serving.route_times import RouteTimes
from fedsys.serving.routes import WHOLE, Route, common_units, label_of, route_of, working
from fedsys.serving.switch.switcher import Cost, Loaded
from fedsys.transport.network import Network, narrowest
from fedsys.transport.security import Credentials, new_token

Observe = Callable[[Partition, Passed, int, float], None]
"""Is told of a request: who computed what, what hosts told, its examples and its seconds."""

Back = Callable[[Route, Passed, int, float], None]
"""The same, for all ways through the model."""

_log = logging.getLogger(__name__)

_AGAIN_S = 0.02  # before a request that a pipeline did not answer is asked again

WAYS = ("beside", "pause", "process", "warm")


@dataclass(frozen=True)
class ChainOptions:
    """How pipelines are made.

    Attributes:
        timeout_s: Longest time for an answer.
        warm_rows: Sizes of batches that every stage computes before it answers.
        networks: Rates and latencies that links between neighbours are slowed down to, in real
            time, the first one between entry and first host; None: as they are.
        origin_s: Moment of `time.monotonic` at which their traces begin.
        lost: Is told of a host that is lost: its requests wait for what `Pipeline.divert` says.
            None: they fail.
        connect_s: Longest time for a host to accept a link for tensors.
    """

    timeout_s: float = 30.0
    warm_rows: tuple[int, ...] = (1,)
    networks: tuple[Network | None, ...] = ()
    origin_s: float = 0.0
    lost: Lost | None = None
    connect_s: float = CONNECT_S


@dataclass(frozen=True, eq=False)
class Stood:
    """A stage of a pipeline that was built.

    Attributes:
        index: Of its host in the chain.
        host: Its host.
        key: Of the pipeline there.
        boundaries: Where requests may go on in it: the first of its units, …, the unit behind them.
        losses: How often the host of the chain had been lost before the stage was built.
    """

    index: int
    host: RemoteHost
    key: str
    boundaries: tuple[int, ...]
    losses: int = 0


@dataclass(eq=False)
class _Laid:
    """What stands of one pipeline: its stages in order, and hosts that were started for it."""

    stages: list[Stood] = field(default_factory=list)
    started: list[tuple[RemoteHost, RemoteHost]] = field(default_factory=list)

    def take_down(self) -> None:
        """Drop the stages, and end the hosts that were started."""
        for stood in self.stages:
            stood.host.drop(stood.key)
        for parent, child in self.started:
            child.close()
            with suppress(FedsysError):
                parent.ask("end", {"address": child.address})


class ChainModule(nn.Module):
    """A pipeline as a module: images in, scores out.

    Args:
        pipeline: The pipeline.
        route: Who computes what in it.
        laid: What it stands on.
        passed: Called with each request that came back.

    Attributes:
        tried: Whether it has answered once.
    """

    def __init__(self, pipeline: Pipeline, route: Route, laid: _Laid, passed: Back) -> None:
        super().__init__()
        self.tried = False
        self.pipeline, self.route, self.label = pipeline, route, route.label
        self._laid, self._passed = laid, passed

    @property
    def stages(self) -> Sequence[Stood]:
        """Its stages, in the order in which a request passes them."""
        return self._laid.stages

    def forward(self, images: Tensor) -> Tensor:
        """Return what the chain makes of images."""
        passed, took = self.rehearse(images)
        self._passed(self.route, passed, images.shape[0], took)
        return passed.output

    def rehearse(self, images: Tensor) -> tuple[Passed, float]:
        """Return what came back for images that no client sent, and the seconds that it took.

        Raises:
            RuntimeFailure: A host failed, or is lost.
        """
        began = time.monotonic()
        passed = self.pipeline.run(images)
        return passed, time.monotonic() - began

    def close(self) -> None:
        """Take the pipeline down on all hosts."""
        self.pipeline.close()
        self._laid.take_down()


@final
class Chain:
    """Lays pipelines over hosts.

    Args:
        hosts: In order.
        parts: The model.
        token: That hosts want to hear, also those that are started.
        credentials: For mutual TLS.
        options: How pipelines are made.
        ways: The units of other ways through the model, by name (`fedsys.serving.routes`).

    Attributes:
        marks: Boundaries of the whole model at which a request may change pipelines within a host.
    """

    def __init__(
        self,
        hosts: Sequence[RemoteHost],
        parts: UnitParts,
        *,
        token: str = "",
        credentials: Credentials | None = None,
        options: ChainOptions = ChainOptions(),
        ways: Callable[[str], UnitParts] | None = None,
    ) -> None:
        self.hosts, self.parts = tuple(hosts), parts
        self._token, self._credentials, self._options = token, credentials, options
        self._ways = ways
        self.marks: frozenset[int] = frozenset()
        self._number = 0
        self._lock = threading.Lock()

    @property
    def timeout_s(self) -> float:
        """Longest time for an answer."""
        return self._options.timeout_s

    def parts_of(self, way: str) -> UnitParts:
        """Return the units of a way.

        Raises:
            ModelError: There is no such way.
        """
        if way == WHOLE:
            return self.parts
        if self._ways is None:
            raise ModelError(f"{way}: the model has no other ways than that of all its units")
        return self._ways(way)

    def check(self, route: Route) -> None:
        """Refuse a route of another model or other hosts.

        Raises:
            ConfigError: It does not fit.
        """
        parts = self.parts_of(route.way)
        cuts, units = list(route.partition.cuts), len(parts)
        fits = len(cuts) == len(self.hosts) - 1 and cuts == sorted(cuts)
        legal = {0, *parts.layers.cuts, units}
        if not fits or not set(cuts) <= legal:
            raise ConfigError.of(
                "partition.cuts", cuts, f"must be {len(self.hosts) - 1} of "
                f"{', '.join(map(str, sorted(legal)))}, ascending",
            )  # fmt: skip

    def bytes_to_send(self, route: Route) -> int:
        """Return the bytes of weights that hosts of a route do not hold yet."""
        parts, total = self.parts_of(route.way), 0
        for index, first, last in working(route.partition, len(parts)):
            held = self.hosts[index].held
            for a, b in pairwise(self._bounds(route.way, first, last)):
                tensors = parts.of(a, b).tensors
                total += sum(t.nbytes for digest, t in tensors.items() if digest not in held)
        return total

    def lay(self, route: Route, passed: Back, *, fresh: bool = False) -> ChainModule:
        """Build a pipeline, from its last host to its first, and connect it.

        Args:
            route: Who computes what.
            passed: Called with each request that comes back.
            fresh: In host processes that are started for it.

        Raises:
            ConfigError: The route does not fit.
            RuntimeFailure: A host refuses, or is lost; what was built is taken down.
        """
        self.check(route)
        with self._lock:
            self._number += 1
            key = f"{self._number}-{new_token()[:8]}"
        laid = _Laid()
        try:
            pipeline = self._build(laid, key, route, fresh)
        except BaseException:
            laid.take_down()
            raise
        return ChainModule(pipeline, route, laid, passed)

    def _build(self, laid: _Laid, key: str, route: Route, fresh: bool) -> Pipeline:
        parts, partition = self.parts_of(route.way), route.partition
        takes = list(working(partition, len(parts)))
        places = self._places(laid, [self.hosts[index] for index, _, _ in takes], fresh)
        following: tuple[RemoteHost, str, int] | None = None
        for (index, first, last), host in reversed(list(zip(takes, places, strict=True))):
            token = new_token()
            meta: dict[str, Any] = {"pipeline": key, "token": token, "end": last, "by": route.label}
            if following is not None:
                after, its_token, place = following
                meta |= {
                    "next": after.address,
                    "next_name": after.name,
                    "next_token": its_token,
                    "codec": partition.codecs[place - 1],
                    "shape_link": self._shape(index, place),
                    "holds": self._options.lost is not None,
                    "connect_s": self._options.connect_s,
                }
            bounds = self._bounds(route.way, first, last)
            pieces = [(a, parts.of(a, b)) for a, b in pairwise(bounds)]
            losses = self.hosts[index].losses
            host.build(pieces, meta, self._options.warm_rows)
            laid.stages.insert(0, Stood(index, host, key, bounds, losses))
            following = host, token, index
        assert following is not None
        host, token, index = following
        own = None if host.address.startswith("memory://") else self._credentials
        opened = {"pipeline": key, "token": token}
        shape, connect_s = self._shape(-1, index), self._options.connect_s
        link = open_data(host.address, own, opened, shape, connect_s)
        timeout_s, lost = self._options.timeout_s, self._options.lost
        return Pipeline(route.label, link, timeout_s, self.hosts[index].name, lost)

    def still_there(self, module: ChainModule) -> None:
        """Refuse a pipeline of which a host was lost after its stage had been built.

        Raises:
            RuntimeFailure: One was, even if it is back: its stage is not.
        """
        if (name := self._lost_of(module)) is not None:
            raise RuntimeFailure(f"{name} was lost while {module.route.label} was built")

    def is_whole(self, module: ChainModule) -> bool:
        """Whether no host of a pipeline was lost after its stage had been built."""
        return self._lost_of(module) is None

    def _lost_of(self, module: ChainModule) -> str | None:
        for stood in module.stages:
            host = self.hosts[stood.index]
            if host.losses != stood.losses:
                return host.name
        return None

    def _bounds(self, way: str, first: int, last: int) -> tuple[int, ...]:
        """Return the bounds of the pieces of a stage.

        Between them it may be entered, where the way has it in common with the whole model.
        """
        common = common_units(way, len(self.parts))
        within = sorted(mark for mark in self.marks if first < mark < last and mark <= common)
        return (first, *within, last)

    def _places(self, laid: _Laid, hosts: Sequence[RemoteHost], fresh: bool) -> list[RemoteHost]:
        """Return where stages are built: on hosts, or on those that they start, all at once."""
        if not fresh:
            return list(hosts)
        with ThreadPoolExecutor(len(hosts)) as pool:
            return list(pool.map(lambda host: self._started(laid, host), hosts))

    def _started(self, laid: _Laid, host: RemoteHost) -> RemoteHost:
        if not host.starts_hosts:
            return host
        address = str(host.ask("spawn").meta["address"])
        child = RemoteHost(
            host.path, host.name, address, token=self._token, credentials=self._credentials,
            other_arithmetic=True,
        )  # fmt: skip
        laid.started.append((host, child))
        return child

    def _shape(self, first: int, last: int) -> Mapping[str, Any] | None:
        """Return what lies between two hosts, for `shape_of`; -1 is the entry."""
        between = [n for n in self._options.networks[first + 1 : last + 1] if n is not None]
        if not between:
            return None
        network = Network(
            latency_s=sum(n.latency_s for n in between),
            up_trace=narrowest([n.up for n in between]),
            down_trace=narrowest([n.down for n in between]),
        )
        return told_shape(network, self._options.origin_s)

    def close(self) -> None:
        """End the links to all hosts."""
        for host in self.hosts:
            host.close()


@final
class ChainWatch:
    """What happens at the endpoint of a chain: how many wait, and how long answers take."""

    def __init__(self) -> None:
        self.waiting = 0
        self._took: deque[tuple[float, float]] = deque(maxlen=1000)
        self._lock = threading.Lock()

    def arrived(self, rows: int) -> None:
        """Count images that wait."""
        with self._lock:
            self.waiting += rows

    def left(self, rows: int) -> None:
        """Count images that wait no more."""
        with self._lock:
            self.waiting -= rows

    def received(self, size: int, seconds: float) -> None:
        """Take no note: links are measured by what the chain sends."""

    def answered(self, milliseconds: float) -> None:
        """Take note of an answer."""
        with self._lock:
            self._took.append((time.monotonic(), milliseconds))

    def p95_ms(self, since_s: float = 10.0) -> float | None:
        """Return the 95th percentile of the last seconds; None if there was no answer."""
        now = time.monotonic()
        with self._lock:
            recent = sorted(took for at, took in self._took if now - at <= since_s)
        return recent[min(len(recent) - 1, int(0.95 * len(recent)))] if recent else None


@final
class ChainEngine:
    """Computes answers by a chain of hosts.

    Args:
        chain: The hosts and the model; closed with the engine.
        card: What a client must know.
        first: The partition that answers first.
        way: How it moves to another one: one of `WAYS`.
        passed: Called with each request that came back; what it raises is logged.
        name: Of the model, in answers.

    Attributes:
        moves: The last changes of cuts.
        decided: Tells the last decision of who controls it, for the status.
        recovery: Tells how hosts are and what stands in for lost ones, for the status.
        home: Label of the route while all hosts are there; empty where none is looked after.
        moved: Is told of cuts that were changed.
        prepared: Labels of pipelines that stand ready beside the one that answers.
        out: Why nobody can answer; empty while somebody can.
        times: How long requests took lately, by the label of the route.

    Raises:
        ConfigError: The partition does not fit.
        RuntimeFailure: A host refuses, or is lost.
    """

    def __init__(
        self,
        chain: Chain,
        card: Card,
        first: Partition,
        way: str = "beside",
        passed: Observe = lambda partition, passed, rows, took: None,
        name: str = "model",
    ) -> None:
        if way not in WAYS:
            raise ConfigError.of("hosts.way", way, f"must be one of {', '.join(WAYS)}")
        self.card, self.watch, self.chain, self.way = card, ChainWatch(), chain, way
        self._observe, self._name, self.out = passed, name, ""
        self.times = RouteTimes()
        self._last: Passed | None = None
        self._own = threading.local()
        self._answers: Counter[str] = Counter()
        self._live: tuple[ChainModule, ...] = ()
        self._lock = threading.Lock()
        self.moves: deque[Mapping[str, Any]] = deque(maxlen=1000)
        self.decided: Callable[[], Mapping[str, Any]] = dict
        self.recovery: Callable[[], Mapping[str, Any]] = dict
        self.moved: Callable[[Partition], None] = lambda partition: None
        self.home = ""
        self.prepared: tuple[str, ...] = ()
        chain.marks = frozenset(first.cuts)
        self.switcher = Loaded(self._lay, Route(first).label, (), self._take_down)

    def _lay(self, label: str) -> nn.Module:
        module = self.chain.lay(route_of(label), self._passed, fresh=self.way == "process")
        with self._lock:
            self._live += (module,)
        try:
            # Who looks after losses fails what is live; what came too late for that is found here.
            self.chain.still_there(module)
            with torch.inference_mode():
                module.rehearse(torch.zeros(1, *self.card.input_shape))
            module.tried = True
        except BaseException:
            self._take_down(module)
            raise
        return module

    def _take_down(self, module: nn.Module) -> None:
        with self._lock:
            self._live = tuple(one for one in self._live if one is not module)
        if not isinstance(module, ChainModule):
            raise RuntimeFailure(f"{type(module).__name__} is no pipeline")
        module.close()

    def _passed(self, route: Route, passed: Passed, rows: int, took: float) -> None:
        self._last = self._own.passed = passed
        if passed.by != route.label or passed.again:
            return  # how long a request took that changed pipelines tells nothing of either
        self.times.noted(route.label, passed, rows, took)
        if route.way != WHOLE:
            return
        try:
            self._observe(route.partition, passed, rows, took)
        except Exception:  # the request has its answer
            _log.exception("a request could not be taken note of; it is answered")

    @property
    def live(self) -> tuple[ChainModule, ...]:
        """All pipelines that stand, or are about to, in the order in which they were begun."""
        return self._live

    @property
    def lanes(self) -> int:
        """Batches that may be computed at once: one in each host, and one on its way."""
        return len(self.chain.hosts) + 1

    @property
    def ready(self) -> bool:
        """Whether a pipeline answers; else requests wait for one."""
        return self.switcher.ready and not self.out

    @property
    def answered(self) -> int:
        """Images that were answered."""
        return sum(self._answers.values())

    @property
    def route(self) -> Route:
        """Which way requests take now."""
        return route_of(self.switcher.current)

    @property
    def partition(self) -> Partition:
        """Who computes what now."""
        return self.route.partition

    def is_quick(self, rows: int) -> bool:
        """Other hosts are waited for."""
        return False

    def answer(self, images: Array, pressure: Pressure = CALM, by: str = "") -> Answer:
        """Return the scores, all by one pipeline; whichever that is, they are of one model.

        Raises:
            RuntimeFailure: A host failed, or is lost.
            RequestError: No host is left that could answer.
        """
        try:
            scores, name, again = self._asked(torch.as_tensor(images))
        except RuntimeFailure as error:
            if self.out:
                raise RequestError(503, self.out) from error
            raise
        passed: Passed = self._own.passed
        route = route_of(passed.by or name)
        self._answers[route.label] += images.shape[0]
        facts: dict[str, Fact] = {"cuts": label_of(route.partition)}
        if self.home:
            technique = "none" if route.label == self.home else route.technique
            facts |= {"technique": technique, "way": route.way or "whole"}
            facts["again"] = passed.again + again
        return Answer(scores.float().numpy(), route.way or self._name, facts)

    def _asked(self, images: Tensor) -> tuple[Tensor, str, int]:
        """Return the scores, the name of who was asked, and how many were asked before.

        A pipeline counts who came to it, not what was sent into it from others, and nothing holds
        up its end: those of the others ask who answers then.
        """
        until_s, before = time.monotonic() + self.chain.timeout_s, 0
        while True:
            try:
                with self.switcher.lease() as active:
                    return active.run(images), active.name, before
            except PipelineLeft:
                if self.out or time.monotonic() >= until_s:
                    raise
            before += 1
            time.sleep(_AGAIN_S)  # the pointer may not have been changed yet

    def prepare(self, partitions: Sequence[Partition]) -> None:
        """Have these pipelines ready beside the one that answers, and no others."""
        self.prepared = tuple(label_of(partition) for partition in partitions)
        self.switcher.keep(self.prepared)

    def move(self, partition: Partition, why: Mapping[str, Any] = MappingProxyType({})) -> Cost:
        """Change to another partition in the way that was chosen; return what it took.

        Args:
            partition: Who is to compute what.
            why: Reason and expectation, as plain values, for the record.

        Raises:
            ConfigError: The partition does not fit.
            RuntimeFailure: It cannot be built. The old one answers on.
        """
        route = Route(partition)
        self.chain.check(route)
        self.chain.marks |= set(partition.cuts)
        cost = self.switcher.switch(route.label, beside=self.way != "pause")
        self.moves.append({"time_s": time.time(), "way": self.way, **vars(cost), **why})
        self.moved(partition)
        return cost

    def status(self) -> Mapping[str, Any]:
        """Return the chain with what runs where, its last times, and the moves so far."""
        recovery = self.recovery()
        return {
            "variant": self.switcher.current,
            "ready": self.ready,
            "chain": self._rows(recovery.get("hosts", {})),
            "answers": dict(self._answers),
            "moves": len(self.moves),
            "model": self._name,
            "p95_ms": self.watch.p95_ms(),
            "way": self.way,
            "in_memory": [self.switcher.current, *self.switcher.spare],
            "records": [self._with_time(record) for record in list(self.moves)[-100:]],
            "decision": dict(self.decided()),
            **recovery,
        }

    def _with_time(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of a move, with what requests took lately by where it led to."""
        took_s = self.times.took_s(str(record["after"]))
        return {**record, "measured_ms": None if took_s is None else 1e3 * took_s}

    def _rows(self, hosts: Mapping[str, Any]) -> list[dict[str, Any]]:
        route = self.route
        units = [unit.name for unit in self.chain.parts_of(route.way).layers.units]
        parts = {str(p["host"]): p for p in (self._last.parts if self._last else ())}
        rows = []
        for index, host in enumerate(self.chain.hosts):
            first, last = route.partition.units_of(index, len(units))
            row: dict[str, Any] = {"host": host.name, "address": host.address}
            row |= {"units": units[first:last], **hosts.get(host.name, {})}
            if (part := parts.get(host.name)) is not None:
                for key in ("queue_s", "compute_s", "link_s"):
                    if key in part:
                        row[key.replace("_s", "_ms")] = 1e3 * float(part[key])
                row["bytes"] = part.get("bytes")
            rows.append(row)
        return rows

    def close(self) -> None:
        """Take all pipelines down."""
        self.switcher.close()
        self.chain.close()
