"""A SuperLink as seen by who starts runs: submit, follow, stop, register nodes.

The same requests as of ``flwr run``, ``flwr log``, ``flwr stop`` and ``flwr supernode register``,
whose client is private in Flower: without a process for each, and with errors that say what to do.
"""

from __future__ import annotations

import contextlib
import queue
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedsys.errors import ConfigError, FedsysError, RuntimeFailure, SecurityError
from fedsys.runtime.busy import asked_again

STATUS_S = 1.0
"""Seconds between two looks at whether a run that says nothing still exists."""


DRAIN_S = 20.0
"""Longest wait for the next words of a run that has ended; a SuperLink ends what it streams."""


@dataclass(frozen=True)
class SuperLinkAddress:
    """Where a SuperLink is and how it is trusted.

    Attributes:
        host_port: ``host:port``.
        root_certificates: PEM of the authority; None for those of the system.
        insecure: Without TLS.
    """

    host_port: str
    root_certificates: bytes | None = None
    insecure: bool = False

    @classmethod
    def of(cls, superlink: str, root_certificates: str | None, insecure: bool) -> SuperLinkAddress:
        """Check what the configuration says.

        Raises:
            ConfigError: The address is not ``host:port``, or the file cannot be read.
        """
        host, _, port = superlink.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError.of(
                "runtime.superlink", superlink, "must be host:port", "for instance 10.0.0.1:8000"
            )
        pem = None
        if root_certificates is not None and not insecure:
            try:
                pem = Path(root_certificates).expanduser().read_bytes()
                ssl.create_default_context(cadata=pem.decode("ascii"))
            except (OSError, ValueError) as error:
                rule = f"must be a file with a certificate in PEM ({error})"
                raise ConfigError.of(
                    "runtime.root_certificates", root_certificates, rule
                ) from error
        return cls(superlink, pem, insecure)


class SuperLinkClient:
    """A client of one SuperLink; a context manager.

    Args:
        address: Where it is.
    """

    def __init__(self, address: SuperLinkAddress) -> None:
        self.address = address
        self._client = ControlHttpClient.from_server_address(
            server_address=address.host_port,
            insecure=address.insecure,
            root_certificates=address.root_certificates,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def __enter__(self) -> SuperLinkClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ping(self, padding: int = 0) -> None:
        """Ask for something small.

        Args:
            padding: Bytes to send along, which the SuperLink reads and ignores.

        Raises:
            FedsysError: The SuperLink is not there, or not the one that is trusted.
        """
        request = ListRunsRequest(limit=1)
        if padding:
            # A field that no version of Flower knows: protobuf carries it, and nobody looks at it.
            request.MergeFromString(_field(number=1000, size=padding))
        with self._explained():
            self._client.ListRuns(request)

    def register(self, public_key: bytes, name: str) -> int:
        """Register a node by its public key (PEM) and return its id."""
        with self._explained():
            request = RegisterNodeRequest(public_key=public_key, name=name)
            response = asked_again(lambda: self._client.RegisterNode(request))
        return int(response.node_id)

    def submit(self, bundle: bytes, sha256: str, run_config: dict[str, str]) -> int:
        """Start a run and return its id.

        Args:
            bundle: The Flower App Bundle.
            sha256: Its hash.
            run_config: Values for keys of the bundle's run config.
        """
        request = StartRunRequest(
            fab=fab_to_proto(Fab(sha256, bundle, {})),
            override_config=user_config_to_proto(dict(run_config)),
        )
        with self._explained():
            response = asked_again(lambda: self._client.StartRun(request))
        if not response.HasField("run_id"):
            raise RuntimeFailure(
                f"the SuperLink at {self.address.host_port} did not start the run: {response.note}"
            )
        return int(response.run_id)

    def status(self, run_id: int) -> tuple[str, str]:
        """Return how a run ended and details, or two empty strings if it has not ended."""
        with self._explained():
            request = ListRunsRequest(run_id=run_id)
            runs = asked_again(lambda: self._client.ListRuns(request)).run_dict
        if run_id not in runs:
            return "", ""
        status = runs[run_id].status
        if status.status != "finished":
            return "", ""
        return str(status.sub_status), str(status.details)

    def stop(self, run_id: int) -> None:
        """Stop a run."""
        with self._explained():
            self._client.StopRun(StopRunRequest(run_id=run_id))

    def follow(
        self,
        run_id: int,
        heard: Callable[[str], None],
        *,
        patience_s: float,
        outage: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> tuple[str, str]:
        """Pass on what a run prints until it has ended; return how, and details.

        A SuperLink that goes away and comes back within `patience_s` seconds is followed further:
        with a database and process isolation, its runs live on.

        Args:
            run_id: The run.
            heard: Gets what the server app's process printed, in pieces.
            patience_s: How long the SuperLink may be away.
            outage: Told once for each time that it is away.
            check: Called about once a second; may raise.

        Raises:
            RuntimeFailure: The SuperLink has been away for too long.
        """
        after, away_since = 0.0, 0.0
        while True:
            stream = _Stream(self._client, run_id, after)
            while (piece := stream.next(STATUS_S)) is not _END:
                check()
                if piece is not None:
                    text, after = piece
                    heard(text)
                elif not stream.is_silent_run(self.status, run_id):
                    break
            try:
                ended, details = self.status(run_id)
            except RuntimeFailure as error:
                if not away_since:
                    away_since = time.monotonic()
                    outage(f"the SuperLink at {self.address.host_port} is away; waiting for it")
                if time.monotonic() - away_since > patience_s:
                    raise RuntimeFailure(f"run {run_id}: {error}") from error
                time.sleep(STATUS_S)
                check()
                continue
            away_since = 0.0
            if ended:
                stream.drain(heard)
                return ended, details

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise explain(error, self.address) from error


_END = ("", -1.0)


class _Stream:
    """The log of a run, read by a thread, so that nobody waits for a SuperLink that died."""

    def __init__(self, client: ControlHttpClient, run_id: int, after: float) -> None:
        self._pieces: queue.Queue[tuple[str, float]] = queue.Queue()
        self._request = StreamLogsRequest(run_id=run_id, after_timestamp=after)
        self._client = client
        threading.Thread(target=self._read, name="run-log", daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(httpx.HTTPError, ValueError, RuntimeError):  # its end, too
            for response in self._client.StreamLogs(self._request):
                self._pieces.put((response.log_output, response.latest_timestamp))
        self._pieces.put(_END)

    def next(self, timeout_s: float) -> tuple[str, float] | None:
        """Return the next piece and its time, `_END`, or None if there is none in time."""
        try:
            return self._pieces.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def is_silent_run(self, status: Callable[[int], tuple[str, str]], run_id: int) -> bool:
        """Return whether the run goes on although it says nothing."""
        try:
            return not status(run_id)[0]
        except RuntimeFailure:
            return False

    def drain(self, heard: Callable[[str], None]) -> None:
        """Pass on what is still to come of a run that has ended, its result at the end."""
        while (piece := self.next(DRAIN_S)) not in (None, _END):
            assert piece is not None
            heard(piece[0])


def _field(number: int, size: int) -> bytes:
    """Return a length-delimited protobuf field of zeros."""

    def varint(value: int) -> bytes:
        digits = bytearray()
        while value > 0x7F:
            digits.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*digits, value])

    return varint(number << 3 | 2) + varint(size) + bytes(size)


def explain(error: httpx.HTTPError, address: SuperLinkAddress) -> FedsysError:
    """Return an error of the tree for what went wrong between us and a SuperLink."""
    where = f"runtime.superlink={address.host_port}"
    text = str(error)
    if isinstance(error, httpx.HTTPStatusError):
        told = FlowerError.from_json(error.response.text)
        reason = told.message if told is not None else error.response.text[:200]
        return RuntimeFailure(f"{where}: the SuperLink refuses the request: {reason}")
    if "certificate has expired" in text:
        return SecurityError(
            f"{where}: the SuperLink's certificate has expired; issue a new one and restart it"
        )
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = text.partition("certificate verify failed:")[2].rpartition("(")[0].strip()
        return SecurityError(
            f"{where}: the SuperLink's certificate is not accepted ({reason or text}); "
            "runtime.root_certificates must be the file of the authority that issued it"
        )
    if "WRONG_VERSION_NUMBER" in text or "record layer" in text:
        return SecurityError(
            f"{where}: the SuperLink does not speak TLS; start it with certificates, "
            "or use runtime.insecure=true"
        )
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) and address.insecure:
        return RuntimeFailure(
            f"{where}: the SuperLink does not answer without TLS ({text}); "
            "give runtime.root_certificates instead of runtime.insecure"
        )
    return RuntimeFailure(
        f"{where}: no SuperLink answers there ({text}); start flower-superlink on that machine, "
        "or have one started here with runtime.launch=true"
    )
