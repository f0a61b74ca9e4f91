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
import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsys.config import Config
from fedsys.errors import ConfigError, FedsysError, RuntimeFailure, SessionError
from fedsys.models.layered import LayeredModel, fractions
from fedsys.offload.fleet import Fleet
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.runs.tracing import Event, unpack
from fedsys.training.federation import layered_model
from fedsys.training.part import names_between
from fedsys.transport import records
from fedsys.transport.security import new_token
from strategies.message_halves import halved, joined, with_pieces, without
from strategies.offload_totals import Totals
from strategies.policies.policy import (
    OBSERVATION,
    Assignment,
    Observation,
    OffloadPolicy,
    PolicyState,
)
from strategies.roster import Roster

ARRAYS, OPTIMIZER, MASKS = "arrays", "optimizer", "masks"
ASSIGNMENT, TRACE = "assignment", "trace"

_log = logging.getLogger("fedsys.offload")


@dataclass
class _Sent:
    """A device that trains with an edge in this round."""

    whole: RecordDict
    spec: SessionSpec


class Offload(Strategy):
    """Wraps a strategy so that its clients train together with edge servers.

    Args:
        inner: Sees whole models, whole optimizer states, and the true numbers of examples.
        fleet: The edge servers.
        policy: Decides on cuts and edges.
        config: The run.
        roster: Who is there.
        input_shape: ``(C, H, W)`` of one example.
        num_classes: Number of classes.

    Attributes:
        totals: For the result of the run.
        lost: Clients left out of the last round, with the reason.
        traces: What each device did in the last round, with its edge.
        assigned: What the policy said for the clients of the last round.
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
        input_shape: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        self.inner, self.fleet, self.policy, self.roster = inner, fleet, policy, roster
        self.totals, self.lost = Totals(), dict[int, str]()
        self.traces: dict[int, list[Event]] = {}
        self.assigned: Mapping[int, Assignment] = {}
        self._config, self._shape, self._classes = config, input_shape, num_classes
        self._layers: LayeredModel = layered_model(config, input_shape, num_classes)
        self._policy_state = policy.init(self._layers, range(config.num_clients))
        self._seen: dict[int, dict[str, Any]] = {}  # observations as checkpoints hold them
        self._sent: dict[int, _Sent] = {}
        self._wholes: dict[int, tuple[RecordDict, Assignment]] = {}
        self._grid: Grid | None = None
        self._names: dict[tuple[int, ...], list[set[str]]] = {}
        self._edge_at = {edge.for_devices: edge.name for edge in fleet.edges}

    def summary(self) -> None:
        """Log the settings of the inner strategy."""
        self.inner.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a session for each device with a cut and send it its half.

        Where no edge server is left, devices train alone, and those that are too small are left
        out.

        Raises:
            FedsysError: No edge server takes a session, or no device is left.
        """
        self._grid, self._sent, self._wholes, self.lost = grid, {}, {}, {}
        self.fleet.revive()
        messages = self._ordered(self.inner.configure_train(server_round, arrays, config, grid))
        clients = [self._client(message) for message in messages]
        seen = {client: self.seen_of(client) for client in clients}
        self._policy_state, plan = self.policy.plan(self._policy_state, seen)
        self.assigned = plan
        for client in clients:  # what it does not tell of this round is not known
            self._seen.pop(client, None)
        for client, message in zip(clients, messages, strict=True):
            assignment = plan[client]
            self._note_cut(client, assignment.cut)
            message.content = with_pieces(
                message.content, assignment.micro_batches, self._config.client.batch_size
            )
            if assignment.cut == len(self._layers):
                continue
            if self._with_edge(message, client, assignment, server_round):
                continue
            if self._fits(client, message.content):
                entry = {"what": "alone", "from": "edge", "to": "device", "repeated_steps": 0}
                self._note(server_round, client, {**entry, "seconds": 0.0})
        if messages and len(self.lost) == len(messages):
            raise RuntimeFailure(f"client {min(self.lost)}: {self.lost[min(self.lost)]}")
        return [m for c, m in zip(clients, messages, strict=True) if c not in self.lost]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Join what devices and edges have, repeat what failed, and have the whole aggregated."""
        done: dict[int, Message] = {}
        again: list[int] = []
        self.traces = {}
        for reply in replies:
            client = self.roster.partition_of(reply.metadata.src_node_id)
            if self._joined(client, reply):
                done[client] = reply
            else:
                again.append(client)
        for client, reply in self._repeat(again, server_round):
            done[client] = reply
        for sent in self._sent.values():  # of clients that never answered
            self.fleet.release(sent.spec.id)
        self._note_recoveries(server_round)
        ordered = [done[client] for client in sorted(done)]
        return self.inner.aggregate_train(server_round, ordered)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open sessions for forward passes only."""
        self._grid, self._sent = grid, {}
        messages = self._ordered(self.inner.configure_evaluate(server_round, arrays, config, grid))
        clients = [self._client(message) for message in messages]
        seen = {client: self.seen_of(client) for client in clients}
        _, plan = self.policy.plan(self._policy_state, seen)
        small = set()
        for client, message in zip(clients, messages, strict=True):
            if (
                plan[client].cut < len(self._layers)
                and not self._with_edge(message, client, plan[client], server_round)
                and self._too_small(message.content)
            ):
                small.add(client)
        return [m for c, m in zip(clients, messages, strict=True) if c not in small]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Release the sessions and pass the scores on."""
        valid = []
        for reply in replies:
            if OBSERVATION in reply.content:
                del reply.content[OBSERVATION]
            if reply.content.metric_records:
                valid.append(reply)
        for sent in self._sent.values():
            self.fleet.release(sent.spec.id)
        return self.inner.aggregate_evaluate(server_round, valid)

    def _client(self, message: Message) -> int:
        return self.roster.partition_of(message.metadata.dst_node_id)

    def _ordered(self, messages: Iterable[Message]) -> list[Message]:
        """Return messages by partition id: strategies shuffle, and edges fill up in this order."""
        return sorted(messages, key=self._client)

    # --- the way out ------------------------------------------------------------------------------

    def _with_edge(
        self, message: Message, client: int, assignment: Assignment, round_: int
    ) -> bool:
        """Offload if an edge is left, and say whether that was done.

        Raises:
            SessionError: There are edges, and none takes the session.
        """
        try:
            self._offload(message, client, assignment, round_, attempt=0)
        except SessionError:
            if self.fleet.alive:
                raise
            return False  # the last of them may have gone just now
        return True

    def _offload(
        self, message: Message, client: int, assignment: Assignment, round_: int, *, attempt: int
    ) -> None:
        """Open a session with the edge's part and leave the device's part in the message."""
        whole = message.content
        tail = self._tail_for(assignment.cut)
        settings = whole.config_records.get("config", ConfigRecord())
        spec = SessionSpec(
            id=f"r{round_}-c{client}-{attempt}-{new_token()[:8]}",
            token=new_token(),
            client=client,
            round=round_,
            first=assignment.cut,
            last=tail,
            config=self._config.text,
            input_shape=self._shape,
            num_classes=self._classes,
            micro_batches=assignment.micro_batches or self._config.schedule.micro_batches,
            proximal_mu=float(str(settings.get("proximal-mu", 0.0))),
            codec_up=assignment.codec_up,
            codec_down=assignment.codec_down,
            holder=(self._config.link.holder or "").replace("{client}", str(client)),
            replicate_every=self._config.fleet.replicate_every,
        )
        mine = self._edge_names(assignment.cut, tail)
        start = Snapshot(
            0,
            records.from_record(halved(whole, ARRAYS, mine)),
            records.from_record(halved(whole, OPTIMIZER, mine)),
            masks=records.from_record(halved(whole, MASKS, mine)),
        )
        name = self.fleet.open(spec, start, self._first_edge(assignment))
        content = records.own_copy(whole)
        for key in (ARRAYS, OPTIMIZER, MASKS):
            if key in whole.array_records:
                content[key] = without(whole, key, mine)
        content[ASSIGNMENT] = ConfigRecord(
            {
                "cut": assignment.cut,
                "tail": tail,
                "session": spec.id,
                "token": spec.token,
                "edges": self.fleet.device_addresses(name),
                "codec-up": assignment.codec_up,
                "codec-down": assignment.codec_down,
            }
        )
        message.content = content
        self._sent[client] = _Sent(whole, spec)
        self._wholes[client] = (whole, assignment)

    def _tail_for(self, cut: int) -> int:
        """Return the end of the edge's units.

        Raises:
            ConfigError: A label-private cut would leave no unit for the edge.
        """
        if not self._config.client.label_private:
            return len(self._layers)
        tail = len(self._layers) - 1  # the classifier stays on the device
        if cut >= tail:
            raise ConfigError.of(
                "policy.cut", cut, f"must be below {tail} with client.label_private=true",
                "the last unit stays on the device, and the edge would have none",
            )  # fmt: skip
        return tail

    def _edge_names(self, first: int, last: int) -> set[str]:
        cuts = (first, last)
        if cuts not in self._names:
            self._names[cuts] = names_between(self._layers, cuts)
        return self._names[cuts][1]

    # --- the way back -----------------------------------------------------------------------------

    def _joined(self, client: int, reply: Message) -> bool:
        """Join the halves of a client in its reply; return whether the whole model is there."""
        self._take_trace(client, reply)
        if (sent := self._sent.pop(client, None)) is None:
            self._observe_alone(client, reply)
            return True
        seen = reply.content.config_records[OBSERVATION]
        del reply.content[OBSERVATION]
        self._observe(client, seen, sent.spec.round)
        try:
            if seen["stranded"]:
                _log.warning("client %d: %s", client, str(seen["stranded"]))
                return False
            snapshot = self.fleet.collect(sent.spec.id)
            steps = self.seen_of(client).steps
            if snapshot.step != steps:
                raise SessionError(f"{snapshot.step} steps on the edge, {steps} on the device")
        except FedsysError as error:
            _log.warning("client %d, round %d: %s", client, sent.spec.round, error)
            return False
        finally:
            self.fleet.release(sent.spec.id)
        self.totals.edge_steps += snapshot.step
        order = list(sent.whole.array_records[ARRAYS])
        reply.content[ARRAYS] = joined(reply.content.array_records[ARRAYS], snapshot.state, order)
        if (own := reply.content.array_records.get(OPTIMIZER)) is not None:
            reply.content[OPTIMIZER] = joined(own, snapshot.optimizer, None)
        return True

    def _observe(self, client: int, seen: ConfigRecord, round_: int) -> None:
        observation = Observation.of(seen)
        self._seen[client] = dataclasses.asdict(observation)
        self.totals.bytes_up += observation.bytes_up
        self.totals.bytes_down += observation.bytes_down
        for entry in json.loads(str(seen["recoveries"])):
            for end in ("from", "to"):
                entry[end] = self._edge_at.get(str(entry[end]), entry[end])
            self._note(round_, client, entry)

    def _observe_alone(self, client: int, reply: Message) -> None:
        """Take in what a device measured with the whole model, unless another cut was planned."""
        self._seen.pop(client, None)
        if OBSERVATION in reply.content:
            if self.assigned[client].cut == len(self._layers):
                seen = Observation.of(reply.content.config_records[OBSERVATION])
                self._seen[client] = dataclasses.asdict(seen)
            del reply.content[OBSERVATION]

    @property
    def policy_state(self) -> PolicyState:
        """What the policy remembers."""
        return self._policy_state

    def told(self, client: int, measured: Mapping[str, float]) -> None:
        """Let the policy see other times of a client than those that were measured here."""
        self._seen[client] = dataclasses.asdict(self.seen_of(client)) | dict(measured)

    def seen_of(self, client: int) -> Observation:
        """Return what was last seen of a client."""
        return Observation(**self._seen.get(client, {}))

    def _take_trace(self, client: int, reply: Message) -> None:
        if reply.has_content() and TRACE in reply.content:
            self.traces[client] = unpack(_bytes(reply.content.config_records[TRACE]["events"]))
            del reply.content[TRACE]

    def _repeat(self, clients: list[int], round_: int) -> list[tuple[int, Message]]:
        """Have clients do their round again, together with an edge if one is left, else alone."""
        if not clients or self._grid is None:
            return []
        node_of = self.roster.refresh(self._grid)
        wholes = {client: self._wholes[client] for client in clients}
        messages: list[Message] = []
        began, entries = time.perf_counter(), dict[int, dict[str, Any]]()
        for client, (whole, assignment) in wholes.items():
            if client not in node_of:
                self.lost[client] = "it is not connected any more"
                continue
            message = Message(records.own_copy(whole), node_of[client], "train")
            where = self._again_with_edge(message, client, assignment, round_)
            if where or self._fits(client, whole):
                messages.append(message)
                entries[client] = {
                    "what": "repeat",
                    "from": self._first_edge(assignment),
                    "to": where or "device",
                    "repeated_steps": self.seen_of(client).steps,
                }
                _log.warning("client %d repeats round %d on the %s", client, round_, where)
        replies = self._grid.send_and_receive(messages, timeout=self._config.runtime.timeout_s)
        finished: list[tuple[int, Message]] = []
        for reply in replies:
            if reply.has_error():
                continue
            client = self.roster.partition_of(reply.metadata.src_node_id)
            if self._joined(client, reply):
                finished.append((client, reply))
                seconds = time.perf_counter() - began
                self._note(round_, client, {**entries[client], "seconds": seconds})
        for client in set(clients) - {c for c, _ in finished} - set(self.lost):
            self.lost[client] = "its edge was lost twice"
        return finished

    def _again_with_edge(
        self, message: Message, client: int, assignment: Assignment, round_: int
    ) -> str:
        if not self.fleet.alive:
            return ""
        try:
            self._offload(message, client, assignment, round_, attempt=1)
        except FedsysError as error:
            _log.warning("client %d: %s", client, error)
            return ""
        return "edge"

    def _fits(self, client: int, whole: RecordDict) -> bool:
        if not self._too_small(whole):
            return True
        self.lost[client] = (
            "no edge server is left, and the model is larger than "
            f"client.max_model_bytes={self._config.client.max_model_bytes}"
        )
        return False

    def _too_small(self, whole: RecordDict) -> bool:
        limit = self._config.client.max_model_bytes
        size = sum(len(a.data) for a in whole.array_records[ARRAYS].values())
        return limit is not None and size > limit

    # --- what is told -----------------------------------------------------------------------------

    def _note(self, round_: int, client: int, entry: Mapping[str, Any]) -> None:
        self.totals.recoveries.append({"client": client, "round": round_, **entry})

    def _first_edge(self, assignment: Assignment) -> str:
        edges = self.fleet.edges
        return edges[assignment.edge % len(edges)].name

    def _note_cut(self, client: int, cut: int) -> None:
        self.totals.cuts[str(client)] = {
            "index": cut,
            "unit": self._layers.units[cut - 1].name if cut else "",
            "device_share": fractions(self._layers)[cut - 1] if cut else 0.0,
        }

    def _note_recoveries(self, round_: int) -> None:
        for recovery in self.fleet.recoveries():
            _log.warning(
                "round %d: session of client %d moved from %s to %s, from step %d",
                round_, recovery.client, recovery.source, recovery.target or "nowhere",
                recovery.step,
            )  # fmt: skip


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""
