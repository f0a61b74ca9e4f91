"""What becomes of devices without an edge: they train alone, do a round again, or are left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsys.config import Config
from fedsys.errors import FedsysError
from fedsys.offload.fleet import Fleet
from fedsys.transport import records
from fedsys.transport.messages import ARRAYS
from strategies.returns import Returns
from strategies.roster import Roster
from strategies.split_sessions import Sent, SplitSessions

_log = logging.getLogger("fedsys.offload")

ATTEMPTS = 4
"""How many times a device begins a round at most: the first time, again, and then alone if it can.
"""


def too_small(config: Config, whole: RecordDict) -> str:
    """Return why a device cannot train the whole model; empty if it can."""
    limit = config.client.max_model_bytes
    size = sum(len(array.data) for array in whole.array_records[ARRAYS].values())
    if limit is None or size <= limit:
        return ""
    return f"no edge server is left, and the model is larger than client.max_model_bytes={limit}"


class Repeats:
    """Has devices do their round again, with the same draws.

    Args:
        config: The run.
        roster: Who is there.
        fleet: The edge servers.
        sessions: Those of the round.
    """

    def __init__(
        self, config: Config, roster: Roster, fleet: Fleet, sessions: SplitSessions
    ) -> None:
        self._config, self._roster = config, roster
        self._fleet, self._sessions = fleet, sessions

    def joined(
        self,
        grid: Grid,
        again: Mapping[int, Sent],
        round_: int,
        returns: Returns,
        lost: dict[int, str],
    ) -> dict[int, Message]:
        """Have clients do their round again: with an edge at first if one is left, then alone.

        A device that is too small for the whole model has only edges: it is left out when it has
        lost them `ATTEMPTS` times in the round.

        Args:
            grid: Reaches the clients.
            again: What they were sent the first time.
            round_: The round.
            returns: Takes in what they send back.
            lost: Takes in who is left out, with the reason.

        Returns:
            By client, the replies that hold the whole model.
        """
        finished = dict[int, Message]()
        for attempt in range(1, ATTEMPTS):
            left = {c: sent for c, sent in again.items() if c not in finished and c not in lost}
            if not left:
                break
            began = time.perf_counter()
            steps = {client: returns.steps_of(client) for client in left}
            for client, reply, where in self._replies(grid, left, round_, attempt, lost):
                if returns.joined(client, reply, self._sessions.take(client)):
                    finished[client] = reply
                    entry = {
                        "what": "repeat",
                        "from": self._sessions.first_edge(again[client].assignment),
                        "to": where,
                        "repeated_steps": steps[client],
                        "seconds": time.perf_counter() - began,
                    }
                    returns.totals.note(round_, client, entry)
        for client in again.keys() - finished.keys() - lost.keys():
            lost[client] = f"its edge was lost {ATTEMPTS} times"
        return finished

    def scored_alone(self, grid: Grid, again: Mapping[int, Sent]) -> list[Message]:
        """Have clients that lost their edge evaluate alone; those that are too small do not."""
        node_of = self._roster.refresh(grid)
        messages = [
            Message(records.own_copy(sent.whole), node_of[client], "evaluate")
            for client, sent in again.items()
            if client in node_of and not too_small(self._config, sent.whole)
        ]
        replies = grid.send_and_receive(messages, timeout=self._config.runtime.timeout_s)
        return [reply for reply in replies if not reply.has_error()]

    def _replies(
        self,
        grid: Grid,
        again: Mapping[int, Sent],
        round_: int,
        attempt: int,
        lost: dict[int, str],
    ) -> Iterator[tuple[int, Message, str]]:
        """Yield client, reply, and where it was done again: ``edge`` or ``device``."""
        node_of = self._roster.refresh(grid)
        messages: dict[int, Message] = {}
        places: dict[int, str] = {}
        for client, sent in again.items():
            if client not in node_of:
                lost[client] = "it is not connected any more"
                continue
            message = Message(records.own_copy(sent.whole), node_of[client], "train")
            small = too_small(self._config, sent.whole)
            where = ""
            if attempt == 1 or small:
                where = self._with_edge(message, client, sent, round_, attempt)
            if not where and small:
                lost[client] = small
                continue
            messages[client] = message
            places[client] = where or "device"
            _log.warning("client %d repeats round %d on the %s", client, round_, places[client])
        answered = set()
        timeout_s = self._config.runtime.timeout_s
        for reply in grid.send_and_receive(messages.values(), timeout=timeout_s):
            client = self._roster.partition_of(reply.metadata.src_node_id)
            answered.add(client)
            if reply.has_error():
                lost[client] = reply.error.reason or f"error {reply.error.code}"
            else:
                yield client, reply, places[client]
        for client in messages.keys() - answered:
            lost[client] = "no reply when it was to repeat the round"

    def _with_edge(
        self, message: Message, client: int, sent: Sent, round_: int, attempt: int
    ) -> str:
        if self._config.privacy.mechanism == "cut" and self._config.privacy.secure:
            return ""  # activations with new noise would be another release
        try:
            self._sessions.open(message, client, sent.assignment, round_, attempt=attempt)
        except FedsysError as error:
            _log.warning("client %d: %s", client, error)
            return ""
        return "edge"
