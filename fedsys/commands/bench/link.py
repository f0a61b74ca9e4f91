"""Our links against the same bytes over a bare gRPC stream, and the share of a shaped rate we use.

All servers run in one other process, and all are measured in short turns, so that what else the
machine does meets all alike; of the differences and ratios of neighbouring turns the median is
given, and the quartiles beside it. Per size and link: round trips (a frame there and back), and a
stream of frames one way that ends with one answer. What ours do more: header, checksum, limits, and
a tensor in memory of its own at the other end. CPU seconds are those of both processes together.

Shaped rates, as the share of the rate that is left for tensors: ``by: "fedsys"`` is our own
shaping; ``by: "kernel"`` a token bucket of Linux on a virtual Ethernet between two network
namespaces (TCP payload is 95.6 % of the rate there). The second needs root, ``ip`` and ``tc``, and
so does what it costs this process to receive a large frame at that rate, woken when there is much
to read, and in turns for each arrival.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from statistics import median
from typing import Any, Final, Protocol

import torch

from fedsys.commands.bench import Chart, with_quartiles
from fedsys.config import Config
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.runtime.processes import wait_or_kill
from fedsys.transport.addresses import dial, serve
from fedsys.transport.link import Link
from fedsys.transport.network import Network
from fedsys.transport.security import Authority, Credentials
from fedsys.transport.shaping import Shaped
from fedsys.transport.tcp_channel import LowWater
from fedsys.transport.wire import Frame

DEFAULTS: Final[Mapping[str, Any]] = {
    "links": ["grpc", "tcp", "grpc_tls", "tcp_tls"],  # the latter with mutual TLS
    "bytes": [1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24],
    "repeats": 15,  # turns of each kind
    "stream_bytes": 32 << 20,  # in one measured stream, at most
    "shaped_mbit_s": [10, 100],
    "shaped_seconds": 2.0,
    "received_bytes": 3_276_800,  # of one frame: activations of VGG-5 at cut 1 for 100 images
}
_PATIENCE_S: Final = 60.0
_UNLIMITED: Final = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_TLS: Final = "_tls"  # ends the names of links with TLS
_ECHO, _SINK, _ANSWER = b"e", b"s", b"a"


def run(_: Config | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure and return the figures.

    Args:
        options: Replaces entries of `DEFAULTS`.

    Returns:
        ``cases``: per size and ``link`` the throughput in MB/s (10^6 bytes) of a stream, the
        microseconds of a round trip and its CPU microseconds, of ours and of bare gRPC (medians of
        the turns); ``share`` of the throughput, ``added_us`` to a round trip, and CPU nanoseconds
        per byte of a stream. ``shaped``: per rate in Mbit/s, ``link`` and `by` the share that
        tensors get; None with a ``note`` where it could not be measured. ``received``: per rate and
        link over TCP the milliseconds of processor time of a process that receives a frame of
        ``bytes``, as ``cpu_ms``, and with a wake for each arrival, as ``each_cpu_ms``; their
        ``ratio`` is the median over the turns.

    Raises:
        ConfigError: A link has another name than those in `DEFAULTS`.
        RuntimeFailure: The server process does not start.
    """
    settings = {**DEFAULTS, **options}
    for name in settings["links"]:
        if name not in DEFAULTS["links"]:
            known = ", ".join(DEFAULTS["links"])
            raise ConfigError.of("bench.links", name, f"must be one of {known}")
    networks = [name for name in settings["links"] if not name.endswith(_TLS)]
    with _server_process([]) as servers:
        cases = [row for size in settings["bytes"] for row in _cases(size, servers, settings)]
        shaped = [
            {"mbit_s": rate, "link": name, "by": "fedsys", "share": share}
            for rate in settings["shaped_mbit_s"]
            for name in networks
            for share in [_own_share(rate, servers.addresses[name], settings)]
        ]
    shaped += [
        _kernel_share(rate, name, settings)
        for rate in settings["shaped_mbit_s"]
        for name in networks
    ]
    received = [
        _receiving(rate, name, settings)
        for rate in settings["shaped_mbit_s"]
        for name in settings["links"]
        if name.startswith("tcp")
    ]
    return {"cases": cases, "shaped": shaped, "received": received}


# --------------------------------------------------------------------------------------------------
# The other process


def _ours_handler(link: Link) -> None:
    while True:
        frame = link.recv()
        if frame.kind == "echo":
            link.send(frame)
        elif frame.kind == "source":
            size = int(frame.meta["bytes"])
            link.send(Frame("sourced", {}, {"x": torch.zeros(size, dtype=torch.uint8)}))
        elif frame.kind == "cpu":
            link.send(Frame("cpu", {"seconds": time.process_time()}))
        elif frame.meta["last"]:
            link.send(Frame("answer"))


def _bare_handler(messages: Iterator[bytes], _: object) -> Iterator[bytes]:
    for message in messages:
        if message[:1] == _ECHO:
            yield message
        elif message[:1] == _ANSWER:
            yield b""


def _serve(host: str) -> None:
    import grpc

    torch.set_num_threads(1)
    authority = Authority.create("bench")
    edge = authority.issue("edge", [host], role="server")
    ours = {
        f"{kind}{end}": serve(f"{kind}://{host}:0", _ours_handler, plain=True, credentials=own)
        for kind in ("grpc", "tcp")
        for end, own in (("", None), (_TLS, edge))
    }
    bare = grpc.server(ThreadPoolExecutor(4), options=_UNLIMITED)
    method = grpc.stream_stream_rpc_method_handler(_bare_handler)
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"c": method}),))
    port = bare.add_insecure_port(f"{host}:0")
    bare.start()
    device = authority.issue("device")
    told = {
        "addresses": {name: server.address for name, server in ours.items()},
        "bare": f"{host}:{port}",
        "device": [part.decode() for part in (device.ca, device.certificate, device.key)],
    }
    print(json.dumps(told), flush=True)
    sys.stdin.read()  # until the parent ends, however it ends
    for server in ours.values():
        server.stop()
    bare.stop(0).wait()


@dataclass(frozen=True)
class _Servers:
    """Where the other process serves each link, and bare gRPC."""

    addresses: Mapping[str, str]
    bare: str
    device: Credentials = field(repr=False)

    def dial(self, link: str) -> Link:
        credentials = self.device if link.endswith(_TLS) else None
        return dial(self.addresses[link], credentials=credentials, plain=True)


@contextmanager
def _server_process(prefix: Sequence[str], host: str = "127.0.0.1") -> Iterator[_Servers]:
    command = [*prefix, sys.executable, "-m", "fedsys.commands.bench.link", "--serve", host]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None  # both are pipes
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeFailure(f"{' '.join(command)}: the server process ended at once")
        told = json.loads(line)
        device = Credentials(*(part.encode() for part in told["device"]))
        yield _Servers(told["addresses"], told["bare"], device)
    finally:
        process.stdin.close()
        wait_or_kill(process, 10)
        process.stdout.close()


# --------------------------------------------------------------------------------------------------
# Ours and bare gRPC


class _Bare:
    """A bare stream: messages put into a queue that gRPC takes them from."""

    def __init__(self, place: str) -> None:
        import grpc

        self._channel = grpc.insecure_channel(place, options=_UNLIMITED)
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        call = self._channel.stream_stream("/bare/c")
        self._answers: Iterator[bytes] = call(iter(self._outbox.get, None))

    def send(self, message: bytes) -> None:
        self._outbox.put(message)

    def recv(self) -> bytes:
        return next(self._answers)

    def close(self) -> None:
        self._outbox.put(None)
        self._channel.close()


@dataclass(frozen=True)
class _Turn:
    """What one turn took, per operation: seconds, and CPU seconds of both processes."""

    wall_s: float
    cpu_s: float


class _Way(Protocol):
    """Sends tensors of one size to the other process."""

    def trips(self, count: int) -> None:
        """Have as many tensors go there and come back."""
        ...

    def stream(self, count: int) -> None:
        """Send as many tensors, and wait for one answer."""
        ...


class _Ours:
    """One of our links."""

    def __init__(self, size: int, link: Link) -> None:
        self.link = link
        self._x = torch.zeros(size, dtype=torch.uint8)

    def trips(self, count: int) -> None:
        for _ in range(count):
            self.link.send(Frame("echo", {}, {"x": self._x}))
            self.link.recv(_PATIENCE_S)

    def stream(self, count: int) -> None:
        for i in range(count):
            self.link.send(Frame("sink", {"last": i == count - 1}, {"x": self._x}))
        self.link.recv(_PATIENCE_S)

    def cpu_s(self) -> float:
        """Return the CPU seconds of both processes."""
        self.link.send(Frame("cpu"))
        return float(self.link.recv(_PATIENCE_S).meta["seconds"]) + time.process_time()


class _Theirs:
    """The same bytes over a bare stream."""

    def __init__(self, size: int, bare: _Bare) -> None:
        self._bare = bare
        self._echo, self._sink = _ECHO + bytes(size - 1), _SINK + bytes(size - 1)

    def trips(self, count: int) -> None:
        for _ in range(count):
            self._bare.send(self._echo)
            self._bare.recv()

    def stream(self, count: int) -> None:
        for _ in range(count):
            self._bare.send(self._sink)
        self._bare.send(_ANSWER)
        self._bare.recv()


def _turns(
    ways: Mapping[str, _Way], which: str, count: int, repeats: int, cpu_s: Callable[[], float]
) -> dict[str, list[_Turn]]:
    """Return what each way took in neighbouring turns; who begins changes, the first warms up."""
    taken: dict[str, list[_Turn]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            work: Callable[[int], None] = getattr(ways[name], which)
            cpu, start = cpu_s(), time.perf_counter()
            work(count)
            wall = time.perf_counter() - start
            taken[name].append(_Turn(wall / count, (cpu_s() - cpu) / count))
    return {name: turns[1:] for name, turns in taken.items()}


def _spread(name: str, values: Iterable[float], digits: int) -> dict[str, float]:
    """Return the median under `name`, and the quartiles beside it."""
    return {key: round(value, digits) for key, value in with_quartiles(name, values).items()}


def _cases(size: int, servers: _Servers, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    trips = max(1, min(50, (4 << 20) // size))
    count = max(2, min(500, settings["stream_bytes"] // size))
    repeats = int(settings["repeats"])
    with ExitStack() as stack:
        bare = stack.enter_context(closing(_Bare(servers.bare)))
        ours = {
            name: _Ours(size, stack.enter_context(closing(servers.dial(name))))
            for name in settings["links"]
        }
        ways: dict[str, _Way] = {**ours, "bare": _Theirs(size, bare)}
        cpu_s = next(iter(ours.values())).cpu_s
        there_and_back = _turns(ways, "trips", trips, repeats, cpu_s)
        one_way = _turns(ways, "stream", count, repeats, cpu_s)
    for name in ours:
        pairs = [
            list(zip(turns[name], turns["bare"], strict=True))
            for turns in (there_and_back, one_way)
        ]
        yield {"bytes": size, "link": name, **_row(size, *pairs)}


def _row(
    size: int, there_and_back: Sequence[tuple[_Turn, _Turn]], one_way: Sequence[tuple[_Turn, _Turn]]
) -> dict[str, float]:
    """Return the figures of one link: ours, bare gRPC, and what one is to the other."""

    def middle(turns: Sequence[tuple[_Turn, _Turn]], which: int, what: str) -> float:
        return float(median(getattr(pair[which], what) for pair in turns))

    return {
        "ours_mb_s": round(size / middle(one_way, 0, "wall_s") / 1e6, 1),
        "grpc_mb_s": round(size / middle(one_way, 1, "wall_s") / 1e6, 1),
        **_spread("share", (bare.wall_s / ours.wall_s for ours, bare in one_way), 3),
        "ours_us": round(middle(there_and_back, 0, "wall_s") * 1e6, 1),
        "grpc_us": round(middle(there_and_back, 1, "wall_s") * 1e6, 1),
        **_spread("added_us", ((a.wall_s - b.wall_s) * 1e6 for a, b in there_and_back), 1),
        "ours_cpu_us": round(middle(there_and_back, 0, "cpu_s") * 1e6, 1),
        "grpc_cpu_us": round(middle(there_and_back, 1, "cpu_s") * 1e6, 1),
        "ours_cpu_ns_byte": round(middle(one_way, 0, "cpu_s") / size * 1e9, 3),
        "grpc_cpu_ns_byte": round(middle(one_way, 1, "cpu_s") / size * 1e9, 3),
    }


# --------------------------------------------------------------------------------------------------
# Shaped rates


def _share(link: Link, mbit_s: float, seconds: float) -> float:
    """Return the tensor bits per second through `link`, as a share of the rate that was set."""
    count = 20
    size = max(1, int(mbit_s * 1e6 / 8 * seconds / count))
    x = torch.zeros(size, dtype=torch.uint8)
    start = time.perf_counter()
    for i in range(count):
        link.send(Frame("sink", {"last": i == count - 1}, {"x": x}))
    link.recv(_PATIENCE_S + 4 * seconds)
    took = time.perf_counter() - start
    return round(8 * size * count / took / (mbit_s * 1e6), 4)


def _own_share(mbit_s: float, address: str, settings: Mapping[str, Any]) -> float:
    link = Shaped(dial(address), Network(up_bits_s=mbit_s * 1e6))
    try:
        return _share(link, mbit_s, settings["shaped_seconds"])
    finally:
        link.close()


def _kernel_share(mbit_s: float, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    def measured(link: Link) -> dict[str, Any]:
        _share(link, mbit_s, 0.1)  # lets TCP find the rate
        return {"share": _share(link, mbit_s, settings["shaped_seconds"])}

    case: dict[str, Any] = {"mbit_s": mbit_s, "link": name, "by": "kernel", "share": None}
    return case | _behind_bucket(mbit_s, name, measured)


def _behind_bucket(
    mbit_s: float, name: str, measured: Callable[[Link], dict[str, Any]]
) -> dict[str, Any]:
    """Return what was measured over a link that the kernel shapes, or a note why it was not."""
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or not (shutil.which("ip") and shutil.which("tc"))
    ):
        return {"note": "needs Linux, root, and the commands ip and tc"}
    try:
        with (
            _shaped_namespace(mbit_s) as (prefix, host),
            _server_process(prefix, host) as servers,
            closing(servers.dial(name)) as link,
        ):
            return measured(link)
    except (subprocess.CalledProcessError, RuntimeFailure) as error:
        what = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return {"note": f"could not be set up: {what.strip().splitlines()[-1]}"}


def _receiving(mbit_s: float, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what receiving a large frame costs this process, with and without a mark."""
    size, least = int(settings["received_bytes"]), LowWater.LEAST
    case: dict[str, Any] = {"mbit_s": mbit_s, "link": name, "bytes": size}

    def once(link: Link) -> float:
        link.send(Frame("source", {"bytes": size}))
        began = time.process_time()
        link.recv(_PATIENCE_S + 16 * size / (mbit_s * 1e6))
        return 1e3 * (time.process_time() - began)

    def measured(link: Link) -> dict[str, Any]:
        found: dict[str, list[float]] = {"cpu_ms": [], "each_cpu_ms": []}
        try:
            for turn in range(1 + int(settings["repeats"])):
                for key in found if turn % 2 else reversed(found):
                    LowWater.LEAST = least if key == "cpu_ms" else sys.maxsize
                    took = once(link)
                    if turn:
                        found[key].append(took)
        finally:
            LowWater.LEAST = least
        ratios = [a / b for a, b in zip(*found.values(), strict=True)]
        medians = {key: round(median(values), 3) for key, values in found.items()}
        return {**medians, **_spread("ratio", ratios, 3)}

    return case | _behind_bucket(mbit_s, name, measured)


@contextmanager
def _shaped_namespace(mbit_s: float) -> Iterator[tuple[list[str], str]]:
    """Yield the prefix of commands in a namespace behind a token bucket, and its address.

    The bucket is 10 ms deep and its queue holds 50 ms. Addresses are of the block that is set
    aside for benchmarks (RFC 2544, 198.18.0.0/15).
    """
    name = f"fedsys{os.getpid()}"
    near, far = f"fs{os.getpid()}a", f"fs{os.getpid()}b"
    here, there = "198.18.77.1", "198.18.77.2"
    burst = max(2000, int(mbit_s * 1e6 / 8 * 0.010))

    def do(command: str) -> None:
        subprocess.run(command.split(), check=True, capture_output=True, text=True)

    with ExitStack() as undo:
        do(f"ip netns add {name}")
        undo.callback(do, f"ip netns delete {name}")
        do(f"ip link add {near} type veth peer name {far} netns {name}")
        do(f"ip address add {here}/30 dev {near}")
        do(f"ip link set {near} up")
        do(f"ip -n {name} address add {there}/30 dev {far}")
        do(f"ip -n {name} link set {far} up")
        do(f"ip -n {name} link set lo up")
        for device, where in ((near, ""), (far, f"-n {name} ")):
            bucket = f"rate {mbit_s}mbit burst {burst} latency 50ms"
            do(f"tc {where}qdisc add dev {device} root tbf {bucket}")
        yield ["ip", "netns", "exec", name], there


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the throughput of all by the size of a tensor."""
    cases = figures["cases"]
    links = list(dict.fromkeys(case["link"] for case in cases))
    ours = {f"fedsys {link}": _column(cases, link, "ours_mb_s") for link in links}
    return Chart(
        "Throughput of a link",
        "bytes of a tensor",
        "MB/s",
        [f"{size:,}" for size in dict.fromkeys(case["bytes"] for case in cases)],
        {**ours, "bare gRPC": _column(cases, links[0], "grpc_mb_s")},
        lines=True,
        log=True,
    )


def _column(cases: Sequence[Mapping[str, Any]], link: str, key: str) -> list[float]:
    return [case[key] for case in cases if case["link"] == link]


def main() -> None:
    """Print the figures as JSON, or serve the other process of the benchmark."""
    parser = argparse.ArgumentParser(description=run.__doc__.splitlines()[0] if run.__doc__ else "")
    parser.add_argument("--serve", metavar="HOST", help=argparse.SUPPRESS)
    host = parser.parse_args().serve
    if host:
        _serve(host)
    else:
        torch.set_num_threads(1)
        print(json.dumps(run(None, {}), indent=2))


if __name__ == "__main__":
    main()
