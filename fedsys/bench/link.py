"""Our link against the same bytes over a bare gRPC stream, and the share of a shaped rate we use.

Both servers run in one other process, and the two are measured in turns, so that what else the
machine does meets both. Per size: a round trip (a frame there and back), and a one-way stream of
frames that ends with one answer. What ours does more: header, checksum, limits, and a tensor in
memory of its own at the other end.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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
    "repeats": 9,  # measurements of each kind; the median counts
    "stream_bytes": 64 << 20,  # in one measured stream, at most
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
        ``cases``: per size the throughput in MB/s (10^6 bytes) of a stream and the microseconds of
        a round trip, of ours and of bare gRPC. ``shaped``: per rate in Mbit/s and `by` the share
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


def _seconds(work: Callable[[], object], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def _case(size: int, ours: str, bare_place: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    x = torch.zeros(size, dtype=torch.uint8)
    trips = max(1, min(100, (16 << 20) // size))
    count = max(2, min(2000, settings["stream_bytes"] // size))
    link, bare = dial(ours), _Bare(bare_place)

    def our_trip() -> None:
        link.send(Frame("echo", {}, {"x": x}))
        link.recv(_PATIENCE_S)

    def bare_trip() -> None:
        bare.send(echo)
        bare.recv()

    def our_stream() -> None:
        for i in range(count):
            link.send(Frame("sink", {"last": i == count - 1}, {"x": x}))
        link.recv(_PATIENCE_S)

    def bare_stream() -> None:
        for _ in range(count):
            bare.send(sink)
        bare.send(_ANSWER)
        bare.recv()

    echo, sink = _ECHO + bytes(size - 1), _SINK + bytes(size - 1)
    works = {"our_trip": our_trip, "bare_trip": bare_trip}
    works |= {"our_stream": our_stream, "bare_stream": bare_stream}
    took: dict[str, list[float]] = {name: [] for name in works}
    try:
        for turn in range(settings["repeats"] + 1):
            for name, work in works.items():
                seconds = _seconds(work, trips if name.endswith("trip") else 1)
                if turn > 0:  # the first turn warms up
                    took[name].append(seconds)
    finally:
        link.close()
        bare.close()
    return {
        "bytes": size,
        "ours_mb_s": round(size * count / median(took["our_stream"]) / 1e6, 1),
        "grpc_mb_s": round(size * count / median(took["bare_stream"]) / 1e6, 1),
        "ours_us": round(median(took["our_trip"]) * 1e6, 1),
        "grpc_us": round(median(took["bare_trip"]) * 1e6, 1),
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
