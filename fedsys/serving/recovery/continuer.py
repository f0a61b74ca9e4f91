"""CONTINUER at run time: a host is lost, and requests go on.

::

    lost ─▶ candidates ─▶ choose ─▶ the best that stands ready: requests are sent that way,
                            │                                   from where they are held
                            └─────▶ what is best in the long run: built beside, then switched in
    a host returns, or wants to leave: the same, without haste

One thread decides, in the order in which it is told; pipelines are built, changed to and taken down
in another one (`fedsys.serving.recovery.building`). What stands ready in advance are the ways
around each host whose loss would interrupt the route in force; a host holds weights once, for all
of its pipelines.

Majeed et al. (CONTINUER, IEEE EDGE 2022) choose one of three techniques once; detection, replay, a
second failure and the way back are not described there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, final
from weakref import WeakSet

from fedsys.errors import FedsysError, RuntimeFailure, first_line
from fedsys.partition.problem import Partition
from fedsys.serving.chain import ChainEngine, ChainModule
from fedsys.serving.recovery.building import BuiltPipeline, PipelineBuilder
from fedsys.serving.recovery.candidates import ModelWays, Planner
from fedsys.serving.recovery.decision import RecoveryCandidate, RecoveryObjective, choose
from fedsys.serving.recovery.detector import DetectorRules, Health, Heart
from fedsys.serving.recovery.diverting import divert
from fedsys.serving.recovery.outlook import RecoveryOutlook
from fedsys.serving.recovery.watch import HostWatch
from fedsys.serving.routes import Route, route_of

_TICK_S = 0.25  # between two looks at requests that were sent another way
_TOLD = 12  # candidates of a decision that are told

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
        self._engine, self._options, self._tell = engine, options, tell
        self.events: deque[Mapping[str, Any]] = deque(maxlen=1000)
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._hosts = [host.name for host in engine.chain.hosts]
        self._builder = PipelineBuilder(
            engine.switcher, lambda built: self._put(self._built, built)
        )
        self._outlook = RecoveryOutlook(engine, planner, ways, self._builder)
        self._target = engine.route.label  # where requests go
        self._next = ""  # what is built to answer
        self._used: WeakSet[ChainModule] = WeakSet(engine.live)
        self._chosen: RecoveryCandidate | None = None
        self._failovers = self._replayed = 0
        self._watch: HostWatch | None = None
        engine.recovery, engine.home = self.status, self._target
        engine.moved = lambda partition: self._put(self._moved, partition)
        self._thread = threading.Thread(target=self._loop, name="recovery", daemon=True)
        self._thread.start()

    def start(self, watch: HostWatch) -> None:
        """Begin to prepare for the loss of hosts that are watched."""
        self._watch = watch
        self._put(self._keep_ready)

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

    def _changed(self, index: int, heart: Heart, told_s: float) -> None:
        outlook, host = self._outlook, self._engine.chain.hosts[index]
        if heart.health is Health.LOST:
            host.lose()  # also if it was about to be let in again
            if index in outlook.gone:
                return
            outlook.gone |= {index}
            self._note("lost", host=host.name, why=heart.why)
            self._lost(index, told_s)
        elif heart.health is Health.ALIVE and index in outlook.gone:
            self._builder.carry_out(lambda: self._let_in(index))
        elif heart.leaves != (index in outlook.leaving):
            outlook.leaving ^= {index}
            self._note("leaves" if heart.leaves else "stays", host=host.name)
            self._settle()

    def _let_in(self, index: int) -> None:
        try:
            self._engine.chain.hosts[index].come_back()
        except FedsysError as error:
            _log.info("%s is not back: %s", self._hosts[index], first_line(error))
            return
        self._put(self._returned, index)

    def _returned(self, index: int) -> None:
        if self._watch is not None and not self._watch.hearts[index].health.usable:
            self._engine.chain.hosts[index].lose()  # again, while it was let in
            return
        self._outlook.gone -= {index}
        self._note("returned", host=self._hosts[index])
        self._settle()

    def _moved(self, partition: Partition) -> None:
        """Take note that cuts were changed by somebody else."""
        self._outlook.settled(partition)
        self._target = self._engine.home = Route(partition).label
        if (module := self._outlook.module(self._target)) is not None:
            self._used.add(module)
        self._keep_ready()

    def _lost(self, index: int, told_s: float) -> None:
        for module in self._engine.live:
            broken = any(stood.index == index for stood in module.stages)
            if broken and module not in self._used:  # nobody's requests are there
                module.pipeline.fail(f"{self._hosts[index]} is lost")
        if self._engine.out or not self._outlook.stands(self._target):
            self._fail_over(self._hosts[index], told_s)
        else:
            self._settle()

    # ----------------------------------------------------------------------------------------------
    # Decisions

    def _fail_over(self, host: str, told_s: float) -> None:
        """Send requests another way at once, if one stands ready, and prepare the best one."""
        began = time.monotonic()
        found, objective = self._outlook.candidates(), self._options.objective
        try:
            decision = choose(found, objective)
            allowed = [s.candidate for s in decision.candidates]
            standing = [one for one in allowed if self._outlook.ready(one.path)]
            self._chosen = chosen = choose(standing or allowed, objective).choice
        except RuntimeFailure as error:
            self._give_up(first_line(error))
            return
        decided, count = time.monotonic(), 0
        if standing:
            count = self._apply(chosen.path)
            self._outlook.measured.applied(time.monotonic() - decided)
        else:
            self._target = self._next = chosen.path
            self._builder.build(chosen.path)
        done = time.monotonic()
        self._failovers += 1
        self._note(
            "failover", host=host, technique=chosen.technique, route=chosen.path,
            predicted_ms=chosen.latency_ms, accuracy=chosen.accuracy, ready=bool(standing),
            tell_ms=1e3 * (began - told_s), decide_ms=1e3 * (decided - began),
            apply_ms=1e3 * (done - decided), replayed=count, reason=decision.reason,
            decided=decision.choice.path,
            candidates=[_plain(each.candidate) for each in decision.candidates[:_TOLD]],
        )  # fmt: skip
        if standing:
            self._settle()

    def _give_up(self, reason: str) -> None:
        self._engine.out = f"no host is left that could answer: {reason}"
        for module in self._engine.live:
            module.pipeline.fail(self._engine.out)
        self._note("nobody", reason=self._engine.out)

    def _apply(self, label: str) -> int:
        """Send requests along a route that stands; return how many were under way."""
        new, count = self._outlook.module(label), 0
        if new is None:
            raise RuntimeFailure(f"{label} does not stand")
        used = [module for module in self._engine.live if module in self._used]
        watch = self._watch if len(used) == 1 else None  # else requests have been diverted before
        for old in used:
            if old is not new and not self._outlook.stands(old.route.label):
                count += divert(old, new, self._outlook.gone, self._outlook.units, watch)
        self._replayed += count
        self._go(new)
        return count

    def _go(self, module: ChainModule) -> None:
        self._used.add(module)
        self._target, self._engine.out = module.route.label, ""
        self._outlook.went(self._target)
        self._builder.switch(self._target)

    def _settle(self) -> None:
        """Prepare what is best in the long run, if that is not what answers."""
        try:
            best = self._outlook.best(self._target, self._options.objective)
        except RuntimeFailure as error:
            if not self._outlook.stands(self._target):
                self._give_up(first_line(error))
            return
        waits = self._engine.out or self._next == self._target
        if best == self._target and not waits:
            self._keep_ready()
            return
        self._next = best
        self._note("prepares", route=best)
        self._builder.build(best)

    def _built(self, built: BuiltPipeline) -> None:
        if built.label != self._next or built.cost is not None:
            self._keep_ready()
            return
        self._next, new = "", self._outlook.module(built.label)
        if new is None or built.error or not self._outlook.stands(built.label):
            self._note("not_built", route=built.label, error=built.error or "a host was lost")
            if self._engine.out or self._interrupted():
                self._fail_over("", time.monotonic())
            return
        if built.took_s:
            self._outlook.measured.built(built.took_s)
        if self._engine.out or self._interrupted():
            self._note("applied", route=built.label, replayed=self._apply(built.label))
        else:
            self._note("switched", route=built.label, build_ms=1e3 * built.took_s)
            self._go(new)

    def _interrupted(self) -> bool:
        """Whether requests wait in a pipeline that lost a host, and are not sent elsewhere."""
        used = [module for module in self._engine.live if module in self._used]
        return any(
            not m.pipeline.diverted and not self._outlook.stands(m.route.label) for m in used
        )

    def _keep_ready(self) -> None:
        """Have ways around hosts ready; which ones is found out where nobody waits for it."""
        options, target = self._options, self._target

        def prepare() -> None:
            found = self._outlook.in_case(target, options.warm, options.objective)
            coming = self._next  # as it is now: it may have been told while the others were found
            self._builder.keep([*filter(None, [coming]), *found, *self._engine.prepared])

        self._builder.carry_out_later(prepare)

    def _look(self) -> None:
        """Compute anew what a pipeline that lost a host, and was diverted, has not answered."""
        new = self._outlook.module(self._target)
        if new is None or not self._outlook.ready(self._target):
            return
        for old in self._engine.live:
            stuck = old in self._used and old.pipeline.in_flight and old is not new
            if stuck and not self._outlook.stands(old.route.label):
                self._replayed += old.pipeline.divert(new.pipeline)

    # ----------------------------------------------------------------------------------------------

    def _note(self, what: str, **values: Any) -> None:
        event = {"time_s": time.time(), "event": what, **values}
        self.events.append(event)
        _log.info("%s: %s", what, values)
        self._tell(event)

    def status(self) -> Mapping[str, Any]:
        """Return how hosts are, what stands in for lost ones, and what it was expected to cost."""
        hearts = self._watch.hearts if self._watch is not None else ()
        hosts, outlook = {}, self._outlook
        for index, heart in enumerate(hearts):
            state = "leaving" if index in outlook.leaving else heart.health.value
            trip = None if heart.mean_s is None else 1e3 * heart.mean_s
            hosts[self._hosts[index]] = {"state": state, "round_trip_ms": trip, "why": heart.why}
        home = self._target == self._engine.home
        chosen = None if home or self._chosen is None else _plain(self._chosen)
        return {
            "hosts": hosts,
            "technique": "none" if home else route_of(self._target).technique,
            "route": self._target,
            "estimate": chosen,
            "hosts_lost": len(outlook.gone),
            "failovers": self._failovers,
            "replayed": self._replayed,
            "events": list(self.events)[-50:],
        }

    def close(self) -> None:
        """Watch no more, and prepare nothing more."""
        if self._watch is not None:
            self._watch.close()
        self._inbox.put(None)
        self._thread.join()
        self._builder.close()


def _plain(candidate: RecoveryCandidate) -> dict[str, Any]:
    return {
        "technique": candidate.technique,
        "route": candidate.path,
        "latency_ms": candidate.latency_ms,
        "accuracy": candidate.accuracy,
        "downtime_ms": candidate.downtime_ms,
        "measured": sorted(candidate.measured),
    }
