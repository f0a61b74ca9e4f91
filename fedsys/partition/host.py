"""A host of a chain: it receives its units over the link, and computes them for pipelines.

Two kinds of peers connect, as at an edge server of split training (`fedsys.offload.edge`). A
*controller* sends units and says what is connected to what; it is known by the name in its
certificate, or on loopback by a token. A *host before* it in a pipeline presents the token of that
pipeline, and sends tensors.

Nothing is read from the disk: units come as data (a described graph, and tensors by digest; what
is here already is not sent again), and how they become a module is not this room's business
(`fedsys.partition.stage_rack.Builder`). A described graph names operations of a vocabulary, so
nobody can send code.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import psutil

from fedsys.errors import FedsysError, FrameError, LinkClosed, SecurityError
from fedsys.identity import arithmetic, package_version
from fedsys.partition.stage_rack import Builder, StageRack
from fedsys.partition.tensor_store import TensorStore
from fedsys.transport.addresses import serve
from fedsys.transport.link import AcceptedLink, Server
from fedsys.transport.security import Credentials, same_token
from fedsys.transport.strangers import Strangers
from fedsys.transport.wire import Frame, Limits

CONTROLLER = "server"
"""Name in the certificate of who may control a host, unless it is told another."""

_WATCHED_S = 2.0  # since the last heartbeat: nobody sends any
_LEAVING_S = 0.02  # between two looks
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spawned:
    """A host that was started for a pipeline.

    Attributes:
        address: Where it listens.
        end: Ends it.
    """

    address: str
    end: Callable[[], None]


@dataclass(frozen=True)
class HostLimits:
    """What a host takes upon itself.

    Attributes:
        memory_bytes: Of all weights.
        kept_bytes: Of weights that no pipeline uses any more.
        frame_bytes: Of one frame.
    """

    memory_bytes: int = 16 << 30
    kept_bytes: int = 1 << 30
    frame_bytes: int = 1 << 30


@final
class HostServer:
    """Serves at an address until it is stopped.

    Args:
        name: Its name in answers and messages.
        address: ``tcp://host:port``, ``grpc://host:port`` or ``memory://name``.
        builder: Makes modules of what is sent.
        credentials: For mutual TLS, at both ends of links; needed off loopback.
        control_token: What a controller without a certificate presents.
        controller: Name in the certificate of others; empty: none.
        limits: What it takes upon itself.
        spawn: Starts another host like this one; None: it cannot.
    """

    def __init__(
        self,
        name: str,
        address: str,
        builder: Builder,
        *,
        credentials: Credentials | None = None,
        control_token: str = "",
        controller: str = "",
        limits: HostLimits = HostLimits(),
        spawn: Callable[[], Spawned] | None = None,
    ) -> None:
        self.name = name
        self._token, self._controller, self._spawn = control_token, controller, spawn
        self.store = TensorStore(limits.memory_bytes, limits.kept_bytes)
        self._rack = StageRack(name, builder, self.store, credentials)
        self._spawned: dict[str, Spawned] = {}
        self._leaves, self._asked_s = False, -math.inf
        self._strangers, self._process = Strangers(), psutil.Process()
        frames = Limits(limits.frame_bytes, limits.frame_bytes)
        self._server: Server = serve(
            address,
            self._serve,
            credentials=credentials,
            limits=frames,
            strangers=None if address.startswith("memory://") else self._strangers,
        )

    @property
    def address(self) -> str:
        """Address to dial, with the port that was chosen."""
        return self._server.address

    def leave(self, timeout_s: float) -> bool:
        """Ask controllers to leave this host out, and wait until no pipeline is here.

        Args:
            timeout_s: Longest time for that, in seconds.

        Returns:
            Whether it came true; False at once where nobody watches this host.
        """
        self._leaves, until = True, time.monotonic() + timeout_s
        while len(self._rack) and time.monotonic() < until:
            if time.monotonic() - self._asked_s > _WATCHED_S:
                break
            time.sleep(_LEAVING_S)
        return not len(self._rack)

    def stop(self) -> None:
        """End all pipelines and links, and the hosts that were started here."""
        self._server.stop(0.0)
        self._rack.close()
        for spawned in self._spawned.values():
            spawned.end()

    def _serve(self, link: AcceptedLink) -> None:
        try:
            first = link.recv(self._strangers.seconds)
            if first.kind == "control":
                self._control(link, first)
            elif first.kind == "data":
                self._data(link, first)
            else:
                raise FrameError(f"{first.kind}: a link begins with control or data")
        except LinkClosed:
            pass
        except FedsysError as error:
            _log.warning("%s refused %s: %s", self.name, link.peer or "a peer", error)
            raise

    # ----------------------------------------------------------------------------------------------
    # Tensors

    def _data(self, link: AcceptedLink, first: Frame) -> None:
        stage = self._rack.of(str(first.meta.get("pipeline", "")), str(first.meta.get("token", "")))
        link.admit()
        link.send(Frame("ready", {"name": self.name}))
        stage.serve(link)

    # ----------------------------------------------------------------------------------------------
    # Control

    def _control(self, link: AcceptedLink, first: Frame) -> None:
        known = bool(self._controller) and link.peer == self._controller
        given = str(first.meta.get("token", ""))
        if not known and not (self._token and same_token(given, self._token)):
            raise SecurityError(f"{link.peer or 'a peer without certificate'} may not control")
        link.admit(vital=True)
        link.send(Frame("ready", self._about()))
        while True:
            frame = link.recv()
            try:
                reply = self._answer(frame)
            except FedsysError as error:
                reply = Frame("refused", {"reason": f"{error}", "error": type(error).__name__})
            link.send(reply)

    def _about(self) -> dict[str, Any]:
        version = package_version("fedsys")
        about = {"name": self.name, "version": version, "arithmetic": arithmetic()}
        return {**about, "starts_hosts": self._spawn is not None}

    def _answer(self, frame: Frame) -> Frame:
        meta = frame.meta
        if frame.kind == "ping":
            self._asked_s = time.monotonic()
            return Frame("pong", {"id": meta.get("id"), "leaves": self._leaves})
        if frame.kind == "want":
            return Frame("missing", {"digests": self.store.missing(_texts(meta, "digests"))})
        if frame.kind == "tensors":
            self.store.add(frame.tensors)
            return Frame("kept")
        if frame.kind == "stage":
            return self._rack.build(frame)
        if frame.kind == "divert":
            return Frame("diverted", {"requests": self._rack.divert(meta)})
        if frame.kind == "drop":
            self._rack.drop(str(meta.get("pipeline", "")))
            return Frame("dropped")
        if frame.kind == "status":
            return Frame("status", self.status())
        if frame.kind == "spawn":
            return Frame("spawned", {"address": self._start()})
        if frame.kind == "end":
            self._end(str(meta.get("address", "")))
            return Frame("ended")
        raise FrameError(f"{frame.kind}: not a request of a controller")

    def _start(self) -> str:
        if self._spawn is None:
            raise SecurityError(f"{self.name} starts no other hosts")
        spawned = self._spawn()
        self._spawned[spawned.address] = spawned
        return spawned.address

    def _end(self, address: str) -> None:
        spawned = self._spawned.pop(address, None)
        if spawned is not None:
            spawned.end()

    def _others(self) -> float:
        """Return the share of all processors that other processes took since it was last asked."""
        own = self._process.cpu_percent(None) / (psutil.cpu_count() or 1)
        return max(0.0, psutil.cpu_percent(None) - own) / 100

    def status(self) -> dict[str, Any]:
        """Return how the host is: memory, load, and what it computed."""
        return {
            "name": self.name,
            **self._rack.told(),
            "weights_bytes": self.store.nbytes,
            "resident_bytes": self._process.memory_info().rss,
            "free_bytes": psutil.virtual_memory().available,
            "others": self._others(),
        }


def _texts(meta: Mapping[str, Any], key: str) -> list[str]:
    found = meta.get(key)
    if not isinstance(found, list) or not all(isinstance(value, str) for value in found):
        raise FrameError(f"{key}: must be a list of texts")
    return found
