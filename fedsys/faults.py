"""A fault is a value: what fails, who, in which round and at which step.

The same list of faults replays in tests, in simulation and against processes. `KINDS` is the
registry of what can fail; `Faults` fires the faults of one run, each once, and knows at the end
which never came to pass: a run that was to survive a fault and never met it proves nothing, so it
fails.

Where a fault strikes, code asks for it by name: ``faults.due("device_killed", who=3, round=2)``.
What reaches a device travels with its message (`encode`, `Doom`), so it is the server alone that
remembers what has struck already.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedsys.errors import ConfigError, RuntimeFailure, did_you_mean

Who = int | str | None


@dataclass(frozen=True, slots=True)
class Fault:
    """One failure.

    Attributes:
        kind: What fails, a name in `KINDS`.
        round: Round in which it does, from 1.
        who: Whom it strikes: the partition id of a device, the index or name of an edge server;
            None where there is only one.
        step: Mini-batch of the round, from 0; None for the round's work as a whole.
        position: Where exactly, one of the positions of the kind; empty for the first of them.
        seconds: How long it lasts, for kinds that last; None for their usual time.
    """

    kind: str
    round: int
    who: Who = None
    step: int | None = None
    position: str = ""
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class FaultKind:
    """What is to be known of a kind of fault before it strikes.

    Attributes:
        target: What it strikes: ``server``, ``device``, ``edge`` or the ``link`` of a device.
        positions: Where it can strike; the first is meant when a fault names none.
        has_steps: Whether it can strike at one step of a round.
        seconds: How long it lasts unless the fault says so; None if it does not last.
    """

    target: str
    positions: tuple[str, ...]
    has_steps: bool
    seconds: float | None = None


SERVER_POSITIONS: Final = (
    "after_train",  # the replies are there, nothing is summed yet
    "before_train",  # nothing is sent yet
    "before_checkpoint",  # the round is in metrics.csv
    "in_checkpoint",  # half of the checkpoint is on the disk
    "after_checkpoint",
)

AT_EDGE: Final = (
    "before_compute",  # the step's first activation has arrived
    "after_compute",  # its reply is there and not sent
    "after_step",  # the edge has stepped; the device may have or not
)

AT_DEVICE: Final = (
    "before_send",  # the step's first activation is ready
    "after_send",  # it is sent
    "before_receive",  # what is answered to it gets lost
    "after_receive",  # it has arrived
)

WAYS: Final = ("send", "receive")

KINDS: Final[dict[str, FaultKind]] = {
    "server_killed": FaultKind("server", SERVER_POSITIONS, has_steps=False),
    "device_killed": FaultKind("device", ("before", "after"), has_steps=True),
    "edge_killed": FaultKind("edge", AT_EDGE, has_steps=True),
    "link_cut": FaultKind("link", AT_DEVICE + AT_EDGE, has_steps=True, seconds=0.0),
    "link_slow": FaultKind("link", WAYS, has_steps=True, seconds=0.2),
    "link_reordered": FaultKind("link", WAYS, has_steps=True),
    "link_duplicated": FaultKind("link", WAYS, has_steps=True),
    "link_corrupted": FaultKind("link", WAYS, has_steps=True),
}


def check(
    faults: Sequence[Fault], *, rounds: int, num_clients: int, edges: Sequence[str] = ()
) -> tuple[Fault, ...]:
    """Return the faults with what they leave open filled in.

    Args:
        faults: As the configuration has them.
        rounds: Rounds of the run.
        num_clients: Its devices.
        edges: Names of its edge servers; none without split training.

    Raises:
        ConfigError: A fault names what does not exist, or could never strike.
    """
    checked: list[Fault] = []
    for index, fault in enumerate(faults):
        name = f"faults.list[{index}]"
        fault = _checked(fault, name)
        if fault.round > rounds:
            raise ConfigError.of(
                f"{name}.round", fault.round, f"must not exceed rounds={rounds}: it never strikes"
            )
        target = KINDS[fault.kind].target
        if target in ("device", "link"):
            _check_device(fault, name, num_clients)
        if target in ("edge", "link"):
            fault = _checked_in_split(fault, name, edges)
        if fault in checked:
            raise ConfigError.of(name, dataclasses.asdict(fault), "must not be listed twice")
        checked.append(fault)
    return tuple(checked)


def out_of_reach(faults: Sequence[Fault], steps: Sequence[int]) -> list[str]:
    """Return a sentence for each fault at a step that nobody whom it strikes reaches in a round.

    Args:
        faults: As `check` returns them.
        steps: Mini-batches of each client in a round.
    """
    told = []
    for fault in faults:
        own = KINDS[fault.kind].target in ("device", "link") and isinstance(fault.who, int)
        most = steps[int(str(fault.who))] if own else max(steps, default=0)
        if fault.step is not None and fault.step >= most:
            whom = f"client {fault.who}" if own else "no client"
            reach = f"has {most} steps" if own else f"has more than {most} steps"
            told.append(f"{describe(fault)} is without effect: {whom} {reach} in a round")
    return told


def _checked(fault: Fault, name: str) -> Fault:
    kind = KINDS.get(fault.kind)
    if kind is None:
        hint = did_you_mean(fault.kind, KINDS)
        known = ", ".join(KINDS)
        raise ConfigError.of(f"{name}.kind", fault.kind, f"must be one of {known}", hint.strip())
    if fault.round < 1:
        raise ConfigError.of(f"{name}.round", fault.round, "must be at least 1")
    if fault.step is not None and not kind.has_steps:
        raise ConfigError.of(f"{name}.step", fault.step, f"must be null for {fault.kind}")
    if fault.step is not None and fault.step < 0:
        raise ConfigError.of(f"{name}.step", fault.step, "must not be negative")
    position = fault.position or kind.positions[0]
    if position not in kind.positions:
        known = ", ".join(kind.positions)
        raise ConfigError.of(f"{name}.position", position, f"must be one of {known}")
    if fault.seconds is not None and kind.seconds is None:
        raise ConfigError.of(f"{name}.seconds", fault.seconds, f"must be null for {fault.kind}")
    seconds = kind.seconds if fault.seconds is None else fault.seconds
    if seconds is not None and seconds < 0:
        raise ConfigError.of(f"{name}.seconds", seconds, "must not be negative")
    return dataclasses.replace(fault, position=position, seconds=seconds)


def _checked_in_split(fault: Fault, name: str, edges: Sequence[str]) -> Fault:
    """Return a fault of split training with the name of its edge server and its step."""
    if not edges:
        rule = "must not stand there without edge servers: it never strikes"
        raise ConfigError.of(f"{name}.kind", fault.kind, rule, "train with policy=fixed")
    who = fault.who
    if KINDS[fault.kind].target == "edge":
        if isinstance(who, int) and 0 <= who < len(edges):
            who = edges[who]
        if who not in edges:
            rule = f"must be an edge server: its name or its index, 0 to {len(edges) - 1}"
            raise ConfigError.of(f"{name}.who", who, rule)
    return dataclasses.replace(fault, who=who, step=fault.step or 0)


def _check_device(fault: Fault, name: str, num_clients: int) -> None:
    if not isinstance(fault.who, int) or not 0 <= fault.who < num_clients:
        rule = f"must be the partition id of a client, 0 to {num_clients - 1}"
        raise ConfigError.of(f"{name}.who", fault.who, rule)


class NotStruck(RuntimeFailure):
    """A run ended, and its model is there, before all faults struck."""


class Faults:
    """The faults of one run. Methods may be called from any thread.

    Args:
        faults: What is to strike, as `check` returns it.
        fired: What has struck before this process began; it does not strike again.
        record: Called with each fault just before it strikes; must be durable when it returns.
    """

    def __init__(
        self,
        faults: Sequence[Fault] = (),
        *,
        fired: Iterable[Fault] = (),
        record: Callable[[Fault], None] = lambda fault: None,
    ) -> None:
        self._faults = tuple(faults)
        self._fired = {fault for fault in fired if fault in self._faults}
        self._record = record
        self._lock = threading.Lock()

    def due(
        self,
        kind: str,
        *,
        round: int,
        who: Who = None,
        step: int | None = None,
        position: str | None = None,
    ) -> Fault | None:
        """Return the fault that strikes here and has not struck yet, or None.

        Args:
            kind: What would fail.
            round: Where the run is.
            who: Whom it would strike.
            step: Where the round is; None finds faults of the round as a whole.
            position: Where exactly; None for wherever the fault says.
        """
        with self._lock:
            for fault in self._faults:
                here = (fault.kind, fault.round, fault.who, fault.step) == (kind, round, who, step)
                if here and position in (None, fault.position) and fault not in self._fired:
                    return fault
        return None

    def of_round(self, target: str, round: int) -> list[Fault]:
        """Return what can still strike a target, such as ``device``, in a round."""
        with self._lock:
            return [
                fault
                for fault in self._faults
                if KINDS[fault.kind].target == target
                and fault.round == round
                and fault not in self._fired
            ]

    def fire(self, fault: Fault) -> bool:
        """Remember that a fault strikes; return whether it had not before, else nothing is done."""
        with self._lock:
            if fault in self._fired:
                return False
            self._record(fault)
            self._fired.add(fault)
            return True

    def kill_server(self, round: int, position: str) -> None:
        """End this process with SIGKILL if that is due here."""
        fault = self.due("server_killed", round=round, position=position)
        if fault is not None:
            self.fire(fault)
            os.kill(os.getpid(), signal.SIGKILL)

    def report(self) -> list[dict[str, Any]]:
        """Return every fault as a plain dict with the key ``fired``, in the order of the list."""
        return [dataclasses.asdict(f) | {"fired": f in self._fired} for f in self._faults]

    def check_all_fired(self) -> None:
        """Raise if the run ended before a fault struck.

        Raises:
            NotStruck: Names what did not strike.
        """
        left = [describe(fault) for fault in self._faults if fault not in self._fired]
        if left:
            raise NotStruck(
                f"faults: {'; '.join(left)} did not strike, so this run does not show what it was "
                "to show; name a client that takes part in that round, and a step that it reaches"
            )


def describe(fault: Fault) -> str:
    """Return a fault in words.

    >>> describe(Fault("device_killed", round=2, who=3, step=5, position="before"))
    'device_killed (who 3, round 2, step 5, before)'
    """
    parts = [("who", fault.who), ("round", fault.round), ("step", fault.step)]
    words = [f"{name} {value}" for name, value in parts if value is not None]
    return f"{fault.kind} ({', '.join([*words, *filter(None, [fault.position])])})"


# --------------------------------------------------------------------------------------------------
# Faults as text: in events and in messages


def to_json(faults: Iterable[Fault]) -> str:
    """Return faults as a JSON list."""
    return json.dumps([dataclasses.asdict(fault) for fault in faults])


def from_json(text: str) -> tuple[Fault, ...]:
    """Return the faults of a JSON list."""
    return tuple(Fault(**values) for values in json.loads(text))


def struck_before(events: Iterable[Mapping[str, Any]], after_round: int) -> tuple[Fault, ...]:
    """Return the faults that are over when a run continues after a round.

    What struck a device in a later round strikes again when that round is played again, as the
    model depends on it. A kill of the server does not: it is why the run is being continued.

    Args:
        events: Of the run folder; of kind ``fault``, with the fault as the value ``fault``.
        after_round: Round of the checkpoint.
    """
    faults = [Fault(**event["fault"]) for event in events if event["kind"] == "fault"]
    return tuple(
        fault
        for fault in faults
        if fault.round <= after_round
        or (fault.kind in KINDS and KINDS[fault.kind].target == "server")
    )


# --------------------------------------------------------------------------------------------------
# The device's side


class DeviceKilled(RuntimeFailure):
    """A device was killed by a fault, in a process that others live in too."""


def process_name() -> str:
    """Return what names this process among those of all machines of a run."""
    return f"{socket.gethostname()}:{os.getpid()}"


def encode(faults: Sequence[Fault]) -> dict[str, str]:
    """Return the fields of the record ``faults`` that arms a device."""
    return {"list": to_json(faults), "server": process_name()}


@dataclass(frozen=True, slots=True)
class Doom:
    """What strikes one device in one message.

    Attributes:
        faults: The faults, all of this device and round.
        server: Name of the process of the server app.
    """

    faults: tuple[Fault, ...] = ()
    server: str = ""

    @classmethod
    def of(cls, fields: Mapping[str, Any] | None) -> Doom:
        """Read what `encode` wrote; None is a message without faults."""
        if fields is None:
            return cls()
        return cls(from_json(str(fields["list"])), str(fields["server"]))

    def reach(self, position: str, step: int | None = None) -> None:
        """Die if that is due: by SIGKILL, or by an error where the server lives in this process.

        Raises:
            DeviceKilled: The device is a thread of the server's process.
        """
        for fault in self.faults:
            if (fault.kind, fault.step, fault.position) == ("device_killed", step, position):
                if self.server == process_name():
                    raise DeviceKilled(describe(fault))
                os.kill(os.getpid(), signal.SIGKILL)


SPARED: Final = Doom()
"""Nothing strikes."""
