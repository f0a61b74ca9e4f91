"""Offloading policies against classic federated learning and against the optimum, virtually.

Nothing is trained: policies decide, the virtual clock answers, and what devices would have measured
is what policies see next (`fedsys.planning.policy_rounds`). Fleets are those of
`fedsys.commands.bench.offload_fleets`, and the optimum is that of `fedsys.planning.oracle`.

============ ===================================================================================
classic      everything on the devices
static       the choice that is best for all devices alike at the rates of the first round
fedadapt     an agent that was trained once, on fleets drawn around the paper's
untrained    what its training begins with: the cut that is expected to be fastest
bandit       a contextual bandit
auto         the planner, by the fleet file and what is measured
auto_learned as auto, which also learns what units take
exhaustive   the oracle: told the truth of each round
============ ===================================================================================
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

from fedsys.commands.bench import Chart
from fedsys.commands.bench.offload_fleets import OffloadCase, cases, of_run
from fedsys.config import Config, Spec, compose_text, locate, parse
from fedsys.errors import ConfigError, FedsysError, first_line
from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.oracle import Oracle, regret
from fedsys.planning.planner import best_static
from fedsys.planning.policy_rounds import Decides, decided_rounds
from fedsys.planning.resources import Observation
from fedsys.planning.virtual_clock import VirtualClock

POLICIES: Final[Mapping[str, str]] = {
    "fedadapt": "policy=fedadapt",
    "untrained": "policy=fedadapt policy.ppo.updates=0",
    "bandit": "policy=bandit",
    "auto": "policy=auto",
    "auto_learned": "policy=auto policy.learn=true",
}
"""Methods that are policies, as they are chosen on a command line."""

NEAR: Final = 0.05
"""Regret that counts as near the optimum."""

MANY: Final = 100
"""Devices for which deciding is timed."""


@dataclass(frozen=True)
class PolicyRounds:
    """What one method did on one fleet.

    Attributes:
        device_s: Seconds of each device in each round, by round.
        regrets: Of each round.
        changed: Numbers of the rounds in which a change of links is first known.
        decide_s: Seconds of each decision.
    """

    device_s: tuple[tuple[float, ...], ...]
    regrets: tuple[float, ...]
    changed: tuple[int, ...] = ()
    decide_s: tuple[float, ...] = ()

    @property
    def mean_s(self) -> float:
        """Mean seconds of a round."""
        return fmean(max(seconds) for seconds in self.device_s)

    def mean_of(self, device: int) -> float:
        """Return the mean seconds of a device."""
        return fmean(seconds[device] for seconds in self.device_s)

    @property
    def slowest(self) -> int:
        """The device that is slowest in the mean."""
        return max(range(len(self.device_s[0])), key=self.mean_of)

    @property
    def near_after(self) -> float:
        """Number of the round from which on the mean regret of all that are left is at most `NEAR`.

        Infinite if there is none.
        """
        for n in range(len(self.regrets)):
            if fmean(self.regrets[n:]) <= NEAR:
                return n + 1
        return math.inf


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Play all methods on all fleets.

    Args:
        config: Its seed draws fleets and trains agents.
        options: ``methods``; ``policies``, what builds one; ``most``, turns that are played of a
            round; those of `fedsys.commands.bench.offload_fleets.cases`; ``train``, more options of
            the agent's training; and ``decide_rounds``, in which deciding is timed.

    Returns:
        ``scenarios``: of each scenario and method ``mean_round_s`` and ``straggler_s`` (means),
        ``regret`` (the mean) and ``worst_regret``, ``rounds_to_5_percent`` (the median; None for
        never), how much less time it takes than classic (``below_classic``,
        ``straggler_below_classic``; the worst fleet in ``worst_over_classic``), and
        ``regret_after_change``, in the first round in which a change of links is known.
        ``deciding``: milliseconds for `MANY` devices. ``train_s`` and ``decide_ms`` of the agent.
        ``skipped``: methods that cannot be had here, and why.

    Raises:
        ConfigError: There is no such method.
    """
    known = ("classic", "static", *POLICIES, "exhaustive")
    for method in options["methods"]:
        if method not in known:
            raise ConfigError.of("bench.methods", method, f"must be of {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        makers = Makers(config, options, Path(folder))
        makers.train()
        found: dict[tuple[str, str], list[tuple[PolicyRounds, PolicyRounds]]] = {}
        for case in cases(options, config.seed):
            began = time.perf_counter()
            for method, pair in outcomes(case, makers, options).items():
                found.setdefault((case.name, method), []).append(pair)
            _say(f"{case.name}: {time.perf_counter() - began:.1f} s")
        deciding = _deciding(makers, options)
    agent = next((row for row in deciding if row["method"] == "fedadapt"), None)
    return {
        "scenarios": [_row(name, method, pairs) for (name, method), pairs in found.items()],
        "deciding": deciding,
        "train_s": makers.train_s,
        "decide_ms": None if agent is None else agent["decide_ms"],
        "skipped": [{"method": name, "why": why} for name, why in makers.skipped.items()],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Makers:
    """Builds the policies of methods; of those that cannot be had it notes why.

    Args:
        config: The run of the benchmark.
        options: Its options.
        folder: Where an agent is kept.

    Attributes:
        specs: The ``policy`` groups by method.
        train_s: Seconds that training an agent took; None if none was trained.
        skipped: Why a method is left out.
    """

    def __init__(self, config: Config, options: Mapping[str, Any], folder: Path) -> None:
        self._config, self._options, self._folder = config, options, folder
        self._build = locate(str(options["policies"]), "bench")
        self.specs: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.train_s: float | None = None
        for method in options["methods"]:
            if method in POLICIES:
                more = str(options["train"] or "") if method == "fedadapt" else ""
                self._try(method, functools.partial(self._spec, method, more))

    def _spec(self, method: str, more: str) -> None:
        text = compose_text(f"seed={self._config.seed} {POLICIES[method]} {more}")
        self.specs[method] = dict(parse(text).policy)

    def _try(self, method: str, step: Callable[[], None]) -> None:
        try:
            step()
        except (FedsysError, ImportError) as error:
            self.skipped[method] = first_line(error)
            self.specs.pop(method, None)

    def train(self) -> None:
        """Train the agent of ``fedadapt`` on fleets around the paper's, for all cases."""
        if "fedadapt" in self.specs:
            self._try("fedadapt", self._trained)

    def _trained(self) -> None:
        case = next(cases({**self._options, "fleets": 0}, self._config.seed))
        began = time.perf_counter()
        self.policy("fedadapt", case).init(case.layers, range(len(case.truth.devices)))
        self.train_s = time.perf_counter() - began
        _say(f"trained an agent in {self.train_s:.0f} s")
        self.specs["fedadapt"]["agent"] = str(self._folder / "agent.safetensors")

    def policy(self, method: str, case: OffloadCase) -> Decides:
        """Return the policy of a method for a case."""
        spec: Spec = self.specs[method]
        config = dataclasses.replace(case.config, policy=spec, seed=self._config.seed)
        examples = [device.examples for device in case.truth.devices]
        edges, folder = len(case.truth.edges), self._folder if method == "fedadapt" else None
        made: Decides = self._build(spec, edges, config, examples, folder=folder, say=_say)
        return made


# --------------------------------------------------------------------------------------------------
# Playing


class Told:
    """A policy that is told what to do, in every round.

    Args:
        choices: Of each device.
    """

    def __init__(self, choices: Sequence[Assignment]) -> None:
        self._choices = tuple(choices)

    def init(self, layers: LayeredModel, nodes: Sequence[int]) -> None:
        """Remember nothing."""

    def plan(
        self, state: None, seen: Mapping[int, Observation]
    ) -> tuple[None, Mapping[int, Assignment]]:
        """Return what was told."""
        return state, {node: self._choices[node] for node in seen}


def outcomes(
    case: OffloadCase, makers: Makers, options: Mapping[str, Any]
) -> dict[str, tuple[PolicyRounds, PolicyRounds]]:
    """Return what each method did on a fleet, with what classic training did beside it."""
    clock = VirtualClock(int(options["most"]))
    oracle = Oracle(clock=clock)
    whole = [Assignment(case.truth.units, micro_batches=1)] * len(case.truth.devices)
    classic = _outcome(case, Told(whole), clock, oracle)
    found = {}
    for method in options["methods"]:
        if method == "classic":
            own = classic
        elif method == "static":
            own = _outcome(case, Told(best_static(case.truth.at_round(1)).choices), clock, oracle)
        elif method == "exhaustive":
            own = _best(case, clock, oracle)
        elif method in makers.specs:
            own = _outcome(case, makers.policy(method, case), clock, oracle)
        else:
            continue
        found[method] = own, classic
    return found


def _outcome(
    case: OffloadCase, policy: Decides, clock: VirtualClock, oracle: Oracle
) -> PolicyRounds:
    done = list(decided_rounds(policy, case.layers, case.truth, case.rounds, clock))
    regrets = []
    for one in done:
        best = oracle.best(one.load, one.start_s, (one.choices, one.played))
        assert best is not None  # there are few devices
        regrets.append(regret(one.played.seconds, best.seconds))
    return PolicyRounds(
        tuple(one.played.device_s for one in done),
        tuple(regrets),
        _changed(case),
        tuple(one.decide_s for one in done),
    )


def _best(case: OffloadCase, clock: VirtualClock, oracle: Oracle) -> PolicyRounds:
    rounds = []
    for number in range(1, case.rounds + 1):
        best = oracle.best(case.truth.at_round(number))
        assert best is not None  # there are few devices
        rounds.append(best.played.device_s)
    return PolicyRounds(tuple(rounds), (0.0,) * len(rounds), _changed(case))


def _changed(case: OffloadCase) -> tuple[int, ...]:
    """Return the rounds before which links were another time as in the round before that."""
    links = [
        [device.network for device in case.truth.at_round(number).devices]
        for number in range(1, case.rounds + 1)
    ]
    return tuple(n + 2 for n in range(1, case.rounds - 1) if links[n] != links[n - 1])


def _deciding(makers: Makers, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Time decisions for many devices whose links change every other round."""
    rounds = int(options["decide_rounds"])
    text = (
        "model=vgg5 fleet=pi_lab network=wifi_75 client.batch_size=100 schedule=pipelined "
        f"num_clients={MANY} network.trace_by=rounds "
        "'network.trace={generate: random_walk, every: 2, length: 100}'"
    )
    case = of_run("deciding", parse(compose_text(text)), 100, rounds)
    clock = VirtualClock(int(options["most"]))
    rows = []
    for method in makers.specs:
        policy = makers.policy(method, case)
        done = decided_rounds(policy, case.layers, case.truth, rounds, clock)
        took = [1e3 * one.decide_s for one in done][1:]
        rows.append(
            {"method": method, "devices": MANY, "decide_ms": median(took), "most_ms": max(took)}
        )
    return rows


# --------------------------------------------------------------------------------------------------
# Figures


def _row(
    name: str, method: str, pairs: Sequence[tuple[PolicyRounds, PolicyRounds]]
) -> dict[str, Any]:
    """Return the figures of a method over the fleets of a scenario."""
    over = [own.mean_s / classic.mean_s for own, classic in pairs]
    straggler = [
        own.mean_of(classic.slowest) / classic.mean_of(classic.slowest) for own, classic in pairs
    ]
    regrets = [fmean(own.regrets) for own, _ in pairs]
    near = median(own.near_after for own, _ in pairs)
    after = [own.regrets[n - 1] for own, _ in pairs for n in own.changed]
    return {
        "name": name,
        "method": method,
        "fleets": len(pairs),
        "mean_round_s": fmean(own.mean_s for own, _ in pairs),
        "straggler_s": fmean(own.mean_of(classic.slowest) for own, classic in pairs),
        "regret": fmean(regrets),
        "worst_regret": max(regrets),
        "rounds_to_5_percent": near if math.isfinite(near) else None,
        "below_classic": 1.0 - fmean(over),
        "straggler_below_classic": 1.0 - fmean(straggler),
        "worst_over_classic": max(over) - 1.0,
        "regret_after_change": fmean(after) if after else None,
    }


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the mean regret of each method in each scenario."""
    rows = figures["scenarios"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "exhaustive"]
    by = {(row["name"], row["method"]): 100 * float(row["regret"]) for row in rows}
    return Chart(
        "Longer than the optimum (virtual)",
        "scenario",
        "mean regret (%)",
        names,
        {m: [max(by.get((name, m), math.nan), 0.01) for name in names] for m in methods},
        log=True,
    )
