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

A request that began in a pipeline ends in it.
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
from typing import Any, final

import torch
from torch import Tensor, nn

from fedsys.errors import ConfigError, FedsysError, RuntimeFailure
from fedsys.partition.data_link import open_data, told_shape
from fedsys.partition.pipeline import Passed, Pipeline
from fedsys.partition.problem import RAW, Partition
from fedsys.partition.remote_host import RemoteHost
from fedsys.serving.chain_parts import UnitParts
from fedsys.serving.engine import CALM, Answer, Card, Pressure
from fedsys.serving.switch.switcher import Cost, Loaded
from fedsys.transport.network import Network, narrowest
from fedsys.transport.security import Credentials, new_token

Observe = Callable[[Partition, Passed, int, float], None]
"""Is told of a request: who computed what, what hosts told, its examples and its seconds."""

_log = logging.getLogger(__name__)

WAYS = ("beside", "pause", "process", "warm")


def label_of(partition: Partition) -> str:
    """Return the name of a partition: its cuts, with codecs that are not fp32, as ``5/9:int8``."""
    return "/".join(
        f"{cut}" if codec == RAW else f"{cut}:{codec}"
        for cut, codec in zip(partition.cuts, partition.codecs, strict=True)
    )


def partition_of(label: str) -> Partition:
    """Return the partition of a name that `label_of` gave."""
    pairs = [part.partition(":") for part in label.split("/")]
    return Partition(tuple(int(cut) for cut, _, _ in pairs), tuple(c or RAW for _, _, c in pairs))


@dataclass(frozen=True)
class ChainOptions:
    """How pipelines are made.

    Attributes:
        timeout_s: Longest time for an answer.
        warm_rows: Sizes of batches that every stage computes before it answers.
        networks: Rates and latencies that links between neighbours are slowed down to, in real
            time, the first one between entry and first host; None: as they are.
        origin_s: Moment of `time.monotonic` at which their traces begin.
    """

    timeout_s: float = 30.0
    warm_rows: tuple[int, ...] = (1,)
    networks: tuple[Network | None, ...] = ()
    origin_s: float = 0.0


@dataclass(eq=False)
class _Laid:
    """What stands of one pipeline: hosts with their stages, hosts that were started for it."""

    stages: list[tuple[RemoteHost, str]] = field(default_factory=list)
    started: list[tuple[RemoteHost, RemoteHost]] = field(default_factory=list)

    def take_down(self) -> None:
        """Drop the stages, and end the hosts that were started."""
        for host, key in self.stages:
            host.drop(key)
        for parent, child in self.started:
            child.close()
            with suppress(FedsysError):
                parent.ask("end", {"address": child.address})


class ChainModule(nn.Module):
    """A pipeline as a module: images in, scores out.

    Args:
        pipeline: The pipeline.
        partition: Who computes what in it.
        laid: What it stands on.
        passed: Called with each request that came back.
    """

    def __init__(
        self, pipeline: Pipeline, partition: Partition, laid: _Laid, passed: Observe
    ) -> None:
        super().__init__()
        self._pipeline, self._partition = pipeline, partition
        self._laid, self._passed = laid, passed

    def forward(self, images: Tensor) -> Tensor:
        """Return what the chain makes of images."""
        began = time.monotonic()
        passed = self._pipeline.run(images)
        took = time.monotonic() - began
        self._passed(self._partition, passed, images.shape[0], took)
        return passed.output

    def close(self) -> None:
        """Take the pipeline down on all hosts."""
        self._pipeline.close()
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
    """

    def __init__(
        self,
        hosts: Sequence[RemoteHost],
        parts: UnitParts,
        *,
        token: str = "",
        credentials: Credentials | None = None,
        options: ChainOptions = ChainOptions(),
    ) -> None:
        self.hosts, self.parts = tuple(hosts), parts
        self._token, self._credentials, self._options = token, credentials, options
        self._number = 0
        self._lock = threading.Lock()

    def check(self, partition: Partition) -> None:
        """Refuse a partition of another model or other hosts.

        Raises:
            ConfigError: It does not fit.
        """
        cuts, units = list(partition.cuts), len(self.parts)
        fits = len(cuts) == len(self.hosts) - 1 and cuts == sorted(cuts)
        legal = {0, *self.parts.layers.cuts, units}
        if not fits or not set(cuts) <= legal:
            raise ConfigError.of(
                "partition.cuts", cuts, f"must be {len(self.hosts) - 1} of "
                f"{', '.join(map(str, sorted(legal)))}, ascending",
            )  # fmt: skip

    def lay(self, partition: Partition, passed: Observe, *, fresh: bool = False) -> ChainModule:
        """Build a pipeline, from its last host to its first, and connect it.

        Args:
            partition: Who computes what.
            passed: Called with each request that comes back.
            fresh: In host processes that are started for it.

        Raises:
            ConfigError: The partition does not fit.
            RuntimeFailure: A host refuses, or is lost; what was built is taken down.
        """
        self.check(partition)
        with self._lock:
            self._number += 1
            key = f"{self._number}-{new_token()[:8]}"
        laid = _Laid()
        try:
            pipeline = self._build(laid, key, partition, fresh)
        except BaseException:
            laid.take_down()
            raise
        return ChainModule(pipeline, partition, laid, passed)

    def _build(self, laid: _Laid, key: str, partition: Partition, fresh: bool) -> Pipeline:
        units = len(self.parts)
        parts = [(i, *partition.units_of(i, units)) for i in range(len(self.hosts))]
        working = [part for part in parts if part[2] > part[1]]
        places = self._places(laid, [self.hosts[index] for index, _, _ in working], fresh)
        following: tuple[RemoteHost, str, int] | None = None
        for (index, first, last), host in reversed(list(zip(working, places, strict=True))):
            token = new_token()
            meta: dict[str, Any] = {"pipeline": key, "token": token, "end": last}
            if following is not None:
                after, its_token, place = following
                meta |= {
                    "next": after.address,
                    "next_name": after.name,
                    "next_token": its_token,
                    "codec": partition.codecs[place - 1],
                    "shape_link": self._shape(index, place),
                }
            host.build([(first, self.parts.of(first, last))], meta, self._options.warm_rows)
            laid.stages.append((host, key))
            following = host, token, index
        assert following is not None
        host, token, index = following
        own = None if host.address.startswith("memory://") else self._credentials
        opened = {"pipeline": key, "token": token}
        link = open_data(host.address, own, opened, self._shape(-1, index))
        return Pipeline(label_of(partition), link, self._options.timeout_s)

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
        self._observe, self._name = passed, name
        self._last: Passed | None = None
        self._answers: Counter[str] = Counter()
        self.moves: deque[Mapping[str, Any]] = deque(maxlen=1000)
        self.decided: Callable[[], Mapping[str, Any]] = dict
        warm = (torch.zeros(1, *card.input_shape),)
        self.switcher = Loaded(self._lay, label_of(first), warm, _take_down)

    def _lay(self, label: str) -> nn.Module:
        return self.chain.lay(partition_of(label), self._passed, fresh=self.way == "process")

    def _passed(self, partition: Partition, passed: Passed, rows: int, took: float) -> None:
        self._last = passed
        try:
            self._observe(partition, passed, rows, took)
        except Exception:  # the request has its answer
            _log.exception("a request could not be taken note of; it is answered")

    @property
    def lanes(self) -> int:
        """Batches that may be computed at once: one in each host, and one on its way."""
        return len(self.chain.hosts) + 1

    @property
    def ready(self) -> bool:
        """Whether a pipeline answers; else requests wait for one."""
        return self.switcher.ready

    @property
    def answered(self) -> int:
        """Images that were answered."""
        return sum(self._answers.values())

    @property
    def partition(self) -> Partition:
        """Who computes what now."""
        return partition_of(self.switcher.current)

    def answer(self, images: Tensor, pressure: Pressure = CALM, by: str = "") -> Answer:
        """Return the scores, all by one pipeline; whichever that is, they are of one model.

        Raises:
            RuntimeFailure: A host failed, or is lost.
        """
        with self.switcher.lease() as active:
            scores = active.run(images)
        self._answers[active.name] += images.shape[0]
        return Answer(scores.float(), self._name, {"cuts": active.name})

    def prepare(self, partitions: Sequence[Partition]) -> None:
        """Have these pipelines ready beside the one that answers, and no others."""
        self.switcher.keep([label_of(partition) for partition in partitions])

    def move(self, partition: Partition) -> Cost:
        """Change to another partition in the way that was chosen; return what it took.

        Raises:
            ConfigError: The partition does not fit.
            RuntimeFailure: It cannot be built. The old one answers on.
        """
        self.chain.check(partition)
        cost = self.switcher.switch(label_of(partition), beside=self.way != "pause")
        self.moves.append({"time_s": time.time(), "way": self.way, **vars(cost)})
        return cost

    def status(self) -> Mapping[str, Any]:
        """Return the chain with what runs where, its last times, and the moves so far."""
        now = self.partition
        units = [unit.name for unit in self.chain.parts.layers.units]
        parts = {str(p["host"]): p for p in (self._last.parts if self._last else ())}
        rows = []
        for index, host in enumerate(self.chain.hosts):
            first, last = now.units_of(index, len(units))
            row: dict[str, Any] = {"host": host.name, "address": host.address}
            row["units"] = units[first:last]
            if (part := parts.get(host.name)) is not None:
                for key in ("queue_s", "compute_s", "link_s"):
                    if key in part:
                        row[key.replace("_s", "_ms")] = 1e3 * float(part[key])
                row["bytes"] = part.get("bytes")
            rows.append(row)
        return {
            "variant": self.switcher.current,
            "ready": self.ready,
            "chain": rows,
            "answers": dict(self._answers),
            "moves": len(self.moves),
            "way": self.way,
            "in_memory": [self.switcher.current, *self.switcher.spare],
            "records": list(self.moves)[-100:],
            "decision": dict(self.decided()),
        }

    def close(self) -> None:
        """Take all pipelines down."""
        self.switcher.close()
        self.chain.close()


def _take_down(module: nn.Module) -> None:
    if not isinstance(module, ChainModule):
        raise RuntimeFailure(f"{type(module).__name__} is no pipeline")
    module.close()
