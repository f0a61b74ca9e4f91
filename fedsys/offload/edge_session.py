"""What an edge server needs of a session, wherever it computes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

from fedsys.offload.sealing import Sealed
from fedsys.offload.snapshot import SessionPosition, SessionSpec, Snapshot
from fedsys.offload.turns import Awaited
from fedsys.transport.wire import Frame


class Follower(Protocol):
    """Has another session do what this one does."""

    def let_catch_up(self, step: int) -> None:
        """Wait, if need be, before a mini-batch begins or goes on; the session is not held."""
        ...

    def take(self, operation: Frame) -> None:
        """Take an operation that the session does, in its turn; without waiting."""
        ...


class EdgeSession(Protocol):
    """A `fedsys.offload.session.Session`, or what stands for one in another process.

    Calls raise LinkClosed where the process is gone that computes; else what a session raises.

    Attributes:
        spec: What the server app said.
        incarnation: Differs between a session and one that replaced it.
    """

    spec: SessionSpec
    incarnation: str

    @property
    def steps(self) -> int:
        """Steps done in this round, those before the start included; without waiting."""
        ...

    @property
    def lost(self) -> bool:
        """Whether the process that has it is gone, as far as that was noticed."""
        ...

    def handle(self, frame: Frame) -> Iterator[Frame]:
        """Do the operation of a frame and yield the replies that are due, in order."""
        ...

    def snapshot(self) -> Snapshot:
        """Return the state between two steps."""
        ...

    def freeze(self) -> Snapshot:
        """Return the state between two steps, and do nothing more from here on."""
        ...

    def hold_still(self) -> SessionPosition:
        """Return the state as it is, and do nothing more until `go_on`."""
        ...

    def as_it_stands(self) -> SessionPosition:
        """Return the state as it is, also within a step."""
        ...

    def followed(self, follower: Follower | None) -> SessionPosition:
        """Return the state as it is; `follower` takes each operation after that, in order."""
        ...

    def sealed(self, awaited: Collection[Awaited]) -> Sealed:
        """Do nothing more until `go_on`; return what two that are the same have in common."""
        ...

    def go_on(self) -> None:
        """Do operations again after `hold_still` or `sealed`."""
        ...

    def take_up(self, position: SessionPosition) -> None:
        """Come to where another session stood that began with the same snapshot."""
        ...

    def at_work(self) -> bool:
        """Return whether an operation is in work, without waiting for it."""
        ...

    def position(self) -> int:
        """Return the steps done, once the operation in work is."""
        ...

    def nbytes(self) -> int:
        """Return the bytes of weights and optimizer state, without waiting."""
        ...
