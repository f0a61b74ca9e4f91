"""A host as its controller sees it: who it is, what it is sent, and what is connected to what."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fedsys.errors import (
    ConfigError,
    FedsysError,
    LinkError,
    RemoteError,
    RuntimeFailure,
    first_line,
)
from fedsys.identity import differences, package_version
from fedsys.transport.addresses import dial
from fedsys.transport.link import Link
from fedsys.transport.security import Credentials
from fedsys.transport.wire import Frame

_CHUNK = 64 << 20  # bytes of tensors in a frame
_ANSWER_S = 120.0  # for a host to build and warm up a stage


@dataclass(frozen=True, eq=False)
class Described:
    """Units as data.

    Attributes:
        body: Their graph.
        names: The digest of each of their tensors, by name.
        tensors: By digest.
        shapes: Of the tensors that they take, without the batch.
    """

    body: bytes
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    shapes: tuple[tuple[int, ...], ...]


@final
class RemoteHost:
    """One host, controlled over a link.

    Args:
        path: Of its entry in the configuration, for messages.
        name: Its name.
        address: Where it listens.
        token: That it wants to hear.
        credentials: For mutual TLS.
        other_arithmetic: Whether it may compute other bits than this machine.

    Attributes:
        starts_hosts: Whether it starts other hosts like itself.
        losses: How often it was lost.
        held: Digests of tensors that it holds, or held: it may have dropped those of none.

    Raises:
        ConfigError: It cannot be reached, or is of another version or arithmetic.
        SecurityError: It does not accept this end, or the other way round.
    """

    def __init__(
        self,
        path: str,
        name: str,
        address: str,
        *,
        token: str = "",
        credentials: Credentials | None = None,
        other_arithmetic: bool = False,
        timeout_s: float = 10.0,
    ) -> None:
        self.path, self.name, self.address = path, name, address
        self._token, self._credentials = token, credentials
        self._other_arithmetic, self._timeout_s = other_arithmetic, timeout_s
        self._lock = threading.Lock()
        self._owed: set[str] = set()
        self.held: frozenset[str] = frozenset()
        self.losses = 0
        self._link: Link | None = self.connect()

    def connect(self) -> Link:
        """Return another link of control, on which the host answers beside the others.

        Raises:
            ConfigError: It cannot be reached, or is of another version or arithmetic.
            SecurityError: It does not accept this end, or the other way round.
        """
        own = None if self.address.startswith("memory://") else self._credentials
        link: Link | None = None
        try:
            link = dial(self.address, credentials=own, timeout_s=self._timeout_s, retry=False)
            link.send(Frame("control", {"token": self._token}))
            about = link.recv(self._timeout_s).meta
        except LinkError as error:
            if link is not None:
                link.close()
            refused = isinstance(error, RemoteError)  # it answered, and does not want this end
            rule = "must be that of a host that " + ("accepts this end" if refused else "answers")
            way_out = "give its token by hosts.control_token_file, or hosts.credentials"
            raise ConfigError.of(
                f"{self.path}.address", self.address, rule,
                f"{way_out if refused else 'start it there by fedsys host'} ({first_line(error)})",
            ) from error  # fmt: skip
        try:
            self._check(about, self._other_arithmetic)
            self.starts_hosts = bool(about.get("starts_hosts"))
        except ConfigError:
            link.close()
            raise
        return link

    def lose(self) -> None:
        """Take note that the host is lost: whoever waits for its answer is told so at once.

        Returns at once: a host that stands still takes no last word, which a link waits for.
        """
        self.losses += 1
        self.held = frozenset()  # it may be another process when it is back
        link, self._link = self._link, None
        if link is not None:
            threading.Thread(target=link.close, name=f"leaves {self.name}", daemon=True).start()

    def come_back(self) -> None:
        """Reach the host again, and have it drop what it was to drop meanwhile.

        Raises:
            ConfigError: As `connect`.
        """
        with self._lock:
            if self._link is None:
                self._link = self.connect()
            owed, self._owed = self._owed, set()
        for pipeline in owed:
            self.drop(pipeline)

    def _check(self, about: Mapping[str, Any], other_arithmetic: bool) -> None:
        mine = package_version("fedsys")
        if about.get("version") != mine:
            raise ConfigError.of(
                f"{self.path}.version", about.get("version"), f"must be {mine}, as here, on "
                f"{self.name} at {self.address}", "install the same version on both",
            )  # fmt: skip
        other = differences(about.get("arithmetic"))
        if other and not other_arithmetic:
            raise ConfigError.of(
                f"{self.path}.arithmetic", other, f"must be that of this machine on {self.name}, "
                "or answers differ in their last bits", "hosts.other_arithmetic=true accepts that",
            )  # fmt: skip

    def ask(
        self, kind: str, meta: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Frame:  # fmt: skip
        """Return the answer to a request.

        Raises:
            RuntimeFailure: The host refuses, or is lost.
        """
        with self._lock:
            link = self._link
            if link is None:
                raise RuntimeFailure(f"{self.name} at {self.address} is lost")
            try:
                link.send(Frame(kind, meta or {}, tensors or {}))
                reply = link.recv(_ANSWER_S)
            except LinkError as error:
                raise RuntimeFailure(f"{self.name} at {self.address} is lost: {error}") from error
        if reply.kind == "refused":
            raise RuntimeFailure(f"{self.name} at {self.address}: {reply.meta.get('reason')}")
        return reply

    def send_tensors(self, tensors: Mapping[str, Tensor]) -> int:
        """Send those tensors that the host does not have; return their bytes."""
        missing = self.ask("want", {"digests": list(tensors)}).meta["digests"]
        chunk: dict[str, Tensor] = {}
        sent = size = 0
        for digest in missing:
            if chunk and size + tensors[digest].nbytes > _CHUNK:
                self.ask("tensors", {}, chunk)
                chunk, size = {}, 0
            chunk[digest] = tensors[digest]
            size += tensors[digest].nbytes
            sent += tensors[digest].nbytes
        if chunk:
            self.ask("tensors", {}, chunk)
        self.held |= tensors.keys()
        return sent

    def build(
        self,
        pieces: Sequence[tuple[int, Described]],
        meta: Mapping[str, Any],
        warm: Sequence[int],
    ) -> Frame:
        """Have units built, warmed up and connected to the next host.

        Args:
            pieces: What is computed one after the other, each with the boundary that it begins at.
            meta: The pipeline, its token, where the last of them ends, and what comes next.
            warm: Sizes of batches that are computed before.

        Raises:
            RuntimeFailure: The host refuses, or is lost.
        """
        self.send_tensors({d: t for _, one in pieces for d, t in one.tensors.items()})
        bodies = {
            f"body{index}": torch.from_numpy(np.frombuffer(one.body, np.uint8).copy())
            for index, (_, one) in enumerate(pieces)
        }
        about = {
            **meta,
            "pieces": [{"first": first, "names": dict(one.names)} for first, one in pieces],
            "shapes": [list(shape) for shape in pieces[0][1].shapes],
            "warm": list(warm),
        }
        return self.ask("stage", about, bodies)

    def close(self) -> None:
        """End the link; what was built stays until it is dropped."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def drop(self, pipeline: str) -> None:
        """Have a pipeline's stage dropped: if the host is not there, when it comes back."""
        try:
            self.ask("drop", {"pipeline": pipeline})
        except FedsysError:
            self._owed.add(pipeline)
