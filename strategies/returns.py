"""What devices send back in a round: joined with what their edges have, and looked at."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import Message

from fedsys.errors import FedsysError
from fedsys.planning.moves import handovers_of
from fedsys.planning.resources import Event
from fedsys.runs.tracing import unpack
from fedsys.transport.messages import ARRAYS, OBSERVATION, TRACE, Outcome, TraceRecord, read
from strategies.model_division import ModelDivision
from strategies.offload_totals import OffloadTotals
from strategies.policies.policy import Assignment, Observation
from strategies.split_sessions import Sent, SplitSessions

_log = logging.getLogger("fedsys.offload")


class Returns:
    """Takes in the replies of one round.

    Args:
        division: Joins what it divided.
        sessions: Those of the round.
        totals: What is counted over the run.
        seen: By client, observations as checkpoints hold them; changed here.
        assigned: What the policy said for the clients of the round.

    Attributes:
        traces: What each device did, with its edge.
        totals: As given.
    """

    def __init__(
        self,
        division: ModelDivision,
        sessions: SplitSessions,
        totals: OffloadTotals,
        seen: dict[int, dict[str, Any]],
        assigned: Mapping[int, Assignment],
    ) -> None:
        self.traces: dict[int, list[Event]] = {}
        self._division, self._sessions, self.totals = division, sessions, totals
        self._seen, self._assigned = seen, assigned

    def steps_of(self, client: int) -> int:
        """Return the steps that a client did, as far as is known."""
        return Observation(**self._seen.get(client, {})).steps

    def joined(self, client: int, reply: Message, sent: Sent | None) -> bool:
        """Join the halves of a client in its reply; return whether the whole model is there."""
        self._take_trace(client, reply)
        if sent is None:
            self._observe_alone(client, reply)
            return True
        seen = reply.content.config_records[OBSERVATION]
        del reply.content[OBSERVATION]
        observation, outcome = Observation.of(seen), read(Outcome, seen)
        self._observe(client, observation, outcome, sent.spec.round)
        try:
            if outcome.stranded:
                _log.warning("client %d: %s", client, outcome.stranded)
                return False
            edge = self._sessions.collect(sent, observation.steps, outcome.edge)
        except FedsysError as error:
            _log.warning("client %d, round %d: %s", client, sent.spec.round, error)
            return False
        finally:
            self._sessions.release(sent)
        self.totals.edge_steps += edge.step
        self._division.join(reply.content, edge, like=sent.whole.array_records[ARRAYS])
        return True

    def _observe(
        self, client: int, observation: Observation, outcome: Outcome, round_: int
    ) -> None:
        self._seen[client] = dataclasses.asdict(observation)
        self.totals.bytes_up += observation.bytes_up
        self.totals.bytes_down += observation.bytes_down
        for entry in json.loads(outcome.recoveries):
            for end in ("from", "to"):
                entry[end] = self._sessions.edge_name(str(entry[end]))
            self.totals.note(round_, client, entry)
        for one in handovers_of(outcome.moves):
            name = self._sessions.edge_name
            moved = dataclasses.replace(one, source=name(one.source), target=name(one.target))
            self.totals.moves.append(dataclasses.asdict(moved))

    def _observe_alone(self, client: int, reply: Message) -> None:
        """Take in what a device measured with the whole model, unless another cut was planned."""
        self._seen.pop(client, None)
        if OBSERVATION in reply.content:
            if self._assigned[client].cut == len(self._division.layers):
                seen = Observation.of(reply.content.config_records[OBSERVATION])
                self._seen[client] = dataclasses.asdict(seen)
            del reply.content[OBSERVATION]

    def _take_trace(self, client: int, reply: Message) -> None:
        if reply.has_content() and TRACE in reply.content:
            trace = read(TraceRecord, reply.content.config_records[TRACE])
            self.traces[client] = unpack(trace.events)
            del reply.content[TRACE]
