"""FedAdapt at work: from what was seen of devices to what each does in the next round.

The loop of the paper: pre-processing (what an iteration takes, by the baseline), clustering, the
trained agent, post-processing (a share of the work becomes the nearest legal cut). Beyond it: each
device is asked for by itself, as the one that stands for its group; one that was slower at a cut
than alone stays alone until its link changes; after some trials what was fastest is kept; pieces,
codec and edge are chosen by the planner, given the cut; devices that compute faster or slower than
before are grouped anew; and the agent can go on learning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsys.planning.assignment import Assignment
from fedsys.planning.learning.agent import Agent
from fedsys.planning.learning.going_on import Learning
from fedsys.planning.learning.observing import nearest
from fedsys.planning.learning.options import FedAdaptOptions
from fedsys.planning.learning.scenarios import Scenario
from fedsys.planning.learning.settling import Conditions, Memory
from fedsys.planning.learning.view import Times
from fedsys.planning.resources import Observation

State = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """What is remembered of one device.

    Attributes:
        baseline_s: Seconds of an iteration alone; 0 before it is known.
        cut: Index of its cut in the last round; -1 before the first.
        iteration_s: Seconds of an iteration there.
        compute_s: Seconds of an iteration in which it computed, by the cut's index.
        up_bit_s: Seconds of a bit to the edge, as last seen; 0 if never.
        down_bit_s: Seconds of a bit from it.
        slow: Whether it is among those with slow links.
        vetoed: Seconds of a bit, both ways together, and of an iteration, with which each cut was
            slower than alone, by the cut's index.
        unseen: Rounds since its link was measured, that of the last plan included.
    """

    baseline_s: float = 0.0
    cut: int = -1
    iteration_s: float = 0.0
    compute_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    up_bit_s: float = 0.0
    down_bit_s: float = 0.0
    slow: bool = False
    vetoed: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    unseen: int = 0

    @property
    def mbit_s(self) -> float:
        """Rate of the slower way of its link; 0 if unknown."""
        slower = max(self.up_bit_s, self.down_bit_s)
        return 1e-6 / slower if slower > 0 else 0.0

    def seen(self, got: Observation, alone: int, options: FedAdaptOptions) -> Known:
        """Return what is known after a round.

        Args:
            got: What was seen in it.
            alone: Index of the whole model.
            options: What counts as a change.
        """
        if not got.iteration_s > 0 or self.cut < 0:
            return self
        rates = (got.up_bit_s or self.up_bit_s, got.down_bit_s or self.down_bit_s)
        now = dataclasses.replace(
            self, iteration_s=got.iteration_s, up_bit_s=rates[0], down_bit_s=rates[1]
        )
        return now._vetoing(alone, options) if self.cut < alone else now._based(got, options)

    def _based(self, got: Observation, options: FedAdaptOptions) -> Known:
        """Take what was measured alone as the baseline, where it differs from the one before."""
        before, now = self.baseline_s, self
        if not before or abs(got.iteration_s / before - 1.0) > options.drift:
            now = dataclasses.replace(self, baseline_s=got.iteration_s, compute_s={})
        return dataclasses.replace(now, vetoed=now._still_vetoed(options))

    def _still_vetoed(self, options: FedAdaptOptions) -> dict[str, Sequence[float]]:
        """Return the vetoes that hold still, now that baseline or link are others."""
        return {cut: at for cut, at in self.vetoed.items() if self._holds(*at, options=options)}

    def _holds(self, bit_s: float, iteration_s: float, *, options: FedAdaptOptions) -> bool:
        now = self.up_bit_s + self.down_bit_s
        faster = now > 0 and bit_s / now - 1.0 > options.drift
        return not faster and iteration_s > self.baseline_s * (1.0 + (options.veto or 0.0))

    def _vetoing(self, alone: int, options: FedAdaptOptions) -> Known:
        bit_s, kept = self.up_bit_s + self.down_bit_s, self._still_vetoed(options)
        limit = None if options.veto is None else self.baseline_s * (1.0 + options.veto)
        if limit is not None and self.baseline_s > 0 and self.iteration_s > limit:
            kept[str(self.cut)] = (bit_s, self.iteration_s)
        return dataclasses.replace(self, vetoed=kept)

    def scaled(self, got: Observation, options: FedAdaptOptions) -> Known:
        """Follow a machine that has become faster or slower while it offloads."""
        at, now = str(self.cut), got.compute_s
        before = self.compute_s.get(at, 0.0)
        if not now > 0:
            return self
        if before > 0 and abs(now / before - 1.0) > options.drift:
            baseline = self.baseline_s * now / before
            other = dataclasses.replace(self, baseline_s=baseline, compute_s={at: now})
            return dataclasses.replace(other, vetoed=other._still_vetoed(options))
        return dataclasses.replace(self, compute_s={**self.compute_s, at: before or now})


class FedAdapt:
    """Decides for the devices of a run.

    Its state is a dict of plain values: ``known`` of each client, as `Known` has it, ``groups`` and
    ``asked`` (share of the work) of each in the last round, ``memory``, as `Memory` has it, and
    ``learning``, as `Learning` has it.

    Args:
        base: The fleet and model of the run, as they are believed to be.
        options: How devices are seen.
        agent: What decides.
        forced: Whether a device may not hold the whole model.
        seed: Of the run: of the actions of an agent that goes on learning.
    """

    def __init__(
        self,
        base: Scenario,
        options: FedAdaptOptions,
        agent: Agent,
        *,
        forced: bool = False,
        seed: int = 0,
    ) -> None:
        self.agent = agent
        self._base, self._options, self._forced, self._seed = base, options, forced, seed
        self._alone = len(base.cuts) - 1

    @staticmethod
    def init() -> State:
        """Return the state before the first round."""
        return {"known": {}, "groups": {}, "asked": {}, "memory": {}, "learning": {}}

    def plan(
        self, state: State, seen: Mapping[int, Observation]
    ) -> tuple[State, Mapping[int, Assignment]]:
        """Take in what was seen, and decide for the devices of the next round.

        Args:
            state: What the last `plan` returned.
            seen: The devices of the round, with what was last seen of each.
        """
        clients = sorted(seen)
        known = {client: self._informed(state, client, seen[client]) for client in clients}
        ready = [client for client in clients if known[client].baseline_s > 0]
        memory = self._remembered(state, known, ready)
        groups, asked = dict(state["groups"]), dict(state["asked"])
        learning = Learning(**state["learning"])
        picked = {client: self._first() for client in clients}
        if ready:
            labels, slow, shares, learning = self._asked([known[c] for c in ready], learning)
            for client, group, low, share in zip(ready, labels, slow, shares, strict=True):
                groups[client], asked[client] = group, share
                known[client] = dataclasses.replace(known[client], slow=low)
                wanted = nearest(self._base.shares, share)
                picked[client] = self._allowed(known[client], wanted)
            if self._settled(memory) and set(memory.picked) == set(ready):
                picked |= memory.picked
        for client in clients:
            measured = seen[client].up_bit_s > 0
            unseen = 1 if measured else known[client].unseen + 1
            known[client] = dataclasses.replace(known[client], cut=picked[client], unseen=unseen)
        made = {client: self._base.assignment(client, picked[client]) for client in clients}
        remembered = {client: dataclasses.asdict(known[client]) for client in clients}
        return {
            "known": state["known"] | remembered,
            "groups": groups,
            "asked": asked,
            "memory": dataclasses.asdict(memory),
            "learning": learning.to_values(),
        }, made

    def _settled(self, memory: Memory) -> bool:
        trials = self._options.trials
        return trials is not None and not self._options.learn and memory.rounds > trials

    def _remembered(self, state: State, known: Mapping[int, Known], ready: Sequence[int]) -> Memory:
        """Return what was fastest, with what the last round has shown."""
        memory = Memory.of(state["memory"])
        measured = [c for c in ready if known[c].iteration_s > 0 and known[c].cut >= 0]
        if not ready or measured != list(ready):
            return memory
        now = Conditions(
            {c: known[c].up_bit_s + known[c].down_bit_s for c in ready},
            {c: known[c].baseline_s for c in ready},
        )
        slowest = max(known[c].iteration_s for c in ready)
        picked = {c: known[c].cut for c in ready}
        return memory.seen(now, picked, slowest, self._options.drift)

    def unmeasured(self, state: State, clients: Sequence[int]) -> list[int]:
        """Return who is alone because of a slow link that has long not been measured."""
        every = self._options.probe_every
        known = {client: Known(**state["known"][client]) for client in clients}
        return [
            client
            for client, device in known.items()
            if every
            and device.cut == self._alone
            and (device.slow or device.vetoed)
            and device.unseen >= every
        ]

    def reasons(self, state: State, clients: Sequence[int]) -> dict[int, str]:
        """Return one sentence about the decision for each client."""
        return {client: self._reason(state, client) for client in clients}

    def _informed(self, state: State, client: int, got: Observation) -> Known:
        kept = state["known"].get(client)
        known = Known() if kept is None else Known(**kept)
        if not got.iteration_s > 0 or known.cut < 0:
            return known
        if known.cut < self._alone:
            if known.baseline_s == 0.0:  # it never trained alone: its share of the work tells
                share = self._base.shares[known.cut]
                baseline = got.compute_s / share if share > 0 else got.iteration_s
                known = dataclasses.replace(known, baseline_s=baseline)
            known = known.scaled(got, self._options)
        return known.seen(got, self._alone, self._options)

    def _first(self) -> int:
        """Return the cut of a device whose baseline is not known: alone, if it may."""
        return 0 if self._forced and self._alone else self._alone

    def _asked(
        self, devices: Sequence[Known], learning: Learning
    ) -> tuple[tuple[int, ...], tuple[bool, ...], list[float], Learning]:
        """Return group, whether the link is slow, and share of each device; and what is learned."""
        base, now = self._times(devices, alone=True), self._times(devices, alone=False)
        view, options = self.agent.view, self._options
        labels, slow = view.labels(base, now, [device.slow for device in devices])
        shares = [self._base.shares[self._alone if d.cut < 0 else d.cut] for d in devices]
        if options.learn:
            state = view.state(base, now, labels, shares)
            agent = learning.acting(self.agent)
            learning = learning.rewarded(base, now, options.training.reward)
            learning, agent = learning.updated(agent, state, options, self._seed)
            learning, by_group = learning.acted(agent, state, options.learn_std, self._seed)
            return labels, slow, [by_group[group] for group in labels], learning
        if options.each:
            states = view.states(base, now, labels, shares)
            return labels, slow, self.agent.shares_of_each(states, labels), learning
        by_group = self.agent.shares(view.state(base, now, labels, shares))
        return labels, slow, [by_group[group] for group in labels], learning

    def _times(self, devices: Sequence[Known], *, alone: bool) -> Times:
        seconds = [d.baseline_s if alone else d.iteration_s or d.baseline_s for d in devices]
        crossing = [self._base.crossing_bits * (d.up_bit_s + d.down_bit_s) for d in devices]
        rates = [d.mbit_s for d in devices]
        return Times(np.array(seconds), np.array(rates), np.array(crossing))

    def _allowed(self, device: Known, cut: int) -> int:
        if self._forced and cut == self._alone and self._alone:
            return self._alone - 1
        return self._alone if str(cut) in device.vetoed and not self._forced else cut

    def _reason(self, state: State, client: int) -> str:
        known = Known(**state["known"][client])
        if known.baseline_s == 0.0:
            return "its first round is alone, which tells its baseline"
        group = state["groups"][client]
        asked = state["asked"][client]
        kind = "slow links" if known.slow else f"speed {group + 1} of {self.agent.view.groups}"
        told = f"the agent asks it, of the group of {kind}, to keep {asked:.0%} of the work"
        wanted = nearest(self._base.shares, asked)
        if known.cut != wanted and self._settled(Memory.of(state["memory"])):
            return f"{told}, but what it does was the fastest of all that was tried"
        if known.cut != wanted and known.cut == self._alone:
            return f"{told}, but there it was slower than alone"
        if known.cut == self._alone:
            return f"{told}: it trains alone"
        return f"{told}; the nearest cut keeps {self._base.shares[known.cut]:.0%}"
