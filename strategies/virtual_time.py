"""What the virtual clock says of each round of a run, and how good the prediction was.

Where time is not real (``local`` and ``simulation`` without emulation), the policy is told what its
devices would have measured on the fleet, so that it plans for that fleet and not for this machine.

A virtual round begins and ends with the exchange of the model, and is compared with a prediction
that has it too. In real time iterations are compared, which have it in neither: emulation shapes
the links of sessions, not the messages that bring models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from fedsys.config import Config
from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import state_bytes
from fedsys.planning.hardware import hardware
from fedsys.planning.mobility.positions import FollowsTimes
from fedsys.planning.options import choosable, pieces_of, run_workload
from fedsys.planning.oracle import Oracle, regret
from fedsys.planning.resources import RESOURCES
from fedsys.planning.virtual_clock import (
    VirtualRound,
    iterations_of,
    predicted_iterations,
    virtual_round,
)
from fedsys.planning.workload import Device, Workload
from fedsys.runs.virtual_trace import ModelledRound
from strategies.decisions import DeviceRound, best_of, probe_bytes
from strategies.offload import Offload
from strategies.played_moves import note_predictions, ways_of
from strategies.policies.policy import Predicts
from strategies.real_time import is_real

Row = dict[str, Any]


class RoundClock:
    """Tells the time of rounds. Where the fleet names no machines there is nothing to tell.

    Not told either: cuts at which raw inputs leave the device, and label-private ones.

    Args:
        config: The run.
        layers: Its model.
        examples: Examples of each client.
        offload: The strategy that offloads; None if none does.
        elapsed_s: Virtual seconds of the rounds before the first one.
        done: Number of these.

    Attributes:
        last: The last round that was told; None before the first one.
        devices: What is modelled of the clients of the last round, where a policy decides.
    """

    def __init__(
        self,
        config: Config,
        layers: LayeredModel,
        examples: Sequence[int],
        offload: Offload | None,
        elapsed_s: float = 0.0,
        done: int = 0,
    ) -> None:
        self._config, self._layers, self._examples = config, layers, examples
        self._offload, self._now_s, self._done = offload, elapsed_s, done
        self._machines = None if config.client.label_private else hardware(config, layers)
        self._emulated = config.network.emulate and config.fleet.emulate
        self._real = is_real(config)
        self.last: ModelledRound | None = None
        self.devices: dict[int, DeviceRound] = {}
        self._oracle = self._told_the_truth()
        self._begins: dict[int, float] = {}
        self._taken: tuple[int, dict[int, float]] = 0, {}
        source = None if offload is None else offload.mobility
        if self._machines is not None and isinstance(source, FollowsTimes):
            source.follow(self)

    def begins_s(self, round_: int) -> float | None:
        """Return when a round begins, in virtual seconds; None for later ones."""
        if round_ == self._done + 1:
            self._begins[round_] = self._now_s
        return self._begins.get(round_)

    def takes_s(self, round_: int, client: int) -> float | None:
        """Return how long a device would train in the round that is being decided, if it stayed.

        None for one that is not timed.
        """
        if self._taken[0] != round_:
            played = None if self._offload is None else self._stayed(sorted(self._offload.assigned))
            self._taken = round_, played or {}
        return self._taken[1].get(client)

    def _stayed(self, who: Sequence[int]) -> dict[int, float]:
        choices = [self._choice(client) for client in who]
        if self._machines is None or not who or any(choice.cut == 0 for choice in choices):
            return {}
        load = run_workload(self._config, self._layers, self._machines, self._examples, clients=who)
        played = virtual_round(load.at_round(self._done + 1), choices, self._now_s)
        return dict(zip(who, played.device_s, strict=True))

    def row(self, clients: Sequence[int], took: Mapping[int, float] | None = None) -> Row:
        """Return the columns of a round, and tell the policy what was measured.

        Args:
            clients: Who took part.
            took: Seconds of an iteration of those that measured it; an `Offload` knows better.

        Returns:
            ``virtual_s``, ``idle_device``, ``idle_up``, ``idle_edge``, ``idle_down`` and
            ``prediction_error``; nothing where nothing can be told. Where a policy decides,
            ``decide_ms`` and ``probe_bytes``, and ``regret`` where the oracle knows the truth.
        """
        self._done, self.devices = self._done + 1, {}
        who = sorted(clients)
        choices = [self._choice(client) for client in who]
        if self._machines is None or not who or any(choice.cut == 0 for choice in choices):
            return {}
        load = run_workload(self._config, self._layers, self._machines, self._examples, clients=who)
        load = load.at_round(self._done)
        anew = self._config.mobility.mode == "restart"
        ways = ways_of(self._offload, self._done, who, anew=anew)
        played = virtual_round(load, choices, self._now_s, ways=ways)
        expected = self._expected(load, choices, who)
        self.last = ModelledRound(
            played,
            tuple(f"device {c} {_machine(d)}" for c, d in zip(who, load.devices, strict=True)),
            tuple(edge.workers for edge in load.edges),
            self._real,
        )
        row: Row = {f"idle_{kind}": played.idle[kind] for kind in RESOURCES}
        if self._real:
            if self._offload is not None:
                took = {client: self._offload.seen_of(client).iteration_s for client in who}
            medians = {c: median(e[1:]) for c, e in zip(who, expected, strict=True) if e[1:]}
            errors = errors_of(medians, took or {})
        else:
            errors = _errors_on_the_clock(load, choices, played, expected)
            for client, seen in zip(who, played.seen, strict=True):
                if self._offload is not None:
                    self._offload.observe(client, dataclasses.asdict(seen))
        judged = self._judged(load, choices, played, expected, who)
        if self._offload is not None and (self._config.mobility.active or self._offload.orders):
            note_predictions(self._offload.totals.moves, self._done, who, played, ways)
            judged |= {"virtual_pause_s": sum(played.paused_s)}
        self._now_s += played.seconds
        told = {"prediction_error": float(median(errors))} if errors else {}
        return {"virtual_s": played.seconds, **row, **told, **judged}

    # --- how good the policy was ------------------------------------------------------------------

    def _told_the_truth(self) -> Oracle | None:
        """Return the oracle; None where it is not wanted, or where the truth is not known."""
        decides = self._offload is not None and self._config.run.oracle
        decides = decides and not self._config.mobility.active  # it knows no places
        if not decides or (self._real and not self._emulated):
            return None
        limit = self._config.client.max_model_bytes
        forced = choosable(self._config.policy).offload or (
            limit is not None and sum(state_bytes(self._layers)) > limit
        )
        return Oracle(offload=forced)

    def _judged(
        self,
        load: Workload,
        choices: Sequence[Assignment],
        played: VirtualRound,
        expected: Sequence[Sequence[float]],
        who: Sequence[int],
    ) -> Row:
        """Return the columns about a decision, and keep what is modelled of each device."""
        if self._offload is None or self._offload.decided is None:
            return {}
        optimum, row = None, dict[str, Any]()
        if self._oracle is not None:
            free = self._free(load)
            own = played if free.exchange else virtual_round(free, choices, self._now_s)
            optimum = self._oracle.best(free, self._now_s, (choices, own))
            row = {} if optimum is None else {"regret": regret(own.seconds, optimum.seconds)}
        exchange = load.exchange_s()
        for k, (client, device) in enumerate(zip(who, load.devices, strict=True)):
            rates = device.network.at(self._now_s, played.device_s[k])
            self.devices[client] = DeviceRound(
                up_mbit_s=_mbit_s(rates.up_bits_s),
                down_mbit_s=_mbit_s(rates.down_bits_s),
                predicted_s=sum(expected[k]) + float(exchange[k, choices[k].cut]),
                measured_s=None if self._real else played.device_s[k],
                **best_of(optimum, k),
            )  # fmt: skip
        decide_ms = 1e3 * self._offload.decided.seconds
        return row | {"decide_ms": decide_ms, "probe_bytes": probe_bytes(self._offload)}

    def _free(self, load: Workload) -> Workload:
        """Return a workload with all that the oracle may choose, and the time that counts."""
        options = choosable(self._config.policy)
        pieces = pieces_of(self._config, options)
        exchange = load.exchange and not self._emulated
        return dataclasses.replace(
            load, codecs=options.codec, micro_batches=pieces, exchange=exchange
        )

    def _choice(self, client: int) -> Assignment:
        pieces = self._config.schedule.micro_batches
        if self._offload is None or client not in self._offload.assigned:
            return Assignment(len(self._layers), micro_batches=pieces)
        a = self._offload.assigned[client]
        edge = a.edge % len(self._offload.fleet.edges)
        return dataclasses.replace(a, edge=edge, micro_batches=self._offload.pieces_of(a))

    def _expected(
        self, load: Workload, choices: list[Assignment], who: list[int]
    ) -> list[list[float]]:
        """Return the seconds of iterations that the policy expected, or the fleet file gives."""
        if self._offload is not None and isinstance(self._offload.policy, Predicts):
            made = self._offload.policy.predicted(self._offload.policy_state, who)
            return iterations_of(load, made.iteration_s, made.rest_s)
        return predicted_iterations(load, choices)


def _errors_on_the_clock(
    load: Workload,
    choices: Sequence[Assignment],
    played: VirtualRound,
    expected: Sequence[Sequence[float]],
) -> list[float]:
    """Return by how much of its round each device was expected otherwise; without its pauses."""
    exchange = load.exchange_s()
    return [
        abs((sum(seconds) + exchange[k, choice.cut]) / (whole - still) - 1)
        for k, (seconds, choice, whole, still) in enumerate(
            zip(expected, choices, played.device_s, played.paused_s, strict=True)
        )
        if whole > still
    ]


def errors_of(expected: Mapping[int, float], measured: Mapping[int, float]) -> list[float]:
    """Return by how much of what was measured expectations were off, where something was.

    >>> errors_of({0: 1.25, 1: 1.0, 2: 1.0}, {0: 1.0, 1: 2.0, 2: 0.0})
    [0.25, 0.5]
    """
    return [
        abs(expected[client] / seconds - 1)
        for client, seconds in measured.items()
        if seconds > 0 and client in expected
    ]


def _mbit_s(bits_s: float) -> float | None:
    return bits_s / 1e6 if bits_s < math.inf else None


def _machine(device: Device) -> str:
    return device.costs.name.rpartition(".")[2]


def virtual_totals(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of a run from the rows of its rounds; empty if none was timed.

    Returns:
        ``virtual_s`` of all rounds together, ``idle`` by kind, weighted by time, and
        ``prediction_error``, the median. Where a policy decides, ``regret``, the mean,
        ``decide_ms``, the median, and ``probe_bytes``, the sum.
    """
    timed = [row for row in rounds if isinstance(row.get("virtual_s"), float)]
    if not timed:
        return {}
    seconds = sum(row["virtual_s"] for row in timed)
    weight = {id(row): row["virtual_s"] / seconds if seconds else 1 / len(timed) for row in timed}
    idle = {kind: sum(weight[id(row)] * row[f"idle_{kind}"] for row in timed) for kind in RESOURCES}
    errors = [row["prediction_error"] for row in timed if "prediction_error" in row]
    return {
        "virtual_s": seconds,
        "idle": idle,
        "prediction_error": median(errors) if errors else None,
        **_decided_totals(timed),
    }


def _decided_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ways: Mapping[str, Callable[[list[float]], float]] = {
        "regret": fmean, "decide_ms": median, "probe_bytes": lambda sizes: int(sum(sizes)),
    }  # fmt: skip
    found = {name: [row[name] for row in rows if name in row] for name in ways}
    return {name: way(found[name]) for name, way in ways.items() if found[name]}
