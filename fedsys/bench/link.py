"""Our link against the same bytes over a bare gRPC stream, and the share of a shaped rate we use.

Both servers run in one other process, and the two are measured in short turns, so that what else
the machine does meets both alike; of the differences and ratios of neighbouring turns the median
is given, and the quartiles beside it. Per size: round trips (a frame there and back), and a stream
of frames one way that ends with one answer. What ours does more: header, checksum, limits, and a
tensor in memory of its own at the other end. CPU seconds are those of both processes together.

Shaped rates, as the share of the rate that is left for tensors: ``by: "fedsys"`` is our own
shaping; ``by: "kernel"`` a token bucket of Linux on a virtual Ethernet between two network
namespaces (TCP payload is 95.6 % of the rate there). The second needs root, ``ip`` and ``tc``.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from statistics import median
from typing import Any, Final

import torch

from fedsys.bench import Chart
from fedsys.config import Config
from fedsys.errors import RuntimeFailure
from fedsys.link import Link, dial, serve
from fedsys.shaping import Network, Shaped
from fedsys.wire import Frame

DEFAULTS: Final[Mapping[str, Any]] = {
    "bytes": [1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24],
    "repeats": 15,  # turns of each kind
    "stream_bytes": 32 << 20,  # in one measured stream, at most
    "shaped_mbit_s": [10, 100],
    "shaped_seconds": 2.0,
}
_PATIENCE_S: Final = 60.0
_UNLIMITED: Final = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_ECHO, _SINK, _ANSWER = b"e", b"s", b"a"


def run(_: Config | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure and return the figures.

    Args:
        options: Replaces entries of `DEFAULTS`.

    Returns:
        ``cases``: per size the throughput in MB/s (10^6 bytes) of a stream, the microseconds of a
        round trip and its CPU microseconds, of ours and of bare gRPC (medians of the turns);
        ``share`` of the throughput, ``added_us`` to a round trip, and CPU nanoseconds per byte of
        a stream. ``shaped``: per rate in Mbit/s and `by` the share
        that tensors get; None with a ``note`` where it could not be measured.

    Raises:
        RuntimeFailure: The server process does not start.
    """
    settings = {**DEFAULTS, **options}
    with _server_process([]) as (ours, bare):
        cases = [_case(size, ours, bare, settings) for size in settings["bytes"]]
        shaped = [
            {"mbit_s": rate, "by": "fedsys", "share": _own_share(rate, ours, settings)}
            for rate in settings["shaped_mbit_s"]
        ]
    shaped += [_kernel_share(rate, settings) for rate in settings["shaped_mbit_s"]]
    return {"cases": cases, "shaped": shaped}


# --------------------------------------------------------------------------------------------------
# The other process


def _ours_handler(link: Link) -> None:
    while True:
        frame = link.recv()
        if frame.kind == "echo":
            link.send(frame)
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
    ours = serve(f"grpc://{host}:0", _ours_handler, plain=True)
    bare = grpc.server(ThreadPoolExecutor(4), options=_UNLIMITED)
    method = grpc.stream_stream_rpc_method_handler(_bare_handler)
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"c": method}),))
    port = bare.add_insecure_port(f"{host}:0")
    bare.start()
    print(json.dumps([ours.address, f"{host}:{port}"]), flush=True)
    sys.stdin.read()  # until the parent ends, however it ends
    ours.stop()
    bare.stop(0).wait()


@contextmanager
def _server_process(prefix: Sequence[str], host: str = "127.0.0.1") -> Iterator[tuple[str, str]]:
    command = [*prefix, sys.executable, "-m", "fedsys.bench.link", "--serve", host]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None  # both are pipes
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeFailure(f"{' '.join(command)}: the server process ended at once")
        ours, bare = json.loads(line)
        yield ours, bare
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
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


class _Pair:
    """Ours and bare gRPC to the same process, for tensors of one size."""

    def __init__(self, size: int, ours: str, bare: str) -> None:
        self._link, self._bare = dial(ours), _Bare(bare)
        self._x = torch.zeros(size, dtype=torch.uint8)
        self._echo, self._sink = _ECHO + bytes(size - 1), _SINK + bytes(size - 1)

    def our_trips(self, count: int) -> None:
        for _ in range(count):
            self._link.send(Frame("echo", {}, {"x": self._x}))
            self._link.recv(_PATIENCE_S)

    def bare_trips(self, count: int) -> None:
        for _ in range(count):
            self._bare.send(self._echo)
            self._bare.recv()

    def our_stream(self, count: int) -> None:
        for i in range(count):
            self._link.send(Frame("sink", {"last": i == count - 1}, {"x": self._x}))
        self._link.recv(_PATIENCE_S)

    def bare_stream(self, count: int) -> None:
        for _ in range(count):
            self._bare.send(self._sink)
        self._bare.send(_ANSWER)
        self._bare.recv()

    def turn(self, work: Callable[[int], None], count: int) -> _Turn:
        cpu = self._cpu_s()
        start = time.perf_counter()
        work(count)
        wall = time.perf_counter() - start
        return _Turn(wall / count, (self._cpu_s() - cpu) / count)

    def close(self) -> None:
        self._link.close()
        self._bare.close()

    def _cpu_s(self) -> float:
        self._link.send(Frame("cpu"))
        there = float(self._link.recv(_PATIENCE_S).meta["seconds"])
        return there + time.process_time()


def _turns(
    pair: _Pair,
    ours: Callable[[int], None],
    bare: Callable[[int], None],
    count: int,
    repeats: int,
) -> list[tuple[_Turn, _Turn]]:
    """Return pairs of neighbouring turns; who begins changes, and the first pair warms up."""
    taken = []
    for turn in range(repeats + 1):
        if turn % 2:
            mine, theirs = pair.turn(ours, count), pair.turn(bare, count)
        else:
            theirs, mine = pair.turn(bare, count), pair.turn(ours, count)
        taken.append((mine, theirs))
    return taken[1:]


def _spread(name: str, values: Iterable[float], digits: int) -> dict[str, float]:
    """Return the median under `name`, and the quartiles beside it."""
    ordered = sorted(values)
    return {
        name: round(median(ordered), digits),
        f"{name}_q1": round(ordered[len(ordered) // 4], digits),
        f"{name}_q3": round(ordered[len(ordered) * 3 // 4], digits),
    }


def _case(size: int, ours: str, bare: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    trips = max(1, min(50, (4 << 20) // size))
    count = max(2, min(500, settings["stream_bytes"] // size))
    pair, repeats = _Pair(size, ours, bare), int(settings["repeats"])
    try:
        there_and_back = _turns(pair, pair.our_trips, pair.bare_trips, trips, repeats)
        one_way = _turns(pair, pair.our_stream, pair.bare_stream, count, repeats)
    finally:
        pair.close()

    def middle(turns: Sequence[tuple[_Turn, _Turn]], which: int, what: str) -> float:
        return float(median(getattr(pair[which], what) for pair in turns))

    return {
        "bytes": size,
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


def _kernel_share(mbit_s: float, settings: Mapping[str, Any]) -> dict[str, Any]:
    case: dict[str, Any] = {"mbit_s": mbit_s, "by": "kernel", "share": None}
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or not (shutil.which("ip") and shutil.which("tc"))
    ):
        return case | {"note": "needs Linux, root, and the commands ip and tc"}
    try:
        with (
            _shaped_namespace(mbit_s) as (prefix, host),
            _server_process(prefix, host) as (ours, _),
        ):
            link = dial(ours, plain=True)
            _share(link, mbit_s, 0.1)  # lets TCP find the rate
            case["share"] = _share(link, mbit_s, settings["shaped_seconds"])
            link.close()
    except (subprocess.CalledProcessError, RuntimeFailure) as error:
        what = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        case["note"] = f"could not be set up: {what.strip().splitlines()[-1]}"
    return case


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
    """Return the throughput of both by the size of a tensor."""
    cases = figures["cases"]
    return Chart(
        "Throughput of a link",
        "bytes of a tensor",
        "MB/s",
        [f"{case['bytes']:,}" for case in cases],
        {
            "fedsys": [case["ours_mb_s"] for case in cases],
            "bare gRPC": [case["grpc_mb_s"] for case in cases],
        },
        lines=True,
        log=True,
    )


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
