"""FedAdapt with an agent that scores cuts: from what was seen of devices to what each does next.

Pre-processing makes candidates of what was measured (`informed`, `outlook`), the agent scores them
(`cut_agent`), and two rules guard what it says. No device takes a cut whose round is expected to
be slower than alone by more than `veto`: so one stays alone where transfers dominate. And one that
is ready before the slowest anyway takes the cut that transfers least (`sparing`): no round is
expected to take longer by that, and links that drop in it cost less. Pieces and codec of a cut are
those that are fastest by the closed form of planners.

All steps are arrays over the devices of the round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsys.errors import ConfigError
from fedsys.planning.assignment import Assignment
from fedsys.planning.contention import Indices
from fedsys.planning.learning.cut_agent import CutAgent
from fedsys.planning.learning.cut_going_on import CutLearning
from fedsys.planning.learning.informed import informed
from fedsys.planning.learning.knowing import Knowledge
from fedsys.planning.learning.options import FedAdaptOptions
from fedsys.planning.learning.outlook import Outlook
from fedsys.planning.learning.run_fleet import Look, RunFleet, measured
from fedsys.planning.learning.scenarios import Scenario
from fedsys.planning.learning.staging import Setup
from fedsys.planning.planner import Plan
from fedsys.planning.resources import Observation

State = dict[str, Any]

NUMBERS = ("up_bit_s", "down_bit_s", "swing", "edge_s", "cut", "course", "unseen", "load_s")
"""Of each client in the state; behind them stand `Knowledge.work_s` and `Knowledge.slow` by cut."""


def guarded(seen: Outlook, cut: Indices, legal: NDArray[np.bool_], veto: float | None) -> Indices:
    """Return the cuts, with devices alone whose round is expected to be slower than alone.

    Args:
        seen: What is expected.
        cut: Index of the cut of each device, ``(R,)``.
        legal: Which may be chosen, ``(R, C)``.
        veto: Share by which a round may be slower than alone; None: by any.
    """
    if veto is None:
        return cut
    alone = legal.shape[1] - 1
    slower = seen.round_s[np.arange(len(cut)), cut] > seen.round_s[:, alone] * (1.0 + veto)
    return np.where(slower & legal[:, alone], alone, cut)


def sparing(seen: Outlook, cut: Indices, legal: NDArray[np.bool_]) -> Indices:
    """Return the cuts that transfer least of those with which nobody is later than the slowest.

    What is transferred are activations and their gradients, and a device's part of the model.

    A round is as long as its slowest device. Whoever has time until then gains nothing by a faster
    cut that leans on its link, and loses where that becomes slow before it is known.

    Args:
        seen: What is expected.
        cut: Index of the cut of each device, ``(R,)``; of equal ones it stays.
        legal: Which may be chosen, ``(R, C)``.
    """
    here, busy_s = np.arange(len(cut)), seen.link_s + seen.exchange_s
    in_time = legal & (seen.round_s <= seen.round_s[here, cut].max())
    least: Indices = np.where(in_time, busy_s, np.inf).argmin(axis=1)
    return np.where(busy_s[here, least] < busy_s[here, cut], least, cut)


class CutFedAdapt:
    """Decides for the devices of a run.

    Its state is a dict of plain values: ``devices``, of each client `NUMBERS` and what is known of
    its cuts; ``scored``, of each the index of the cut with the highest score; and ``learning``, as
    `CutLearning` has it.

    Args:
        base: The fleet and model of the run, as they are believed to be.
        options: How devices are seen.
        agent: What decides.
        forced: Whether a device may not hold the whole model.
        told: Whether the costs of `base` are those of a fleet file, which the first round rests on.
        seed: Of the run: of the cuts of an agent that goes on learning.

    Raises:
        ConfigError: The agent is to go on learning, and was never trained.
    """

    def __init__(
        self,
        base: Scenario,
        options: FedAdaptOptions,
        agent: CutAgent,
        *,
        forced: bool = False,
        told: bool = True,
        seed: int = 0,
    ) -> None:
        if options.learn and "value.0.weight" not in agent.weights:
            raise ConfigError.of(
                "policy.learn", True, "must be false with an agent that was never trained",
                "policy.ppo.updates=1 makes one that can go on learning",
            )  # fmt: skip
        self.agent = agent
        self._base, self._options, self._seed = base, options, seed
        self._fleet = RunFleet(base, forced=forced, told=told and options.first == "told")
        self._last: tuple[State, Sequence[int], Setup, Knowledge] | None = None

    @staticmethod
    def init() -> State:
        """Return the state before the first round."""
        return {"devices": {}, "scored": {}, "learning": {}}

    def plan(
        self, state: State, seen: Mapping[int, Observation]
    ) -> tuple[State, Mapping[int, Assignment]]:
        """Take in what was seen, and decide for the devices of the next round.

        Args:
            state: What the last `plan` returned.
            seen: The devices of the round, with what was last seen of each.
        """
        clients = sorted(seen)
        if not clients:
            return state, {}
        setup, known = self._known(state, clients)
        after, made = informed(known, setup, measured(seen, clients))
        known = self._waiting(known, after)
        look = self._fleet.look(setup, known, made)
        scored, learning = self._scored(state, clients, seen, look)
        cut = guarded(look.outlook, scored, look.legal, self._options.veto)
        if self._options.spare_links:
            cut = sparing(look.outlook, cut, look.legal)
        known = dataclasses.replace(
            known, cut=cut, course=look.outlook.course[np.arange(len(cut)), cut]
        )
        choices = self._fleet.assignments(clients, known.cut, known.course)
        state = {
            "devices": state["devices"] | dict(zip(clients, _lines(known), strict=True)),
            "scored": state["scored"] | dict(zip(clients, scored.tolist(), strict=True)),
            "learning": learning,
        }
        self._last = state, clients, setup, known
        return state, dict(zip(clients, choices, strict=True))

    def _waiting(self, before: Knowledge, now: Knowledge) -> Knowledge:
        """Return what is known now; a probe that told nothing is not repeated in every round."""
        every = self._options.probe_every or np.inf
        return dataclasses.replace(now, unseen=np.where(before.unseen >= every, 0.0, now.unseen))

    def _scored(
        self, state: State, clients: Sequence[int], seen: Mapping[int, Observation], look: Look
    ) -> tuple[Indices, dict[str, Any]]:
        """Return the cuts that the agent says, and what it has learned."""
        if not self._options.learn:
            return self.agent.cuts(look.seen), state["learning"]
        learning = CutLearning.of(state["learning"])
        took = np.array([seen[client].seconds for client in clients])
        learning = learning.rewarded(clients, took, look)
        learning, agent = learning.updated(self.agent, self._options, self._seed)
        learning, cut = learning.acted(agent, clients, look, self._seed)
        return cut, learning.to_values()

    def unmeasured(self, state: State, clients: Sequence[int]) -> list[int]:
        """Return who is alone and has long not measured its link."""
        every, alone = self._options.probe_every, len(self._base.cuts) - 1
        if not every or not alone:
            return []
        cut, unseen = NUMBERS.index("cut"), NUMBERS.index("unseen")
        lines = {client: state["devices"][client] for client in clients}
        return [c for c, line in lines.items() if line[cut] == alone and line[unseen] >= every]

    def predicted(self, state: State, clients: Sequence[int]) -> Plan:
        """Return what is expected of the round that was planned, each device by itself."""
        setup, known = self._known(state, list(clients))
        seen, here = self._fleet.look(setup, known).outlook, np.arange(len(clients))
        choices = self._fleet.assignments(list(clients), known.cut, known.course)
        iteration = (seen.alone_s * np.exp(known.slow))[here, known.cut]
        round_s = seen.round_s[here, known.cut]
        return Plan(
            "fedadapt", tuple(choices), tuple(iteration.tolist()), tuple(round_s.tolist()),
            "the agent's scores of all cuts", tuple(iteration.tolist()),
        )  # fmt: skip

    def reasons(self, state: State, clients: Sequence[int]) -> dict[int, str]:
        """Return one sentence about the decision for each client."""
        setup, known = self._known(state, list(clients))
        look, alone = self._fleet.look(setup, known), len(self._base.cuts) - 1
        ready, made = known.ready, {}
        for k, client in enumerate(clients):
            cut, scored = int(known.cut[k]), int(state["scored"][client])
            seconds = look.outlook.round_s[k]
            here = f"{seconds[alone]:.3g} s alone"
            there = f"{seconds[scored]:.3g} s at cut {self._base.cuts[scored]}"
            if not ready[k]:
                made[client] = "its first round tells what it takes"
            elif cut == alone != scored and seconds[alone] < seconds[scored]:
                made[client] = f"it trains alone: a round is expected to take {there}, {here}"
            elif cut != scored:
                made[client] = (
                    f"{_at(self._base, cut)} it is ready before the slowest, and transfers least: "
                    f"{seconds[cut]:.3g} s; the agent scores highest {there}"
                )
            elif cut == alone:
                made[client] = f"the agent scores it highest alone: {here}" + _hope(look, k)
            else:
                made[client] = (
                    f"the agent scores cut {self._base.cuts[cut]} highest, "
                    f"{self._base.shares[cut]:.0%} of the work: {there}, {here}"
                )
        return made

    def _known(self, state: State, clients: Sequence[int]) -> tuple[Setup, Knowledge]:
        if self._last is not None and self._last[0] is state and self._last[1] == clients:
            return self._last[2:]  # as it would be read from the state
        setup, first = self._fleet.of(clients)
        devices = state["devices"]
        kept = [devices.get(client) for client in clients]
        if None in kept:
            blank = _lines(first)
            kept = [own or blank[k] for k, own in enumerate(kept)]
        lines, count, cuts = np.array(kept), len(NUMBERS), len(self._base.cuts)
        numbers = dict(zip(NUMBERS, lines[:, :count].T, strict=True))
        for name in ("cut", "course"):
            numbers[name] = numbers[name].astype(np.int64)
        work, slow = lines[:, count : count + cuts], lines[:, count + cuts :]
        return setup, dataclasses.replace(first, work_s=work, slow=slow, **numbers)


def _at(base: Scenario, cut: int) -> str:
    return "alone" if cut == len(base.cuts) - 1 else f"at cut {base.cuts[cut]}"


def _hope(look: Look, k: int) -> str:
    wished = int(look.hoped.wished[k])
    if wished == look.legal.shape[1] - 1:
        return ", and no cut is expected to be faster"
    return f"; the slowest device may hope for {look.hoped.seconds[k]:.3g} s"


def _lines(known: Knowledge) -> list[list[float]]:
    numbers = np.array([getattr(known, name) for name in NUMBERS]).T
    lines: list[list[float]] = np.concatenate([numbers, known.work_s, known.slow], axis=1).tolist()
    return lines
