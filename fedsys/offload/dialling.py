"""How a device reaches edge servers: its certificate, its network, the faults on its link.

A fault of the run finds its frame by what the frame says of itself: the first piece of the
activation of a step. So it strikes the same frame in every run, however often the device had to
connect before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsys.config import Config
from fedsys.config.targets import call_target
from fedsys.errors import LinkClosed, LinkRefused
from fedsys.faults import AT_EDGE, Fault
from fedsys.planning.hardware import network_for
from fedsys.transport.addresses import dial
from fedsys.transport.faulty import Faulty, LinkFault
from fedsys.transport.link import Link
from fedsys.transport.link_around import LinkAround
from fedsys.transport.messages import PARTITION_ID, number
from fedsys.transport.network import Network
from fedsys.transport.patience import Patience
from fedsys.transport.security import Credentials
from fedsys.transport.shaping import RealClock, Shaped
from fedsys.transport.wire import Buffer, Frame, decode

CONNECT_S = 10.0
"""How long the first edge server may take to accept a link: before it, nothing is known of the
network. Later ones may take what `fedsys.transport.patience` makes of those before."""

LEAST_CONNECT_S = 1.0
"""Shortest time limit for a link: certificates are checked on machines that are busy."""

_LINK_FAULTS: dict[tuple[str, str], LinkFault] = {
    ("link_cut", "before_send"): LinkFault("cut", when="before"),
    ("link_cut", "after_send"): LinkFault("cut", when="after"),
    ("link_cut", "before_receive"): LinkFault("cut", direction="recv", when="before"),
    ("link_cut", "after_receive"): LinkFault("cut", direction="recv", when="after"),
    ("link_reordered", "send"): LinkFault("reorder"),
    ("link_reordered", "receive"): LinkFault("reorder", direction="recv"),
    ("link_duplicated", "send"): LinkFault("duplicate"),
    ("link_duplicated", "receive"): LinkFault("duplicate", direction="recv"),
    ("link_corrupted", "send"): LinkFault("corrupt"),
    ("link_corrupted", "receive"): LinkFault("corrupt", direction="recv"),
}


def link_fault(fault: Fault) -> LinkFault:
    """Return what a fault of a run does to the next frame of its direction."""
    if fault.kind == "link_slow":
        if fault.position == "send":
            return LinkFault("delay", delay_s=fault.seconds or 0.0)
        return LinkFault("delay", direction="recv", delay_s=fault.seconds or 0.0)
    return _LINK_FAULTS[fault.kind, fault.position]


def dialler_of(
    config: Config, node_config: Mapping[str, Any], faults: Iterable[Fault] = (), round_: int = 1
) -> Dialler:
    """Return what connects a node, as its own configuration and that of the run say.

    Args:
        config: The run.
        node_config: Of the node; its ``credentials`` come before those of the run, and its
            `PARTITION_ID` says which device it is.
        faults: What strikes the device in this round.
        round_: The round, from 1; a trace of seconds begins anew in each.

    Raises:
        SecurityError: The credentials are missing or not valid.
    """
    folder = node_config.get("credentials") or config.link.credentials
    network = network_for(config, int(number(node_config, PARTITION_ID, 0)))
    if network.by_rounds:
        network = network.at(round_ - 1)
    return Dialler(
        Credentials.load(Path(str(folder))) if folder else None,
        faults,
        network if config.network.emulate else None,
        around=_around(config.link.around),
    )


def _around(spec: Mapping[str, Any] | None) -> Callable[[Link], Link]:
    """Return what wraps a link, as the group ``link.around`` says."""
    if spec is None:
        return lambda link: link
    return lambda link: call_target(spec, "link.around", inner=link)


class Dialler:
    """Connects one device to edge servers in one round. For one thread.

    Args:
        credentials: Of the device, for mutual TLS.
        faults: What strikes the device; those of its links are done here.
        network: How slow its links are made; None leaves them as they are.
        around: Wraps a link that is made so, before faults do.
        connect: Makes the bare link; replaced in tests.
        clock: Seconds, for links that stay cut; replaced in tests.

    Attributes:
        struck: The faults that did strike, in order.
    """

    def __init__(
        self,
        credentials: Credentials | None = None,
        faults: Iterable[Fault] = (),
        network: Network | None = None,
        *,
        around: Callable[[Link], Link] = lambda link: link,
        connect: Callable[[str, Credentials | None], Link] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.struck: list[Fault] = []
        self._credentials, self._clock = credentials, clock
        self._connect = connect or self._dial
        self._patience = Patience(CONNECT_S, LEAST_CONNECT_S)
        self._waiting = [
            f for f in faults if f.kind.startswith("link_") and f.position not in AT_EDGE
        ]
        self._cut_until = 0.0
        self._network, self._time, self._around = network, RealClock(), around

    def __call__(self, address: str) -> Link:
        """Connect to an edge server.

        Raises:
            LinkError: It cannot be reached, or the link is cut by a fault.
            SecurityError: One end does not accept the other.
        """
        if self._clock() < self._cut_until:
            raise LinkClosed(f"{address}: the device has no connection (a fault of the run)")
        link = self._connect(address, self._credentials)
        if self._network is not None:
            link = Shaped(link, self._network, clock=self._time)
        link = self._around(link)
        return _Struck(link, self) if self._waiting else link

    def _dial(self, address: str, credentials: Credentials | None) -> Link:
        began, limit = self._clock(), self._patience.limit_s
        try:
            link = dial(address, credentials=credentials, timeout_s=limit, retry=False)
        except LinkRefused:
            raise
        except LinkClosed:
            self._patience.failed(self._clock() - began)
            raise
        self._patience.saw(self._clock() - began)
        return link

    def due(self, frame: Frame) -> list[Fault]:
        """Return what strikes with a frame that the device sends, each fault once."""
        if frame.kind != "activation" or frame.meta.get("piece") != 0:
            return []
        due = [fault for fault in self._waiting if fault.step == frame.meta.get("step")]
        self._waiting = [fault for fault in self._waiting if fault not in due]
        return due

    def waits(self, faults: Iterable[Fault]) -> None:
        """Take back what found no frame to strike: the link was lost before."""
        self._waiting.extend(faults)

    def strikes(self, fault: Fault) -> None:
        """Take note that a fault strikes right now."""
        self.struck.append(fault)
        if fault.kind == "link_cut":
            self._cut_until = self._clock() + (fault.seconds or 0.0)


class _Struck(LinkAround):
    """A link of a device that is yet to be struck: `Faulty` from the frame on that is meant."""

    def __init__(self, link: Link, dialler: Dialler) -> None:
        super().__init__(link)
        self._dialler = dialler
        self._armed: list[tuple[Faulty, Fault]] = []

    def send_encoded(self, parts: Sequence[Buffer]) -> None:
        for fault in self._dialler.due(decode(b"".join(parts))):
            self.inner = faulty = Faulty(self.inner, [link_fault(fault)])
            self._armed.append((faulty, fault))
        try:
            self.inner.send_encoded(parts)
        finally:
            self._report()

    def recv(self, timeout_s: float | None = None) -> Frame:
        try:
            return self.inner.recv(timeout_s)
        finally:
            self._report()

    def close(self) -> None:
        self.inner.close()
        self._dialler.waits([fault for _, fault in self._armed])
        self._armed = []

    def _report(self) -> None:
        for faulty, fault in list(self._armed):
            if faulty.fired:
                self._armed.remove((faulty, fault))
                self._dialler.strikes(fault)
