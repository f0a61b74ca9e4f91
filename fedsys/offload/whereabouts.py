"""What a device knows of where its session is: under which token, and where it was told to go."""

from __future__ import annotations

from typing import Any

from fedsys.offload.fencing import NONE, Epoch, Presented
from fedsys.transport.wire import Frame


class Whereabouts:
    """Where a session is, as its device knows it. For one thread.

    Args:
        edge: Address of the edge server that has it.

    Attributes:
        edge: Address of the edge server that welcomed the device last, or is to do so at first.
        told: Address to which the device was told to go; empty: nowhere.
    """

    def __init__(self, edge: str) -> None:
        self.edge, self.told = edge, ""
        self._shown = Presented()

    @property
    def epoch(self) -> Epoch:
        """Token under which the device was welcomed last."""
        return self._shown.epoch

    def shows(self, edge: str) -> dict[str, Any]:
        """Return what a device shows at an edge server.

        Args:
            edge: Its address.
        """
        shown = self._shown
        meta: dict[str, Any] = {"epoch": list(shown.epoch)}
        if shown.told is not None:
            meta |= {"told": list(shown.told), "back": shown.back}
        if edge != self.edge and shown.epoch != NONE:
            meta["from"] = self.edge
        return meta

    def redirected(self, frame: Frame) -> str:
        """Take note of where the session went; return the address.

        Raises:
            FrameError: The token has another form.
        """
        told = Epoch.of(frame.meta.get("epoch"))
        self.told = str(frame.meta.get("to", ""))
        if told != self._shown.told:
            self._shown = Presented(self._shown.epoch, told)
        return self.told

    def missed(self, edge: str) -> None:
        """Take note that the session was not found at an edge server, or that nobody answers."""
        if edge == self.told:
            self._shown = Presented(self._shown.epoch, self._shown.told, back=True)

    def welcomed(self, edge: str, frame: Frame) -> None:
        """Take note of the edge server that has the session.

        Raises:
            FrameError: The token has another form.
        """
        self.edge, self.told = edge, ""
        self._shown = Presented(Epoch.of(frame.meta.get("epoch")) or NONE)
