"""CONTINUER at run time: a host is lost, and requests go on.

::

    lost ─▶ candidates ─▶ choose ─▶ the best that stands ready: requests are sent that way,
                            │                                   from where they are held
                            └─────▶ what is best in the long run: built beside, then switched in
    a host returns, or wants to leave: the same, without haste

One thread decides, in the order in which it is told, and sends requests where they are answered
(`fedsys.serving.recovery.rerouting`); pipelines are built, changed to and taken down in another one
(`fedsys.serving.recovery.building`). What stands ready in advance are the ways around each host
whose loss would interrupt the route in force; a host holds weights once, for all of its pipelines.

Majeed et al. (CONTINUER, IEEE EDGE 2022) choose one of three techniques once; detection, replay, a
second failure and the way back are not described there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, final

from fedsys.errors import FedsysError, RuntimeFailure, first_line
from fedsys.serving.chain import ChainEngine
from fedsys.serving.recovery.building import BuiltPipeline, PipelineBuilder
from fedsys.serving.recovery.candidates import ModelWays, Planner
from fedsys.serving.recovery.decision import RecoveryObjective
from fedsys.serving.recovery.detector import DetectorRules, Health, Heart
from fedsys.serving.recovery.outlook import RecoveryOutlook
from fedsys.serving.recovery.rehearsals import Rehearsals
from fedsys.serving.recovery.rerouting import Rerouter, plain
from fedsys.serving.recovery.watch import HostWatch
from fedsys.serving.routes import route_of

_TICK_S = 0.25  # between two looks at requests that were sent another way

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecoveryOptions:
    """How failures are answered.

    Attributes:
        rules: When a host counts as lost.
        objective: What is asked of the way to answer on.
        warm: Techniques whose pipelines stand ready in advance.
    """

    rules: DetectorRules = field(default_factory=DetectorRules)
    objective: RecoveryObjective = field(default_factory=RecoveryObjective)
    warm: tuple[str, ...] = ("exit", "skip", "replica", "repartition")


_PLAIN_WAYS, _USUAL = ModelWays(), RecoveryOptions()


@final
class Continuer:
    """Keeps an engine answering while its hosts fail.

    Args:
        engine: Whose requests go on.
        planner: Divides ways among hosts.
        ways: What the model offers.
        options: How failures are answered.
        tell: Called with each event, as plain values.

    Attributes:
        events: Losses, decisions with their candidates, returns, as plain values.
    """

    def __init__(
        self,
        engine: ChainEngine,
        planner: Planner,
        ways: ModelWays = _PLAIN_WAYS,
        options: RecoveryOptions = _USUAL,
        tell: Callable[[Mapping[str, Any]], None] = lambda event: None,
    ) -> None:
        self._engine, self._objective, self._tell = engine, options.objective, tell
        self.events: deque[Mapping[str, Any]] = deque(maxlen=1000)
        self._counts: Counter[str] = Counter()
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._hosts = [host.name for host in engine.chain.hosts]
        self._builder = PipelineBuilder(
            engine.switcher,
            self._carried_out,
            lambda label, seconds: self._outlook.built(label, seconds),
            lambda label: self._outlook.module(label) is not None,
        )
        self._outlook = RecoveryOutlook(engine, planner, ways, self._builder)
        self._rerouter = Rerouter(
            engine, self._outlook, self._builder, options.objective, options.warm, self._note
        )
        self._rehearsals: Rehearsals | None = None
        self._watch: HostWatch | None = None
        engine.recovery, engine.home = self.status, self._rerouter.target
        engine.moved = lambda partition: self._put(self._rerouter.moved, partition)
        self._thread = threading.Thread(target=self._loop, name="recovery", daemon=True)
        self._thread.start()

    def start(self, watch: HostWatch) -> None:
        """Begin to prepare for the loss of hosts that are watched."""
        self._watch = watch
        self._rehearsals = Rehearsals(self._engine, lambda: self._builder.busy)
        self._put(self._rerouter.keep_ready)

    def ask(self, objective: RecoveryObjective) -> None:
        """Ask something else of the ways to answer on, from now on; what stands ready changes."""
        self._objective = objective
        self._put(self._rerouter.ask, objective)

    def heard(self, index: int, heart: Heart) -> None:
        """Take note of a change of a host's health; returns at once."""
        self._put(self._changed, index, heart, time.monotonic())

    def _put(self, what: Callable[..., None], *given: Any) -> None:
        self._inbox.put(lambda: what(*given))

    def _loop(self) -> None:
        while True:
            try:
                work = self._inbox.get(timeout=_TICK_S)
            except Empty:
                work = self._look
            if work is None:
                return
            try:
                work()
            except Exception:  # the next failure must find somebody here
                _log.exception("a step of the recovery failed")

    # ----------------------------------------------------------------------------------------------
    # What happens

    def _look(self) -> None:
        """See after what waits; nothing else happens."""
        self._rerouter.look()
        hearts = () if self._watch is None else self._watch.hearts
        for index in self._outlook.gone:
            if hearts and hearts[index].health is Health.ALIVE and not self._builder.busy:
                self._builder.carry_out(partial(self._let_in, index))  # it could not be before

    def _changed(self, index: int, heart: Heart, told_s: float) -> None:
        outlook, host = self._outlook, self._engine.chain.hosts[index]
        if heart.health is Health.LOST:
            host.lose()  # also if it was about to be let in again
            if index in outlook.gone:
                return
            outlook.gone |= {index}
            outlook.downtimes.detect_s = heart.silent_s
            self._note("lost", host=host.name, why=heart.why)
            self._rerouter.lost(index, host.name, told_s, self._watch)
        elif heart.health is Health.ALIVE and index in outlook.gone:
            self._builder.carry_out(partial(self._let_in, index))
        elif heart.leaves != (index in outlook.leaving):
            outlook.leaving ^= {index}
            self._note("leaves" if heart.leaves else "stays", host=host.name)
            self._rerouter.settle()

    def _let_in(self, index: int) -> None:
        host = self._engine.chain.hosts[index]
        losses = host.losses
        try:
            host.come_back()
        except FedsysError as error:
            _log.info("%s is not back: %s", self._hosts[index], first_line(error))
            return
        self._put(self._returned, index, losses)

    def _returned(self, index: int, losses: int) -> None:
        host = self._engine.chain.hosts[index]
        if host.losses != losses or index not in self._outlook.gone:
            return  # it was lost again, or let in before
        if self._watch is not None and not self._watch.hearts[index].health.usable:
            host.lose()  # again, while it was let in
            return
        self._outlook.gone -= {index}
        self._note("returned", host=self._hosts[index])
        self._rerouter.settle()

    def _carried_out(self, built: BuiltPipeline) -> None:
        """Pass on what became of an order, in the thread of the builder; then learn from it."""
        self._put(lambda: self._rerouter.built(built, self._watch))
        if built.took_s and not built.error:
            self._outlook.built(built.label, built.took_s)

    # ----------------------------------------------------------------------------------------------

    def _note(self, what: str, **values: Any) -> None:
        event = {"time_s": time.time(), "event": what, **values}
        self._counts[what] += 1
        self.events.append(event)
        _log.info("%s: %s", what, values)
        self._tell(event)

    @property
    def at_rest(self) -> bool:
        """Whether all that is to stand ready does, and was rehearsed."""
        return not self._builder.busy and (self._rehearsals is None or not self._rehearsals.pending)

    def rehearse_decisions(self, count: int) -> list[tuple[float, float]]:
        """Decide on the loss of each host in turn, and carry out nothing.

        Returns:
            Seconds of each decision, by the clock and of the processor.
        """
        took = []
        for number in range(count):
            lost = frozenset({number % len(self._hosts)})
            began, cpu = time.perf_counter(), time.thread_time()
            with suppress(RuntimeFailure):
                self._outlook.foresee(self._objective, lost)
            took.append((time.perf_counter() - began, time.thread_time() - cpu))
        return took

    @property
    def rehearsal(self) -> float:
        """What a request of a client takes, relative to a rehearsal on the same route."""
        return self._outlook.latencies.parts.rehearsal

    def errors(self) -> dict[str, Any]:
        """Return how far estimators are off on what they were not given, as plain values."""
        return self._outlook.errors()

    def status(self) -> Mapping[str, Any]:
        """Return how hosts are, what stands in for lost ones, and what it was expected to cost."""
        hearts = self._watch.hearts if self._watch is not None else ()
        hosts, outlook, rerouter = {}, self._outlook, self._rerouter
        for index, heart in enumerate(hearts):
            state = "leaving" if index in outlook.leaving else heart.health.value
            trip = None if heart.mean_s is None else 1e3 * heart.mean_s
            hosts[self._hosts[index]] = {"state": state, "round_trip_ms": trip, "why": heart.why}
        home = rerouter.target == self._engine.home
        chosen = None if home or rerouter.chosen is None else plain(rerouter.chosen)
        return {
            "hosts": hosts,
            "technique": "none" if home else route_of(rerouter.target).technique,
            "route": rerouter.target,
            "estimate": chosen,
            "hosts_lost": len(outlook.gone),
            "failovers": rerouter.failovers,
            "replayed": rerouter.replayed,
            "event_counts": dict(self._counts),
            "events": list(self.events)[-50:],
        }

    def close(self) -> None:
        """Prepare nothing more, and watch no more: who is watched cannot hold up what ends."""
        self._builder.close()
        if self._rehearsals is not None:
            self._rehearsals.close()
        if self._watch is not None:
            self._watch.close()
        self._inbox.put(None)
        self._thread.join()
