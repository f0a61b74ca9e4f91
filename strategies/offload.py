"""Split training as a Flower strategy that wraps any other: the inner one sees whole models only.

On the way out, `Offload` gives each device the units before its cut and opens a session with the
others on an edge server; on the way back it joins the two halves by name. What else belongs to a
client (optimizer state, FedProx's weight) is divided and joined with them.

If a device lost its edge and no other one took the session over, its round is repeated, with the
same draws: on an edge that is left, else on the device alone. If it is too small for the whole
model it is left out of the round, and that is said.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsys.config import Config
from fedsys.data import Dataset
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.offload.fleet import Fleet
from fedsys.planning.leakage import leakage_limit
from fedsys.planning.mobility.network_led import WatchedLinks
from fedsys.planning.moves import MobilitySource, Move
from fedsys.planning.ordering import Order, in_words
from fedsys.planning.resources import Event
from fedsys.runtime.grid_around import leave_out
from fedsys.transport.messages import OBSERVATION
from strategies.around import Around
from strategies.edge_loss import Repeats, too_small
from strategies.journeys import Journeys, begun, gone_on
from strategies.message_halves import with_pieces
from strategies.model_division import ModelDivision
from strategies.offload_totals import OffloadTotals
from strategies.policies.policy import (
    Assignment,
    MeasuresLinks,
    Observation,
    OffloadPolicy,
    OrdersMoves,
    PolicyState,
)
from strategies.real_time import is_real
from strategies.returns import Returns
from strategies.roster import Roster
from strategies.split_sessions import Sent, SplitSessions

_log = logging.getLogger("fedsys.offload")


@dataclass(frozen=True)
class Decided:
    """What a policy knew when it decided on a round.

    Attributes:
        round: The round, from 1.
        seen: What was last seen of each of its clients.
        seconds: That deciding took.
    """

    round: int
    seen: Mapping[int, Observation]
    seconds: float


class Offload(Around):
    """Wraps a strategy so that its clients train together with edge servers.

    Args:
        inner: Sees whole models, whole optimizer states, and the true numbers of examples.
        fleet: The edge servers.
        policy: Decides on cuts and edges.
        config: The run.
        roster: Who is there.
        dataset: Tells the shape of an example, and what is learned of it.
        mobility: Where devices are; None: wherever the policy wants them.

    Attributes:
        totals: For the result of the run.
        lost: Clients left out of the last round, with the reason.
        traces: What each device did in the last round, with its edge.
        assigned: What the policy said for the clients of the last round.
        decided: What it had seen of them, and what deciding took; None before the first round.
        mobility: Where devices are; None: wherever the policy wants them.
        journeys: Where they were in the last round, and where they went.
        orders: Moves that the policy ordered in it, by client.
    """

    STATE = ("totals", "_policy_state", "_seen")

    def __init__(
        self,
        inner: Strategy,
        fleet: Fleet,
        policy: OffloadPolicy,
        *,
        config: Config,
        roster: Roster,
        dataset: Dataset,
        mobility: MobilitySource | None = None,
    ) -> None:
        super().__init__(inner)
        self.fleet, self.policy, self.roster = fleet, policy, roster
        self.totals, self.lost = OffloadTotals(), dict[int, str]()
        self.traces: dict[int, list[Event]] = {}
        self.assigned: Mapping[int, Assignment] = {}
        self.decided: Decided | None = None
        self._config, self.mobility, self.journeys = config, mobility, Journeys()
        self.orders: Mapping[int, Order] = {}
        self._division = ModelDivision(config, dataset)
        self._layers = self._division.layers
        if config.mobility.active and config.mobility.cut is not None:
            self._division.check_cut(config.mobility.cut)
        restart = config.mobility.mode == "restart"
        self._sessions = SplitSessions(fleet, self._division, restart=restart)
        self._repeats = Repeats(config, roster, fleet, self._sessions)
        self._limit = leakage_limit(config, self._layers)
        self._policy_state = policy.init(self._layers, range(config.num_clients))
        self._seen: dict[int, dict[str, Any]] = {}  # observations as checkpoints hold them
        self._measuring: Mapping[int, int] = {}
        self._grid: Grid | None = None
        self._moves: Mapping[int, tuple[Move, ...]] = {}
        self._real = is_real(config)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a session for each device with a cut and send it its half.

        Where no edge server is left, devices train alone, and those that are too small are left
        out.

        Raises:
            FedsysError: No edge server takes a session, or no device is left.
        """
        self._grid, self.lost = grid, {}
        self._sessions.end()
        self.fleet.revive()
        messages = self._by_client(self.inner.configure_train(server_round, arrays, config, grid))
        nodes = {client: message.metadata.dst_node_id for client, message in messages.items()}
        leave_out(grid, lambda: self._absent(nodes))
        seen = {client: self.seen_of(client) for client in messages}
        began = time.perf_counter()
        self._policy_state, self.assigned = self.policy.plan(self._policy_state, seen)
        self._check_leakage()
        self.decided = Decided(server_round, seen, time.perf_counter() - began)
        if isinstance(self.policy, MeasuresLinks):
            self._measuring = self.policy.to_measure(self._policy_state, list(messages))
        for client in messages:  # what it does not tell of this round is not known
            self._seen.pop(client, None)
        self._set_out(server_round, list(messages))
        for client, message in messages.items():
            if client not in self.lost:
                self._divide(message, client, self.assigned[client], server_round)
        if messages and len(self.lost) == len(messages):
            raise RuntimeFailure(f"client {min(self.lost)}: {self.lost[min(self.lost)]}")
        return [message for client, message in messages.items() if client not in self.lost]

    def _absent(self, nodes: Mapping[int, int]) -> dict[int, str]:
        """Return the nodes of devices that left and arrived nowhere, with the reason."""
        away_s = {
            client: sum(move.away_s for move in moves) for client, moves in self._moves.items()
        }
        missing = self.fleet.missing(away_s)
        return {nodes[client]: reason for client, reason in missing.items() if client in nodes}

    def _set_out(self, round_: int, clients: list[int]) -> None:
        """Put devices where they are, and leave those out that wait for an edge server for good."""
        if isinstance(self.mobility, WatchedLinks):
            self.mobility.ended = self.totals.moves
        place = self.mobility, round_, clients, self.fleet.edges
        self.journeys = begun(*place)
        self.assigned = self.journeys.placed(self.assigned, len(self._layers))
        if self._config.mobility.unreachable == "wait":
            reason = "no edge server is in its reach any more"
            self.lost |= dict.fromkeys(self.journeys.unreached, reason)
        self.journeys = gone_on(self.journeys, *place)
        self._order(round_, clients)
        self._moves = self.journeys.moves if self._real else self.journeys.at_once()

    def _order(self, round_: int, clients: list[int]) -> None:
        """Have the policy order moves of devices that mobility does not place."""
        self.orders = {}
        if not isinstance(self.policy, OrdersMoves) or len(self.fleet.edges) < 2:
            return
        free = [client for client in clients if client not in self.journeys.places]
        self.orders = self.policy.orders(self._policy_state, clients, free, round_)
        for client, order in self.orders.items():
            why = in_words(order, self.fleet.edges[order.move.edge].name)
            _log.info("round %d: client %d %s", round_, client, why)
        self.journeys = self.journeys.with_orders(self.orders.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Join what devices and edges have, repeat what failed, and have the whole aggregated."""
        done: dict[int, Message] = {}
        again: dict[int, Sent] = {}
        returns = Returns(self._division, self._sessions, self.totals, self._seen, self.assigned)
        self.traces = returns.traces
        for reply in replies:
            client = self.roster.partition_of(reply.metadata.src_node_id)
            sent = self._sessions.take(client)
            if returns.joined(client, reply, sent):
                done[client] = reply
            elif sent is not None:
                again[client] = sent
        if again and self._config.privacy.secure:  # with new noise it would be another release
            self.lost |= dict.fromkeys(again, "its edge was lost, and privacy.secure repeats none")
        elif again and self._grid is not None:
            done |= self._repeats.joined(self._grid, again, server_round, returns, self.lost)
        self._sessions.end()
        self._sessions.log_recoveries(server_round)
        ordered = [done[client] for client in sorted(done)]
        return self.inner.aggregate_train(server_round, ordered)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open sessions for forward passes only."""
        self._grid = grid
        leave_out(grid, dict)
        self._sessions.end()
        inner = self.inner.configure_evaluate(server_round, arrays, config, grid)
        messages = self._by_client(inner)
        seen = {client: self.seen_of(client) for client in messages}
        _, plan = self.policy.plan(self._policy_state, seen)
        return [
            message
            for client, message in messages.items()
            if plan[client].cut == len(self._layers)
            or self._sessions.open_if_any(message, client, plan[client], server_round)
            or not too_small(self._config, message.content)
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Release the sessions, have scored alone what lost its edge, and pass the scores on."""
        valid: dict[int, Message] = {}
        again: dict[int, Sent] = {}
        for reply in replies:
            client = self.roster.partition_of(reply.metadata.src_node_id)
            sent = self._sessions.take(client)
            if OBSERVATION in reply.content:
                del reply.content[OBSERVATION]
            if reply.content.metric_records:
                valid[client] = reply
            elif sent is not None:
                again[client] = sent
            if sent is not None:
                self._sessions.release(sent)
        if again and self._grid is not None:
            for reply in self._repeats.scored_alone(self._grid, again):
                valid[self.roster.partition_of(reply.metadata.src_node_id)] = reply
        self._sessions.end()
        ordered = [valid[client] for client in sorted(valid)]
        return self.inner.aggregate_evaluate(server_round, ordered)

    @property
    def policy_state(self) -> PolicyState:
        """What the policy remembers."""
        return self._policy_state

    def observe(self, client: int, measured: Mapping[str, float]) -> None:
        """Let the policy see other times of a client than those that were measured here.

        They are those of whole gradients, whatever was sent of them.
        """
        seen = dataclasses.asdict(self.seen_of(client)) | {"gradient_share": 0.0}
        self._seen[client] = seen | dict(measured)

    def seen_of(self, client: int) -> Observation:
        """Return what was last seen of a client."""
        return Observation(**self._seen.get(client, {}))

    def _check_leakage(self) -> None:
        """Refuse assignments at which more leaks than the run allows.

        Raises:
            ConfigError: The policy chose such a cut.
        """
        cuts = {a.cut for a in self.assigned.values() if a.cut < len(self._layers)}
        if cuts and self._config.mobility.active and self._config.mobility.cut is not None:
            cuts.add(self._config.mobility.cut)
        if self._limit is not None and (why := self._limit.reason(sorted(cuts))):
            raise ConfigError.of(
                "policy.kind", self._config.policy.get("kind"), f"chose a cut that leaks: {why}",
                "another policy.cut, or a policy that plans",
            )  # fmt: skip

    def pieces_of(self, assignment: Assignment) -> int:
        """Return the pieces of a mini-batch: those of the schedule where nothing else is said."""
        return assignment.micro_batches or self._config.schedule.micro_batches

    def _by_client(self, messages: Iterable[Message]) -> dict[int, Message]:
        """Return messages by partition id: strategies shuffle, and edges fill up in this order."""
        found = {self.roster.partition_of(m.metadata.dst_node_id): m for m in messages}
        return dict(sorted(found.items()))

    def _divide(self, message: Message, client: int, assignment: Assignment, round_: int) -> None:
        """Make of a message what a device is sent that trains as it is assigned."""
        more = self.manner_of(client, assignment)
        self.totals.note_cut(client, self._layers, assignment.cut, **more)
        message.content = with_pieces(
            message.content, assignment.micro_batches, self._config.client.batch_size
        )
        whole = assignment.cut == len(self._layers)
        if whole and client in self._measuring:
            self._sessions.have_measured(message, client, self._measuring[client])
        moves, source = self._moves.get(client, ()), self.mobility
        armed = not isinstance(source, WatchedLinks) or source.is_armed(client)
        if whole or self._sessions.open_if_any(message, client, assignment, round_, moves, armed):
            return
        if reason := too_small(self._config, message.content):
            self.lost[client] = reason
            return
        entry = {"what": "alone", "from": "edge", "to": "device", "repeated_steps": 0}
        self.totals.note(round_, client, {**entry, "seconds": 0.0})

    def manner_of(self, client: int, assignment: Assignment) -> dict[str, Any]:
        """Return what belongs to a cut, for whoever reads of it: machine, edge, pieces, codec."""
        machines, edges = self._config.fleet.devices, self.fleet.edges
        more = {"machine": machines[client % len(machines)]} if machines else {}
        if assignment.cut == len(self._layers):
            return more
        up, down = assignment.codec_up, assignment.codec_down
        return more | {
            "edge": edges[assignment.edge % len(edges)].name,
            "micro_batches": self.pieces_of(assignment),
            "codec": up if up == down else f"{up}/{down}",
        }
