"""One event of `fedsys bench failure`: a fault under load, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any, final

import torch

from fedsys.commands.bench.failure_chain import ConstantLoad, HostProcess, seconds_of
from fedsys.commands.bench.failure_oracle import Judged, judge
from fedsys.errors import RuntimeFailure
from fedsys.serving.chain import ChainEngine
from fedsys.serving.recovery.continuer import Continuer
from fedsys.serving.recovery.decision import RecoveryCandidate, RecoveryObjective

_SETTLE_S, _QUIET_S, _PATIENCE_S = 0.5, 0.7, 90.0
_ANSWERS = 5  # after the fault: what a request then takes is their median
_BUILT_S = 20.0  # for what is to stand ready after a fault
_VERDICT_S = 10.0  # for a host that was killed to be noticed
_IMAGES = 16
_DECISIONS = 200  # that are timed before each event

Event = Mapping[str, Any]


@final
class Scene:
    """A chain under load, on which faults strike.

    Args:
        engine: The chain.
        continuer: Who looks after it.
        told: Events are added to it as they happen.
        options: Of the benchmark.
    """

    def __init__(
        self,
        engine: ChainEngine,
        continuer: Continuer,
        told: list[Event],
        options: Mapping[str, Any],
    ) -> None:
        self._engine, self._continuer, self._told, self._options = engine, continuer, told, options
        self._images = torch.randn(_IMAGES, *engine.card.input_shape)
        self._decisions: list[tuple[float, float]] = []
        self._measured: dict[str, float] = {}  # by host that is lost and route
        self._judged: list[Judged] = []
        self._misses: list[tuple[bool, float]] = []  # of what was measured before, and estimated
        self._repeats: list[float] = []  # by how much halves of one measurement differ

    def event(self, host: HostProcess, fault: str, objective: RecoveryObjective) -> dict[str, Any]:
        """Let a fault strike, and return what came of it.

        Raises:
            RuntimeFailure: The chain does not come to rest before.
        """
        self._at_rest()
        load = ConstantLoad(self._engine, self._images, float(self._options["requests_per_s"]))
        time.sleep(_QUIET_S)
        self._decisions += self._continuer.rehearse_decisions(_DECISIONS)
        self._told.clear()
        struck, struck_at = time.monotonic(), time.time()
        seconds = float(self._options["pause_s"])
        host.strike(fault, seconds, float(self._options["slow"]))
        until = time.monotonic() + max(seconds, _VERDICT_S if fault == "kill" else 0.0)
        while (found := self._failover()) is None and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(_SETTLE_S + _ANSWERS / float(self._options["requests_per_s"]))
        parts = self._parts(found, struck_at, struck, load)
        seen = time.monotonic()  # the oracle builds and asks routes in this process
        oracle = self._oracle(host, found, objective) if fault == "kill" else {}
        host.mend(fault)
        ledger = load.close()
        after = sorted(at for at in ledger.answers.values() if struck <= at < seen)
        before = [at for at in ledger.answers.values() if at < struck]
        waits = zip([max(before, default=struck), *after], [*after, seen], strict=True)
        row: dict[str, Any] = {"host": host.name, "fault": fault}
        row |= {"silence_ms": 1e3 * max((b - a for a, b in waits), default=0.0)}
        row |= {"lost": ledger.issued - len(ledger.answers), "twice": ledger.twice}
        row |= {"why": next(iter(ledger.failed.values()), "")}
        if host.ended_s is not None:
            row["exit_ms"] = 1e3 * (host.ended_s - struck)
        return row | parts | oracle

    def _at_rest(self) -> None:
        """Wait until all hosts answer, the first route does, and nothing is prepared any more."""
        until, quiet = time.monotonic() + _PATIENCE_S, time.monotonic()
        while time.monotonic() < until:
            status = self._engine.status()
            away = status["hosts_lost"] or status["variant"] != self._engine.home
            alone = len(status["in_memory"]) < 2  # nothing stands ready yet
            if away or alone or not self._continuer.at_rest:
                quiet = time.monotonic()
            if time.monotonic() - quiet > _SETTLE_S:
                return
            time.sleep(0.05)
        raise RuntimeFailure(f"the chain did not come to rest: {self._engine.status()}")

    def _wait_for_builder(self) -> None:
        """Wait until what is to stand ready without the host does: building takes processors."""
        until = time.monotonic() + _BUILT_S
        while not self._continuer.at_rest and time.monotonic() < until:
            time.sleep(0.02)

    def _failover(self) -> Event | None:
        return next((one for one in list(self._told) if one["event"] == "failover"), None)

    def _parts(
        self, found: Event | None, struck_at: float, struck: float, load: ConstantLoad
    ) -> dict[str, Any]:
        """Return what the gap was made of, in milliseconds; nothing where none failed over."""
        if found is None:
            return {"technique": "none"}
        done = struck + found["time_s"] - struck_at
        first = load.ledger.first_around(struck)
        began_ms = 1e3 * (found["time_s"] - struck_at) - found["decide_ms"] - found["apply_ms"]
        whole, measured = (
            self._engine.times.took_s(label) for label in (found["before"], found["route"])
        )
        # What is quick is answered while others are still sent on, before that is told.
        answer_ms = None if first is None else 1e3 * max(0.0, first - done)
        keys = ("technique", "route", "ready", "tell_ms", "decide_ms", "apply_ms", "feasible")
        return {
            **{key: found[key] for key in keys},
            "detect_ms": began_ms - found["tell_ms"],
            "answer_ms": answer_ms,
            "gap_ms": None if first is None else 1e3 * (first - struck),
            "replayed": sum(one.get("replayed", 0) for one in list(self._told)),
            "accuracy_before": found["accuracy_before"],
            "accuracy_after": found["accuracy"],
            "predicted_ms": found["predicted_ms"],
            "measured_ms": None if measured is None else 1e3 * measured,
            "before_ms": None if whole is None else 1e3 * whole,
            "by": "measured" if _was_measured(found) else "estimated",
        }

    def _oracle(
        self, host: HostProcess, found: Event | None, objective: RecoveryObjective
    ) -> dict[str, Any]:
        """Measure all candidates of a decision, and judge it; each route is measured once.

        What is measured are rehearsals; they count as what clients take by the ratio of both.
        """
        count = int(self._options["oracle"])
        if found is None or not count:
            return {}
        expected, measured = [], []
        for one in found["candidates"]:
            key = f"{host.name} {one['route']}"
            if key not in self._measured:
                self._wait_for_builder()
                took = seconds_of(self._engine, one["route"], self._images[:1], count)
                if not took:
                    continue
                self._measured[key] = median(took) * self._continuer.rehearsal
                halves = took[: count // 2] or took, took[count // 2 :]
                self._repeats.append(abs(median(halves[0]) / median(halves[1]) - 1))
            expected.append(_candidate(one, one["latency_ms"]))
            measured.append(_candidate(one, 1e3 * self._measured[key]))
            miss = abs(expected[-1].latency_ms / measured[-1].latency_ms - 1)
            self._misses.append(("latency" in one["measured"], miss))
        if not measured:
            return {}
        judged = judge(expected, measured, objective, int(self._options["grid"]))
        self._judged.append(judged)
        return {"oracle": judged.best, "agrees": judged.agrees, "regret": judged.regret}

    def about(self) -> dict[str, Any]:
        """Return what was seen of the chain beside its events."""
        misses = [miss for one in self._judged for miss in one.misses]
        cells = sum(one.cells for one in self._judged)
        regrets = [regret for one in self._judged for regret in one.regrets]
        return {
            **_timed(self._decisions),
            "grid": cells,
            "grid_agreement": 1 - len(regrets) / cells if cells else None,
            "grid_regret_mean": sum(regrets) / len(regrets) if regrets else None,
            "grid_regret_max": max(regrets, default=None),
            "latency_error": _mean(misses),
            "latency_error_measured": _mean(miss for seen, miss in self._misses if seen),
            "latency_error_estimated": _mean(miss for seen, miss in self._misses if not seen),
            "latency_repeat_error": _mean(self._repeats),
            "estimates": self._continuer.errors(),
        }


def _timed(decisions: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return what decisions took, by the clock and of the processor; None where none was timed."""
    keys = ("decide_ms_median", "decide_ms_p99", "decide_cpu_ms_median", "decide_cpu_ms_p99")
    if not decisions:  # there was no time left for an event
        return {"decisions": 0, **dict.fromkeys(keys)}
    wall, cpu = (sorted(column) for column in zip(*decisions, strict=True))
    late = int(0.99 * (len(wall) - 1))
    found = (1e3 * median(wall), 1e3 * wall[late], 1e3 * median(cpu), 1e3 * cpu[late])
    return {"decisions": len(wall), **dict(zip(keys, found, strict=True))}


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _was_measured(found: Event) -> bool:
    return any(
        one["route"] == found["route"] and "latency" in one["measured"]
        for one in found["candidates"]
    )


def _candidate(one: Mapping[str, Any], latency_ms: float) -> RecoveryCandidate:
    return RecoveryCandidate(
        one["technique"], one["route"], latency_ms, one["accuracy"], one["downtime_ms"]
    )
