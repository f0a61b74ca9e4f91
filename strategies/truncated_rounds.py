"""Truncated rounds: what the steps of an agent's training are on the real clients of a run.

A device is sent its part of the model and an assignment as for training, trains a few mini-batches,
with its edge if it has a cut, and answers what it has measured. No weights come back, sessions are
released, and neither model nor optimizer states nor draws of the run that follows know of it: draws
are functions of their address, and devices keep nothing between messages (Wu et al., "FedAdapt",
IEEE IoT-J 9(21), 2022).

Where time is not real, the virtual clock says what the devices would have measured.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsys.config import Config
from fedsys.data import Dataset
from fedsys.errors import FedsysError, RuntimeFailure
from fedsys.models.layers import LayeredModel
from fedsys.offload.fleet import Fleet
from fedsys.planning.assignment import Assignment
from fedsys.planning.hardware import hardware
from fedsys.planning.learning.client_rounds import Clients
from fedsys.planning.learning.scenarios import Scenario
from fedsys.planning.learning.view import Times
from fedsys.planning.options import run_workload
from fedsys.planning.resources import Observation
from fedsys.planning.virtual_clock import virtual_round
from fedsys.transport.messages import (
    ARRAYS,
    CONFIG,
    OBSERVATION,
    TRUNCATED,
    TRUNCATED_ROUND,
    Outcome,
    Settings,
    Truncated,
    read,
    written,
)
from strategies.around import find
from strategies.message_halves import with_pieces
from strategies.model_division import ModelDivision
from strategies.offload import Offload
from strategies.policies.fedadapt import FedAdaptPolicy
from strategies.policies.policy import OffloadPolicy
from strategies.real_time import is_real
from strategies.roster import Roster
from strategies.split_sessions import SplitSessions

ROUND = 1
"""The round as which they are carried out: its learning rate, its network, its draws."""

_log = logging.getLogger("fedsys.offload")

Seen = Mapping[int, Observation]


class TruncatedRounds:
    """Carries the steps of episodes out (`fedsys.planning.learning.environment.Rounds`).

    A device belongs to an episode if it answered at its beginning. What is known of its link is
    what was last measured of it.

    Args:
        base: The fleet and model of the run; tells what is done at a cut.
        clients: Carry them out.
        forced: Whether a device may not hold the whole model.

    Attributes:
        shares: Device-side share of the work at each legal cut.
    """

    def __init__(
        self,
        base: Scenario,
        clients: Clients,
        *,
        forced: bool = False,
    ) -> None:
        self.shares = base.shares
        self._base, self._all = base, clients
        self._most = len(base.shares) - (2 if forced else 1)
        self._bit_s: dict[int, tuple[float, float]] = {}
        self._clients: list[int] = []

    def begin(self, random: np.random.Generator) -> Times:
        """Measure the devices without offloading; there is nothing to draw.

        Raises:
            RuntimeFailure: No client answered.
        """
        clients = sorted(self._all.begin())
        seen = self._seen(clients, [len(self.shares) - 1] * len(clients))
        self._clients = sorted(seen)
        return self._times({client: self._alone(got) for client, got in seen.items()})

    def carry_out(self, picked: Sequence[int]) -> Times:
        """Measure them at cuts, by index.

        Raises:
            RuntimeFailure: No client answered.
        """
        return self._times(self._seen(self._clients, picked))

    def _seen(self, clients: Sequence[int], picked: Sequence[int]) -> Seen:
        cuts = [min(cut, self._most) for cut in picked]
        told = self._all.carry_out(
            {c: self._base.assignment(c, cut) for c, cut in zip(clients, cuts, strict=True)}
        )
        seen = {client: got for client, got in told.items() if got.iteration_s > 0}
        if not seen:
            raise RuntimeFailure(
                f"truncated round: none of {len(clients)} clients measured anything; "
                "see the log for what they said, or train the agent on the timeline "
                "(policy.training.where=timeline)"
            )
        for client, got in seen.items():
            up, down = self._bit_s.get(client, (0.0, 0.0))
            self._bit_s[client] = (got.up_bit_s or up, got.down_bit_s or down)
        return seen

    def _alone(self, got: Observation) -> Observation:
        """Return what it would be with the whole model, if a device may not hold that."""
        share = self.shares[self._most]
        if share == 1.0 or not (got.compute_s > 0 and share > 0):
            return got
        return dataclasses.replace(got, iteration_s=got.compute_s / share)

    def _times(self, seen: Seen) -> Times:
        seconds = [
            seen[client].iteration_s if client in seen else np.nan for client in self._clients
        ]
        bits = np.array([self._bit_s.get(client, (0.0, 0.0)) for client in self._clients])
        slower = bits.max(axis=1)
        rates = np.divide(1e-6, slower, out=np.zeros_like(slower), where=slower > 0)
        return Times(np.array(seconds), rates, self._base.crossing_bits * bits.sum(axis=1))


class RealClients:
    """Has clients of a run train a few mini-batches through its grid.

    Args:
        config: The run.
        grid: Reaches the clients.
        roster: Who is there.
        fleet: The edge servers.
        division: Divides the model at a cut.
        arrays: The model with which the run begins.
        iterations: Mini-batches.
        probe_bytes: Bytes each way with which those that train alone measure their links.
    """

    def __init__(
        self,
        config: Config,
        grid: Grid,
        roster: Roster,
        fleet: Fleet,
        division: ModelDivision,
        arrays: ArrayRecord,
        iterations: int,
        probe_bytes: int = 0,
    ) -> None:
        self._probe_bytes = probe_bytes
        self._config, self._grid, self._roster, self._fleet = config, grid, roster, fleet
        self._sessions = SplitSessions(fleet, division)
        self._whole_cut, self._arrays, self._iterations = len(division.layers), arrays, iterations

    def begin(self) -> list[int]:
        """Return the clients that are there, and reach edges again that were lost."""
        self._fleet.revive()
        return list(self._roster.refresh(self._grid))

    def carry_out(self, assigned: Mapping[int, Assignment]) -> dict[int, Observation]:
        """Return what the clients have seen that answered; others are left out, and that is said.

        Args:
            assigned: What each client does.
        """
        nodes, messages = self._roster.refresh(self._grid), list[Message]()
        for client, assignment in assigned.items():
            if client in nodes and (made := self._message(client, nodes[client], assignment)):
                messages.append(made)
        try:
            replies = list(
                self._grid.send_and_receive(messages, timeout=self._config.runtime.timeout_s)
            )
        finally:
            self._sessions.end()
            self._sessions.log_recoveries(0)
        clients = {
            message.metadata.message_id: self._roster.partition_of(message.metadata.dst_node_id)
            for message in messages
        }
        seen = {}
        for reply in replies:
            client = clients[reply.metadata.reply_to_message_id]
            if got := _observation(client, reply):
                seen[client] = got
        for client in assigned.keys() - seen.keys():
            _log.warning("truncated round: client %d is left out", client)
        return seen

    def _message(self, client: int, node: int, assignment: Assignment) -> Message | None:
        """Return what a client is sent; None if no edge takes its session."""
        content = RecordDict(
            {
                ARRAYS: self._arrays,
                CONFIG: ConfigRecord(written(Settings(ROUND))),
                TRUNCATED: ConfigRecord(written(Truncated(self._iterations))),
            }
        )
        pieces, size = assignment.micro_batches, self._config.client.batch_size
        message = Message(with_pieces(content, pieces, size), node, TRUNCATED_ROUND)
        if assignment.cut < self._whole_cut:
            try:
                self._sessions.open(message, client, assignment, ROUND)
            except FedsysError as error:
                _log.warning("truncated round: client %d: %s", client, error)
                return None
        else:
            self._sessions.have_measured(message, client, self._probe_bytes)
        return message


def _observation(client: int, reply: Message) -> Observation | None:
    """Return what a client has seen; None if it failed, which is said."""
    if reply.has_error():
        _log.warning("truncated round: client %d: %s", client, reply.error.reason)
        return None
    told = reply.content.config_records[OBSERVATION]
    if stranded := read(Outcome, told).stranded:
        _log.warning("truncated round: client %d: %s", client, stranded)
        return None
    return Observation.of(told)


class ModelledClients:
    """Replaces what clients measured by what the virtual clock says, where time is not real.

    The clock stands at 0 when an episode begins, as when a run does.

    Args:
        config: The run.
        layers: Its model.
        iterations: Mini-batches of a round.
        inner: The clients.
    """

    def __init__(
        self,
        config: Config,
        layers: LayeredModel,
        iterations: int,
        inner: Clients,
    ) -> None:
        self._config, self._layers, self._inner = config, layers, inner
        self._examples = iterations * config.client.batch_size
        self._machines, self._now_s = hardware(config, layers), 0.0

    def begin(self) -> Sequence[int]:
        """Return the clients that are there."""
        self._now_s = 0.0
        return self._inner.begin()

    def carry_out(self, assigned: Mapping[int, Assignment]) -> Seen:
        """Have clients train; return what was seen of those that answered."""
        seen = self._inner.carry_out(assigned)
        if self._machines is None or not seen:
            return seen
        who = sorted(seen)
        load = run_workload(
            self._config, self._layers, self._machines, [self._examples], clients=who
        )
        load = dataclasses.replace(load, epochs=1).at_round(ROUND)
        played = virtual_round(load, [assigned[client] for client in who], self._now_s)
        self._now_s += played.seconds
        return {
            client: dataclasses.replace(seen[client], **dataclasses.asdict(measured))
            for client, measured in zip(who, played.seen, strict=True)
        }


def practise(
    strategy: Strategy, grid: Grid, arrays: ArrayRecord, config: Config, dataset: Dataset
) -> None:
    """Train the agent of a run on its clients, if its policy waits for that.

    Args:
        strategy: Of the run; a layer of it offloads.
        grid: Reaches the clients.
        arrays: The model with which the run begins.
        config: The run.
        dataset: Tells the shape of the inputs and the number of classes.

    Raises:
        RuntimeFailure: No client answered.
        ModelError: The extra ``rl`` is not installed.
    """
    offload = find(strategy, Offload)
    policy: OffloadPolicy | None = None if offload is None else offload.policy
    if offload is None or not isinstance(policy, FedAdaptPolicy) or policy.ready:
        return
    division = ModelDivision(config, dataset)
    count = policy.iterations
    clients: Clients = RealClients(
        config, grid, offload.roster, offload.fleet, division, arrays, count,
        policy.probe_size if is_real(config) else 0,
    )  # fmt: skip
    if not is_real(config):
        clients = ModelledClients(config, division.layers, count, clients)
    policy.practise(clients, _steps_of)


def _steps_of(base: Scenario, clients: Clients, forced: bool) -> TruncatedRounds:
    return TruncatedRounds(base, clients, forced=forced)
